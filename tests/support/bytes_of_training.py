"""Train an example once for each kind of gradients that the command line names, in one launch.

The first rank of each host prints the bytes that its host has received meanwhile.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = ["--epochs", "1", "--limit", "3200", "--batch-size", "16"]  # 50 steps of 4 ranks


def received():
    """Bytes that have come to this host over eth0 so far."""
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return sum(int(fields[1]) for fields in lines if fields[0] == "eth0:")


def main():
    sys.path.insert(0, str(EXAMPLES))
    import torch_fashion_mnist
    from torch_fashion_mnist import hvd

    for gradients in sys.argv[1:]:
        hvd.init()
        hvd.barrier()
        before = received()
        sys.argv[1:] = [*OPTIONS, "--compression", gradients]
        torch_fashion_mnist.main()
        hvd.barrier()
        if hvd.local_rank() == 0:
            sys.stdout.write(f"<{gradients} {received() - before}>\n")


if __name__ == "__main__":
    main()

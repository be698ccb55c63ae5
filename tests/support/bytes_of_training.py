"""Train an example once for each kind of gradients that the command line names, in one launch.

The first rank of each host prints the bytes that its host has received meanwhile.
"""

import runpy
import sys
from pathlib import Path

import horovod.torch as hvd

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_fashion_mnist.py"
OPTIONS = ["--epochs", "1", "--limit", "3200", "--batch-size", "16"]  # 50 steps of 4 ranks


def received():
    """Bytes that have come to this host over eth0 so far."""
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return sum(int(fields[1]) for fields in lines if fields[0] == "eth0:")


def main():
    sys.path.insert(0, str(EXAMPLE.parent))
    hvd.init()
    for gradients in sys.argv[1:]:
        hvd.barrier()
        before = received()
        sys.argv[:] = [str(EXAMPLE), *OPTIONS, "--compression", gradients]
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        hvd.barrier()
        if hvd.local_rank() == 0:
            sys.stdout.write(f"<{gradients} {received() - before}>\n")


if __name__ == "__main__":
    main()

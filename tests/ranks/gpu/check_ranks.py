"""Whether training with quantized gradients on a GPU is right, on several ranks. They may share one GPU.

horovodrun -np 2 python tests/ranks/gpu/check_ranks.py                # on a GPU
horovodrun -np 2 python tests/ranks/gpu/check_ranks.py --device cpu   # what can be checked without one
"""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from shared import KINDS, make

import hvd_quant.torch as hq

STEPS = 4
# Correlation of every mean with the exact one, which is high but for coarse steps: of the Euclidean norm, or
# of 2 bits, where error feedback brings later what is missing.
LEAST = {"QSGD l2": 0.4, "error feedback": 0.1}


@contextlib.contextmanager
def without_waiting(device):
    """Within, there is an exception where this thread would wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    # Not "error", which would stop Horovod's thread, too, where it stages tensors through the host.
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="called a synchronizing CUDA operation")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_everywhere(tensor):
    return len(set(hvd.allgather_object(tensor.detach().cpu().numpy().tobytes()))) == 1


def train(kind, exchange, dtype, device):
    """A few steps; the least correlation of a mean with the exact one."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 300)]
    model = torch.nn.Sequential(*layers).to(device, dtype)
    compressor = make(hq, kind, named_parameters=model.named_parameters(), min_numel=0, exchange=exchange)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), compression=compressor
    )
    compress, waits, worst = compressor.compress, True, 1.0

    def watched(tensor):
        with contextlib.nullcontext() if waits else without_waiting(device):
            return compress(tensor)

    compressor.compress = watched
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for step in range(STEPS):
        generator = torch.Generator(device).manual_seed(STEPS * hvd.rank() + step)
        optimizer.zero_grad()
        x = torch.randn(16, 300, device=device, generator=generator).to(dtype)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side) if side is not None else contextlib.nullcontext():
            local = torch.autograd.grad(model(x).float().square().mean(), list(model.parameters()))
            model(x).float().square().mean().backward()
        optimizer.synchronize()
        for own, parameter in zip(local, model.parameters(), strict=True):
            gradients = [
                np.frombuffer(one, np.float32)
                for one in hvd.allgather_object(own.float().cpu().numpy().tobytes())
            ]
            exact = np.mean(gradients, 0).reshape(own.shape)
            assert same_everywhere(parameter.grad.float()), (kind, exchange, dtype)
            mean = parameter.grad.double().cpu().numpy()
            worst = min(worst, float((mean * exact).sum() / np.linalg.norm(mean) / np.linalg.norm(exact)))
        with optimizer.skip_synchronize():
            optimizer.step()
        waits = False  # the first step made what later ones use
    assert all(same_everywhere(parameter.float()) for parameter in model.parameters())
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="to train with")
    args = parser.parse_args()
    hvd.init()
    # The gradients are meant to come from another stream.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", hvd.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    for kind in args.kinds:
        for exchange in ("allgather", "scatter_allgather"):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                worst = train(kind, exchange, dtype, device)
                assert worst > LEAST.get(kind, 0.8), (kind, exchange, dtype, worst)
            if hvd.rank() == 0:
                print(
                    f"{kind}, {exchange}: replicas are bit-identical, and means near the exact ones",
                    flush=True,
                )
    print(f"rank {hvd.rank()} on {device}: all passed", flush=True)


if __name__ == "__main__":
    main()

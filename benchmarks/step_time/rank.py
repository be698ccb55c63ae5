"""One rank of a launch of `benchmarks.step_time`: trains the rows of a library for torch in turn, and times
each step.

Every row has a copy of the model with an optimizer of its own.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.step_time import turns
from benchmarks.step_time.before import SUFFIX, front_end

OVERHEAD_STEPS = 10
OURS = "hvd_quant 4 bits"
NO_FUSION = "4 bits, no fusion"
GRACE = "GRACE QSGD int8"
DEVICE_SECONDS = 2e-3  # of a layer's backward
LEARNING_RATE = 1e-5  # small: the model is to stay as it is


class Loss(nn.Module):
    """Squared output, a row of input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).square().sum() / len(x)


class ManySmall(nn.Module):
    """320 matrices and hardly any computation."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(320))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([matrix.square().sum() for matrix in self.matrices]).sum()


class Device(nn.Module):
    """The linear model where another device computes: this processor sleeps until gradients are there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = _Elsewhere.apply(x, layer.weight, layer.bias)
        return x


class _Elsewhere(torch.autograd.Function):
    """What a layer does to its input and to time; its gradients are its parameters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        time.sleep(DEVICE_SECONDS)
        return gradient, *(parameter.clone() for parameter in ctx.saved_tensors)


def make_model(kind: str, generator: torch.Generator) -> tuple[nn.Module, torch.Tensor]:
    """A model whose output is its loss, the same on all ranks, and a batch, which need not be."""
    torch.manual_seed(0)
    if kind == "linear":
        network = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
        return Loss(network), torch.randn(8, 1024, generator=generator)
    if kind == "device":
        return Device(), torch.zeros((), requires_grad=True)
    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True, norm_first=True)
        network = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        return Loss(network), torch.randn(2, 16, 512, generator=generator)
    return ManySmall(), torch.empty(0)


@dataclass
class Row:
    """A way to train; a `turns.Row`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    compressor: Any = None

    @property
    def sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.model.parameters()]

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).backward()
        self.optimizer.step()


def twin(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the model with gradients, but, to save memory, no parameters of its own; an optimizer."""
    other = copy.deepcopy(model)
    for parameter, original in zip(other.parameters(), model.parameters(), strict=True):
        parameter.data = original.data
    return other, torch.optim.SGD(other.parameters(), lr=LEARNING_RATE)


class Horovod:
    """Rows that exchange by Horovod; a `turns.Library`.

    Args:
        before: whether rows compare this package with another checkout's.
    """

    def __init__(self, *, before: bool) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.before = before
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()
        self.barrier = hvd.barrier

    def maximum(self, values: list[float]) -> list[float]:
        return self.hvd.allreduce(torch.tensor(values, dtype=torch.float64), op=self.hvd.Max).tolist()

    def rows(self, model: nn.Module) -> dict[str, Row]:
        ours: dict[str, dict[str, Any]] = {
            "hvd_quant 2 bits": {"bits": 2},
            OURS: {"bits": 4},
            "hvd_quant 8 bits": {"bits": 8},
            NO_FUSION: {"bits": 4, "fusion_bytes": 0},
            "4 bits, buckets of 16 MiB": {"bits": 4, "fusion_bytes": 16 << 20},
            "4 bits, no overlap": {"bits": 4, "fusion_bytes": 1 << 40},  # one bucket, complete at the end
            "4 bits, allgather": {"bits": 4, "exchange": "allgather"},
            "4 bits, scatter-allgather": {"bits": 4, "exchange": "scatter_allgather"},
        }
        if 1 < self.hvd.local_size() < self.size:
            ours["4 bits, hierarchical"] = {"bits": 4, "exchange": "hierarchical"}
        if self.before:
            ours = {name + suffix: ours[name] for name in (OURS, NO_FUSION) for suffix in ("", SUFFIX)}
        compressions = {
            "Horovod fp32": self.hvd.Compression.none,
            "Horovod fp16": self.hvd.Compression.fp16,
            **{name: front_end(name, "torch").QSGDCompressor(**options) for name, options in ours.items()},
        }
        rows = {"compute alone": Row(*twin(model))}
        for name, compression in compressions.items():
            own, optimizer = twin(model)
            named = [(f"{name}.{path}", parameter) for path, parameter in own.named_parameters()]
            optimizer = front_end(name, "torch").DistributedOptimizer(optimizer, named, compression)
            rows[name] = Row(own, optimizer, compression if name in ours else None)
        if (grace := self._grace()) is not None:
            own, optimizer = twin(model)
            named = [(f"GRACE.{path}", parameter) for path, parameter in own.named_parameters()]
            optimizer = self.hvd.DistributedOptimizer(optimizer, grace=grace, named_parameters=named)
            rows[GRACE] = Row(own, optimizer)
        return rows

    def _grace(self) -> Any:
        """GRACE (github.com/sands-lab/grace), if it is there, with the Horovod that it has patched."""
        try:
            from grace_dl.torch.helper import grace_from_params
        except ImportError:
            return None
        if "grace" not in inspect.signature(self.hvd.DistributedOptimizer).parameters:
            return None
        options = {"compressor": "qsgd", "quantum_num": 127, "memory": "none", "communicator": "allgather"}
        return grace_from_params({**options, "world_size": self.size})


class DDP:
    """Rows that exchange by torch's DistributedDataParallel, over Gloo; otherwise as `Horovod`."""

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")  # where to is in the environment
        self.dist, self.rank, self.size = dist, dist.get_rank(), dist.get_world_size()
        self.barrier = dist.barrier

    def maximum(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        self.dist.all_reduce(tensor, self.dist.ReduceOp.MAX)
        return tensor.tolist()

    def rows(self, model: nn.Module) -> dict[str, Row]:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        rank_4 = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=4, start_powerSGD_iter=2, warm_start=True
        )
        hooks: dict[str, tuple[Any, Callable[..., Any]] | None] = {
            "DDP fp32": None,
            "DDP fp16 hook": (None, default_hooks.fp16_compress_hook),
            "DDP PowerSGD rank 4": (rank_4, powerSGD_hook.powerSGD_hook),
        }
        rows = {"compute alone, beside DDP": Row(*twin(model))}
        for name, hook in hooks.items():
            own, optimizer = twin(model)
            # Over Gloo, PowerSGD of several buckets can mix up its allreduces, and abort: give it one.
            cap = 1024 if "PowerSGD" in name else None
            wrapped = nn.parallel.DistributedDataParallel(own, bucket_cap_mb=cap)
            if hook:
                wrapped.register_comm_hook(*hook)
            rows[name] = Row(wrapped, optimizer)
        return rows


def own_cpu_seconds(library: Horovod | DDP, row: Row, x: torch.Tensor) -> float:
    """CPU time that a fused bucket costs this rank's training thread, but for the codec, Horovod's calls, and
    the looks at what is being waited for, which are the more the slower the link is.

    Steps after the timed ones, because the clocks cost time too.
    """
    import horovod.torch as hvd

    from hvd_quant.codec import native
    from hvd_quant.reducer.rounds import Rounds
    from hvd_quant.torch.transport import HorovodHandle

    spent = dict.fromkeys(("own", "codec", "wire"), 0.0)
    within: list[float] = []  # what the calls under way have spent in others that are watched

    def timed(function: Callable[..., Any], account: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            within.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                seconds = time.thread_time() - begin
                spent[account] += seconds - within.pop()
                if within:
                    within[-1] += seconds

        return call

    watched = [
        (row.compressor, "compress", "own"),
        (row.compressor, "decompress", "own"),
        (native, "encode_message", "codec"),
        (native, "decode_messages", "codec"),
        (hvd, "allgather_async", "wire"),
        (hvd, "alltoall_async", "wire"),
        (hvd, "poll", "wire"),
        (hvd, "synchronize", "wire"),
        (HorovodHandle, "wait", "wire"),
        (Rounds, "all_announced", "wire"),
        (time, "sleep", "wire"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in watched]
    buckets = row.compressor.stats()["messages"]
    try:
        for (owner, name, account), original in zip(watched, originals, strict=True):
            setattr(owner, name, timed(original, account))
        for _ in range(OVERHEAD_STEPS):
            library.barrier()
            row.step(x)
    finally:
        for (owner, name, _), original in zip(watched, originals, strict=True):
            setattr(owner, name, original)
    if not spent["codec"]:
        raise RuntimeError("the codec has not been called where it was watched: adapt own_cpu_seconds")
    return spent["own"] / (row.compressor.stats()["messages"] - buckets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=("horovod", "ddp"))
    parser.add_argument("model")
    args = turns.parse(parser)

    torch.set_num_threads(1)
    library = Horovod(before=args.before) if args.library == "horovod" else DDP()
    model, x = make_model(args.model, torch.Generator().manual_seed(library.rank))
    rows = library.rows(model)
    figures = turns.measure(library, rows, x, args)
    for name in (OURS, NO_FUSION):
        if name in rows:
            turns.tell(library, args.folder, f"{name}, CPU time of its own")
            own = own_cpu_seconds(library, rows[name], x)
            figures[name]["own_seconds"] = library.maximum([own])[0]
    turns.write(library, args.folder, figures)


if __name__ == "__main__":
    main()

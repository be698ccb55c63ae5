"""Whenever user code may run, every rank has submitted the same number of Horovod's operations.

Horovod calls an operation without a name by its number: ranks that have counted differently wait for ever.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import horovod.torch as hvd
import pytest
import torch
from check_gradients import optimizer_of
from common import gathered, own_randn, same_everywhere
from shared import EXCHANGES, error_of

import hvd_quant.torch as hq
from hvd_quant.stall import StallCheck
from hvd_quant.torch import stall

LAYERS = 4
BUCKETS = [0, 8 << 20]  # one a gradient, and the default


@pytest.fixture(autouse=True)
def _between_hosts(monkeypatch):
    """Bandwidth as between hosts, so that "auto" takes what it takes there."""
    monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "1")


class Loop:
    """Training in which every rank does something of its own at every moment that a program has.

    Args:
        do: called with the moment.
        **options: of the compressor.
    """

    def __init__(self, do, **options):
        torch.manual_seed(3)
        self.do = do
        self.model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(LAYERS)))
        self.compressor = hq.QSGDCompressor(bits=8, **options)
        self.optimizer = optimizer_of(self.model, self.compressor)
        for layer in self.model:
            layer.register_forward_hook(lambda *_: do("forward"))
            layer.register_full_backward_hook(lambda *_: do("backward of a layer"))
        for parameter in self.model.parameters():
            parameter.register_hook(lambda _: do("backward"))
            parameter.register_post_accumulate_grad_hook(lambda _: do("gradient accumulated"))

    def in_a_thread(self, moment):
        thread = threading.Thread(target=self.do, args=(moment,))
        thread.start()
        thread.join()

    def step(self, number, how="step"):
        def closure():
            self.do("closure")

        self.do("before forward")
        loss = self.model(own_randn(8, 64, seed=number)).square().mean()
        self.do("before backward")
        self.optimizer.zero_grad()
        loss.backward()
        self.do("between backward and step")
        self.in_a_thread("thread between backward and step")
        if how == "synchronize":
            self.optimizer.synchronize()
            self.do("between synchronize and step")
            with self.optimizer.skip_synchronize():
                self.optimizer.step(closure)
        else:
            self.optimizer.step(closure)
        self.do("after step")
        self.in_a_thread("thread after step")


def late(moment, seconds=0.02):
    """Have the last rank be late in the middle of backward, when it has sent some of its messages."""
    if hvd.rank() == hvd.size() - 1 and moment in ("backward", "before backward"):
        time.sleep(seconds / LAYERS)


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("fusion_bytes", BUCKETS)
@pytest.mark.parametrize("how", ["step", "synchronize"])
def check_ranks_count_alike_at_every_moment(exchange, fusion_bytes, how):
    """Counted by operations that have names, and that nobody waits for in between."""
    counts, handles = [], []

    def count(moment):
        late(moment)
        handles.append(hvd.allreduce_async(torch.zeros(1), name=f"count.{len(handles)}"))
        counts.append((moment, handles[-1]))

    loop = Loop(count, exchange=exchange, fusion_bytes=fusion_bytes, min_numel=0)
    for number in range(4):
        loop.step(number, how)
        if number == 1:
            loop.compressor.reset()  # another first gradient
    for handle in handles:
        hvd.synchronize(handle)
    different = {moments for moments in zip(*gathered(counts), strict=True) if len(set(moments)) > 1}
    assert not different
    assert len({moment for moment, _ in counts}) == (12 if how == "synchronize" else 11)


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
def check_unnamed_operations_at_every_moment(exchange):
    """As in many a training loop: a mean of a metric, which all wait for."""

    def reduce(moment):
        late(moment)
        mean = hvd.allreduce(torch.tensor([float(hvd.rank())]))
        assert mean.item() == (hvd.size() - 1) / 2
        assert hvd.allgather(torch.tensor([hvd.rank()])).tolist() == list(range(hvd.size()))
        assert hvd.broadcast(torch.tensor([hvd.rank()]), 0).item() == 0
        hvd.barrier()

    loop = Loop(reduce, exchange=exchange, fusion_bytes=0, min_numel=0)
    for number in range(2):
        loop.step(number)
    assert all(same_everywhere(parameter) for parameter in loop.model.parameters())


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("fusion_bytes", BUCKETS)
def check_a_metric_between_backward_and_step(exchange, fusion_bytes):
    """A rank is late, and has all messages of the others before it comes to the metric, which has no name."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))  # 16 MiB
    optimizer = optimizer_of(model, hq.QSGDCompressor(exchange=exchange, fusion_bytes=fusion_bytes))
    is_late = hvd.rank() == hvd.size() - 1
    for parameter in model.parameters():
        parameter.register_hook(lambda _: time.sleep(0.02 if is_late else 0.0))
    for number in range(2):
        optimizer.zero_grad()
        loss = model(own_randn(8, 1024, seed=number)).square().mean()
        loss.backward()
        mean = hvd.allreduce(loss.detach())
        optimizer.step()
    assert same_everywhere(mean)
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["types", None])
def check_tensors_of_different_types(name, monkeypatch):
    """One that travels by Horovod and one that is quantized: Horovod's own error, without waiting in vain."""
    monkeypatch.setattr("hvd_quant.torch.ranks.PATIENCE_SECONDS", 1000.0)  # above the test's own time
    dtype = torch.int32 if hvd.rank() == 0 else torch.float32
    compressor = hq.QSGDCompressor()
    error = error_of(lambda: hvd.allreduce(torch.ones(5000, dtype=dtype), compression=compressor, name=name))
    assert isinstance(error, hvd.HorovodInternalError)
    assert "Mismatched data types" in str(error)


def check_who_waits_says_so():
    """Where Horovod itself would hang, every rank that waits tells for what, and at which line.

    Here none waits for ever: each ends the others' wait when all have said it.
    """
    parameter = torch.nn.Parameter(torch.ones(5000))
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), [("weight", parameter)], hq.QSGDCompressor()
    )

    def watch():
        check = StallCheck(stall.in_flight, stall.describe)
        try:
            while (text := check.look(time.monotonic(), 0.5)) is None:
                time.sleep(0.1)
            return text
        finally:
            hvd.allreduce(torch.zeros(1), name="all have said it")
            for rank in range(hvd.size()):
                if rank != hvd.rank():
                    hvd.allreduce_async(torch.zeros(1), name=f"of rank {rank}")

    (parameter * 2).sum().backward()
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(watch)
        hvd.allreduce(torch.zeros(1), name=f"of rank {hvd.rank()}")
        text = text.result()
    optimizer.step()
    assert text.startswith(f"hvd_quant: rank {hvd.rank()} of {hvd.size()} has waited 0.5 s for other ranks.")
    assert "operations in flight, by number: " in text
    assert "Gradients in flight: weight; no result of theirs has been asked for yet." in text
    assert "MainThread is at " in text
    assert 'hvd.allreduce(torch.zeros(1), name=f"of rank {hvd.rank()}")' in text

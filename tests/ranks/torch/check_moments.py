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
from common import gathered, own_randn, recover, same_everywhere
from shared import EXCHANGES, error_of

import hvd_quant.torch as hq
from hvd_quant.reducer.stall import StallCheck
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


@pytest.mark.every_combination
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


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("fusion_bytes", [0, 20_000])
@pytest.mark.parametrize("min_numel", [0, 3000])
def check_ranks_with_other_gradients(exchange, fusion_bytes, min_numel):
    """As many on every rank, but of other parameters, as with experts, or in another order, and other ones in
    every step: of several sizes, so that fused buckets are complete at other times, or gradients are small.
    """
    counts = []

    def count(moment):
        handle = hvd.allreduce_async(torch.zeros(1), name=f"count.{len(counts)}")
        counts.append((moment, handle))

    torch.manual_seed(3)
    first, last = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    experts = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(40, width), torch.nn.Linear(width, 40))
        for width in range(40, 40 * (hvd.size() + 3), 40)
    )
    model = torch.nn.ModuleList([first, *experts, last])
    optimizer = optimizer_of(
        model, hq.QSGDCompressor(exchange=exchange, fusion_bytes=fusion_bytes, min_numel=min_numel)
    )
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: count("gradient accumulated"))
    for number in range(8):
        optimizer.zero_grad()
        expert = experts[(hvd.rank() + number // 3) % len(experts)]
        last(expert(first(own_randn(8, 40, seed=number)))).square().mean().backward()
        count("between backward and step")
        hvd.allreduce(torch.ones(1))
        optimizer.step()
        count("after step")
        hvd.allreduce(torch.ones(1))
    for _, handle in counts:
        hvd.synchronize(handle)
    assert len(set(map(str, gathered(counts)))) == 1
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("groups", [True, False])
def check_groups_of_unequal_sizes_in_different_orders(groups):
    """What Horovod reduces by one operation counts as one, however many gradients it is."""
    torch.manual_seed(3)
    parts = [torch.nn.Linear(64, 64), torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2)))]
    model = torch.nn.ModuleList(parts)
    compressor = hq.QSGDCompressor(fusion_bytes=0, min_numel=0)
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
        groups=[list(part.parameters()) for part in parts] if groups else None,
    )
    for number in range(5):
        optimizer.zero_grad()
        for part in parts if hvd.rank() == 0 or not groups else parts[::-1]:
            part(own_randn(4, 64, seed=number)).square().mean().backward()
            assert hvd.allreduce(torch.ones(1)).item() == 1.0
        optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())
    assert compressor.stats()["messages"] == 5 * 6


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["kinds", None])
@pytest.mark.parametrize(
    ("first", "rest", "says"),
    [
        (torch.ones(5000, dtype=torch.int32), torch.ones(5000), "Mismatched data types"),
        (torch.ones(100), torch.ones(5000), "Mismatched data types"),  # of the control tensor, float64
        (torch.ones(5, dtype=torch.float64), torch.ones(5000), "Mismatched ALLREDUCE tensor shapes"),
    ],
)
def check_tensors_that_travel_in_different_ways(first, rest, says, name, before, monkeypatch):
    """One by Horovod, one quantized: Horovod's own error, without waiting in vain, and training goes on."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1000.0)  # above the test's own time
    compressor = hq.QSGDCompressor()
    for _ in range(before):
        hvd.allreduce(own_randn(5000), compression=compressor, name=name)
    x = first if hvd.rank() == 0 else rest
    error = error_of(lambda: hvd.allreduce(x, compression=compressor, name=name))
    assert isinstance(error, hvd.HorovodInternalError)
    assert says in str(error)
    compressor.reset()
    hvd.barrier()
    hvd.allreduce(torch.ones(1))
    for _ in range(3):
        assert same_everywhere(hvd.allreduce(own_randn(5000), compression=compressor, name=name))


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_a_state_that_one_rank_loads(exchange):
    """An error on all ranks, after which they go on, with operations without a name."""
    torch.manual_seed(3)
    model = torch.nn.Linear(64, 64)
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=0)
    optimizer = optimizer_of(model, compressor)

    def step():
        optimizer.zero_grad()
        model(own_randn(4, 64)).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    if hvd.rank() == 1:
        compressor.load_state_dict(compressor.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.5)
        assert isinstance(error_of(step), hq.RankMismatchError)
    recover(compressor, optimizer)
    for _ in range(3):
        step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


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
        check.watched = stall.check.watched
        try:
            while (text := check.poll(time.monotonic(), 0.5)) is None:
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
    assert "operations in flight, by number, the last one first: " in text
    assert "Gradients in flight: weight; no result has been requested yet." in text
    assert "MainThread is at " in text
    assert 'hvd.allreduce(torch.zeros(1), name=f"of rank {hvd.rank()}")' in text

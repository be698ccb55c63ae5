"""Differences between ranks and misuse: the same clear error on every rank, and never a hang."""

import copy
import pickle
import time

import horovod.torch as hvd
import pytest
import torch
from check_gradients import Branches, optimizer_of
from common import backward, gathered, mlp, own_randn, recover, same_everywhere, same_mismatch
from shared import error_of

import hvd_quant.torch as hq
from hvd_quant.exchange.cost import Link

EXCHANGES = ["allgather", "scatter_allgather"]
LINK = Link(1e-3, 1e9)


def first_and_rest(first, rest):
    return first if hvd.rank() == 0 else rest


def step_error(model, optimizer):
    def step():
        backward(model)
        optimizer.step()

    return error_of(step)


@pytest.mark.parametrize(
    ("field", "first", "rest"),
    [
        ("bits", 4, 8),
        ("bits", 4, 5),
        ("norm", "max", "l2"),
        ("bucket_size", 512, 511),
        ("min_numel", 0, 1024),
        ("min_numel", 1024, 10_000),
    ],
)
@pytest.mark.parametrize(("named", "groups"), [(True, None), (False, 2)])
def check_different_configuration_is_named_on_every_rank(field, first, rest, named, groups):
    model = mlp()
    make = optimizer_of if named else stock_optimizer_of
    optimizer = make(model, hq.QSGDCompressor(**{field: first_and_rest(first, rest)}), groups=groups)
    error = step_error(model, optimizer)
    assert isinstance(error, hq.RankMismatchError)
    messages = set(gathered(str(error)))
    assert len(messages) == 1
    others = ", ".join(map(str, range(1, hvd.size())))
    plural = "s" if hvd.size() > 2 else ""
    quote = '"' if isinstance(first, str) else ""
    assert (
        f"{field} is {quote}{first}{quote} on rank 0, {quote}{rest}{quote} on rank{plural} {others}"
        in str(error)
    )


def stock_optimizer_of(model, compression, **options):
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


def check_only_the_last_rank_differs():
    """The odd one out may be any rank, and all must notice."""
    bits = 3 if hvd.rank() == hvd.size() - 1 else 4
    model = mlp()
    error = step_error(model, optimizer_of(model, hq.QSGDCompressor(bits=bits)))
    same_mismatch(error)


@pytest.mark.ranks_differ
def check_other_compression_on_one_rank_is_an_error_on_all(monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model = mlp()
    compressor = hq.QSGDCompressor()  # on every rank: they are numbered
    compression = first_and_rest(hvd.Compression.fp16, compressor)
    error = step_error(model, optimizer_of(model, compression))
    assert "Mismatched" in str(error)  # Horovod's own words: one rank does not run our code


def check_other_number_of_compressors(monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    if hvd.rank() == 0:
        extra = hq.QSGDCompressor()
    model = mlp()
    error = step_error(model, optimizer_of(model, hq.QSGDCompressor()))
    assert isinstance(error, hq.RankMismatchError)
    assert "Create the same compressors, in the same order, on every rank" in str(error)
    if hvd.rank() != 0:
        extra = hq.QSGDCompressor()  # the numbers agree again
    del extra


@pytest.mark.parametrize("min_numel", [0, 10_000])
def check_order_that_differs_between_ranks(min_numel):
    """Harmless, with names, which Horovod's own optimizer has."""
    order = first_and_rest([0, 1, 2], [2, 0, 1])

    def step():
        model(own_randn(8, 40), order).backward()
        optimizer.step()

    for make in (stock_optimizer_of, optimizer_of):
        model = Branches(3)
        optimizer = make(model, hq.QSGDCompressor(min_numel=min_numel))
        for _ in range(3):
            step()
        assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_different_shapes_under_one_name():
    compressor = hq.QSGDCompressor(named_parameters=[])
    x = torch.ones(2000 + 100 * hvd.rank())
    error = error_of(lambda: hvd.allreduce(x, compression=compressor, name="shape"))
    assert isinstance(error, hq.RankMismatchError)


@pytest.mark.parametrize("op", ["Adasum", "Min", "Max", "Product"])
def check_unsupported_reductions(op):
    if op == "Adasum" and (not hvd.mpi_enabled() or hvd.size() == 3):
        pytest.skip("Horovod itself has Adasum with MPI and 2^k ranks only")
    x = own_randn(3000)
    error = error_of(lambda: hvd.allreduce(x, compression=hq.QSGDCompressor(), op=getattr(hvd, op), name=op))
    assert isinstance(error, hq.UnsupportedReductionError)
    assert "op=Average" in str(error)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_unsupported_reduction_after_other_slots(exchange):
    """Ranks that were to send a bucket in other slots have submitted equally many operations by the error."""
    torch.manual_seed(1)
    layers = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(4))
    # Two gradients in a bucket.
    optimizer = optimizer_of(layers, hq.QSGDCompressor(min_numel=0, fusion_bytes=8000, exchange=exchange))

    def step(order):
        optimizer.zero_grad()
        x = torch.randn(4, 32)
        sum(layers[i](x) for i in order).sum().backward()
        optimizer.step()

    for _ in range(3):
        step([0, 1, 2, 3])
    optimizer.op = hvd.Min
    error = error_of(lambda: step(first_and_rest([0, 1, 2, 3], [0, 2, 1, 3])))
    assert isinstance(error, hq.UnsupportedReductionError)
    hvd.allreduce(torch.ones(1))


def check_a_refused_tensor_in_a_group():
    """The next group begins anew."""
    compressor = hq.QSGDCompressor()
    group = [own_randn(3000), own_randn(3000).requires_grad_()]
    error = error_of(lambda: hvd.grouped_allreduce(group, compression=compressor, name="refused"))
    assert isinstance(error, ValueError)
    compressor.reset()
    for _ in range(3):
        means = hvd.grouped_allreduce([one.detach() for one in group], compression=compressor, name="group")
        assert all(map(same_everywhere, means))
    assert compressor._members == 0


def check_adasum_is_refused_at_construction():
    with pytest.raises(ValueError, match="op=hvd\\.Average"):
        optimizer_of(mlp(), hq.QSGDCompressor(), op=hvd.Adasum)


def check_compressor_for_two_optimizers():
    compressor = hq.QSGDCompressor()
    optimizer_of(mlp(), compressor)
    with pytest.raises(ValueError, match="serves one optimizer"):
        optimizer_of(mlp(), compressor)


def check_names_given_twice_and_a_refused_argument():
    model = mlp()
    compressor = hq.QSGDCompressor(named_parameters=model.named_parameters())
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        optimizer_of(model, compressor, op=hvd.Sum, gradient_predivide_factor=2.0)
    assert step_error(model, optimizer_of(model, compressor)) is None


def check_copies_of_what_is_used_are_refused():
    """What is not used is pickled as its arguments."""
    arguments = {"bits": 3, "overrides": {"*bias": None}, "error_feedback": True, "exchange": "allgather"}
    compressor = hq.QSGDCompressor(**arguments)
    for action in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        other = action(compressor)
        assert type(other) is type(compressor)
        assert other.options.describe(LINK) == compressor.options.describe(LINK)
        assert other._number != compressor._number
    model = mlp()
    optimizer = optimizer_of(model, compressor)
    backward(model)
    optimizer.step()
    for used in (compressor, hq.QSGDCompressor(named_parameters=model.named_parameters())):
        for action in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                action(used)


def check_reset_while_a_gradient_is_on_its_way():
    compressor = hq.QSGDCompressor()
    tensor, context = compressor.compress(own_randn(5000))
    compressor.reset()
    with pytest.raises(RuntimeError, match=r"reset\(\) was called"):
        compressor.decompress(tensor, context)
    hvd.allreduce(own_randn(5000), compression=compressor, name="afterwards")


@pytest.mark.ranks_differ
def check_reset_on_one_rank_only(monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    compressor = hq.QSGDCompressor()
    hvd.allreduce(own_randn(5000), compression=compressor, name="before")
    if hvd.rank() == 0:
        compressor.reset()
    error = error_of(lambda: hvd.allreduce(own_randn(5000), compression=compressor, name="resets"))
    assert isinstance(error, hq.RankMismatchError)
    assert "resets is 1 on rank 0, 0 on rank" in str(error)
    assert "reset() on every rank" in str(error)
    for _ in range(2):  # the error has done so
        assert same_everywhere(hvd.allreduce(own_randn(5000), compression=compressor, name="resets"))


@pytest.mark.ranks_differ
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("fusion_bytes", [0, 1 << 20])
@pytest.mark.parametrize("named", [True, False])
def check_one_rank_leaves_a_step_that_others_finish(exchange, fusion_bytes, named, monkeypatch):
    """They get an error, do not wait for what it will not send, and do not use a mean that it does not."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model = mlp()
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=fusion_bytes)
    optimizer = (optimizer_of if named else stock_optimizer_of)(model, compressor)
    if not named:  # its first step, in which buckets are open until results are asked for
        hvd.barrier()
    else:
        assert step_error(model, optimizer) is None
    optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model)
    if hvd.rank() != 0:
        error = error_of(optimizer.step)
        assert isinstance(error, hq.RankMismatchError)
        assert "rank 0 left this step" in str(error)
    assert all(map(torch.equal, model.parameters(), before))
    recover(compressor, optimizer)
    for _ in range(2):
        assert step_error(model, optimizer) is None
        assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.ranks_differ
@pytest.mark.parametrize("exchange", EXCHANGES)
def check_a_rank_that_waited_in_vain_leaves_a_step_that_others_finish(exchange, monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model = mlp()
    compressor = hq.QSGDCompressor(exchange=exchange, min_numel=0, fusion_bytes=0)
    optimizer = optimizer_of(model, compressor)
    if hvd.rank() != 0:
        time.sleep(2)
    backward(model)
    if hvd.rank() == 0:
        # Until the others agree with what it has told: now they wait for what it will not send.
        agreement = compressor._reducer.agreement
        while agreement.proposed and not agreement._proposal.ready():
            time.sleep(0.01)
    else:
        assert "rank 0 left this step" in str(error_of(optimizer.step))
    recover(compressor, optimizer)
    for _ in range(2):
        assert step_error(model, optimizer) is None
        assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.ranks_differ
@pytest.mark.parametrize("exchange", EXCHANGES)
def check_reset_brings_ranks_together(exchange):
    """However much each has sent, and however often each has called it."""
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=0)
    hvd.allreduce(own_randn(5000), compression=compressor, name="before")
    for _ in range(hvd.rank()):
        compressor.compress(own_randn(5000))
    for _ in range(1 + hvd.rank()):
        compressor.reset()
    for _ in range(3):
        result = hvd.allreduce(own_randn(5000), compression=compressor, name="after")
        assert same_everywhere(result)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_training_goes_on_after_one_step_in_another_order(exchange, monkeypatch):
    """Without names, and with buckets that have come to differ in it."""
    sizes = {"a": 400_000, "b": 2000, "c": 3000}
    model = torch.nn.ParameterDict({name: torch.zeros(size) for name, size in sizes.items()})
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=1_000_000)
    monkeypatch.setattr(compressor, "_bind_to", lambda optimizer: None)  # or it would have names
    optimizer = stock_optimizer_of(model, compressor)

    def step(order):
        for name in order:
            ((1 + hvd.rank()) * model[name] + 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    error = error_of(lambda: step("abc" if hvd.rank() == 0 else "bca"))
    same_mismatch(error)
    recover(compressor, optimizer)
    for _ in range(3):
        step("cab")
        assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("fusion_bytes", [0, 1_000_000, 16 << 20])
def check_tensors_that_differ_and_have_no_names(exchange, fusion_bytes, monkeypatch):
    """Other buckets, and so many that a rank would wait for some that no other sends."""
    monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "0.05")  # where "auto" depends on the size
    sizes = [2000, first_and_rest(400_000, 1500), 3000]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=fusion_bytes)
    monkeypatch.setattr(compressor, "_bind_to", lambda optimizer: None)  # or it would have names
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), compression=compressor)

    def step():
        for parameter in parameters:
            (parameter + 1).square().sum().backward()
        optimizer.step()

    error = error_of(step)
    assert "named_parameters=" in same_mismatch(error)


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
def check_parameters_that_are_listed_in_another_order(exchange):
    model = mlp()
    named = list(model.named_parameters())
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=first_and_rest(named[::-1], named),
        compression=hq.QSGDCompressor(exchange=exchange),
    )
    error = step_error(model, optimizer)
    assert 'number 0 is "2.bias" on rank 0, "0.weight" on rank' in same_mismatch(error)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_two_stock_optimizers_and_one_compressor(exchange):
    """They work as long as the same gradients are on their way; here the first rank has one more."""
    a, b = (torch.nn.Parameter(torch.zeros(size)) for size in (5000, 7000))
    named = [(f"{exchange}.a", a), (f"{exchange}.b", b)]  # of which Horovod keeps one, see below
    compressor = hq.QSGDCompressor(exchange=exchange, named_parameters=named, fusion_bytes=0)
    first, second = (
        hvd.DistributedOptimizer(
            torch.optim.SGD([one[1]], lr=0.1), named_parameters=[one], compression=compressor
        )
        for one in named
    )
    for parameters in ([a, b], [b, a]):
        for parameter in parameters:
            (parameter + hvd.rank()).square().sum().backward()
        first.step()
        second.step()
        assert same_everywhere(a)
        assert same_everywhere(b)
    if hvd.rank() == 0:
        (b + 1).square().sum().backward()
    (a + 1).square().sum().backward()
    error = error_of(first.step)
    assert f'what others lack is ["{exchange}.b"] on rank 0, [] on rank' in same_mismatch(error)


def check_a_rank_that_is_late_and_differs_when_others_have_sent_a_small_gradient(monkeypatch):
    """What these have handed to Horovod must not stay there and be taken for a later step's."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)

    def make(bits):
        torch.manual_seed(1)
        model = torch.nn.Module()
        model.large, model.small = (torch.nn.Parameter(torch.randn(count)) for count in (5000, 10))
        return model, optimizer_of(model, hq.QSGDCompressor(bits=bits))

    def step(model, optimizer):
        optimizer.zero_grad()
        model.small.sum().backward()
        if hvd.rank() != 0:
            time.sleep(1.3)  # the other comes between the two
        (model.large * 1.5).sum().backward()
        optimizer.step()

    model, optimizer = make(first_and_rest(4, 8))
    if hvd.rank() == 0:
        time.sleep(1.5)
    error = error_of(lambda: step(model, optimizer))
    assert "bits is 4 on rank 0" in same_mismatch(error)
    model, optimizer = make(4)
    hvd.barrier()
    for _ in range(2):
        assert error_of(lambda: step(model, optimizer)) is None
        assert same_everywhere(model.small)
        assert same_everywhere(model.large)


def check_a_rank_that_is_late(monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model = mlp()
    compressor = hq.QSGDCompressor()
    optimizer = optimizer_of(model, compressor)
    if hvd.rank() == 0:
        time.sleep(2)
    for step in range(4):
        assert step_error(model, optimizer) is None
        assert all(same_everywhere(parameter) for parameter in model.parameters())
        if step == 1:
            compressor.reset()


def check_process_set_that_horovod_does_not_know():
    with pytest.raises(ValueError, match="does not know this process_set yet"):
        hq.QSGDCompressor(process_set=hvd.ProcessSet([0]))


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_one_reduction_that_is_not_supported(exchange):
    """Ranks that ask for the results in different orders: who is refused first must not hold up the other."""
    compressor = hq.QSGDCompressor(exchange=exchange)
    names = ["mean", "minimum"]
    handles = {}
    for name, op in zip(names, (hvd.Average, hvd.Min), strict=True):
        control, context = compressor.compress(own_randn(5000))
        handles[name] = hvd.allreduce_async(control, name=f"{exchange}.{name}", op=op), context

    def results():
        for name in first_and_rest(names, names[::-1]):
            handle, context = handles[name]
            compressor.decompress(hvd.synchronize(handle), context)

    assert isinstance(error_of(results), hq.UnsupportedReductionError)
    compressor.reset()
    hvd.barrier()


def check_two_compressors_whose_results_are_asked_for_in_different_orders(monkeypatch):
    """They are right, if late, where nothing is left to be sent. Otherwise the order must be the same.

    It must be in the first two steps, in which everything is sent when a result is asked for.
    """
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    compressors = [hq.QSGDCompressor(fusion_bytes=0) for _ in range(2)]
    for order in ([0, 1], [0, 1], first_and_rest([0, 1], [1, 0]), first_and_rest([0, 1], [1, 0])):
        sent = []
        for i, compressor in enumerate(compressors):
            control, context = compressor.compress(own_randn(5000, seed=i))
            sent.append((hvd.allreduce_async(control, name=f"compressor {i}"), context))
        for i in order:
            handle, context = sent[i]
            result = compressors[i].decompress(hvd.synchronize(handle), context)
            assert torch.isfinite(result).all()
        hvd.barrier()


def check_tensor_in_an_autograd_graph():
    x = torch.ones(3000, requires_grad=True)
    with pytest.raises(ValueError, match="not differentiable"):
        hvd.allreduce(x * 2, compression=hq.QSGDCompressor(), name="graph")


def check_training_goes_on_after_a_caught_error():
    model = mlp()
    step_error(model, optimizer_of(model, hq.QSGDCompressor(bits=first_and_rest(4, 8))))
    model = mlp()
    assert step_error(model, optimizer_of(model, hq.QSGDCompressor())) is None
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_process_set_that_only_the_optimizer_knows():
    if hvd.size() < 3:
        pytest.skip("needs 3 ranks")
    process_set = hvd.add_process_set([0, 1])
    with pytest.raises(ValueError, match="same process_set"):
        optimizer_of(mlp(), hq.QSGDCompressor(), process_set=process_set)
    hvd.barrier()
    hvd.remove_process_set(process_set)

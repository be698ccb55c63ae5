"""The reducer's promises: ranks in one process, with a clock of their own on which minutes pass at once."""

import functools

import numpy as np
import pytest
from front_end import Compressor
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation

from hvd_quant import DQSGD, QSGD
from hvd_quant.exchange.in_process import Network
from hvd_quant.reducer import polling
from hvd_quant.reducer.errors import RankMismatchError, UnsupportedReductionError

EXCHANGES = ["allgather", "scatter_allgather", "auto"]
SIZES = {"a": 3000, "b": 500, "c": 64}
exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
fusions = pytest.mark.parametrize("fusion_bytes", [0, 1 << 20])


@pytest.fixture
def world(monkeypatch):
    """A function that runs a program on ranks; it is told the rank, its transport, and the clock."""

    def run(size, program):
        network, simulation = Network(size), Simulation()
        monkeypatch.setattr(polling, "clock", simulation)
        monkeypatch.setattr(polling, "POLL_SECONDS", 0.25)  # the clock jumps, and this is how far
        ranks = [lambda rank: program(rank, network.ranks[rank], simulation)] * size
        results = simulation.run(*ranks)
        run.operations = [transport.operations for transport in network.ranks]
        run.seconds = simulation.monotonic()
        return results

    return run


def gradients(rank, step=0, sizes=SIZES):
    rng = np.random.default_rng([rank, step])
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def errors(results, kind=RankMismatchError):
    """The text of the error that all ranks have."""
    for result in results:
        if not isinstance(result, kind):
            raise AssertionError(f"{result!r} is not the error that was expected") from (
                result if isinstance(result, Exception) else None
            )
    assert len({str(result) for result in results}) == 1
    return str(results[0])


def ok(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def error_of(action):
    try:
        action()
    except Exception as error:
        return error
    return None


# --- it works -------------------------------------------------------------------------------------------


@exchanges
@fusions
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_ranks_have_the_mean(world, exchange, fusion_bytes, named, size):
    def program(rank, transport, clock):
        compressor = Compressor(
            transport, SIZES if named else None, scheme=QSGD(8), exchange=exchange, fusion_bytes=fusion_bytes
        )
        found = []
        for step in range(3):
            arrays = gradients(rank, step)
            compressor.step(arrays)
            found.append(arrays)
        return found

    results = ok(world(size, program))
    for step in range(3):
        for name in SIZES:
            exact = np.mean([gradients(rank, step)[name] for rank in range(size)], axis=0)
            for other in results:
                assert other[step][name].tobytes() == results[0][step][name].tobytes()
            assert np.abs(results[0][step][name] - exact).max() < 0.15
    assert len(set(world.operations)) == 1


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_operations_without_a_name_at_any_moment(data):
    """Whatever is late, whatever gradients a rank has and in whatever order: ranks count alike."""
    size = data.draw(st.integers(2, 4))
    exchange = data.draw(st.sampled_from(EXCHANGES))
    fusion_bytes = data.draw(st.sampled_from([0, 3000, 1 << 20]))
    names = [f"g{i}" for i in range(6)]
    sizes = {name: 200 * (i + 1) for i, name in enumerate(names)}
    steps = 5
    # As of experts: every rank has some of the gradients in backward, as many as the others; the rest follow.
    counts = [data.draw(st.integers(0, 6)) for _ in range(steps)]
    orders = [[data.draw(st.permutations(names)) for _ in range(size)] for _ in range(steps)]
    lateness = [[data.draw(st.sampled_from([0.0, 0.01, 5.0])) for _ in range(size)] for _ in range(steps)]

    def program(rank, transport, clock):
        compressor = Compressor(transport, sizes, exchange=exchange, fusion_bytes=fusion_bytes)
        for step in range(steps):
            arrays = gradients(rank, step, sizes)
            sent = []
            for place, name in enumerate(orders[step][rank]):
                if place == counts[step]:  # the end of backward
                    clock.sleep(lateness[step][rank])
                    assert compressor.reduce([1.0], None)() == [1.0]
                values, gradient = compressor.compress(arrays[name], name)
                sent.append((compressor.reduce(values, name), gradient))
                if place < counts[step]:
                    assert compressor.reduce([1.0], None)() == [1.0]  # in a hook
            for reduced, gradient in sent:
                compressor.decompress(reduced(), gradient)
            assert compressor.reduce([1.0], None)() == [1.0]
        return arrays

    network, simulation = Network(size), Simulation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polling, "clock", simulation)
        patch.setattr(polling, "POLL_SECONDS", 0.25)
        results = ok(
            simulation.run(
                *[lambda rank: program(rank, network.ranks[rank], simulation) for _ in range(size)]
            )
        )
    assert len({tuple(array.tobytes() for array in one.values()) for one in results}) == 1


# --- differences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheme": QSGD(3)}, "bits is 4 on ranks 0, 1, 3 on rank 2"),
        ({"exchange": "allgather"}, 'exchange is "auto" on ranks 0, 1, "allgather" on rank 2'),
        ({"fusion_bytes": 77}, "fusion_bytes is 8388608 on ranks 0, 1, 77 on rank 2"),
        ({"number": 1}, "Create the same compressors, in the same order, on every rank"),
        ({"parameters": {**SIZES, "a": 999}}, 'parameter a is [[3000], "float32"] on ranks 0, 1'),
        ({"parameters": dict(reversed(SIZES.items()))}, "list their parameters in different orders"),
    ],
)
@pytest.mark.parametrize("late", [0.0, 90.0])
def test_a_rank_that_differs(world, options, says, late):
    """At once, and where it comes after the others have lost their patience, and gone on."""

    def program(rank, transport, clock):
        arguments = {"parameters": SIZES, **(options if rank == 2 else {})}
        compressor = Compressor(transport, **arguments)
        clock.sleep(late * (rank == 2))
        compressor.step(gradients(rank, sizes=arguments["parameters"]))

    assert says in errors(world(3, program))
    assert world.seconds < 400


@exchanges
@fusions
def test_gradients_in_different_orders_without_names(world, exchange, fusion_bytes):
    def program(rank, transport, clock):
        compressor = Compressor(transport, exchange=exchange, fusion_bytes=fusion_bytes)
        arrays = gradients(rank)
        order = ["a", "b", "c"] if rank else ["b", "a", "c"]
        error = error_of(lambda: compressor.step({name: arrays[name] for name in order}))
        compressor.step(gradients(rank, 1))  # they go on together
        return error

    assert "named_parameters=" in errors(ok_but(world(3, program), RankMismatchError))


def ok_but(results, kind):
    ok([result for result in results if not isinstance(result, kind)])
    return results


@exchanges
def test_one_rank_has_another_gradient_in_flight(world, exchange):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES, exchange=exchange, fusion_bytes=0)
        arrays = gradients(rank)
        sent = []
        for name in ["a", "b"] if rank == 0 else ["a"]:
            values, gradient = compressor.compress(arrays[name], name)
            sent.append((compressor.reduce(values, name), gradient))
        reduced, gradient = sent[0]
        return error_of(lambda: compressor.decompress(reduced(), gradient))

    assert 'what others lack is ["b"] on rank 0, [] on ranks 1, 2' in errors(world(3, program))


def test_a_reduction_that_is_not_supported(world):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES)
        values, gradient = compressor.compress(gradients(rank)["a"], "a")
        compressor.reduce(values, "a")()
        return error_of(lambda: compressor.decompress([max(1.0, value / 2) for value in values], gradient))

    errors(world(2, program), UnsupportedReductionError)


# --- late ranks -----------------------------------------------------------------------------------------


@exchanges
@pytest.mark.parametrize("size", [2, 3])
def test_a_reduction_that_is_not_supported_with_skipped_slots(world, exchange, size):
    """Ranks that had a message ready in fewer slots have submitted more operations by the error."""
    sizes = dict.fromkeys("abcd", 1000)

    def program(rank, transport, clock):
        compressor = Compressor(transport, sizes, exchange=exchange, fusion_bytes=8000)  # two in a bucket
        for step in range(3):
            compressor.step(gradients(rank, step, sizes))
        arrays, sent = gradients(rank, 3, sizes), []
        for name in "acbd" if rank else "abcd":
            values, gradient = compressor.compress(arrays[name], name)
            sent.append((compressor.reduce(values, name, np.min), gradient))
        error = error_of(lambda: [compressor.decompress(reduced(), one) for reduced, one in sent])
        assert compressor.reduce([1.0], None)() == [1.0]
        compressor.step(gradients(rank, 4, sizes))
        return error

    errors(world(size, program), UnsupportedReductionError)
    assert len(set(world.operations)) == 1


@exchanges
@pytest.mark.parametrize("late", [1.0, 59.0, 61.0, 200.0])
def test_a_rank_that_is_late_with_its_first_gradient(world, exchange, late):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES, exchange=exchange, fusion_bytes=0)
        clock.sleep(late * (rank == 0))
        for step in range(4):
            arrays = gradients(rank, step)
            compressor.step(arrays, functools.partial(compressor.reduce, [2.0], None))
            if step == 1:
                compressor.reducer.reset()
        return arrays["a"].tobytes()

    assert len(set(ok(world(3, program)))) == 1
    assert len(set(world.operations)) == 1


@exchanges
@pytest.mark.parametrize("late", [1.0, 59.0, 61.0, 119.0, 200.0])
def test_a_rank_that_is_late_between_backward_and_step(world, exchange, late):
    """Longer than the others' patience, or twice; and in that step slots are others, by a small gradient."""

    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES, exchange=exchange, fusion_bytes=0, min_numel=100)
        for step in range(6):
            arrays = gradients(rank, step)
            order = ["a", "b", "c"] if step == 3 else ["c", "a", "b"]
            sent = []
            for name in order:
                values, gradient = compressor.compress(arrays[name], name)
                sent.append((compressor.reduce(values, name), gradient))
                if step == 4:
                    assert compressor.reduce([1.0], None)() == [1.0]
            clock.sleep(late * (step == 3 and rank == 0))
            for reduced, gradient in sent:
                compressor.decompress(reduced(), gradient)
        return arrays["a"].tobytes()

    assert len(set(ok(world(2, program)))) == 1


# --- leaving a step -------------------------------------------------------------------------------------


@exchanges
@fusions
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_one_rank_leaves_a_step_that_others_finish(world, exchange, fusion_bytes, named, first):
    """They get an error, do not wait for what it will not send, and use no mean that it does not."""

    def program(rank, transport, clock):
        parameters = SIZES if named else None
        compressor = Compressor(transport, parameters, exchange=exchange, fusion_bytes=fusion_bytes)
        if not first:
            compressor.step(gradients(rank))
        arrays = gradients(rank, 1)
        error, before = None, {name: array.copy() for name, array in arrays.items()}
        if rank == 0:
            for name, array in arrays.items():
                values, _ = compressor.compress(array, name if named else None)
                compressor.reduce(values, name)
            compressor.reducer.reset()
        else:
            error = error_of(lambda: compressor.step(arrays))
            assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
            compressor.reducer.reset()
        for step in (2, 3):
            arrays = gradients(rank, step)
            compressor.step(arrays)
        return error, arrays["a"].tobytes()

    results = ok(world(3, program))
    assert len({array for _, array in results}) == 1
    assert results[0][0] is None
    assert "rank 0 left this step" in errors([error for error, _ in results[1:]])


def test_one_rank_resets_between_steps(world):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES)
        compressor.step(gradients(rank))
        if rank == 0:
            compressor.reducer.reset()
        error = error_of(lambda: compressor.step(gradients(rank, 1)))
        compressor.step(gradients(rank, 2))
        return error

    text = errors(world(3, program))
    assert "resets is 1 on rank 0, 0 on ranks 1, 2" in text
    assert "reset() on every rank" in text


@exchanges
def test_resets_bring_ranks_together(world, exchange):
    """However much each has sent, and however often each has called it."""

    def program(rank, transport, clock):
        compressor = Compressor(transport, exchange=exchange, fusion_bytes=0)
        compressor.step(gradients(rank))
        for _ in range(rank):
            compressor.compress(np.ones(50, np.float32))
        for _ in range(1 + rank):
            compressor.reducer.reset()
        for step in range(3):
            arrays = gradients(rank, step)
            compressor.step(arrays)
        return arrays["a"].tobytes()

    assert len(set(ok(world(3, program)))) == 1


def test_a_gradient_that_was_left(world):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES)
        values, gradient = compressor.compress(gradients(rank)["a"], "a")
        compressor.reducer.reset()
        return error_of(lambda: compressor.decompress(values, gradient))

    assert "reset() was called" in errors(world(2, program), RuntimeError)


def test_a_gradient_that_is_submitted_twice(world):
    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES)
        compressor.compress(gradients(rank)["a"], "a")
        compressor.compress(gradients(rank)["a"], "a")

    assert "submitted again while it is in flight" in errors(world(2, program), RuntimeError)


# --- ranks that have not come equally far ---------------------------------------------------------------


def test_ranks_go_on_from_the_one_that_has_come_furthest(world):
    """One has loaded a state. The bits are the same on all ranks then, and so is the mean."""

    def program(rank, transport, clock):
        compressor = Compressor(transport, SIZES, scheme=DQSGD(k=0.1), fusion_bytes=0)
        for step in range(2):
            compressor.step(gradients(rank, step))
        if rank == 1:
            other = Compressor(Network(1).ranks[0], SIZES, scheme=DQSGD(k=0.1))
            for step in range(5):
                other.step(gradients(rank, step))
            compressor.state.load_state_dict(other.state.state_dict())
        compressor.reducer.reset()
        arrays = gradients(rank, 9)
        compressor.step(arrays)
        return arrays["a"].tobytes(), compressor.state.most_uses(), compressor.state.schedule.step

    results = ok(world(3, program))
    assert len(set(results)) == 1
    assert results[0][1:] == (6, 6)


# --- questions ------------------------------------------------------------------------------------------


def test_a_question_asked_in_vain_does_not_spoil_the_next_error(world):
    """Of another compressor, as after giving up the first."""

    def program(rank, transport, clock):
        found = []
        for number, late in enumerate((True, False, False)):
            compressor = Compressor(transport, number=number)
            size = 500 if rank == 0 else 600
            values, gradient = compressor.compress(np.ones(size, np.float32), None)
            reduced = compressor.reduce(values, f"call {number}")()
            clock.sleep(130.0 * (late and rank != 0))
            found.append(error_of(lambda: compressor.decompress(reduced, gradient)))  # noqa: B023
            compressor.reduce([0.0], f"barrier {number}")()
        return found

    for number, found in enumerate(zip(*ok(world(2, program)), strict=True)):
        assert all(isinstance(error, RankMismatchError) for error in found)
        assert ("did not all answer" in str(found[0])) == (number == 0)

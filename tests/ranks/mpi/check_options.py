"""The options that `hvd_quant.mpi` shares with the compressors: names, error feedback, DQ-SGD, min_numel."""

import numpy as np
import pytest
from common import EXCHANGES, WORLD, mean_of, own_values, same_everywhere
from shared import error_of

import hvd_quant.mpi as hm
from hvd_quant import DQSGD, QSGD

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
COARSE = QSGD(bits=2, bucket_size=64)


def average(comm, x, **options):
    out = np.empty_like(x)
    comm.Allreduce(x, out, op=hm.AVERAGE, **options)
    return out


def is_exact(found, x):
    """Whether it is the mean, but for float32."""
    return np.allclose(found, mean_of(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def check_small_calls_are_exact(dtype):
    small, large = (own_values(count, dtype=dtype) for count in (999, 1000))
    with hm.QuantizedComm(WORLD, COARSE, min_numel=1000) as comm:
        found = average(comm, small)
        assert same_everywhere(found)
        tolerance = 2e-3 if dtype == np.float16 else 1e-5
        assert np.allclose(found, mean_of(small), rtol=tolerance, atol=tolerance)
        assert not is_exact(average(comm, large), large)
        # Small values go as float32, large ones as 2 bits and a float32 for 64 of them.
        sent = 4 * small.size + large.size * (2 / 8 + 4 / 64)
        assert comm.stats()["wire_bytes"] == pytest.approx(sent, rel=0.2)


def check_small_calls_of_bfloat16():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(own_values(500)).to(torch.bfloat16)
    out = torch.empty_like(x)
    with hm.QuantizedComm(WORLD, COARSE, min_numel=1000) as comm:
        comm.Allreduce(x, out, op=hm.AVERAGE)
    exact = torch.from_numpy(mean_of(x.float().numpy())).to(torch.bfloat16)
    assert same_everywhere(out.view(torch.int16).numpy())
    assert (out.float() - exact.float()).abs().max() <= 2.0**-7 * exact.float().abs().max()


def check_not_finite_values_arrive_in_small_calls():
    x = own_values(100)
    x[[3, 5]] = np.nan, np.inf
    with hm.QuantizedComm(WORLD, COARSE, min_numel=1000) as comm:
        found = average(comm, x)
    assert np.array_equal(np.flatnonzero(~np.isfinite(found)), [3, 5])


@exchanges
def check_overrides_go_by_names(exchange):
    x = own_values(3000)
    overrides = {"*.bias": None, "head.*": QSGD(bits=8)}
    with hm.QuantizedComm(WORLD, COARSE, exchange=exchange, overrides=overrides) as comm:
        found = {name: average(comm, x, name=name) for name in ("a.bias", "head.weight", "a.weight")}
        error = error_of(lambda: average(comm, x))
    assert isinstance(error, ValueError)
    assert "give every call a name=" in str(error)
    assert all(map(same_everywhere, found.values()))
    assert is_exact(found["a.bias"], x)
    errors = [np.abs(found[name] - mean_of(x)).mean() for name in ("head.weight", "a.weight")]
    assert 0 < errors[0] < errors[1] / 20


def check_names_that_differ():
    x = own_values(3000)
    with hm.QuantizedComm(WORLD, COARSE, overrides={"*.bias": None}) as comm:
        name = "a.bias" if WORLD.rank == 0 else "a.weight"
        error = error_of(lambda: average(comm, x, name=name))
        assert isinstance(error, hm.RankMismatchError)
        assert 'name is "a.bias" on rank 0, "a.weight" on rank' in str(error)
        assert same_everywhere(average(comm, x, name="a.weight"))


@exchanges
def check_error_feedback_sends_what_was_lost(exchange):
    """The mean of many steps' results is far nearer to the exact mean than one of them is."""
    x, steps = own_values(2000), 40
    options = {"exchange": exchange, "error_feedback": True}
    with hm.QuantizedComm(WORLD, QSGD(2, bucket_size=64, rounding="nearest"), **options) as comm:
        found = [average(comm, x, name="x") for _ in range(steps)]
        assert isinstance(error_of(lambda: average(comm, x)), ValueError)
    assert same_everywhere(found[-1])
    one, many = (np.abs(np.mean(some, axis=0) - mean_of(x)).mean() for some in (found[:1], found))
    assert many < one / 8


def check_nearest_needs_error_feedback():
    with pytest.raises(ValueError, match="needs error_feedback=True"):
        hm.QuantizedComm(WORLD, QSGD(rounding="nearest"))


def check_bits_follow_the_norm():
    """A step ends when a name comes again; ranks differ in their norms, and agree on the bits."""
    scheme = DQSGD(k=2.0, bucket_size=64)
    with hm.QuantizedComm(WORLD, scheme) as comm:
        for size in (1.0, 0.02, 5.0):
            for name in ("a", "b"):
                x = np.zeros(1000, np.float32)
                x[0] = size * (1 + comm.rank)
                assert same_everywhere(average(comm, x, name=name))
        bits = comm.stats()["bits"]
    assert len(bits) == 3
    assert bits[0] == 8  # nothing is known of the norm yet
    square = 2 * np.mean([(1.0 + rank) ** 2 for rank in range(WORLD.size)])
    levels = 2.0 * np.sqrt(square)
    assert bits[1] == min(8, int(np.ceil(np.log2(levels + 1))) + 1)
    assert bits[2] == 2
    assert len(set(WORLD.allgather(tuple(bits)))) == 1


def check_a_budget_is_kept():
    steps = 20
    with hm.QuantizedComm(WORLD, DQSGD(mean_bits=4, total_steps=steps)) as comm:
        for step in range(steps):
            requests = [
                comm.Iallreduce(x, np.empty_like(x), hm.AVERAGE, name)
                for name, x in {"a": own_values(500, step), "b": own_values(300, step)}.items()
            ]
            for request in requests[:: 1 if comm.rank % 2 else -1]:
                request.Wait()
        bits = comm.stats()["bits"]
    assert sum(bits) == 4 * steps


@pytest.mark.parametrize("scheme", [QSGD(2, bucket_size=64), DQSGD(k=3.0, bucket_size=64)])
@pytest.mark.parametrize("error_feedback", [False, True])
def check_a_state_goes_on_where_it_was_taken(scheme, error_feedback):
    def run(comm, steps):
        return [average(comm, own_values(3000, step), name="x").tobytes() for step in steps]

    with hm.QuantizedComm(WORLD, scheme, error_feedback=error_feedback, seed=7) as comm:
        run(comm, range(3))
        state = comm.state_dict()
        expected = run(comm, range(3, 6))
    with hm.QuantizedComm(WORLD, scheme, error_feedback=error_feedback) as comm:
        comm.load_state_dict(state)
        assert comm.stats()["steps"] == 3
        assert run(comm, range(3, 6)) == expected


def check_states_that_differ():
    with hm.QuantizedComm(WORLD, COARSE) as comm:
        state = comm.state_dict()
        for _ in range(1 + WORLD.rank):
            state = {**state, "uses": {"": state["uses"].get("", 0) + 1}}
        error = error_of(lambda: comm.load_state_dict(state))
        assert isinstance(error, hm.RankMismatchError)
        assert "not come equally far" in str(error)
        error = error_of(lambda: comm.load_state_dict({} if WORLD.rank == 0 else comm.state_dict()))
        assert isinstance(error, ValueError)
        assert "not a state of this hvd_quant compressor" in str(error)
        assert same_everywhere(average(comm, own_values(100)))

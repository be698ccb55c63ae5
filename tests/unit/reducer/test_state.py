"""The state of the training, as it is saved and loaded."""

import warnings

import numpy as np
import pytest

from hvd_quant import QSGD
from hvd_quant.reducer.state import Residuals, TrainingState, taken_over, without_own


def state_of(rank=0, size=2, residuals=True):
    state = TrainingState(QSGD(), 0, Residuals() if residuals else None)
    state.place = rank, size
    return state


def test_residuals_of_all_ranks_are_shared_out():
    """Their mean, what has not been sent of the mean gradient, stays the same for any number of ranks."""
    rows = np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 8.0]], np.float32)
    saved = {**without_own(state_of().state_dict()), "residuals_of_ranks": {"w": rows}}
    for size in (1, 2, 3):
        loaded = []
        for rank in range(size):
            state = state_of(rank, size)
            state.load_state_dict(saved)
            loaded.append(state.residuals.kept["w"])
        np.testing.assert_array_equal(np.mean(loaded, axis=0), rows.mean(0))
        if size == 2:
            np.testing.assert_array_equal(loaded, rows)


def test_a_state_of_all_ranks_needs_a_rank():
    state = state_of()
    state.place = None
    with pytest.raises(ValueError, match="initialise Horovod"):
        state.load_state_dict({"seed": 0, "uses": {}, "residuals_of_ranks": {}})


@pytest.mark.parametrize("rank", [0, 1])
def test_another_ranks_state_is_warned_of(rank):
    saved = state_of(0).state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state_of(rank).load_state_dict(saved)
        state_of(rank, residuals=False).load_state_dict(saved)
    said = ["rank 1 of 2 has loaded a compressor's state with the residuals of rank 0 of 2"] * rank
    assert [str(one.message).partition(".")[0] for one in caught] == said


def test_statistics_go_on():
    state = state_of()
    state.statistics.raw_bytes, state.statistics.wire_bytes = 800, 100
    for _ in range(3):
        state.use("w")
    other = state_of()
    other.load_state_dict(state.state_dict())
    assert other.stats() == state.stats()
    assert other.stats()["steps"] == 3


@pytest.mark.parametrize("statistics", [{"raw_bytes": -1}, {"messages": "many"}, {"unknown": 1}, 3])
def test_statistics_that_are_none(statistics):
    with pytest.raises(ValueError, match="not a state of this hvd_quant compressor"):
        state_of().load_state_dict({**state_of().state_dict(), "statistics": statistics})


def test_a_state_of_version_0_1_loads():
    state = state_of(residuals=False)
    state.load_state_dict({"seed": 3, "uses": {"w": 7}})
    assert (state.seed, state.stats()["steps"], state.stats()["messages"]) == (3, 7, 0)


def test_a_worker_that_joins_takes_over_all_but_what_is_its_own():
    first = state_of()
    first.use("w")
    first.statistics.messages = 5
    first.residuals.of("w", 4, None)[:] = 1.0
    others = without_own(first.state_dict())
    new = taken_over(state_of(1).state_dict(), others)
    assert (new["uses"], new["statistics"]["messages"], new["residuals"]) == ({"w": 1}, 5, {})
    known = state_of(1)
    known.use("w")
    assert taken_over(known.state_dict(), others)["statistics"]["messages"] == 0

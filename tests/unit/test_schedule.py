"""DQ-SGD's bits a step: the paper's formula for a given k, and a budget that is met whatever the norms do."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_quant import DQSGD, QSGD
from hvd_quant.schedule import BitSchedule


def run(scheme, norms):
    """The bits of each step, one a norm."""
    schedule, bits = BitSchedule(scheme), []
    for norm in norms:
        bits.append(schedule.bits)
        schedule.advance(norm**2)
    return bits


def formula(scheme, norm, step):
    levels = scheme.k * scheme.alpha ** (((scheme.total_steps or 0) - step) / 2) * norm
    return min(max(math.ceil(math.log2(levels + 1)) + 1, scheme.min_bits), scheme.max_bits)


@given(
    k=st.floats(1e-3, 1e3),
    alpha=st.floats(0.9, 1.0),
    norms=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
)
def test_bits_follow_the_norm_of_the_step_before(k, alpha, norms):
    scheme = DQSGD(k=k, alpha=alpha, total_steps=30)
    expected = [8] + [formula(scheme, norm, step) for step, norm in enumerate(norms[:-1], 1)]
    found = run(scheme, norms)
    # Where levels + 1 is a power of two but for rounding, either side is right.
    edge = [abs(b - a) for a, b in zip(found, expected, strict=True)]
    assert max(edge) <= 1
    for step, (norm, off) in enumerate(zip(norms[:-1], edge[1:], strict=True), 1):
        exact = math.log2(k * alpha ** ((30 - step) / 2) * norm + 1)
        assert not off or abs(exact - round(exact)) < 1e-9


def test_a_step_of_levels_that_the_paper_would_take():
    # 7 levels take 3 bits and a sign; 8 take another bit; more than 127 would take a ninth.
    schedule = BitSchedule(DQSGD(k=1))
    for norm, bits in [(7, 4), (7.001, 5), (1e-9, 2), (3, 3), (1e9, 8)]:
        schedule.advance(norm**2)
        assert schedule.bits == bits


def norms_of(kind, steps, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    return {
        "constant": np.full(steps, 3.0),
        "falling": 10 * np.exp(-5 * t / steps),
        "rising": np.exp(5 * t / steps),
        "noisy": np.exp(rng.standard_normal(steps)),
        "jump": np.where(t < steps / 2, 1e-6, 1e6),
        "spikes": np.where(rng.random(steps) < 0.02, 1e4, 1.0),
        "nothing": np.zeros(steps),
        "not a number": np.where(t % 3 == 0, np.nan, 1.0),
    }[kind]


KINDS = ["constant", "falling", "rising", "noisy", "jump", "spikes", "nothing", "not a number"]


@pytest.mark.parametrize("alpha", [1.0, 0.99])
@pytest.mark.parametrize("mean_bits", [2, 3.3, 4.5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_met_whatever_the_norms_do(kind, mean_bits, alpha):
    scheme = DQSGD(mean_bits=mean_bits, total_steps=200, alpha=alpha)
    bits = run(scheme, norms_of(kind, 200))
    assert min(bits) >= 2
    assert max(bits) <= 8
    assert abs(sum(bits) - mean_bits * 200) < 1


@given(
    total=st.integers(1, 40),
    bounds=st.tuples(st.integers(2, 8), st.integers(2, 8)).map(sorted),
    share=st.floats(0, 1),
    norms=st.lists(st.floats(0, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=40, max_size=40),
)
def test_a_short_run_meets_its_budget_within_a_bit(total, bounds, share, norms):
    low, high = bounds
    mean_bits = low + share * (high - low)
    scheme = DQSGD(mean_bits=mean_bits, total_steps=total, min_bits=low, max_bits=high)
    bits = run(scheme, norms[:total])
    assert all(low <= one <= high for one in bits)
    assert abs(sum(bits) - mean_bits * total) < 1


def test_a_larger_norm_gets_more_bits():
    norms = norms_of("noisy", 1000)
    bits = np.array(run(DQSGD(mean_bits=4, total_steps=1000), norms))[1:]
    before = norms[:-1]
    assert bits[before > np.quantile(before, 0.8)].mean() > 1 + bits[before < np.quantile(before, 0.2)].mean()


def test_alpha_spends_later():
    bits = np.array(run(DQSGD(mean_bits=4, total_steps=1000, alpha=0.99), norms_of("constant", 1000)))
    assert bits[:100].mean() < 3 < 5 < bits[-100:].mean()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_norm_of_no_use_keeps_the_bits(bad):
    schedule = BitSchedule(DQSGD(k=1))
    schedule.advance(7.0**2)
    assert schedule.bits == 4
    schedule.advance(bad)
    assert schedule.bits == 4


def test_more_steps_than_planned():
    schedule = BitSchedule(DQSGD(mean_bits=3, total_steps=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            schedule.advance(1.0)
    last = schedule.bits
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for norm in (1.0, 1e6, 1e-6):
            schedule.advance(norm)
            assert schedule.bits == last
    assert "total_steps=10, and training goes on: every further step has " in str(told[0].message)
    assert len(told) == 1


@pytest.mark.parametrize("options", [{"k": 2.0}, {"mean_bits": 4.2, "total_steps": 100, "alpha": 0.98}])
def test_a_resumed_schedule_goes_on(options):
    norms = norms_of("noisy", 100)
    whole = run(DQSGD(**options), norms)
    first, second = BitSchedule(DQSGD(**options)), BitSchedule(DQSGD(**options))
    for norm in norms[:37]:
        first.advance(norm**2)
    second.load_state_dict(first.state_dict())
    bits = []
    for norm in norms[37:]:
        bits.append(second.bits)
        second.advance(norm**2)
    assert bits == whole[37:]


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 2**63 - 1},
        {"bits": 9},
        {"bits": None},
        {"spent": 1.5},
        {"log_norms": "x"},
        {"log_norms": -1e308},
        {"log_norm": 2000.0},
        {"log_norm": float("nan")},
    ],
)
def test_states_that_are_none(change):
    state = BitSchedule(DQSGD(k=1)).state_dict()
    schedule = BitSchedule(DQSGD(k=1))
    with pytest.raises((TypeError, ValueError)):
        schedule.load_state_dict({**state, **change})
    with pytest.raises(KeyError):
        schedule.load_state_dict({})
    assert schedule.state_dict() == state


def test_states_of_numpy_numbers_become_plain_ones():
    schedule = BitSchedule(DQSGD(k=1))
    numbers = {name: np.int64(3) for name in ("step", "spent", "norms", "bits")}
    schedule.load_state_dict({**schedule.state_dict(), **numbers})
    assert json.loads(json.dumps(schedule.state_dict())) == schedule.state_dict()


# --- the arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either k= or mean_bits="),
        ({"k": 1, "mean_bits": 4, "total_steps": 5}, "either k= or mean_bits="),
        ({"mean_bits": 4}, "needs total_steps="),
        ({"k": 1, "alpha": 0.9}, "needs total_steps="),
        ({"k": 0}, "k must be above 0"),
        ({"k": -1}, "k must be above 0"),
        ({"k": math.inf}, "k must be above 0"),
        ({"k": math.nan}, "k must be above 0"),
        ({"k": 1, "alpha": 0, "total_steps": 5}, "alpha must be above 0 and at most 1"),
        ({"k": 1, "alpha": 1.1, "total_steps": 5}, "alpha must be above 0 and at most 1"),
        ({"mean_bits": 1.9, "total_steps": 5}, "mean_bits must be at least min_bits, 2"),
        ({"mean_bits": 8.1, "total_steps": 5}, "mean_bits must be above 0 and at most 8"),
        ({"mean_bits": 3, "total_steps": 5, "min_bits": 4}, "mean_bits must be at least min_bits, 4"),
        ({"mean_bits": 4, "total_steps": 0}, "total_steps must be from 1"),
        ({"k": 1, "min_bits": 1}, "min_bits must be from 2 to 8"),
        ({"k": 1, "min_bits": 5, "max_bits": 4}, "max_bits must be from 5 to 8"),
        ({"k": 1, "norm": "l1"}, "norm must be"),
        ({"k": 1, "bucket_size": 0}, "bucket_size must be"),
    ],
)
def test_contradictory_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        DQSGD(**options)


@pytest.mark.parametrize(
    "options", [{"k": "1"}, {"k": True}, {"mean_bits": 4, "total_steps": 5.0}, {"k": 1, "alpha": None}]
)
def test_arguments_of_other_types(options):
    with pytest.raises(TypeError, match="must be"):
        DQSGD(**options)


def test_numpy_numbers_become_plain_ones():
    scheme = DQSGD(
        mean_bits=np.float32(4.5),
        total_steps=np.int32(9),
        min_bits=np.int8(3),
        max_bits=np.uint8(7),
        bucket_size=np.int64(64),
    )
    plain = DQSGD(mean_bits=4.5, total_steps=9, min_bits=3, max_bits=7, bucket_size=64)
    assert json.dumps(dataclasses.asdict(scheme)) == json.dumps(dataclasses.asdict(plain))
    assert json.dumps(dataclasses.asdict(DQSGD(k=np.float64(2)))) == json.dumps(
        dataclasses.asdict(DQSGD(k=2))
    )


def test_scheme_of_a_step():
    scheme = DQSGD(k=1, norm="l2", bucket_size=100)
    assert scheme.at(5) == QSGD(bits=5, norm="l2", bucket_size=100)

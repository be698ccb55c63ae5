"""The control tensor: what it accepts, what it detects, and how it words a difference."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_quant.reducer import control_tensor, errors

fingerprints = st.integers(0, 2**control_tensor.FINGERPRINT_BITS - 1)


def contributions(prints):
    return np.array([control_tensor.values(own, rank) for rank, own in enumerate(prints)])


def adasum(vectors):
    """Horovod's Adasum of 2^k vectors: pairwise, nearest ranks first."""
    if len(vectors) == 1:
        return vectors[0]
    pairs = []
    for a, b in zip(vectors[::2], vectors[1::2], strict=True):
        dot = a @ b
        pairs.append((1 - dot / (2 * (a @ a))) * a + (1 - dot / (2 * (b @ b))) * b)
    return adasum(pairs)


@given(own=fingerprints, size=st.sampled_from([1, 2, 3, 4, 7, 49, 64, 1000]))
def test_average_and_sum_give_exactly_one_and_size(own, size):
    total = contributions([own] * size).sum(0)
    assert control_tensor.check(total * (1 / size), own, size) == 1.0
    assert control_tensor.check(total, own, size) == size


@given(
    own=fingerprints,
    size=st.integers(1, 64),
    scale=st.floats(1e-3, 1e3).filter(lambda scale: abs(scale - round(scale)) > 1e-6),
)
def test_other_linear_reductions_give_their_factor(own, size, scale):
    mean = contributions([own] * size).mean(0)
    assert math.isclose(control_tensor.check(mean * scale, own, size), scale, rel_tol=1e-12)


@given(own=fingerprints, other=fingerprints, size=st.integers(2, 64), data=st.data())
def test_one_other_fingerprint_is_noticed_by_every_rank(own, other, size, data):
    if own == other:
        return
    prints = [own] * size
    prints[data.draw(st.integers(0, size - 1))] = other
    for reduced in (contributions(prints).mean(0), contributions(prints).sum(0)):
        for mine in prints:
            with pytest.raises(control_tensor.FingerprintMismatch):
                control_tensor.check(reduced, mine, size)


@given(prints=st.lists(fingerprints, min_size=2, max_size=16).filter(lambda prints: len(set(prints)) > 1))
def test_no_rank_finds_its_own_among_different_ones(prints):
    """Not even one whose fingerprint happens to be the mean."""
    reduced = contributions(prints).mean(0)
    for mine in prints:
        with pytest.raises(control_tensor.FingerprintMismatch):
            control_tensor.check(reduced, mine, len(prints))


@given(own=fingerprints, size=st.sampled_from([2, 4, 8, 16]))
def test_reductions_that_are_not_linear_are_refused(own, size):
    vectors = contributions([own] * size)
    for reduced in (adasum(list(vectors)), vectors.min(0), vectors.max(0), vectors.prod(0)):
        with pytest.raises(errors.UnsupportedReductionError, match="op=Average or op=Sum"):
            control_tensor.check(reduced, own, size)


def test_reduction_over_other_ranks_is_refused():
    vectors = contributions([5] * 4)
    for ranks in itertools.combinations(range(4), 2):
        with pytest.raises(errors.UnsupportedReductionError, match="process_set"):
            control_tensor.check(vectors[list(ranks)].mean(0), 5, 4)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_useless_factors_are_refused(factor):
    with pytest.raises(errors.UnsupportedReductionError):
        control_tensor.check([factor * value for value in control_tensor.values(3, 0)], 3, 1)


def test_fingerprint_depends_on_every_field_but_not_on_their_order():
    base = {"bits": 4, "norm": "max"}
    assert control_tensor.fingerprint(base) == control_tensor.fingerprint({"norm": "max", "bits": 4})
    assert control_tensor.fingerprint(base) != control_tensor.fingerprint({**base, "bits": 5})
    assert control_tensor.fingerprint(base) == 40_048_406  # the same in every process and version


def described(**fields):
    return {"name": "w", "named": True, "shape": [3], "dtype": "float32", **fields}


def test_explanation_names_the_field_the_values_and_the_ranks():
    configs = [{"bits": 4, "norm": "max"}, {"bits": 8, "norm": "max"}, {"bits": 4, "norm": "max"}]
    text = errors.explain_mismatch(configs, [{}] * 3, [[described()]] * 3)
    assert "bits is 4 on ranks 0, 2, 8 on rank 1" in text
    assert "norm" not in text


def test_explanation_of_different_models():
    models = [{"w": [[3], "float32"], "b": [[1], "float32"]}, {"w": [[4], "float32"]}]
    text = errors.explain_mismatch([{}, {}], models, [[], []])
    assert 'w is [[3], "float32"] on rank 0, [[4], "float32"] on rank 1' in text
    assert 'b is [[1], "float32"] on rank 0, null on rank 1' in text
    assert "more" not in text
    models = [{f"p{i}": [[n], "float32"] for i in range(20)} for n in (1, 2)]
    assert "and 15 more" in errors.explain_mismatch([{}, {}], models, [[], []])


def test_explanation_of_an_order_of_parameters():
    models = [{"a": [[3], "float32"], "b": [[1], "float32"]}]
    models.append(dict(reversed(models[0].items())))
    text = errors.explain_mismatch([{}, {}], models, [[], []])
    assert 'number 0 is "a" on rank 0, "b" on rank 1' in text
    assert "in the same order on every rank" in text


def test_explanation_of_a_shape():
    text = errors.explain_mismatch([{}, {}], [{}, {}], [[described(shape=[n])] for n in (3, 4)])
    assert "'w'" in text
    assert "shape is [3] on rank 0, [4] on rank 1" in text


def test_explanation_of_an_order_of_arrival():
    gradients = [[described(name=f"#{n}", named=False)] for n in (3, 4)]
    assert "named_parameters=" in errors.explain_mismatch([{}, {}], [{}, {}], gradients)


def test_explanation_of_what_travelled_together():
    gradients = [[described(), described(name="b")], [described()]]
    text = errors.explain_mismatch([{}, {}], [{}, {}], gradients)
    assert 'what others lack is ["b"] on rank 0, [] on rank 1' in text
    gradients = [[described(), described(name="b")]] * 2
    assert "different bytes about the same gradients" in errors.explain_mismatch(
        [{}] * 2, [{}] * 2, gradients
    )

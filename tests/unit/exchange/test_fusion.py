"""Which gradients travel together, and how they are cut into chunks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_quant import QSGD
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import ALGORITHMS, quickest
from hvd_quant.exchange.fusion import Fusion
from hvd_quant.exchange.layout import Entry, GroupLayout


def entry(key, count=100, **fields):
    return Entry(key, count, "float32", fields.pop("scheme", QSGD()), **fields)


def gradient(one):
    return SimpleNamespace(entry=one)


def keys(ready):
    group, gradients = ready
    assert list(group.entries) == [gradient.entry.key for gradient in gradients]
    return list(group.entries)


def add(fusion, one):
    ready = fusion.add(gradient(one))
    return [keys(ready)] if ready is not None else []


def flush(fusion):
    return [keys(ready) for ready in fusion.flush()]


def test_planned_buckets_are_sent_with_their_last_gradient_in_any_order():
    fusion = Fusion(800)  # two of 400 bytes
    entries = [entry(key) for key in "abcde"]
    fusion.plan(entries)
    for order in ("abcde", "edcba", "badce"):
        sent = [group for key in order for group in add(fusion, entry(key))]
        assert sorted(sent) == [["a", "b"], ["c", "d"], ["e"]]
        assert not flush(fusion)


def test_unknown_gradients_fill_buckets_in_order_of_arrival():
    fusion = Fusion(800)
    assert [add(fusion, entry(key)) for key in "abcde"] == [[], [["a", "b"]], [], [["c", "d"]], []]
    assert flush(fusion) == [["e"]]
    # From then on they are known: the last one need not wait for a flush.
    assert [add(fusion, entry(key)) for key in "abcde"] == [[], [["a", "b"]], [], [["c", "d"]], [["e"]]]


def test_what_is_sent_incomplete_is_split():
    fusion = Fusion(10_000)
    fusion.plan([entry(key) for key in "abcd"])
    assert [add(fusion, entry(key)) for key in "bd"] == [[], []]
    assert flush(fusion) == [["b", "d"]]
    assert [add(fusion, entry(key)) for key in "db"] == [[], [["b", "d"]]]  # complete at once
    assert [add(fusion, entry(key)) for key in "ac"] == [[], [["a", "c"]]]


def test_one_by_one():
    """As when a training loop calls hvd.allreduce for one gradient after the other."""
    fusion = Fusion(10_000)
    fusion.plan([entry(key) for key in "abc"])
    for _ in range(2):
        for key in "abc":
            assert (add(fusion, entry(key)) or flush(fusion)) == [[key]]


def test_a_gradient_that_changes_keeps_its_place():
    """Changed ones may come in another order on every rank, and must end in the same buckets."""
    for order in ("abc", "cba", "bac"):
        fusion = Fusion(800)
        fusion.plan([entry(key) for key in "abc"])
        sent = [group for key in order for group in add(fusion, entry(key, 300))]
        assert sorted(sent) == [["a", "b"], ["c"]]


def test_a_gradient_that_changes_its_device_leaves_its_bucket():
    fusion = Fusion(800)
    fusion.plan([entry("a"), entry("b")])
    assert add(fusion, entry("a", device="cuda:0")) == []
    assert add(fusion, entry("b")) == [["b"]]
    assert flush(fusion) == [["a"]]


def test_names_of_buckets_do_not_depend_on_what_has_come():
    """So that ranks that disagree meet under one name, and find out."""

    def names(first, second):
        fusion = Fusion(10_000)
        fusion.plan([entry(key) for key in "abcd"])
        found = []
        for step in (first, second):
            ready = [fusion.add(gradient(entry(key))) for key in step]
            found.append([group.name for group, _ in [*filter(None, ready), *fusion.flush()]])
        return found

    assert names("ab", "cd") == names("a", "bcd") == [["0"], ["0.0"]]


def test_devices_are_kept_apart():
    fusion = Fusion(10_000)
    fusion.plan([entry("a"), entry("b", device="cuda:0"), entry("c")])
    assert add(fusion, entry("c")) == []
    assert add(fusion, entry("b", device="cuda:0")) == [["b"]]
    assert add(fusion, entry("a")) == [["a", "c"]]
    assert [add(fusion, one) for one in (entry("x"), entry("y", device="cuda:0"))] == [[], []]
    assert flush(fusion) == [["x"], ["y"]]


def test_no_fusion():
    fusion = Fusion(0)
    fusion.plan([entry("a"), entry("b", 0)])
    assert [add(fusion, entry(key, count)) for key, count in (("b", 0), ("a", 100), ("c", 3))] == [
        [["b"]],
        [["a"]],
        [["c"]],
    ]


@given(
    arrivals=st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=8), planned=st.booleans()
)
def test_everything_is_sent_once_whatever_comes(arrivals, planned):
    fusion = Fusion(1000)
    if planned:
        fusion.plan([entry(key) for key in "abcdef"])
    for step in arrivals:
        sent = [group for key in step for group in add(fusion, entry(key))] + flush(fusion)
        assert sorted(key for group in sent for key in group) == sorted(step)
        assert not flush(fusion)


# --- chunks ---------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(0, 5000), max_size=8),
    ranks=st.integers(1, 20),
    bits=st.lists(st.integers(2, 8), min_size=8, max_size=8),
    bucket_size=st.sampled_from([1, 64, 512, 10_000]),
)
def test_chunks_hold_every_value_once_and_cut_between_buckets(counts, ranks, bits, bucket_size):
    entries = [
        entry(str(i), count, scheme=QSGD(bits=bits[i], bucket_size=bucket_size))
        for i, count in enumerate(counts)
    ]
    chunks = GroupLayout(entries, ranks, 0, 0).chunks
    assert len(chunks) == ranks
    seen = [np.zeros(count, int) for count in counts]
    last = (0, 0)
    for chunk in chunks:
        for segment in chunk.segments:
            assert segment.start % bucket_size == 0
            assert (segment.tensor, segment.start) >= last  # in order
            last = (segment.tensor, segment.start)
            seen[segment.tensor][segment.start : segment.start + segment.count] += 1
    assert all((one == 1).all() for one in seen)
    assert len({chunk.preamble for chunk in chunks}) == ranks


def test_chunks_are_of_nearly_equal_length():
    for ranks in (2, 3, 8):
        chunks = GroupLayout([entry("a", 1_000_000), entry("b", 70_000)], ranks, 0, 0).chunks
        counts = [chunk.count for chunk in chunks]
        assert max(counts) - min(counts) <= 2 * 512


def test_digests_tell_everything_apart_that_ranks_must_agree_on():
    def digest(*entries, size=2):
        return GroupLayout(entries, size, 0, 0).digest

    base = digest(entry("a"), entry("b"))
    others = [
        digest(entry("b"), entry("a")),
        digest(entry("a"), entry("b", 101)),
        digest(entry("a"), entry("c")),
        digest(entry("a"), entry("b", scheme=QSGD(bits=5))),
        digest(entry("a")),
        digest(entry("a"), entry("b"), size=3),
    ]
    assert base not in others
    assert base == GroupLayout([entry("a"), entry("b")], 2, 1, 7).digest  # rank and seed are each rank's own


# --- which exchange -------------------------------------------------------------------------------------


SLOW, FAST = (cost.Link(2e-3, bandwidth) for bandwidth in (cost.NETWORK, cost.SHARED_MEMORY))


def test_two_ranks_take_the_allgather_and_many_do_not():
    assert quickest(SLOW, 2, 4 << 20, 8 << 20) == "allgather"
    for ranks in (4, 8, 64):
        assert quickest(SLOW, ranks, 4 << 20, 8 << 20) == "scatter_allgather"
        assert quickest(SLOW, ranks, 1000, 2000) == "allgather"  # latency is all there is


def test_hosts_of_several_ranks_exchange_by_hosts():
    for hosts, each in ((2, 2), (2, 8), (4, 8)):
        link = replace(SLOW, ranks_per_host=each)
        assert quickest(link, hosts * each, 1 << 20, 2 << 20) == "hierarchical"
    assert quickest(replace(SLOW, ranks_per_host=2), 64, 1 << 20, 2 << 20) == "scatter_allgather"
    assert quickest(replace(SLOW, ranks_per_host=2), 4, 1000, 2000) == "allgather"


@given(ranks=st.integers(1, 64), payload=st.integers(0, 2**40), count=st.integers(0, 2**40))
def test_the_choice_is_what_the_model_says(ranks, payload, count):
    for link in (SLOW, FAST):
        choice = quickest(link, ranks, payload, count)
        for other in ("allgather", "scatter_allgather"):
            arguments = link, ranks, payload, count
            assert ALGORITHMS[choice].seconds(*arguments) <= ALGORITHMS[other].seconds(*arguments)


def test_link_from_environment(monkeypatch):
    monkeypatch.delenv("HVD_QUANT_BANDWIDTH", raising=False)
    assert cost.link_from_environment(False, 2e-3) == SLOW
    assert cost.link_from_environment(True, 2e-3) == FAST
    monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "25")
    assert cost.link_from_environment(False, 2e-3) == cost.Link(2e-3, 25e9 / 8)
    for bad in ("", "fast", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("HVD_QUANT_BANDWIDTH", bad)
        with pytest.raises(ValueError, match="HVD_QUANT_BANDWIDTH must be a positive number of Gbit/s"):
            cost.link_from_environment(False, 2e-3)

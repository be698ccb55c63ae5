"""The exchanges over ranks in one process: the same bits everywhere, unbiased, and damage is found by all."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_quant import NUQSGD, QSGD
from hvd_quant.codec import native
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.in_process import Network
from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.exchange.topology import Topology

EXCHANGES = sorted(ALGORITHMS)
SCHEMES = [
    QSGD(bits=2),
    QSGD(bits=4, norm="l2", bucket_size=100),
    QSGD(bits=8),
    NUQSGD(bits=4),
    NUQSGD(bits=3, norm="max"),
    QSGD(3, "l2", 1000, coding="elias"),
    QSGD(bits=4, coding="huffman"),
]


def entries_of(counts, scheme):
    return [Entry(f"p{i}", count, "float32", scheme) for i, count in enumerate(counts)]


def topology_of(ranks):
    """Two ranks on every host, where their number is even: not neighbours by their numbers."""
    return Topology([rank % (ranks // 2) if ranks % 2 == 0 else rank for rank in range(ranks)])


def start(network, gradients, scheme, exchange, seed=0, use=0, codec=native, topology=None):
    """All ranks' exchanges; ``gradients[rank][i]`` is rank's gradient i."""
    topology = topology or topology_of(network.size)
    counts = [gradient.size for gradient in gradients[0]]
    uses = np.full(len(counts), use, np.uint64)
    exchanges = []
    for rank, transport in enumerate(network.ranks):
        bucket = GroupLayout(entries_of(counts, scheme), network.size, rank, seed, topology)
        data = BucketData(bucket, gradients[rank], uses, codec)
        exchanges.append(Exchange(data, ALGORITHMS[exchange], transport, "x"))
    return exchanges


def go_on(exchanges):
    """Take all to their last collectives, though one thread drives them."""
    for _ in range(2):
        for one in exchanges:
            one.advance(wait=False)
    assert all(one.advance(wait=False) for one in exchanges)


def finish(exchanges):
    go_on(exchanges)
    results = []
    for one in exchanges:
        out = [np.full_like(value, np.nan) for value in one.data.values]
        assert one.ready()
        one.finish(out)
        results.append(out)
    return results


def mean_of(gradients, scheme, exchange, **options):
    """The mean that all ranks find, checked to be the same bits on all of them."""
    results = finish(start(Network(len(gradients)), gradients, scheme, exchange, **options))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()
    return results[0]


def randn(ranks, counts, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(count).astype(np.float32) for count in counts] for _ in range(ranks)]


def one_rounding(values, scheme):
    """What no error of one stochastic rounding exceeds, of shape (d,): the largest gap between levels."""
    order = np.inf if scheme.norm == "max" else 2
    norms = [
        np.full(len(bucket), np.linalg.norm(bucket.astype(np.float64), order))
        for bucket in np.split(values, range(scheme.bucket_size, len(values), scheme.bucket_size))
    ]
    return np.concatenate(norms) * np.diff(scheme.levels()).max()


def assert_near_mean(result, gradients, scheme, exchange):
    for i, found in enumerate(result):
        if not found.size:
            continue
        exact = np.mean([gradient[i] for gradient in gradients], axis=0, dtype=np.float64)
        tolerance = np.mean([one_rounding(gradient[i], scheme) for gradient in gradients], axis=0)
        if exchange == "scatter_allgather":  # the mean of the roundings is rounded again
            order = np.inf if scheme.norm == "max" else 2
            largest = np.abs(exact) + tolerance
            length = min(found.size, scheme.bucket_size)
            tolerance = (
                tolerance
                + np.linalg.norm(np.full(length, largest.max()), order) * np.diff(scheme.levels()).max()
            )
        assert np.all(np.abs(found - exact) <= tolerance * (1 + 1e-5) + 1e-7)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_rank_finds_the_mean(exchange, ranks, scheme):
    gradients = randn(ranks, [4096, 100, 7, 0, 3333, 512, 1])
    assert_near_mean(mean_of(gradients, scheme, exchange), gradients, scheme, exchange)


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(1, 9),
    counts=st.lists(st.integers(0, 700), min_size=1, max_size=8),
    bucket_size=st.sampled_from([1, 3, 64, 512, 100_000]),
    bits=st.integers(2, 8),
    exchange=st.sampled_from(EXCHANGES),
)
def test_any_shape_over_any_number_of_ranks(ranks, counts, bucket_size, bits, exchange):
    gradients = randn(ranks, counts, seed=bits)
    scheme = QSGD(bits=bits, bucket_size=bucket_size)
    assert_near_mean(mean_of(gradients, scheme, exchange), gradients, scheme, exchange)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("kind", [QSGD, NUQSGD])
def test_unbiased_over_many_steps(exchange, norm, kind):
    """The mean over T steps against the exact mean, in standard deviations estimated from the same T steps.

    6400 values; six standard deviations, Student's t with 399 degrees of freedom: a false alarm in 3e-5 runs.
    """
    ranks, steps = (6 if exchange == "hierarchical" else 3), 400  # three roundings at least
    gradients = randn(ranks, [6000, 400])
    scheme = kind(bits=3, norm=norm, bucket_size=128)
    found = np.array(
        [np.concatenate(mean_of(gradients, scheme, exchange, use=use)) for use in range(steps)], np.float64
    )
    exact = np.mean([np.concatenate(gradient) for gradient in gradients], axis=0, dtype=np.float64)
    deviation = found.std(0, ddof=1) / np.sqrt(steps)
    # Float32 arithmetic adds about 1e-7 of the values; a value on a level has no deviation at all.
    assert np.all(np.abs(found.mean(0) - exact) <= 6.1 * deviation + 1e-6)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_variance_is_the_one_of_the_roundings(exchange):
    """Independent noise on every rank and in both roundings: the variances add.

    A mean over 65,536 values of squared errors, whose relative standard deviation is below 1 % (the errors of
    a value have a kurtosis of a few): 6 % are six standard deviations.
    """
    ranks, scheme = 4, QSGD(bits=4, bucket_size=512)
    gradients = randn(ranks, [65_536])

    def exact_variance(values):
        norms = np.abs(values.reshape(-1, 512)).max(1, keepdims=True)
        r = np.abs(values.reshape(-1, 512)) / norms * scheme.num_levels
        down = np.floor(r)
        return (((down + 1 - r) * (r - down)) * (norms / scheme.num_levels) ** 2).sum()

    rounded = [one[0].astype(np.float64) for one in gradients]
    if exchange == "hierarchical":  # the hosts' means are
        rounded = [(rounded[0] + rounded[2]) / 2, (rounded[1] + rounded[3]) / 2]
    expected = sum(map(exact_variance, rounded)) / len(rounded) ** 2
    error = mean_of(gradients, scheme, exchange)[0] - np.mean([one[0] for one in gradients], 0, np.float64)
    if exchange == "scatter_allgather":
        mean = mean_of(gradients, scheme, "allgather")[0]  # distributed as what the second rounding rounds
        expected += exact_variance(mean.astype(np.float64))
    assert abs((error**2).sum() / expected - 1) < 0.06


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_reach_every_rank_and_no_other_bucket(exchange, bad):
    gradients = randn(4, [3000])
    gradients[2][0][700] = bad
    finite = np.isfinite(mean_of(gradients, QSGD(bucket_size=500), exchange)[0])
    assert not finite[500:1000].any()
    assert finite[:500].all()
    assert finite[1000:].all()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_noise_is_a_function_of_seed_step_rank_and_tensor(exchange):
    same = np.full(4096, 0.5 / 7, np.float32)
    same[::512] = 1.0  # the norm of every bucket
    gradients = [[same, same]] * 2

    def results(**options):
        return np.concatenate(mean_of(gradients, QSGD(bits=4), exchange, **options))

    first = results()
    assert np.array_equal(first, results())
    assert not np.array_equal(first, results(seed=1))
    assert not np.array_equal(first, results(use=1))
    assert not np.array_equal(first[:4096], first[4096:])


def test_no_two_segments_share_their_noise():
    """Rounded half-way between two levels, two roundings agree in half of the places, and by chance only."""
    entries = entries_of([4096] * 3, QSGD(bits=4))
    half = np.full(4096, 0.5 / 7, np.float32)
    half[::512] = 1.0
    patterns = []
    for rank, use in itertools.product(range(2), range(2)):
        bucket = GroupLayout(entries, 2, rank, seed=3)
        for layout, stage in (
            (bucket.whole, "whole"),
            (bucket.chunks[1], "chunk"),
            (bucket.chunks[1], "mean"),
            (bucket.host_chunks[0], "host"),
        ):
            for seed in bucket.noise(layout, stage, np.full(3, use, np.uint64)).seeds:
                payload = native.encode(half, QSGD(bits=4), int(seed))
                patterns.append(native.decode_mean([payload]) > 0)
    assert len(patterns) > 20
    for one, two in itertools.combinations(patterns, 2):
        # 4088 fair coins: 6.5 standard deviations; a false alarm in 8e-11 of some 500 pairs' runs each.
        assert abs(np.mean(one == two) - 0.5) < 6.5 * 0.5 / 4088**0.5


@pytest.mark.parametrize(("hosts", "each"), [(2, 2), (2, 8), (3, 4), (8, 1), (1, 4)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hosts_exchange_means(hosts, each, scheme):
    """All ranks of a host together receive h - 1 payloads of others, however many they are."""
    ranks = hosts * each
    counts = [100_000, 5, 70_000]
    gradients = randn(ranks, counts)
    topology = Topology([rank // each for rank in range(ranks)])
    network = Network(ranks)
    exchanges = start(network, gradients, scheme, "hierarchical", topology=topology)
    results = finish(exchanges)
    for result in results:
        assert [one.tobytes() for one in result] == [one.tobytes() for one in results[0]]
    assert_near_mean(results[0], gradients, scheme, "hierarchical")
    if scheme.coding == "packed":
        payload = GroupLayout(entries_of(counts, scheme), ranks, 0, 0).whole.size
        for host in range(hosts):
            own = range(host * each, (host + 1) * each)
            came = sum(
                network.between[other, rank] for rank in own for other in range(ranks) if other not in own
            )
            assert abs(came - (hosts - 1) * payload) <= 0.02 * payload * hosts


def test_hosts_with_correlated_rounding():
    """Of two hosts with the same means, the errors cancel; each of them alone rounds as usual."""
    one = randn(1, [8192])[0]
    scheme = QSGD(bits=4, rounding="correlated")
    errors = {}
    for rounding in ("independent", "correlated"):
        scheme = QSGD(bits=4, rounding=rounding)
        found = mean_of([one] * 4, scheme, "hierarchical")
        errors[rounding] = float(((found[0] - one[0]) ** 2).mean())
    assert errors["correlated"] < 0.7 * errors["independent"]


def test_topology():
    assert Topology([0, 0, 1, 1]).ranks_per_host == 2
    assert Topology("abab").ranks_per_host == 2
    for irregular in ([0, 0, 1], [0, 0], [0, 1], [0], [0, 0, 1, 1, 2]):
        assert Topology(irregular).ranks_per_host == 1
    assert Topology("abab").neighbours(2) == [0, 2]
    assert [Topology("abab").counterparts(rank) for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert Topology("baab").counterparts(3) == [3, 2]


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_received_bytes(ranks):
    counts = [200_000, 64, 131_072]
    gradients = randn(ranks, counts)
    payload = GroupLayout(entries_of(counts, QSGD()), ranks, 0, 0).whole.size
    for exchange, share in (("allgather", ranks - 1), ("scatter_allgather", 2 * (ranks - 1) / ranks)):
        network = Network(ranks)
        exchanges = start(network, gradients, QSGD(), exchange)
        finish(exchanges)
        for rank in range(ranks):
            assert network.received_bytes[rank] == exchanges[rank].received_bytes
            assert abs(network.received_bytes[rank] / (share * payload) - 1) < 0.1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
@pytest.mark.parametrize(
    ("exchange", "stage"),
    [
        ("allgather", "x"),
        ("scatter_allgather", "x.scatter"),
        ("scatter_allgather", "x.gather"),
        ("hierarchical", "x.host"),
        ("hierarchical", "x.across"),
        ("hierarchical", "x.pass"),
    ],
)
def test_damage_is_found_and_nobody_hangs(exchange, stage, damage):
    """One rank's bytes are damaged in one collective: every rank that got them raises, and none waits."""
    ranks = 4
    if stage == "x.host" and damage == "flip":
        pytest.skip("float32 has no check sum, as in Horovod's own reductions")
    network = Network(ranks)
    gradients = randn(ranks, [5000, 300])

    def spoil(part):
        part = part.copy()
        if not part.size:
            return part
        if damage == "flip":
            part[part.size // 2] ^= 4
        elif damage == "cut":
            part = part[:-8]
        elif damage == "empty":
            part = part[:0]
        else:
            part[:8] = 0
        return part

    post = network.post

    def spoiled_post(name, rank, parts):
        if rank == 1 and name == stage:
            parts = [spoil(part) for part in parts]
        return post(name, rank, parts)

    network.post = spoiled_post
    exchanges = start(network, gradients, QSGD(), exchange)
    go_on(exchanges)
    if stage == "x.pass":  # which stays on the host
        for rank in (0, 2):
            exchanges[rank].finish([np.empty_like(value) for value in exchanges[rank].data.values])
        exchanges = [exchanges[rank] for rank in (1, 3)]
    for one in exchanges:
        with pytest.raises(ValueError, match=r"message|payload"):
            one.finish([np.empty_like(value) for value in one.data.values])


def test_a_collective_that_cannot_begin():
    network = Network(2)
    post = network.post

    def failing_post(name, rank, parts):
        if rank == 0 and name.endswith(".gather"):
            raise ValueError("the name is taken")
        return post(name, rank, parts)

    network.post = failing_post
    first, second = start(network, randn(2, [3000]), QSGD(), "scatter_allgather")
    assert first.advance(wait=True)
    assert first.ready()
    for _ in range(2):
        with pytest.raises(ValueError, match="the name is taken"):
            first.finish([np.empty(3000, np.float32)])
    assert second.advance(wait=True)
    assert not second.ready()


def test_a_mean_that_cannot_be_computed_is_not_the_last_steps():
    """The memory still holds that one, encoded, under the right preamble."""
    ranks = 3
    gradients = randn(ranks, [5000])
    buckets = [GroupLayout(entries_of([5000], QSGD()), ranks, rank, 0) for rank in range(ranks)]
    for step in range(2):
        network = Network(ranks)
        if step == 1:
            post = network.post

            def spoiled_post(name, rank, parts, post=post):
                """What goes to rank 1 arrives damaged."""
                if name.endswith(".scatter") and rank != 1:
                    parts = [part[:-8] if to == 1 else part for to, part in enumerate(parts)]
                return post(name, rank, parts)

            network.post = spoiled_post
        exchanges = [
            Exchange(
                BucketData(bucket, gradient, np.array([step], np.uint64), native),
                ALGORITHMS["scatter_allgather"],
                transport,
                "x",
            )
            for bucket, gradient, transport in zip(buckets, gradients, network.ranks, strict=True)
        ]
        for one in exchanges:
            one.advance(wait=False)
        for one in exchanges:
            if step == 0:
                one.finish([np.empty(5000, np.float32)])
            else:
                with pytest.raises(ValueError, match="is not the one that was expected"):
                    one.finish([np.empty(5000, np.float32)])


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("difference", ["bits", "shape", "name", "number"])
def test_ranks_that_differ_all_find_out(exchange, difference):
    ranks = 4
    network = Network(ranks)
    exchanges = []
    for rank, transport in enumerate(network.ranks):
        odd = rank == 2
        scheme = QSGD(bits=5 if odd and difference == "bits" else 4)
        counts = [1000, 2000] if not (odd and difference == "shape") else [1001, 1999]
        entries = entries_of(counts, scheme)
        if odd and difference == "name":
            entries[0] = Entry("q", 1000, "float32", scheme)
        if odd and difference == "number":
            entries.pop()
        values = [np.ones(entry.count, np.float32) for entry in entries]
        uses = np.zeros(len(entries), np.uint64)
        bucket = GroupLayout(entries, ranks, rank, 0, topology_of(ranks))
        exchanges.append(
            Exchange(BucketData(bucket, values, uses, native), ALGORITHMS[exchange], transport, "x")
        )
    go_on(exchanges)
    for one in exchanges:
        with pytest.raises(ValueError, match="is not the one that was expected"):
            one.finish([np.empty_like(value) for value in one.data.values])


def test_memory_is_used_again():
    bucket = GroupLayout(entries_of([5000], QSGD()), 1, 0, 0)
    messages = []
    for use in range(3):
        network = Network(1)
        uses = np.array([use], np.uint64)
        data = BucketData(bucket, [np.ones(5000, np.float32)], uses, native, buffers=bucket.buffers)
        exchange = Exchange(data, ALGORITHMS["scatter_allgather"], network.ranks[0], "x")
        exchange.finish([np.empty(5000, np.float32)])
        messages.append({name: id(buffer) for name, buffer in bucket.buffers.items()})
    assert messages[0]
    assert messages[0] == messages[1] == messages[2]

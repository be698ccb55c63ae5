"""Results: what comes back, in which order, from how many communicators at once."""

import gc
import itertools
import sys
import threading
import weakref

import numpy as np
import pytest
from common import (
    EXCHANGES,
    SCHEME,
    WORLD,
    mean_of,
    own_values,
    rounding_moments,
    same_everywhere,
    steps_of,
)
from mpi4py import MPI

import hvd_quant
import hvd_quant.mpi as hm
from hvd_quant.mpi import buckets as buckets_module
from hvd_quant.mpi import comm as comm_module
from hvd_quant.mpi import request as request_module
from hvd_quant.mpi import transport as transport_module

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)


def largest_error(x, exchange, scheme=SCHEME, comm=WORLD):
    """What each value of the mean may be off by: the mean of the ranks' steps, and a step of the mean."""
    first = mean_of(steps_of(x.astype(np.float64), scheme), comm)
    # The second rounding is of a mean that is itself off by the first.
    norms = mean_of(x, comm)
    second = steps_of(np.abs(norms) + first, scheme) if exchange == "scatter_allgather" else 0.0
    return first + second


@exchanges
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 10_000])
@pytest.mark.parametrize("op", [MPI.SUM, hm.AVERAGE])
def check_the_result_is_near_and_the_same_everywhere(exchange, count, op):
    x = own_values(count)
    before = x.copy()
    out = np.full(count, np.nan, np.float32)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(x, out, op=op)
    assert same_everywhere(out)
    assert np.array_equal(x, before)
    mean = out / WORLD.size if op == MPI.SUM else out
    assert (np.abs(mean - mean_of(x)) <= largest_error(x, exchange) * (1 + 1e-5) + 1e-6).all()


def check_sum_is_the_default():
    x = own_values(1000)
    outs = [np.empty_like(x) for _ in range(2)]
    for out, op in zip(outs, [(), (MPI.SUM,)], strict=True):
        with hm.QuantizedComm(WORLD, SCHEME) as comm:
            comm.Allreduce(x, out, *op)
    assert np.array_equal(*outs)


@exchanges
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(), (7, 11, 13), (0, 4)])
def check_dtypes_and_shapes(exchange, dtype, shape):
    x = own_values(int(np.prod(shape)), dtype=dtype).reshape(shape)
    out = np.full_like(x, np.nan)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(x, out, op=hm.AVERAGE)
    assert same_everywhere(out)
    bound = largest_error(x.reshape(-1), exchange).reshape(shape)
    assert (np.abs(out - mean_of(x)) <= bound * (1 + 1e-5) + (2e-3 if dtype == np.float16 else 1e-6)).all()


@exchanges
@pytest.mark.parametrize("bits", [2, 8])
def check_the_error_has_the_exact_variance(exchange, bits):
    """Errors of one rounding have a known distribution; those of two are compared with a simulation.

    False-alarm rate about 1e-6 for each of the three comparisons, if the seeds were drawn anew.
    """
    scheme = hvd_quant.QSGD(bits, bucket_size=64)
    count, calls, n = 4096, 40, WORLD.size
    x = own_values(count, seed=3)
    mean, out = mean_of(x), np.empty_like(x)
    errors, simulated = np.empty((2, calls, count))
    with hm.QuantizedComm(WORLD, scheme, exchange=exchange) as comm:
        for call in range(calls):
            comm.Allreduce(x, out, op=hm.AVERAGE)
            errors[call] = out - mean
            seed = 1_000_000 + call * n
            rounded = hvd_quant.decode(hvd_quant.encode(x, scheme, seed=seed + WORLD.rank))
            again = mean_of(rounded).astype(np.float32)
            if exchange == "scatter_allgather":
                again = hvd_quant.decode(hvd_quant.encode(again, scheme, seed=seed + 500_000))
            simulated[call] = again - mean

    def compare(value, expected, deviation):
        assert abs(value - expected) < 4.9 * deviation

    second, fourth = rounding_moments(x.astype(np.float64), scheme)
    if exchange == "allgather":
        variance = WORLD.allreduce(second) / n**2
        # E (sum e)^4 = sum E e^4 + 3 sum over pairs of different ranks of E e^2 E e'^2
        pairs = WORLD.allreduce(second) ** 2 - WORLD.allreduce(second**2)
        of_square = (WORLD.allreduce(fourth) + 3 * pairs) / n**4 - variance**2
        compare(np.square(errors).sum(), calls * variance.sum(), np.sqrt(calls * of_square.sum()))
        compare(errors.sum(), 0.0, np.sqrt(calls * variance.sum()))
    own, other = np.square(errors).sum(1), np.square(simulated).sum(1)
    compare(own.mean(), other.mean(), 1.2 * np.sqrt((own.var() + other.var()) / calls))
    compare(errors.sum(), 0.0, np.sqrt(1.1 * np.square(simulated).sum()))


@exchanges
def check_in_place(exchange):
    x = own_values(3000).reshape(3, 1000)
    results = []
    for in_place in (True, False):
        out = x.copy()
        with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
            comm.Allreduce(MPI.IN_PLACE if in_place else x, out)
        results.append(out)
    assert np.array_equal(*results)
    assert not np.array_equal(results[0], x)


@exchanges
def check_buffers_that_overlap(exchange):
    """Values are encoded at the call, so that they may."""
    memory = own_values(3000)
    sent, received = memory[:2000].copy(), np.empty(2000, np.float32)
    for overlapping in (False, True):
        with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
            if overlapping:
                comm.Allreduce(memory[:2000], memory[1000:])
            else:
                comm.Allreduce(sent, received)
    assert np.array_equal(memory[1000:], received)


@exchanges
def check_same_seed_same_result_and_other_noise_in_every_call(exchange):
    x = own_values(2000)

    def run(seed):
        outs = []
        with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange, seed=seed) as comm:
            for _ in range(3):
                outs.append(np.empty_like(x))
                comm.Allreduce(x, outs[-1])
        return outs

    first, again, other = run(7), run(7), run(8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in itertools.combinations([*first, *other], 2):
        assert not np.array_equal(a, b)


@exchanges
@pytest.mark.parametrize("completion", ["Wait", "Test", "wait", "test"])
def check_several_under_way_completed_in_other_orders_on_other_ranks(exchange, completion):
    """Some of one shape, which must not share memory, on two communicators at once."""
    xs = [own_values(500 + 300 * (i % 3), seed=i) for i in range(8)]
    expected = []
    for started_together in (False, True):
        comms = [hm.QuantizedComm(WORLD, SCHEME, exchange=exchange, seed=seed) for seed in (1, 2)]
        outs = [np.full_like(x, np.nan) for x in xs]
        requests = []
        for i, (x, out) in enumerate(zip(xs, outs, strict=True)):
            requests.append(comms[i % 2].Iallreduce(x, out, op=hm.AVERAGE))
            if not started_together:
                requests[-1].Wait()
        if started_together:
            order = np.random.default_rng(WORLD.rank).permutation(len(xs))
            for i in order:
                if completion == "Wait":
                    assert requests[i].Wait() is True
                elif completion == "wait":
                    assert requests[i].wait() is None
                elif completion == "Test":
                    while not requests[i].Test():
                        pass
                else:
                    while requests[i].test() != (True, None):
                        pass
                assert np.array_equal(outs[i], expected[i])
                assert requests[i].Test()  # again
        expected = outs
        for comm in comms:
            comm.Free()


@exchanges
def check_test_alone_takes_all_there_without_blocking(exchange):
    """One thread a rank, and no rank waits: only `Test` is called, by turns with messages of other kinds."""
    x, out = own_values(5000), np.empty(5000, np.float32)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        if WORLD.rank == 0:  # nothing has come from this rank: the others' Test returns all the same
            done = [WORLD.recv(source=other) for other in range(1, WORLD.size)]
            assert not any(done)
            request = comm.Iallreduce(x, out)
        else:
            request = comm.Iallreduce(x, out)
            WORLD.send(any(request.Test() for _ in range(5)), 0)
        while not request.Test():
            pass
    assert same_everywhere(out)


@exchanges
def check_sub_communicators_side_by_side(exchange):
    """Two halves with different schemes, and the world, at once; user traffic of every tag beside them."""
    colour = WORLD.rank % 2
    half = WORLD.Split(colour, key=-WORLD.rank)
    scheme = SCHEME if colour else hvd_quant.QSGD(bits=3, bucket_size=128)
    x = own_values(4000)
    outs = np.empty((2, 4000), np.float32)
    with (
        hm.QuantizedComm(half, scheme, exchange=exchange) as of_half,
        hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as of_all,
    ):
        assert (of_half.rank, of_half.size) == (half.rank, half.size)
        peer = (WORLD.rank + 1) % WORLD.size
        sends = [WORLD.isend(tag, peer, tag) for tag in range(6)]
        requests = [
            of_half.Iallreduce(x, outs[0], op=hm.AVERAGE),
            of_all.Iallreduce(x, outs[1], op=hm.AVERAGE),
        ]
        for request in requests if colour else reversed(requests):
            request.Wait()
        assert [WORLD.recv(source=MPI.ANY_SOURCE, tag=tag) for tag in range(6)] == list(range(6))
        MPI.Request.waitall(sends)
    assert same_everywhere(outs[0], half)
    assert same_everywhere(outs[1])
    if half.size == 1:
        assert np.array_equal(outs[0], x)
    else:
        bound = largest_error(x, exchange, scheme, half)
        assert (np.abs(outs[0] - mean_of(x, half)) <= bound * (1 + 1e-5) + 1e-6).all()
    half.Free()


@pytest.mark.parametrize("op", [MPI.SUM, hm.AVERAGE])
def check_one_rank_keeps_its_values(op):
    x = own_values(1000, dtype=np.float64)
    out = np.empty_like(x)
    with hm.QuantizedComm(MPI.COMM_SELF, SCHEME) as comm:
        comm.Allreduce(x, out, op=op)
        assert np.array_equal(out, x)
        comm.Allreduce(MPI.IN_PLACE, out, op=op)
        assert np.array_equal(out, x)
        assert comm.stats()["wire_bytes"] == comm.stats()["received_bytes"] == 0


@exchanges
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def check_non_finite_values_reach_every_rank_and_stay_in_their_bucket(exchange, bad):
    x = own_values(1000)
    if WORLD.rank == WORLD.size - 1:
        x[70] = bad
    out = np.zeros_like(x)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(x, out)
    assert not np.isfinite(out[64:128]).any()
    assert np.isfinite(np.delete(out, np.s_[64:128])).all()
    assert same_everywhere(np.isnan(out))


@exchanges
@pytest.mark.parametrize(("share", "more"), [(1, -1), (1, 0), (1, 1), (2, 0), (5, 1)])
def check_messages_in_parts(exchange, share, more, monkeypatch):
    """Messages too large for MPI's counts go in parts; here, parts are small."""
    x = own_values(4000)
    whole, parts = np.empty_like(x), np.empty_like(x)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(x, whole)
        received = WORLD.allreduce(comm.stats()["received_bytes"], MPI.MAX)
        message = received // (WORLD.size - 1)  # the size of every message of the allgather
    monkeypatch.setattr(transport_module, "_PART", message // share + more)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(x, parts)
        comm.Allreduce(x, x)
    assert np.array_equal(whole, parts)
    assert same_everywhere(x)


def check_tags_wrap(monkeypatch):
    monkeypatch.setattr(transport_module, "COLLECTIVES", 2**29)  # so that tags last for 4 calls
    x = own_values(500)
    with hm.QuantizedComm(WORLD, SCHEME, exchange="scatter_allgather") as comm:
        for _ in range(6):
            out = np.empty_like(x)
            comm.Allreduce(x, out)
            assert same_everywhere(out)


def check_stats():
    x = own_values(4096)
    out = np.empty_like(x)
    for exchange in EXCHANGES:
        with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
            assert comm.stats()["compression_ratio"] == 1.0
            for _ in range(2):
                comm.Allreduce(x, out)
            stats = comm.stats()
        n, payload = WORLD.size, 8 + hvd_quant.encode(x, SCHEME).size
        assert stats["messages"] == 2
        assert stats["raw_bytes"] == 2 * x.nbytes
        assert stats["compression_ratio"] == stats["raw_bytes"] / stats["wire_bytes"]
        if exchange == "allgather":
            assert stats["wire_bytes"] == 2 * payload
            assert stats["received_bytes"] == 2 * (n - 1) * payload
        else:  # chunks have headers of their own, and are nearly of one size
            assert 2 * payload <= stats["wire_bytes"] <= 2 * (payload + (n - 1) * (8 + 32 + 8))
            total = WORLD.allreduce(stats["received_bytes"])
            assert total == pytest.approx(2 * n * 2 * (n - 1) / n * payload, rel=0.2)


@exchanges
def check_nothing_piles_up(exchange, monkeypatch):
    limit = 1 << 20
    monkeypatch.setattr(buckets_module, "_IDLE_BYTES", limit)
    comm = hm.QuantizedComm(WORLD, SCHEME, exchange=exchange)
    references = []
    x = own_values(20_000)
    for step in range(60):
        out = np.empty_like(x)
        references.append(weakref.ref(out))
        request = comm.Iallreduce(x[: 2000 + 100 * step], out[: 2000 + 100 * step])
        references.append(weakref.ref(request))
        request.Wait()
        comm.Allreduce(x, out)  # of one shape throughout
    del request, out
    gc.collect()
    alive = [one for one in references if one() is not None]
    assert len(alive) <= 1  # the latest request
    assert request_module.underway == request_module.abandoned == []
    assert len(comm._requests) <= 1
    assert comm._idle.nbytes == sum(map(buckets_module.kept_bytes, comm._idle.all())) <= limit
    # The one in use all the time is among them, with what it has received: it is made once.
    assert [bucket.entries[0].count for bucket in comm._idle.all()].count(20_000) == 1
    WORLD.Barrier()
    assert not comm._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
    comm.Free()
    comm.Free()  # again does nothing


@exchanges
def check_memory_is_used_again(exchange):
    x = own_values(20_000)
    out = np.empty_like(x)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        seen = []
        for _ in range(3):
            comm.Allreduce(x, out)
            (bucket,) = comm._idle.all()
            seen.append({name: buffer.ctypes.data for name, buffer in bucket.buffers.items()})
    assert seen[0] == seen[1] == seen[2]
    assert sum(name.startswith("received") for name in seen[0]) == (WORLD.size - 1) * (
        1 if exchange == "allgather" else 2
    )


@exchanges
def check_a_request_that_is_dropped(exchange):
    """Completed by whoever waits next, at the latest by `Free`."""
    x = own_values(3000)
    out = np.full_like(x, np.nan)
    comm = hm.QuantizedComm(WORLD, SCHEME, exchange=exchange)
    if WORLD.rank == 0:
        comm.Iallreduce(x, out)
    else:
        comm.Iallreduce(x, out).Wait()
    comm.Free()
    assert same_everywhere(out)
    assert not np.isnan(out).any()


@exchanges
def check_threads_with_a_communicator_each(exchange):
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("this MPI library has no MPI.THREAD_MULTIPLE")
    xs = [own_values(2000, seed=i) for i in range(2)]
    outs = [np.empty_like(x) for x in xs]
    comms = [hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) for _ in xs]
    same = [[], []]

    def work(i):
        for _ in range(10):
            comms[i].Allreduce(xs[i], outs[i])
            same[i].append(outs[i].tobytes())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert [len(results) for results in same] == [10, 10]
    assert same_everywhere(np.frombuffer(b"".join(same[0] + same[1]), np.uint8))
    for comm in comms:
        comm.Free()


def check_auto_takes_what_the_model_takes(monkeypatch):
    taken = []
    monkeypatch.setattr(comm_module, "Exchange", recording(comm_module.Exchange, taken))
    for gigabits, count in (("0.001", 50_000), ("1000", 64)):
        monkeypatch.setenv("HVD_QUANT_BANDWIDTH", gigabits)
        out = own_values(count)
        with hm.QuantizedComm(WORLD, SCHEME) as comm:
            comm.Allreduce(MPI.IN_PLACE, out)
        assert same_everywhere(out)
    slow = "allgather" if WORLD.size == 2 else "scatter_allgather"
    assert taken == [slow, "allgather"]


def recording(function, taken):
    def recorded(work, algorithm, *rest):
        taken.append(algorithm.name)
        return function(work, algorithm, *rest)

    return recorded

"""Differences between ranks and misuse: the same clear error on every rank, and never a hang."""

import numpy as np
import pytest
from common import EXCHANGES, SCHEME, WORLD, own_values, same_everywhere
from mpi4py import MPI
from shared import error_of

import hvd_quant
import hvd_quant.mpi as hm
from hvd_quant.mpi import comm as comm_module
from hvd_quant.mpi import request as request_module

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
FIRST, LAST = 0, WORLD.size - 1


def difference(field, odd, odd_one, others):
    """How a message says that one rank differs from the others."""
    rest = [rank for rank in range(WORLD.size) if rank != odd]
    sides = [(odd_one, [odd]), (others, rest)]
    sides.sort(key=lambda side: side[1])
    return f"{field} is " + ", ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for value, ranks in sides
    )


def same_mismatch(error):
    assert isinstance(error, hm.RankMismatchError)
    assert len(set(WORLD.allgather(str(error)))) == 1
    return str(error)


@pytest.mark.parametrize("odd", [FIRST, LAST])
@pytest.mark.parametrize(
    ("field", "odd_one", "others"),
    [
        ("bits", 4, 8),
        ("norm", "max", "l2"),
        ("bucket_size", 512, 511),
        ("exchange", "auto", "allgather"),
        ("exchange", "scatter_allgather", "allgather"),
        ("seed", 1, 0),
    ],
)
def check_different_arguments_are_named_on_every_rank(field, odd, odd_one, others):
    value = odd_one if WORLD.rank == odd else others
    in_scheme = field not in ("exchange", "seed")
    scheme = hvd_quant.QSGD(**({field: value} if in_scheme else {}))
    error = error_of(lambda: hm.QuantizedComm(WORLD, scheme, **({} if in_scheme else {field: value})))
    quote = '"' if isinstance(value, str) else ""
    expected = difference(field, odd, f"{quote}{odd_one}{quote}", f"{quote}{others}{quote}")
    assert expected in same_mismatch(error)


def check_different_bandwidths_are_named(monkeypatch):
    monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "10" if WORLD.rank == 0 else "1")
    assert "bandwidth" in same_mismatch(error_of(lambda: hm.QuantizedComm(WORLD, SCHEME)))


@pytest.mark.parametrize("variable", ["HVD_QUANT_BANDWIDTH", "HVD_QUANT_THREADS"])
def check_an_environment_that_is_of_no_use(variable, monkeypatch):
    if WORLD.rank == LAST:
        monkeypatch.setenv(variable, "fast")
    message = same_mismatch(error_of(lambda: hm.QuantizedComm(WORLD, SCHEME)))
    assert f"{variable} must be a positive" in message
    monkeypatch.setenv(variable, "slow")
    error = error_of(lambda: hm.QuantizedComm(WORLD, SCHEME))
    assert isinstance(error, ValueError)
    assert "'slow'" in str(error)


def check_what_interrupts_a_call_cannot_wait_for_another(monkeypatch):
    """A signal's handler, or a finalizer, on top of what takes requests forward."""
    x = own_values(3000)
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        request = comm.Iallreduce(MPI.IN_PLACE, x.copy())
        with monkeypatch.context() as patch:
            patch.setattr(request_module, "_busy", True)
            complete = request.Test()
            waits = [comm.Free, lambda: comm.Allreduce(MPI.IN_PLACE, x.copy())]
            waits += [] if complete else [request.Wait]
            for action in [*waits, lambda: hm.QuantizedComm(WORLD, SCHEME)]:
                with pytest.raises(RuntimeError, match="from the main program"):
                    action()
        request.Wait()
        comm.Allreduce(MPI.IN_PLACE, x)
        assert same_everywhere(x)


CALLS = {
    "shape": (np.zeros((30, 40), np.float32), np.zeros(1200, np.float32), "[30, 40]", "[1200]"),
    # Of other sizes than expected: larger, and smaller.
    "count": (np.zeros(90_000, np.float32), np.zeros(40, np.float32), "[90000]", "[40]"),
    "empty": (np.zeros(0, np.float32), np.zeros(40, np.float32), "[0]", "[40]"),
    "dtype": (np.zeros(1200, np.float64), np.zeros(1200, np.float32), '"float64"', '"float32"'),
}


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("odd", [FIRST, LAST])
@pytest.mark.parametrize("what", CALLS)
def check_different_calls_are_named_on_every_rank_and_the_next_one_works(exchange, odd, what, monkeypatch):
    """With "auto", ranks with different counts take different exchanges, and notice at different stages."""
    if exchange == "auto":
        monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "0.01")
    odd_one, others, odd_text, others_text = CALLS[what]
    x = (odd_one if WORLD.rank == odd else others).copy()
    good = own_values(3000)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        message = same_mismatch(error_of(lambda: comm.Allreduce(MPI.IN_PLACE, x)))
        field = "dtype" if what == "dtype" else "shape"
        assert difference(field, odd, odd_text, others_text) in message
        assert "in call 0" in message
        comm.Allreduce(MPI.IN_PLACE, good)
        WORLD.Barrier()
        assert not comm._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
    assert same_everywhere(good)
    assert not x.any()  # nothing was written
    assert request_module.underway == request_module.abandoned == []


@exchanges
def check_different_ops(exchange):
    op = hm.AVERAGE if WORLD.rank == LAST else MPI.SUM
    x = own_values(3000)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        message = same_mismatch(error_of(lambda: comm.Allreduce(MPI.IN_PLACE, x, op=op)))
    assert difference("op", LAST, '"average"', '"MPI.SUM"') in message


@exchanges
def check_several_mismatches_under_way_completed_in_other_orders(exchange):
    """Also beside calls that match, on two communicators, so that every rank waits for another call first."""
    comms = [hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) for _ in range(2)]
    counts = [900 + WORLD.rank, 500, 700 + WORLD.rank, 600, 800 + WORLD.rank, 400]
    buffers = [own_values(count) for count in counts]
    requests = [comms[i % 2].Iallreduce(MPI.IN_PLACE, buffer) for i, buffer in enumerate(buffers)]
    errors = dict.fromkeys(range(len(requests)))
    for i in np.roll(np.arange(len(requests)), WORLD.rank):
        errors[i] = error_of(requests[i].Wait)
    for i in range(len(requests)):
        if i % 2:
            assert errors[i] is None
            assert same_everywhere(buffers[i])
        else:
            same_mismatch(errors[i])
            assert error_of(requests[i].Wait) is errors[i]  # again
    for comm in comms:
        comm.Free()


@exchanges
def check_a_dropped_request_that_fails_is_told_by_free(exchange):
    x = own_values(300 + WORLD.rank)
    comm = hm.QuantizedComm(WORLD, SCHEME, exchange=exchange)
    comm.Iallreduce(MPI.IN_PLACE, x)
    same_mismatch(error_of(comm.Free))
    comm.Free()


@exchanges
def check_a_rank_that_does_not_answer(exchange, monkeypatch):
    """What is damaged on the way may be noticed by one rank alone, which must not wait for ever."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 0.3)
    comm = hm.QuantizedComm(WORLD, SCHEME, exchange=exchange)
    x = own_values(3000)

    def damage(self, out, factor=1.0):
        raise ValueError("damaged")

    if WORLD.rank == 0:
        monkeypatch.setattr(comm_module.Exchange, "finish", damage)
        error = error_of(lambda: comm.Allreduce(MPI.IN_PLACE, x))
        assert isinstance(error, hm.RankMismatchError)
        assert "did not all answer" in str(error)
        assert "damaged" in str(error)
        monkeypatch.undo()
        assert len(request_module.abandoned) == 1
        request_module.abandoned.clear()
    else:
        comm.Allreduce(MPI.IN_PLACE, x)
    WORLD.Barrier()
    comm.Allreduce(MPI.IN_PLACE, x)  # calls are numbered as before
    comm.Free()


READ_ONLY = np.zeros(8, np.float32)
READ_ONLY.flags.writeable = False
GOOD = np.zeros(8, np.float32)
UNALIGNED = np.zeros(33, np.uint8)[1:].view(np.float32)


@pytest.mark.parametrize(
    ("send", "receive", "error", "text"),
    [
        (GOOD.astype(">f4"), GOOD, TypeError, "sendbuf must be of dtype float32.*byte order, not >f4"),
        (GOOD, GOOD.astype(">f4"), TypeError, "recvbuf must be of dtype"),
        (GOOD.astype(np.int32), GOOD, TypeError, "not int32"),
        (GOOD.astype(np.complex64), GOOD, TypeError, "not complex64"),
        (GOOD.astype(bool), GOOD, TypeError, "not bool"),
        (np.zeros(16, np.float32)[::2], GOOD, ValueError, "sendbuf must be contiguous"),
        (GOOD, np.zeros(16, np.float32)[::2], ValueError, "recvbuf must be contiguous"),
        (GOOD.reshape(2, 4).T, GOOD, ValueError, "sendbuf must be contiguous in C order"),
        (UNALIGNED, GOOD, ValueError, "aligned"),
        (GOOD, READ_ONLY, ValueError, "recvbuf is read-only"),
        (MPI.IN_PLACE, READ_ONLY, ValueError, "recvbuf is read-only"),
        (GOOD, GOOD[:7], ValueError, "sendbuf has 8 values, and recvbuf has room for 7"),
        (GOOD, GOOD.astype(np.float64), TypeError, "sendbuf is of float32 and recvbuf of float64"),
        (GOOD, MPI.IN_PLACE, TypeError, "recvbuf must be a NumPy array or a torch tensor, not InPlace"),
        (None, GOOD, TypeError, "sendbuf must be a NumPy array or a torch tensor, not NoneType"),
        ([1.0, 2.0], GOOD, TypeError, "not list"),
        (bytes(32), GOOD, TypeError, "not bytes"),
    ],
)
def check_buffers_that_are_refused(send, receive, error, text):
    """Before anything is sent: calls are numbered as if they had not been made, also on one rank alone."""
    good = own_values(200)
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        if WORLD.rank == LAST:
            for call in (comm.Allreduce, comm.Iallreduce):
                with pytest.raises(error, match=text):
                    call(send, receive)
        comm.Allreduce(MPI.IN_PLACE, good)
        assert comm.stats()["messages"] == 1
    assert same_everywhere(good)


@pytest.mark.parametrize("op", [MPI.MAX, MPI.PROD, MPI.OP_NULL, None, "sum"])
def check_ops_that_are_refused(op):
    with (
        hm.QuantizedComm(WORLD, SCHEME) as comm,
        pytest.raises(ValueError, match=r"op must be MPI\.SUM or hvd_quant\.mpi\.AVERAGE"),
    ):
        comm.Allreduce(MPI.IN_PLACE, GOOD, op=op)


def check_send_buffers_may_be_read_only():
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        comm.Allreduce(READ_ONLY, np.empty_like(READ_ONLY))


@pytest.mark.parametrize(
    ("comm", "scheme", "options", "error", "text"),
    [
        (None, SCHEME, {}, TypeError, "communicator of mpi4py, not None"),
        (MPI.COMM_NULL, SCHEME, {}, ValueError, "COMM_NULL"),
        (WORLD, 4, {}, TypeError, "scheme must be a scheme such as"),
        (WORLD, SCHEME, {"exchange": "ring"}, ValueError, "exchange must be 'auto' or 'allgather'"),
        (WORLD, SCHEME, {"seed": -1}, ValueError, "seed must be from 0"),
        (WORLD, SCHEME, {"seed": 1.0}, TypeError, "seed must be an integer"),
    ],
)
def check_arguments_that_are_refused(comm, scheme, options, error, text):
    with pytest.raises(error, match=text):
        hm.QuantizedComm(comm, scheme, **options)


def check_a_bandwidth_that_is_refused(monkeypatch):
    monkeypatch.setenv("HVD_QUANT_BANDWIDTH", "fast")
    with pytest.raises(ValueError, match="HVD_QUANT_BANDWIDTH must be a positive number"):
        hm.QuantizedComm(WORLD, SCHEME)


@exchanges
def check_damage_that_every_rank_notices(exchange, monkeypatch):
    """The arguments are the same, but a rank has sent other bytes: its codec is broken."""
    encode_message = comm_module.native.encode_message

    def broken(values, layout, noise, message, residuals):
        size = encode_message(values, layout, noise, message, residuals)
        message[size - 1] ^= 1
        return size

    x, good = own_values(3000), own_values(200)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        with monkeypatch.context() as patch:
            if WORLD.rank == LAST:
                patch.setattr(comm_module.native, "encode_message", broken)
            error = error_of(lambda: comm.Allreduce(MPI.IN_PLACE, x))
        assert isinstance(error, hm.RankMismatchError)
        assert "arguments are the same" in str(error)
        comm.Allreduce(MPI.IN_PLACE, good)
    assert same_everywhere(good)


def check_communicators_that_are_refused():
    freed = WORLD.Dup()
    freed.Free()
    with pytest.raises(ValueError, match="has been freed"):
        hm.QuantizedComm(freed, SCHEME)
    half = WORLD.Split(min(WORLD.rank, 1), 0)
    between = half.Create_intercomm(0, WORLD, 1 if WORLD.rank == 0 else 0)
    with pytest.raises(ValueError, match="intercommunicator"):
        hm.QuantizedComm(between, SCHEME)
    between.Free()
    half.Free()


def check_use_after_free():
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        pass
    for call in (comm.Allreduce, comm.Iallreduce):
        with pytest.raises(ValueError, match="has been freed"):
            call(MPI.IN_PLACE, GOOD)


def check_the_communicator_that_it_was_made_from_may_go():
    origin = WORLD.Dup()
    comm = hm.QuantizedComm(origin, SCHEME)
    origin.Free()
    x = own_values(500)
    comm.Allreduce(MPI.IN_PLACE, x)
    comm.Free()
    assert same_everywhere(x)


def check_an_error_of_one_rank_leaves_the_with_block_at_once():
    """Another error than a mismatch may be this rank's alone: `Free` would wait for the others."""
    comm = hm.QuantizedComm(WORLD, SCHEME)

    def stopped():
        with comm:
            if WORLD.rank == 0:
                comm.Iallreduce(MPI.IN_PLACE, own_values(100))
                raise KeyError

    if WORLD.rank == 0:
        assert isinstance(error_of(stopped), KeyError)  # no other rank has called
    WORLD.Barrier()
    if WORLD.rank:
        comm.Allreduce(MPI.IN_PLACE, own_values(100))
    comm.Free()


def check_an_interrupt_is_not_taken_for_a_result(monkeypatch):
    comm = hm.QuantizedComm(WORLD, SCHEME)

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comm_module.Exchange, "ready", interrupt)
        with pytest.raises(KeyboardInterrupt):
            comm.Allreduce(MPI.IN_PLACE, own_values(3000))
    with pytest.raises(KeyboardInterrupt):
        comm.Free()  # it was under way


def check_requests_go_on_while_a_communicator_is_made_and_freed():
    """One rank waits for its request only after the other ranks have, in calls that block."""
    x = np.ones(100_000, np.float32)
    comm = hm.QuantizedComm(WORLD, hvd_quant.QSGD(), exchange="scatter_allgather")
    request = comm.Iallreduce(MPI.IN_PLACE, x)
    if WORLD.rank:
        request.Wait()
    hm.QuantizedComm(WORLD, hvd_quant.QSGD()).Free()
    request.Wait()
    comm.Free()
    assert np.all(x == WORLD.size)

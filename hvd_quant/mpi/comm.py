"""An MPI communicator whose ``Allreduce`` sends a few bits a value."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_quant import wire
from hvd_quant.codec import flat_array, is_tensor, native
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import EXCHANGES, Work, choose
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.layout import Entry, FusedBucket
from hvd_quant.exchange.topology import NOT_BY_HOSTS, Topology
from hvd_quant.mpi.transport import MpiTransport
from hvd_quant.reducer.mismatch import Description, RankMismatchError, differences
from hvd_quant.schemes import Scheme, check_choice, check_integer

Array = Any  # np.ndarray | torch.Tensor: torch is the caller's to import
AVERAGE = "average"  # MPI has no such op
_LATENCY = 3e-4  # seconds a collective: nothing is negotiated before it, unlike with Horovod
# How long to wait for the other ranks to tell what they have called, once the calls turned out to differ.
_PATIENCE_SECONDS = 60.0
_IDLE_BYTES = 256 << 20  # of buffers that are kept between calls
_LAYOUT_BYTES = 1 << 16  # what a fused bucket counts for, however small its buffers are

# Whoever waits takes all calls of the process forward: ranks may wait for them in different orders, and a
# rank's part in one call must not depend on its waiting for another.
_underway: list[Request] = []
_abandoned: list[Any] = []  # what MPI may still read
_lock = threading.RLock()
_busy = False  # under the lock, which a signal's handler or a finalizer has, too, if it interrupts its holder


def _progress() -> None:
    global _busy
    with _lock:
        if _busy:
            return
        _busy = True
        try:
            _underway[:] = [request for request in _underway if not request._advance()]
        finally:
            _busy = False


def _check_not_within() -> None:
    """Refuse to wait within `_progress`, where nothing would go on."""
    with _lock:
        if _busy:
            raise RuntimeError(
                "a signal's handler or a finalizer cannot wait for an hvd_quant.mpi call, or make one that "
                "waits, while it interrupts another: have it set a flag, and call from the main program"
            )


def _meet(comm: MPI.Intracomm) -> None:
    """A barrier, in which requests go on, before calls in which they would not."""
    barrier = comm.Ibarrier()
    while not barrier.Test():
        _progress()


def _host_of(comm: MPI.Intracomm) -> tuple[int, bool]:
    """The first of the ranks on this rank's host, and whether all are there."""
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host, one_host = neighbours.bcast(comm.rank), neighbours.size == comm.size
    neighbours.Free()
    return host, one_host


def _check_mpi() -> None:
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError("MPI is not initialised, or no longer: call MPI.Init() first")


class Request:
    """An ``Iallreduce`` on its way; complete it with `Wait`, or with `Test` until that is true.

    Any call here takes all of the process's requests forward. While none is made they may stand still, and
    with them other ranks that wait for theirs: complete requests before you wait for other ranks by other
    means, such as a barrier.

    One that is dropped is taken forward none the less, and writes to its receive buffer when it gets there;
    `QuantizedComm.Free` waits for it, and raises its error.
    """

    def __init__(self, steps: Iterator[None]) -> None:
        self._steps: Iterator[None] | None = steps  # which yields while it waits for other ranks
        self._error: BaseException | None = None
        self._reported = False  # the error

    @property
    def _over(self) -> bool:
        """Whether there is nothing left to wait for, and nothing to tell."""
        return self._steps is None and (self._error is None or self._reported)

    def _advance(self) -> bool:
        """As far as it gets without waiting; whether that is the end."""
        try:
            if self._steps is not None:
                next(self._steps)
        except StopIteration:
            self._steps = None
        except BaseException as error:
            self._steps, self._error = None, error
            if not isinstance(error, Exception):  # an interrupt, of whatever this request is waited with
                _abandoned.append(error)  # whose traceback keeps what MPI may still read
                raise
        return self._steps is None

    def Test(self) -> bool:  # noqa: N802  as in mpi4py
        """Whether the result is in the receive buffer. Never waits for another rank.

        Raises:
            RankMismatchError: the ranks have called with different arguments.
        """
        if self._steps is not None:
            _check_mpi()
            _progress()
        if self._steps is None and self._error is not None:
            self._reported = True
            raise self._error
        return self._steps is None

    def Wait(self) -> bool:  # noqa: N802
        """Wait until the result is in the receive buffer.

        Returns:
            True, as mpi4py.

        Raises:
            RankMismatchError: the ranks have called with different arguments.
            RuntimeError: called by a signal's handler that interrupts another call.
        """
        if not self.Test():
            _check_not_within()
        while not self.Test():
            pass  # MPI yields the core by itself, where it is told to
        return True

    def test(self) -> tuple[bool, None]:
        """`Test`, with the result that mpi4py's ``test`` has."""
        return self.Test(), None

    def wait(self) -> None:
        """`Wait`, with the result that mpi4py's ``wait`` has."""
        self.Wait()


class QuantizedComm:
    """Allreduce with quantized values over the ranks of an MPI communicator.

    Making one is collective, like every call here but `stats`: all ranks do it, in the same order. It has a
    duplicate of the communicator to itself, so that other traffic on ``comm`` does not matter. Threads may
    use several of them at once, if MPI was initialised with ``MPI.THREAD_MULTIPLE``, as mpi4py does.

    Args:
        comm: an intracommunicator. With one rank, values pass as they are.
        scheme: how values are quantized, e.g. ``hvd_quant.QSGD(bits=4)``.
        exchange: ``"allgather"``, every rank gets all payloads; ``"scatter_allgather"``, every rank averages
            a part and sends that to all, which is less to receive from three ranks on, for a second
            rounding; ``"hierarchical"``, the ranks of a host average their values as they are, and the
            hosts exchange these means; ``"auto"``, the quickest by the model in
            `hvd_quant.exchange.cost`.
        seed: of the rounding noise, 0 to 2^64 - 1. Each rank and each call draws its own noise from it. Give
            another one to a communicator that reduces what this one has reduced.

    Raises:
        RankMismatchError: the ranks have given different arguments, or some rank's ``HVD_QUANT_...``
            variables are of no use; on every rank.
        TypeError, ValueError: an argument is not of its type, or not in its range.

    Example:
        >>> comm = hvd_quant.mpi.QuantizedComm(MPI.COMM_WORLD, hvd_quant.QSGD(bits=4))
        >>> comm.Allreduce(gradient, mean, op=hvd_quant.mpi.AVERAGE)
    """

    def __init__(self, comm: MPI.Intracomm, scheme: Scheme, *, exchange: str = "auto", seed: int = 0) -> None:
        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"comm must be a communicator of mpi4py, not {comm!r}")
        _check_mpi()
        if comm == MPI.COMM_NULL:
            raise ValueError("comm is MPI.COMM_NULL: this rank is in no communicator, or it has been freed")
        if comm.Is_inter():
            raise ValueError("comm is an intercommunicator; merge its groups first, by comm.Merge()")
        if not isinstance(scheme, Scheme):
            raise TypeError(f"scheme must be a scheme such as hvd_quant.QSGD(bits=4), not {scheme!r}")
        if scheme.rounding == "nearest":
            raise ValueError(
                'rounding="nearest" is biased, and is for error feedback, which is not to be had here'
            )
        check_choice("exchange", exchange, EXCHANGES)
        check_integer("seed", seed, 0, 2**64 - 1)
        _check_not_within()
        self.rank, self.size = comm.rank, comm.size
        self.scheme = scheme
        self.exchange = exchange
        self.seed = int(seed)
        _meet(comm)
        host, one_host = _host_of(comm)
        fault = None
        try:
            native.threads()
            self._link = cost.link_from_environment(one_host, _LATENCY)
        except ValueError as error:  # on this rank alone, perhaps
            fault = error
        self._comm: MPI.Intracomm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._idle: dict[Entry, list[FusedBucket]] = {}  # the most recently used ones last
        self._idle_bytes = 0
        self._requests: list[Request] = []  # that were not over when last looked at
        self._raw_bytes = 0
        self._wire_bytes = 0
        self._received_bytes = 0
        self._messages = 0  # calls so far, too: every rank numbers them
        self._agree(fault, host)

    def _agree(self, fault: ValueError | None, host: int) -> None:
        """Compare the ranks' arguments, and whether their environments are in order; tell the hosts."""
        own = {
            "environment": "in order" if fault is None else str(fault),
            "scheme": type(self.scheme).__name__,
            **asdict(self.scheme),
            "exchange": self.exchange,
            "seed": self.seed,
            "link": asdict(self._link) if fault is None else None,
            "wire version": wire.VERSION,
        }
        described, hosts = zip(*self._comm.allgather((own, host)), strict=True)
        self._topology = Topology(hosts)
        found = differences(described)
        if (
            fault is None
            and self.exchange == "hierarchical"
            and self.size > 1
            and self._topology.ranks_a_host == 1
        ):
            fault = ValueError(NOT_BY_HOSTS)
        if found or fault is not None:
            self._comm.Free()
        if found:
            raise RankMismatchError(
                "hvd_quant is configured differently on the ranks: "
                + "; ".join(found.values())
                + ". Give every rank the same arguments to QuantizedComm, and the same HVD_QUANT_BANDWIDTH."
            ) from fault
        if fault is not None:
            raise fault

    # --- what users call --------------------------------------------------------------------------------

    def Allreduce(  # noqa: N802  as in mpi4py
        self, sendbuf: Array | MPI.InPlace, recvbuf: Array, op: MPI.Op | str = MPI.SUM
    ) -> None:
        """Sum or average the ranks' values; afterwards all ranks hold the same bits.

        Args:
            sendbuf: a NumPy array or a torch tensor on the CPU, of float32, float64, float16 or (tensors)
                bfloat16, of any shape, contiguous in C order; or ``MPI.IN_PLACE``, to take the values from
                ``recvbuf``. Shape and dtype are the same on all ranks.
            recvbuf: where to; of the same dtype and as many values.
            op: ``MPI.SUM`` or ``hvd_quant.mpi.AVERAGE``.

        Sums are computed in float32. What that cannot hold makes its bucket non-finite, as NaN and Inf do.
        After an interrupt (Ctrl-C) within a call, do not go on with the communicator.

        Raises:
            RankMismatchError: the ranks have called with different arguments; on every rank, and later
                calls are not affected.
            TypeError, ValueError: an argument is refused; nothing has been sent.
        """
        _check_not_within()
        self.Iallreduce(sendbuf, recvbuf, op).Wait()

    def Iallreduce(  # noqa: N802
        self, sendbuf: Array | MPI.InPlace, recvbuf: Array, op: MPI.Op | str = MPI.SUM
    ) -> Request:
        """Begin an `Allreduce`, to be completed by the request's ``Wait`` or ``Test``.

        Several may be under way at once, and be completed in any order, which need not be the same on all
        ranks. As in MPI, leave both buffers alone until the request is complete.

        Raises:
            TypeError, ValueError: an argument is refused; nothing has been sent.
        """
        _check_mpi()
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this QuantizedComm has been freed; make another one")
        if not isinstance(op, (MPI.Op, str)) or op not in (MPI.SUM, AVERAGE):
            raise ValueError(
                "op must be MPI.SUM or hvd_quant.mpi.AVERAGE: there is no other of values quantized apart"
            )
        out, dtype = _values("recvbuf", recvbuf, written=True)
        values, shape = out, list(recvbuf.shape)
        if sendbuf is not MPI.IN_PLACE:
            values, send_dtype = _values("sendbuf", sendbuf, written=False)
            shape = list(sendbuf.shape)
            if send_dtype != dtype:
                raise TypeError(f"sendbuf is of {send_dtype} and recvbuf of {dtype}; make them the same")
            if values.size != out.size:
                raise ValueError(f"sendbuf has {values.size} values, and recvbuf has room for {out.size}")
        op_name = AVERAGE if op == AVERAGE else "MPI.SUM"
        call = {"op": op_name, "shape": shape, "dtype": dtype}
        request = Request(self._exchange(values, out, 1 if op_name == AVERAGE else self.size, call))
        with _lock:
            self._requests = [*(one for one in self._requests if not one._over), request]
            if not request._advance():
                _underway.append(request)
        return request

    def stats(self) -> dict[str, float]:
        """What this rank has contributed so far.

        Returns:
            ``messages``, calls; ``raw_bytes``, the values as they were; ``wire_bytes``, what they were
            encoded into; ``received_bytes``, what came from other ranks in calls that are complete;
            ``compression_ratio``, raw over wire bytes.
        """
        return {
            "messages": self._messages,
            "raw_bytes": self._raw_bytes,
            "wire_bytes": self._wire_bytes,
            "received_bytes": self._received_bytes,
            "compression_ratio": self._raw_bytes / self._wire_bytes if self._wire_bytes else 1.0,
        }

    def Free(self) -> None:  # noqa: N802
        """Wait for what is under way, and free the communicator (not the one it was made from). Collective.

        Raises:
            RankMismatchError: of a call that nobody has waited for.
        """
        if self._comm == MPI.COMM_NULL or MPI.Is_finalized():
            return
        _check_not_within()
        requests = [request for request in self._requests if not request._over]
        while any(request._steps is not None for request in requests):
            _progress()
        self._idle.clear()
        _meet(self._comm)
        self._comm.Free()
        for request in requests:
            request.Wait()  # raises its error, if it has one

    def __enter__(self) -> QuantizedComm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # else it may be this rank's alone, and waiting for the others would hide it
            self.Free()

    # --- one call ---------------------------------------------------------------------------------------

    def _exchange(
        self, values: np.ndarray, out: np.ndarray, factor: int, call: Description
    ) -> Generator[None, None, None]:
        """Exchange the values of a call and write ``factor`` times their mean; yields while it must wait."""
        number = self._messages
        self._messages += 1
        self._raw_bytes += values.nbytes
        if self.size == 1:
            out[:] = values
            return
        entry = Entry(json.dumps(call), values.size, call["dtype"], self.scheme)
        bucket = self._bucket(entry)
        whole = bucket.whole
        link = replace(self._link, ranks_a_host=self._topology.ranks_a_host)
        algorithm = choose(self.exchange, link, self.size, whole.size, whole.count)
        transport = MpiTransport(self._comm, number, bucket.buffers)
        uses = np.array([number], np.uint64)
        work = Work(bucket, [values], uses, native, buffers=bucket.buffers)
        exchange = Exchange(work, algorithm, transport, f"call {number}")
        while not exchange.ready():
            yield
        try:
            exchange.finish([out], factor)
        except ValueError as error:
            explanation = yield from self._explain(transport, call, error)
            raise RankMismatchError(f"in call {number}, {explanation}") from error
        finally:
            self._received_bytes += exchange.received_bytes
            self._wire_bytes += work.encoded_bytes
        self._put_back(bucket)

    def _explain(
        self, transport: MpiTransport, call: Description, error: ValueError
    ) -> Generator[None, None, str]:
        """Ask all ranks, which have all noticed, what they have called. Patience is limited."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        answers: list[np.ndarray] = []
        description = np.frombuffer(json.dumps(call).encode(), np.uint8)
        # Others may have chosen an exchange of more collectives, of which the others are then empty.
        for message in [description[:0]] * (3 - transport.collectives) + [description]:
            handle = transport.allgather(message, [len(message)] * self.size, "mismatch")
            while not handle.ready():
                if time.monotonic() > deadline:
                    _abandoned.append(handle)
                    return (
                        f"what the ranks have sent does not fit together ({error}), and they did not all "
                        f"answer when asked for their arguments. This one has {call}."
                    )
                yield
            answers = handle.wait()
        calls = [json.loads(answer.tobytes()) for answer in answers]
        if found := differences(calls):
            return (
                "the ranks' arguments differ: "
                + "; ".join(found.values())
                + ". Make the same calls, in the same order, on every rank."
            )
        return f"the ranks' arguments are the same, but not all that they have sent is of use: {error}"

    def _bucket(self, entry: Entry) -> FusedBucket:
        """A fused bucket that no other call is using."""
        if idle := self._idle.get(entry):
            bucket = idle.pop()
            self._idle_bytes -= _kept_bytes(bucket)
            return bucket
        return FusedBucket([entry], self.size, self.rank, self.seed, self._topology)

    def _put_back(self, bucket: FusedBucket) -> None:
        """Keep it for later calls, at the cost of those that have not been used for longest."""
        entry = bucket.entries[0]
        self._idle[entry] = [*self._idle.pop(entry, ()), bucket]
        self._idle_bytes += _kept_bytes(bucket)
        while self._idle_bytes > _IDLE_BYTES and self._idle_bytes > _kept_bytes(bucket):
            oldest = next(iter(self._idle))
            self._idle_bytes -= _kept_bytes(self._idle[oldest].pop(0))
            if not self._idle[oldest]:
                del self._idle[oldest]


def _kept_bytes(bucket: FusedBucket) -> int:
    return _LAYOUT_BYTES + sum(buffer.nbytes for buffer in bucket.buffers.values())


def _values(name: str, buffer: Array, *, written: bool) -> tuple[np.ndarray, str]:
    """A buffer as the codec reads and writes it, and its dtype.

    Raises:
        TypeError, ValueError: it is not as `QuantizedComm.Allreduce` says.
    """
    tensor = is_tensor(buffer)
    if not tensor and (not isinstance(buffer, np.ndarray) or isinstance(buffer, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, not {type(buffer).__name__}")
    if not tensor:
        buffer = np.asarray(buffer)  # subclasses may copy where arrays do not
    if tensor and (buffer.device.type != "cpu" or str(buffer.layout) != "torch.strided"):
        raise TypeError(f"{name} must be a dense tensor on the CPU, not {buffer.layout} on {buffer.device}")
    dtype = str(buffer.dtype).removeprefix("torch.")
    if dtype not in native.DTYPES:
        raise TypeError(
            f"{name} must be of dtype {', '.join(native.DTYPES)}, in this machine's byte order, not {dtype}"
        )
    if tensor:
        plain = buffer.is_contiguous() and not buffer.is_neg()
        plain &= buffer.data_ptr() % buffer.element_size() == 0
    else:
        plain = buffer.flags.c_contiguous and buffer.flags.aligned
    if not plain:
        raise ValueError(f"{name} must be contiguous in C order, and aligned; pass a contiguous copy")
    if tensor and buffer.grad_fn is not None:
        raise ValueError(f"{name} is part of an autograd graph, through which nothing flows: detach() it")
    if written and not tensor and not buffer.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return flat_array(buffer), dtype

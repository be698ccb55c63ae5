"""An MPI communicator whose ``Allreduce`` sends a few bits per value."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_quant.codec import native
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.algorithms.uncompressed import CODEC, UNCOMPRESSED
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.exchange.topology import Topology
from hvd_quant.mpi.buckets import IdleBuckets
from hvd_quant.mpi.explain import explain
from hvd_quant.mpi.norms import Norms
from hvd_quant.mpi.request import Request, barrier, check_mpi, check_not_within, lock, progress, underway
from hvd_quant.mpi.transport import MpiTransport
from hvd_quant.mpi.values import Array, values_of
from hvd_quant.reducer.errors import Description, RankMismatchError, differences
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.state import Residuals, TrainingState, without_own
from hvd_quant.schemes import DQSGD, QSGD, Scheme

AVERAGE = "average"  # MPI has no such op
_LATENCY = 3e-4  # seconds per collective: nothing is negotiated first, unlike in Horovod


def _host_of(comm: MPI.Intracomm) -> tuple[int, bool]:
    """Return the first of the ranks on this rank's host, and whether all ranks are on it."""
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host, one_host = neighbours.bcast(comm.rank), neighbours.size == comm.size
    neighbours.Free()
    return host, one_host


class QuantizedComm:
    """Allreduce with quantized values over the ranks of an MPI communicator.

    Making one is collective, like every call here but `stats` and `state_dict`: all ranks do it, in the same
    order. It works on a duplicate of the communicator: other traffic on ``comm`` does not matter. Threads may
    use several of them at once, if MPI was initialised with ``MPI.THREAD_MULTIPLE``, as mpi4py does.

    Args:
        comm: an intracommunicator. With one rank, values are copied unchanged.
        scheme: how values are quantized, e.g. ``hvd_quant.QSGD(bits=4)``, or ``hvd_quant.DQSGD(...)``, of
            which a step ends when a call's name comes again. Calls without a name share one, so that each of
            them is a step.
        exchange: ``"allgather"``, every rank receives all payloads; ``"scatter_allgather"``, every rank
            averages one chunk and sends the mean to all: fewer bytes to receive with three or more ranks, but
            a second rounding; ``"hierarchical"``, the ranks of a host average their values uncompressed, and
            the hosts exchange the quantized means; ``"auto"``, the quickest by the cost model in
            `hvd_quant.exchange.cost`.
        seed: seed of the rounding noise, 0 to 2^64 - 1. Each rank and each call draws its own noise from it.
            Use another one for a communicator that reduces the results of this one.
        min_numel: calls of fewer values are not quantized, but reduced in float32.
        error_feedback: whether each rank keeps, for every name, the quantization error of its values, and
            adds it to the next ones of that name (Karimireddy et al., ICML 2019). It takes a float32 buffer
            of each name's size, and every call needs a name.
        overrides: which names are quantized otherwise, or not at all: a mapping of shell patterns to schemes
            or None, or the path of a YAML or TOML file with one; see `hvd_quant.reducer.overrides.Overrides`.
            The first pattern that matches holds. Every call needs a name.

    Raises:
        RankMismatchError: the ranks have given different arguments, or some rank's ``HVD_QUANT_...``
            variables are invalid; on every rank.
        TypeError, ValueError: an argument is not of its type, or not in its range.

    Example:
        >>> comm = hvd_quant.mpi.QuantizedComm(MPI.COMM_WORLD, hvd_quant.QSGD(bits=4))
        >>> comm.Allreduce(gradient, mean, op=hvd_quant.mpi.AVERAGE)
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        scheme: Scheme | DQSGD,
        *,
        exchange: str = "auto",
        seed: int = 0,
        min_numel: int = 0,
        error_feedback: bool = False,
        overrides: Mapping[str, Scheme | None] | str | os.PathLike | None = None,
    ) -> None:
        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"comm must be a communicator of mpi4py, not {comm!r}")
        check_mpi()
        if comm == MPI.COMM_NULL:
            raise ValueError("comm is MPI.COMM_NULL: this rank is in no communicator, or it has been freed")
        if comm.Is_inter():
            raise ValueError("comm is an intercommunicator; merge its groups first, by comm.Merge()")
        if not isinstance(scheme, (Scheme, DQSGD)):
            raise TypeError(f"scheme must be a scheme such as hvd_quant.QSGD(bits=4), not {scheme!r}")
        check_not_within()
        self.rank, self.size = comm.rank, comm.size
        fault = None
        try:
            self.options = Options(scheme, overrides, min_numel, exchange, error_feedback, 0, seed)
        except ValueError as error:
            if "HVD_QUANT_" not in str(error):
                raise
            fault = error  # invalid environment, perhaps on this rank only
        barrier(comm)
        host, one_host = _host_of(comm)
        if fault is None:
            self._choice = ExchangeChoice(exchange, self.size, cost.link_from_environment(one_host, _LATENCY))
        self._comm: MPI.Intracomm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._agree(fault, host)
        self._state = TrainingState(
            scheme, self.options.seed, Residuals() if self.options.error_feedback else None
        )
        self._state.place = self._comm.rank, self._comm.size
        self._norms = Norms(self._comm, self._state) if isinstance(scheme, DQSGD) else None
        self._idle = IdleBuckets()
        self._requests: list[Request] = []  # not complete when last checked

    def _agree(self, fault: ValueError | None, host: int) -> None:
        """Compare the ranks' arguments and whether their environments are valid, and exchange the hosts."""
        own: Description = {"environment": str(fault)}
        if fault is None:
            own = {
                "environment": "in order",
                **self.options.describe(self._choice.link),
                "seed": self.options.seed,
            }
        described, hosts = zip(*self._comm.allgather((own, host)), strict=True)
        if not (found := differences(described)) and fault is None:
            try:
                self._choice.locate(Topology(hosts))
            except ValueError as error:
                fault = error
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

    # --- public -----------------------------------------------------------------------------------------

    def Allreduce(  # noqa: N802  as in mpi4py
        self,
        sendbuf: Array | MPI.InPlace,
        recvbuf: Array,
        op: MPI.Op | str = MPI.SUM,
        name: str | None = None,
    ) -> None:
        """Sum or average the ranks' values; afterwards all ranks hold the same bits.

        Args:
            sendbuf: a NumPy array or a torch tensor on the CPU, of float32, float64, float16 or (tensors)
                bfloat16, of any shape, contiguous in C order; or ``MPI.IN_PLACE``, to take the values from
                ``recvbuf``. Shape and dtype are the same on all ranks.
            recvbuf: output, of the same dtype and number of values.
            op: ``MPI.SUM`` or ``hvd_quant.mpi.AVERAGE``.
            name: name of the values, the same on all ranks; key of ``overrides``, ``error_feedback`` and
                DQ-SGD's steps.

        Sums are computed in float32. What that cannot hold makes its bucket non-finite, as NaN and Inf do.
        After an interrupt (Ctrl-C) within a call, do not use the communicator any more.

        Raises:
            RankMismatchError: the ranks have called with different arguments; on every rank, and later
                calls are not affected.
            TypeError, ValueError: an argument is refused; nothing has been sent.
        """
        check_not_within()
        self.Iallreduce(sendbuf, recvbuf, op, name).Wait()

    def Iallreduce(  # noqa: N802
        self,
        sendbuf: Array | MPI.InPlace,
        recvbuf: Array,
        op: MPI.Op | str = MPI.SUM,
        name: str | None = None,
    ) -> Request:
        """Start an `Allreduce`, to be completed by the request's ``Wait`` or ``Test``.

        Several may be in flight at once, and be completed in any order, which may differ between
        ranks. As in MPI, leave both buffers alone until the request is complete. With DQ-SGD, the first call
        of a step waits until all ranks have started the calls of the step before.

        Raises:
            TypeError, ValueError: an argument is refused; nothing has been sent.
        """
        check_mpi()
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this QuantizedComm has been freed; make another one")
        if not isinstance(op, (MPI.Op, str)) or op not in (MPI.SUM, AVERAGE):
            raise ValueError(
                "op must be MPI.SUM or hvd_quant.mpi.AVERAGE: there is no other of values quantized apart"
            )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        if name is None and self.options.needs_names:
            raise ValueError("error_feedback and overrides go by names: give every call a name=")
        out, dtype = values_of("recvbuf", recvbuf, written=True)
        values, shape = out, list(recvbuf.shape)
        if sendbuf is not MPI.IN_PLACE:
            values, send_dtype = values_of("sendbuf", sendbuf, written=False)
            shape = list(sendbuf.shape)
            if send_dtype != dtype:
                raise TypeError(f"sendbuf is of {send_dtype} and recvbuf of {dtype}; make them the same")
            if values.size != out.size:
                raise ValueError(f"sendbuf has {values.size} values, and recvbuf has room for {out.size}")
        op_name = AVERAGE if op == AVERAGE else "MPI.SUM"
        call = {"op": op_name, "shape": shape, "dtype": dtype, **({} if name is None else {"name": name})}
        if self._norms is not None:
            check_not_within()
            self._norms.begin_call(name or "")
        request = Request(self._exchange(values, out, 1 if op_name == AVERAGE else self.size, call))
        with lock:
            self._requests = [*(one for one in self._requests if not one.over), request]
            if not request.advance():
                underway.append(request)
        return request

    def stats(self) -> dict[str, Any]:
        """Return statistics of this rank.

        Returns:
            ``steps``, the number of calls with the most frequent name, including those before a loaded state;
            ``messages``, calls; ``raw_bytes``, the uncompressed values; ``wire_bytes``, the encoded values;
            ``received_bytes``, bytes from other ranks in calls that are complete; ``compression_ratio``, raw
            over wire bytes. With DQ-SGD also ``bits``, a list with the bits of each step since the
            communicator was made.
        """
        return self._state.stats(in_step=self._norms is not None and self._norms.in_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same noise, schedule of bits, and residuals.

        With ``error_feedback`` the state differs between ranks. Call it between steps.

        Raises:
            RuntimeError: calls are in flight.
        """
        if any(request.in_flight for request in self._requests):
            raise RuntimeError("take a communicator's state between steps: calls are in flight")
        if self._norms is not None:
            self._norms.end_step()
        return self._state.state_dict()

    def gather_state_dict(self) -> dict[str, Any] | None:
        """Return one state for a checkpoint, from which every rank can resume, and other numbers of ranks.

        Collective. With error feedback, a rank takes its own residuals from it, or the mean of all residuals
        if there are more ranks then, or fewer.

        Returns:
            The state on the first rank; None on the others.

        Raises:
            RuntimeError: calls are in flight.
        """
        state = self.state_dict()
        own = state.pop("residuals", None)
        if own is not None:
            everyones = self._comm.gather(own)
            state = without_own(state)
            if everyones is not None:
                counts = {key: len(one) for of_rank in everyones for key, one in of_rank.items()}
                state["residuals_of_ranks"] = {
                    key: [of_rank.get(key, np.zeros(count, np.float32)) for of_rank in everyones]
                    for key, count in sorted(counts.items())
                }
        return state if self._comm.rank == 0 else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Collective.

        Raises:
            ValueError: some rank's state is invalid; on every rank, and nothing is loaded.
            RankMismatchError: the ranks' states are of different steps; on every rank.
            RuntimeError: calls are in flight.
        """
        if any(request.in_flight for request in self._requests):
            raise RuntimeError("load a communicator's state between steps: calls are in flight")
        check_not_within()
        before, fault = self._state.state_dict(), None
        try:
            self._state.load_state_dict(state)
        except ValueError as error:
            fault = error
        barrier(self._comm)
        described = self._comm.allgather({"state": str(fault or "in order"), "far": self._state.position()})
        found = differences(described)
        if fault is not None or found:
            self._state.load_state_dict(before)
        if fault is not None:
            raise fault
        if "state" in found:
            raise ValueError(f"some rank's state cannot be loaded: {found['state']}")
        if found:
            raise RankMismatchError(
                "the ranks have loaded states that have not come equally far. Load those of the same step."
            )
        self.options.seed = self._state.seed
        self._idle.clear()  # fused buckets depend on the seed
        if self._norms is not None:
            self._norms.forget()

    def Free(self) -> None:  # noqa: N802
        """Wait for what is in flight, and free the communicator (not the one that was passed in). Collective.

        Raises:
            RankMismatchError: raised by a call that nobody has waited for.
        """
        if self._comm == MPI.COMM_NULL or MPI.Is_finalized():
            return
        check_not_within()
        requests = [request for request in self._requests if not request.over]
        while any(request.in_flight for request in requests):
            progress()
        self._idle.clear()
        barrier(self._comm)
        if self._norms is not None:
            self._norms.drain()
        self._comm.Free()
        for request in requests:
            request.Wait()  # raises its error, if any

    def __enter__(self) -> QuantizedComm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # else the error may be this rank's only, and waiting for the others would hide it
            self.Free()

    # --- one call ---------------------------------------------------------------------------------------

    def _exchange(
        self, values: np.ndarray, out: np.ndarray, factor: int, call: Description
    ) -> Generator[None, None, None]:
        """Exchange the values of a call and write ``factor`` times their mean; yields while it must wait."""
        state, statistics = self._state, self._state.statistics
        number, name = statistics.messages, call.get("name")  # every rank numbers its calls
        use = sum(state.uses.values())  # part of the noise key
        state.use(name or "")
        statistics.messages += 1
        statistics.raw_bytes += values.nbytes
        scheme = self.options.scheme_of(name, values.size, state.present_scheme)
        if self._norms is not None:
            self._norms.send(None if scheme is None else values, call["dtype"])
        if self.size == 1:
            out[:] = values
            return
        entry = Entry(json.dumps(call), values.size, call["dtype"], scheme or QSGD())
        bucket = self._idle.take(entry) or GroupLayout(
            [entry], self.size, self.rank, state.seed, self._choice.topology
        )
        transport = MpiTransport(self._comm, number, bucket.buffers)
        data = BucketData(bucket, [values], np.array([use], np.uint64), native, buffers=bucket.buffers)
        if scheme is None:
            algorithm, data.codec = UNCOMPRESSED, CODEC
        else:
            whole = bucket.whole
            algorithm = ALGORITHMS[self._choice.algorithm(whole.size, whole.count)]
            if state.residuals is not None:
                data.residuals = [state.residuals.of(name, values.size, values)]
        exchange = Exchange(data, algorithm, transport, f"call {number}")
        while not exchange.ready():
            yield
        try:
            exchange.finish([out], factor)
        except ValueError as error:
            explanation = yield from explain(transport, call, error)
            raise RankMismatchError(f"in call {number}, {explanation}") from error
        finally:
            statistics.received_bytes += exchange.received_bytes
            statistics.wire_bytes += data.encoded_bytes
        self._idle.put_back(bucket)

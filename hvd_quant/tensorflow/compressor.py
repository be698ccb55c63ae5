"""Compressors for Horovod's functions on TensorFlow tensors, eager and in graphs.

Horovod calls ``compress``, allreduces its result, and calls ``decompress`` on the reduced one; in a
``tf.function`` it does so once, when the function is traced. So these two lay out operations: ``compress`` a
control tensor for Horovod to reduce (see `hvd_quant.reducer.control_tensor`), ``decompress`` the exchange of
the quantized gradient, which runs in every step (`hvd_quant.tensorflow.group_steps`). Gradients that were
compressed when the first result is requested, for example by ``hvd.grouped_allreduce``, travel together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow.compression import Compressor

from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.horovod import HorovodCompressor
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.errors import Description
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.state import Residuals, TrainingState
from hvd_quant.schemes import DQSGD, NUQSGD, QSGD, Scheme
from hvd_quant.tensorflow import device, refusals
from hvd_quant.tensorflow.graph_exchange import GraphExchange
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.group_steps import DTYPES, call
from hvd_quant.tensorflow.membership import Membership
from hvd_quant.tensorflow.names import GradientNames
from hvd_quant.tensorflow.stall import check
from hvd_quant.tensorflow.traces import Member, Trace, Traces

_MANY = 10  # compressors alive: more than a process trains models


class QuantizedCompressor(HorovodCompressor, Compressor):
    """Exchange of quantized gradients; use a subclass that names a scheme, such as `QSGDCompressor`.

    Make it once, outside of traced functions, the same on all ranks. It serves one model: gradients are
    identified by their places in the traced function.

    Args:
        scheme: how gradients are quantized.
        process_set: the ranks that take part; give Horovod's function the same.
        **options: ``overrides``, ``min_numel``, ``exchange``, ``error_feedback``, ``fusion_bytes`` and
            ``seed``, see `hvd_quant.reducer.options.Options`. ``overrides`` need the variables' names, which
            `hvd_quant.tensorflow.DistributedGradientTape` and
            `hvd_quant.tensorflow.keras.DistributedOptimizer` pass by themselves. Gradients whose number of
            values is unknown when the function is traced count as large. ``fusion_bytes`` is for that
            optimizer; Horovod's own functions have ``groups=``.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    def __init__(
        self,
        scheme: Scheme | DQSGD,
        *,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        **options: Any,
    ) -> None:
        super().__init__(Options(scheme, **options), process_set)
        self._state = TrainingState(scheme, self.seed, Residuals() if self.error_feedback else None)
        self._graph_state = GraphState(self._state)
        check.watch(self._graph_state)
        self._membership = Membership(
            self.options,
            process_set,
            self._graph_state,
            self._describe,
            lambda: self._exchange_choice(hvd),
            lambda: self._host(hvd, hvd.is_homogeneous()),
        )
        self._traces = Traces(self._graph_state, self._number)
        self._exchange = GraphExchange(process_set, self._membership, self._graph_state, self._number)
        self._names = GradientNames(self.options)
        _warn_of_many()

    def number_as(self, number: int) -> None:
        """See `HorovodCompressor.number_as`. Graphs keep the one that they were traced with."""
        if "_traces" not in vars(self):
            super().number_as(number)

    @property
    def is_used(self) -> bool:
        """See `HorovodCompressor.is_used`."""
        return self.in_use or self._membership.has_met or self._state.was_loaded

    # --- called by Horovod ------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert  # which would take seconds, for nothing
    def compress(self, tensor: Any) -> tuple[tf.Tensor, Any]:
        """See `HorovodCompressor.compress`. In a graph it lays out what every step does.

        Raises:
            RuntimeError: also, TensorFlow is in graph mode as in TensorFlow 1, or compiles this function by
                XLA; or error feedback or DQ-SGD is used outside of a function.
            ValueError: there are ``overrides``, and the gradient's name is unknown.
        """
        given = self._names.of(tensor)  # before the conversion, which makes another tensor
        tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype in DTYPES:
            self._check_place()
        self._begin()  # whatever the dtype, which may differ between ranks: all submit equally many
        trace, graph = self._traces.at_hand()
        if tensor.dtype not in DTYPES:
            return self._traces.named(trace, tensor), None
        count = tensor.shape.num_elements()
        scheme = self._names.scheme(given, count)
        if scheme is None:
            alone = given is not None and not given.grouped and not self._names.is_small(count)
            return self._traces.passed(trace, tensor, alone)
        group = trace.open_group(graph)
        index = len(group.tensors)
        description = {
            **self._description(),
            "name": f"{group.name}.{index}",
            "shape": str(tensor.shape),
            "dtype": DTYPES[tensor.dtype],
        }
        if scheme != self.options.scheme:
            description["override"] = str(scheme)
        fingerprint = control_tensor.fingerprint(description)
        group.add(tensor, scheme, fingerprint)
        own = self._control(tensor, fingerprint, self._renewed(trace, graph))
        return self._traces.named(trace, own), Member(group, index, tensor.dtype, tensor.shape)

    @tf.autograph.experimental.do_not_convert
    def decompress(self, tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """See `HorovodCompressor.decompress`. The first call lays out all that was compressed before it.

        Raises:
            RankMismatchError, UnsupportedReductionError: in a graph as one of ``tf.errors``, with the same
                text.
        """
        if ctx is None:
            return tensor
        group = ctx.group
        if group is None:
            restored = tf.cast(tensor, ctx.dtype)
            return tf.reshape(restored, ctx.shape) if ctx.shape.is_fully_defined() else restored
        if group.first is None:
            trace, graph = self._traces.at_hand()
            trace.close_group(group, graph)
            self._exchange.lay_out(group, trace, tensor, self._renewed(trace, graph))
            group.first = tensor
            return group.results[ctx.index]
        steps, fingerprint = group.steps, group.fingerprints[ctx.index]

        def checked(reduced: np.ndarray) -> np.ndarray:
            steps.check(reduced, fingerprint)
            return np.array(reduced[0])

        (factor,) = call(checked, [tensor], [tf.float64])
        # Assert what the call returns: TensorFlow drops calls that only control dependencies use.
        same = tf.debugging.assert_equal(
            factor, group.first[0], "gradients that travel together must be reduced by the same operation"
        )
        with tf.control_dependencies([same] if same is not None else []):
            return tf.identity(group.results[ctx.index])

    # --- public -----------------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def name_gradients(self, gradients: Iterable[tuple[str, Any]], *, grouped: bool = False) -> None:
        """Give the variables' names of the gradients that Horovod will be called with, for ``overrides``.

        Call it once for all gradients of a step, with the same tensors that Horovod's function gets, in
        the same traced function. The first call warns of patterns that hold for none of its names.

        Args:
            gradients: names, each with a tensor of any shape and dtype. Anything else (None, or a sparse
                gradient, which travels uncompressed) counts as a name only.
            grouped: whether ``hvd.grouped_allreduce`` reduces them. Horovod's groups are of one dtype, and
                a gradient with None for an override travels as float64 there; alone, in its own dtype.

        Raises:
            TypeError: a name is not a string.
            ValueError: a tensor has two names.
        """
        self._names.register(gradients, grouped)

    def is_left_out(self, name: str, count: int | None) -> bool:
        """Return whether a gradient travels uncompressed because of an override, and not because it is small.

        Args:
            name: name of its variable.
            count: number of its values; None if it is unknown.
        """
        return self._names.is_left_out(name, count)

    def stats(self) -> dict[str, Any]:
        """See `HorovodCompressor.stats`. Gradients that travel together count as one."""
        with self._graph_state.lock:
            self._graph_state.note_uses()
            return self._state.stats(in_step=self._graph_state.in_step)

    def reset(self) -> None:
        """Drop the gradients of a step that has failed, but keep the noise and the statistics.

        Call it on every rank, before training continues after an exception.
        """
        self._graph_state.forget_step()
        self._traces.forget_eager()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same noise, schedule of bits, and residuals.

        With ``error_feedback`` the state differs between ranks: save every rank's, or `gather_state_dict`.
        Call it between steps, and not in a traced function.
        """
        graph_state = self._graph_state
        with graph_state.lock:
            if graph_state.in_flight:
                raise RuntimeError("take a compressor's state between steps: gradients are in flight")
            graph_state.end_step()
            graph_state.note_uses()
            return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Call it on every rank, before the first step.

        Raises:
            ValueError: the state is invalid.
            RuntimeError: this compressor has been used already.
        """
        if self._membership.has_met:
            raise RuntimeError("load a compressor's state before its first step")
        if hvd.is_initialized():
            self._state.place = self._place_of_rank()
        self._state.load_state_dict(state)
        self.options.seed = self._state.seed

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where this compressor's `state_dict` was taken, or another rank's, on every rank.

        For elastic training, see `hvd_quant.tensorflow.elastic`.

        Raises:
            ValueError: the state is invalid, or that of another run, with another seed.
        """
        if self._membership.has_met and state.get("seed") != self.seed:
            raise ValueError("a compressor in use cannot take over the state of one with another seed")
        with self._graph_state.lock:
            self.reset()
            self._state.place = None  # it may have changed since
            self._state.load_state_dict(state)
            self.options.seed = self._state.seed
            self._graph_state.set_uses()

    def _gather_object(self, own: Any) -> list[Any]:
        name = f"hvd_quant.{self._number}.state"
        return hvd.allgather_object(own, name=name, process_set=self.process_set)

    def _gather_rows(self, key: str, own: np.ndarray | None, count: int) -> np.ndarray:
        own = np.zeros(count, np.float32) if own is None else own
        name = f"hvd_quant.{self._number}.state.{key}"
        return hvd.allgather(own[np.newaxis], name=name, process_set=self.process_set).numpy()

    def __hash__(self) -> int:
        refusals.refuse_horovods_optimizer_of_keras_3()
        return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    # --- layout -----------------------------------------------------------------------------------------

    def _check_place(self) -> None:
        if not tf.executing_eagerly():
            refusals.refuse_xla()
        elif self.options.error_feedback or self._state.schedule is not None:
            raise RuntimeError(
                "error_feedback and DQ-SGD identify gradients by their places in a traced function: reduce "
                "them within a tf.function"
            )

    def _renewed(self, trace: Trace, graph: int) -> list[tf.Tensor]:
        """Return what must run in each step before anything that depends on the ranks, in an elastic job."""
        if trace.is_eager or not self._membership.is_elastic:
            return []
        if graph not in trace.renewed:
            # Stateful, or TensorFlow would drop what only control dependencies use.
            trace.renewed[graph] = [tf.numpy_function(self._membership.renew, [], tf.int64)]
        return trace.renewed[graph]

    def _control(self, tensor: tf.Tensor, fingerprint: int, renewed: list[tf.Tensor]) -> tf.Tensor:
        """Return the control tensor of a gradient."""
        values = control_tensor.part_of_gradient(fingerprint)
        # A constant would be reduced once, when TensorFlow folds the graph's constants, and not in every
        # step. And it must wait for the gradient, as Horovod's allreduce of that would.
        with tf.control_dependencies([tensor, *renewed]):
            own = tf.constant(values, tf.float64) + self._membership.own
        if self._state.schedule is not None:
            wide = tf.cast(tensor, tf.float32) if tensor.dtype.size < 4 else tensor
            square = 2.0 * tf.cast(tf.nn.l2_loss(wide), tf.float64)
            own = tf.concat([own[: control_tensor.SQUARE], [square]], 0)
        return own

    # --- agreement between ranks ------------------------------------------------------------------------

    def _begin(self) -> None:
        """Compare configurations with the other ranks, if that has not been done."""
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialised: call hvd.init() before training")
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise RuntimeError(
                "hvd_quant.tensorflow needs TensorFlow 2's eager execution and tf.function; graphs of "
                "TensorFlow 1 (tf.compat.v1.disable_eager_execution) are not supported"
            )
        self._membership.meet()

    def _describe(self, choice: ExchangeChoice) -> Description:
        """Describe what must be the same on all ranks."""
        return {
            **self.options.describe(choice.link),
            "compressor": self._number,
            "computes on": "GPU" if device.has_gpu() else "CPU",
        }

    def _description(self) -> Description:
        """Describe what must be the same of a gradient, too, as long as its graph is in use."""
        description = self._describe(self._membership.choice)
        if self._membership.is_elastic:
            del description["link"]
        return description


def _warn_of_many() -> None:
    """Warn, once per process, if a compressor seems to be made in every step."""
    # Only those that Horovod's caches or graphs hold count: the stall check keeps none alive.
    if len(check.watched) >= _MANY and not _warned:
        _warned.append(True)
        warnings.warn(
            f"{len(check.watched)} compressors are in memory by now: make a compressor once, outside of the "
            "step. One in every step is traced and kept by Horovod and TensorFlow, and memory piles up",
            stacklevel=4,
        )


_warned: list[bool] = []


class QSGDCompressor(QuantizedCompressor, scheme=QSGD):
    """Gradients quantized by QSGD: ``hvd.DistributedGradientTape(tape, compression=QSGDCompressor(bits=4))``.

    Its arguments are those of `hvd_quant.QSGD` (``rounding`` is ``"nearest"`` by default with
    ``error_feedback``), and options of the exchange, see `QuantizedCompressor`.

    Warning:
        Horovod passes sparse gradients (``tf.IndexedSlices``, of embeddings) to no compressor: they travel
        uncompressed, unless its function is called with ``sparse_as_dense=True``.
    """


class NUQSGDCompressor(QuantizedCompressor, scheme=NUQSGD):
    """Gradients quantized by NUQSGD: `hvd_quant.NUQSGD`'s arguments, otherwise as `QSGDCompressor`."""


class DQSGDCompressor(QuantizedCompressor, scheme=DQSGD):
    """Gradients quantized by DQ-SGD, with bits that follow the training; see `QSGDCompressor`.

    A step ends when a gradient comes again. The next step's bits depend on the norm of the quantized
    gradients: the root of the sum over them of the ranks' mean squared norm.

    Its arguments are those of `hvd_quant.DQSGD`, and options of the exchange, see `QuantizedCompressor`.

    Example:
        >>> hq.DQSGDCompressor(mean_bits=4, total_steps=epochs * steps_per_epoch)
    """

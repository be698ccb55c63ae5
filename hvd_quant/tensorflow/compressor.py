"""Compressors for Horovod's functions on TensorFlow tensors, eager and in graphs.

Horovod calls ``compress``, allreduces what that returns, and calls ``decompress`` on the result; in a
``tf.function`` it does so once, when the function is traced. So these two lay out operations: ``compress`` a
control tensor for Horovod to reduce (see `hvd_quant.reducer.control`), ``decompress`` the exchange of the
quantized gradient, which runs in every step (`hvd_quant.tensorflow.steps`). Gradients that have been
compressed when a first result is asked for, as by ``hvd.grouped_allreduce``, travel together.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow.compression import Compressor
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvd_quant import wire
from hvd_quant.horovod import CompressorMethod, HorovodCompressor
from hvd_quant.reducer import control
from hvd_quant.reducer.agreement import agree
from hvd_quant.reducer.mismatch import Description
from hvd_quant.reducer.options import FUSION_BYTES, Options
from hvd_quant.reducer.routing import Routing
from hvd_quant.reducer.state import Residuals, TrainingState
from hvd_quant.schemes import DQSGD, NUQSGD, QSGD, Scheme
from hvd_quant.tensorflow import device, refusals
from hvd_quant.tensorflow.progress import Progress
from hvd_quant.tensorflow.stall import check
from hvd_quant.tensorflow.steps import Steps, call, once_reduced, sizes_type

DTYPES = {
    tf.float32: "float32",
    tf.float64: "float64",
    tf.float16: "float16",
    tf.bfloat16: "bfloat16",
}
_SMALL = tf.float64  # what small gradients travel as: Horovod's groups are of one type, the control tensors'


@dataclass(eq=False)
class Group:
    """Gradients that travel together.

    Args:
        name: its first gradient's place in the function that is traced.
    """

    name: str
    tensors: list[tf.Tensor] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    steps: Steps | None = None  # once the exchange is laid out
    results: list[tf.Tensor] = field(default_factory=list)
    first: tf.Tensor | None = None  # the first control tensor to come back


@dataclass(eq=False)
class Trace:
    """A function that is traced; or what is called eagerly."""

    places: int = 0  # of gradients, taken so far
    named: int = 0  # tensors that Horovod has been given to reduce, whatever they are
    groups: dict[int, Group] = field(default_factory=dict)  # open ones, by the identity of their graph
    # Of small gradients, as they are and as they are sent. Counted whenever the last group is sent.
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])
    last: Steps | None = None


@dataclass(eq=False)
class Member:
    """What ``compress`` hands to ``decompress``: a place in a group, or what a small gradient was."""

    group: Group | None
    index: int
    dtype: tf.DType
    shape: tf.TensorShape


class QuantizedCompressor(HorovodCompressor, Compressor):
    """The exchange of quantized gradients; use a subclass that names a scheme, such as `QSGDCompressor`.

    Make it once, outside of what is traced, the same on all ranks. It serves one model: its parts are told
    apart by their places in the traced function.

    Args:
        scheme: how gradients are quantized.
        min_numel: gradients of fewer values are left to Horovod, uncompressed. Those whose number of values
            is not known when the function is traced are quantized.
        exchange: ``"allgather"``, every rank gets all payloads; ``"scatter_allgather"``, every rank averages
            a part and sends that to all, which is less to receive from three ranks on, for a second
            rounding; ``"hierarchical"``, the ranks of a host average their gradients as they are, and the
            hosts exchange these means; ``"auto"``, the quickest by the model in
            `hvd_quant.exchange.cost`.
        error_feedback: whether each rank keeps what quantization has lost of a gradient, and adds it to the
            next one (Karimireddy et al., ICML 2019). It takes a float32 a value of memory.
        fusion_bytes: how many bytes of gradients `hvd_quant.tensorflow.keras.DistributedOptimizer` has travel
            together. Horovod's own functions have ``groups=`` for that.
        process_set: the ranks that take part; give Horovod's function the same.
        seed: of the rounding noise, 0 to 2^64 - 1. Each rank draws its own noise from it. For
            ``rounding="correlated"`` all ranks need the same one.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    def __init__(
        self,
        scheme: Scheme | DQSGD,
        *,
        min_numel: int = 1024,
        exchange: str = "auto",
        error_feedback: bool = False,
        fusion_bytes: int = FUSION_BYTES,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        seed: int = 0,
    ) -> None:
        options = Options(scheme, None, min_numel, exchange, error_feedback, fusion_bytes, seed)
        super().__init__(options, process_set)
        self._state = TrainingState(scheme, options.seed, Residuals() if error_feedback else None)
        self._progress = Progress(self._state)
        check.watch(self._progress)
        self._router: Routing | None = None  # until all ranks have told where they are
        self._traces: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()
        self._eager = Trace()
        self._zero: tf.Variable | None = None  # until there is a gradient: the user may set up devices
        self._uses: dict[str, tf.Variable] = {}  # how often each group has come; part of the noise's key

    # --- what Horovod calls -----------------------------------------------------------------------------

    @CompressorMethod
    @tf.autograph.experimental.do_not_convert  # which would take seconds, for nothing
    def compress(self, tensor: Any) -> tuple[tf.Tensor, Any]:
        """Lay out what Horovod is to reduce in place of a gradient.

        Args:
            tensor: of any shape. Other dtypes than float32, float64, float16 and bfloat16 pass untouched.

        Returns:
            What Horovod is to reduce, and the context for `decompress`.

        Raises:
            RankMismatchError: the ranks are configured differently.
            RuntimeError: Horovod is not initialised; or TensorFlow is in the manner of TensorFlow 1, or
                compiles this function by XLA; or error feedback or DQ-SGD is used outside of a function.
        """
        tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype in DTYPES:
            self._check_place()
        self._begin()  # whatever the dtype is, which may differ: all ranks submit the same number
        trace, graph = self._trace()
        if tensor.dtype not in DTYPES:
            return self._named(trace, tensor), None
        count = tensor.shape.num_elements()
        if count == 0 or (count is not None and count < self.options.min_numel):
            self._count_small(trace, count * tensor.dtype.size, count * _SMALL.size)
            small = tf.cast(tensor, _SMALL)
            if tensor.shape == (control.SIZE,):
                # Not to be taken for a control tensor, which other ranks may have in its place.
                small = tf.reshape(small, control.OTHER_SHAPE)
            return self._named(trace, small), Member(None, 0, tensor.dtype, tensor.shape)

        group = trace.groups.get(graph)
        if group is None:
            group = trace.groups[graph] = Group(f"{trace.places}")
        if trace is not self._eager:
            trace.places += 1
        index = len(group.tensors)
        fingerprint = control.fingerprint(
            {
                **self._config(self._router),
                "name": f"{group.name}.{index}",
                "shape": str(tensor.shape),
                "dtype": DTYPES[tensor.dtype],
            }
        )
        group.tensors.append(tensor)
        group.fingerprints.append(fingerprint)
        control_tensor = self._control(tensor, fingerprint)
        return self._named(trace, control_tensor), Member(group, index, tensor.dtype, tensor.shape)

    @tf.autograph.experimental.do_not_convert
    def decompress(self, tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """Lay out the exchange of a gradient, and of those that have been compressed since the last one.

        Args:
            tensor: the reduced control tensor.
            ctx: what `compress` returned beside it; None for a tensor that passed untouched.

        Returns:
            The mean over the ranks, or the sum if that was asked for, in the gradient's shape and dtype.

        Raises:
            RankMismatchError: the ranks disagree about what they sent. In a graph it arrives as one of
                ``tf.errors``, with the same text.
            UnsupportedReductionError: Horovod was asked for Adasum, Min, Max or Product. In a graph as above.
        """
        if ctx is None:
            return tensor
        group = ctx.group
        if group is None:
            return tf.reshape(tf.cast(tensor, ctx.dtype), ctx.shape)
        if group.first is None:
            trace, graph = self._trace()
            if trace.groups.get(graph) is group:
                del trace.groups[graph]
            self._exchange(group, trace, tensor)
            group.first = tensor
            return group.results[ctx.index]
        steps, fingerprint = group.steps, group.fingerprints[ctx.index]

        def checked(reduced: np.ndarray) -> np.ndarray:
            steps.check(reduced, fingerprint)
            return np.array(reduced[0])

        (factor,) = call(checked, [tensor], [tf.float64])
        # An assertion of what the call returns: TensorFlow drops calls that nothing but control depends on.
        same = tf.debugging.assert_equal(
            factor, group.first[0], "gradients that travel together must be reduced by the same operation"
        )
        with tf.control_dependencies([same] if same is not None else []):
            return tf.identity(group.results[ctx.index])

    # --- what users call --------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What this rank has contributed so far.

        Returns:
            ``steps``, how often the group of gradients that came most often has come, those before a loaded
            state included; ``messages``, how many groups were sent; ``raw_bytes``, the gradients as they
            were; ``wire_bytes``, what they were encoded into (messages, control tensors, small gradients);
            ``received_bytes``, what came from other ranks by our own exchanges; ``compression_ratio``, raw
            over wire bytes. With a schedule of bits also ``bits``, a list of those of each step since the
            compressor was made.
        """
        with self._progress.lock:
            self._note_uses()
            return self._state.stats(in_step=self._progress.in_step)

    def reset(self) -> None:
        """Forget the gradients of a step that has failed, but not the noise and the statistics.

        To be called on every rank, before training goes on after an exception.
        """
        self._progress.forget_step()
        self._eager = Trace()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same noise, schedule of bits, and residuals.

        With ``error_feedback`` every rank has a state of its own. To be taken between steps, and not in a
        traced function.
        """
        progress = self._progress
        with progress.lock:
            if progress.in_flight:
                raise RuntimeError("take a compressor's state between steps: gradients are on their way")
            progress.end_step()
            self._note_uses()
            return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. To be called on every rank, before the first step.

        Raises:
            ValueError: this is no such state.
            RuntimeError: this compressor has been used already.
        """
        if self._router is not None:
            raise RuntimeError("load a compressor's state before its first step")
        self._state.load_state_dict(state)
        self.options.seed = self._state.seed

    def __hash__(self) -> int:
        refusals.refuse_horovods_optimizer_of_keras_3()
        return object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    # --- layout -----------------------------------------------------------------------------------------

    def _trace(self) -> tuple[Trace, int]:
        """What is traced, and the identity of the graph at hand, which may be a branch in that."""
        if tf.executing_eagerly():
            return self._eager, 0
        graph = root = tf.compat.v1.get_default_graph()
        while isinstance(root.outer_graph, FuncGraph):
            root = root.outer_graph
        if root not in self._traces:
            self._traces[root] = Trace()
        return self._traces[root], id(graph)

    def _count_small(self, trace: Trace, raw_bytes: int, sent_bytes: int) -> None:
        """Note a gradient that is left to Horovod: now, or in every step of what is traced."""
        if trace is self._eager:
            self._progress.count(raw_bytes, sent_bytes)
        else:
            trace.passed_bytes[0] += raw_bytes
            trace.passed_bytes[1] += sent_bytes

    def _check_place(self) -> None:
        if not tf.executing_eagerly():
            refusals.refuse_xla()
        elif self.options.error_feedback or self._state.schedule is not None:
            raise RuntimeError(
                "error_feedback and DQ-SGD tell gradients apart by their places in a traced function: reduce "
                "them within a tf.function"
            )

    def _named(self, trace: Trace, tensor: tf.Tensor) -> tf.Tensor:
        """What Horovod is to reduce, with a name of our own, by which it finds the other ranks'.

        Those of operations have numbers, and a rank that traces something more than others would have other
        ones. The name does not depend on what the tensor is, so that Horovod finds out if that differs. Of
        what is called eagerly it takes no tensor's name.
        """
        if trace is self._eager:
            return tensor
        trace.named += 1
        return tf.identity(tensor, f"hvd_quant_{self._number}_reduced_{trace.named - 1}")

    def _control(self, tensor: tf.Tensor, fingerprint: int) -> tf.Tensor:
        """The control tensor of a gradient."""
        rank = self.process_set.rank() if self.process_set.included() else 0
        values = control.values(fingerprint, rank)
        # Of a constant, TensorFlow would have the mean once, when it folds the graph's constants, and not in
        # every step. And it is to wait for the gradient, as Horovod's allreduce of that would.
        with tf.control_dependencies([tensor]):
            control_tensor = tf.constant(values, tf.float64) + self._zero
        if self._state.schedule is not None:
            wide = tf.cast(tensor, tf.float32) if tensor.dtype.size < 4 else tensor
            square = 2.0 * tf.cast(tf.nn.l2_loss(wide), tf.float64)
            control_tensor = tf.concat([control_tensor[: control.SQUARE], [square]], 0)
        return control_tensor

    def _exchange(self, group: Group, trace: Trace, reduced: tf.Tensor) -> None:
        """Lay out a group's exchange: Horovod's collectives, and the steps between them."""
        tensors = group.tensors
        group.steps = steps = Steps(
            self._progress,
            group.name,
            f"hvd_quant_{self._number}_{group.name}",
            [DTYPES[tensor.dtype] for tensor in tensors],
            [np.dtype(tensor.dtype.as_numpy_dtype) for tensor in tensors],
            [tuple(tensor.shape) if tensor.shape.is_fully_defined() else None for tensor in tensors],
            self._algorithm(tensors),
            self.process_set.rank() if self.process_set.included() else 0,
            self.process_set.size() if self.process_set.included() else 1,
            (self.seed, self.process_set.ranks),
            group.fingerprints[0],
            self._router.topology,
            trace.passed_bytes,
        )
        if trace.last is not None:
            trace.last.passed_bytes = [0, 0]
        trace.last = steps if trace is not self._eager else None
        with tf.device("/CPU:0"):
            use = tf.identity(self._counter(group.name).assign_add(1)) - 1
        if device.has_gpu() and device.can_exchange(steps):
            results = device.exchange(steps, tensors, use, reduced, self.process_set)
        else:
            results = self._exchange_by_host(steps, tensors, use, reduced)
        group.results = [
            tf.ensure_shape(result, tensor.shape) for result, tensor in zip(results, tensors, strict=True)
        ]
        group.tensors = []  # eager ones need not wait for the garbage collector

    def _exchange_by_host(
        self, steps: Steps, tensors: list[tf.Tensor], use: tf.Tensor, reduced: tf.Tensor
    ) -> list[tf.Tensor]:
        """Lay out a group's exchange, with the native codec between Horovod's collectives."""
        with tf.device("/CPU:0"):
            shapes = [tf.shape(tensor, tf.int64) for tensor in tensors if not tensor.shape.is_fully_defined()]
            first = sizes_type(steps.stages[0])
            message, sizes, bits = call(steps.send, [*tensors, use], [tf.uint8, first, tf.int32])
            received = message = once_reduced(message, reduced)
            for number, stage in enumerate(steps.stages):
                if number > 0:
                    inputs = [received, sizes, use, bits, *shapes]
                    message, sizes = call(partial(steps.relay, number), inputs, [tf.uint8, sizes_type(stage)])
                message = steps.named(tf.ensure_shape(message, [None]), stage.name)
                sizes = tf.ensure_shape(sizes, [steps.size])
                if stage.collective == "alltoall":
                    received, sizes = hvd.alltoall(message, splits=sizes, process_set=self.process_set)
                else:
                    received = hvd.allgather(message, process_set=self.process_set)
            return call(
                steps.receive, [received, sizes, reduced, bits, *shapes], [tensor.dtype for tensor in tensors]
            )

    def _algorithm(self, tensors: list[tf.Tensor]) -> str:
        """The exchange's name: a function of what all ranks know when they trace, whenever they do."""
        counts = [tensor.shape.num_elements() for tensor in tensors]
        if None in counts or self._router.topology is None:
            return self.options.exchange if self.options.exchange != "auto" else "allgather"
        scheme = self.options.scheme
        scheme = scheme.at(scheme.max_bits) if isinstance(scheme, DQSGD) else scheme
        nbytes = sum(wire.max_payload_size(scheme, count) for count in counts)
        # On a GPU the exchange by hosts would take gradients to the host, which the model does not know.
        return self._router.algorithm(nbytes, sum(counts), hierarchical=not device.has_gpu())

    def _counter(self, name: str) -> tf.Variable:
        """How often a group has come. A variable, because a number would be the traced one for ever."""
        if name not in self._uses:
            self._uses[name] = _variable(self._state.uses[name], tf.int64, "hvd_quant_uses")
        return self._uses[name]

    def _note_uses(self) -> None:
        """Have the state know how often each group has come by now."""
        for name, uses in self._uses.items():
            self._state.uses[name] = int(uses.numpy())

    # --- agreement between ranks ------------------------------------------------------------------------

    def _begin(self) -> None:
        """Compare configurations with the other ranks, once."""
        if self._router is not None:
            return
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialised: call hvd.init() before training")
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise RuntimeError(
                "hvd_quant.tensorflow needs TensorFlow 2's eager execution and tf.function; graphs of "
                "TensorFlow 1 (tf.compat.v1.disable_eager_execution) are not supported"
            )
        host = self._host(hvd, hvd.is_homogeneous())
        routing = self._routing(hvd)
        self._zero = _variable(0.0, tf.float64, "hvd_quant_zero")
        if self.process_set.included() and self.process_set.size() > 1:
            with tf.init_scope(), self._progress.waiting("the other ranks' first gradients"):
                told = hvd.allgather_object(
                    (self._config(routing), host),
                    name="hvd_quant.agreement",
                    process_set=self.process_set,
                )
            routing.locate(agree(told))
        self._router = routing

    def _config(self, routing: Routing) -> Description:
        return {
            **self.options.describe(),
            "link": asdict(routing.link),
            "wire version": wire.VERSION,
            "compressor": self._number,
            "computes on": "GPU" if device.has_gpu() else "CPU",
        }


def _variable(value: float, dtype: tf.DType, name: str) -> tf.Variable:
    """A scalar of our own, which may be made while a function is traced."""
    # Of this class itself: of tf.Variable, tf.function allows none after its first call.
    with tf.init_scope(), tf.device("/CPU:0"):
        return ResourceVariable(value, trainable=False, dtype=dtype, name=name)


class QSGDCompressor(QuantizedCompressor, scheme=QSGD):
    """Gradients quantized by QSGD: ``hvd.DistributedGradientTape(tape, compression=QSGDCompressor(bits=4))``.

    Args:
        bits, norm, bucket_size, coding: of the scheme, see `hvd_quant.QSGD`.
        rounding: of the scheme; by default ``"independent"``, or ``"nearest"`` with ``error_feedback``.
        **options: of the exchange, see `QuantizedCompressor`.

    Warning:
        Horovod hands sparse gradients (``tf.IndexedSlices``, of embeddings) to no compressor: they travel
        uncompressed, unless its function is given ``sparse_as_dense=True``.
    """


class NUQSGDCompressor(QuantizedCompressor, scheme=NUQSGD):
    """Gradients quantized by NUQSGD; see `QSGDCompressor`, its warning included.

    Args:
        bits, norm, bucket_size, coding: of the scheme, see `hvd_quant.NUQSGD`.
        rounding: as in `QSGDCompressor`.
        **options: of the exchange, see `QuantizedCompressor`.
    """


class DQSGDCompressor(QuantizedCompressor, scheme=DQSGD):
    """Gradients quantized by DQ-SGD, in which the number of bits follows the training; see `QSGDCompressor`.

    A step ends when a gradient comes again. The norm that the next step's bits follow from is that of the
    quantized gradients: the root of the sum over them of the ranks' mean squared norm.

    Args:
        k, mean_bits, total_steps, alpha, min_bits, max_bits: of the schedule, see `hvd_quant.DQSGD`.
        norm, bucket_size, coding: of the scheme, see `hvd_quant.QSGD`.
        rounding: as in `QSGDCompressor`.
        **options: of the exchange, see `QuantizedCompressor`.

    Example:
        >>> hq.DQSGDCompressor(mean_bits=4, total_steps=epochs * steps_per_epoch)
    """

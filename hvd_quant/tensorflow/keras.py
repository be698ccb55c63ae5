"""Horovod for Keras 3, with or without quantized gradients: what ``model.fit`` needs.

Horovod's own ``DistributedOptimizer`` reduces nothing under Keras 3, and says nothing. This one takes the
same arguments:

    >>> import hvd_quant.tensorflow as hq
    >>> import hvd_quant.tensorflow.keras as hqk
    >>> optimizer = hqk.DistributedOptimizer(keras.optimizers.Adam(), compression=hq.QSGDCompressor(bits=4))
    >>> model.compile(optimizer, loss, jit_compile=False)  # XLA compiles none of Horovod's operations
    >>> model.fit(x, y, callbacks=[hqk.BroadcastGlobalVariablesCallback(0), hqk.MetricAverageCallback()])

Optimizers of legacy Keras (tf_keras) are handed on to Horovod's own.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.tensorflow.compression import Compression

from hvd_quant.tensorflow.compressor import QuantizedCompressor

__all__ = ["BroadcastGlobalVariablesCallback", "DistributedOptimizer", "MetricAverageCallback"]

Gradient = tf.Tensor | tf.IndexedSlices | None


def DistributedOptimizer(  # noqa: N802  Horovod's name
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """A Keras optimizer that reduces gradients over the ranks before it applies them.

    The arguments are those of ``horovod.tensorflow.keras.DistributedOptimizer``. An optimizer of Keras 3 is
    itself made distributed, with the state that it has, and returned. Its class has the same name as before,
    so that a saved model restores the plain optimizer. It reduces the gradients before it clips them, as a
    single process would that had all ranks' data. With one of our compressors, gradients travel in groups of
    its ``fusion_bytes``, last variable first, unless ``groups`` says otherwise.

    Args:
        optimizer: of Keras 3, or of legacy Keras.
        name: for it.
        device_dense: where gradients are reduced; by default where Horovod has it.
        device_sparse: where sparse ones are.
        compression: one of our compressors, or Horovod's ``Compression``.
        sparse_as_dense: make sparse gradients dense, and have them quantized.
        gradient_predivide_factor: divide by it before the sum, and multiply by it after that.
        op: ``hvd.Average`` or ``hvd.Sum``.
        backward_passes_per_step: accumulate so many passes' gradients before they are reduced and applied, by
            Keras's own ``gradient_accumulation_steps``.
        average_aggregated_gradients: apply the mean of these passes, and not the sum.
        num_groups: the former name of ``groups``.
        groups: a number of groups, or lists of variables; as in Horovod.
        process_set: the ranks that take part.
        scale_local_gradients: divide gradients that stay on this rank (``register_local_var``) by the number
            of ranks.

    Raises:
        TypeError: ``optimizer`` is no Keras optimizer.
        ValueError: arguments contradict each other, or are not supported.
        RuntimeError: Keras does not run on TensorFlow.
    """
    arguments = {
        "name": name,
        "device_dense": device_dense,
        "device_sparse": device_sparse,
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "gradient_predivide_factor": gradient_predivide_factor,
        "op": op,
        "backward_passes_per_step": backward_passes_per_step,
        "average_aggregated_gradients": average_aggregated_gradients,
        "num_groups": num_groups,
        "groups": groups,
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        legacy = tf.keras.optimizers
        if legacy.Optimizer is not keras.optimizers.Optimizer and isinstance(  # TF_USE_LEGACY_KERAS=1
            optimizer, (legacy.Optimizer, legacy.legacy.Optimizer)
        ):
            import horovod.tensorflow.keras as hvd_keras

            return hvd_keras.DistributedOptimizer(optimizer, **arguments)
        raise TypeError(
            f"optimizer must be a Keras optimizer, not {optimizer!r}. For one of legacy Keras (tf_keras), "
            "set TF_USE_LEGACY_KERAS=1"
        )
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Keras runs on {keras.backend.backend()}, and Horovod's TensorFlow operations need "
            "KERAS_BACKEND=tensorflow"
        )
    return _distributed(optimizer, **arguments)


def _distributed(
    optimizer: keras.optimizers.Optimizer,
    *,
    name: str | None,
    device_dense: str,
    device_sparse: str,
    compression: Any,
    sparse_as_dense: bool,
    gradient_predivide_factor: float,
    op: Any,
    backward_passes_per_step: int,
    average_aggregated_gradients: bool,
    num_groups: int,
    groups: int | Sequence[Sequence[Any]] | None,
    process_set: hvd.ProcessSet,
    scale_local_gradients: bool,
) -> keras.optimizers.Optimizer:
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op must be hvd.Average or hvd.Sum")
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be positive, not {backward_passes_per_step}")
    if num_groups:
        warnings.warn("num_groups is called groups today", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if groups is not None and not isinstance(groups, (list, tuple)) and not groups > 0:
        raise ValueError("groups must be a positive number, or a list of lists of variables")
    if getattr(optimizer, "is_distributed", False):
        raise ValueError("this optimizer is a DistributedOptimizer already")
    if backward_passes_per_step > 1:
        if is_scaled:
            raise ValueError(
                "backward_passes_per_step is not supported with a LossScaleOptimizer; give the optimizer in "
                "it gradient_accumulation_steps"
            )
        if optimizer.gradient_accumulation_steps:
            raise ValueError(
                "the optimizer has gradient_accumulation_steps already; leave out backward_passes_per_step"
            )
        if optimizer.built:
            raise ValueError("backward_passes_per_step needs an optimizer that has no variables yet")
        optimizer.gradient_accumulation_steps = backward_passes_per_step
    passes = 1 if average_aggregated_gradients else backward_passes_per_step
    known: dict[int, Any] = {}  # variables by their identities
    local: set[int] = set()  # identities of variables whose gradients stay on this rank
    kept: list[Any] = []  # these variables, so that their identities are not used again
    coming: list[Any] = []  # variables whose gradients are applied; Keras would take an attribute for its own

    def reduce(gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """The gradients' mean or sum over the ranks; None stays None."""
        if not process_set.included() or process_set.size() == 1:
            return list(gradients)
        if tf.executing_eagerly():
            # Traced, where every gradient has a place of its own. Traced anew for other variables.
            known.update((id(variable), variable) for variable in variables)
            return reduce_traced(list(gradients), tuple(map(id, variables)))
        return reduce_in_graph(gradients, variables)

    @tf.function
    def reduce_traced(gradients: list[Gradient], variables: tuple[int, ...]) -> list[Gradient]:
        return reduce_in_graph(gradients, [known[variable] for variable in variables])

    @tf.autograph.experimental.do_not_convert
    def reduce_in_graph(gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        gradients = list(gradients)
        shared = []
        for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            if gradient is None:
                continue
            if id(variable) in local:
                if scale_local_gradients:
                    gradients[i] = _scaled(gradient, 1 / process_set.size())
                continue
            if isinstance(gradient, tf.IndexedSlices):
                if sparse_as_dense:
                    gradients[i] = tf.convert_to_tensor(gradient)
                elif isinstance(compression, QuantizedCompressor):
                    _warn_of_sparse_gradients(compression, variable)
            shared.append(i)
        options = {
            "device_dense": device_dense,
            "device_sparse": device_sparse,
            "compression": compression,
            "op": op,
            "process_set": process_set,
        }
        for group in _groups(shared, gradients, variables, groups, compression):
            sparse = [i for i in group if isinstance(gradients[i], tf.IndexedSlices)]
            for i in sparse:
                gradients[i] = hvd.allreduce(gradients[i], **options)
            dense = [i for i in group if i not in sparse]
            scales = {}
            if gradient_predivide_factor != 1.0:
                scales = {
                    "prescale_factor": 1.0 / gradient_predivide_factor,
                    "postscale_factor": gradient_predivide_factor,
                }
            reduced = hvd.grouped_allreduce([gradients[i] for i in dense], **options, **scales)
            for i, gradient in zip(dense, reduced, strict=True):
                gradients[i] = gradient
        return gradients

    kind = type(optimizer)

    class Distributed(kind):
        is_distributed = True

        # A loss-scaling optimizer looks for what is not finite before all else, so that it must be reduced by
        # then. Others accumulate first, and clip after that.
        if is_scaled:

            def apply(self, grads: Sequence[Gradient], trainable_variables: Any = None) -> None:
                variables = self._trainable_variables if trainable_variables is None else trainable_variables
                variables = list(variables)
                super().apply(reduce(grads, variables), variables)

        else:

            def apply(self, grads: Sequence[Gradient], trainable_variables: Any = None) -> None:
                _refuse_loss_scaler()
                super().apply(grads, trainable_variables)

            def _backend_apply_gradients(self, grads: Sequence[Gradient], trainable_variables: Any) -> None:
                nonlocal coming
                coming = list(trainable_variables)
                super()._backend_apply_gradients(grads, trainable_variables)

            def _clip_gradients(self, grads: Sequence[Gradient]) -> list[Gradient]:
                if passes > 1:
                    grads = [_scaled(gradient, passes) for gradient in grads]
                return super()._clip_gradients(reduce(grads, coming))

        def register_local_var(self, var: Any) -> None:
            """Keep a variable's gradient on this rank, scaled by 1 / size if ``scale_local_gradients``."""
            local.add(id(var))
            kept.append(var)

    Distributed.__name__ = Distributed.__qualname__ = kind.__name__
    Distributed.__module__ = kind.__module__
    if name is not None:
        optimizer.name = name
    # Not one made anew from the configuration: that has no state, and none of what cannot be serialised.
    object.__setattr__(optimizer, "__class__", Distributed)
    return optimizer


def _scaled(gradient: tf.Tensor | tf.IndexedSlices, factor: float) -> tf.Tensor | tf.IndexedSlices:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def _refuse_loss_scaler() -> None:
    """A loss scaler around our optimizer would have some ranks skip a step in which others wait.

    Raises:
        RuntimeError: it is a loss scaler that applies gradients.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _LOSS_SCALER_FILE:
            raise RuntimeError(
                "a loss scaler must be in the DistributedOptimizer, and not around it, so that all ranks "
                "skip a step together: "
                "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...). "
                "Keras puts one around by itself under the policy mixed_float16."
            )
        frame = frame.f_back


_LOSS_SCALER_FILE = keras.optimizers.LossScaleOptimizer.apply.__code__.co_filename


def _groups(
    indices: list[int],
    gradients: Sequence[Gradient],
    variables: Sequence[Any],
    groups: int | Sequence[Sequence[Any]] | None,
    compression: Any,
) -> list[list[int]]:
    """Which gradients are reduced together."""
    if isinstance(groups, (list, tuple)):
        place = {id(variables[i]): i for i in indices}
        chosen = [[place.pop(id(v)) for v in group if id(v) in place] for group in groups]
        return [group for group in [*chosen, *([i] for i in place.values())] if group]
    if groups is not None:
        count = min(groups, len(indices)) or 1
        ends = [len(indices) * k // count for k in range(count + 1)]
        return [indices[begin:end] for begin, end in itertools.pairwise(ends)]
    if not isinstance(compression, QuantizedCompressor):
        return [[i] for i in indices]
    together: list[list[int]] = []
    nbytes = compression.fusion_bytes
    for i in reversed(indices):  # about the order in which backward computes them
        if nbytes >= compression.fusion_bytes:
            together.append([])
            nbytes = 0
        together[-1].append(i)
        nbytes += int(variables[i].shape.num_elements() or 1) * gradients[i].dtype.size
    return together


def _warn_of_sparse_gradients(compression: QuantizedCompressor, variable: Any) -> None:
    if compression not in _warned:
        _warned.add(compression)
        warnings.warn(
            f"the gradient of {variable.path} is sparse (tf.IndexedSlices), and travels uncompressed, as all "
            "such gradients do; sparse_as_dense=True has them quantized",
            stacklevel=2,
        )


_warned: weakref.WeakSet[QuantizedCompressor] = weakref.WeakSet()


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the root's variables, of the model and of the optimizer, when training begins.

    Args:
        root_rank: whose.
        device: where they are broadcast; by default where Horovod has it.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self._root_rank, self._device = root_rank, device
        self._done = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast, if there are variables already."""
        self._done = False
        if self.model.built and self.model.optimizer.built:
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast after the first batch, which has made the variables, otherwise."""
        if not self._done:
            self._broadcast()

    def _broadcast(self) -> None:
        # Not the state of random generators, which ranks may want apart.
        variables = [*self.model.weights, *self.model.optimizer.variables]
        with tf.device(self._device):
            hvd.broadcast_variables([variable.value for variable in variables], root_rank=self._root_rank)
        self._done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the metrics over the ranks at the end of an epoch.

    It must come before callbacks that act by the metrics, such as ``ReduceLROnPlateau``.

    Args:
        device: where they are reduced; by default where Horovod has it.
        process_set: the ranks.
    """

    def __init__(self, device: str = "", process_set: hvd.ProcessSet = hvd.global_process_set) -> None:
        super().__init__()
        self._device, self._process_set = device, process_set

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the metrics by their means."""
        if not logs or self._process_set.size() == 1:
            return
        numbers = sorted(key for key, value in logs.items() if isinstance(value, (int, float)))
        with tf.device(self._device):
            values = tf.constant([float(logs[key]) for key in numbers], tf.float64)
            means = hvd.allreduce(values, name="hvd_quant.metrics", process_set=self._process_set)
        logs.update(zip(numbers, means.numpy().tolist(), strict=True))

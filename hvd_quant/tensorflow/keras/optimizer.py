"""A Keras optimizer, made distributed."""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.tensorflow.compression import Compression

from hvd_quant.tensorflow.compressor import QuantizedCompressor

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
        TypeError: ``optimizer`` is no Keras optimizer, or one with an ``apply_gradients`` of its own.
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
    kind, plain = type(optimizer), keras.optimizers.Optimizer
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    is_quantized = isinstance(compression, QuantizedCompressor)
    if kind.apply_gradients is not plain.apply_gradients:
        raise TypeError(
            f"{kind.__name__} has an apply_gradients of its own, in which gradients would not be reduced. "
            "Let it have an apply of its own instead, which Keras's apply_gradients calls"
        )
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
    if is_quantized:
        compression.check_free(process_set)
    if backward_passes_per_step > 1:
        if kind.apply is not plain.apply:
            raise ValueError(
                f"backward_passes_per_step is not supported with {kind.__name__}; give what is in it "
                "gradient_accumulation_steps"
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
    local: set[Any] = set()  # Keras's keys of variables whose gradients stay on this rank
    kept: list[Any] = []  # these variables, so that their keys are not used again
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

    @tf.function(reduce_retracing=True)
    def reduce_traced(gradients: list[Gradient], variables: tuple[int, ...]) -> list[Gradient]:
        return reduce_in_graph(gradients, [known[variable] for variable in variables])

    @tf.autograph.experimental.do_not_convert
    def reduce_in_graph(gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        # Horovod finds the other ranks' gradients by the names of operations. Those of Keras have numbers,
        # of its optimizers and models, which may differ between ranks.
        with tf.name_scope("hvd_quant_reduce/"):
            return reduce_in_scope(gradients, variables)

    def reduce_in_scope(gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        gradients = list(gradients)
        shared = []
        for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            if gradient is None:
                continue
            if optimizer._var_key(variable) in local:
                if scale_local_gradients:
                    gradients[i] = _scaled(gradient, 1 / process_set.size())
                continue
            if isinstance(gradient, tf.IndexedSlices):
                if sparse_as_dense:
                    gradients[i] = tf.convert_to_tensor(gradient)
                elif is_quantized:
                    _warn_of_sparse_gradients(compression, variable)
            gradients[i] = _named(gradients[i], f"gradient_{i}")
            shared.append(i)
        options = {
            "device_dense": device_dense,
            "device_sparse": device_sparse,
            "compression": compression,
            "op": op,
            "process_set": process_set,
        }
        for group in _groups(shared, gradients, variables, groups, compression, optimizer._var_key):
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

    class Distributed(kind):
        is_distributed = True

        if kind.apply is not plain.apply:
            # It may look at gradients before all else, as a loss scaler does for what is not finite, or hand
            # them to other optimizers. So they are reduced first.
            def apply(
                self, grads: Sequence[Gradient], trainable_variables: Any = None, **options: Any
            ) -> None:
                if trainable_variables is None and self.built:
                    trainable_variables = self._trainable_variables
                if trainable_variables is not None:  # otherwise Keras says what is wrong
                    trainable_variables = list(trainable_variables)
                    _check_call(trainable_variables)
                    if is_scaled and is_quantized:
                        # Without the scale, which may change: what error feedback has kept, and the norms
                        # that DQ-SGD goes by, must not change with it.
                        scale = self.dynamic_scale if self.built else self.initial_scale
                        grads = [_scaled(_at_least_float32(gradient), 1.0 / scale) for gradient in grads]
                        grads = reduce(grads, trainable_variables)
                        grads = [_scaled(gradient, scale) for gradient in grads]
                    else:
                        grads = reduce(grads, trainable_variables)
                super().apply(grads, trainable_variables, **options)

        else:
            # Others accumulate gradients first, and clip them when they have been reduced.
            def apply(self, grads: Sequence[Gradient], trainable_variables: Any = None) -> None:
                if trainable_variables is not None:
                    trainable_variables = list(trainable_variables)
                _check_call(self._trainable_variables if trainable_variables is None else trainable_variables)
                super().apply(grads, trainable_variables)

            def _backend_apply_gradients(self, grads: Sequence[Gradient], trainable_variables: Any) -> None:
                nonlocal coming
                coming = list(trainable_variables)
                # Not in the scope of Keras, as in `reduce_in_graph`: for branches that accumulate gradients.
                with tf.name_scope("hvd_quant_apply/"):
                    super()._backend_apply_gradients(grads, trainable_variables)

            def _clip_gradients(self, grads: Sequence[Gradient]) -> list[Gradient]:
                if passes > 1:
                    grads = [_scaled(gradient, passes) for gradient in grads]
                return super()._clip_gradients(reduce(grads, coming))

        def register_local_var(self, var: Any) -> None:
            """Keep a variable's gradient on this rank, scaled by 1 / size if ``scale_local_gradients``.

            Raises:
                ValueError: a loss scaler would have ranks skip different steps.
            """
            if is_scaled:
                raise ValueError(
                    "a LossScaleOptimizer cannot have local variables: what is not finite in their gradients "
                    "would be known on one rank only, and the others would not skip the step"
                )
            local.add(optimizer._var_key(var))
            kept.append(var)

    Distributed.__name__ = Distributed.__qualname__ = kind.__name__
    Distributed.__module__ = kind.__module__
    registered = keras.saving.get_registered_name(kind)
    if registered != kind.__name__:
        package, _, registered_as = registered.partition(">")
        keras.saving.register_keras_serializable(package, registered_as)(Distributed)
        keras.saving.get_custom_objects()[registered] = kind  # a saved model is loaded with the plain one
    if name is not None:
        optimizer.name = name
    # Not one made anew from the configuration: that has no state, and none of what cannot be serialised.
    object.__setattr__(optimizer, "__class__", Distributed)
    if is_quantized:
        compression.in_use = True
    return optimizer


def _mapped(gradient: Gradient, function: Callable[[tf.Tensor], tf.Tensor]) -> Gradient:
    """What a function makes of a gradient's values."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return None if gradient is None else function(gradient)


def _scaled(gradient: Gradient, factor: Any) -> Gradient:
    return _mapped(gradient, lambda values: values * tf.cast(factor, values.dtype))


def _at_least_float32(gradient: Gradient) -> Gradient:
    return _mapped(gradient, lambda values: tf.cast(values, tf.float32) if values.dtype.size < 4 else values)


def _named(gradient: Gradient, name: str) -> Gradient:
    named = _mapped(gradient, lambda values: tf.identity(values, name))
    if isinstance(named, tf.IndexedSlices):
        indices = tf.identity(named.indices, f"{name}_indices")
        return tf.IndexedSlices(named.values, indices, named.dense_shape)
    return named


def _check_call(variables: Sequence[Any]) -> None:
    """Refuse what would have replicas drift apart.

    Raises:
        RuntimeError: a loss scaler applies gradients, of which some ranks would skip a step in which others
            wait.
        ValueError: a variable is overwritten by its gradient, which nobody reduces.
    """
    for variable in variables:
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                f"{variable.path} is overwritten by its gradient, as Keras's float8 quantization has it, and "
                "such gradients are not reduced"
            )
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
    key: Callable[[Any], Any],
) -> list[list[int]]:
    """Which gradients are reduced together."""
    if isinstance(groups, (list, tuple)):
        place = {key(variables[i]): i for i in indices}
        chosen = [[place.pop(key(v)) for v in group if key(v) in place] for group in groups]
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
        name = getattr(variable, "path", variable.name)
        warnings.warn(
            f"the gradient of {name} is sparse (tf.IndexedSlices), and travels uncompressed, as all "
            "such gradients do; sparse_as_dense=True has them quantized",
            stacklevel=2,
        )


_warned: weakref.WeakSet[QuantizedCompressor] = weakref.WeakSet()

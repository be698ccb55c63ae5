"""Distributed Keras optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.tensorflow.compression import Compression

from hvd_quant.horovod import refuse_class
from hvd_quant.tensorflow.compressor import QuantizedCompressor
from hvd_quant.tensorflow.keras.reduction import Gradient, Groups, Reduction
from hvd_quant.tensorflow.refusals import refuse_a_loss_scaler_around, refuse_overwritten


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
    groups: Groups = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Make a Keras optimizer that reduces gradients over the ranks before it applies them.

    The arguments are those of ``horovod.tensorflow.keras.DistributedOptimizer``. An optimizer of Keras 3 is
    made distributed in place, with its state, and returned. Its class has the same name as before, so that a
    saved model restores the plain optimizer. It reduces the gradients before it clips them, as a single
    process with all ranks' data would. With one of our compressors, gradients travel in groups of its
    ``fusion_bytes``, last variable first, unless ``groups`` says otherwise.

    Args:
        optimizer: optimizer of Keras 3, or of legacy Keras.
        name: name of the optimizer.
        device_dense: device for reducing gradients; by default Horovod's.
        device_sparse: device for reducing sparse gradients.
        compression: one of our compressors, or Horovod's ``Compression``. ``overrides`` match the variables'
            paths, such as ``"sequential/dense/kernel"``.
        sparse_as_dense: make sparse gradients dense, so that they are quantized.
        gradient_predivide_factor: divide by it before the sum, and multiply by it afterwards.
        op: ``hvd.Average`` or ``hvd.Sum``.
        backward_passes_per_step: number of passes whose gradients are accumulated before they are reduced and
            applied, by Keras's own ``gradient_accumulation_steps``.
        average_aggregated_gradients: apply the mean of these passes, not the sum.
        num_groups: the former name of ``groups``.
        groups: a number of groups, or lists of variables; as in Horovod.
        process_set: the ranks that take part.
        scale_local_gradients: divide gradients that stay on this rank (``register_local_var``) by the number
            of ranks.

    Raises:
        TypeError: ``optimizer`` is not a Keras optimizer, or has its own ``apply_gradients``; or
            ``compression`` is one of our compressor classes, and not an instance.
        ValueError: arguments contradict each other, or are not supported.
        RuntimeError: Keras does not run on TensorFlow.
    """
    refuse_class(compression)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        _check_legacy(optimizer)
        if isinstance(compression, QuantizedCompressor) and compression.options.overrides:
            raise ValueError(
                "overrides need the variables' names, and gradients of legacy Keras are reduced by Horovod's "
                "own optimizer, which does not pass them: leave out overrides, or use Keras 3"
            )
        import horovod.tensorflow.keras as hvd_keras

        return hvd_keras.DistributedOptimizer(
            optimizer,
            name=name,
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            gradient_predivide_factor=gradient_predivide_factor,
            op=op,
            backward_passes_per_step=backward_passes_per_step,
            average_aggregated_gradients=average_aggregated_gradients,
            num_groups=num_groups,
            groups=groups,
            process_set=process_set,
            scale_local_gradients=scale_local_gradients,
        )
    _check_optimizer(optimizer)
    _check_options(op, gradient_predivide_factor, backward_passes_per_step)
    if num_groups:
        warnings.warn("num_groups is called groups today", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if groups is not None and not isinstance(groups, (list, tuple)) and not groups > 0:
        raise ValueError("groups must be a positive number, or a list of lists of variables")
    is_quantized = isinstance(compression, QuantizedCompressor)
    if is_quantized:
        compression.check_free(process_set)
    if backward_passes_per_step > 1:
        _accumulate(optimizer, backward_passes_per_step)
    reduction = Reduction(
        optimizer._var_key,
        compression=compression,
        op=op,
        process_set=process_set,
        groups=groups,
        device_dense=device_dense,
        device_sparse=device_sparse,
        gradient_predivide_factor=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        scale_local_gradients=scale_local_gradients,
        passes=1 if average_aggregated_gradients else backward_passes_per_step,
    )
    if name is not None:
        optimizer.name = name
    # Not a new one from the configuration, which would lack the state, and anything that cannot be
    # serialised.
    object.__setattr__(optimizer, "__class__", _distributed(type(optimizer), reduction))
    if is_quantized:
        compression.in_use = True
    return optimizer


# --- checks -----------------------------------------------------------------------------------------------


def _check_legacy(optimizer: Any) -> None:
    """Check that an optimizer that is not of Keras 3 is one of legacy Keras, and that this is in use."""
    legacy = tf.keras.optimizers
    if legacy.Optimizer is keras.optimizers.Optimizer or not isinstance(  # without TF_USE_LEGACY_KERAS=1
        optimizer, (legacy.Optimizer, legacy.legacy.Optimizer)
    ):
        raise TypeError(
            f"optimizer must be a Keras optimizer, not {optimizer!r}. For one of legacy Keras (tf_keras), "
            "set TF_USE_LEGACY_KERAS=1"
        )


def _check_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Check that an optimizer of Keras 3 can be made distributed."""
    kind = type(optimizer)
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Keras runs on {keras.backend.backend()}, and Horovod's TensorFlow operations need "
            "KERAS_BACKEND=tensorflow"
        )
    if kind.apply_gradients is not keras.optimizers.Optimizer.apply_gradients:
        raise TypeError(
            f"{kind.__name__} has an apply_gradients of its own, in which gradients would not be reduced. "
            "Let it have an apply of its own instead, which Keras's apply_gradients calls"
        )
    if getattr(optimizer, "is_distributed", False):
        raise ValueError("this optimizer is a DistributedOptimizer already")


def _check_options(op: Any, gradient_predivide_factor: float, backward_passes_per_step: int) -> None:
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op must be hvd.Average or hvd.Sum")
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be positive, not {backward_passes_per_step}")


def _accumulate(optimizer: keras.optimizers.Optimizer, passes: int) -> None:
    """Make Keras accumulate the gradients of several passes, if it can."""
    kind = type(optimizer)
    if _has_own_apply(kind):
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
    optimizer.gradient_accumulation_steps = passes


def _has_own_apply(kind: type[keras.optimizers.Optimizer]) -> bool:
    return kind.apply is not keras.optimizers.Optimizer.apply


# --- the distributed class --------------------------------------------------------------------------------


class Reducing:
    """Base of distributed optimizer classes, which comes before the original class."""

    is_distributed = True
    # On the class: Keras would track an optimizer's attribute. Under a name that no optimizer uses.
    _hvd_quant_reduction: Reduction

    def register_local_var(self, var: Any) -> None:
        """Keep a variable's gradient on this rank, scaled by 1 / size if ``scale_local_gradients``.

        Raises:
            ValueError: a loss scaler would have ranks skip different steps.
        """
        if isinstance(self, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "a LossScaleOptimizer cannot have local variables: what is not finite in their gradients "
                "would be known on one rank only, and the others would not skip the step"
            )
        self._hvd_quant_reduction.keep_local(var)


class ReducingFirst(Reducing):
    """For a class with its own ``apply``.

    It may inspect gradients first, as a loss scaler does for values that are not finite, or pass them to
    other optimizers. So they are reduced before anything else.
    """

    def apply(self, grads: Sequence[Gradient], trainable_variables: Any = None, **options: Any) -> None:
        if trainable_variables is None and self.built:
            trainable_variables = self._trainable_variables
        if trainable_variables is not None:  # otherwise Keras raises the error
            trainable_variables = list(trainable_variables)
            _check_call(trainable_variables)
            reduction = self._hvd_quant_reduction
            if isinstance(self, keras.optimizers.LossScaleOptimizer) and reduction.is_quantized:
                scale = self.dynamic_scale if self.built else self.initial_scale
                grads = reduction.reduce_scaled(grads, trainable_variables, scale)
            else:
                grads = reduction.reduce(grads, trainable_variables)
        super().apply(grads, trainable_variables, **options)


class ReducingBeforeClipping(Reducing):
    """For a class with Keras's ``apply``, which accumulates gradients first.

    They are clipped after they have been reduced.
    """

    def apply(self, grads: Sequence[Gradient], trainable_variables: Any = None) -> None:
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        _check_call(self._trainable_variables if trainable_variables is None else trainable_variables)
        super().apply(grads, trainable_variables)

    def _backend_apply_gradients(self, grads: Sequence[Gradient], trainable_variables: Any) -> None:
        self._hvd_quant_reduction.coming = list(trainable_variables)
        # Not in Keras's name scope, which has a number: for branches that accumulate gradients.
        with tf.name_scope("hvd_quant_apply/"):
            super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads: Sequence[Gradient]) -> list[Gradient]:
        reduction = self._hvd_quant_reduction
        return super()._clip_gradients(reduction.reduce(grads, reduction.coming))


@tf.autograph.experimental.do_not_convert
def _check_call(variables: Sequence[Any]) -> None:
    """Refuse calls that would make replicas diverge."""
    refuse_overwritten(variables)
    refuse_a_loss_scaler_around()


def _distributed(
    kind: type[keras.optimizers.Optimizer], reduction: Reduction
) -> type[keras.optimizers.Optimizer]:
    """Make a subclass that reduces its gradients, and has its base's name, for Keras's serialisation too."""

    class Distributed(ReducingFirst if _has_own_apply(kind) else ReducingBeforeClipping, kind):
        _hvd_quant_reduction = reduction

    Distributed.__name__ = Distributed.__qualname__ = kind.__name__
    Distributed.__module__ = kind.__module__
    registered = keras.saving.get_registered_name(kind)
    if registered != kind.__name__:
        package, _, registered_as = registered.partition(">")
        keras.saving.register_keras_serializable(package, registered_as)(Distributed)
        keras.saving.get_custom_objects()[registered] = kind  # a saved model is loaded with the plain one
    return Distributed

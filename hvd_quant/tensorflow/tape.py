"""Horovod's gradient tape, which gives a compressor the variables' names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow.compression import Compression

from hvd_quant.horovod import refuse_class
from hvd_quant.tensorflow.compressor import QuantizedCompressor
from hvd_quant.tensorflow.names import variable_name

Reduce = Callable[..., list[Any]]

# Traced functions with names, by Horovod's without, which is one for all tapes with the same arguments.
_traced: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def DistributedGradientTape(  # noqa: N802  Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    scale_local_gradients: bool = True,
) -> tf.GradientTape:
    """Horovod's own tape, which reduces gradients over the ranks; with ``overrides`` it also names them.

    The names are those of the sources without ``":0"``. Sources that are the ``value`` of a Keras 3 variable
    are named by its path, such as ``"sequential/dense/kernel"``.

    Args:
        gradtape: TensorFlow's tape.
        device_dense: device for reducing gradients; by default Horovod's.
        device_sparse: device for reducing sparse gradients.
        compression: one of our compressors, or Horovod's ``Compression``.
        sparse_as_dense: make sparse gradients dense, so that they are quantized.
        op: ``hvd.Average`` or ``hvd.Sum``.
        gradient_predivide_factor: divide by it before the sum, and multiply by it afterwards.
        num_groups: the former name of ``groups``.
        groups: a number of groups, or lists of variables, as in Horovod. In groups, gradients with None for
            an override travel as float64.
        process_set: the ranks that take part.
        scale_local_gradients: divide gradients that stay on this rank (``register_local_source``) by the
            number of ranks.

    Returns:
        Horovod's tape. Its ``gradient`` raises what the compressor and Horovod do, see
        `QuantizedCompressor.compress` and its ``decompress``.

    Raises:
        TypeError: ``compression`` is one of our compressor classes, and not an instance.
        ValueError: Horovod does not support the arguments.
    """
    refuse_class(compression)
    tape = hvd.DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    if isinstance(compression, QuantizedCompressor) and compression.options.overrides:
        grouped = groups is not None or num_groups != 0
        tape._allreduce_grads = _name_first(tape._allreduce_grads, compression, sparse_as_dense, grouped)
    return tape


def _name_first(
    reduce: Any, compression: QuantizedCompressor, sparse_as_dense: bool, grouped: bool
) -> Reduce:
    """Wrap Horovod's function that reduces a tape's gradients, so that it names them first."""
    # Horovod traces it itself for a tape outside of a graph. The naming must be inside.
    is_traced = hasattr(reduce, "python_function")
    inner = reduce.python_function if is_traced else reduce

    @tf.autograph.experimental.do_not_convert
    def named(
        gradients: Sequence[Any], sources: Sequence[Any], generic: bool, names: Sequence[str]
    ) -> list[Any]:
        gradients = [_own_tensor(gradient, sparse_as_dense) for gradient in gradients]
        compression.name_gradients(zip(names, gradients, strict=True), grouped=grouped)
        return inner(gradients, sources, generic)

    if is_traced:
        if reduce not in _traced:
            _traced[reduce] = tf.function(named)
        named = _traced[reduce]

    def reduce_named(gradients: Sequence[Any], sources: Sequence[Any], generic: bool = False) -> list[Any]:
        # Names are arguments, so that other variables of the same shapes are traced again.
        return named(gradients, sources, generic, tuple(map(variable_name, sources)))

    return reduce_named


def _own_tensor(gradient: Any, sparse_as_dense: bool) -> Any:
    """Return a gradient as a tensor of its own: two variables may share one."""
    if gradient is None or (isinstance(gradient, tf.IndexedSlices) and not sparse_as_dense):
        return gradient
    return tf.identity(tf.convert_to_tensor(gradient))

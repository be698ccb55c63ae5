"""Horovod's gradient tape, which tells a compressor the variables' names."""

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

# What is traced with names, by Horovod's function without, which is one for all tapes of the same arguments.
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
    """Horovod's own tape, which reduces gradients over the ranks; with ``overrides`` it tells their names.

    These are the sources' names without ``":0"``. TensorFlow's variables in those of Keras 3 (their
    ``value``) are named by their paths, such as ``"sequential/dense/kernel"``.

    Args:
        gradtape: TensorFlow's.
        device_dense: where gradients are reduced; by default where Horovod has it.
        device_sparse: where sparse ones are.
        compression: one of our compressors, or Horovod's ``Compression``.
        sparse_as_dense: make sparse gradients dense, and have them quantized.
        op: ``hvd.Average`` or ``hvd.Sum``.
        gradient_predivide_factor: divide by it before the sum, and multiply by it after that.
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
        TypeError: ``compression`` is a class of our compressors, and not one of them.
        ValueError: Horovod does not support the arguments.
    """
    refuse_class(compression)
    tape = hvd.DistributedGradientTape(
        gradtape,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    if isinstance(compression, QuantizedCompressor) and compression.options.overrides:
        grouped = groups is not None or num_groups != 0
        tape._allreduce_grads = _told_names(tape._allreduce_grads, compression, sparse_as_dense, grouped)
    return tape


def _told_names(
    reduce: Any, compression: QuantizedCompressor, sparse_as_dense: bool, grouped: bool
) -> Reduce:
    """Horovod's function that reduces a tape's gradients, with the names told before."""
    # Horovod traces it by itself for a tape outside of a graph. What is named is in there.
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

    def told(gradients: Sequence[Any], sources: Sequence[Any], generic: bool = False) -> list[Any]:
        # Names are arguments, so that other variables of the same shapes are traced anew.
        return named(gradients, sources, generic, tuple(map(variable_name, sources)))

    return told


def _own_tensor(gradient: Any, sparse_as_dense: bool) -> Any:
    """A gradient as a tensor of its own: two variables may have the same one."""
    if gradient is None or (isinstance(gradient, tf.IndexedSlices) and not sparse_as_dense):
        return gradient
    return tf.identity(tf.convert_to_tensor(gradient))

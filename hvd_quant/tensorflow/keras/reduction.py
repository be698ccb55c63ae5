"""Reduction of a distributed Keras optimizer's gradients over the ranks: eagerly or in graphs, in groups."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_quant.horovod import is_elastic
from hvd_quant.tensorflow.compressor import QuantizedCompressor
from hvd_quant.tensorflow.names import variable_name

Gradient = tf.Tensor | tf.IndexedSlices | None
Groups = int | Sequence[Sequence[Any]] | None


class Reduction:
    """Reduces one optimizer's gradients.

    Args:
        key: returns Keras's key of a variable, the same for its own object and for TensorFlow's.
        compression, op, process_set, groups, device_dense, device_sparse, gradient_predivide_factor,
            sparse_as_dense, scale_local_gradients: checked arguments of
            `hvd_quant.tensorflow.keras.DistributedOptimizer`.
        passes: factor of the gradients: Keras computes the mean of the passes, and the sum is wanted.
    """

    def __init__(
        self,
        key: Callable[[Any], Any],
        *,
        compression: Any,
        op: Any,
        process_set: hvd.ProcessSet,
        groups: Groups,
        device_dense: str,
        device_sparse: str,
        gradient_predivide_factor: float,
        sparse_as_dense: bool,
        scale_local_gradients: bool,
        passes: int,
    ) -> None:
        self._key = key
        self._compression = compression
        self._process_set = process_set
        self._groups = groups
        self._sparse_as_dense = sparse_as_dense
        self._scale_local_gradients = scale_local_gradients
        self._passes = passes
        self._options = {  # for Horovod's functions
            "device_dense": device_dense,
            "device_sparse": device_sparse,
            "compression": compression,
            "op": op,
            "process_set": process_set,
        }
        self._factors: dict[str, float] = {}  # for dense gradients
        if gradient_predivide_factor != 1.0:
            self._factors = {
                "prescale_factor": 1.0 / gradient_predivide_factor,
                "postscale_factor": gradient_predivide_factor,
            }
        self._local: dict[Any, Any] = {}  # variables whose gradients stay on this rank, by key
        self._known: dict[int, Any] = {}  # variables by identity
        self.coming: list[Any] = []  # variables whose gradients the optimizer is about to apply

    @property
    def is_quantized(self) -> bool:
        """Whether the compressor is one of ours."""
        return isinstance(self._compression, QuantizedCompressor)

    def keep_local(self, variable: Any) -> None:
        """Keep a variable's gradient on this rank."""
        self._local[self._key(variable)] = variable  # kept alive, so that its key is not reused

    def reduce(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Return the gradients' mean or sum over the ranks.

        Args:
            gradients: gradients of any shapes and dtypes, dense or sparse; None stays None.
            variables: their variables.

        Returns:
            The reduced gradients, in the same shapes and dtypes.

        Raises:
            As the compressor and Horovod do, see `QuantizedCompressor.compress` and its ``decompress``.
        """
        if self._passes > 1:
            gradients = [_scaled(gradient, self._passes) for gradient in gradients]
        if not self._process_set.included() or (self._process_set.size() == 1 and not is_elastic()):
            return list(gradients)
        if tf.executing_eagerly():
            # Traced, so that every gradient has its own place. Traced again for other variables.
            self._known.update((id(variable), variable) for variable in variables)
            return self._reduce_traced(list(gradients), tuple(map(id, variables)))
        return self._reduce_in_graph(gradients, variables)

    def reduce_scaled(
        self, gradients: Sequence[Gradient], variables: Sequence[Any], scale: Any
    ) -> list[Gradient]:
        """Like `reduce`, for gradients that a loss scaler has multiplied by ``scale``, as are the results.

        They travel unscaled, because the scale may change: residuals of error feedback, and the norms of
        DQ-SGD, must not depend on it. Those of less than 32 bits are returned as float32.
        """
        gradients = [_scaled(_at_least_float32(gradient), 1.0 / scale) for gradient in gradients]
        return [_scaled(gradient, scale) for gradient in self.reduce(gradients, variables)]

    @tf.function(reduce_retracing=True)
    def _reduce_traced(self, gradients: list[Gradient], variables: tuple[int, ...]) -> list[Gradient]:
        return self._reduce_in_graph(gradients, [self._known[variable] for variable in variables])

    @tf.autograph.experimental.do_not_convert
    def _reduce_in_graph(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        # Horovod matches gradients between ranks by the names of operations. Those of Keras contain numbers
        # of its optimizers and models, which may differ between ranks.
        with tf.name_scope("hvd_quant_reduce/"):
            results, shared = list(gradients), []
            for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
                if gradient is None:
                    continue
                if self._key(variable) in self._local:
                    if self._scale_local_gradients:
                        results[i] = _scaled(gradient, 1.0 / self._size())
                    continue
                if isinstance(gradient, tf.IndexedSlices):
                    if self._sparse_as_dense:
                        gradient = tf.convert_to_tensor(gradient)
                    elif self.is_quantized:
                        _warn_of_sparse_gradients(self._compression, variable)
                results[i] = _named(gradient, f"gradient_{i}")
                shared.append(i)
            if self.is_quantized and self._compression.options.overrides:
                names = [(variable_name(variable), results[i]) for i, variable in enumerate(variables)]
                self._compression.name_gradients(names)
            for group in self._grouped(shared, results, variables):
                reduced = self._reduce_group([results[i] for i in group])
                for i, gradient in zip(group, reduced, strict=True):
                    results[i] = gradient
            return results

    def _size(self) -> Any:
        """Return the number of ranks: in an elastic job, as it is in each step."""
        if is_elastic():
            return tf.cast(hvd.size_op(self._process_set.process_set_id), tf.float32)
        return self._process_set.size()

    def _reduce_group(self, gradients: list[Gradient]) -> list[Gradient]:
        """Reduce gradients together, except for sparse ones, of which Horovod has no groups."""
        results = list(gradients)
        dense = []
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                results[i] = hvd.allreduce(gradient, **self._options)
            else:
                dense.append(i)
        reduced = hvd.grouped_allreduce([gradients[i] for i in dense], **self._options, **self._factors)
        for i, gradient in zip(dense, reduced, strict=True):
            results[i] = gradient
        return results

    def _grouped(
        self, indices: list[int], gradients: Sequence[Gradient], variables: Sequence[Any]
    ) -> list[list[int]]:
        """Return the groups of gradients that are reduced together."""
        # Horovod's groups have one dtype, float64 as the control tensors: large gradients that an override
        # leaves uncompressed are sent alone.
        alone = [i for i in indices if self._is_left_out(gradients[i], variables[i])]
        shared = [i for i in indices if i not in alone]
        return [*self._together(shared, gradients, variables), *([i] for i in alone)]

    def _is_left_out(self, gradient: Gradient, variable: Any) -> bool:
        if not self.is_quantized or isinstance(gradient, tf.IndexedSlices):
            return False
        return self._compression.is_left_out(variable_name(variable), gradient.shape.num_elements())

    def _together(
        self, indices: list[int], gradients: Sequence[Gradient], variables: Sequence[Any]
    ) -> list[list[int]]:
        groups = self._groups
        if isinstance(groups, (list, tuple)):
            place = {self._key(variables[i]): i for i in indices}
            keys = [[self._key(variable) for variable in group] for group in groups]
            chosen = [[place.pop(key) for key in group if key in place] for group in keys]
            return [group for group in [*chosen, *([i] for i in place.values())] if group]
        if groups is not None:
            count = min(groups, len(indices)) or 1
            ends = [len(indices) * k // count for k in range(count + 1)]
            return [indices[begin:end] for begin, end in itertools.pairwise(ends)]
        if not self.is_quantized:
            return [[i] for i in indices]
        together: list[list[int]] = []
        nbytes = limit = self._compression.fusion_bytes
        for i in reversed(indices):  # about the order in which backward computes them
            if nbytes >= limit:
                together.append([])
                nbytes = 0
            together[-1].append(i)
            nbytes += int(variables[i].shape.num_elements() or 1) * gradients[i].dtype.size
        return together


def _mapped(gradient: Gradient, function: Callable[[tf.Tensor], tf.Tensor]) -> Gradient:
    """Apply a function to a gradient's values."""
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

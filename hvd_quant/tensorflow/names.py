"""The names of the gradients' variables, and their schemes.

Horovod does not pass names to a compressor. Our front ends register them before they pass the gradients.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_quant.reducer.options import Options
from hvd_quant.schemes import DQSGD, Scheme


class GivenName(NamedTuple):
    """What is known of a gradient.

    Args:
        name: name of its variable.
        grouped: whether ``hvd.grouped_allreduce`` reduces it together with others, which takes one dtype.
    """

    name: str
    grouped: bool


class GradientNames:
    """Names of tensors by identity. They keep no tensor alive, and are dropped with it.

    Args:
        options: options of the compressor.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._given: dict[int, tuple[weakref.ref[tf.Tensor], GivenName]] = {}
        self._any_given = False

    def register(self, gradients: Iterable[tuple[str, Any]], grouped: bool) -> None:
        """Register the names of gradients; what is not a tensor counts as a name only.

        Raises:
            TypeError: a name is not a string.
            ValueError: a tensor has two names.
        """
        gradients = list(gradients)
        given: dict[int, str] = {}
        for name, gradient in gradients:
            if not isinstance(name, str):
                raise TypeError(f"a gradient's name must be a string, not {name!r}")
            if isinstance(gradient, tf.Tensor) and given.setdefault(id(gradient), name) != name:
                raise ValueError(
                    f"one tensor is the gradient of {given[id(gradient)]!r} and of {name!r}: name two, "
                    "made by tf.identity"
                )
        for name, gradient in gradients:
            if isinstance(gradient, tf.Tensor):
                self._note(gradient, GivenName(name, grouped))
        if not self._any_given:
            self._any_given = True
            names = [name for name, _ in gradients]
            self._options.overrides.warn_of_unused(names, "gradient", stacklevel=3)

    def of(self, tensor: Any) -> GivenName | None:
        """Return what is known of a tensor, if anything."""
        reference, given = self._given.get(id(tensor), (None, None))
        return given if reference is not None and reference() is tensor else None

    def is_small(self, count: int | None) -> bool:
        """Return whether a gradient is too small to be quantized. An unknown number of values is not."""
        return count is not None and (count == 0 or count < self._options.min_numel)

    def is_left_out(self, name: str, count: int | None) -> bool:
        """Return whether an override, and not its size, leaves a gradient uncompressed."""
        options = self._options
        return not self.is_small(count) and options.overrides.scheme(name, options.scheme) is None

    def scheme(self, given: GivenName | None, count: int | None) -> Scheme | DQSGD | None:
        """Return a gradient's scheme, by default the user's; None if it stays uncompressed.

        Raises:
            ValueError: it depends on an unknown name.
        """
        options, small = self._options, self.is_small(count)
        if options.overrides and given is None and not (small and self._any_given):
            raise ValueError(
                "overrides need the variables' names, which Horovod does not pass on: use "
                "hvd_quant.tensorflow.DistributedGradientTape or "
                "hvd_quant.tensorflow.keras.DistributedOptimizer in place of Horovod's, or call the "
                "compressor's name_gradients before hvd.allreduce"
            )
        if small:
            return None
        return options.overrides.scheme(given.name, options.scheme) if options.overrides else options.scheme

    def __len__(self) -> int:
        return len(self._given)

    def _note(self, tensor: tf.Tensor, given: GivenName) -> None:
        kept, key = self._given, id(tensor)

        def forget(reference: weakref.ref[tf.Tensor]) -> None:
            if key in kept and kept[key][0] is reference:
                del kept[key]

        kept[key] = weakref.ref(tensor, forget), given


def variable_name(variable: Any) -> str:
    """Return a variable's name for ``overrides``.

    For Keras's own it is the path, such as ``"sequential/dense/kernel"``, which their ``value`` has as well;
    for other TensorFlow variables it is the name without ``":0"``.
    """
    path = getattr(variable, "path", None)
    return path if isinstance(path, str) else re.sub(r":\d+$", "", variable.name)

"""Which variable a gradient is of, and its scheme by that.

Horovod does not tell a compressor the variable. Our front ends do, just before they hand it the gradient.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_quant.reducer.options import Options
from hvd_quant.schemes import DQSGD, Scheme


class Told(NamedTuple):
    """What was said of a gradient.

    Args:
        name: of its variable.
        grouped: whether ``hvd.grouped_allreduce`` reduces it together with others, which takes one dtype.
    """

    name: str
    grouped: bool


class GradientNames:
    """The names of tensors, by their identities. They keep no tensor alive, and go when it does.

    Args:
        options: the compressor's.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._told: dict[int, tuple[weakref.ref[tf.Tensor], Told]] = {}
        self._any_told = False

    def register(self, gradients: Iterable[tuple[str, Any]], grouped: bool) -> None:
        """Note the names of gradients; those that are no tensors count as names alone.

        Raises:
            TypeError: something is no name.
            ValueError: a tensor is given twice.
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
                self._note(gradient, Told(name, grouped))
        if not self._any_told:
            self._any_told = True
            for pattern in self._options.overrides.unused(name for name, _ in gradients):
                warnings.warn(
                    f"the override of {pattern!r} holds for no gradient: no name matches it, or all that do "
                    "match an earlier pattern",
                    stacklevel=3,
                )

    def of(self, tensor: Any) -> Told | None:
        """What was said of a tensor, if anything was."""
        reference, told = self._told.get(id(tensor), (None, None))
        return told if reference is not None and reference() is tensor else None

    def is_small(self, count: int | None) -> bool:
        """Whether a gradient of so many values is left to Horovod. Of an unknown number, none is."""
        return count is not None and (count == 0 or count < self._options.min_numel)

    def is_left_out(self, name: str, count: int | None) -> bool:
        """Whether a gradient stays uncompressed by an override, and not because it is small."""
        options = self._options
        return not self.is_small(count) and options.overrides.scheme(name, options.scheme) is None

    def scheme(self, told: Told | None, count: int | None) -> Scheme | DQSGD | None:
        """A gradient's scheme, the user's own unless it has another; None if it stays uncompressed.

        Raises:
            ValueError: it depends on a name that is not known.
        """
        options, small = self._options, self.is_small(count)
        if options.overrides and told is None and not (small and self._any_told):
            raise ValueError(
                "overrides need the variables' names, which Horovod does not tell: use "
                "hvd_quant.tensorflow.DistributedGradientTape or "
                "hvd_quant.tensorflow.keras.DistributedOptimizer in place of Horovod's, or call the "
                "compressor's name_gradients before hvd.allreduce"
            )
        if small:
            return None
        return options.overrides.scheme(told.name, options.scheme) if options.overrides else options.scheme

    def __len__(self) -> int:
        return len(self._told)

    def _note(self, tensor: tf.Tensor, told: Told) -> None:
        kept, key = self._told, id(tensor)

        def forget(reference: weakref.ref[tf.Tensor]) -> None:
            if key in kept and kept[key][0] is reference:
                del kept[key]

        kept[key] = weakref.ref(tensor, forget), told


def variable_name(variable: Any) -> str:
    """A variable's name as ``overrides`` have it.

    The path of Keras's own, such as ``"sequential/dense/kernel"``, which their ``value`` has as well; the
    name of other variables of TensorFlow's, without ``":0"``.
    """
    path = getattr(variable, "path", None)
    return path if isinstance(path, str) else re.sub(r":\d+$", "", variable.name)

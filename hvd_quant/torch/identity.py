"""Which parameter a gradient belongs to, found without being told.

Horovod hands ``compress`` a tensor and no name. Where the parameters are known, the tensor is recognised as
some parameter's ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class ParameterNames:
    """Finds a gradient's parameter.

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them.

    Raises:
        ValueError: the pairs are none, or two have the same name.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        pairs = list(named_parameters)
        for pair in pairs:
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], torch.Tensor)
            ):
                raise ValueError(
                    "named_parameters must be pairs of name and parameter, as model.named_parameters() gives "
                    f"them, not {type(pair).__name__}"
                )
        self._names = [name for name, _ in pairs]
        self._parameters = [parameter for _, parameter in pairs]
        duplicates = sorted({name for name in self._names if self._names.count(name) > 1})
        if duplicates:
            raise ValueError(
                f"names in named_parameters must be unique; found twice: {', '.join(duplicates)}"
            )
        # Gradients arrive in nearly the same order in every step: the search begins at the one that came
        # next last time, so that it is no search at all.
        self._successor = [*range(1, len(pairs)), 0]
        self._last = len(pairs) - 1

    def __len__(self) -> int:
        return len(self._names)

    def find(self, gradient: torch.Tensor) -> str | None:
        """The name of the parameter whose ``.grad`` this very tensor is, or None."""
        if not self._names:
            return None
        guess = self._successor[self._last]
        if self._parameters[guess].grad is not gradient:
            guess = next((i for i, p in enumerate(self._parameters) if p.grad is gradient), -1)
            if guess < 0:
                return None
            self._successor[self._last] = guess
        self._last = guess
        return self._names[guess]

    def find_sparse(self, dense: torch.Tensor, taken: Iterable[str]) -> str | None:
        """The name of the parameter whose sparse ``.grad`` has this dense copy, or None.

        With ``sparse_as_dense=True`` Horovod hands over a copy that is no parameter's ``.grad``. Names in
        ``taken`` are not considered: their gradients are on the way already.
        """
        taken = set(taken)
        for name, parameter in zip(self._names, self._parameters, strict=True):
            gradient = parameter.grad
            if (
                name not in taken
                and gradient is not None
                and gradient.is_sparse
                and gradient.shape == dense.shape
                and torch.equal(gradient.to_dense(), dense)
            ):
                return name
        return None

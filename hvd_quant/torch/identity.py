"""Find the parameter that a gradient belongs to.

Horovod calls ``compress`` with a tensor and no name. If the parameters are known, the tensor is recognised as
some parameter's ``.grad``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch.utils.hooks import RemovableHandle


class ParameterNames:
    """Finds a gradient's parameter.

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them.

    Raises:
        ValueError: these are not pairs, or two have the same name.
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
        duplicates = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if duplicates:
            raise ValueError(
                f"names in named_parameters must be unique; found twice: {', '.join(duplicates)}"
            )
        listed: dict[int, tuple[str, torch.Tensor]] = {}
        for pair in pairs:
            listed.setdefault(id(pair[1]), pair)  # a duplicate (tied weights) goes by its first name
        pairs = list(listed.values())
        self._names = [name for name, _ in pairs]
        self._parameters = [parameter for _, parameter in pairs]
        # Gradients arrive in nearly the same order in every step: the search starts at the last successor, so
        # that it usually finds the gradient at once.
        self._successor = [*range(1, len(pairs)), 0]
        self._last = len(pairs) - 1
        self._hooks: dict[int, RemovableHandle] = {}
        self._accumulated = 0  # index of the parameter whose gradient autograd computed last

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ParameterNames)
            and self._names == other._names
            and all(a is b for a, b in zip(self._parameters, other._parameters, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Return the pairs in order."""
        return list(zip(self._names, self._parameters, strict=True))

    def check_sizes(self, residuals: Mapping[str, torch.Tensor]) -> None:
        """Check that residuals of a state fit the parameters.

        Raises:
            ValueError: some do not.
        """
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        for name, residual in residuals.items():
            if sizes.get(name) != residual.numel():
                raise ValueError(
                    f"the state has residuals of {residual.numel()} values for parameter {name!r}, which has "
                    f"{sizes.get(name, 0)}"
                )

    def watch(self) -> None:
        """Note which gradient autograd has just computed; Horovod's own hook runs right after ours."""
        weak_self = weakref.ref(self)  # a parameter must not keep its model alive through its hook

        def note(index: int) -> None:
            if (names := weak_self()) is not None:
                names._accumulated = index

        for i, parameter in enumerate(self._parameters):
            if parameter.requires_grad and parameter.is_leaf:
                self._hooks[i] = parameter.register_post_accumulate_grad_hook(lambda _, index=i: note(index))

    def watch_no_more(self) -> None:
        """Stop watching, which takes time, unless some gradient is sparse."""
        gradients = [self._parameters[i].grad for i in self._hooks]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            return
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def find(self, gradient: torch.Tensor) -> str | None:
        """Return the name of the parameter whose ``.grad`` this very tensor is, or None."""
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
        """Return the name of the parameter whose sparse ``.grad`` has this dense copy, or None.

        With ``sparse_as_dense=True`` Horovod passes a copy that is no parameter's ``.grad``. The search
        starts at the gradient that autograd has just computed, because others may be equal. Names in
        ``taken`` are skipped: their gradients are in flight already.
        """
        taken = set(taken)
        order = [self._accumulated, *range(len(self._names))] if self._names else []
        for i in order:
            gradient = self._parameters[i].grad
            if (
                self._names[i] not in taken
                and gradient is not None
                and gradient.is_sparse
                and gradient.shape == dense.shape
                and _same_bits(gradient.to_dense(), dense)
            ):
                return self._names[i]
        return None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to itself."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )

"""What torch operations read and write, counted as they are dispatched, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They start nothing on a GPU.
VIEWS = {
    "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "squeeze",
    "t", "transpose", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WRITE_ONLY = {"copy_", "fill_", "random_", "uniform_", "zero_"}  # do not read what they overwrite
# They wait for the device, or the shape of what they return depends on data, so that the host has to.
SYNCHRONISING = {
    "_assert_async", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item",
    "masked_select", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts, while it is entered, the operations that would start a kernel, and the bytes that these move.

    Every operand counts as read once, every result as written once, as on a GPU with caches that hold nothing
    from one operation to the next.

    Attributes:
        operations: their names, in order.
        bytes: read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in VIEWS or name in ALLOCATIONS:
            return result
        self.operations.append(name)
        operands = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        operands = [one for one in operands if one is not kwargs.get("out")]
        results = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.bytes += sum(one.nbytes for one in operands[name in WRITE_ONLY :] + results)
        return result


def traffic_of(function: Callable[[], object]) -> Traffic:
    """Of a call, after one that made what is the same in every call."""
    function()
    with Traffic() as traffic:
        function()
    return traffic

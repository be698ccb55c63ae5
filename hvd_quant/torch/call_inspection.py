"""How Horovod calls a compressor, where its arguments do not show it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

# Functions of Horovod's that compress a tensor by itself, from which nearly all calls come.
_ALONE = frozenset(("_allreduce_grad_async", "allreduce"))
# Functions of Horovod's that compress several tensors and reduce them by one operation; what they call these.
_GROUPED = {"_grouped_allreduce_grad_async": "ps", "grouped_allreduce": "tensors"}


def calling_optimizer() -> Any | None:
    """Return Horovod's optimizer that has called a compressor's ``compress``; None if something else has."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "horovod.torch.optimizer":
            return frame.f_locals.get("self")
        if not frame.f_globals.get("__name__", "").startswith("hvd_quant"):
            return None
        frame = frame.f_back
    return None


def reduced_together() -> Sequence[object] | None:
    """Return the tensors that are compressed one by one and reduced by one operation; None for a single one.

    Only for a compressor's ``compress``.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name in _ALONE:
        return None
    if frame.f_code.co_name not in _GROUPED:
        frame = frame.f_back  # a comprehension has a frame of its own before Python 3.12
    name = _GROUPED.get(frame.f_code.co_name) if frame is not None else None
    if name is None or not frame.f_globals["__name__"].startswith("horovod."):
        return None
    return frame.f_locals[name]

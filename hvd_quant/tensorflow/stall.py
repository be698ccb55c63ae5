"""Compressors' operations in flight, for `hvd_quant.reducer.stall`."""

from __future__ import annotations

from collections.abc import Hashable

import horovod.tensorflow as hvd

from hvd_quant.reducer.stall import StallCheck, enumeration
from hvd_quant.tensorflow.graph_state import GraphState


def in_flight(watched: list[GraphState]) -> list[Hashable]:
    """Return what is in flight: the compressor's number, its name, and its sequence number."""
    if not hvd.is_initialized():
        return []
    return [(id(one), what, number) for one in watched for what, number in list(one.in_flight.items())]


def describe(keys: list[Hashable], watched: list[GraphState]) -> list[str]:
    """Describe these operations in lines."""
    waited_for = enumeration(dict.fromkeys(what for _, what, _ in keys))
    return [
        f"hvd_quant: rank {hvd.rank()} of {hvd.size()}",
        f"Waited for: {waited_for} (groups of gradients, by their places in the traced function).",
    ]


check: StallCheck[GraphState] = StallCheck(in_flight, describe)

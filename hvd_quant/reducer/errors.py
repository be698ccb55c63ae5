"""Differences between ranks, as errors that name them in the same words on every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

_NAMED_AT_MOST = 5  # differing parameters in a message

Description = Mapping[str, object]


class RankMismatchError(RuntimeError):
    """The ranks are configured differently, or submitted their gradients in different orders."""

    __init__ = Exception.__init__  # otherwise TensorFlow's AutoGraph replaces the exception


class UnsupportedReductionError(RuntimeError):
    """Horovod was called with a reduction that quantized gradients do not support."""

    __init__ = Exception.__init__


def explain_mismatch(
    configs: Sequence[Description],
    parameters: Sequence[Description],
    gradients: Sequence[Sequence[Description]],
) -> str:
    """Explain the difference between ranks, in the same words on every rank.

    Args:
        configs: every rank's configuration, in rank order.
        parameters: every rank's parameters by name, each with shape and dtype; none if names are unknown.
        gradients: gradients at which each rank noticed the mismatch: their ``name``, ``shape``, ``dtype``,
            and ``named``, whether the name is a parameter's or a place in the order of arrival.
    """
    if found := differences(configs):
        advice = "Give every rank the same compressor arguments."
        if found.keys() == {"compressor"}:
            advice = "Create the same compressors, in the same order, on every rank."
        if found.keys() <= {"resets", "schedule"}:
            advice = "Call the compressor's reset() on every rank."
        return (
            "hvd_quant is configured differently on the ranks: " + "; ".join(found.values()) + ". " + advice
        )
    if found := differences(parameters):
        some = list(found.values())
        more = f"; and {len(some) - _NAMED_AT_MOST} more" if len(some) > _NAMED_AT_MOST else ""
        return (
            "the ranks train different models: parameter "
            + "; parameter ".join(some[:_NAMED_AT_MOST])
            + more
            + " (shape and dtype; null where there is none). Give every rank the same model."
        )
    orders = [dict(enumerate(of_rank)) for of_rank in parameters]
    if found := differences(orders):
        return (
            "the ranks list their parameters in different orders: number "
            + next(iter(found.values()))
            + ". Give named_parameters in the same order on every rank."
        )
    everything = [gradient for of_rank in gradients for gradient in of_rank]
    if not everything:
        return (
            "the ranks have the same configuration and parameters now, but some rank had announced "
            "different ones before its reset(). Training can go on from here."
        )
    if not all(gradient["named"] for gradient in everything):
        return (
            "the ranks submitted their gradients in different orders, or different ones, and the compressor "
            "does not know the parameters' names. Pass it named_parameters=model.named_parameters(), or use "
            "hvd_quant.torch.DistributedOptimizer, which does so."
        )
    names = [[gradient["name"] for gradient in of_rank] for of_rank in gradients]
    everywhere = set.intersection(*map(set, names))
    some = [[name for name in of_rank if name not in everywhere][:_NAMED_AT_MOST] for of_rank in names]
    if found := differences([{"what others lack": of_rank} for of_rank in some]):
        return (
            "the ranks had different gradients in flight when the first result was requested: "
            + "; ".join(found.values())
            + ". Submit the same gradients on every rank before any result is used."
        )
    for of_ranks in zip(
        *(sorted(of_rank, key=lambda one: one["name"]) for of_rank in gradients), strict=True
    ):
        if found := differences(of_ranks):
            texts = "; ".join(found.values())
            return f"parameter {of_ranks[0]['name']!r} differs between the ranks: {texts}"
    return "the ranks have sent different bytes about the same gradients"


def differences(by_rank: Sequence[Description]) -> dict[str, str]:
    """Return, for every field that differs between ranks, its values and the ranks that have them."""
    found = {}
    for field in dict.fromkeys(field for description in by_rank for field in description):
        ranks: dict[str, list[int]] = {}
        for rank, description in enumerate(by_rank):
            ranks.setdefault(json.dumps(description.get(field)), []).append(rank)
        if len(ranks) > 1:
            values_text = ", ".join(
                f"{value} on rank{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}"
                for value, which in ranks.items()
            )
            found[field] = f"{field} is {values_text}"
    return found

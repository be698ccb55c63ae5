"""Measure the ranks' collectives, and predict the time of a training step from that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from hvd_quant import wire
from hvd_quant.cli.facts import Facts
from hvd_quant.cli.meeting import Meeting
from hvd_quant.cli.rules import Finding
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import quickest
from hvd_quant.schemes import QSGD

BYTES = 8 << 20  # about one fused bucket of gradients
SECONDS = 0.5  # to spend on each collective
REPEATS = 3, 30
SLOW_LATENCY = 5e-3
PARAMETERS = 25_600_000  # ResNet-50


@dataclass(frozen=True)
class Speed:
    """Speed of a collective.

    Args:
        latency: seconds that it takes with next to no data.
        rate: bytes per second that a rank ends up with, above the latency.
    """

    latency: float
    rate: float

    def seconds(self, size: float) -> float:
        """Return the seconds for a number of bytes."""
        return self.latency + size / self.rate


def measure(meeting: Meeting, payload: int = BYTES) -> dict[str, Speed]:
    """Measure all collectives; the result is the slowest rank's, the same on every rank.

    Args:
        meeting: two ranks or more; all call this together.
        payload: about how many bytes to send.
    """
    unit = 4 * meeting.size
    large = np.zeros(-(-payload // unit) * unit, np.uint8)
    speeds = {}
    for name, collective in meeting.collectives.items():
        latency = _median(meeting, collective, np.zeros(unit, np.uint8))
        seconds = _median(meeting, collective, large)
        speeds[name] = Speed(latency, large.size / max(seconds - latency, 1e-9))
    return speeds


def _median(meeting: Meeting, collective: Callable[[np.ndarray], object], array: np.ndarray) -> float:
    def once() -> float:
        begin = time.perf_counter()
        collective(array)
        return time.perf_counter() - begin

    once()
    first = max(meeting.gather(once()))  # so that all ranks repeat it equally often
    repeats = int(min(max(SECONDS / 2 / first, REPEATS[0]), REPEATS[1]))
    return max(meeting.gather(statistics.median(once() for _ in range(repeats))))


def predict(
    speeds: Mapping[str, Speed], size: int, codec: Facts, parameters: int = PARAMETERS
) -> dict[str, float]:
    """Predict the seconds that a step's gradients take, by how they are sent, from what was measured.

    Horovod sends its own in one message. Ours go in fused buckets, here one after the other, which is an
    upper bound.

    Args:
        speeds: as `measure` returns them.
        size: number of ranks.
        codec: codec of the slowest host, with ``encode_values_s`` and ``decode_values_s``.
        parameters: number of float32 values.
    """
    buckets = -(-4 * parameters // BYTES)
    values = parameters / buckets
    payload = wire.payload_size(QSGD(bits=4), round(values))
    encode, decode = (values / codec[f"{way}_values_s"] for way in ("encode", "decode"))
    return {
        "float32": speeds["allreduce"].seconds(4 * parameters),
        "fp16": speeds["allreduce"].seconds(2 * parameters),
        "4 bits, allgather": buckets * (encode + speeds["allgather"].seconds(size * payload) + size * decode),
        "4 bits, scatter_allgather": buckets
        * (
            encode
            + speeds["alltoall"].seconds(payload)
            + (decode + encode / size)
            + speeds["allgather"].seconds(payload)
            + decode
        ),
    }


def judge(
    speeds: Mapping[str, Speed], steps: Mapping[str, float], size: int, one_host: bool, hierarchical: bool
) -> Iterator[Finding]:
    """Return the findings about measured speeds.

    Args:
        speeds: as `measure` returns them.
        steps: as `predict` returns them.
        size: number of ranks.
        one_host: whether all ranks are on one host.
        hierarchical: whether the hierarchical exchange is available, which these speeds say nothing about.
    """
    for name, speed in speeds.items():
        if speed.latency > SLOW_LATENCY:
            yield Finding(
                "warning",
                "latency",
                f"An empty {name} takes {1e3 * speed.latency:.1f} ms.",
                "Every fused bucket of gradients waits so long at least.",
                "Look for more ranks than cores, HOROVOD_CYCLE_TIME, or a slow network; larger fusion_bytes "
                "make fewer buckets.",
            )
    if hierarchical:
        return
    own = {name.partition(", ")[2]: seconds for name, seconds in steps.items() if name.startswith("4 bits")}
    best = min(own, key=own.__getitem__)
    try:
        link = cost.link_from_environment(one_host, cost.HOROVOD_LATENCY)
    except ValueError:  # there is a rule for that
        return
    chosen = quickest(link, size, wire.payload_size(QSGD(bits=4), BYTES // 4), BYTES // 4)
    if own[chosen] > 1.25 * own[best]:
        yield Finding(
            "note",
            "exchange",
            f'exchange="auto" takes {chosen} here, and {best} is {own[chosen] / own[best]:.1f} x as fast.',
            "The choice is made by a model of the network, not by measurements.",
            f'Hand the compressor exchange="{best}".',
        )
    if own[best] > steps["fp16"]:
        yield Finding(
            "note",
            "no-gain",
            f"For {PARAMETERS / 1e6:.1f} M parameters 4 bits take {1e3 * own[best]:.0f} ms, and Horovod's "
            f"fp16 {1e3 * steps['fp16']:.0f} ms.",
            "The network between these ranks is not what a step waits for.",
            "Train without quantization here.",
        )


def as_json(speeds: Mapping[str, Speed], steps: Mapping[str, float]) -> Facts:
    """Return both as plain JSON values."""
    return {
        "collectives": {name: asdict(speed) for name, speed in speeds.items()},
        "step_seconds": dict(steps),
        "parameters": PARAMETERS,
    }

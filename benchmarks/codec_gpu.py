"""Speed of the codec on a GPU, at both of its levels, beside the speed at which the card copies its memory.

    python -m benchmarks.codec_gpu                         # the table and the goals
    python -m benchmarks.codec_gpu --markdown              # the table for a document
    python -m benchmarks.codec_gpu --json codec_gpu.json   # everything, for a program to read

Level 1 is made of plain torch operations; level 2 are hvd_quant's own kernels (see docs/gpu.md). "Of copy"
is the bytes a second that an encoder moves over those that `Tensor.copy_` does, read and written ones
counted. What level 1 moves is counted from its operations (benchmarks/traffic.py); level 2 reads the
values, mostly for a second time from registers or a cache, and writes the payload, so 4 bytes a value and the
payload count, its floor. The mean is of four payloads, and "x floor" its time over that in which the card
would copy as many bytes as the payloads and the result have.

Figures of the GPU are medians, timed by its own events while it is kept busy, so that it has not to wait for
the host; fewer values than its caches hold can be faster than a copy of many. What the host does for a
message is told apart, by its own clock: it may do that while the GPU computes. Beside them: a cast to
float16, what Horovod's own compression does, and bitsandbytes' block-wise 8-bit quantization, where that is
installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.step_time.report import print_table
from benchmarks.traffic import traffic_of
from hvd_quant import QSGD, wire
from hvd_quant.codec import cuda, torch_ops
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.codec.noise import Noise

MI = 1 << 20
VALUES = (1 * MI, 4 * MI, 16 * MI, 64 * MI, 256 * MI)
BITS = (2, 4, 8)
PAYLOADS = 4  # that the mean is of
HEADLINE = (64 * MI, 4)  # values, bits
LEVELS = {1: "off", 2: "auto"}  # as cuda.SWITCH says it
AHEAD = 20_000_000  # clock cycles that the GPU is kept busy, some 10 ms, while the host queues what is timed

# Goals for the headline.
LEVEL_1_BYTES, LEVEL_1_OF_COPY, LEVEL_1_KERNELS = 36.0, 0.7, 12
LEVEL_2_VALUES, MEAN_OF_FLOOR = 250e9, 2.0


@dataclass(frozen=True)
class Row:
    """What was measured of one level, at one number of bits and values."""

    level: int
    bits: int
    values: int
    encode: float  # seconds
    mean: float  # seconds
    encode_bytes: float  # a value, read and written
    kernels: int | None  # that encode starts; None where they are not counted
    payload_size: int
    copy: float  # bytes a second
    host_encode: float  # seconds until the host can go on
    host_mean: float  # likewise, with the wait for the GPU

    @property
    def encode_of_copy(self) -> float:
        return self.encode_bytes * self.values / self.encode / self.copy

    @property
    def mean_of_floor(self) -> float:
        return self.mean * self.copy / (PAYLOADS * self.payload_size + 4 * self.values)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"encode_of_copy": self.encode_of_copy, "mean_of_floor": self.mean_of_floor}


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of a call, the median."""
    for _ in range(2):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(AHEAD)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks))


def host_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Until a call returns, the mean. The GPU may not have done by then what it was told to."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def copy_speed(device: torch.device, count: int, repeats: int) -> float:
    """Bytes a second, read and written."""
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, repeats)


def choose(level: int) -> None:
    os.environ[cuda.SWITCH] = LEVELS[level]
    cuda.kernels.cache_clear()


def measure(x: torch.Tensor, bits: int, level: int, copy: float, repeats: int) -> Row:
    scheme, count = QSGD(bits), x.numel()
    size = wire.payload_size(scheme, count)
    layout = MessageLayout([Segment(0, 0, count, "float32", scheme)], bytes(PREAMBLE_SIZE))
    messages = [torch.empty(layout.size, dtype=torch.uint8, device=x.device) for _ in range(PAYLOADS)]
    for seed, message in enumerate(messages):
        torch_ops.encode_message(
            [x], layout, Noise(np.full(1, seed, np.uint64), np.zeros(1, np.uint32)), message
        )
    mean = torch.empty_like(x)

    def decode() -> None:
        # Without the wait for whether the messages are sound.
        if (kernels := cuda.kernels(x.device)) is not None:
            kernels.decode(messages, layout, [mean], 1.0)
        else:
            torch_ops.decode_messages(messages, layout, [mean])

    traffic = traffic_of(lambda: torch_ops.encode(x, scheme, 0)) if level == 1 else None
    return Row(
        level,
        bits,
        count,
        seconds(lambda: torch_ops.encode(x, scheme, 0), x.device, repeats),
        seconds(decode, x.device, repeats),
        traffic.bytes / count if traffic else 4 + size / count,
        len(traffic.operations) if traffic else None,
        size,
        copy,
        host_seconds(lambda: torch_ops.encode(x, scheme, 0), x.device, repeats),
        host_seconds(lambda: torch_ops.decode_messages(messages, layout, [mean]), x.device, repeats),
    )


def measure_others(device: torch.device, count: int, repeats: int) -> dict[str, float]:
    """Seconds that others need for as many values as the headline has."""
    x = torch.randn(count, device=device)
    found = {"cast to float16": seconds(x.half, device, repeats)}
    try:
        from bitsandbytes.functional import quantize_blockwise

        found["bitsandbytes, 8 bits"] = seconds(lambda: quantize_blockwise(x), device, repeats)
    except Exception as error:  # it is not installed, or not for this GPU
        print(f"without bitsandbytes: {error}", file=sys.stderr)
    return found


def check_goals(rows: list[Row]) -> list[dict[str, object]]:
    """The goals, what was measured, and whether that meets them."""
    checks: list[dict[str, object]] = []

    def check(text: str, measured: float, met: bool) -> None:
        checks.append({"goal": text, "measured": measured, "met": met})

    for row in rows:
        if (row.values, row.bits) != HEADLINE:
            continue
        if row.level == 1:
            check(
                f"level 1, encode: at most {LEVEL_1_BYTES:g} bytes a value",
                row.encode_bytes,
                row.encode_bytes <= LEVEL_1_BYTES,
            )
            check(
                f"level 1, encode: at least {LEVEL_1_OF_COPY:g} of copy speed",
                row.encode_of_copy,
                row.encode_of_copy >= LEVEL_1_OF_COPY,
            )
            check(
                f"level 1, encode: at most {LEVEL_1_KERNELS} kernels",
                row.kernels or 0,
                (row.kernels or 0) <= LEVEL_1_KERNELS,
            )
        else:
            rate = row.values / row.encode
            check(
                f"level 2, encode: at least {LEVEL_2_VALUES / 1e9:g} G values/s on an H200 or its like",
                rate,
                rate >= LEVEL_2_VALUES,
            )
            check(
                f"level 2, mean of {PAYLOADS}: at most {MEAN_OF_FLOOR:g} times the floor",
                row.mean_of_floor,
                row.mean_of_floor <= MEAN_OF_FLOOR,
            )
    return checks


HEADERS = (
    "codec",
    "Mi values",
    "encode G values/s",
    "bytes a value",
    "of copy",
    f"mean of {PAYLOADS} G values/s",
    "x floor",
)


def cells_of(rows: list[Row], others: dict[str, float], count: int) -> list[tuple[str, ...]]:
    cells = [
        (
            f"level {row.level}, {row.bits} bits",
            f"{row.values / MI:g}",
            f"{row.values / row.encode / 1e9:.3g}",
            f"{row.encode_bytes:.2f}",
            f"{row.encode_of_copy:.2f}",
            f"{row.values / row.mean / 1e9:.3g}",
            f"{row.mean_of_floor:.1f}",
        )
        for row in rows
    ]
    for name, taken in others.items():
        cells.append((name, f"{count / MI:g}", f"{count / taken / 1e9:.3g}", "", "", "", ""))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--values", type=int, nargs="+", default=VALUES, help="how many to encode")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, help="a value (default: 2 4 8)")
    parser.add_argument("--repeats", type=int, default=20, help="runs that count (default: 20)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that this program runs")
    parser.add_argument("--markdown", action="store_true", help="print the table for GitHub")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    args = parser.parse_args()
    if min(args.values) < 1 or args.repeats < 1:
        parser.error("--values and --repeats must be positive")
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("There is no GPU that torch can use.")
        device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    rows = []
    largest = max(args.values)
    copy = copy_speed(device, largest, args.repeats)
    for level in LEVELS:
        choose(level)
        if level == 2 and cuda.kernels(device) is None:
            print("level 2 is not to be had here: see docs/gpu.md", file=sys.stderr)
            continue
        for count in args.values:
            x = torch.randn(count, device=device)
            for bits in args.bits:
                print(f"level {level}, {bits} bits, {count / MI:g} Mi values", file=sys.stderr, flush=True)
                rows.append(measure(x, bits, level, copy, args.repeats))
    others = measure_others(device, largest, args.repeats)
    goals = check_goals(rows)

    print(
        f"{card}, torch {torch.__version__}; copies {copy / 1e12:.3g} TB/s, read and written ones counted\n"
    )
    print_table(HEADERS, cells_of(rows, others, largest), args.markdown)
    for level, row in {row.level: row for row in reversed(rows) if row.bits == HEADLINE[1]}.items():
        print(
            f"host, level {level}, {row.values / MI:g} Mi values: {row.host_encode * 1e6:.0f} us to encode, "
            f"{row.host_mean * 1e6:.0f} us for the mean and to wait for it"
        )
    for goal in goals:
        print(f"{'met' if goal['met'] else 'NOT MET'}: {goal['goal']}: {goal['measured']:.4g}")
    if args.json:
        everything = {
            "device": card,
            "torch": torch.__version__,
            "copy": copy,
            "rows": [row.as_dict() for row in rows],
            "others": {"values": largest, "seconds": others},
            "goals": goals,
        }
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Speed of the native codec on one thread, beside memory's own and that of codecs made of torch operations.

    python benchmarks/codec.py                         # a minute or two, 2 GB of memory
    python benchmarks/codec.py --markdown              # the table as it stands in README.md
    python benchmarks/codec.py --json codec.json       # everything, for a program to read

Speeds are in values a second. They differ between machines; the ratios should differ less:

- "of read": the bytes a second that must move (encode: the values read; mean of 2: two payloads read, the
  values written), over the speed at which NumPy's quickest reduction reads the same float32 array. With
  fewer values than the caches hold (--values), that is the speed of a cache, and the ratios are lower;
- "x eager": speed of encode over that of the same quantizer in eager torch operations, torch_ops.encode.

A second table has what correlated rounding and error feedback cost an encoder. Its runs take turns, so that
other work on the machine slows all alike. Error feedback reads and writes one more array of the values' size;
what that adds is compared with the time in which NumPy adds one array to another.

The native codec counts with the median of its runs, what it is compared with counts with the best of theirs:
other work on the machine can make the ratios worse, but hardly better. Native encode allocates its payload in
every call, as it does for users; decode writes to memory that it is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

# NumPy and torch read these when they are imported.
os.environ.update(HVD_QUANT_THREADS="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np
import torch

import hvd_quant
from hvd_quant import NUQSGD, QSGD, wire
from hvd_quant.codec import native, torch_ops
from hvd_quant.schemes import CODINGS, Scheme

HEADLINE = (4, "max")
EAGER_VALUES, EAGER_REPEATS = 8 << 20, 3  # eager torch is slow

# Goals for the headline row; how much slower another row may be.
ENCODE_OF_EAGER, ENCODE_OF_READ, MEAN_OF_READ = 25.0, 0.40, 0.45
SLOWER = 1.5
NUQSGD_OF_QSGD = 0.7
CODED_OF_PACKED = 0.1
CORRELATED_OF_INDEPENDENT = 0.8


@dataclass(frozen=True)
class Speeds:
    """Values a second."""

    encode: float
    decode: float
    mean: float  # of two payloads


@dataclass(frozen=True)
class Row:
    """What was measured of one scheme, at one time."""

    scheme: str
    bits: int
    norm: str
    coding: str
    values: int
    payload_size: int
    native: Speeds
    eager: Speeds
    read: float  # bytes a second
    read_by: str

    @property
    def encode_of_read(self) -> float:
        return 4 * self.native.encode / self.read

    @property
    def mean_of_read(self) -> float:
        return (2 * self.payload_size / self.values + 4) * self.native.mean / self.read

    @property
    def encode_of_eager(self) -> float:
        return self.native.encode / self.eager.encode

    def as_dict(self) -> dict[str, object]:
        ratios = ("encode_of_read", "mean_of_read", "encode_of_eager")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


@dataclass(frozen=True)
class OptionsRow:
    """Seconds of one encode of the same values with different options, each the median of its runs."""

    scheme: str
    bits: int
    norm: str
    independent: float
    correlated: float
    nearest: float
    error_feedback: float  # nearest, as it is by default
    add: float  # NumPy adding one array to another in place


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- measuring ------------------------------------------------------------------------------------------


def run_times(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after one that does not count."""
    call()
    return [run_time(call) for _ in range(repeats)]


def run_time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def streaming_read(x: np.ndarray) -> tuple[float, str]:
    """Bytes a second of the quickest of several reductions of ``x``, and its name."""
    reductions: dict[str, Callable[[], object]] = {
        "np.max": lambda: np.max(x),
        "np.sum": lambda: np.sum(x),
        "np.dot": lambda: np.dot(x, x),
        "np.bitwise_or": lambda: np.bitwise_or.reduce(x.view(np.int64)),
    }
    return max((x.nbytes / min(run_times(call, 3)), name) for name, call in reductions.items())


def measure(scheme: Scheme, x: np.ndarray, repeats: int) -> Row:
    out = np.empty_like(x)
    payloads = [native.encode(x, scheme, seed) for seed in (1, 2)]
    calls = [
        lambda: native.encode(x, scheme, 0),
        lambda: native.decode_mean(payloads[:1], out=out),
        lambda: native.decode_mean(payloads, out=out),
    ]
    reads, speeds = [streaming_read(x)], []
    for call in calls:
        speeds.append(x.size / statistics.median(run_times(call, repeats)))
        reads.append(streaming_read(x))
    read, read_by = max(reads)
    payload_size = payloads[0].nbytes
    return Row(
        type(scheme).__name__,
        scheme.bits,
        scheme.norm,
        scheme.coding,
        x.size,
        payload_size,
        Speeds(*speeds),
        measure_eager(scheme, x),
        read,
        read_by,
    )


def measure_options(scheme: Scheme, x: np.ndarray, repeats: int) -> OptionsRow:
    residual = np.zeros_like(x)
    total = np.zeros_like(x)
    correlated, nearest = (replace(scheme, rounding=rounding) for rounding in ("correlated", "nearest"))
    calls: list[Callable[[], object]] = [
        lambda: native.encode(x, scheme, 0),
        lambda: native.encode(x, correlated, 0, 1 << 31),
        lambda: native.encode(x, nearest, 0),
        lambda: native.encode(x, nearest, 0, residual=residual),
        lambda: np.add(total, x, out=total),
    ]
    for call in calls:
        call()
    turns = [[run_time(call) for call in calls] for _ in range(repeats)]
    return OptionsRow(
        type(scheme).__name__, scheme.bits, scheme.norm, *map(statistics.median, zip(*turns, strict=True))
    )


def best_speeds(count: int, *calls: Callable[[], object]) -> Speeds:
    return Speeds(*(count / min(run_times(call, EAGER_REPEATS)) for call in calls))


def measure_eager(scheme: Scheme, x: np.ndarray) -> Speeds:
    values = torch.from_numpy(x[:EAGER_VALUES])
    payloads = [torch_ops.encode(values, scheme, seed) for seed in (1, 2)]
    return best_speeds(
        values.numel(),
        lambda: torch_ops.encode(values, scheme, 0),
        lambda: torch_ops.decode_mean(payloads[:1]),
        lambda: torch_ops.decode_mean(payloads),
    )


def measure_grace(x: np.ndarray) -> Speeds | None:
    """GRACE's QSGD (github.com/sands-lab/grace), as many levels as 4 bits have; None if it is not there."""
    try:
        from grace_dl.torch.compressor.qsgd import QSGDCompressor
    except ImportError:
        return None
    values = torch.from_numpy(x[:EAGER_VALUES])
    codec = QSGDCompressor(QSGD(bits=4).num_levels)
    sent = [codec.compress(values, "benchmark") for _ in range(2)]
    return best_speeds(
        values.numel(),
        lambda: codec.compress(values, "benchmark"),
        lambda: codec.decompress(*sent[0]),
        lambda: codec.aggregate([codec.decompress(*one) for one in sent]) / 2,
    )


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def encode_growth(count: int, bucket_size: int) -> int:
    """Bytes by which one native encode raises this process's peak memory, its payload included."""
    x = np.random.default_rng(0).standard_normal(count, np.float32)
    native.encode(x[:1], QSGD(), 0)
    before = status_bytes("VmRSS")
    payload = native.encode(x, QSGD(*HEADLINE, bucket_size), 0)
    assert payload.nbytes
    return status_bytes("VmHWM") - before


def peak_memory(count: int, bucket_size: int) -> dict[str, int] | None:
    """Growth and payload size of one encode, in a process whose peak nothing else has raised; Linux only."""
    if not Path("/proc/self/status").exists():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        growth = pool.submit(encode_growth, count, bucket_size).result()
    payload_size = wire.payload_size(QSGD(*HEADLINE, bucket_size), count)
    return {"payload": payload_size, "temporary": max(0, growth - payload_size)}


# --- reporting ------------------------------------------------------------------------------------------

HEADERS = (
    "codec",
    "encode G/s",
    "decode G/s",
    "mean of 2 G/s",
    "encode, of read",
    "mean, of read",
    "x eager",
)


def table_rows(rows: list[Row], grace: Speeds | None) -> list[tuple[str, ...]]:
    def giga(speeds: Speeds) -> tuple[str, ...]:
        return tuple(f"{speed / 1e9:.3g}" for speed in (speeds.encode, speeds.decode, speeds.mean))

    def ratios(row: Row) -> tuple[str, ...]:
        return f"{row.encode_of_read:.2f}", f"{row.mean_of_read:.2f}", f"{row.encode_of_eager:.0f}"

    def name(row: Row) -> str:
        coding = "" if row.coding == "packed" else f", {row.coding}"
        return f"{row.scheme}, {row.bits} bits, {row.norm}{coding}"

    cells = [(name(row), *giga(row.native), *ratios(row)) for row in rows]
    eager = headline(rows).eager
    cells.append(("eager torch, QSGD, {} bits, {}".format(*HEADLINE), *giga(eager), "", "", "1"))
    if grace:
        cells.append(("GRACE QSGD, int8, l2", *giga(grace), "", "", f"{grace.encode / eager.encode:.2g}"))
    return cells


OPTIONS_HEADERS = (
    "encode",
    "independent G/s",
    "correlated, of independent",
    "error feedback, of independent",
    "added by error feedback, of an addition",
)


def options_rows(rows: list[OptionsRow], count: int) -> list[tuple[str, ...]]:
    return [
        (
            f"{row.scheme}, {row.bits} bits, {row.norm}",
            f"{count / row.independent / 1e9:.3g}",
            f"{row.independent / row.correlated:.2f}",
            f"{row.independent / row.error_feedback:.2f}",
            f"{(row.error_feedback - row.nearest) / row.add:.1f}",
        )
        for row in rows
    ]


def print_table(headers: tuple[str, ...], cells: list[tuple[str, ...]], markdown: bool) -> None:
    if not markdown:
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for number, header in enumerate(headers):
                table.add_column(header, justify="right" if number else "left")
            for row in cells:
                table.add_row(*row)
            # A pipe has no width: let the table have its own.
            Console(width=None if sys.stdout.isatty() else 120).print(table)
            return
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    rule = [("-" * (width - 1) + ":") if number else "-" * width for number, width in enumerate(widths)]
    for row in (headers, rule, *cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def headline(rows: list[Row]) -> Row:
    return next(row for row in rows if (row.scheme, row.bits, row.norm) == ("QSGD", *HEADLINE))


def check_goals(rows: list[Row], options: list[OptionsRow]) -> list[dict[str, object]]:
    """The goals, what was measured, and whether that meets them."""
    coded = [row for row in rows if row.coding != "packed"]
    rows = [row for row in rows if row.coding == "packed"]
    top = headline(rows)
    goals = [
        (f"encode at least {ENCODE_OF_EAGER:g} x eager torch", top.encode_of_eager, ENCODE_OF_EAGER),
        (f"encode at least {ENCODE_OF_READ:.2f} of streaming read", top.encode_of_read, ENCODE_OF_READ),
        (f"mean of 2 at least {MEAN_OF_READ:.2f} of streaming read", top.mean_of_read, MEAN_OF_READ),
    ]
    checks: list[dict[str, object]] = [
        {"goal": text, "measured": measured, "met": measured >= goal} for text, measured, goal in goals
    ]
    slower, where = max(
        (getattr(top.native, name) / getattr(row.native, name), f"{name}, {row.bits} bits, {row.norm}")
        for row in rows
        if row.scheme == "QSGD"
        for name in ("encode", "mean")
    )
    text = f"QSGD, encode and mean of 2: no other row more than {SLOWER:g} times slower (slowest: {where})"
    checks.append({"goal": text, "measured": slower, "met": slower <= SLOWER})
    uniform = {(row.bits, row.norm): row.native for row in rows if row.scheme == "QSGD"}
    ratio, where = min(
        (row.native.encode / uniform[row.bits, row.norm].encode, f"{row.bits} bits, {row.norm}")
        for row in rows
        if row.scheme == "NUQSGD"
    )
    text = f"NUQSGD, encode: at least {NUQSGD_OF_QSGD:g} of QSGD's rate (slowest: {where})"
    checks.append({"goal": text, "measured": ratio, "met": ratio >= NUQSGD_OF_QSGD})
    packed = {(row.scheme, row.bits, row.norm): row.native for row in rows}
    ratio, where = min(
        (
            getattr(row.native, name) / getattr(packed[row.scheme, row.bits, row.norm], name),
            f"{name}, {row.scheme}, {row.bits} bits, {row.norm}, {row.coding}",
        )
        for row in coded
        for name in ("encode", "decode")
    )
    text = f"Elias and Huffman: at least {CODED_OF_PACKED:g} of the packed rate (slowest: {where})"
    checks.append({"goal": text, "measured": ratio, "met": ratio >= CODED_OF_PACKED})
    ratio, where = min(
        (row.independent / row.correlated, f"{row.scheme}, {row.bits} bits") for row in options
    )
    text = f"Correlated rounding: at least {CORRELATED_OF_INDEPENDENT:g} of independent (slowest: {where})"
    checks.append({"goal": text, "measured": ratio, "met": ratio >= CORRELATED_OF_INDEPENDENT})
    return checks


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--values", type=int, default=64 << 20, help="values to encode (default: 64 Mi)")
    parser.add_argument("--bucket-size", type=int, default=512, help="values a norm (default: 512)")
    parser.add_argument("--repeats", type=int, default=7, help="runs that count (default: 7)")
    parser.add_argument("--markdown", action="store_true", help="print the table for GitHub")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    args = parser.parse_args()
    if args.values < 2 or args.values % 2 or args.repeats < 1:
        parser.error("--values must be even and positive, --repeats positive")

    try:
        schemes = [
            kind(bits, norm, args.bucket_size, coding)
            for coding in CODINGS
            for kind in (QSGD, NUQSGD)
            for norm in ("max", "l2")
            for bits in (2, 3, 4, 8)
        ]
    except ValueError as error:
        parser.error(str(error))

    torch.set_num_threads(1)
    progress("peak memory of one encode ...")
    memory = peak_memory(args.values, args.bucket_size)
    x = np.random.default_rng(0).standard_normal(args.values, np.float32)
    rows = []
    for number, scheme in enumerate(schemes, 1):
        progress(
            f"{number} of {len(schemes)}: {type(scheme).__name__}, {scheme.bits} bits, {scheme.norm} norm ..."
        )
        rows.append(measure(scheme, x, args.repeats))
    options = []
    for scheme in (kind(bits, bucket_size=args.bucket_size) for kind in (QSGD, NUQSGD) for bits in (2, 4, 8)):
        progress(f"options: {type(scheme).__name__}, {scheme.bits} bits ...")
        options.append(measure_options(scheme, x, args.repeats))
    grace = measure_grace(x)
    eager_values = min(args.values, EAGER_VALUES)
    fastest = max(rows, key=lambda row: row.read)
    checks = check_goals(rows, options)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "isa": hvd_quant.native_isa(),
        "threads": 1,
        "versions": {
            "hvd_quant": hvd_quant.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "values": args.values,
        "bucket_size": args.bucket_size,
        "repeats": args.repeats,
        "eager_values": eager_values,
        "rows": [row.as_dict() for row in rows],
        "options": [asdict(row) for row in options],
        "grace": grace and asdict(grace),
        "memory": memory,
        "goals": checks,
    }
    print(f"{result['cpu']}, {result['isa']}, one thread, {str(result['date'])[:10]}.")
    print(f"{args.values / 2**20:g} Mi values ({eager_values / 2**20:g} Mi for torch operations), ", end="")
    print(f"buckets of {args.bucket_size}, torch {torch.__version__}, NumPy {np.__version__}.\n")
    print_table(HEADERS, table_rows(rows, grace), args.markdown)
    print()
    print_table(OPTIONS_HEADERS, options_rows(options, x.size), args.markdown)
    print()
    if grace is None:
        print("- GRACE was not there to compare with (no module grace_dl).")
    print(f"- Streaming read: {fastest.read / 1e9:.1f} GB/s ({fastest.read_by}); ratios take each row's own.")
    if memory:
        print(
            f"- Memory of one encode at {HEADLINE[0]} bits: {memory['payload'] / 2**20:.2f} MiB of payload, "
            f"and temporaries of {memory['temporary'] / 2**10:.0f} KiB at its peak."
        )
    for check in checks:
        print(f"- {'met' if check['met'] else 'NOT MET'}: {check['goal']}: {check['measured']:.3g}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Bits a value of every coding, beside the order-0 entropy of the codes and the bounds of the QSGD paper.

Theorem 3.2, for the l2 norm and a bucket of d values: at most
(3 + (3/2 + o(1)) log2(2 (s^2 + d) / (s (s + sqrt d)))) s (s + sqrt d) + 32 bits expected; its o(1) is left
out here. That is the paper's code for sparse vectors: at s = sqrt(d) it allows 9 d + 32. For dense ones the
paper has another, with 2.8 d + 32 at s = sqrt(d). Bounds count the norm's 32 bits, and so do the sizes
here: all of the payload but the header. The entropy is that of the codes alone.
Intervals are over the seeds of the rounding, by Student's t.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

import hvd_quant
from benchmarks.papers.report import (
    COLOURS,
    MARKERS,
    Record,
    figure,
    grouped,
    interval,
    legend_below,
    plus_minus,
    progress,
)
from benchmarks.papers.variance import gradients
from hvd_quant import QSGD, wire
from hvd_quant.schemes import CODINGS

DRAWS = 5
LONG = 1 << 20  # values, beside which the tables of a Huffman code are nothing
BITS = (2, 3, 4, 5, 6, 8)
SQUARE = "l2, d = s²"  # where the paper's dense code takes at most 2.8 d + 32
CASES = {
    "l2, d = 512": ("l2", lambda bits: 512),
    "max, d = 512": ("max", lambda bits: 512),
    SQUARE: ("l2", lambda bits: (2 ** (bits - 1) - 1) ** 2),
    "l2, d = 8192": ("l2", lambda bits: 8192),
    "max, d = 8192": ("max", lambda bits: 8192),
}
PLOTTED = tuple(CASES)[:3]


def code_entropy(payload: np.ndarray) -> float:
    """Order-0 entropy, bits a value, of the codes of a packed payload."""
    header = wire.parse_header(bytes(payload[: wire.HEADER_SIZE]), payload.size)
    begin = wire.HEADER_SIZE + 4 * math.ceil(header.count / header.scheme.bucket_size)
    bits = np.unpackbits(payload[begin:], bitorder="little")[: header.count * header.scheme.bits]
    codes = bits.reshape(-1, header.scheme.bits) @ (1 << np.arange(header.scheme.bits))
    share = np.bincount(codes) / header.count
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def bound(s: int, d: int) -> float:
    """Theorem 3.2, bits a value, o(1) left out."""
    reach = s * (s + math.sqrt(d))
    return ((3 + 1.5 * math.log2(2 * (s**2 + d) / reach)) * reach + 32) / d


def run(workers: int) -> list[Record]:
    records = []
    progress("  recording gradients of a training run")
    random = np.random.default_rng(0)
    shapes = gradients() | {
        "Gaussian, 2^20": random.standard_normal(LONG).astype(np.float32),
        "Student t, 3, 2^20": random.standard_t(3, LONG).astype(np.float32),
    }
    for shape, x in shapes.items():
        for case, (norm, size) in CASES.items():
            if x.size == LONG and not case.endswith("8192"):
                continue
            for bits in BITS:
                d = size(bits)
                if d < 2:
                    continue
                scheme = QSGD(bits=bits, norm=norm, bucket_size=d)
                entropies = [code_entropy(hvd_quant.encode(x, scheme, seed=seed)) for seed in range(DRAWS)]
                record = {"gradient": shape, "values": x.size, "case": case, "bits": bits, "bucket_size": d}
                record["norms"] = 32 * math.ceil(x.size / d) / x.size  # bits a value
                record["entropy"], record["entropy_half"] = interval(entropies)
                record["bound"] = bound(scheme.num_levels, d) if norm == "l2" else None
                for coding in CODINGS:
                    coded = QSGD(bits=bits, norm=norm, bucket_size=d, coding=coding)
                    sizes = [
                        8 * (hvd_quant.encode(x, coded, seed=seed).size - wire.HEADER_SIZE) / x.size
                        for seed in range(DRAWS)
                    ]
                    record[coding], record[f"{coding}_half"] = interval(sizes)
                records.append(record)
    return records


def dense_bound(one: Record) -> float:
    """2.8 d + 32, bits a value."""
    return 2.8 + 32 / one["bucket_size"]


HEADERS = (
    "gradient",
    "case",
    "bits",
    "d",
    "norms",
    "entropy of codes",
    *CODINGS,
    "Theorem 3.2",
    "2.8 + 32 / d",
)


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    return [
        (
            one["gradient"],
            one["case"],
            str(one["bits"]),
            str(one["bucket_size"]),
            f"{one['norms']:.3f}",
            plus_minus(one["entropy"], one["entropy_half"], digits=3),
            *(plus_minus(one[coding], one[f"{coding}_half"], digits=3) for coding in CODINGS),
            f"{one['bound']:.2f}" if one["bound"] else "",
            f"{dense_bound(one):.2f}" if one["case"] == SQUARE else "",
        )
        for one in records
    ]


def notes(records: list[Record]) -> list[str]:
    bounded = [one for one in records if one["bound"]]
    squares = [one for one in records if one["case"] == SQUARE]
    within = sum(one["elias"] <= one["bound"] for one in bounded)
    within_dense = sum(one["elias"] <= dense_bound(one) for one in squares)
    lines = [
        f"Elias codes are within Theorem 3.2 in {within} of {len(bounded)} cases of the l2 norm, and within "
        f"2.8 d + 32 bits in {within_dense} of {len(squares)} of d = s².",
    ]
    groups = grouped([one for one in records if one["case"] != SQUARE], "bucket_size", "values")
    for (size, values), ones in groups.items():
        for coding in ("elias", "huffman"):
            over = [100 * ((one[coding] - one["norms"]) / one["entropy"] - 1) for one in ones]
            lines.append(
                f"{values} values, d = {size}: {coding} codes take {min(over):.1f} to {max(over):.1f} % more "
                "than the entropy, norms apart."
            )
    return lines


def plot(records: list[Record], path: Path) -> None:
    fig, axes = figure(1, len(PLOTTED), width=11, height=4, sharey=True)
    chosen = "trained, epoch 3"
    groups = grouped([one for one in records if one["gradient"] == chosen], "case")
    for axis, case in zip(axes[0], PLOTTED, strict=True):
        ones = groups[case,]
        bits = [one["bits"] for one in ones]
        for number, coding in enumerate(CODINGS):
            values = [one[coding] for one in ones]
            axis.plot(
                bits, values, color=COLOURS[number], marker=MARKERS[number], label=f"{coding}, with norms"
            )
        total = [one["entropy"] + one["norms"] for one in ones]
        axis.plot(bits, total, color=COLOURS[-1], linestyle="--", label="entropy of the codes, and norms")
        if ones[0]["bound"]:
            bounds = [one["bound"] for one in ones]
            axis.plot(bits, bounds, color=COLOURS[3], linestyle=":", label="Theorem 3.2")
        if case == SQUARE:
            dense = [dense_bound(one) for one in ones]
            axis.plot(bits, dense, color=COLOURS[4], linestyle="-.", label="2.8 d + 32")
        axis.set_title(f"{chosen}, {case}", fontsize=9)
        axis.set_xlabel("bits of a packed code")
        axis.set_ylim(0, 12)
    axes[0, 0].set_ylabel("bits a value")
    legend_below(fig, axes[0, -1], columns=6)
    fig.savefig(path, dpi=120)

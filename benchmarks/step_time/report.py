"""Tables, goals and a plot of what `benchmarks.step_time` has measured."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.netlab import parse_rate
from benchmarks.step_time import before
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import ALGORITHMS

COMPUTE, FP32, FP16, OURS = "compute alone", "Horovod fp32", "Horovod fp16", "hvd_quant 4 bits"
EXCHANGES = ALLGATHER, SCATTER = "4 bits, allgather", "4 bits, scatter-allgather"
BY_HOSTS = "4 bits, hierarchical"
NO_FUSION = "4 bits, no fusion"
OWN = "4 bits, "  # how our ablations' names begin
GRACE = "GRACE QSGD int8"


@dataclass
class Case:
    """A model on a number of hosts with links of a rate, and what was measured."""

    name: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # from turns.measure
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model, self.rate, where = self.name.split("/")
        hosts, _, slots = where.partition("x")
        self.hosts = int(hosts)
        self.slots = int(slots or (2 if self.hosts == 1 else 1))
        self.ranks = self.hosts * self.slots

    @property
    def title(self) -> str:
        link = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "10gbit": "10 Gbit/s"}.get(self.rate, self.rate)
        each = f" of {self.slots} ranks" if self.slots > 1 else ""
        return f"{link}, {self.hosts} hosts{each}" if self.hosts > 1 else f"{link}, 1 host, 2 ranks"

    def median(self, row: str) -> float:
        """Seconds; raises KeyError if the row was not measured."""
        return statistics.median(self.rows[row]["seconds"])

    def quartiles(self, row: str) -> tuple[float, float]:
        """Seconds."""
        first, _, third = statistics.quantiles(self.rows[row]["seconds"], n=4, method="inclusive")
        return first, third

    @property
    def share(self) -> float:
        """Payloads that a rank must receive, at least, to have its part in everyone's mean."""
        return 2 * (self.ranks - 1) / self.ranks

    @property
    def wire(self) -> float | None:
        """Seconds that these take at 4 bits at the link's rate, headers of the network left out."""
        if self.rate == "unshaped":
            return None
        return 8 * self.share * self.rows[OURS]["payload_bytes"] / parse_rate(self.rate)

    @property
    def floor(self) -> float | None:
        """Seconds to compute, then receive."""
        return None if self.wire is None else self.median(COMPUTE) + self.wire

    def as_dict(self) -> dict[str, Any]:
        measured = OURS in self.rows
        floor = {"wire_seconds": self.wire, "floor_seconds": self.floor} if measured else {}
        return {"case": self.name, "rows": self.rows, "failures": self.failures, **floor}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import horovod

    import hvd_quant

    distributions = metadata.packages_distributions()
    frameworks = {
        name: metadata.version(distributions[name][0])
        for name in ("torch", "tensorflow")
        if name in distributions
    }
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        **frameworks,
        "horovod": horovod.__version__,
        "hvd_quant": hvd_quant.__version__,
    }


# --- goals ----------------------------------------------------------------------------------------------


def goals(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The goals of the cases that were measured: what was measured, and whether that meets them."""
    found: list[dict[str, Any]] = []

    def goal(case: Case, text: str, measured: float, met: bool) -> None:
        found.append({"case": case.name, "goal": text, "measured": measured, "met": met})

    for case in cases:
        if OURS not in case.rows or OURS + before.SUFFIX in case.rows:
            continue
        ours = case.median(OURS)
        of_fp32 = case.median(FP32) / ours
        if case.name in ("linear/1gbit/2", "linear/1gbit/4"):
            of_fp16 = case.median(FP16) / ours
            goal(case, "4 bits at least 6 x as fast as Horovod fp32", of_fp32, of_fp32 >= 6)
            goal(case, "4 bits at least 3 x as fast as Horovod fp16", of_fp16, of_fp16 >= 3)
        if case.name == "linear/1gbit/2":
            others = [row for row in case.rows if not row.startswith((COMPUTE, "hvd_quant", OWN))]
            best = min(others, key=case.median)
            ratio = case.median(best) / ours
            goal(case, f"4 bits faster than everything else (next: {best})", ratio, ratio > 1)
            of_floor = ours / case.floor
            goal(case, "4 bits at most 1.5 x the floor", of_floor, of_floor <= 1.5)
            own = 1e3 * case.rows[OURS]["own_seconds"]
            goal(case, "own CPU time of a fused bucket below 0.5 ms", own, own < 0.5)
        if case.model == "linear" and case.rate in ("10gbit", "unshaped"):
            goal(case, "4 bits not slower than Horovod fp32", of_fp32, of_fp32 >= 1)
        if case.ranks == 8 and SCATTER in case.rows:
            row = case.rows[SCATTER]
            ratio = row["received_bytes"] / (case.share * row["payload_bytes"])
            text = f"scatter-allgather: a rank receives {case.share:g} payloads, within 10 %"
            goal(case, text, ratio * case.share, abs(ratio - 1) <= 0.1)
        if case.name == "small/unshaped/1":
            goal(case, "4 bits at most 1.3 x Horovod fp32", 1 / of_fp32, 1 / of_fp32 <= 1.3)
    return found


# --- text -----------------------------------------------------------------------------------------------


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """First column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |" if markdown else "   ".join([first, *others])

    rule = ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)]
    print("\n".join([line(header), *([line(rule)] if markdown else []), *map(line, rows)]) + "\n")


def cell(case: Case, row: str) -> str:
    """Milliseconds: median and quartiles."""
    if row not in case.rows:
        return "failed" if case.failures else ""
    numbers = [
        f"{1e3 * x:.{0 if case.median(row) >= 0.1 else 1}f}" for x in (case.median(row), *case.quartiles(row))
    ]
    return "{} ({} to {})".format(*numbers)


def floor_cell(case: Case) -> str:
    if OURS not in case.rows or case.floor is None:
        return ""
    return f"{1e3 * case.median(COMPUTE):.1f} + {1e3 * case.wire:.1f} = {1e3 * case.floor:.1f}"


def ratio_cell(case: Case) -> str:
    if OURS not in case.rows:
        return ""
    return ", ".join(f"{case.median(row) / case.median(OURS):.2f}" for row in (FP32, FP16))


def print_all(
    cases: Sequence[Case], checks: Sequence[dict[str, Any]], here: dict[str, Any], markdown: bool
) -> None:
    """Everything as text; ``here`` is the `machine` that it was measured on."""
    names = ("torch", "tensorflow", "horovod", "hvd_quant")
    versions = ", ".join(f"{name} {here[name]}" for name in names if name in here)
    print(f"{here['cpu']}, {here['cores']} cores, one thread a rank; {versions}.")
    print("Milliseconds a step: median (quartiles).\n")
    for model in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == model]
        names = list(dict.fromkeys(row for case in own for row in case.rows))
        rows = [[name, *(cell(case, name) for case in own)] for name in names]
        if any(floors := [floor_cell(case) for case in own]):
            rows.append(["floor at 4 bits: compute + wire", *floors])
        if any(ratios := [ratio_cell(case) for case in own]):
            rows.append(["4 bits, times as fast as fp32, fp16", *ratios])
        if rows:
            print_table([model, *(case.title for case in own)], rows, markdown)
    # The link's rate changes none of this.
    distinct = {(case.model, case.ranks, case.slots): case for case in reversed(cases) if OURS in case.rows}
    rows = [
        [
            f"{case.model}, {case.ranks} ranks, {name.removeprefix('hvd_quant ')}",
            f"{row['payload_bytes'] / 1e6:.2f}",
            f"{row['received_bytes'] / 1e6:.2f}",
            f"{row['received_bytes'] / row['payload_bytes']:.2f}",
            f"{case.share:.2f}",
            f"{row['buckets']:g}",
            f"{row['gradients'] / row['buckets']:g}",
            f"{1e3 * row['own_seconds']:.2f}" if "own_seconds" in row else "",
        ]
        for case in reversed(distinct.values())
        for name, row in case.rows.items()
        if name in (OURS, NO_FUSION, BY_HOSTS, *EXCHANGES)
    ]
    header = (
        "",
        "payload, MB",
        "received, MB",
        "payloads",
        "2 (n - 1) / n",
        "buckets",
        "gradients in a bucket",
        "own CPU, ms a bucket",
    )
    if rows:
        print("What a rank receives in a step, and CPU time of a fused bucket, its codec's apart.\n")
        print_table(header, rows, markdown)
    print_before(cases, markdown)
    print_model(cases, markdown)
    if not any(GRACE in case.rows for case in cases):
        print("- GRACE was not there to compare with (it needs grace_dl and the Horovod that this patches).")
    for case in cases:
        for what, why in case.failures.items():
            print(f"- FAILED: {case.name}, {what}: {why.splitlines()[0]}")
    for check in checks:
        met = "met" if check["met"] else "NOT MET"
        print(f"- {met}: {check['case']}: {check['goal']}: {check['measured']:.3g}")


def print_before(cases: Sequence[Case], markdown: bool) -> None:
    """Compare with another checkout's package."""
    rows = []
    for case in cases:
        for name, row in case.rows.items():
            if (former := case.rows.get(name + before.SUFFIX)) is not None:
                middle, low, high = before.ratio(former["seconds"], row["seconds"])
                rows.append([f"{case.name}, {name}", f"{middle:.3f} ({low:.3f} to {high:.3f})"])
    if rows:
        print("A step over one with the other checkout, median over rounds (95 % interval).\n")
        print_table(["", "after / before"], rows, markdown)


def print_model(cases: Sequence[Case], markdown: bool) -> None:
    """What exchange="auto" goes by, beside what was measured."""
    rows = []
    for case in cases:
        if case.rate == "unshaped" or not all(row in case.rows for row in EXCHANGES):
            continue
        slots = case.slots if case.hosts > 1 else 1
        link = cost.Link(cost.HOROVOD_LATENCY, parse_rate(case.rate) / 8, ranks_per_host=slots)
        cells = []
        for row, exchange in ((ALLGATHER, "allgather"), (SCATTER, "scatter_allgather")):
            payload, buckets = (case.rows[row][key] for key in ("payload_bytes", "buckets"))
            count = payload / (4 / 8 + 4 / 512)  # values of 4 bits, and a norm for 512 of them
            seconds = ALGORITHMS[exchange].seconds
            model = buckets * seconds(link, case.ranks, payload / buckets, count / buckets)
            model += count / link.codec_rate  # the first encoding
            cells += [f"{1e3 * model:.0f}", f"{1e3 * (case.median(row) - case.median(COMPUTE)):.0f}"]
        rows.append([f"{case.model}, {case.title}", *cells])
    if rows:
        print("The cost model, and a step less compute alone; milliseconds.\n")
        header = (
            "",
            "allgather, model",
            "measured",
            "scatter-allgather, model",
            "measured",
        )
        print_table(header, rows, markdown)


# --- picture --------------------------------------------------------------------------------------------


def plot(cases: Sequence[Case], path: Path) -> None:
    """Bars of the rows at 1 Gbit/s, and lines over the links' rates, of the linear model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    linear = {(case.rate, case.hosts): case for case in cases if case.model == "linear" and case.rows}
    bars = [linear[key] for key in (("1gbit", 2), ("1gbit", 4)) if key in linear]
    lines = [
        linear[key] for key in ((r, 2) for r in ("100mbit", "1gbit", "10gbit", "unshaped")) if key in linear
    ]
    if not bars and not lines:
        progress("nothing to plot: no linear case at 1gbit or with 2 hosts was measured")
        return
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    gray, blue, orange = "#9aa5b1", "#1f77b4", "#e07b39"

    def colour(row: str) -> str:
        return blue if row == OURS else "#a9cdea" if row.startswith(("hvd_quant", OWN)) else gray

    panels = len(bars) + bool(lines)
    figure, axes = plt.subplots(
        1, panels, figsize=(4.6 * panels + 1.2, 5), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[0], bars, strict=False):
        names = list(bars[0].rows)
        heights = [1e3 * case.median(row) if row in case.rows else 0.0 for row in names]
        drawn = axis.barh(names, heights, color=[colour(row) for row in names])
        axis.bar_label(drawn, [f"{height:.0f}" for height in heights], padding=3, fontsize=8, bbox=blank)
        if case.floor is not None:
            label = "floor at 4 bits: compute + wire"
            axis.axvline(1e3 * case.floor, color=orange, linestyle="--", linewidth=1, label=label, zorder=0)
            axis.legend(fontsize=8, frameon=False, loc="upper right")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=case.title, xlabel="milliseconds a step")
        axis.tick_params(axis="y", length=0, labelleft=axis is axes[0][0])
    styles = {
        FP32: (gray, "o"),
        FP16: ("#6b7785", "s"),
        "DDP fp32": ("#c9b27c", "o"),
        "DDP fp16 hook": ("#a38a4d", "s"),
        "DDP PowerSGD rank 4": ("#6aa56a", "^"),
        OURS: (blue, "D"),
        COMPUTE: ("black", ""),
    }
    if lines:
        axis = axes[0][-1]
        for row, (own_colour, marker) in styles.items():
            points = [
                (case.title.partition(",")[0], 1e3 * case.median(row)) for case in lines if row in case.rows
            ]
            if points:
                dash = ":" if row == COMPUTE else "-"
                axis.plot(
                    *zip(*points, strict=True), color=own_colour, marker=marker, linestyle=dash, label=row
                )
        axis.set(title="2 hosts", xlabel="rate of a host's link", ylabel="milliseconds a step", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=8, frameon=False)
        axis.grid(axis="y", alpha=0.2)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("8 x Linear(1024), 8.4 M parameters: time of a training step")
    figure.savefig(path, dpi=150)

"""DQ-SGD beside QSGD with a fixed number of bits, at equal total bits.

`convex`: softmax regression on Fashion-MNIST with l2 regularisation, strongly convex with mu = L2. The error
is f(x_T) - f*, f* by Nesterov's method in float64 on the same images. In a step, x - x* shrinks by at least
1 - lr mu (lr <= 2 / (mu + L)), its square by the square of that; an error of quantization made at step t thus
counts (1 - lr mu)^(2 (T - t)) times at the end: alpha = (1 - lr mu)^2.

`fashion`: the CNN of the other parts, which is not convex: alpha = 1.

Intervals are over the seeds, by Student's t. A seed's two runs see the same images in the same order, so
their ratio is taken seed by seed.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

import hvd_quant
from benchmarks.papers.report import COLOURS, Record, each, figure, grouped, interval, plus_minus
from hvd_quant import DQSGD, QSGD
from hvd_quant.schedule import BitSchedule

IMAGES, CLASSES, RANKS, BATCH = 6000, 10, 2, 32
L2, LR, STEPS, EVERY = 0.003, 1.0, 1000, 100
ALPHA = (1 - LR * L2) ** 2
CONVEX_SEEDS, SEEDS, EPOCHS = 6, 3, 3
CASES = tuple(itertools.product(("l2", "max"), (3, 4)))  # norm and (mean) bits
FIXED, DYNAMIC, FLOAT32 = "QSGD", "DQ-SGD", "float32"


# --- the convex problem ---------------------------------------------------------------------------------


class Regression:
    """f(w) = mean cross-entropy + L2 / 2 |w|^2 over images scaled such that their mean squared norm is 1."""

    def __init__(self) -> None:
        from benchmarks.papers import simulate

        images, labels, _, _ = simulate.data()
        x = images[:IMAGES].flatten(1).double().numpy()
        x -= x.mean(0)
        self.x = x / math.sqrt(np.square(x).sum(1).mean())
        self.y = np.eye(CLASSES)[labels[:IMAGES].numpy()]
        self.best = self._minimum()

    def value(self, w: np.ndarray) -> float:
        logits = self.x @ w
        top = logits.max(1, keepdims=True)
        entropy = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - (logits * self.y).sum(1)
        return float(entropy.mean() + L2 / 2 * np.square(w).sum())

    def gradient(self, w: np.ndarray, own: np.ndarray | slice) -> np.ndarray:
        logits = self.x[own] @ w
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return self.x[own].T @ (odds / odds.sum(1, keepdims=True) - self.y[own]) / len(logits) + L2 * w

    def _minimum(self) -> float:
        """f*, by Nesterov's method for strongly convex functions, to 1e-7."""
        smooth = np.linalg.eigvalsh(self.x.T @ self.x / len(self.x))[-1] / 2 + L2
        momentum = (math.sqrt(smooth) - math.sqrt(L2)) / (math.sqrt(smooth) + math.sqrt(L2))
        w = ahead = np.zeros((self.x.shape[1], CLASSES))
        while True:
            slope = self.gradient(ahead, slice(None))
            if np.square(slope).sum() / (2 * L2) < 1e-7:  # which is at least f - f*
                return self.value(ahead)
            w, before = ahead - slope / smooth, w
            ahead = w + momentum * (w - before)


@functools.cache
def problem() -> Regression:
    return Regression()


def convex(method: str, norm: str, bits: int, seed: int) -> Record:
    """One run; the error every EVERY steps, with the bits a value that have been spent by then."""
    from benchmarks.papers.simulate import seed_of

    f = problem()
    random = np.random.default_rng(seed)
    schedule = None
    if method == DYNAMIC:
        schedule = BitSchedule(DQSGD(mean_bits=bits, total_steps=STEPS, alpha=ALPHA, norm=norm))
    w, spent = np.zeros((f.x.shape[1], CLASSES)), 0
    log: dict[str, list[float]] = {"bits_spent": [], "error": [], "bits_used": [], "norms": []}
    for step in range(STEPS):
        own = [random.integers(0, IMAGES, BATCH) for _ in range(RANKS)]
        gradients = [f.gradient(w, one).astype(np.float32).ravel() for one in own]
        width = schedule.bits if schedule else bits
        if method == FLOAT32:
            mean = sum(gradients) / RANKS
        else:
            scheme = QSGD(bits=width, norm=norm)
            sent = [
                hvd_quant.decode(hvd_quant.encode(gradient, scheme, seed=seed_of(seed, rank, step)))
                for rank, gradient in enumerate(gradients)
            ]
            mean = sum(sent) / RANKS
        square = sum(float(np.square(gradient).sum()) for gradient in gradients) / RANKS
        if schedule:
            schedule.advance(square)
        spent += width
        w = w - LR * mean.reshape(w.shape).astype(np.float64)
        log["bits_used"].append(width)
        log["norms"].append(math.sqrt(square))
        if (step + 1) % EVERY == 0:
            log["bits_spent"].append(spent)
            log["error"].append(f.value(w) - f.best)
    return {"problem": "convex", "method": method, "norm": norm, "bits": bits, "seed": seed, **log}


# --- Fashion-MNIST --------------------------------------------------------------------------------------


def fashion(method: str, norm: str, bits: int, seed: int) -> Record:
    from benchmarks.papers import simulate

    scheme: Any = QSGD(bits=bits, norm=norm)
    if method == DYNAMIC:
        total = EPOCHS * simulate.steps_an_epoch()
        scheme = DQSGD(mean_bits=bits, total_steps=total, norm=norm)
    log = simulate.train(scheme, seed, EPOCHS)
    return {"problem": "fashion", "method": method, "norm": norm, "bits": bits, "seed": seed, **log}


def job(function: str, *arguments: Any) -> Record:
    return {"convex": convex, "fashion": fashion}[function](*arguments)


def run(workers: int) -> list[Record]:
    methods = FIXED, DYNAMIC
    jobs: list[tuple[Any, ...]] = [("convex", FLOAT32, "", 32, seed) for seed in range(CONVEX_SEEDS)]
    jobs += [("convex", m, *case, seed) for m in methods for case in CASES for seed in range(CONVEX_SEEDS)]
    jobs += [("fashion", m, "max", 4, seed) for m in methods for seed in range(SEEDS)]
    return each(job, jobs, workers)


# --- reporting ------------------------------------------------------------------------------------------

HEADERS = ("problem", "method", "norm", "mean bits", "final", "of QSGD's, seed by seed")


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    lines = []
    groups = grouped(records, "problem", "norm", "bits", "method")
    for (kind, norm, bits, method), runs in groups.items():
        if kind == "convex":
            final = plus_minus(*interval([1e3 * one["error"][-1] for one in runs]))
            text = f"f - f* = {final} e-3"
        else:
            accuracy = plus_minus(*interval([one["accuracy"][-1] for one in runs]), scale=100)
            text = f"{accuracy} %, loss {plus_minus(*interval([one['loss'][-1] for one in runs]), digits=3)}"
        compared = ""
        if method == DYNAMIC:
            what = "error" if kind == "convex" else "loss"
            pairs = zip(runs, groups[kind, norm, bits, FIXED], strict=True)
            compared = plus_minus(
                *interval([own[what][-1] / other[what][-1] for own, other in pairs]), digits=3
            )
        lines.append((kind, method, norm, str(bits), text, compared))
    return lines


def notes(records: list[Record]) -> list[str]:
    runs = [one for one in records if one["problem"] == "convex" and one["method"] == DYNAMIC]
    worst = max(abs(sum(one["bits_used"]) - one["bits"] * STEPS) for one in runs)
    return [
        f"alpha = {ALPHA:.5f} for the convex problem (lr {LR}, mu {L2}), {STEPS} steps of {RANKS} x {BATCH} "
        f"images. Bits a value over a run differ from the fixed scheme's by {worst} at most."
    ]


def plot(records: list[Record], path: Path) -> None:
    fig, axes = figure(2, 3, width=11, height=7)
    groups = grouped(records, "problem", "norm", "bits", "method")
    look = {FIXED: (COLOURS[1], "--"), DYNAMIC: (COLOURS[0], "-")}
    for axis, (norm, bits) in zip((*axes[0, :2], *axes[1, :2]), CASES, strict=True):
        for method, (colour, dash) in look.items():
            runs = groups["convex", norm, bits, method]
            spent = np.mean([one["bits_spent"] for one in runs], axis=0) * CLASSES * 784 / 8e6
            band = [interval(errors) for errors in zip(*(one["error"] for one in runs), strict=True)]
            mean, half = np.array(band).T
            axis.plot(spent, mean, color=colour, linestyle=dash, label=method)
            axis.fill_between(spent, mean - half, mean + half, color=colour, alpha=0.2)
        final, _ = interval([one["error"][-1] for one in groups["convex", "", 32, FLOAT32]])
        axis.axhline(final, color="black", linestyle=":", label="float32, at the end")
        axis.set_yscale("log")
        axis.set_title(f"convex, {norm} norm, {bits} bits in the mean", fontsize=9)
        axis.set_xlabel("MB sent by a rank")
        axis.set_ylabel("f - f*")
    axes[0, 0].legend(frameon=False)
    for axis, quantity, label in ((axes[0, 2], "loss", "test loss"), (axes[1, 2], "accuracy", "accuracy")):
        for method, (colour, dash) in look.items():
            runs = groups["fashion", "max", 4, method]
            megabytes = np.mean([one["megabytes"] for one in runs], axis=0)
            band = [interval(values) for values in zip(*(one[quantity] for one in runs), strict=True)]
            axis.errorbar(
                megabytes, *zip(*band, strict=True), color=colour, linestyle=dash, capsize=3, label=method
            )
        axis.set_title("Fashion-MNIST CNN, max norm, 4 bits", fontsize=9)
        axis.set_xlabel("MB sent by a rank")
        axis.set_ylabel(label)
    fig.savefig(path, dpi=120)

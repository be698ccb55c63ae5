"""Average gradients over the ranks with plain MPI: 4 bits a value beside float32.

    mpirun -np 4 python examples/mpi_allreduce.py

Prints what a rank receives, the error beside what theory says of it, and the times of both; checks that all
ranks hold the same bits. It needs mpi4py, and neither Horovod nor torch.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

import hvd_quant
from hvd_quant.mpi import AVERAGE, QuantizedComm

WORLD = MPI.COMM_WORLD
DEVIATIONS = 6.0  # for which a normal variable exceeds the expected one once in 10^9 runs


def gradient_like(count: int) -> np.ndarray:
    """Values of very different magnitude, correlated between the ranks as gradients are; float32."""
    common, own = np.random.default_rng(0), np.random.default_rng([1, WORLD.rank])
    scale = np.exp(common.standard_normal(count // 1000 + 1)).repeat(1000)[:count]
    return (scale * (common.standard_normal(count) + own.standard_normal(count))).astype(np.float32)


def rounding_moments(x: np.ndarray, scheme: hvd_quant.QSGD) -> tuple[np.ndarray, np.ndarray]:
    """Exact second and fourth moment of the error of quantizing each value of ``x`` once.

    A value between two levels a step h apart, at the share p of the way, is rounded up with probability p:
    E e^2 = h^2 p (1 - p), E e^4 = h^4 p (1 - p) (1 - 3 p (1 - p)). Summed up, the former is
    N^2 sum (l_(j+1) - r) (r - l_j).
    """
    starts = np.arange(0, x.size, scheme.bucket_size)
    steps = np.maximum.reduceat(np.abs(x), starts).astype(np.float64) / scheme.num_levels
    steps = np.maximum(steps, np.finfo(np.float32).tiny).repeat(scheme.bucket_size)[: x.size]
    share = np.abs(x) / steps % 1.0
    spread = share * (1.0 - share)
    return steps**2 * spread, steps**4 * spread * (1.0 - 3.0 * spread)


def summed(x: np.ndarray) -> np.ndarray:
    """The sum over the ranks, float64."""
    total = np.empty(x.shape)
    WORLD.Allreduce(x.astype(np.float64), total)
    return total


def expected_error(x: np.ndarray, scheme: hvd_quant.QSGD, two_roundings: bool) -> tuple[float, float]:
    """Mean and standard deviation of the squared error, summed over all values, of the quantized average."""
    n = WORLD.size
    second, fourth = rounding_moments(x, scheme)
    variance = summed(second) / n**2
    pairs = summed(second) ** 2 - summed(second**2)  # of ranks, whose errors are independent
    fourth = (summed(fourth) + 3.0 * pairs) / n**4
    if two_roundings:
        # The mean is rounded again. What that adds depends on the mean of the once rounded, of which this is
        # another draw, with noise of its own.
        draw = hvd_quant.decode(hvd_quant.encode(x, scheme, seed=2**40 + WORLD.rank))
        again, fourth_again = rounding_moments((summed(draw) / n).astype(np.float32), scheme)
        fourth = fourth + 6.0 * variance * again + fourth_again
        variance = variance + again
    # The draw's own deviation is no larger than the error's.
    deviation = np.sqrt((2.0 if two_roundings else 1.0) * (fourth - variance**2).sum())
    return float(variance.sum()), float(deviation)


def seconds(action: Callable[[], object], repeats: int = 7) -> float:
    """Median time of the slowest rank."""
    times = []
    for _ in range(repeats):
        WORLD.Barrier()
        start = time.perf_counter()
        action()
        times.append(WORLD.allreduce(time.perf_counter() - start, MPI.MAX))
    return float(np.median(times))


def same_everywhere(x: np.ndarray) -> bool:
    """Whether all ranks hold the same bits."""
    return len(set(WORLD.allgather(hashlib.blake2b(x.tobytes()).digest()))) == 1


def main() -> int:
    """Run the comparison; 0 if all is as it should be, on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=4 << 20, help="in the gradient (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9), help="a value on the wire")
    parser.add_argument("--exchange", default="auto", choices=["auto", "allgather", "scatter_allgather"])
    options = parser.parse_args()
    if options.values < 1:
        parser.error("--values must be 1 or more")
    scheme = hvd_quant.QSGD(bits=options.bits)
    gradient = gradient_like(options.values)
    exact, mean = np.empty_like(gradient), np.empty_like(gradient)

    with QuantizedComm(WORLD, scheme, exchange=options.exchange) as comm:
        comm.Allreduce(gradient, mean, op=AVERAGE)
        received = comm.stats()["received_bytes"]
        time_quantized = seconds(lambda: comm.Allreduce(gradient, mean, op=AVERAGE))
        time_exact = seconds(lambda: WORLD.Allreduce(gradient, exact))
        exact /= WORLD.size

        # In place: the gradient itself becomes the mean.
        in_place = gradient.copy()
        comm.Allreduce(MPI.IN_PLACE, in_place, op=AVERAGE)

        # Beside something else: begin, compute (Test takes the exchange forward), and wait.
        overlapped = np.empty_like(gradient)
        request = comm.Iallreduce(gradient, overlapped, op=AVERAGE)
        norm = 0.0
        for part in np.array_split(gradient, 8):
            norm += float(part @ part)
            request.Test()
        request.Wait()

    same = all(same_everywhere(result) for result in (mean, in_place, overlapped))
    error = float(np.square(mean - summed(gradient) / WORLD.size).sum())
    whole = 8 + hvd_quant.encode(gradient, scheme).size
    # With one message from each of the others, it was the allgather.
    two_roundings = WORLD.size > 1 and received != (WORLD.size - 1) * whole
    expected, deviation = expected_error(gradient, scheme, two_roundings) if WORLD.size > 1 else (0.0, 0.0)
    # Arithmetic in float32 has errors, too.
    arithmetic = float(np.square(4 * np.finfo(np.float32).eps * exact).sum())
    within = abs(error - expected) <= DEVIATIONS * deviation + 1e-6 * expected + arithmetic
    ok = WORLD.allreduce(int(same and within), MPI.MIN) == 1
    if WORLD.rank == 0:
        size, n = gradient.nbytes, WORLD.size
        length = float(np.linalg.norm(exact))
        sys.stdout.write(
            f"{options.values} values averaged over {n} ranks, {options.bits} bits a value, exchange: "
            f"{'scatter_allgather' if two_roundings else 'allgather'}\n"
            f"received by a rank   float32 {2 * (n - 1) / n * size / 1e6:.2f} MB (at best), "
            f"quantized {received / 1e6:.2f} MB\n"
            f"time, median         float32 {time_exact * 1e3:.2f} ms, "
            f"quantized {time_quantized * 1e3:.2f} ms\n"
            f"error of the mean    {error**0.5 / length:.4f} of its norm, by theory "
            f"{expected**0.5 / length:.4f}: {'' if within else 'NOT '}within the exact variance "
            f"(+- {DEVIATIONS:.0f} standard deviations)\n"
            f"results              {'every rank holds the same bits' if same else 'THE RANKS DIFFER'}\n"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

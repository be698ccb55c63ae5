"""What the native codec costs inside a TensorFlow graph, and whether steps retrace or keep memory.

    python -m benchmarks.tf_graph                                        # the codec; seconds, 1 GB of memory
    python -m benchmarks.tf_graph --markdown                             # the table for a document
    horovodrun -np 2 python -m benchmarks.tf_graph --steps 1000          # steps, of that many ranks

A graph calls the codec by tf.numpy_function, once to encode and once to decode, as in
`hvd_quant.tensorflow.group_steps`. Here one follows the other in one process, with no collective of Horovod
between them, on one thread. Runs of the rows take turns, so that other work on the machine slows all alike;
each row counts with its median. TensorFlow is given its results in fresh memory, because it keeps them.

With --steps, every rank trains that many steps of a small model by hvd.DistributedGradientTape. Memory that
is there after the first 100 steps is the libraries'; what it grows by from then on would be a leak.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

# Read when NumPy and TensorFlow are imported.
os.environ.update(HVD_QUANT_THREADS="1", OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2")

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

import hvd_quant.tensorflow as hq
from benchmarks.step_time.report import machine, print_table
from hvd_quant import QSGD
from hvd_quant.codec import native
from hvd_quant.exchange.algorithms import ALGORITHMS
from hvd_quant.exchange.algorithms.allgather import ALLGATHER
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.state import TrainingState
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.group_steps import GradientSpec, GroupSteps
from hvd_quant.tensorflow.membership import Ranks

BITS = 4
NATIVE = "native codec, to memory that is kept"
GRAPH = "the same in a tf.function"
CALLS = 100  # of a graph that does nothing else
SETTLED = 100  # steps after which memory should not grow
WARM_UP = 2
LAYERS, WIDTH, BATCH = 4, 512, 8


# --- the codec ------------------------------------------------------------------------------------------


def medians(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of a run of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(of_call[WARM_UP:]) for name, of_call in times.items()}


class OneRank:
    """The membership of one rank."""

    ranks = Ranks(0, 1, 0)


class Steps(GroupSteps):
    """Steps of one rank that sends as if there were others."""

    algorithm = list(ALGORITHMS).index(ALLGATHER.name)


def measure_codec(count: int, repeats: int) -> dict[str, float]:
    """Seconds to encode and decode ``count`` values."""
    scheme = QSGD(BITS)
    x = np.random.default_rng(0).standard_normal(count, np.float32)
    out = np.empty_like(x)
    fingerprint, use = 0, np.array(0)
    reduced = np.array(control_tensor.values(fingerprint, 0))  # by one rank
    steps = Steps(
        GraphState(TrainingState(scheme, 0)),
        "0",
        "gradient",
        [GradientSpec("0.0", "float32", x.shape, scheme)],
        OneRank(),
        True,
        fingerprint,
    )
    receive = partial(steps.receive, ALLGATHER)

    def direct() -> list[np.ndarray]:
        message, sizes, bits, _ = steps.send(x, use)
        return receive(message, sizes, reduced, bits)

    @tf.function
    def graph(x: tf.Tensor, use: tf.Tensor, reduced: tf.Tensor) -> tf.Tensor:
        types = [tf.uint8, tf.int64, tf.int32, tf.int32]
        message, sizes, bits, _ = tf.numpy_function(steps.send, [x, use], types, stateful=False)
        return tf.numpy_function(receive, [message, sizes, reduced, bits], [tf.float32], stateful=False)

    tensors = [tf.constant(array) for array in (x, use, reduced)]
    (decoded,) = direct()
    if not np.array_equal(graph(*tensors)[0], decoded):
        raise RuntimeError("the graph has decoded something else than the same calls on NumPy arrays")
    return medians(
        {
            NATIVE: lambda: native.decode_mean([native.encode(x, scheme, 0)], out),
            "native codec, to fresh memory": lambda: native.decode_mean([native.encode(x, scheme, 0)]),
            "GroupSteps.send and .receive on NumPy arrays": direct,
            GRAPH: lambda: graph(*tensors),
        },
        repeats,
    )


def measure_call(repeats: int) -> float:
    """Seconds that one tf.numpy_function adds to a graph, of CALLS that follow each other."""

    def chain(calls: int) -> Callable[[], tf.Tensor]:
        @tf.function
        def graph(x: tf.Tensor) -> tf.Tensor:
            for _ in range(calls):
                x = tf.numpy_function(lambda array: array, [x], tf.float32, stateful=False)
            return tf.identity(x)

        x = tf.zeros([4])
        return lambda: graph(x)

    seconds = medians({"calls": chain(CALLS), "none": chain(0)}, repeats)
    return (seconds["calls"] - seconds["none"]) / CALLS


def report_codec(count: int, repeats: int, markdown: bool) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    seconds, call = measure_codec(count, repeats), measure_call(repeats)
    here = machine()
    print(f"{here['cpu']}, one thread; tensorflow {here['tensorflow']}, hvd_quant {here['hvd_quant']}.\n")
    rows = [
        [name, f"{1e3 * of_row:.2f}", f"{count / of_row / 1e9:.2f}", f"{seconds[NATIVE] / of_row:.2f}"]
        for name, of_row in seconds.items()
    ]
    header = [f"encode and decode {count / 2**20:g} Mi values, {BITS} bits", "ms", "G values/s", "of native"]
    print_table(header, rows, markdown)
    print(f"- A tf.numpy_function in a graph of {CALLS}, on tiny tensors: {1e6 * call:.1f} us.")


# --- many steps -----------------------------------------------------------------------------------------


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def report_steps(steps: int, markdown: bool) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    compressor = hq.QSGDCompressor(BITS)
    variables = [
        tf.Variable(tf.random.stateless_normal([WIDTH, WIDTH], [0, number], stddev=WIDTH**-0.5))
        for number in range(LAYERS)
    ]

    @tf.function
    def step(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            for variable in variables:
                x = tf.nn.tanh(x @ variable)
            loss = tf.reduce_mean(tf.square(x))
        tape = hvd.DistributedGradientTape(tape, compression=compressor)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.01 * gradient)
        return loss

    settled = 0.0
    for number in range(steps):
        if number == SETTLED:
            settled = resident_mib()
        step(tf.random.stateless_normal([BATCH, WIDTH], [hvd.rank(), number]))
    end = resident_mib()
    own = [
        f"{settled:.1f}",
        f"{end:.1f}",
        f"{1024 * (end - settled) / (steps - SETTLED):.2f}",
        str(step.experimental_get_tracing_count()),
        str(compressor.stats()["messages"]),
    ]
    rows = [[f"rank {rank}", *row] for rank, row in enumerate(hvd.allgather_object(own))]
    if hvd.rank() == 0:
        after = [f"MiB after {count} steps" for count in (SETTLED, steps)]
        print_table(["", *after, "KiB a step", "traced", "messages sent"], rows, markdown)
        if hvd.size() == 1:
            print("- With one rank Horovod reduces nothing, and the compressor's operations do not run.")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tf_graph",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--values", type=int, default=16 << 20, help="to encode (default: 16 Mi)")
    parser.add_argument("--repeats", type=int, default=15, help="runs that count (default: 15)")
    parser.add_argument("--steps", type=int, help="train so many instead, under horovodrun or as one rank")
    parser.add_argument("--markdown", action="store_true", help="print tables for a Markdown document")
    args = parser.parse_args()
    if args.values < 1 or args.repeats < 1:
        parser.error("--values and --repeats must be positive")
    if args.steps is None:
        report_codec(args.values, args.repeats, args.markdown)
    elif args.steps <= SETTLED:
        parser.error(f"--steps must be more than {SETTLED}")
    else:
        report_steps(args.steps, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

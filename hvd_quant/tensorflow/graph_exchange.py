"""The exchange of a group of gradients in a graph: Horovod's collectives, and the steps between them."""

from __future__ import annotations

from functools import partial

import horovod.tensorflow as hvd
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvd_quant import wire
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.reducer.options import Options
from hvd_quant.schemes import DQSGD
from hvd_quant.tensorflow import device
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.group_steps import (
    DTYPES,
    GradientSpec,
    GroupSteps,
    Ranks,
    call,
    once_reduced,
    sizes_type,
)
from hvd_quant.tensorflow.traces import Trace, TracedGroup


class GraphExchange:
    """Lays out the exchanges of one compressor.

    Args:
        options: the user's options.
        process_set: the ranks that take part.
        graph_state: state of the compressor.
        number: number of the compressor.
    """

    def __init__(
        self, options: Options, process_set: hvd.ProcessSet, graph_state: GraphState, number: int
    ) -> None:
        self._options, self._process_set = options, process_set
        self._graph_state, self._number = graph_state, number
        self._uses: dict[str, tf.Variable] = {}  # how often each group has come; part of the noise key

    def lay_out(self, group: TracedGroup, trace: Trace, reduced: tf.Tensor, choice: ExchangeChoice) -> None:
        """Lay out a group's exchange, once.

        Args:
            group: group, which gets its steps and its results.
            trace: traced function that it is in.
            reduced: the first reduced control tensor.
            choice: chooses the algorithm.
        """
        tensors = group.tensors
        group.steps = steps = GroupSteps(
            self._graph_state,
            group.name,
            f"hvd_quant_{self._number}_{group.name}",
            [
                GradientSpec(
                    f"{group.name}.{i}",
                    DTYPES[tensor.dtype],
                    tuple(tensor.shape) if tensor.shape.is_fully_defined() else None,
                    scheme,
                )
                for i, (tensor, scheme) in enumerate(zip(tensors, group.schemes, strict=True))
            ],
            self._algorithm(tensors, choice),
            self._ranks(choice),
            group.fingerprints[0],
            trace.passed_bytes,
        )
        trace.end_with(steps)
        with tf.device("/CPU:0"):
            use = tf.identity(self._counter(group.name).assign_add(1)) - 1
        if device.has_gpu() and device.can_exchange(steps):
            results = device.exchange(steps, tensors, use, reduced, self._process_set)
        else:
            results = self._by_host(steps, tensors, use, reduced)
        group.results = [
            tf.ensure_shape(result, tensor.shape) for result, tensor in zip(results, tensors, strict=True)
        ]
        group.tensors = []  # eager ones need not wait for the garbage collector

    def note_uses(self) -> None:
        """Write the uses of each group to the training state."""
        for name, uses in self._uses.items():
            self._graph_state.state.uses[name] = int(uses.numpy())

    def _by_host(
        self, steps: GroupSteps, tensors: list[tf.Tensor], use: tf.Tensor, reduced: tf.Tensor
    ) -> list[tf.Tensor]:
        """Lay out a group's exchange with the native codec between Horovod's collectives."""
        with tf.device("/CPU:0"):
            shapes = [tf.shape(tensor, tf.int64) for tensor in tensors if not tensor.shape.is_fully_defined()]
            first = sizes_type(steps.stages[0])
            message, sizes, bits = call(steps.send, [*tensors, use], [tf.uint8, first, tf.int32])
            received = message = once_reduced(message, reduced)
            for number, stage in enumerate(steps.stages):
                if number > 0:
                    inputs = [received, sizes, use, bits, *shapes]
                    message, sizes = call(partial(steps.relay, number), inputs, [tf.uint8, sizes_type(stage)])
                message = steps.named(tf.ensure_shape(message, [None]), stage.name)
                sizes = tf.ensure_shape(sizes, [steps.ranks.size])
                if stage.collective == "alltoall":
                    received, sizes = hvd.alltoall(message, splits=sizes, process_set=self._process_set)
                else:
                    received = hvd.allgather(message, process_set=self._process_set)
            return call(
                steps.receive, [received, sizes, reduced, bits, *shapes], [tensor.dtype for tensor in tensors]
            )

    def _ranks(self, choice: ExchangeChoice) -> Ranks:
        process_set = self._process_set
        seed = (self._options.seed, process_set.ranks)
        if not process_set.included():
            return Ranks(0, 1, seed, choice.topology)
        return Ranks(process_set.rank(), process_set.size(), seed, choice.topology)

    def _algorithm(self, tensors: list[tf.Tensor], choice: ExchangeChoice) -> str:
        """Return the exchange's name: a function of what all ranks know when they trace.

        It ignores overrides: names may differ between ranks, by mistake, and ranks with different algorithms
        would wait for each other indefinitely, without an error.
        """
        counts = [tensor.shape.num_elements() for tensor in tensors]
        if None in counts or choice.topology is None:
            return self._options.exchange if self._options.exchange != "auto" else "allgather"
        scheme = self._options.scheme
        scheme = scheme.at(scheme.max_bits) if isinstance(scheme, DQSGD) else scheme
        nbytes = sum(wire.max_payload_size(scheme, count) for count in counts)
        # On a GPU the hierarchical exchange would copy gradients to the host, which the cost model ignores.
        return choice.algorithm(nbytes, sum(counts), hierarchical=not device.has_gpu())

    def _counter(self, name: str) -> tf.Variable:
        """Return how often a group has come. A variable, because a number would be constant in the graph."""
        if name not in self._uses:
            self._uses[name] = variable(self._graph_state.state.uses[name], tf.int64, "hvd_quant_uses")
        return self._uses[name]


def variable(value: float, dtype: tf.DType, name: str) -> tf.Variable:
    """Make a scalar variable, also while a function is traced."""
    # This class itself: tf.function allows no new tf.Variable after its first call.
    with tf.init_scope(), tf.device("/CPU:0"):
        return ResourceVariable(value, trainable=False, dtype=dtype, name=name)

"""The exchange of a group of gradients in a graph: Horovod's collectives, and the steps between them."""

from __future__ import annotations

from functools import partial

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_quant.exchange.algorithms import ALGORITHMS, Algorithm
from hvd_quant.tensorflow import device
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.group_steps import ALONE, DTYPES, GradientSpec, GroupSteps, call, once_reduced
from hvd_quant.tensorflow.membership import LOST_WORKER, Membership
from hvd_quant.tensorflow.traces import Trace, TracedGroup


class GraphExchange:
    """Lays out the exchanges of one compressor.

    Args:
        process_set: the ranks that take part.
        membership: the same ranks, as they are in each step.
        graph_state: state of the compressor.
        number: number of the compressor.
    """

    def __init__(
        self, process_set: hvd.ProcessSet, membership: Membership, graph_state: GraphState, number: int
    ) -> None:
        self._process_set, self._membership = process_set, membership
        self._graph_state, self._number = graph_state, number

    def lay_out(self, group: TracedGroup, trace: Trace, reduced: tf.Tensor, renewed: list[tf.Tensor]) -> None:
        """Lay out a group's exchange, once.

        Args:
            group: group, which gets its steps and its results.
            trace: traced function that it is in.
            reduced: the first reduced control tensor.
            renewed: what renews the membership in each step, if anything does.
        """
        tensors = group.tensors
        has_gpu = device.has_gpu()
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
            self._membership,
            # On a GPU the hierarchical exchange would copy gradients to the host: not in the cost model.
            not has_gpu,
            group.fingerprints[0],
            trace.passed_bytes,
        )
        trace.end_with(steps)
        with tf.device("/CPU:0"), tf.control_dependencies(renewed):
            use = tf.identity(self._graph_state.uses_of(group.name).assign_add(1)) - 1
        algorithm = "alone" if steps.algorithm == ALONE else list(ALGORITHMS)[steps.algorithm]
        if has_gpu and device.can_exchange(steps, algorithm):
            results = device.exchange(steps, algorithm, tensors, use, reduced, self._process_set)
        else:
            results = self._by_host(steps, tensors, use, reduced)
        group.results = [
            tf.ensure_shape(result, tensor.shape) for result, tensor in zip(results, tensors, strict=True)
        ]
        group.tensors = []  # eager ones need not wait for the garbage collector

    def _by_host(
        self, steps: GroupSteps, tensors: list[tf.Tensor], use: tf.Tensor, reduced: tf.Tensor
    ) -> list[tf.Tensor]:
        """Lay out a group's exchange with the native codec between Horovod's collectives."""
        with tf.device("/CPU:0"):
            message, sizes, bits, index = call(
                steps.send, [*tensors, use], [tf.uint8, tf.int64, tf.int32, tf.int32]
            )
            sent = once_reduced(message, reduced)
            branches = [
                *(
                    partial(self._stages, steps, algorithm, sent, sizes, tensors, use, bits, reduced)
                    for algorithm in ALGORITHMS.values()
                ),
                partial(self._alone, steps, tensors, reduced),
            ]
            if not self._membership.is_elastic:
                return branches[steps.algorithm]()
            return tf.switch_case(index, branches)

    def _stages(
        self,
        steps: GroupSteps,
        algorithm: Algorithm,
        message: tf.Tensor,
        sizes: tf.Tensor,
        tensors: list[tf.Tensor],
        use: tf.Tensor,
        bits: tf.Tensor,
        reduced: tf.Tensor,
    ) -> list[tf.Tensor]:
        """Lay out the stages of an algorithm."""
        shapes = [tf.shape(tensor, tf.int64) for tensor in tensors if not tensor.shape.is_fully_defined()]
        received = message
        for number, stage in enumerate(algorithm.stages):
            if number > 0:
                inputs = [received, sizes, use, bits, *shapes]
                message, sizes = call(partial(steps.relay, algorithm, number), inputs, [tf.uint8, tf.int64])
            received, sizes = self._collective(steps, stage.name, stage.collective, message, sizes)
        inputs = [received, sizes, reduced, bits, *shapes]
        return call(partial(steps.receive, algorithm), inputs, [tensor.dtype for tensor in tensors])

    def _collective(
        self, steps: GroupSteps, stage: str, collective: str, message: tf.Tensor, sizes: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Lay out one of Horovod's collectives; returns what is received, and its sizes."""
        message = steps.named(tf.ensure_shape(message, [None]), stage)
        options = {"process_set": self._process_set}
        if self._membership.is_elastic:
            # A graph of a worker that comes later has other scopes, and the text of an error this name.
            options |= {"name": f"{LOST_WORKER}_{steps.title}_{stage}", "ignore_name_scope": True}
        else:
            sizes = tf.ensure_shape(sizes, [steps.ranks.size])
        if collective == "alltoall":
            return hvd.alltoall(message, splits=tf.cast(sizes, tf.int32), **options)
        return hvd.allgather(message, **options), sizes

    def _alone(self, steps: GroupSteps, tensors: list[tf.Tensor], reduced: tf.Tensor) -> list[tf.Tensor]:
        """Lay out what is done where there is one rank: the gradients stay as they are."""
        (factor,) = call(steps.receive_alone, [reduced], [tf.float64])
        return [tensor * tf.cast(tf.ensure_shape(factor, []), tensor.dtype) for tensor in tensors]

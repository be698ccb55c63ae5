"""Gradients that are compressed and not yet exchanged, per traced function."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from hvd_quant.reducer import control_tensor
from hvd_quant.schemes import DQSGD, Scheme
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.group_steps import GroupSteps

_GROUPED = (
    tf.float64
)  # what gradients travel as in Horovod's groups: they are of one type, the control tensors'


@dataclass(eq=False)
class TracedGroup:
    """Gradients that travel together.

    Args:
        name: its first gradient's place in the traced function.
    """

    name: str
    tensors: list[tf.Tensor] = field(default_factory=list)
    schemes: list[Scheme | DQSGD] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    steps: GroupSteps | None = None  # set when the exchange is laid out
    results: list[tf.Tensor] = field(default_factory=list)
    first: tf.Tensor | None = None  # the first reduced control tensor

    def add(self, tensor: tf.Tensor, scheme: Scheme | DQSGD, fingerprint: int) -> None:
        """Add another gradient."""
        self.tensors.append(tensor)
        self.schemes.append(scheme)
        self.fingerprints.append(fingerprint)


@dataclass(eq=False)
class Trace:
    """A traced function; or everything that is called eagerly."""

    is_eager: bool = False
    places: int = 0  # places of gradients, used so far
    named: int = 0  # tensors that Horovod was given to reduce
    groups: dict[int, TracedGroup] = field(default_factory=dict)  # open ones, by the identity of their graph
    renewed: dict[int, list[tf.Tensor]] = field(default_factory=dict)  # what renews the membership, likewise
    # Bytes of uncompressed gradients, in their own dtype and as sent. Counted whenever the last group is
    # sent.
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])
    last: GroupSteps | None = None

    def open_group(self, graph: int) -> TracedGroup:
        """Return the group that a gradient in this graph joins."""
        group = self.groups.get(graph)
        if group is None:
            group = self.groups[graph] = TracedGroup(f"{self.places}")
        if not self.is_eager:
            self.places += 1
        return group

    def close_group(self, group: TracedGroup, graph: int) -> None:
        """Close a group: no other gradient joins it."""
        if self.groups.get(graph) is group:
            del self.groups[graph]

    def end_with(self, steps: GroupSteps) -> None:
        """Note the last group laid out: uncompressed gradients of the function are counted with it."""
        if self.last is not None:
            self.last.passed_bytes = [0, 0]
        self.last = steps if not self.is_eager else None


@dataclass(eq=False)
class Member:
    """Context from ``compress`` for ``decompress``: a place in a group, or an uncompressed gradient."""

    group: TracedGroup | None
    index: int
    dtype: tf.DType
    shape: tf.TensorShape


class Traces:
    """The traced functions of a compressor.

    Args:
        graph_state: state of the compressor.
        number: number of the compressor.
    """

    def __init__(self, graph_state: GraphState, number: int) -> None:
        self._graph_state, self._number = graph_state, number
        self._traces: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()
        self._eager = Trace(is_eager=True)

    def forget_eager(self) -> None:
        """Drop what has been compressed eagerly."""
        self._eager = Trace(is_eager=True)

    def at_hand(self) -> tuple[Trace, int]:
        """Return the trace, and the identity of the current graph, which may be a branch in it."""
        if tf.executing_eagerly():
            return self._eager, 0
        graph = root = tf.compat.v1.get_default_graph()
        while isinstance(root.outer_graph, FuncGraph):
            root = root.outer_graph
        if root not in self._traces:
            self._traces[root] = Trace()
        return self._traces[root], id(graph)

    def passed(self, trace: Trace, tensor: tf.Tensor, alone: bool) -> tuple[tf.Tensor, Member | None]:
        """Return the tensor for Horovod to reduce of an uncompressed gradient, and its context.

        Its bytes are counted if its number of values is known.

        Args:
            trace: trace that it is in.
            tensor: the gradient.
            alone: whether it cannot be in a group, and keeps its dtype.
        """
        sent, count = tensor if alone else tf.cast(tensor, _GROUPED), tensor.shape.num_elements()
        if count is not None:
            raw_bytes, sent_bytes = count * tensor.dtype.size, count * sent.dtype.size
            if trace.is_eager:
                self._graph_state.count(raw_bytes, sent_bytes)
            else:  # in every step of the traced function
                trace.passed_bytes[0] += raw_bytes
                trace.passed_bytes[1] += sent_bytes
        if sent.dtype == _GROUPED and tensor.shape == (control_tensor.SIZE,):
            # It must not be taken for a control tensor, which other ranks may have in its place.
            sent = tf.reshape(sent, control_tensor.OTHER_SHAPE)
        elif alone:
            return self.named(trace, sent), None
        return self.named(trace, sent), Member(None, 0, tensor.dtype, tensor.shape)

    def named(self, trace: Trace, tensor: tf.Tensor) -> tf.Tensor:
        """Name the tensor for Horovod to reduce, so that it matches those of the other ranks.

        Names of operations have numbers, and a rank that traces something more than others would have other
        ones. The name does not depend on the tensor's kind, so that Horovod notices if that differs.
        Horovod ignores the names of eager tensors.
        """
        if trace.is_eager:
            return tensor
        trace.named += 1
        return tf.identity(tensor, f"hvd_quant_{self._number}_reduced_{trace.named - 1}")

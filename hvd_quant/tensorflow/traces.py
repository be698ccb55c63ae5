"""What has been compressed and not yet exchanged, in each function that is traced."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from hvd_quant.reducer import control
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
        name: its first gradient's place in the function that is traced.
    """

    name: str
    tensors: list[tf.Tensor] = field(default_factory=list)
    schemes: list[Scheme | DQSGD] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    steps: GroupSteps | None = None  # once the exchange is laid out
    results: list[tf.Tensor] = field(default_factory=list)
    first: tf.Tensor | None = None  # the first control tensor to come back

    def add(self, tensor: tf.Tensor, scheme: Scheme | DQSGD, fingerprint: int) -> None:
        """Have another gradient travel with these."""
        self.tensors.append(tensor)
        self.schemes.append(scheme)
        self.fingerprints.append(fingerprint)


@dataclass(eq=False)
class Trace:
    """A function that is traced; or what is called eagerly."""

    is_eager: bool = False
    places: int = 0  # of gradients, taken so far
    named: int = 0  # tensors that Horovod has been given to reduce, whatever they are
    groups: dict[int, TracedGroup] = field(default_factory=dict)  # open ones, by the identity of their graph
    # Of uncompressed gradients, as they are and as they are sent. Counted whenever the last group is sent.
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])
    last: GroupSteps | None = None

    def open_group(self, graph: int) -> TracedGroup:
        """The group that a gradient in this graph joins."""
        group = self.groups.get(graph)
        if group is None:
            group = self.groups[graph] = TracedGroup(f"{self.places}")
        if not self.is_eager:
            self.places += 1
        return group

    def close_group(self, group: TracedGroup, graph: int) -> None:
        """Have no gradient join a group any more."""
        if self.groups.get(graph) is group:
            del self.groups[graph]

    def end_with(self, steps: GroupSteps) -> None:
        """Note the group that is laid out last: what is passed in this function is counted with it."""
        if self.last is not None:
            self.last.passed_bytes = [0, 0]
        self.last = steps if not self.is_eager else None


@dataclass(eq=False)
class Member:
    """What ``compress`` hands to ``decompress``: a place in a group, or what an uncompressed gradient was."""

    group: TracedGroup | None
    index: int
    dtype: tf.DType
    shape: tf.TensorShape


class Traces:
    """All functions that are traced with a compressor.

    Args:
        graph_state: the compressor's.
        number: the compressor's.
    """

    def __init__(self, graph_state: GraphState, number: int) -> None:
        self._graph_state, self._number = graph_state, number
        self._traces: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()
        self._eager = Trace(is_eager=True)

    def forget_eager(self) -> None:
        """Leave what has been compressed eagerly."""
        self._eager = Trace(is_eager=True)

    def at_hand(self) -> tuple[Trace, int]:
        """What is traced, and the identity of the graph at hand, which may be a branch in that."""
        if tf.executing_eagerly():
            return self._eager, 0
        graph = root = tf.compat.v1.get_default_graph()
        while isinstance(root.outer_graph, FuncGraph):
            root = root.outer_graph
        if root not in self._traces:
            self._traces[root] = Trace()
        return self._traces[root], id(graph)

    def passed(self, trace: Trace, tensor: tf.Tensor, alone: bool) -> tuple[tf.Tensor, Member | None]:
        """What Horovod is to reduce of a gradient that is left to it, and the context for ``decompress``.

        Its bytes are counted if its number of values is known.

        Args:
            trace: what it is in.
            tensor: the gradient.
            alone: whether it cannot be in a group, and keeps its dtype.
        """
        sent, count = tensor if alone else tf.cast(tensor, _GROUPED), tensor.shape.num_elements()
        if count is not None:
            raw_bytes, sent_bytes = count * tensor.dtype.size, count * sent.dtype.size
            if trace.is_eager:
                self._graph_state.count(raw_bytes, sent_bytes)
            else:  # in every step of what is traced
                trace.passed_bytes[0] += raw_bytes
                trace.passed_bytes[1] += sent_bytes
        if sent.dtype == _GROUPED and tensor.shape == (control.SIZE,):
            # Not to be taken for a control tensor, which other ranks may have in its place.
            sent = tf.reshape(sent, control.OTHER_SHAPE)
        elif alone:
            return self.named(trace, sent), None
        return self.named(trace, sent), Member(None, 0, tensor.dtype, tensor.shape)

    def named(self, trace: Trace, tensor: tf.Tensor) -> tf.Tensor:
        """What Horovod is to reduce, with a name of our own, by which it finds the other ranks'.

        Those of operations have numbers, and a rank that traces something more than others would have other
        ones. The name does not depend on what the tensor is, so that Horovod finds out if that differs. Of
        what is called eagerly it takes no tensor's name.
        """
        if trace.is_eager:
            return tensor
        trace.named += 1
        return tf.identity(tensor, f"hvd_quant_{self._number}_reduced_{trace.named - 1}")

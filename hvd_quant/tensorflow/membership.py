"""The ranks among which a compressor's graphs run.

A graph is traced once, and in an elastic job the ranks change while it stays. So what depends on them is read
in every step: from a variable, or by the steps between Horovod's collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvd_quant import wire
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.topology import Topology
from hvd_quant.horovod import initialisation, is_elastic
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.agreement import agree
from hvd_quant.reducer.errors import Description, RankMismatchError
from hvd_quant.reducer.options import Options
from hvd_quant.schemes import DQSGD
from hvd_quant.tensorflow.graph_state import GraphState, variable
from hvd_quant.tensorflow.join import refuse_join

# Horovod's elastic training takes an error for that of a lost worker by such names in its text.
LOST_WORKER = "HorovodAllgather"


@dataclass(frozen=True)
class Ranks:
    """Ranks that exchange gradients.

    Args:
        rank, size: those of the process set.
        seed: seed of the noise; any JSON value.
        topology: hosts of the ranks; None if they have not announced them.
        generation: how often they have met.
    """

    rank: int
    size: int
    seed: object
    topology: Topology | None = None
    generation: int = 1


class Membership:
    """The ranks of one compressor.

    Args:
        options: the user's options.
        process_set: the ranks that take part.
        graph_state: state of the compressor.
        describe: returns what must be the same on all ranks, from the link between them.
        make_choice: returns the choice of the exchange, before the ranks have announced their hosts.
        host: returns a number that ranks of the same host have in common.
    """

    def __init__(
        self,
        options: Options,
        process_set: hvd.ProcessSet,
        graph_state: GraphState,
        describe: Callable[[ExchangeChoice], Description],
        make_choice: Callable[[], ExchangeChoice],
        host: Callable[[], int],
    ) -> None:
        self._options, self._process_set, self._graph_state = options, process_set, graph_state
        self._describe, self._make_choice, self._host = describe, make_choice, host
        self._lock = threading.Lock()
        self._initialisation: object = None  # of Horovod, in which the ranks have met
        self.is_elastic = is_elastic()
        self.ranks = Ranks(0, 1, None, generation=0)
        self.choice: ExchangeChoice | None = None  # until the ranks have met
        self.own: tf.Variable | None = None  # what a control tensor has of its rank

    @property
    def has_met(self) -> bool:
        """Whether the ranks have met."""
        return self.choice is not None

    def meet(self) -> None:
        """Compare configurations with the other ranks, unless that is done.

        In an elastic job it is done again whenever Horovod has been initialised.

        Raises:
            RankMismatchError: they are configured differently.
            ValueError: the user's exchange does not fit their hosts.
        """
        if self.has_met and not (self.is_elastic and self._initialisation is not initialisation()):
            return
        with self._lock:  # of several parts of a graph the first one meets the other ranks
            if not self.has_met or self._initialisation is not initialisation():
                self._meet()

    def renew(self) -> np.ndarray:
        """`meet` as a step of a graph, before everything else that depends on the ranks."""
        try:
            self.meet()
        except RankMismatchError as error:
            raise ValueError(str(error)) from error  # lest it be taken for a lost worker
        except (HorovodInternalError, tf.errors.OpError) as error:
            raise RuntimeError(f"{LOST_WORKER}: {error}") from error
        return np.array(self.ranks.generation, np.int64)

    def _meet(self) -> None:
        process_set, graph_state = self._process_set, self._graph_state
        choice = self._make_choice()
        rank, size, topology = 0, 1, None
        if process_set.included():
            rank, size = process_set.rank(), process_set.size()
        if self.has_met:
            graph_state.forget_step()  # nothing that was in flight will arrive
        if size > 1:
            graph_state.note_uses()
            mine = self._describe(choice), self._host(), graph_state.state.position()
            with tf.init_scope(), graph_state.waiting("the other ranks' first gradients"):
                received = hvd.allgather_object(mine, name="hvd_quant.agreement", process_set=process_set)
            topology = agree([(config, host) for config, host, _ in received])
            if process_set.process_set_id == 0:  # of all ranks
                refuse_join()
            choice.locate(topology)
            graph_state.state.catch_up([position for *_, position in received])
            graph_state.set_uses()
        graph_state.state.place = rank, size
        part = control_tensor.part_of_rank(rank)
        if self.own is None:
            self.own = variable(part, tf.float64, "hvd_quant_own")
        else:
            self.own.assign(part)
        seed = (self._options.seed, process_set.ranks)
        self.ranks = Ranks(rank, size, seed, topology, self.ranks.generation + 1)
        self.choice, self._initialisation = choice, initialisation()

    def algorithm(self, counts: Sequence[int | None], *, hierarchical: bool) -> str:
        """Return the exchange's name for gradients: a function of what all ranks know when they trace.

        It ignores overrides: names may differ between ranks, by mistake, and ranks with different algorithms
        would wait for each other indefinitely, without an error.

        Args:
            counts: numbers of their values; None for one that is known only at run time.
            hierarchical: whether the hierarchical exchange is worth considering.
        """
        choice = self.choice
        if None in counts or choice.topology is None:
            return choice.exchange if choice.exchange != "auto" else "allgather"
        scheme = self._options.scheme
        scheme = scheme.at(scheme.max_bits) if isinstance(scheme, DQSGD) else scheme
        nbytes = sum(wire.max_payload_size(scheme, count) for count in counts)
        return choice.algorithm(nbytes, sum(counts), hierarchical=hierarchical)

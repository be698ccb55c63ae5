"""A front end over ranks in one process: all that the reducer needs, and what Horovod would do beside it."""

import numpy as np

from hvd_quant import QSGD
from hvd_quant.codec import native
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import Entry
from hvd_quant.reducer import control_tensor, polling
from hvd_quant.reducer.gradient import Gradient, Parameter
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.reducer import Reducer
from hvd_quant.reducer.state import Residuals, TrainingState


class ArrayGradient(Gradient):
    codec = native

    def hold(self, tensor):
        self.array = tensor

    def values(self):
        return self.array

    def out(self, values):
        return values  # overwritten

    def scratch(self):
        return np.empty(self.entry.count, np.float32)

    def buffer_of(self, scratch):
        return scratch

    def replace_result(self, scratch):
        self.array[:] = scratch

    def release(self):
        array, self.array = self.array, None
        return array


class Compressor:
    """Exchanges float32 arrays of one rank; `reduce` is Horovod's allreduce of the control tensor.

    Args:
        transport: of an `hvd_quant.exchange.in_process.Network`.
        parameters: sizes by name; None if names are not known.
        number: the compressor's.
        **options: see `hvd_quant.reducer.options.Options`.
    """

    def __init__(self, transport, parameters=None, number=0, scheme=None, **options):
        self.transport, self.parameters = transport, parameters
        self.options = Options(scheme or QSGD(), **{"min_numel": 0, **options})
        residuals = Residuals() if self.options.error_feedback else None
        self.state = TrainingState(self.options.scheme, self.options.seed, residuals)
        self.reducer = Reducer(self.options, self.state, number)
        self._places = 0

    def compress(self, array, name=None):
        reducer = self.reducer
        if not reducer.has_begun:
            choice = ExchangeChoice(self.options.exchange, self.transport.size, Link(2e-3, 125e6))
            parameters = None
            if self.parameters is not None:
                parameters = {
                    key: Parameter((size,), "float32", "cpu", True) for key, size in self.parameters.items()
                }
            reducer.begin(self.transport, choice, self.transport.rank, parameters)
        reducer.count()
        if not reducer.in_flight:
            self._places = 0
        key = name if self.parameters is not None else f"#{self._places}"
        self._places += 1
        gradient = reducer.known.get(key)
        scheme = reducer.scheme_of(name, array.size)
        if scheme is None:  # Horovod reduces it as it is; here nobody looks at it
            reducer.fill_slots()
            return [1.0], None
        if gradient is None or gradient.entry.count != array.size:
            description = {"name": key, "named": name is not None, "shape": [array.size], "dtype": "float32"}
            own = control_tensor.Control(reducer.fingerprint(description))
            entry = Entry(key, array.size, "float32", scheme)
            gradient = ArrayGradient(entry, self.parameters is not None, description, own)
            reducer.known[key] = gradient
        reducer.submit(gradient, array)
        reducer.fill_slots()
        square = float(np.dot(array, array))
        values = control_tensor.values(gradient.control.fingerprint, self.transport.rank)
        return [*values[: control_tensor.SQUARE], square], gradient

    def decompress(self, reduced, gradient):
        if gradient is None:
            return None
        self.reducer.finish(gradient, reduced)
        return gradient.release()

    def reduce(self, values, name, op=np.mean):
        """The mean over the ranks, as Horovod has it: under this name, or by the count of operations."""
        name = name or f"noname.{self.transport.operations + 1}"
        own = np.array(values, np.float64).view(np.uint8)
        handle = self.transport.allgather(own, [own.size] * self.transport.size, f"allreduce.{name}")
        return lambda: wait(handle, name, op)

    def allreduce(self, array, name):
        """Of one gradient, by itself."""
        values, gradient = self.compress(array, name)
        return self.decompress(self.reduce(values, name)(), gradient)

    def step(self, arrays, before_results=lambda: None):
        """A step of an optimizer: gradients by name, in this order; their means overwrite them."""
        sent = []
        for name, array in arrays.items():
            values, gradient = self.compress(array, name if self.parameters is not None else None)
            sent.append((self.reduce(values, name), gradient))
        before_results()
        for reduced, gradient in sent:
            self.decompress(reduced(), gradient)


class StalledError(Exception):
    """An operation waits for ranks that do not come."""


def wait(handle, name, op):
    """As Horovod waits, which has all the patience in the world; of which 1000 s stand for that here."""
    deadline = polling.clock.monotonic() + 1000.0
    while not handle.ready():
        if polling.clock.monotonic() > deadline:
            raise StalledError(f"{name} waits for ever")
        polling.pause()
    return op([part.view(np.float64) for part in handle.wait()], axis=0).tolist()

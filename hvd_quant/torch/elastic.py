"""Compressors in the state of an elastic job: ``hvd.elastic.TorchState(model, optimizer, compressor=...)``.

Horovod's ``TorchState`` commits, restores and synchronises what it has a handler for.
"""

from __future__ import annotations

from horovod.torch.elastic import state as elastic
from horovod.torch.functions import broadcast_object

from hvd_quant.torch.compressor import QuantizedCompressor


class CompressorStateHandler(elastic.StateHandler):
    """Commits and restores a compressor's noise, schedule of bits, and residuals.

    A worker that joins gets noise and schedule from the others, and starts with residuals of zero.

    Args:
        compressor: the compressor.
    """

    def __init__(self, compressor: QuantizedCompressor) -> None:
        super().__init__(compressor)
        self.save()

    def save(self) -> None:
        """Commit the state."""
        self._saved = self.value.state_dict()

    def restore(self) -> None:
        """Go back to what was committed."""
        self.value.restore(self._saved)

    def sync(self) -> None:
        """Take over rank 0's state, but for residuals, which are each rank's own."""
        self.value.synchronize_state(broadcast_object)


def register() -> None:
    """Have Horovod's ``TorchState`` use the handler for compressors."""
    registry = elastic.get_handler_registry()
    if not any(handler is CompressorStateHandler for _, handler in registry):
        elastic.set_handler_registry([*registry, (QuantizedCompressor, CompressorStateHandler)])

"""A drop-in for ``horovod.torch.DistributedOptimizer`` that gives the compressor the parameters' names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch

from hvd_quant.horovod import refuse_class
from hvd_quant.torch.compressor import QuantizedCompressor


def DistributedOptimizer(  # noqa: N802  Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = hvd.Compression.none,
    backward_passes_per_step: int = 1,
    op: int = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: hvd.ProcessSet = hvd.global_process_set,
) -> torch.optim.Optimizer:
    """Horovod's own ``DistributedOptimizer``, with the parameters' names given to our compressor too.

    Arguments and result are those of ``horovod.torch.DistributedOptimizer``. Without ``named_parameters``,
    parameters are named by their place in the optimizer, as in Horovod. Other compressors than those of
    hvd_quant are passed on unchanged.

    Raises:
        TypeError: ``compression`` is one of our compressor classes, and not an instance.
        RuntimeError: Horovod is not initialised.
        ValueError: ``op`` or ``process_set`` does not fit the compressor, the compressor serves another
            optimizer already, or Horovod refuses an argument.

    Example:
        >>> optimizer = hq.DistributedOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     named_parameters=model.named_parameters(),
        ...     compression=hq.QSGDCompressor(bits=4),
        ... )
    """
    refuse_class(compression)
    if not hvd.is_initialized():
        raise RuntimeError("Horovod is not initialised: call hvd.init() before making an optimizer")
    if named_parameters is not None:
        named_parameters = list(named_parameters)
    if isinstance(compression, QuantizedCompressor):
        if op not in (hvd.Average, hvd.Sum):
            raise ValueError("quantized gradients support op=hvd.Average and op=hvd.Sum only")
        compression.check_free(process_set)
        if named_parameters is not None or not compression.bound:
            compression.bind(named_parameters or _names_by_place(optimizer))
    distributed = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=named_parameters,
        compression=compression,
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        num_groups=num_groups,
        groups=groups,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    if isinstance(compression, QuantizedCompressor):
        compression.in_use = True
    return distributed


def _names_by_place(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"parameter.{i}.{j}", parameter)
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
    ]

"""Uneven data: ranks that have no more take part in the others' steps with zeros.

``hvd.join()`` cannot do that for quantized gradients. Horovod then refuses every collective but an allreduce,
and where it refuses an allgather, it writes behind the end of a vector, which can end a job of four ranks or
more: `tensor_sizes` in its `Controller::ConstructResponse` has a place per request, and ranks for indices.
"""

from __future__ import annotations

from collections.abc import Callable

import horovod.torch as hvd
import torch

from hvd_quant.torch.compressor import QuantizedCompressor


def join(optimizer: torch.optim.Optimizer, on_step: Callable[[], object] = lambda: None) -> None:
    """Take part in the steps of ranks that have more data, with zero gradients, until no rank has more.

    Every rank calls it after its last step, in place of ``hvd.join()``. The means are those over all ranks,
    with zeros for those that have joined. All ranks apply them, so that their models stay the same, and need
    no broadcast afterwards.

    Ranks that have joined submit the optimizer's gradients only: the others must reduce nothing else, such as
    metrics, in their steps. A rank without any step knows no gradient to be sparse.

    Args:
        optimizer: a distributed optimizer. Without one of our compressors this is ``hvd.join()``, and a
            broadcast of the parameters and the optimizer's state, with its learning rates.
        on_step: called after each step that this rank takes part in; for example ``scheduler.step``. Not
            without one of our compressors.

    Raises:
        ValueError: the last gradients were sparse, and not made dense.
        RuntimeError: no gradient is quantized, so that ranks cannot tell each other that they have joined.
        RankMismatchError, HorovodInternalError: as ``optimizer.step()``.

    Example:
        >>> for batch in loader:
        ...     optimizer.zero_grad()
        ...     loss_of(batch).backward()
        ...     optimizer.step()
        >>> hq.join(optimizer)
    """
    if optimizer.process_set.size() == 1:
        return
    parameters = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
    zeros = [_zeros_like_gradient(one) for one in parameters]
    if any(one.is_sparse for one in zeros) and not optimizer.sparse_as_dense:
        raise ValueError("hvd_quant.torch.join has no sparse gradients: use sparse_as_dense=True")
    compressor = optimizer._compression
    if not isinstance(compressor, QuantizedCompressor):
        _join_by_horovod(optimizer)
        return
    with compressor.joined() as all_have_joined:
        while True:
            optimizer.zero_grad()
            for _ in range(optimizer.backward_passes_per_step):
                # Backward, so that Horovod's hooks submit them as the others do, in groups for example.
                torch.autograd.backward(parameters, [one.clone() for one in zeros])
            optimizer.synchronize()
            if all_have_joined():
                optimizer._synchronized = False  # or it would warn of the next step
                break
            with optimizer.skip_synchronize():
                optimizer.step()
            on_step()
    optimizer.zero_grad()


def _zeros_like_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return zeros; sparse ones where the last gradient was: optimizers round those otherwise."""
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return torch.zeros_like(parameter)
    return torch.sparse_coo_tensor(size=parameter.shape, dtype=gradient.dtype, device=gradient.device)


def _join_by_horovod(optimizer: torch.optim.Optimizer) -> None:
    last = hvd.join()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = [(f"hvd_quant.join.{i}", parameter) for i, parameter in enumerate(parameters)]
    hvd.broadcast_parameters(named, root_rank=last)
    hvd.broadcast_optimizer_state(optimizer, root_rank=last)  # nothing, if there is no state yet
    options = [
        {key: one for key, one in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    options = hvd.broadcast_object(options, root_rank=last, name="hvd_quant.join")
    for group, of_last in zip(optimizer.param_groups, options, strict=True):
        group.update(of_last)

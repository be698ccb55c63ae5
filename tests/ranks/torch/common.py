"""What the multi-rank tests share."""

import copy
import hashlib

import horovod.torch as hvd
import torch

import hvd_quant.torch as hq


def gathered(value):
    """Every rank's value, in rank order."""
    return hvd.allgather_object(value)


def counts_of_operations():
    """How many operations of Horovod's each rank has submitted, in rank order."""
    handle = hvd.allreduce_async(torch.zeros(1), name="count of operations")
    hvd.synchronize(handle)
    return gathered(handle)


def same_everywhere(tensor):
    """Whether all ranks hold the same bits."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return len(set(gathered(hashlib.blake2b(bits).digest()))) == 1


def own_randn(*shape, seed=0):
    """Random numbers that differ from rank to rank."""
    generator = torch.Generator().manual_seed(1000 * seed + hvd.rank())
    return torch.randn(shape, generator=generator)


def mlp(width=64, dtype=torch.float32):
    """A small model, the same on every rank, with weights above and biases below the default min_numel."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.Tanh(), torch.nn.Linear(width, 32))
    return model.to(dtype)


def backward(model, seed=0):
    """Gradients that differ from rank to rank; returns them as they are before any exchange."""
    dtype = next(model.parameters()).dtype
    model(own_randn(16, 32, seed=seed).to(dtype)).square().mean().backward()


def local_gradients(model, seed=0):
    """Gradients of this rank, computed on a copy that no hook knows."""
    clone = copy.deepcopy(model)
    for parameter in clone.parameters():
        parameter.grad = None
    backward(clone, seed)
    return [parameter.grad for parameter in clone.parameters()]


def same_mismatch(error):
    """The text of a RankMismatchError, which all ranks must have."""
    assert isinstance(error, hq.RankMismatchError)
    assert len(set(gathered(str(error)))) == 1
    return str(error)


def recover(compressor, optimizer):
    """What a training loop does that has left a step, on every rank."""
    compressor.reset()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    hvd.barrier()  # the control tensors that are on their way have the parameters' names

"""Programs of faults; tests/ranks/test_torch.py runs them as ``faults.py FAULT EXCHANGE``."""

import os
import sys
import time

import horovod.torch as hvd
import torch
from common import backward, mlp, recover

import hvd_quant.torch as hq


def restart(model: torch.nn.Module, optimizer: torch.optim.Optimizer, compressor: hq.QSGDCompressor) -> None:
    """Shut Horovod down between backward and step. What is begun then may get the same numbers from it."""
    for _ in range(2):
        backward(model)
        recover(compressor, optimizer)
    backward(model)
    hvd.barrier()  # Horovod itself does not like to be shut down at work
    hvd.shutdown()
    hvd.init()
    others = [hvd.allreduce_async(torch.ones(4), name=f"other {i}") for i in range(40)]
    compressor.reset()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert all(torch.equal(hvd.synchronize(handle), torch.ones(4)) for handle in others)


def main() -> None:
    fault, exchange = sys.argv[1:]
    hvd.init()
    model = mlp()
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=3000)
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    last = hvd.rank() == hvd.size() - 1
    if fault == "restarts":
        restart(model, optimizer, compressor)
    for step in range(6):
        optimizer.zero_grad()
        if fault == "joins" and last and step == 3:
            hvd.join()
        backward(model, step)
        if fault == "dies" and last and step == 3:
            os._exit(3)
        if fault == "slow" and last and step == 3:
            time.sleep(3)
        optimizer.step()
    print(f"rank {hvd.rank()} has finished", flush=True)


if __name__ == "__main__":
    main()

"""Programs of faults that end the job; tests/test_parallel.py runs them as ``faults.py FAULT EXCHANGE``."""

import os
import sys
import time

import horovod.torch as hvd
import torch
from common import backward, mlp

import hvd_quant.torch as hq


def main() -> None:
    fault, exchange = sys.argv[1:]
    hvd.init()
    model = mlp()
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=hq.QSGDCompressor(exchange=exchange, fusion_bytes=3000),
    )
    last = hvd.rank() == hvd.size() - 1
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

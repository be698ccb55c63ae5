"""Has Horovod's tests use our compressors: Python imports this first, for scripts/horovod_suite.sh.

Where a test makes an optimizer without compression, it gets a compressor of ours, in Horovod's optimizer or
in our own, as HVD_QUANT_SUITE says.
"""

import inspect
import os
import sys


def replace() -> None:
    import horovod.torch as hvd
    import torch

    import hvd_quant.torch as hq

    stock, whose = hvd.DistributedOptimizer, os.environ["HVD_QUANT_SUITE"]
    make = {"none": stock, "horovod": stock, "ours": hq.DistributedOptimizer}[whose]
    signature = inspect.signature(stock)

    def distributed_optimizer(*args: object, **options: object) -> object:
        given = signature.bind(*args, **options).arguments
        if whose == "none" or given.get("op", hvd.Average) == hvd.Adasum or "compression" in given:
            return stock(*args, **options)
        process_set = given.get("process_set", hvd.global_process_set)
        compression = hq.QSGDCompressor(bits=8, min_numel=0, process_set=process_set)
        return make(**given, compression=compression)

    hvd.DistributedOptimizer = distributed_optimizer
    if hasattr(torch.optim, "Muon"):  # the tests try all subclasses of Optimizer; this takes matrices only
        torch.optim.Muon.__bases__ = (torch.optim.SGD,)


if os.environ.get("HVD_QUANT_SUITE") and os.path.basename(sys.argv[0] if sys.argv else "") != "horovodrun":
    replace()

"""Check one part of an installation, in a process of its own: importing it may crash the process.

    python -m hvd_quant.cli.probe torch|tensorflow|codec

The last line of its output is a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any

from hvd_quant.cli.facts import Facts, describe

VALUES = 1 << 22  # to measure the codec's speed with
REPEATS = 5


def horovod(name: str) -> Facts:
    """Describe how Horovod was built, for a framework that has been imported."""
    try:
        hvd = import_module(f"horovod.{name}")
    except Exception as error:  # an ImportError, or whatever a broken binary raises
        return {"built": False, "error": describe(error)}
    if not hasattr(hvd, "mpi_built"):  # horovod.torch imports even where it was not built
        return {"built": False, "error": "its extension module was not built"}
    questions = ("mpi", "gloo", "nccl", "cuda", "rocm")
    return {"built": True, **{one: bool(getattr(hvd, f"{one}_built")()) for one in questions}}


def torch() -> Facts:
    """Describe torch, and check that its operations decode what the native codec encodes."""
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "threads": torch.get_num_threads(),
        "horovod": horovod("torch"),
    }


def tensorflow() -> Facts:
    """Describe TensorFlow, and which Keras its users get."""
    import tensorflow as tf

    return {
        "version": tf.__version__,
        "cuda": tf.sysconfig.get_build_info().get("cuda_version"),
        "gpus": len(tf.config.list_physical_devices("GPU")),
        "keras": tf.keras.__version__,
        "horovod": horovod("tensorflow"),
    }


def codec() -> Facts:
    """Check the native codec with every scheme, and measure the speed of the usual one."""
    import numpy as np

    import hvd_quant

    values = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
    for kind in (hvd_quant.QSGD, hvd_quant.NUQSGD):
        for bits in range(2, 9):
            scheme = kind(bits=bits, norm="max")
            decoded = hvd_quant.decode(hvd_quant.encode(values, scheme))
            check(values, decoded, scheme)
    large, scheme = np.resize(values, VALUES), hvd_quant.QSGD(bits=4)
    encoding, decoding = [], []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        payload = hvd_quant.encode(large, scheme)
        encoded = time.perf_counter()
        hvd_quant.decode(payload)
        encoding.append(encoded - begin)
        decoding.append(time.perf_counter() - encoded)
    return {
        "isa": hvd_quant.native_isa(),
        "encode_values_s": VALUES / min(encoding),
        "decode_values_s": VALUES / min(decoding),
    }


def check(values: Any, decoded: Any, scheme: Any) -> None:
    """Check that every value became one of the two levels that it lies between.

    Raises:
        RuntimeError: one did not.
    """
    import numpy as np

    levels = np.array(scheme.levels())
    for at in range(0, len(values), scheme.bucket_size):
        bucket, found = values[at : at + scheme.bucket_size], decoded[at : at + scheme.bucket_size]
        ratios = np.abs(bucket) / np.abs(bucket).max()
        above = np.clip(np.searchsorted(levels, ratios), 1, len(levels) - 1)
        reached = np.abs(found) / np.abs(bucket).max()
        near = np.minimum(np.abs(reached - levels[above]), np.abs(reached - levels[above - 1]))
        if not (near < 1e-5).all() or (found * bucket < 0).any():
            raise RuntimeError(f"the codec's self-test failed with {scheme}")


PARTS = {"torch": torch, "tensorflow": tensorflow, "codec": codec}


def main() -> int:
    (name,) = sys.argv[1:]
    try:
        found = PARTS[name]()
    except Exception as error:
        found = {"error": describe(error)}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # how a broken framework unloads does not matter


if __name__ == "__main__":
    raise SystemExit(main())

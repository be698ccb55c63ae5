"""Makes the golden files of the current wire version: run by hand, when there is something new to keep.

    python tests/golden/make.py

Writes tests/golden/v<version>/: for each case a payload <name>.bin as the native codec made it, and in
cases.npz its input, its seed and the float32 values that it decodes to. Released files stay as they are:
every later hvd_quant must decode them to the same bits. So the script only adds what is not there.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvd_quant import NUQSGD, QSGD, decode, encode, wire
from hvd_quant.schemes import Scheme

Case = tuple[str, Scheme, np.ndarray]


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(20240817)
    for norm in ("max", "l2"):
        for bits in range(2, 9):
            # 37 values: a short last bucket, and codes that end inside a byte for every width but 8.
            yield f"{norm}-{bits}bit", QSGD(bits, norm, 16), rng.standard_normal(37).astype(np.float32)
        small = QSGD(4, norm, 8)
        non_finite = rng.standard_normal(40).astype(np.float32)
        non_finite[[11, 17, 30]] = np.nan, np.inf, -np.inf
        yield f"{norm}-non-finite", small, non_finite
        zeros = rng.standard_normal(24).astype(np.float32)
        zeros[8:16] = 0, -0.0, 0, -0.0, 0, 0, -0.0, 0
        yield f"{norm}-zeros", small, zeros
        tiny = rng.standard_normal(40) * np.repeat([1e-44, 1e-40, 1e-36, 2.0**-91, 2.0**-89], 8)
        yield f"{norm}-tiny", small, tiny.astype(np.float32)
        # Several chunks of 2048 values, cut across by the buckets.
        yield f"{norm}-long", QSGD(5, norm, 300), rng.standard_normal(4500).astype(np.float32)
    largest = np.finfo(np.float32).max
    yield "max-huge", QSGD(3, "max", 8), np.array([largest, -largest, 1e38, 0], np.float32)
    yield "max-one-bucket", QSGD(6, "max", 2**63 - 1), rng.standard_normal(100).astype(np.float32)
    yield "max-bucket-of-one", QSGD(7, "max", 1), rng.standard_normal(9).astype(np.float32)
    yield "max-empty", QSGD(), np.zeros(0, np.float32)
    for norm in ("max", "l2"):
        for bits in range(2, 9):
            values = rng.standard_normal(37) * np.exp2(-rng.integers(0, 12, 37))
            yield f"nuqsgd-{norm}-{bits}bit", NUQSGD(bits, norm, 16), values.astype(np.float32)
    special = (rng.standard_normal(48) * np.repeat([1, 1, 0, 1e-44, 1e-38, 2.0**-91], 8)).astype(np.float32)
    special[3] = np.nan
    yield "nuqsgd-l2-special", NUQSGD(8, "l2", 8), special
    yield "nuqsgd-max-huge", NUQSGD(3, "max", 8), np.array([largest, -largest, 1e38, 0], np.float32)
    for coding in ("elias", "huffman"):
        # Each form; a payload of 2^14 values and more, in four lanes; digits with escapes.
        yield f"{coding}-stored", QSGD(8, "max", 16, coding), rng.standard_normal(37).astype(np.float32)
        dense = rng.choice([0, 0, 0, 0, 1, -1, 2], 1001).astype(np.float32)
        dense[7] = 127
        yield f"{coding}-dense", QSGD(8, "max", 2000, coding), dense
        sparse = rng.standard_normal(3001) * (rng.random(3001) < 0.03)
        yield f"{coding}-sparse", NUQSGD(6, "l2", 512, coding), sparse.astype(np.float32)
        lanes = (rng.laplace(size=2**14 + 77) ** 3).astype(np.float32)
        yield f"{coding}-lanes", NUQSGD(5, "l2", 4096, coding), lanes


def main() -> None:
    folder = Path(__file__).parent / f"v{wire.VERSION}"
    folder.mkdir(exist_ok=True)
    arrays = {}
    if (folder / "cases.npz").exists():
        with np.load(folder / "cases.npz") as released:
            arrays.update(released)
    for seed, (name, scheme, values) in enumerate(cases(), start=2**63):
        if f"{name}.seed" in arrays:
            continue
        payload = encode(values, scheme, seed=seed, backend="native")
        payload.tofile(folder / f"{name}.bin")
        arrays[f"{name}.input"] = values
        arrays[f"{name}.seed"] = np.uint64(seed)
        arrays[f"{name}.values"] = decode(payload, backend="native")
    np.savez_compressed(folder / "cases.npz", **arrays)


if __name__ == "__main__":
    main()

"""Rounding to levels and back, in torch operations.

On a GPU memory bandwidth is the limit, so these make few passes over memory. No pass has a data-dependent
shape, and none waits for the device. docs/gpu.md counts them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from hvd_quant import wire
from hvd_quant.codec import cuda
from hvd_quant.codec.noise import FRACTION_BITS
from hvd_quant.codec.torch_bytes import as_words, round_up, unpack
from hvd_quant.schemes import Scheme

# See docs/wire-format.md: below TINY_NORM, decoders do the arithmetic on values scaled by TINY_PRESCALE.
TINY_NORM = 2.0**-90
TINY_PRESCALE = 2.0**60
SMALLEST_NORMAL = 2.0**-126  # float32
MANTISSA_BITS = 23  # float32
FAST_BITS = 5  # up to this many, `_round_down_fast` resolves the noise finely enough


def quantize(
    values: torch.Tensor, scheme: Scheme, seed: int, shift: int, norms: torch.Tensor
) -> torch.Tensor:
    """Write the norms, one float32 per bucket, and return the codes.

    A norm that float32 cannot divide into steps of full precision is raised to the smallest that it can. With
    a norm that is not finite, values become 0 or NaN, and the integer that NaN is converted to has 0 in its
    low bits on every device.

    Returns:
        uint8, a multiple of 8, whose low ``scheme.bits`` bits are the codes, and 0 beyond the last value. The
        other bits are undefined.
    """
    bucket_size = min(scheme.bucket_size, values.numel())
    if values.dtype == torch.float64:
        values = values.to(torch.float32)
    if values.numel() % bucket_size:
        values = torch.nn.functional.pad(values, (0, -values.numel() % bucket_size))
    x = values.view(-1, bucket_size)
    if scheme.norm == "max":
        torch.linalg.vector_norm(x, float("inf"), dim=1, dtype=torch.float32, out=norms)
    else:
        norms.copy_(torch.linalg.vector_norm(x, 2, dim=1, dtype=torch.float64))
    codes = torch.empty(round_up(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if codes.numel() > x.numel():
        codes[x.numel() :].zero_()
    if scheme.spacing == "exponential":
        round_ = _round_to_power
    else:
        round_ = _round_down_fast if scheme.bits <= FAST_BITS else _round_down
    round_(x, norms, scheme, seed, shift, codes[: x.numel()].view(x.shape))
    return codes


def _round_down_fast(
    x: torch.Tensor, norms: torch.Tensor, scheme: Scheme, seed: int, shift: int, codes: torch.Tensor
) -> None:
    """Compute codes of uniform levels: the integer part of value / step + noise + offset.

    The offset makes the sum positive, so that its conversion to an integer rounds down, and vanishes from the
    codes' bits. It costs precision: sums are multiples of ``unit``. The noise keeps away from 0 and 1 by as
    much, so that a value on a level stays there, and that no rounding error leads beyond the last level.
    """
    norms.clamp_(min=scheme.num_levels * SMALLEST_NORMAL)
    step = _divided(norms, scheme.num_levels).unsqueeze(1)
    offset = 2.0**scheme.bits
    unit = offset * 2.0**-MANTISSA_BITS
    scaled = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if scheme.rounding == "nearest":
        scaled.fill_(offset + 0.5)
    else:
        _uniform(scaled, offset + unit, offset + 1 - unit, seed, shift)
    codes.copy_(scaled.addcdiv_(x, step))


def _round_down(
    x: torch.Tensor, norms: torch.Tensor, scheme: Scheme, seed: int, shift: int, codes: torch.Tensor
) -> None:
    """Compute codes of uniform levels, with the full precision of value / step."""
    norms.clamp_(min=scheme.num_levels * SMALLEST_NORMAL)
    scaled = x / _divided(norms, scheme.num_levels).unsqueeze(1)
    if scheme.rounding == "nearest":
        floor = scaled.add_(0.5).floor_()
    else:
        floor, noise = scaled.floor(), torch.empty_like(scaled)
        _uniform(noise, 0.0, 1.0, seed, shift)
        floor += noise < scaled.sub_(floor)
    codes.copy_(floor.clamp_(-scheme.num_levels, scheme.num_levels))


def _round_to_power(
    x: torch.Tensor, norms: torch.Tensor, scheme: Scheme, seed: int, shift: int, codes: torch.Tensor
) -> None:
    """Compute codes of levels that are powers of two, from values in units of half the norm.

    As in the native codec, the mantissa of a float is the probability of rounding it up to the next power, so
    random bits are added to it, and the exponent is kept. For v below the lowest power p, (v + p) / 2 has
    that mantissa, and is greater than v; for all others it is not.
    """
    norms.clamp_(min=2 * SMALLEST_NORMAL)
    scaled = (x / (norms / 2).unsqueeze(1)).abs_()
    lowest = 2.0 ** (2 - scheme.num_levels)
    lifted = torch.add(torch.tensor(lowest / 2), scaled, alpha=0.5)
    bits = torch.maximum(scaled, lifted, out=scaled).view(torch.int32)
    below = (127 + round(math.log2(lowest)) - 1) << MANTISSA_BITS  # becomes level 0
    if scheme.rounding == "nearest":
        bits += 2 ** (MANTISSA_BITS - 1) - below
    else:
        # All ones are left out: with them, a rounding error of the largest value could exceed the norm.
        top = 2**MANTISSA_BITS - 1
        random = torch.empty_like(bits)
        random.random_(-below, top - below, generator=_generator(x.device, seed))
        if shift:
            random += below + (shift >> (FRACTION_BITS - MANTISSA_BITS))
            random.remainder_(top).sub_(below)
        bits += random
    levels = (bits >> MANTISSA_BITS).to(torch.uint8)
    torch.where(x < 0, levels.neg(), levels, out=codes)
    codes *= (norms < float("inf")).unsqueeze(1)


def _uniform(out: torch.Tensor, low: float, high: float, seed: int, shift: int) -> None:
    """Fill with uniform numbers, each shifted by a fraction of their range, cyclically."""
    start = (high - low) * shift / 2**FRACTION_BITS
    out.uniform_(low + start, high + start, generator=_generator(out.device, seed))
    if shift:
        out.sub_((out >= high).to(out.dtype), alpha=high - low)


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    """Return a generator with that seed; in a CUDA graph torch's own, which differs in every replay."""
    return None if cuda.capturing(device) else torch.Generator(device).manual_seed(_mix64(seed))


def _mix64(x: int) -> int:
    """Return the finalizer of splitmix64: torch's CPU generator uses a seed's low 32 bits only."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def dequantize(payload: torch.Tensor, scheme: Scheme, count: int) -> torch.Tensor:
    if count == 0:
        return torch.zeros(0, dtype=torch.float32, device=payload.device)
    norms_end = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    norms = as_words(payload[wire.HEADER_SIZE : norms_end], torch.float32).unsqueeze(1)
    bucket_size = min(scheme.bucket_size, count)
    packed = payload[norms_end : norms_end + wire.codes_size(scheme, count)]
    codes = unpack(packed, scheme.bits, round_up(count, bucket_size)).view(-1, bucket_size)
    if scheme.spacing == "exponential":
        powers = cuda.constant(_powers(scheme.num_levels), payload.device).view(torch.float32)
        values = powers[codes.view(torch.uint8).to(torch.int32)]
        values *= norms
    else:
        tiny = norms.abs() < TINY_NORM
        values = _times(codes, _divided(torch.where(tiny, norms * TINY_PRESCALE, norms), scheme.num_levels))
        values *= torch.where(tiny, 1.0 / TINY_PRESCALE, 1.0)
    return values.view(-1)[:count]


def _times(codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return their product, float32. Torch takes mixed types in one pass, but on a CPU it first copies the
    converted codes, which takes longer than to multiply in place.
    """
    if codes.device.type == "cpu":
        return codes.to(torch.float32).mul_(factors)
    return codes * factors


def _divided(x: torch.Tensor, by: int) -> torch.Tensor:
    """Divide by a tensor: by a number, CUDA operations multiply by the reciprocal, and round twice."""
    return x / cuda.constant(np.float32(by).tobytes(), x.device).view(torch.float32)


@functools.cache
def _powers(steps: int) -> bytes:
    """Return sign(c) * 2^(|c| - steps), 0 for c = 0, for all int8 c, by bit pattern: 256 float32."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
    return (np.sign(codes) * np.exp2(np.abs(codes) - steps)).astype(np.float32).tobytes()

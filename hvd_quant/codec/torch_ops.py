"""The codec in plain torch operations, for tensors on any device.

Payloads are those of the native codec, and decode to the same bits; only the noise of the rounding comes
from another generator, torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from hvd_quant import wire
from hvd_quant.codec import entropy
from hvd_quant.codec.message import PREAMBLE_SIZE, SIZE_SIZE, MessageLayout, stated_size
from hvd_quant.codec.noise import FRACTION_BITS, Noise
from hvd_quant.schemes import Scheme

# See docs/wire-format.md: below TINY_NORM, the arithmetic is done on values scaled by TINY_PRESCALE.
TINY_NORM = 2.0**-90
TINY_PRESCALE = 2.0**60
MANTISSA_BITS = 23  # of float32
TOP_POWER = 2.0**24  # what a norm is scaled to before rounding to powers: nothing near it is subnormal


def encode(
    values: torch.Tensor, scheme: Scheme, seed: int, shift: int = 0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Encode a one-dimensional floating-point tensor into a payload on its device.

    Args:
        values: float32, float64, float16 or bfloat16, of shape (d,).
        scheme: how.
        seed: of the noise, from torch's generator on that device, 0 to 2^64 - 1.
        shift: added to the noise, see `hvd_quant.codec.noise`.
        residual: for error feedback, see `hvd_quant.codec.native.encode`.

    Returns:
        The payload, uint8 of at most ``wire.max_payload_size(scheme, d)`` bytes, and exactly so many where
        its codes are packed. Elias and Huffman codes are made on the host: the packed payload is brought
        there and the coded one back, so that the host waits for the device.
    """
    count = values.numel()
    if scheme.coding != "packed":
        payload = encode(values, entropy.packed(scheme), seed, shift, residual).cpu().numpy()
        return torch.from_numpy(entropy.compact(payload, scheme, count)).to(values.device)
    if residual is not None:
        values = values.to(torch.float32) + residual
    payload = torch.zeros(wire.payload_size(scheme, count), dtype=torch.uint8, device=values.device)
    if count:
        norms, codes = _quantize(values, scheme, seed, shift)
        codes_at = wire.HEADER_SIZE + wire.norms_size(scheme, count)
        payload[wire.HEADER_SIZE : codes_at] = norms.view(torch.uint8)
        codes_end = codes_at + wire.codes_size(scheme, count)
        payload[codes_at:codes_end] = _pack(codes, scheme.bits)[: codes_end - codes_at]
    _write_header(payload, scheme, count)
    if residual is not None:
        lost = values - _dequantize(payload, scheme, count)
        residual.copy_(torch.where(lost.isfinite(), lost, residual))
    return payload


def decode_mean(
    payloads: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> torch.Tensor:
    """Decode n payloads of the same scheme and count into ``factor`` times their mean.

    Returns:
        A tensor of shape (count,) and of ``dtype``, on the payloads' device.

    Raises:
        ValueError: a payload is damaged, or they differ.
    """
    headers = []
    for payload in payloads:
        head = payload[: wire.HEADER_SIZE].cpu().numpy().tobytes()
        headers.append(wire.parse_header(head, payload.numel()))
    header = wire.common_header(headers)
    packed = [_packed(payload, header) for payload, header in zip(payloads, headers, strict=True)]
    return _mean(packed, header, dtype, factor)


def _mean(
    payloads: Sequence[torch.Tensor], header: wire.Header, dtype: torch.dtype, factor: float
) -> torch.Tensor:
    """``factor`` times the mean of packed payloads, which have been checked."""
    total = _dequantize(payloads[0], header.scheme, header.count)
    for payload in payloads[1:]:
        total += _dequantize(payload, header.scheme, header.count)
    # As the native codec: the weight is rounded to float32 before it multiplies.
    weight = torch.tensor(factor / len(payloads), dtype=torch.float32, device=total.device)
    return total.mul_(weight).to(dtype)


def _packed(payload: torch.Tensor, header: wire.Header) -> torch.Tensor:
    """The payload with packed codes, checked; its header is of no meaning."""
    if header.scheme.coding != "packed":
        return torch.from_numpy(entropy.expand(payload.cpu().numpy(), header)).to(payload.device)
    wire.check_body(header, int(_checksum(payload[wire.HEADER_SIZE :], wire.FIRST_BODY_WORD)))
    used = wire.used_size(header.scheme, header.count)
    if used < payload.numel() and bool(payload[used:].any()):
        raise ValueError("payload is damaged: its padding is not zero")
    return payload


def encode_message(
    values: Sequence[torch.Tensor],
    layout: MessageLayout,
    noise: Noise,
    message: torch.Tensor,
    residuals: Sequence[torch.Tensor] = (),
) -> int:
    """Encode all segments of a message; see `hvd_quant.codec.native.encode_message`.

    Where the message's size varies, it waits for the device; see `encode`.
    """
    end = PREAMBLE_SIZE + (SIZE_SIZE if layout.varies else 0)
    for segment, seed, shift in zip(layout.segments, noise.seeds, noise.shifts, strict=True):
        place = slice(segment.start, segment.start + segment.count)
        part = values[segment.tensor].detach().reshape(-1)[place]
        residual = residuals[segment.tensor].view(-1)[place] if residuals else None
        payload = encode(part, segment.scheme, int(seed), int(shift), residual)
        message[end : end + payload.numel()] = payload
        end += payload.numel()
    head = layout.preamble + (end.to_bytes(SIZE_SIZE, "little") if layout.varies else b"")
    message[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8), non_blocking=True)
    return end


def decode_messages(
    messages: Sequence[torch.Tensor], layout: MessageLayout, out: Sequence[torch.Tensor], factor: float = 1.0
) -> None:
    """Decode n messages of the same layout; see `hvd_quant.codec.native.decode_messages`.

    Raises:
        ValueError: a message is damaged, or not of this layout; ``out`` may then hold anything.
    """
    rest = []  # of each message
    for number, message in enumerate(messages):
        size = stated_size(message) if layout.varies else layout.size
        if message.numel() != size or message[:PREAMBLE_SIZE].cpu().numpy().tobytes() != layout.preamble:
            raise ValueError(f"message {number} is not the one that was expected")
        rest.append(message[PREAMBLE_SIZE + (SIZE_SIZE if layout.varies else 0) :])
    for segment, expected in zip(layout.segments, layout.headers, strict=True):
        packed = []
        for number, payloads in enumerate(rest):
            head = payloads[: wire.HEADER_SIZE].cpu().numpy()
            if len(head) < wire.HEADER_SIZE or _differ(head, expected):
                raise ValueError(f"message {number} holds another payload than was expected")
            header = wire.parse_header(head, segment.payload_size)
            if segment.scheme.coding == "packed":
                if payloads.numel() < segment.payload_size:
                    raise ValueError(f"message {number} is too short")
                payload, size = _packed(payloads[: segment.payload_size], header), segment.payload_size
            else:
                host, size = entropy.expand_first(payloads[: segment.payload_size].cpu().numpy(), header)
                payload = torch.from_numpy(host).to(payloads.device)
            packed.append(payload)
            rest[number] = payloads[size:]
        target = out[segment.tensor].view(-1)[segment.start : segment.start + segment.count]
        target.copy_(_mean(packed, header, target.dtype, factor))
    for number, payloads in enumerate(rest):
        if payloads.numel():
            raise ValueError(f"message {number} has bytes left over")


def add_lost(residual: torch.Tensor, lost: torch.Tensor, times: int) -> None:
    """Add ``times`` what a mean has lost, where the sum is finite; see `hvd_quant.codec.native.add_lost`."""
    kept = residual + times * lost
    residual.copy_(torch.where(kept.isfinite(), kept, residual))


def collect(
    values: Sequence[torch.Tensor],
    layout: MessageLayout,
    preamble: bytes,
    out: torch.Tensor,
    residuals: Sequence[torch.Tensor] = (),
) -> None:
    """Write a preamble and the values of a layout's segments; see `hvd_quant.codec.native.collect`."""
    out[:PREAMBLE_SIZE].copy_(torch.frombuffer(bytearray(preamble), dtype=torch.uint8), non_blocking=True)
    floats, end = out[PREAMBLE_SIZE:].view(torch.float32), 0
    for segment in layout.segments:
        place = slice(segment.start, segment.start + segment.count)
        room = floats[end : end + segment.count]
        room.copy_(values[segment.tensor].detach().reshape(-1)[place])
        if residuals:
            residual = residuals[segment.tensor].view(-1)[place]
            room += residual
            size = min(segment.scheme.bucket_size, segment.count)
            sent = torch.nn.functional.pad(room.isfinite(), (0, -segment.count % size), value=True)
            sent = sent.view(-1, size).all(1).repeat_interleave(size)[: segment.count]
            residual.masked_fill_(sent, 0.0)
        end += segment.count


def average(parts: Sequence[torch.Tensor], preamble: bytes, out: torch.Tensor) -> None:
    """Write the mean of what has been collected; see `hvd_quant.codec.native.average`.

    Waits for the device once.
    """
    if all(part.numel() == PREAMBLE_SIZE + 4 * out.numel() for part in parts):
        beginnings = torch.stack([part[:PREAMBLE_SIZE] for part in parts]).cpu().numpy()
    else:
        beginnings = np.zeros((len(parts), 0), np.uint8)
    for number, beginning in enumerate(beginnings):
        if beginning.tobytes() != preamble:
            raise ValueError(f"message {number} is not the one that was expected")
    out.copy_(_words(parts[0][PREAMBLE_SIZE:], torch.float32))
    for part in parts[1:]:
        out += _words(part[PREAMBLE_SIZE:], torch.float32)
    out *= 1 / len(parts)


def _differ(header: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two headers do, but for their checksums."""
    differs = header != expected
    differs[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = False
    return bool(differs.any())


def empty(count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
    """Room for a message, or for values, on the device of ``like``."""
    return torch.empty(count, dtype=getattr(torch, dtype), device=like.device)


def _quantize(
    values: torch.Tensor, scheme: Scheme, seed: int, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms (float32, one a bucket) and codes (int8, one a value of the filled-up last bucket too)."""
    fill = -values.numel() % min(scheme.bucket_size, values.numel())
    x = values.to(torch.float32)
    if fill:
        x = torch.nn.functional.pad(x, (0, fill))
    x = x.view(-1, min(scheme.bucket_size, values.numel()))
    if scheme.norm == "max":
        norms = torch.linalg.vector_norm(x, float("inf"), dim=1)
    else:
        norms = torch.linalg.vector_norm(x, 2, dim=1, dtype=torch.float64).to(torch.float32)
    norms = torch.where(norms < float("inf"), norms, float("nan"))
    prescale = torch.where(norms < TINY_NORM, TINY_PRESCALE, 1.0)
    # What the norm becomes. An all-zero bucket is divided by 1, a non-finite one gets codes of 0.
    top = scheme.steps if scheme.spacing == "uniform" else TOP_POWER
    scale = torch.nan_to_num(top / torch.where(norms > 0, norms * prescale, 1.0), nan=0.0)
    generator = None  # rounding to nearest needs none
    if scheme.rounding != "nearest":
        generator = torch.Generator(x.device).manual_seed(_mix64(seed))
    scaled = x * (prescale.unsqueeze(1))
    scaled *= scale.unsqueeze(1)
    scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # what a non-finite bucket leaves
    round_ = _round_down if scheme.spacing == "uniform" else _round_to_power
    codes = round_(scaled, scheme.steps, generator, shift)
    return norms, codes.view(-1)[: values.numel()]


def _round_down(
    scaled: torch.Tensor, steps: int, generator: torch.Generator | None, shift: int
) -> torch.Tensor:
    """Codes of values in units of a uniform level, int8; overwrites ``scaled``."""
    if generator is None:
        return scaled.add_(0.5).floor_().clamp_(-steps, steps).to(torch.int8)
    noise = torch.rand(scaled.shape, generator=generator, device=scaled.device)
    if shift:
        noise += shift / 2**FRACTION_BITS
        noise -= (noise >= 1.0).to(noise.dtype)
    floor = scaled.floor()
    floor += noise < scaled.sub_(floor)
    return floor.clamp_(-steps, steps).to(torch.int8)


def _round_to_power(
    scaled: torch.Tensor, steps: int, generator: torch.Generator | None, shift: int
) -> torch.Tensor:
    """Codes of values in units of 1 / TOP_POWER of the norm, rounded to powers of two, int8.

    As the native codec: the mantissa of a float is the probability of rounding it up to the next power, so
    random bits are added to it, and the exponent is kept. Below the lowest power, value + power has that
    mantissa. Overwrites ``scaled``.
    """
    lowest = TOP_POWER * 2.0 ** (1 - steps)
    negative = scaled < 0
    scaled.abs_()
    below = scaled < lowest
    lifted = torch.where(below, scaled + lowest, scaled).view(torch.int32)
    if generator is None:
        lifted += 2 ** (MANTISSA_BITS - 1)
    else:
        random = torch.empty_like(lifted)
        random.random_(0, 2**MANTISSA_BITS, generator=generator)
        if shift:
            random += shift >> (FRACTION_BITS - MANTISSA_BITS)
            random &= 2**MANTISSA_BITS - 1
        lifted += random
    lifted >>= MANTISSA_BITS
    exponent = 127 + round(math.log2(lowest))
    levels = lifted.sub_(exponent - 1).sub_(below.to(torch.int32)).clamp_(0, steps).to(torch.int8)
    return torch.where(negative, -levels, levels)


def _mix64(x: int) -> int:
    """The finalizer of splitmix64: torch's CPU generator looks at a seed's low 32 bits alone."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _dequantize(payload: torch.Tensor, scheme: Scheme, count: int) -> torch.Tensor:
    if count == 0:
        return torch.zeros(0, dtype=torch.float32, device=payload.device)
    codes_at = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    norms = _words(payload[wire.HEADER_SIZE : codes_at], torch.float32)
    codes_end = codes_at + wire.codes_size(scheme, count)
    codes = _unpack(payload[codes_at:codes_end], scheme.bits, count)
    bucket_size = min(scheme.bucket_size, count)
    codes = torch.nn.functional.pad(codes, (0, -count % bucket_size)).view(-1, bucket_size)
    if scheme.spacing == "exponential":
        values = _powers(codes, scheme.steps)
        values *= norms.unsqueeze(1)
        return values.view(-1)[:count]
    tiny = norms.abs() < TINY_NORM
    steps = torch.where(tiny, norms * TINY_PRESCALE, norms) / scheme.steps
    unscale = torch.where(tiny, 1.0 / TINY_PRESCALE, 1.0)
    values = codes.to(torch.float32)
    values *= steps.unsqueeze(1)
    values *= unscale.unsqueeze(1)
    return values.view(-1)[:count]


def _powers(codes: torch.Tensor, steps: int) -> torch.Tensor:
    """sign(c) * 2^(|c| - steps) for every code c, 0 for 0: float32, put together from its bits."""
    levels = codes.to(torch.int32).abs_()
    exponents = torch.where(levels == 0, 0, levels + (127 - steps)) << MANTISSA_BITS
    powers = exponents.view(torch.float32)
    return torch.where(codes < 0, -powers, powers)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Eight codes into ``bits`` bytes, value i in bits [i * bits, (i + 1) * bits)."""
    if bits == 8:
        return codes.view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(torch.uint8)
    fields = codes.bitwise_and_(2**bits - 1)
    if 8 % bits == 0:
        fields = fields.view(-1, 8 // bits)
        packed = fields[:, 0].clone()
        for place in range(1, 8 // bits):
            packed |= fields[:, place] << (bits * place)
        return packed
    fields = fields.view(-1, 8)
    word = fields[:, 0].to(torch.int64)
    for place in range(1, 8):
        word |= fields[:, place].to(torch.int64) << (bits * place)
    return word.unsqueeze(1).view(torch.uint8)[:, :bits].reshape(-1)


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `_pack`: ``count`` codes, int8."""
    if bits == 8:
        return packed.view(torch.int8)
    mask, sign = 2**bits - 1, 2 ** (bits - 1)
    if 8 % bits == 0:
        fields = torch.stack([packed >> (bits * place) & mask for place in range(8 // bits)], dim=1)
    else:
        octets = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
        word = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64)
        fields = torch.cat([word >> (bits * place) & mask for place in range(8)], dim=1).to(torch.uint8)
    return ((fields.view(-1)[:count] ^ sign) - sign).view(torch.int8)


def _words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as words of ``dtype``; copied where they are not aligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _checksum(data: torch.Tensor, first_word: int) -> torch.Tensor:
    """The sum of (2 i + 1) * word i, an int64 scalar to be taken mod 2^32."""
    words = _words(data, torch.int32)
    weights = torch.arange(
        2 * first_word + 1, 2 * (first_word + words.numel()) + 1, 2, dtype=torch.int64, device=data.device
    )
    return (weights * words).sum() & 0xFFFFFFFF


def _write_header(payload: torch.Tensor, scheme: Scheme, count: int) -> None:
    """Fill in the header. The checksum is known on the device alone, so it is added there."""
    header = torch.frombuffer(bytearray(wire.pack_header(scheme, count, 0)), dtype=torch.int32)
    words = payload.view(torch.int32)
    words[: wire.FIRST_BODY_WORD] = header.to(payload.device, non_blocking=True)
    total = words[wire.CHECKSUM_WORD].to(torch.int64) + _checksum(
        payload[wire.HEADER_SIZE :], wire.FIRST_BODY_WORD
    )
    words[wire.CHECKSUM_WORD] = ((total + 2**31) & 0xFFFFFFFF) - 2**31

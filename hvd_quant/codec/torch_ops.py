"""The codec for tensors on any device: kernels of our own where there are such, else torch's operations.

The payloads of torch's operations decode to the same bits everywhere. They differ from the native codec's in
the noise of the rounding, which torch's own generator draws, and in norms (docs/wire-format.md). On a GPU
memory is the limit, so `encode` makes few passes over it, of which none has a shape that depends on the data,
and none waits for the device. docs/gpu.md counts them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from hvd_quant import wire
from hvd_quant.codec import cuda, entropy
from hvd_quant.codec.message import PREAMBLE_SIZE, SIZE_SIZE, MessageLayout, Segment, stated_size
from hvd_quant.codec.noise import FRACTION_BITS, Noise
from hvd_quant.schemes import Scheme

# See docs/wire-format.md: below TINY_NORM, decoders do the arithmetic on values scaled by TINY_PRESCALE.
TINY_NORM = 2.0**-90
TINY_PRESCALE = 2.0**60
SMALLEST_NORMAL = 2.0**-126  # of float32
MANTISSA_BITS = 23  # of float32
FAST_BITS = 5  # up to so many, `_round_down_fast` resolves the noise finely enough
_FOUND_BY_KERNELS = "a GPU's kernels find damage that plain operations do not find"


def encode(
    values: torch.Tensor, scheme: Scheme, seed: int, shift: int = 0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Encode a one-dimensional floating-point tensor into a payload on its device.

    Args:
        values: float32, float64, float16 or bfloat16, of shape (d,).
        scheme: how.
        seed: of the noise, 0 to 2^64 - 1.
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
    layout = _alone(scheme, count, str(values.dtype).removeprefix("torch."))
    if (kernels := cuda.kernels(values.device)) is not None and kernels.take(layout):
        message = torch.empty(layout.size, dtype=torch.uint8, device=values.device)
        noise = Noise(np.array([seed], np.uint64), np.array([shift], np.uint32))
        kernels.encode([values], layout, noise, message, [] if residual is None else [residual])
        return message[PREAMBLE_SIZE:]
    payload = torch.empty(wire.payload_size(scheme, count), dtype=torch.uint8, device=values.device)
    _encode(values, scheme, seed, shift, residual, payload)
    return payload


@functools.lru_cache(maxsize=64)
def _alone(scheme: Scheme, count: int, dtype: str) -> MessageLayout:
    """A message of one payload."""
    return MessageLayout([Segment(0, 0, count, dtype, scheme)], bytes(PREAMBLE_SIZE))


def _encode(
    values: torch.Tensor,
    scheme: Scheme,
    seed: int,
    shift: int,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
) -> None:
    """Write the packed payload, whose size is known."""
    count = values.numel()
    if residual is not None:
        values = values.to(torch.float32) + residual
    norms_end = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    used = norms_end + wire.codes_size(scheme, count)
    payload[: wire.HEADER_SIZE] = cuda.constant(_unsigned_header(scheme, count), values.device)
    if used < payload.numel():
        payload[used:].zero_()
    if count:
        norms = payload[wire.HEADER_SIZE : norms_end].view(torch.float32)
        _pack(_quantize(values, scheme, seed, shift, norms), scheme.bits, payload[norms_end:used])
    words = payload.view(torch.int32)
    _weighted_sum(words, out=words[wire.CHECKSUM_WORD])
    if residual is not None:
        lost = values - _dequantize(payload, scheme, count)
        residual.copy_(torch.where(lost.isfinite(), lost, residual))


class _Checks:
    """What must not be found in messages, looked at together: so the host waits for the device once."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []
        self._says: list[str] = []

    def refuse(self, found: torch.Tensor, says: str) -> None:
        """Add something: bool scalars, and the exception's text."""
        self._found.append(found)
        self._says.append(says)

    def hold(self) -> None:
        """Look at them. A CUDA graph that is being captured has nobody to tell, and goes without.

        Raises:
            ValueError: something was found.
        """
        if not self._found or cuda.capturing(self._found[0].device):
            return
        for found, says in zip(torch.stack(self._found).tolist(), self._says, strict=True):
            if found:
                raise ValueError(says)


def decode_mean(
    payloads: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> torch.Tensor:
    """Decode n payloads of the same scheme and count into ``factor`` times their mean.

    It waits for the device twice: for the headers, and for whether the payloads are sound.

    Returns:
        A tensor of shape (count,) and of ``dtype``, on the payloads' device.

    Raises:
        ValueError: a payload is damaged, or they differ.
    """
    headers = [
        wire.parse_header(head.tobytes(), payload.numel())
        for payload, head in zip(payloads, _heads(payloads), strict=True)
    ]
    header, checks, wrong = wire.common_header(headers), _Checks(), False
    layout = _alone(header.scheme, header.count, str(dtype).removeprefix("torch."))
    if (kernels := cuda.kernels(payloads[0].device)) is not None and kernels.take(layout):
        mean = torch.empty(header.count, dtype=dtype, device=payloads[0].device)
        aligned = [_words(payload, torch.int64).view(torch.uint8) for payload in payloads]
        if not kernels.decode(aligned, layout, [mean], factor, bare=True).any():
            return mean
        wrong = True
    packed = [_packed(payload, one, checks) for payload, one in zip(payloads, headers, strict=True)]
    mean = _mean(packed, header, dtype, factor)
    checks.hold()
    if wrong:
        raise ValueError(_FOUND_BY_KERNELS)
    return mean


def _heads(payloads: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The payloads' headers, as far as there are such, on the host, which waits once."""
    heads = [payload[: wire.HEADER_SIZE] for payload in payloads]
    ends = np.cumsum([head.numel() for head in heads])
    return np.split(torch.cat(heads).cpu().numpy(), ends[:-1]) if heads else []


def _mean(
    payloads: Sequence[torch.Tensor], header: wire.Header, dtype: torch.dtype, factor: float
) -> torch.Tensor:
    """``factor`` times the mean of packed payloads, which have been checked."""
    total = _dequantize(payloads[0], header.scheme, header.count)
    for payload in payloads[1:]:
        total += _dequantize(payload, header.scheme, header.count)
    # As the native codec: the weight is rounded to float32 before it multiplies.
    weight = torch.tensor(factor / len(payloads), dtype=torch.float32)
    return total.mul_(weight).to(dtype)


def _packed(payload: torch.Tensor, header: wire.Header, checks: _Checks) -> torch.Tensor:
    """The payload with packed codes; its header is of no meaning."""
    if header.scheme.coding != "packed":
        return torch.from_numpy(entropy.expand(payload.cpu().numpy(), header)).to(payload.device)
    words = _words(payload, torch.int32)
    # The checksum's own word is in the sum, too, with its weight.
    weight = 2 * wire.CHECKSUM_WORD + 1
    excess = _weighted_sum(words, torch.empty((), dtype=torch.int32, device=words.device))
    excess -= (weight + 1) * words[wire.CHECKSUM_WORD]
    checks.refuse(excess != 0, "payload is damaged: its checksum does not match its bytes")
    used = wire.used_size(header.scheme, header.count)
    if used < payload.numel():
        checks.refuse(payload[used:].any(), "payload is damaged: its padding is not zero")
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
    if (kernels := cuda.kernels(message.device)) is not None and kernels.take(layout):
        kernels.encode(values, layout, noise, message, residuals)
        return layout.size
    end = PREAMBLE_SIZE + (SIZE_SIZE if layout.varies else 0)
    for segment, seed, shift in zip(layout.segments, noise.seeds, noise.shifts, strict=True):
        place = slice(segment.start, segment.start + segment.count)
        part = values[segment.tensor].detach().reshape(-1)[place]
        residual = residuals[segment.tensor].view(-1)[place] if residuals else None
        if segment.scheme.coding == "packed":
            payload = message[end : end + segment.payload_size]
            _encode(part, segment.scheme, int(seed), int(shift), residual, payload)
        else:
            payload = encode(part, segment.scheme, int(seed), int(shift), residual)
            message[end : end + payload.numel()] = payload
        end += payload.numel()
    message[:PREAMBLE_SIZE] = cuda.constant(layout.preamble, message.device)
    if layout.varies:
        size = torch.frombuffer(bytearray(end.to_bytes(SIZE_SIZE, "little")), dtype=torch.uint8)
        message[PREAMBLE_SIZE : PREAMBLE_SIZE + SIZE_SIZE] = size.to(message.device)
    return end


def decode_messages(
    messages: Sequence[torch.Tensor], layout: MessageLayout, out: Sequence[torch.Tensor], factor: float = 1.0
) -> None:
    """Decode n messages of the same layout; see `hvd_quant.codec.native.decode_messages`.

    Raises:
        ValueError: a message is damaged, or not of this layout; ``out`` may then hold anything.
    """
    wrong = False
    if (kernels := cuda.kernels(messages[0].device)) is not None and kernels.take(layout):
        plain = all(one.is_contiguous() and not one.is_neg() for one in out)
        if plain and all(message.numel() == layout.size for message in messages):
            aligned = [_words(message, torch.int64).view(torch.uint8) for message in messages]
            found = kernels.decode(aligned, layout, out, factor)
            if cuda.capturing(found.device) or not found.any():
                return
            wrong = True
    # Slower, or because something is wrong: this says what.
    checks, rest = _Checks(), []  # of each message
    for number, message in enumerate(messages):
        size = stated_size(message) if layout.varies else layout.size
        if message.numel() != size or size < PREAMBLE_SIZE:
            raise ValueError(f"message {number} is not the one that was expected")
        preamble = cuda.constant(layout.preamble, message.device)
        other = (message[:PREAMBLE_SIZE] != preamble).any()
        checks.refuse(other, f"message {number} is not the one that was expected")
        rest.append(message[PREAMBLE_SIZE + (SIZE_SIZE if layout.varies else 0) :])
    for segment in layout.segments:
        header, packed = wire.Header(segment.scheme, segment.count, 0), []
        for number, payloads in enumerate(rest):
            foreign = f"message {number} holds another payload than was expected"
            if payloads.numel() < wire.HEADER_SIZE:
                raise ValueError(foreign)
            head = payloads[: wire.HEADER_SIZE].clone()
            head[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = 0
            checks.refuse(
                (head != cuda.constant(_unsigned_header(segment.scheme, segment.count), head.device)).any(),
                foreign,
            )
            if segment.scheme.coding == "packed":
                if payloads.numel() < segment.payload_size:
                    raise ValueError(f"message {number} is too short")
                payload, size = (
                    _packed(payloads[: segment.payload_size], header, checks),
                    segment.payload_size,
                )
            else:
                checks.hold()
                host = payloads[: segment.payload_size].cpu().numpy()
                host, size = entropy.expand_first(host, wire.parse_header(host, segment.payload_size))
                payload = torch.from_numpy(host).to(payloads.device)
            packed.append(payload)
            rest[number] = payloads[size:]
        target = out[segment.tensor].view(-1)[segment.start : segment.start + segment.count]
        target.copy_(_mean(packed, header, target.dtype, factor))
    for number, payloads in enumerate(rest):
        if payloads.numel():
            raise ValueError(f"message {number} has bytes left over")
    checks.hold()
    if wrong:
        raise ValueError(_FOUND_BY_KERNELS)


def add_error(residual: torch.Tensor, lost: torch.Tensor, times: int) -> None:
    """Add ``times`` what a mean has lost, where the sum is finite; see `hvd_quant.codec.native.add_error`."""
    kept = residual + times * lost
    residual.copy_(torch.where(kept.isfinite(), kept, residual))


def pack_float32(
    values: Sequence[torch.Tensor],
    layout: MessageLayout,
    preamble: bytes,
    out: torch.Tensor,
    residuals: Sequence[torch.Tensor] = (),
) -> None:
    """Write a preamble and the values of a layout's segments; see `hvd_quant.codec.native.pack_float32`."""
    out[:PREAMBLE_SIZE] = cuda.constant(preamble, out.device)
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


def mean_float32(parts: Sequence[torch.Tensor], preamble: bytes, out: torch.Tensor) -> None:
    """Write the mean of what has been collected; see `hvd_quant.codec.native.mean_float32`.

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


def empty(count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
    """Room for a message, or for values, on the device of ``like``."""
    return torch.empty(count, dtype=getattr(torch, dtype), device=like.device)


def _quantize(
    values: torch.Tensor, scheme: Scheme, seed: int, shift: int, norms: torch.Tensor
) -> torch.Tensor:
    """Write the norms, a float32 a bucket, and return the codes.

    A norm that float32 cannot divide into steps of full precision is raised to the smallest of which it can.
    Beside a norm that is not finite, values become 0 or NaN, and the integer that NaN is converted to has 0
    in its low bits on every device.

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
    codes = torch.empty(_up(x.numel(), 8), dtype=torch.uint8, device=x.device)
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
    """Codes of uniform levels: what is left of value / step + noise + offset, without its fraction.

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
    """Codes of uniform levels, with all the precision that value / step has."""
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
    """Codes of levels that are powers of two, from values in units of half the norm.

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
        # All ones are left out: with them, a rounding error of the largest value could lead beyond the norm.
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
    """Fill with uniform numbers, each moved up by a share of their range, and around its end."""
    start = (high - low) * shift / 2**FRACTION_BITS
    out.uniform_(low + start, high + start, generator=_generator(out.device, seed))
    if shift:
        out.sub_((out >= high).to(out.dtype), alpha=high - low)


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    """One with that seed; in a CUDA graph torch's own, which has other numbers in every replay."""
    return None if cuda.capturing(device) else torch.Generator(device).manual_seed(_mix64(seed))


def _mix64(x: int) -> int:
    """The finalizer of splitmix64: torch's CPU generator looks at a seed's low 32 bits alone."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _dequantize(payload: torch.Tensor, scheme: Scheme, count: int) -> torch.Tensor:
    if count == 0:
        return torch.zeros(0, dtype=torch.float32, device=payload.device)
    norms_end = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    norms = _words(payload[wire.HEADER_SIZE : norms_end], torch.float32).unsqueeze(1)
    bucket_size = min(scheme.bucket_size, count)
    packed = payload[norms_end : norms_end + wire.codes_size(scheme, count)]
    codes = _unpack(packed, scheme.bits, _up(count, bucket_size)).view(-1, bucket_size)
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
    """Their product, float32. Torch makes that of mixed types in one pass, but on a CPU brings the converted
    codes to other memory first, which takes longer than to multiply in place.
    """
    if codes.device.type == "cpu":
        return codes.to(torch.float32).mul_(factors)
    return codes * factors


def _divided(x: torch.Tensor, by: int) -> torch.Tensor:
    """By a tensor: of a number, torch's CUDA operation takes the reciprocal, and rounds twice."""
    return x / cuda.constant(np.float32(by).tobytes(), x.device).view(torch.float32)


@functools.cache
def _powers(steps: int) -> bytes:
    """sign(c) * 2^(|c| - steps), 0 for c = 0, of all int8 c, by their bit patterns: 256 float32."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
    return (np.sign(codes) * np.exp2(np.abs(codes) - steps)).astype(np.float32).tobytes()


# 8 codes of 3, 5, 6 or 7 bits are brought together in an int64, pairs of neighbours first, then pairs of
# pairs. For each round: where the upper one of a pair begins, in bytes; and the lower ones' places.
_ROUNDS = ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF))


def _pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Eight codes into ``bits`` bytes, value i in bits [i * bits, (i + 1) * bits). Overwrites the codes."""
    if bits == 8:
        out.copy_(codes[: out.numel()])
        return
    codes.bitwise_and_(2**bits - 1)
    if 8 % bits == 0:
        fields = codes.view(-1, 8 // bits)[: out.numel()]
        torch.add(fields[:, 0], fields[:, 1], alpha=2**bits, out=out)
        for place in range(2, 8 // bits):
            out.add_(fields[:, place], alpha=2 ** (bits * place))
        return
    words = codes.view(torch.int64)
    for width, lower in _ROUNDS:
        upper = (words >> (8 * width)).bitwise_and_(lower)
        words.sub_(upper, alpha=2 ** (8 * width) - 2 ** (bits * width))
    out.copy_(codes.view(-1, 8)[:, :bits].reshape(-1)[: out.numel()])


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `_pack`: ``count`` codes, int8; undefined where there are not so many."""
    if bits == 8:
        return torch.nn.functional.pad(packed.view(torch.int8), (0, count - packed.numel()))
    per = 8 // bits if 8 % bits == 0 else 8  # fields in `size` bytes
    size = 1 if 8 % bits == 0 else bits
    groups = -(-packed.numel() // size)
    codes = torch.empty(_up(max(count, groups * per), 8), dtype=torch.int8, device=packed.device)
    fields = codes[: groups * per].view(groups, per)
    # Each into the upper bits of its byte.
    if size == 1:
        octets = packed.view(torch.int8)
        for place in range(per):
            torch.bitwise_left_shift(octets, 8 - bits * (place + 1), out=fields[:, place])
    else:
        octets = torch.nn.functional.pad(packed, (0, groups * size - packed.numel())).view(groups, size)
        words = fields.view(torch.uint8)
        words[:, :size], words[:, size:] = octets, 0
        words = words.view(torch.int64)
        for width, lower in reversed(_ROUNDS):
            mask = sum(lower & (2 ** (bits * width) - 1) << shift for shift in range(0, 64, 16 * width))
            upper = (words >> (bits * width)).bitwise_and_(mask)
            words.add_(upper, alpha=2 ** (8 * width) - 2 ** (bits * width))
        fields <<= 8 - bits
    fields >>= 8 - bits  # brings the sign along
    return codes[:count]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as words of ``dtype``; copied where they are not aligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _weighted_sum(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the sum of (2 i + 1) * word i, modulo 2^32, to an int32 scalar; return that."""
    end = 2 * words.numel() + 1
    dtype = torch.int32 if end < 2**31 else torch.int64
    weighted = torch.arange(1, end, 2, dtype=dtype, device=words.device).mul_(words)
    if dtype == torch.int32:
        return torch.sum(weighted, 0, dtype=dtype, out=out)
    return out.copy_(weighted.sum())


@functools.lru_cache(maxsize=4096)
def _unsigned_header(scheme: Scheme, count: int) -> bytes:
    """A payload's header, with 0 for the checksum."""
    header = bytearray(wire.pack_header(scheme, count, 0))
    header[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = bytes(4)
    return bytes(header)

"""The codec for tensors on any device: our own kernels where there are some, else torch operations.

Payloads of torch operations decode to the same bits everywhere. They differ from the native codec's in the
rounding noise, which torch's own generator draws, and in norms (docs/wire-format.md). On a GPU memory
bandwidth is the limit, so `encode` makes few passes over memory. No pass has a data-dependent shape, and none
waits for the device. docs/gpu.md counts them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from hvd_quant import wire
from hvd_quant.codec import cuda, entropy
from hvd_quant.codec.message import (
    PREAMBLE_SIZE,
    SIZE_SIZE,
    SOMETHING_ELSE,
    MessageLayout,
    Messages,
    Segment,
)
from hvd_quant.codec.noise import Noise
from hvd_quant.codec.torch_bytes import as_words, is_aligned, pack, weighted_sum
from hvd_quant.codec.torch_rounding import dequantize, quantize
from hvd_quant.schemes import Scheme

_FOUND_BY_KERNELS = "a GPU's kernels find damage that plain operations do not find"


def encode(
    values: torch.Tensor,
    scheme: Scheme,
    seed: int,
    shift: int = 0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode a one-dimensional floating-point tensor into a payload on its device.

    Args:
        values: float32, float64, float16 or bfloat16, of shape (d,).
        scheme: how the values are quantized.
        seed: seed of the noise, 0 to 2^64 - 1.
        shift: offset of the noise, see `hvd_quant.codec.noise`.
        residual: for error feedback, see `hvd_quant.codec.native.encode`.
        out: output buffer, see there.

    Returns:
        The payload, uint8 of at most ``wire.max_payload_size(scheme, d)`` bytes, and exactly as many where
        its codes are packed; with ``out``, a view of what has been written. Elias and Huffman codes are made
        on the host: the packed payload is copied there and the result back, so that the host waits for the
        device.
    """
    count = values.numel()
    if scheme.coding != "packed":
        packed = encode(values, entropy.packed(scheme), seed, shift, residual).cpu().numpy()
        coded = torch.from_numpy(entropy.entropy_encode(packed, scheme, count))
        return coded.to(values.device) if out is None else out[: coded.numel()].copy_(coded)
    if out is not None and is_aligned(out):
        payload = out
    else:
        payload = torch.empty(wire.payload_size(scheme, count), dtype=torch.uint8, device=values.device)
    layout = _alone(scheme, count, str(values.dtype).removeprefix("torch."))
    if (kernels := cuda.kernels(values.device)) is not None and kernels.take(layout):
        noise = Noise(np.array([seed], np.uint64), np.array([shift], np.uint32))
        residuals = [] if residual is None else [residual]
        kernels.encode([values], layout, noise, payload, residuals, bare=True)
    else:
        _encode(values, scheme, seed, shift, residual, payload)
    return payload if out is None or payload is out else out.copy_(payload)


@functools.lru_cache(maxsize=64)
def _alone(scheme: Scheme, count: int, dtype: str) -> MessageLayout:
    """Return the layout of a message of one payload."""
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
        pack(quantize(values, scheme, seed, shift, norms), scheme.bits, payload[norms_end:used])
    words = payload.view(torch.int32)
    weighted_sum(words, out=words[wire.CHECKSUM_WORD])
    if residual is not None:
        lost = values - dequantize(payload, scheme, count)
        residual.copy_(torch.where(lost.isfinite(), lost, residual))


class _Checks:
    """Checks of messages that are read together, so that the host waits for the device once."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []
        self._says: list[str] = []

    def refuse(self, found: torch.Tensor, says: str) -> None:
        """Add a check: bool scalars that must be false, and the exception's text."""
        self._found.append(found)
        self._says.append(says)

    def hold(self) -> None:
        """Read the checks. A CUDA graph that is being captured cannot raise, and goes without.

        Raises:
            ValueError: something was found.
        """
        if not self._found or cuda.capturing(self._found[0].device):
            return
        for found, says in zip(torch.stack(self._found).tolist(), self._says, strict=True):
            if found:
                raise ValueError(says)


def decode_mean(
    payloads: Sequence[torch.Tensor],
    out: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> torch.Tensor:
    """Decode n payloads of the same scheme and count into ``factor`` times their mean.

    It waits for the device twice: for the headers, and for whether the payloads are sound.

    Args:
        payloads: contiguous one-dimensional uint8.
        out: output; contiguous, one-dimensional, on the payloads' device. By default a new tensor.
        dtype: dtype of the new tensor.
        factor: multiplies the mean.

    Returns:
        ``out``, or a tensor of shape (count,) and of ``dtype``, on the payloads' device.

    Raises:
        ValueError: a payload is damaged (``out`` is then undefined), or they differ.
    """
    headers = [
        wire.parse_header(head.tobytes(), payload.numel())
        for payload, head in zip(payloads, _heads(payloads), strict=True)
    ]
    header, checks, wrong = wire.common_header(headers), _Checks(), False
    if out is not None:
        wire.check_count(header, out.numel())
        dtype = out.dtype
    layout = _alone(header.scheme, header.count, str(dtype).removeprefix("torch."))
    if (kernels := cuda.kernels(payloads[0].device)) is not None and kernels.take(layout):
        mean = torch.empty(header.count, dtype=dtype, device=payloads[0].device) if out is None else out
        aligned = [as_words(payload, torch.int64).view(torch.uint8) for payload in payloads]
        if not kernels.decode(aligned, layout, [mean], factor, bare=True).any():
            return mean
        wrong = True
    packed = [_packed(payload, one, checks) for payload, one in zip(payloads, headers, strict=True)]
    mean = _mean(packed, header, dtype, factor, out)
    checks.hold()
    if wrong:
        raise ValueError(_FOUND_BY_KERNELS)
    return mean


def _heads(payloads: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Copy the payloads' headers, as far as they have any, to the host, which waits once."""
    heads = [payload[: wire.HEADER_SIZE] for payload in payloads]
    ends = np.cumsum([head.numel() for head in heads])
    return np.split(torch.cat(heads).cpu().numpy(), ends[:-1]) if heads else []


def _mean(
    payloads: Sequence[torch.Tensor],
    header: wire.Header,
    dtype: torch.dtype,
    factor: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``factor`` times the mean of packed payloads, which have been checked; in ``out``, if given."""
    total = dequantize(payloads[0], header.scheme, header.count)
    for payload in payloads[1:]:
        total += dequantize(payload, header.scheme, header.count)
    # As in the native codec: the weight is rounded to float32 before it multiplies.
    weight = torch.tensor(factor / len(payloads), dtype=torch.float32)
    return total.mul_(weight).to(dtype) if out is None else torch.mul(total, weight, out=out)


def _packed(
    payload: torch.Tensor, header: wire.Header, checks: _Checks, name: str = "payload"
) -> torch.Tensor:
    """Return the payload with packed codes; its header is meaningless. Errors call it by its name."""
    if header.scheme.coding != "packed":
        return torch.from_numpy(entropy.entropy_decode(payload.cpu().numpy(), header)).to(payload.device)
    words = as_words(payload, torch.int32)
    # The checksum's own word is in the sum, with its weight.
    weight = 2 * wire.CHECKSUM_WORD + 1
    excess = weighted_sum(words, torch.empty((), dtype=torch.int32, device=words.device))
    excess -= (weight + 1) * words[wire.CHECKSUM_WORD]
    checks.refuse(excess != 0, f"{name} is damaged: its checksum does not match its bytes")
    used = wire.used_size(header.scheme, header.count)
    if used < payload.numel():
        checks.refuse(payload[used:].any(), f"{name} is damaged: its padding is not zero")
    return payload


def encode_message(
    values: Sequence[torch.Tensor],
    layout: MessageLayout,
    noise: Noise,
    message: torch.Tensor,
    residuals: Sequence[torch.Tensor] = (),
) -> int:
    """Encode all segments of a message; see `hvd_quant.codec.native.encode_message`.

    If the message's size varies, it waits for the device; see `encode`.
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
    if not isinstance(messages, Messages):
        messages = Messages(messages)
    if (kernels := cuda.kernels(messages[0].device)) is not None and kernels.take(layout):
        plain = all(one.is_contiguous() and not one.is_neg() for one in out)
        if plain and all(message.numel() == layout.size for message in messages):
            aligned = [as_words(message, torch.int64).view(torch.uint8) for message in messages]
            found = kernels.decode(aligned, layout, out, factor)
            if cuda.capturing(found.device) or not found.any():
                return
            wrong = True
    # The slow path, which also explains what is wrong.
    messages.check_sizes(layout.fixed_size)
    checks, rest = _Checks(), []  # rest of each message
    for number, message in enumerate(messages):
        preamble = cuda.constant(layout.preamble, message.device)
        other = (message[:PREAMBLE_SIZE] != preamble).any()
        checks.refuse(other, f"{messages.name(number)} {SOMETHING_ELSE}")
        rest.append(message[PREAMBLE_SIZE + (SIZE_SIZE if layout.varies else 0) :])
    for segment in layout.segments:
        header, packed = wire.Header(segment.scheme, segment.count, 0), []
        for number, payloads in enumerate(rest):
            name = messages.name(number)
            foreign = f"{name} holds another payload than was expected"
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
                    raise ValueError(f"{name} is too short")
                payload, size = (
                    _packed(payloads[: segment.payload_size], header, checks, name),
                    segment.payload_size,
                )
            else:
                checks.hold()
                host = payloads[: segment.payload_size].cpu().numpy()
                try:
                    host, size = entropy.entropy_decode_first(
                        host, wire.parse_header(host, segment.payload_size)
                    )
                except ValueError as error:
                    raise ValueError(str(error).replace("payload", name, 1)) from None
                payload = torch.from_numpy(host).to(payloads.device)
            packed.append(payload)
            rest[number] = payloads[size:]
        target = out[segment.tensor].view(-1)[segment.start : segment.start + segment.count]
        _mean(packed, header, target.dtype, factor, target)
    for number, payloads in enumerate(rest):
        if payloads.numel():
            raise ValueError(f"{messages.name(number)} has bytes left over")
    checks.hold()
    if wrong:
        raise ValueError(_FOUND_BY_KERNELS)


def add_error(residual: torch.Tensor, lost: torch.Tensor, times: int) -> None:
    """Add ``times`` a mean's quantization error, where finite; see `hvd_quant.codec.native.add_error`."""
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
        target = floats[end : end + segment.count]
        target.copy_(values[segment.tensor].detach().reshape(-1)[place])
        if residuals:
            residual = residuals[segment.tensor].view(-1)[place]
            target += residual
            size = min(segment.scheme.bucket_size, segment.count)
            sent = torch.nn.functional.pad(target.isfinite(), (0, -segment.count % size), value=True)
            sent = sent.view(-1, size).all(1).repeat_interleave(size)[: segment.count]
            residual.masked_fill_(sent, 0.0)
        end += segment.count


def mean_float32(parts: Sequence[torch.Tensor], preamble: bytes, out: torch.Tensor) -> None:
    """Write the mean of `pack_float32` messages; see `hvd_quant.codec.native.mean_float32`.

    It waits for the device once.
    """
    if not isinstance(parts, Messages):
        parts = Messages(parts)
    parts.check_sizes(PREAMBLE_SIZE + 4 * out.numel())
    beginnings = torch.stack([part[:PREAMBLE_SIZE] for part in parts]).cpu().numpy()
    for number, beginning in enumerate(beginnings):
        if beginning.tobytes() != preamble:
            raise ValueError(f"{parts.name(number)} {SOMETHING_ELSE}")
    out.copy_(as_words(parts[0][PREAMBLE_SIZE:], torch.float32))
    for part in parts[1:]:
        out += as_words(part[PREAMBLE_SIZE:], torch.float32)
    out *= 1 / len(parts)


def empty(count: int, dtype: str, like: torch.Tensor) -> torch.Tensor:
    """Allocate a buffer for a message or values on the device of ``like``."""
    return torch.empty(count, dtype=getattr(torch, dtype), device=like.device)


@functools.lru_cache(maxsize=4096)
def _unsigned_header(scheme: Scheme, count: int) -> bytes:
    """Return a payload's header, with 0 for the checksum."""
    header = bytearray(wire.pack_header(scheme, count, 0))
    header[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = bytes(4)
    return bytes(header)

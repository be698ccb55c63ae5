"""Packing of codes, and checksums, in torch operations."""

from __future__ import annotations

import torch

from hvd_quant import wire


def is_aligned(data: torch.Tensor) -> bool:
    """Return whether bytes can be written as words. Torch checks the offset, kernels the address."""
    return data.storage_offset() % wire.ALIGNMENT == data.data_ptr() % wire.ALIGNMENT == 0


# 8 codes of 3, 5, 6 or 7 bits are merged in an int64, pairs of neighbours first, then pairs of pairs. For
# each round: the offset of the upper one of a pair, in bytes, and the mask of the lower ones.
_ROUNDS = ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF))


def pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Pack 8 codes into ``bits`` bytes, value i in bits [i * bits, (i + 1) * bits). Overwrites the codes."""
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


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Invert `pack`: ``count`` codes, int8; undefined where there are not as many."""
    if bits == 8:
        return torch.nn.functional.pad(packed.view(torch.int8), (0, count - packed.numel()))
    per = 8 // bits if 8 % bits == 0 else 8  # fields in `size` bytes
    size = 1 if 8 % bits == 0 else bits
    groups = -(-packed.numel() // size)
    codes = torch.empty(round_up(max(count, groups * per), 8), dtype=torch.int8, device=packed.device)
    fields = codes[: groups * per].view(groups, per)
    # Shift each to the upper bits of its byte.
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
    fields >>= 8 - bits  # sign-extends
    return codes[:count]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def as_words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as words of ``dtype``; copied where they are not aligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def weighted_sum(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the sum of (2 i + 1) * word i, modulo 2^32, to an int32 scalar; return it."""
    end = 2 * words.numel() + 1
    dtype = torch.int32 if end < 2**31 else torch.int64
    weighted = torch.arange(1, end, 2, dtype=dtype, device=words.device).mul_(words)
    if dtype == torch.int32:
        return torch.sum(weighted, 0, dtype=dtype, out=out)
    return out.copy_(weighted.sum())

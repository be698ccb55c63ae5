"""The codec on an NVIDIA GPU by its own kernels, kernels.cu: a message in one launch.

They are compiled at run time, so that nobody has to build anything. They write byte for byte what the native
codec writes, noise included. One exception: very rarely the last bit of a Euclidean norm differs, and with it
codes of that bucket, because the squares are added in another order.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hvd_quant.codec import native, nvrtc
from hvd_quant.codec.message import DTYPES, PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.codec.noise import Noise
from hvd_quant.schemes import NUQSGD, QSGD, check_choice

SOURCE = Path(__file__).parent / "csrc" / "kernels.cu"
SWITCH = "HVD_QUANT_GPU_KERNELS"  # "auto" or "off"
LARGEST_BUCKET = 2**16  # values per bucket, encoded by one warp
THREADS = 256  # per block
BLOCKS = 3  # per multiprocessor
WARP = 32

# Columns per segment, as in kernels.cu.
_ROW = np.dtype(
    [
        *((name, "<u8") for name in ("values", "residual", "payload", "count")),
        *((name, "<u8") for name in ("bucket_size", "first_bucket", "seed")),
        *((name, "<u4") for name in ("shift", "dtype", "bits", "flags")),
    ]
)
_L2, _POWERS, _NEAREST = 1, 2, 4

# Arguments: the kernel's name, blocks, threads per block, the kernel's arguments.
Launch = Callable[[str, int, int, Sequence[nvrtc.Argument]], None]


def check_switch() -> str:
    """Return the environment's setting: "auto" or "off".

    Raises:
        ValueError: it is something else.
    """
    switch = os.environ.get(SWITCH, "auto")
    check_choice(SWITCH, switch, ("auto", "off"))
    return switch


@functools.cache
def kernels(device: torch.device) -> Kernels | None:
    """Return a device's kernels, compiled and tested; None where there are none, or they are switched off.

    The first call for a device waits for it.

    Raises:
        ValueError: the environment's HVD_QUANT_GPU_KERNELS is unknown.
    """
    switch = check_switch()
    if device.type != "cuda" or switch == "off" or torch.version.cuda is None:  # ROCm builds have none
        return None
    try:
        found = _compile(device)
        if not _agree_with_native(found, device):
            raise RuntimeError("what they write is not what the native codec writes")
    except Exception as error:  # torch, NVRTC and the driver raise anything; there is a fallback
        warnings.warn(
            f"hvd_quant's GPU kernels cannot be used on {device}; plain torch operations encode instead, "
            f"which takes several times as long ({SWITCH}=off says that this is known): {error}",
            stacklevel=2,
        )
        return None
    return found


def _compile(device: torch.device) -> Kernels:
    module = nvrtc.Module(SOURCE.read_text(encoding="utf-8"), ["--std=c++17", "--fmad=false"], device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Kernels(module.launch, processors * BLOCKS, THREADS, device)


def _agree_with_native(kernels: Kernels, device: torch.device) -> bool:
    """Return whether a device gives the native codec's bytes and values, tested on a few messages."""
    values = [np.linspace(-3, 5, 3001, dtype=np.float32), np.linspace(-1, 9, 999, dtype=np.float16)]
    segments = [
        Segment(0, 0, 2000, "float32", QSGD(4)),
        Segment(0, 2000, 1001, "float32", NUQSGD(3)),
        Segment(1, 0, 999, "float16", QSGD(8, "l2")),
    ]
    layout, n = MessageLayout(segments, bytes(PREAMBLE_SIZE)), len(segments)
    noise = Noise(np.arange(n, dtype=np.uint64), 3 * np.arange(n, dtype=np.uint32))
    expected, means = np.empty(layout.size, np.uint8), [np.empty_like(one) for one in values]
    native.encode_message(values, layout, noise, expected)
    native.decode_messages([expected, expected], layout, means, 0.7)

    message = torch.empty(layout.size, dtype=torch.uint8, device=device)
    kernels.encode([torch.from_numpy(one).to(device) for one in values], layout, noise, message)
    found = [torch.from_numpy(np.zeros_like(one)).to(device) for one in values]
    wrong = kernels.decode([message, message], layout, found, 0.7)
    damaged = message.clone()
    damaged[layout.size // 2] ^= 1
    return (
        np.array_equal(message.cpu().numpy(), expected)
        and all(np.array_equal(one.cpu().numpy(), mean) for one, mean in zip(found, means, strict=True))
        and not bool(wrong.any())
        and bool(kernels.decode([message, damaged], layout, found, 0.7).any())
    )


class Kernels:
    """Encode and decode messages by CUDA kernels.

    Args:
        launch: starts a kernel on the current stream.
        blocks: number of blocks that can run at a time.
        threads: threads per block.
        device: device of the tensors.
    """

    def __init__(self, launch: Launch, blocks: int, threads: int, device: torch.device) -> None:
        self._launch, self._blocks, self._threads, self._device = launch, blocks, threads, device
        self._never = torch.zeros(1, dtype=torch.int64, device=device)
        self._replays = torch.zeros(1, dtype=torch.int64, device=device)

    @staticmethod
    def take(layout: MessageLayout) -> bool:
        """Return whether the kernels support messages of a layout."""
        return (
            layout.count > 0
            and not layout.varies
            and all(
                one.dtype in DTYPES
                and min(one.scheme.bucket_size, one.count) <= LARGEST_BUCKET
                and (one.scheme.bucket_size % 8 == 0 or one.scheme.bucket_size >= one.count)
                for one in layout.segments
            )
        )

    def encode(
        self,
        values: Sequence[torch.Tensor],
        layout: MessageLayout,
        noise: Noise,
        message: torch.Tensor,
        residuals: Sequence[torch.Tensor] = (),
        *,
        bare: bool = False,
    ) -> None:
        """Encode the segments of a message; see `hvd_quant.codec.native.encode_message`.

        Residuals must be contiguous. With ``bare`` the message has no preamble. In a CUDA graph every replay
        draws other noise.
        """
        values = [one.detach().contiguous().resolve_neg() for one in values]
        table, n_buckets = _table(values, layout, residuals)
        table["seed"], table["shift"] = noise.seeds, noise.shifts
        if bare:
            table["payload"] -= PREAMBLE_SIZE
        places, words = _frame(layout, bare)
        places = constant(places, self._device).view(torch.int64)
        message.view(torch.int32).index_copy_(0, places, constant(words, self._device).view(torch.int32))
        replay = self._replays.add_(1) if capturing(self._device) else self._never
        segments = upload(table, self._device)
        self._run("encode", n_buckets * WARP, [segments, len(table), n_buckets, message, replay])

    def decode(
        self,
        messages: Sequence[torch.Tensor],
        layout: MessageLayout,
        out: Sequence[torch.Tensor],
        factor: float,
        *,
        bare: bool = False,
    ) -> torch.Tensor:
        """Decode messages of the layout's size; see `hvd_quant.codec.native.decode_messages`.

        ``out`` must be contiguous. With ``bare`` the messages come without their preambles.

        Returns:
            int32 on the device, all 0 if the messages are sound.
        """
        table, n_buckets = _table(out, layout)
        expected, n_preamble = constant(_expected(layout), self._device).view(torch.int32), PREAMBLE_SIZE // 4
        if bare:
            table["payload"] -= PREAMBLE_SIZE
            expected, n_preamble = expected[n_preamble:], 0
        segments = upload(table, self._device)
        addresses = upload(np.array([message.data_ptr() for message in messages], np.uint64), self._device)
        found = torch.zeros(len(messages) * len(table) + 1, dtype=torch.int32, device=self._device)
        where = [segments, len(table), addresses, len(messages)]
        self._run("check", layout.size // 4, [*where, expected, n_preamble, found[1:], found[:1]])
        self._run("decode", n_buckets * WARP, [*where, n_buckets, factor / len(messages)])
        return found

    def _run(self, name: str, threads: int, arguments: Sequence[nvrtc.Argument]) -> None:
        blocks = max(1, min(self._blocks, -(-threads // self._threads)))
        self._launch(f"hvd_quant_{name}", blocks, self._threads, arguments)


def capturing(device: torch.device) -> bool:
    """Return whether work on a device is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array's bytes to a device, as uint8, without waiting."""
    data = np.atleast_1d(array).view(np.uint8)
    if capturing(device):  # a graph cannot copy from memory that will be freed
        numbers = data.view(np.int64 if data.size % 8 == 0 else np.int8).tolist()
        dtype = torch.int64 if data.size % 8 == 0 else torch.int8
        filled = [torch.full((), number, dtype=dtype, device=device) for number in numbers]
        return torch.stack(filled).view(torch.uint8)
    here = torch.from_numpy(data)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def constant(data: bytes, device: torch.device) -> torch.Tensor:
    """Return bytes that are needed in every step as uint8 on a device. They must not be written to."""
    if device.type != "cuda":
        return _constant(data, device, 0)
    if capturing(device):
        return upload(np.frombuffer(data, np.uint8), device)
    return _constant(data, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=4096)
def _constant(data: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """Bytes cached per stream: another stream would have to wait for them."""
    return upload(np.frombuffer(bytearray(data), np.uint8), device)


def _table(
    values: Sequence[torch.Tensor], layout: MessageLayout, residuals: Sequence[torch.Tensor] = ()
) -> tuple[np.ndarray, int]:
    """Return the kernels' table of a layout's segments, and the number of buckets in them."""
    table, n_buckets = _layout_table(layout)
    table = table.copy()
    tensors, starts = [segment.tensor for segment in layout.segments], table["values"]
    if residuals:
        table["residual"] = np.array([residuals[i].data_ptr() for i in tensors], np.uint64) + 4 * starts
    sizes = np.array([values[i].element_size() for i in tensors], np.uint64)
    table["values"] = np.array([values[i].data_ptr() for i in tensors], np.uint64) + sizes * starts
    return table, n_buckets


@functools.lru_cache(maxsize=1024)
def _layout_table(layout: MessageLayout) -> tuple[np.ndarray, int]:
    """Return the same with the first value's index in its tensor in place of its address."""
    table, n_buckets = np.zeros(len(layout.segments), _ROW), 0
    for row, segment, offset in zip(table, layout.segments, layout.offsets, strict=True):
        scheme = segment.scheme
        row["values"], row["count"], row["payload"] = segment.start, segment.count, offset
        row["bucket_size"], row["first_bucket"] = max(1, min(scheme.bucket_size, segment.count)), n_buckets
        row["dtype"], row["bits"] = DTYPES.index(segment.dtype), scheme.bits
        row["flags"] = (
            _L2 * (scheme.norm == "l2")
            + _POWERS * (scheme.spacing == "exponential")
            + _NEAREST * (scheme.rounding == "nearest")
        )
        n_buckets += -(-segment.count // scheme.bucket_size)
    return table, n_buckets


@functools.lru_cache(maxsize=1024)
def _frame(layout: MessageLayout, bare: bool) -> tuple[bytes, bytes]:
    """Return a message's words that do not depend on the values: their positions, int64, and they, int32.

    Preamble (unless ``bare``), headers, and the last words of every payload, which hold its padding.
    """
    places, words = [*range(PREAMBLE_SIZE // 4)], [np.frombuffer(layout.preamble, np.int32)]
    for segment, offset, header in zip(layout.segments, layout.offsets, layout.headers, strict=True):
        first, end = offset // 4, (offset + segment.payload_size) // 4
        places += [*range(first, first + header.size // 4)]
        words.append(header.view(np.int32))
        if segment.count:
            places += [end - 2, end - 1]
            words.append(np.zeros(2, np.int32))
    left_out = PREAMBLE_SIZE // 4 if bare else 0
    places = np.array(places, np.int64)[left_out:] - left_out
    return places.tobytes(), np.concatenate(words)[left_out:].tobytes()


@functools.lru_cache(maxsize=1024)
def _expected(layout: MessageLayout) -> bytes:
    """Return a message's preamble and its payloads' headers, whose checksums are meaningless."""
    return layout.preamble + layout.headers.tobytes()

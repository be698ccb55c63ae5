"""Whether the codec is right on a GPU, at both of its levels. scripts/gpu_check.sh runs it, without pytest.

    python tests/ranks/gpu/check_codec.py                # on a GPU
    python tests/ranks/gpu/check_codec.py --device cpu   # what can be checked without one

Inputs are new in every run; the seed that is printed repeats one.
"""

import argparse
import os
import sys
import traceback
from dataclasses import replace

import numpy as np
import torch

from hvd_quant import NUQSGD, QSGD, decode, encode, max_payload_size, wire
from hvd_quant.codec import cuda, native, torch_ops
from hvd_quant.codec.message import MessageLayout, Segment
from hvd_quant.codec.noise import Noise

SCHEMES = [kind(bits, norm) for kind in (QSGD, NUQSGD) for bits in range(2, 9) for norm in ("max", "l2")]
SCHEMES += [replace(kind(4), rounding=how) for kind in (QSGD, NUQSGD) for how in ("nearest", "correlated")]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LEVELS = {"plain operations": "off", "kernels": "auto"}


class Bench:
    """Where checks run, and what they draw from.

    Args:
        device: of the tensors.
        seed: of everything random.
    """

    def __init__(self, device, seed):
        self.device, self.rng = device, np.random.default_rng(seed)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    @property
    def has_kernels(self):
        return cuda.kernels(self.device) is not None

    def poison(self):
        """Leave nothing but NaN in the memory that is handed out next."""
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
            torch.full((size // 4,), float("nan"), device=self.device)

    def values(self, count, dtype=torch.float32):
        """Values of many magnitudes, some of them zeros, on the device."""
        x = self.rng.standard_normal(count) * np.exp2(self.rng.integers(-8, 8, count))
        x[self.rng.random(count) < 0.1] = 0.0
        return torch.from_numpy(x).to(dtype).to(self.device)

    def seeds(self, number):
        return Noise(self.rng.integers(0, 2**63, number).astype(np.uint64), np.zeros(number, np.uint32))


def on_host(tensor):
    return tensor.detach().cpu().numpy()


def steps(values, payload, scheme):
    """For each value the distance of its two levels, float64."""
    norms = payload[wire.HEADER_SIZE :][: wire.norms_size(scheme, values.size)].view(np.float32)
    norms = np.repeat(norms.astype(np.float64), min(scheme.bucket_size, values.size))[: values.size]
    if scheme.spacing == "uniform":
        return norms / scheme.num_levels + norms * 2.0**-21
    return np.maximum(norms * scheme.levels()[1], np.abs(values)) + norms * 2.0**-21


def check_payloads(bench):
    """The native codec decodes what the GPU encodes, to the same bits, near the values; and back."""
    for number, scheme in enumerate(SCHEMES):
        dtype = DTYPES[number % len(DTYPES)]
        scheme = replace(scheme, bucket_size=int(bench.rng.choice([8, 100, 512, 1000, 4096])))
        count, seed = int(bench.rng.integers(1, 60_000)), int(bench.rng.integers(0, 2**63))
        x = bench.values(count, dtype)
        bench.poison()
        payload = torch_ops.encode(x, scheme, seed)
        plain, exact = on_host(payload), on_host(x.double())
        by_native = native.decode_mean([plain])
        bench.poison()
        by_torch = on_host(torch_ops.decode_mean([payload]))
        np.testing.assert_array_equal(by_torch.view(np.uint32), by_native.view(np.uint32), str(scheme))
        assert (np.abs(by_native - exact) <= steps(exact, plain, scheme)).all(), scheme
        # Norms are added in another order, so that the last bit of a Euclidean norm may be another one.
        if (
            bench.has_kernels
            and scheme.norm == "max"
            and (scheme.bucket_size % 8 == 0 or scheme.bucket_size >= count)
        ):
            same = native.encode(on_host(x.float()), scheme, seed)
            np.testing.assert_array_equal(plain, same, f"{scheme}: not the native codec's bytes")


def check_means(bench):
    """Of several payloads, in every type, as the native codec has them."""
    for dtype in DTYPES:
        for scheme in (QSGD(4), NUQSGD(3), QSGD(7, bucket_size=77)):
            count = int(bench.rng.integers(1, 30_000))
            payloads = [torch_ops.encode(bench.values(count), scheme, seed) for seed in range(3)]
            bench.poison()
            mean = torch_ops.decode_mean(payloads, dtype=dtype, factor=0.7)
            expected = native.decode_mean([on_host(one) for one in payloads], factor=0.7)
            expected = torch.from_numpy(expected).to(dtype)
            assert mean.dtype == dtype
            assert torch.equal(mean.cpu(), expected), (scheme, dtype)


def message_of(bench):
    """A layout of tensors of all types, their values, and residuals."""
    counts, segments, values = [3000, 1, 512, 20_001, 999], [], []
    for number, count in enumerate(counts):
        dtype = DTYPES[number % len(DTYPES)]
        scheme = (QSGD(4), NUQSGD(4), QSGD(3, "l2"))[number % 3]
        values.append(bench.values(count, dtype))
        segments.append(Segment(number, 0, count, str(dtype).removeprefix("torch."), scheme))
    residuals = [bench.values(count) for count in counts]
    return MessageLayout(segments, bytes(range(8))), values, residuals


def check_messages(bench):
    """Several tensors in one, with error feedback: nothing is lost, and the native codec reads it."""
    layout, values, residuals = message_of(bench)
    before = [
        on_host(one.float()) + on_host(residual) for one, residual in zip(values, residuals, strict=True)
    ]
    message = torch.full((layout.size,), 255, dtype=torch.uint8, device=bench.device)
    bench.poison()
    assert torch_ops.encode_message(values, layout, bench.seeds(5), message, residuals) == layout.size
    out = [torch.full_like(one, float("nan"), dtype=torch.float32) for one in values]
    flat = MessageLayout([replace(one, dtype="float32") for one in layout.segments], layout.preamble)
    torch_ops.decode_messages([message], flat, out, 1.0)
    expected = [np.full(one.numel(), np.nan, np.float32) for one in out]
    native.decode_messages([on_host(message)], flat, expected)
    for sent, kept, whole, by_native in zip(out, residuals, before, expected, strict=True):
        np.testing.assert_array_equal(on_host(sent), by_native)
        assert np.abs(on_host(sent) + on_host(kept) - whole).max() <= np.abs(whole).max() * 2.0**-21


def check_damage(bench):
    """A bit that has changed is noticed."""
    layout, values, _ = message_of(bench)
    message = torch.empty(layout.size, dtype=torch.uint8, device=bench.device)
    torch_ops.encode_message(values, layout, bench.seeds(5), message)
    out = [torch.empty_like(one) for one in values]
    for _ in range(40):
        place, bit = int(bench.rng.integers(layout.size)), 1 << int(bench.rng.integers(8))
        message[place] ^= bit
        try:
            torch_ops.decode_messages([message, message], layout, out, 1.0)
        except ValueError:
            message[place] ^= bit
        else:
            raise AssertionError(f"bit {bit} of byte {place} was changed, and nobody noticed")
    torch_ops.decode_messages([message, message], layout, out, 1.0)


def check_statistics(bench):
    """The mean of many roundings is the value: within six standard errors, which 2 in 10^9 exceed."""
    count, rounds = 4096, 256
    for scheme in (QSGD(2), NUQSGD(3), QSGD(6)):
        x = bench.values(count)
        total = torch.zeros(count, dtype=torch.float64, device=bench.device)
        for seed in range(rounds):
            payload = torch_ops.encode(x, scheme, seed)
            total += torch_ops.decode_mean([payload]).double()
        # Of a value between two levels, the variance is at most a quarter of their distance squared.
        bound = 6 * steps(on_host(x.double()), on_host(payload), scheme) / 2 / rounds**0.5
        assert (np.abs(on_host(total) / rounds - on_host(x.double())) <= bound).all(), scheme


def check_that_encode_does_not_wait(bench):
    """Torch raises an exception where the host would wait for the GPU."""
    if not bench.on_gpu:
        return
    layout, values, residuals = message_of(bench)
    message = torch.empty(layout.size, dtype=torch.uint8, device=bench.device)
    torch_ops.encode_message(values, layout, bench.seeds(5), message, residuals)  # makes constants
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch_ops.encode_message(values, layout, bench.seeds(5), message, residuals)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_a_cuda_graph(bench):
    """Encode and decode are captured; replays round what is there then, with other noise each time."""
    if not bench.on_gpu:
        return
    scheme, count = QSGD(4), 10_000
    layout = MessageLayout([Segment(0, 0, count, "float32", scheme)], bytes(8))
    x, out = bench.values(count), torch.empty(count, device=bench.device)
    message = torch.empty(layout.size, dtype=torch.uint8, device=bench.device)

    def both():
        torch_ops.encode_message([x], layout, Noise(np.ones(1, np.uint64), np.zeros(1, np.uint32)), message)
        torch_ops.decode_messages([message], layout, [out], 1.0)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    results = []
    for _ in range(3):
        x.copy_(bench.values(count))
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            exact = on_host(x.double())
            assert (np.abs(on_host(out) - exact) <= steps(exact, on_host(message)[8:], scheme)).all()
            results.append(on_host(out).tobytes())
    assert len(set(results)) == len(results), "replays have had the same noise"


def check_a_side_stream(bench):
    """What is encoded is what the stream has written by then."""
    if not bench.on_gpu:
        return
    new, x = bench.values(1 << 20), torch.zeros(1 << 20, device=bench.device)
    expected = on_host(torch_ops.encode(new, QSGD(4), 3))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(new)
        payload = torch_ops.encode(x, QSGD(4), 3)
    side.synchronize()
    np.testing.assert_array_equal(on_host(payload), expected)


def check_that_streams_do_not_share(bench):
    """What one has not done yet, another one does not rely on."""
    if not bench.on_gpu:
        return
    scheme, count = QSGD(3), int(bench.rng.integers(100_000, 200_000))  # nobody has encoded so many
    x, busy, other = bench.values(count), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(500_000_000)
        late = torch_ops.encode(x, scheme, 9)
    with torch.cuda.stream(other):
        soon = torch_ops.encode(x, scheme, 9)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(on_host(soon), on_host(late))
    native.decode_mean([on_host(soon)])


def check_entropy_coding(bench):
    """By way of the host."""
    for coding in ("elias", "huffman"):
        x = bench.values(20_000)
        packed, coded = (torch_ops.encode(x, QSGD(3, coding=how), 5) for how in ("packed", coding))
        assert torch.equal(torch_ops.decode_mean([packed]), torch_ops.decode_mean([coded]))


def check_memory_that_is_given(bench):
    """The same bytes and values as in new memory, at any address, and nothing beyond."""
    for coding in ("packed", "huffman"):
        for scheme in (QSGD(4, coding=coding), NUQSGD(3, bucket_size=77, coding=coding)):
            x = bench.values(int(bench.rng.integers(1, 30_000)))
            size = max_payload_size(scheme, x.numel())
            expected = encode(x, scheme, seed=3, backend="torch")
            for first in (0, 3, 8):
                room = torch.full((size + 16,), 0xA5, dtype=torch.uint8, device=bench.device)
                payload = encode(x, scheme, seed=3, backend="torch", out=room[first : first + size])
                assert payload.data_ptr() == room.data_ptr() + first
                assert torch.equal(payload, expected)
                assert (room[:first] == 0xA5).all()
                assert (room[first + size :] == 0xA5).all()
            for dtype in DTYPES:
                room = torch.full((x.numel() + 2,), 7.0, dtype=dtype, device=bench.device)
                out = room[1:-1]
                assert decode(payload, backend="torch", out=out) is out
                assert torch.equal(out, decode(expected, backend="torch").to(dtype))
                assert room[0] == room[-1] == 7.0
    kept, factors = torch.ones_like(x), torch.ones_like(x, requires_grad=True)
    loss = (kept * factors).sum()
    decode(payload, backend="torch", out=kept)
    refuses(RuntimeError, "modified by an inplace operation", loss.backward)
    memory = torch.zeros(4 * x.numel() + payload.numel() + 8, dtype=torch.uint8, device=bench.device)
    inside = memory[8 : 8 + payload.numel()].copy_(payload)
    floats = memory[: 4 * x.numel()].view(torch.float32)
    refuses(ValueError, "overlap", lambda: decode(inside, backend="torch", out=floats))
    if bench.on_gpu:
        says = "must be on cuda"
        refuses(ValueError, says, lambda: decode(payload, out=torch.empty(x.numel())))
        refuses(ValueError, says, lambda: encode(x, QSGD(4), out=torch.empty(size, dtype=torch.uint8)))


def refuses(error, says, call):
    try:
        call()
    except error as found:
        if says in str(found):
            return
        raise
    raise AssertionError(f"no error that says {says!r}")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def passes(check, bench, level):
    try:
        check(bench)
    except Exception:
        traceback.print_exc()
        print(f"{level}: {check.__name__} FAILED", flush=True)
        return False
    print(f"{level}: {check.__name__} passed", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    failed = 0
    print(f"seed {args.seed}")
    for level, switch in LEVELS.items():
        os.environ[cuda.SWITCH] = switch
        cuda.kernels.cache_clear()
        if switch == "auto" and cuda.kernels(device) is None:
            print("kernels: not to be had here, see docs/gpu.md")
            failed += device.type == "cuda" and torch.version.cuda is not None
            continue
        failed += sum(not passes(check, Bench(device, args.seed), level) for check in CHECKS)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

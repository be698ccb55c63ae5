"""What waits for a GPU, and for which of its streams; with some that only say what they are asked for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from launch import need

from hvd_quant.codec import cuda

need("torch")

import hvd_quant.torch as hq  # noqa: E402 (where Horovod has been built)
from hvd_quant.torch.gradient import TorchGradient  # noqa: E402

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, number):
        self.cuda_stream, self.waited_for = number, []

    def wait_stream(self, other):
        self.waited_for.append(other.cuda_stream)


@pytest.fixture
def current(monkeypatch):
    """A function that makes a stream the current one."""
    streams = [Stream(0)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return streams.append


class Gradient:
    device = GPU

    def __init__(self):
        self.read_on = []

    def record_stream(self, stream):
        self.read_on.append(stream.cuda_stream)


def test_a_bucket_waits_for_the_streams_of_its_gradients(current):
    here, other, another = (Stream(number) for number in (1, 2, 3))
    current(here)
    members = [SimpleNamespace(_tensor=Gradient(), stream=stream) for stream in (here, other, other, another)]
    TorchGradient.before_reading(members)
    assert sorted(here.waited_for) == [2, 3]
    assert [member._tensor.read_on for member in members] == [[], [1], [1], [1]]
    assert other.waited_for == another.waited_for == []


def test_constants_are_of_a_stream(current, monkeypatch):
    monkeypatch.setattr(cuda, "upload", lambda array, device: array.copy())
    cuda._constant.cache_clear()
    first = cuda.constant(b"12345678", GPU)
    assert cuda.constant(b"12345678", GPU) is first
    current(Stream(1))
    assert cuda.constant(b"12345678", GPU) is not first
    cuda._constant.cache_clear()


class Exchange:
    def __init__(self):
        self.looks = 0

    def advance(self, *, wait):
        self.looks += 1
        return False


def test_hooks_take_no_exchange_on():
    """Not those on a GPU, for which they would wait, nor those on a CPU, which may be there on some ranks."""
    reducer = hq.QSGDCompressor()._reducer
    reducer._sending._fusion = SimpleNamespace(add=lambda gradient: None)
    (exchange,) = reducer._sending._underway = [Exchange()]
    gradient = SimpleNamespace(entry=SimpleNamespace(key="a"), hold=lambda tensor: None)
    reducer.submit(gradient, torch.zeros(3))
    reducer.fill_slots()
    assert exchange.looks == 0
    reducer._sending.advance()
    assert exchange.looks == 1

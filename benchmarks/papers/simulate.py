"""Data-parallel training on Fashion-MNIST with all ranks in one process, gradients through our own codec."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import hvd_quant
from examples.fashion_mnist import DATA_DIR, load
from hvd_quant.schedule import BitSchedule
from hvd_quant.schemes import DQSGD, Scheme

RANKS, BATCH = 2, 64  # images a rank and step
MIN_NUMEL = 1024  # smaller parameters travel as float32, as the compressor has it
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4  # the example's


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def tensors(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = load(DATA_DIR, part)
        return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)

    return *tensors("train"), *tensors("t10k")


def make_model() -> torch.nn.Module:
    """A CNN of 54 thousand parameters: the example's is too slow for so many runs."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 7 * 7, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


@torch.no_grad()
def evaluate(model: torch.nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the test images."""
    _, _, images, labels = data()
    output = torch.cat([model(x) for x in images.split(1000)])
    return F.cross_entropy(output, labels).item(), (output.argmax(1) == labels).float().mean().item()


def seed_of(*parts: int) -> int:
    """A seed for the codec that no other rank, step or tensor has."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 11)


class Reducer:
    """The mean over the ranks of what each of them sends.

    With ``error_feedback`` a rank sends Q(p) with p = g + e, and keeps e = p - Q(p) for the next step.
    """

    def __init__(self, scheme: Scheme | DQSGD | None, error_feedback: bool, seed: int) -> None:
        self.scheme = scheme
        self.schedule = BitSchedule(scheme) if isinstance(scheme, DQSGD) else None
        self.errors: dict[tuple[int, int], torch.Tensor] | None = {} if error_feedback else None
        self.seed, self.step, self.sent = seed, 0, 0  # sent: bytes, by one rank

    def __call__(self, gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Gradients of each rank -> their means; a step is over."""
        scheme = self.schedule.scheme.at(self.schedule.bits) if self.schedule else self.scheme
        means, square = [], 0.0
        for tensor, parts in enumerate(zip(*gradients, strict=True)):
            if scheme is None or parts[0].numel() < MIN_NUMEL:
                means.append(sum(parts) / len(parts))
                self.sent += 4 * parts[0].numel()
                continue
            square += sum(float(part.square().sum()) for part in parts) / len(parts)
            means.append(sum(self._sent(scheme, tensor, *part) for part in enumerate(parts)) / len(parts))
        if self.schedule:
            self.schedule.advance(square)
        self.step += 1
        return means

    def _sent(self, scheme: Scheme, tensor: int, rank: int, gradient: torch.Tensor) -> torch.Tensor:
        """What the others decode."""
        if self.errors is not None:
            gradient = gradient + self.errors.get((tensor, rank), 0.0)
        payload = hvd_quant.encode(
            gradient.flatten(), scheme, seed=seed_of(self.seed, rank, self.step, tensor), backend="native"
        )
        self.sent += payload.numel() if rank == 0 else 0
        decoded = hvd_quant.decode(payload, backend="native").view_as(gradient)
        if self.errors is not None:
            self.errors[tensor, rank] = gradient - decoded
        return decoded


def train(
    scheme: Scheme | DQSGD | None,
    seed: int,
    epochs: int,
    error_feedback: bool = False,
    watch: Callable[[int, list[torch.Tensor]], None] | None = None,
) -> dict[str, list[float]]:
    """Train with a seed of its own for weights, order of the images and rounding.

    Returns:
        Lists with an entry an epoch: ``loss`` and ``accuracy`` on the test images, and ``megabytes`` that a
        rank has sent. ``watch`` is called before every step, with its number and rank 0's gradients.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels, _, _ = data()
    model = make_model()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = steps_an_epoch()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=epochs * steps)
    reduce = Reducer(scheme, error_feedback, seed)
    log: dict[str, list[float]] = {"loss": [], "accuracy": [], "megabytes": []}
    for _ in range(epochs):
        for batch in torch.randperm(len(labels))[: steps * RANKS * BATCH].split(RANKS * BATCH):
            gradients = [
                torch.autograd.grad(F.cross_entropy(model(images[own]), labels[own]), parameters)
                for own in batch.split(BATCH)
            ]
            if watch:
                watch(reduce.step, list(gradients[0]))
            for parameter, mean in zip(parameters, reduce([list(own) for own in gradients]), strict=True):
                parameter.grad = mean
            optimizer.step()
            schedule.step()
        loss, accuracy = evaluate(model)
        for name, value in (("loss", loss), ("accuracy", accuracy), ("megabytes", reduce.sent / 1e6)):
            log[name].append(value)
    return log


def steps_an_epoch() -> int:
    return len(data()[1]) // (RANKS * BATCH)


def record_gradients(at: dict[str, int], epochs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rank 0's gradients, those large enough to be quantized end to end, at named steps of a float32 run."""
    recorded: dict[str, np.ndarray] = {}

    def watch(step: int, gradients: list[torch.Tensor]) -> None:
        for name, wanted in at.items():
            if step == wanted:
                large = [gradient.flatten() for gradient in gradients if gradient.numel() >= MIN_NUMEL]
                recorded[name] = torch.cat(large).numpy()

    train(None, seed, epochs, watch=watch)
    return recorded

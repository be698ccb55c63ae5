#!/usr/bin/env python3
"""Train a small CNN on Fashion-MNIST with Horovod and quantized gradients.

    horovodrun -np 2 python examples/torch_fashion_mnist.py --compression qsgd --bits 4

Three lines make it an hvd_quant example: the import, the compressor, and the optimizer that gets it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from fashion_mnist import Report, arguments, load, make_compression, steps_per_epoch

import hvd_quant.torch as hq


def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)


def make_model() -> torch.nn.Module:
    """A CNN of 422 thousand parameters."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 7 * 7, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )


def mean_over_ranks(value: float, name: str) -> float:
    return float(hvd.allreduce(torch.tensor(value, dtype=torch.float64), name=name))


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Loss and accuracy over the whole set, of which each rank computes its share."""
    model.eval()
    loss = correct = 0.0
    for x, y in zip(
        images[hvd.rank() :: hvd.size()].split(500), labels[hvd.rank() :: hvd.size()].split(500), strict=True
    ):
        output = model(x)
        loss += F.cross_entropy(output, y, reduction="sum").item()
        correct += (output.argmax(1) == y).sum().item()
    scale = hvd.size() / len(labels)
    return mean_over_ranks(loss * scale, "test.loss"), mean_over_ranks(correct * scale, "test.accuracy")


def batches(count: int, args: argparse.Namespace, epoch: int) -> Iterable[torch.Tensor]:
    """A permutation that all ranks draw alike, of which each takes a share of equally many whole batches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
    own = order[hvd.rank() :: hvd.size()]
    return own[: steps_per_epoch(count, args, hvd.size()) * args.batch_size].split(args.batch_size)


def main() -> int:
    args = arguments(__doc__)
    hvd.init()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // hvd.local_size()))
    torch.manual_seed(args.seed)
    train_images, train_labels = tensors(*load(args.data_dir, "train"))
    test_images, test_labels = tensors(*load(args.data_dir, "t10k"))
    train_images, train_labels = train_images[: args.limit], train_labels[: args.limit]
    total_steps = args.epochs * steps_per_epoch(len(train_labels), args, hvd.size())

    model = make_model()
    compression = make_compression(args, total_steps, hq, hvd.Compression)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    optimizer = hq.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)

    report = Report(args, hvd, compression, sum(parameter.numel() for parameter in model.parameters()))
    steps = 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        begin = time.perf_counter()
        shares = list(batches(len(train_labels), args, epoch))
        loss_sum = torch.zeros(())
        with report.progress(epoch, len(shares)) as advance:
            for share in shares:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(train_images[share]), train_labels[share])
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.detach()
                steps += 1
                advance()
        seconds = time.perf_counter() - begin
        train_loss = mean_over_ranks(float(loss_sum) / len(shares), "train.loss")
        loss, accuracy = evaluate(model, test_images, test_labels)
        report.epoch(
            epoch, steps, seconds=seconds, train_loss=train_loss, test_loss=loss, test_accuracy=accuracy
        )
    return report.finish(parameter.detach().numpy() for parameter in model.parameters())


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""Train a small CNN on Fashion-MNIST with Horovod and quantized gradients.

    horovodrun -np 2 python examples/torch_fashion_mnist.py --compression qsgd --bits 4

Three lines make it an hvd_quant example: the import, the compressor, and the optimizer that gets it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import hvd_quant.torch as hq
from hvd_quant.schemes import CODINGS, ROUNDINGS

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
COMPRESSORS = {"qsgd": hq.QSGDCompressor, "nuqsgd": hq.NUQSGDCompressor, "dqsgd": hq.DQSGDCompressor}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compression", choices=("none", "fp16", *COMPRESSORS), default="qsgd")
    parser.add_argument("--bits", type=int, default=4, help="bits a value (dqsgd: their mean over the run)")
    parser.add_argument("--norm", choices=("max", "l2"), help="norm of a bucket (default: the scheme's own)")
    parser.add_argument("--bucket-size", type=int, default=512, help="values that share a norm")
    parser.add_argument("--coding", choices=CODINGS, default="packed", help="of the quantized values")
    parser.add_argument("--rounding", choices=ROUNDINGS, help="default: independent")
    parser.add_argument(
        "--error-feedback", action="store_true", help="keep what quantization loses, and send it later"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="images a rank and step")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder with the four IDX files")
    parser.add_argument("--json-log", type=Path, help="write one JSON object an epoch to this file")
    parser.add_argument("--limit", type=int, help="train on this many images only (for a quick look)")
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not 0 <= args.seed < 2**53:
        parser.error("--seed must be from 0 to 2^53 - 1")
    if args.lr <= 0:
        parser.error("--lr must be positive")
    return args


def say(line: str) -> None:
    """Print a line in one piece: under mpirun, pieces get mixed with other ranks' output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --- data -----------------------------------------------------------------------------------------------


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array from an IDX file, compressed or not."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.exists():
            try:
                with opener(path, "rb") as file:
                    data = file.read()
                dimensions = data[3]
                shape = np.frombuffer(data, ">u4", count=dimensions, offset=4)
                return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
            except (OSError, EOFError, IndexError, ValueError) as error:
                raise SystemExit(f"{path} is damaged or no IDX file: {error}") from error
    raise SystemExit(
        f"Fashion-MNIST not found: {folder / name}.gz is missing.\n"
        "On Debian and Ubuntu: sudo apt-get install dataset-fashion-mnist\n"
        "Elsewhere: download the four IDX files and pass --data-dir FOLDER."
    )


def load(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float32 of shape (n, 1, 28, 28) with mean 0 and deviation 1, and labels."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1)
    return (x / 255 - 0.2860) / 0.3530, torch.from_numpy(labels.astype(np.int64))


# --- model ----------------------------------------------------------------------------------------------


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


def make_compressor(args: argparse.Namespace, total_steps: int) -> Any:
    if args.compression in COMPRESSORS:
        options: dict[str, Any] = {
            "bucket_size": args.bucket_size,
            "coding": args.coding,
            "rounding": args.rounding,
            "error_feedback": args.error_feedback,
            "seed": args.seed,
        }
        if args.norm:
            options["norm"] = args.norm
        if args.compression == "dqsgd":
            options |= {"mean_bits": args.bits, "total_steps": total_steps}
        else:
            options["bits"] = args.bits
        return COMPRESSORS[args.compression](**options)
    return hvd.Compression.fp16 if args.compression == "fp16" else hvd.Compression.none


# --- training -------------------------------------------------------------------------------------------


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


def replicas_identical(model: torch.nn.Module) -> bool:
    """Whether every rank's parameters are the same, bit by bit."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return len(set(hvd.allgather_object(digest.hexdigest(), name="replicas"))) == 1


def sent_bytes(compressor: Any, model: torch.nn.Module, steps: int) -> tuple[int, int]:
    """What a rank has contributed to the reductions: as float32, and as it was sent."""
    raw = 4 * sum(parameter.numel() for parameter in model.parameters()) * steps
    if hvd.size() == 1:
        return raw, 0  # Horovod reduces nothing then
    if isinstance(compressor, hq.QuantizedCompressor):
        return raw, compressor.stats()["wire_bytes"]
    return raw, raw // 2 if compressor is hvd.Compression.fp16 else raw


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """A function that advances a bar on rank 0; lines instead of a bar where output is no terminal."""
    if hvd.rank() != 0:
        yield lambda: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda: bar.advance(task)
    else:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done * 4 // total > (done - 1) * 4 // total and done < total:
                say(f"{title}: {100 * done // total:3d} %")

        yield advance


def batches(count: int, args: argparse.Namespace, epoch: int) -> Iterable[torch.Tensor]:
    """A permutation that all ranks draw alike, of which each takes a share of equally many whole batches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
    steps = count // (args.batch_size * hvd.size())
    if steps == 0:
        raise SystemExit(
            f"{count} images are too few for {hvd.size()} ranks of --batch-size {args.batch_size}"
        )
    own = order[hvd.rank() :: hvd.size()]
    return own[: steps * args.batch_size].split(args.batch_size)


def main() -> int:
    args = arguments()
    hvd.init()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // hvd.local_size()))
    torch.manual_seed(args.seed)
    train_images, train_labels = load(args.data_dir, "train")
    test_images, test_labels = load(args.data_dir, "t10k")
    train_images, train_labels = train_images[: args.limit], train_labels[: args.limit]

    total_steps = args.epochs * len(list(batches(len(train_labels), args, 0)))

    model = make_model()
    try:
        compressor = make_compressor(args, total_steps)
    except ValueError as error:
        raise SystemExit(f"torch_fashion_mnist.py: {error}") from None
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    optimizer = hq.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compressor
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=total_steps)

    log = None
    if hvd.rank() == 0 and args.json_log:
        try:
            args.json_log.parent.mkdir(parents=True, exist_ok=True)
            log = args.json_log.open("w")
        except OSError as error:
            raise SystemExit(f"cannot write --json-log: {error}") from None
    steps = 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        begin = time.perf_counter()
        shares = list(batches(len(train_labels), args, epoch))
        loss_sum = torch.zeros(())
        with progress(f"epoch {epoch}/{args.epochs}", len(shares)) as advance:
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
        test_loss, test_accuracy = evaluate(model, test_images, test_labels)
        raw_bytes, wire_bytes = sent_bytes(compressor, model, steps)
        record = {
            "compression": args.compression + (f"-{args.bits}bit" if args.compression in COMPRESSORS else ""),
            "error_feedback": args.error_feedback,
            "seed": args.seed,
            "ranks": hvd.size(),
            "epoch": epoch,
            "train_loss": mean_over_ranks(float(loss_sum) / len(shares), "train.loss"),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "raw_bytes": raw_bytes,
            "wire_bytes": wire_bytes,
            "seconds": seconds,
        }
        if hvd.rank() == 0:
            say(
                f"epoch {epoch}/{args.epochs}: test accuracy {100 * test_accuracy:.2f} %, "
                f"test loss {test_loss:.4f}, train loss {record['train_loss']:.4f}, {seconds:.1f} s, "
                f"sent {wire_bytes / 1e6:.1f} MB (as float32: {raw_bytes / 1e6:.1f} MB)"
            )
        if log:
            log.write(json.dumps(record) + "\n")
            log.flush()

    if not replicas_identical(model):
        print("the ranks' parameters differ: this must not happen", file=sys.stderr)
        return 1
    if hvd.rank() == 0:
        say(f"parameters are bit-identical on all {hvd.size()} ranks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

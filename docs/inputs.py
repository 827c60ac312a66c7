"""Writes docs/inputs.svg and prints the table of docs/inputs.md: `python docs/inputs.py` (needs scikit-learn's digits).

Three networks that each read another part of noisy handwritten digits (the left half, the right half, a table of how dark each
row is), trained on 400 of them and then fused as they are, once without branch dropout and once with it, the best epoch
chosen on 400 others. Measured with all inputs, and with each missing, on 997 digits that nothing was trained or chosen on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn

import interfuse as itf

WIDTHS = {"left": 32, "right": 32, "rows": 8}
DROPOUT = 0.3


def inputs(x: Tensor) -> dict[str, Tensor]:
    """What each network reads of digits (n, 8, 8)."""
    return {"left": x[:, :, :4].flatten(1), "right": x[:, :, 4:].flatten(1), "rows": x.sum(dim=2)}


def network(width: int, seed: int) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10))


def main() -> None:
    """Train, print, draw."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.images / 16).float()[order], torch.tensor(digits.target).long()[order]
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    parts = {"train": slice(400), "validation": slice(400, 800), "test": slice(800, None)}
    sets: dict[str, list[Any]] = {
        key: [(inputs(x[rows][i : i + 50]), y[rows][i : i + 50]) for i in range(0, len(y[rows]), 50)]
        for key, rows in parts.items()
    }
    models = {name: network(width, seed) for seed, (name, width) in enumerate(WIDTHS.items())}
    for name, model in models.items():
        own = {key: [(batch[name], targets) for batch, targets in part] for key, part in sets.items()}
        itf.fit(model, own["train"], own["validation"], epochs=20, learning_rate=0.01, progress=False)
    fusions = {}
    for name, share in (("plain", 0.0), ("dropout", DROPOUT)):
        torch.manual_seed(0)
        fusions[name] = itf.ModelFusion(
            models, "concat", head=10, residual=False, branch_dropout=share, example=sets["test"][0][0]
        )
        itf.fit(fusions[name], sets["train"], sets["validation"], epochs=20, learning_rate=0.01, progress=False)
    table = itf.compare(fusions, sets["test"], missing=True, progress=False)
    print(table.markdown())
    draw(table)


def draw(table: Any) -> None:
    """Bars for each fusion: with all inputs, and with each missing."""
    pyplot.rcParams.update({"svg.hashsalt": "interfuse", "font.size": 9})
    figure, axis = pyplot.subplots(figsize=(7, 3))
    kinds = ["", *(f" without {name}" for name in WIDTHS)]
    for k, (name, label) in enumerate((("plain", "without branch dropout"), ("dropout", f"branch dropout {DROPOUT}, tokens"))):
        scores = [table[f"{name}{kind}"].score for kind in kinds]
        below, above = [s.value - s.low for s in scores], [s.high - s.value for s in scores]
        places = [i + 0.38 * (k - 0.5) for i in range(len(kinds))]
        axis.bar(places, [s.value for s in scores], 0.36, yerr=[below, above], capsize=3, label=label, alpha=0.85)
    axis.set_xticks(range(len(kinds)), ["all inputs", *(kind.strip() for kind in kinds[1:])])
    axis.set(ylabel="accuracy", ylim=(0, 1.12))
    axis.legend(loc="upper center", ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

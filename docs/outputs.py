"""Writes docs/outputs.svg and prints the tables of docs/outputs.md: `python docs/outputs.py` (needs scikit-learn's digits).

Three small networks on 200 noisy handwritten digits, each trained far past its best; ensembles of them, learned and
calibrated on 400 others; a student of a quarter of their size, taught on 400 more without labels; all are measured on 797
digits that nothing was trained or learned on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn

import interfuse as itf
from interfuse.ensemble.combine import COMBINE, LEARNS
from interfuse.evaluation.metrics import score

BINS = 10


def network(seed: int, width: int) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def line(name: str, outputs: Tensor, targets: Tensor) -> str:
    """A row of the table: accuracy, log loss and calibration error."""
    values = [score(metric, outputs, targets) for metric in ("accuracy", "log_loss", "ece")]
    return f"| {name} | {values[0]:.4f} | {values[1]:.4f} | {values[2]:.4f} |"


def reliability(outputs: Tensor, targets: Tensor) -> tuple[list[float], list[float]]:
    """Mean confidence and accuracy of the examples in each bin of confidence that holds any."""
    confidence, chosen = outputs.softmax(1).max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS)
    there = [bins == b for b in range(1, BINS + 1) if (bins == b).any()]
    right = (chosen == targets).float()
    return [float(confidence[b].mean()) for b in there], [float(right[b].mean()) for b in there]


def main() -> None:
    """Train, print, draw."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data / 16).float()[order], torch.tensor(digits.target).long()[order]
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    train, validation, x_test, y_test = (x[:200], y[:200]), (x[200:600], y[200:600]), x[1000:], y[1000:]
    models = [network(seed, 64) for seed in range(3)]
    for seed, model in enumerate(models):
        itf.fit(model, train, epochs=15, learning_rate=0.03, weight_decay=0.0, seed=seed, progress=False)
    print("| model | accuracy | log loss | calibration error |\n| :-- | --: | --: | --: |")
    for k, model in enumerate(models):
        print(line(f"network {k + 1}", model(x_test).detach(), y_test))
    mean = itf.Ensemble(models)
    before = {"one network": models[0](x_test).detach(), "mean of three": mean(x_test).detach()}
    after = [itf.calibrate(model, validation, progress=False).model(x_test).detach() for model in (models[0], mean)]
    draw({title: (outputs, now) for (title, outputs), now in zip(before.items(), after, strict=True)}, y_test)
    for kind in COMBINE:
        if kind == "logits":
            continue  # once normalised it is the mean of log-probabilities
        ensemble = itf.Ensemble(models, combine=kind)
        if not LEARNS[kind]:
            print(line(f"`{kind}`", ensemble(x_test).detach(), y_test))
        ensemble.calibrate(validation, progress=False)
        name = f"`{kind}`" + ("" if LEARNS[kind] else ", calibrated")
        print(line(name, ensemble(x_test).detach(), y_test))
    alone, student = network(9, 16), network(9, 16)
    itf.fit(alone, train, validation, epochs=15, learning_rate=0.03, progress=False)
    seen = torch.cat([x[:200], x[600:1000]])
    record = itf.distill(models, student, seen, validation, epochs=15, learning_rate=0.03, progress=False)
    print(line("small network, on the labels", alone(x_test).detach(), y_test))
    print(line("small network, distilled without labels", student(x_test).detach(), y_test))
    print("agreement on the validation data:", round(record.agreement, 4))


def draw(pairs: dict[str, tuple[Tensor, Tensor]], targets: Tensor) -> None:
    """A reliability diagram for each pair, before and after."""
    pyplot.rcParams.update({"svg.hashsalt": "interfuse", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(pairs), figsize=(7, 3.4), sharey=True)
    for axis, (title, (before, after)) in zip(axes, pairs.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
        for label, outputs, marker in (("before", before, "o"), ("after", after, "s")):
            error = score("ece", outputs, targets)
            axis.plot(*reliability(outputs, targets), marker=marker, markersize=4, label=f"{label}: error {error:.3f}")
        axis.set(title=title, xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        axis.legend(loc="upper left", frameon=False)
    axes[0].set_ylabel("accuracy")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

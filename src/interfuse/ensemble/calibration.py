"""Learning from validation data, and what it brings: accuracy, log loss and expected calibration error before and after.

The values after are cross-validated: each example is predicted with what the other folds taught. What the ensemble keeps
is learned from all of the data, so its values on the same data would be too good. The expected calibration error (Guo et
al. 2017, 1706.04599) is that of `evaluation.metrics`: 15 bins of confidence of equal width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.ensemble.combine import LEARNS, combined
from interfuse.ensemble.learning import folds_of, learn, temperature_of
from interfuse.errors import DataError, OptionError, Problem
from interfuse.evaluation.metrics import score

METRICS = ("accuracy", "log_loss", "ece")


@dataclass(frozen=True)
class Calibration:
    """What was learned, and what it brings on the validation data.

    combine: the ensemble's kind. before, after: accuracy, log_loss (nats) and ece (both better lower); before is the mean
    of the networks' probabilities where the kind itself is learned, after is cross-validated in `folds` folds over the
    `examples`. learned: the numbers by name, one a network in lists; stacking's matrices aren't repeated here.
    model: the calibrated network.
    """

    combine: str
    before: dict[str, float]
    after: dict[str, float]
    examples: int
    folds: int
    learned: dict[str, Any]
    model: nn.Module = field(repr=False)

    def __str__(self) -> str:
        """One line: accuracy, log loss and calibration error before and after."""
        values = ", ".join(f"{name} {self.before[name]:.4g} -> {self.after[name]:.4g}" for name in METRICS)
        return f"{values} ({self.examples} validation examples, {self.folds}-fold cross-validation)"


def cross_validated(
    combine: str, logs: Tensor, targets: Tensor, *, folds: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """(what is learned, values before, values after) from M networks' log-probabilities (M, n, classes) and classes (n,)."""
    rules = {"folds": (folds, 2), "seed": (seed, 0)}
    problems = [
        Problem(name, f"got {value!r}", f"a whole number from {least} up")
        for name, (value, least) in rules.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]
    if problems:
        raise OptionError(*problems)
    if len(targets) < folds:
        wrong = f"{len(targets)} examples for {folds} folds"
        raise DataError(Problem("validation", wrong, "labelled examples, at least one a fold"))
    kind = "log_probabilities" if combine == "logits" else combine  # the same once normalised
    before = _measured(combined("probabilities" if LEARNS[kind] else kind, logs, {}), targets)
    targets = targets.reshape(-1).long()
    numbers, after = _learned(kind, logs, targets), torch.empty_like(logs[0])
    part = folds_of(targets, folds, seed)
    for fold in range(folds):
        held, rest = part == fold, part != fold
        after[held] = _applied(kind, logs[:, held], _learned(kind, logs[:, rest], targets[rest]))
    return numbers, before, _measured(after, targets)


def _learned(kind: str, logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    if LEARNS[kind]:
        return learn(kind, logs, targets)
    return {"scale": torch.tensor(temperature_of(combined(kind, logs, {}), targets), dtype=logs.dtype)}


def _applied(kind: str, logs: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    result = combined(kind, logs, numbers)
    return result if LEARNS[kind] else (result / numbers["scale"]).log_softmax(-1)


def _measured(logs: Tensor, targets: Tensor) -> dict[str, float]:
    return {name: score(name, logs, targets) for name in METRICS}

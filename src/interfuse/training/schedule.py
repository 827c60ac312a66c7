"""`WeightSchedule`: the weights of a `weighted` fusion set by validation, epoch by epoch, in place of being trained.

    w <- s w + (1 - s) softmax(-L / T),   L_k the validation loss of the fusion with model k alone

L is measured at the end of each epoch, and the weights hold from the beginning of the next: the values that `fit` chooses the
best epoch by are those of the weights it keeps. Averaging over epochs as Polyak & Juditsky 1992 average iterates, with
exponentially falling shares. The validation data have a say here, so results are reported on other data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interfuse.errors import OptionError, Problem
from interfuse.extras import require
from interfuse.modules.average import Weighted
from interfuse.modules.fused import ModelFusion, Reading
from interfuse.modules.inputs import split_batch

if TYPE_CHECKING:
    from lightning.pytorch import Callback


class WeightSchedule:
    """A schedule for one `fit` of a `weighted` fusion, with validation data: `fit(..., callbacks=[schedule.callback()])`.

    temperature: above 0; the lower it is, the more of the weight the best model has. smoothing: how much of the last weights
    is kept, in [0, 1). `history` has a row an epoch: epoch, and each model's weight in it; in the record's history they are
    `weight_<model>`.
    """

    def __init__(self, temperature: float = 1.0, smoothing: float = 0.5) -> None:
        problems = []
        if not 0 < temperature < math.inf:
            problems.append(Problem("temperature", f"got {temperature!r}", "a number above 0"))
        if not 0 <= smoothing < 1:
            problems.append(Problem("smoothing", f"got {smoothing!r}", "a share in [0, 1)"))
        if problems:
            raise OptionError(*problems)
        self.temperature, self.smoothing = temperature, smoothing
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.sums: list[float] = []

    def next_weights(self, weights: Sequence[float], losses: Sequence[float]) -> list[float]:
        """The weights after those, for each model's loss; a model whose loss isn't finite is given no more."""
        known = torch.tensor([loss if math.isfinite(loss) else math.inf for loss in losses], dtype=torch.float64)
        if not bool(known.isfinite().any()):
            return list(weights)
        new = (-known / self.temperature).softmax(0)
        return [self.smoothing * w + (1 - self.smoothing) * float(n) for w, n in zip(weights, new, strict=True)]

    def save_figure(self, path: str | Path) -> Path:
        """Each model's weight by epoch, as a picture of the path's kind; an SVG of the same weights is the same bytes."""
        matplotlib = require("matplotlib")
        figure = require("matplotlib.figure").Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name in [key for key in (self.history or [{}])[0] if key != "epoch"]:
            rows = self.history
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker="o", markersize=4, label=name)
        axes.set(xlabel="epoch", ylabel="weight", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
        undated = {"metadata": {"Date": None}} if Path(path).suffix == ".svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": "weights"}):
            figure.savefig(path, **undated)
        return Path(path)

    def callback(self) -> Callback:
        """What `fit` takes among its `callbacks`."""
        require("lightning.pytorch")
        from lightning.pytorch import Callback

        schedule = self

        class Scheduled(Callback):
            """Sets the weights when an epoch begins, and keeps the optimiser from them."""

            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                schedule._begin(pl_module.model, trainer)

            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                for name, weight in schedule._set(pl_module.model, trainer.current_epoch + 1).items():
                    pl_module.log(f"weight_{name}", weight, on_step=False, on_epoch=True)

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                for score in _scores(pl_module.model):
                    score.grad = None

            def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                schedule.sums = [0.0] * (len(pl_module.model.names) + 1)

            def on_validation_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
            ) -> None:
                schedule._measure(pl_module, batch)

            def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                sums = torch.tensor(schedule.sums, device=pl_module.device)
                *losses, examples = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
                schedule.losses = [loss / examples for loss in losses]

        return Scheduled()

    def _begin(self, model: Any, trainer: Any) -> None:
        if not isinstance(model, ModelFusion) or not isinstance(model.fusion, Weighted):
            kind = model.kind if isinstance(model, ModelFusion) else type(model).__name__
            raise OptionError(Problem("callbacks", f"a schedule of weights for {kind!r}", "a fusion of the kind 'weighted'"))
        if not trainer.enable_validation:
            raise OptionError(Problem("validation", "missing", "a schedule of weights goes by validation data"))
        self.history, self.losses = [], []

    def _set(self, model: ModelFusion, epoch: int) -> dict[str, float]:
        """Give the fusion this epoch's weights."""
        scores = _scores(model)
        weights = torch.stack([score.detach().double() for score in scores]).softmax(0).tolist()
        if self.losses:
            weights = self.next_weights(weights, self.losses)
        for score, weight in zip(scores, weights, strict=True):
            score.data.fill_(math.log(max(weight, torch.finfo(score.dtype).tiny)))
        named = dict(zip(model.names, weights, strict=True))
        self.history.append({"epoch": epoch, **named})
        return named

    def _measure(self, loop: Any, batch: Any) -> None:
        """Add a batch's losses, each model alone, and its examples."""
        model: ModelFusion = loop.model
        if loop.from_readings:
            readings, targets = batch
        else:
            inputs, targets = split_batch(batch)
            readings = [model.read(k, own) for k, own in enumerate(model.own_inputs(inputs))]
        for k in range(len(readings)):
            alone = [reading if k == j else Reading(None) for j, reading in enumerate(readings)]
            outputs = model.fuse(alone)
            self.sums[k] += float(loop.loss(outputs.float(), targets)) * len(outputs)
        self.sums[-1] += len(outputs)


def _scores(model: ModelFusion) -> list[nn.Parameter]:
    assert isinstance(model.fusion, Weighted)
    return list(model.fusion.scores)

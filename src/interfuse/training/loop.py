"""The training loop as Lightning sees it: one module and two callbacks.

Nothing here decides anything: `fit` chooses data, losses and where to start.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from interfuse.errors import DataError, Problem
from interfuse.evaluation.metrics import Metric, score
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import call, prediction, split_batch

Loss = Callable[[Tensor, Any], Tensor]


def forward(model: nn.Module, batch: Any, *, from_readings: bool) -> tuple[Tensor, Any]:
    """(outputs, targets) for a batch of the data, or of a fusion's cached readings."""
    if from_readings:
        assert isinstance(model, ModelFusion)
        return model.fuse(batch[0]), batch[1]
    inputs, targets = split_batch(batch)
    return prediction(call(model, inputs)), targets


class Loop(lightning.LightningModule):
    """`model` trained with AdamW and a cosine schedule, validated by loss and metric."""

    def __init__(self, model: nn.Module, loss: Loss, metric: Metric | None, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.model, self.loss, self.metric = model, loss, metric
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.from_readings = False
        self.seen: list[tuple[Tensor, Any]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of one batch."""
        outputs, targets = forward(self.model, batch, from_readings=self.from_readings)
        loss = self.loss(outputs, targets)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(outputs), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Keep what the model gives for one batch."""
        outputs, targets = forward(self.model, batch, from_readings=self.from_readings)
        self.seen.append((outputs.detach(), targets))

    def on_validation_epoch_end(self) -> None:
        """Log loss and metric over all of the validation data, from every device."""
        parts = self.seen if self.trainer.world_size == 1 else [_flat(self.all_gather(part)) for part in self.seen]
        self.seen = []
        for name, value in measure(parts, self.loss, self.metric).items():
            self.log(f"validation_{name}", value)

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained; the learning rate falls to zero along a cosine."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.learning_rate, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _flat(part: Any) -> tuple[Tensor, Any]:
    outputs, targets = part
    return outputs.flatten(0, 1), None if targets is None else targets.flatten(0, 1)


def measure(parts: list[tuple[Tensor, Any]], loss: Loss, metric: Metric | None) -> dict[str, float]:
    """Loss (mean over the examples) and metric of the outputs of all batches."""
    sizes = [len(outputs) for outputs, _ in parts]
    losses = [float(loss(outputs.float(), targets)) for outputs, targets in parts]
    values = {"loss": sum(value * n for value, n in zip(losses, sizes, strict=True)) / sum(sizes)}
    if metric is not None:
        outputs = torch.cat([o.float().cpu() for o, _ in parts])
        values[metric.name] = score(metric, outputs, torch.cat([t.cpu() for _, t in parts]))
    return values


def rank(values: Mapping[str, float], metric: Metric | None) -> tuple[float, float]:
    """How good validation values are, to compare: by the metric, then by the loss; higher is better."""
    value = 0.0 if metric is None else values[metric.name]
    return (value if metric is None or metric.higher else -value, -values["loss"])


class KeepBest(lightning.Callback):
    """Keeps the trained weights of the best epoch, step 0 included, by the metric and then by the loss."""

    def __init__(self, model: nn.Module, metric: Metric | None, start: Mapping[str, float] | None) -> None:
        self.model, self.metric = model, metric
        self.history: list[dict[str, float]] = []
        self.epoch, self.best, self.state = 0, None if start is None else rank(start, metric), trained_state(model)
        self.begun = time.monotonic()
        if start is not None:
            self.history.append({"epoch": 0, **{f"validation_{key}": value for key, value in start.items()}})

    def on_train_epoch_end(self, trainer: Any, loop: Any) -> None:
        """Write the epoch down, and keep its weights if they are the best yet."""
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        now = time.monotonic()
        if not math.isfinite(values["train_loss"]):
            self.model.load_state_dict(self.state, strict=False)
            wrong = f"the loss was {values['train_loss']} in epoch {trainer.current_epoch + 1}"
            raise DataError(Problem("training", wrong, "a lower learning_rate, or data without NaN or infinity"))
        self.history.append({"epoch": trainer.current_epoch + 1, **values, "seconds": now - self.begun})
        self.begun = now
        found = {key.removeprefix("validation_"): value for key, value in values.items() if key.startswith("validation_")}
        if not found:
            return
        now_at = rank(found, self.metric)
        if self.best is None or now_at > self.best:
            self.best, self.epoch, self.state = now_at, trainer.current_epoch + 1, trained_state(self.model)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints, so that a resumed run remembers its best epoch."""
        return {"best": self.best, "epoch": self.epoch, "state": self.state, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]
        self.state, self.history = state_dict["state"], state_dict["history"]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that are trained, and of the buffers (running statistics) of modules that hold any."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters()):
            names |= {f"{name}.{key}" if name else key for key, _ in module.named_buffers(recurse=False)}
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name in names}


class EpochProgress(lightning.Callback):
    """One line on standard error: epoch, step, losses, metric, rate and time left. Only on a terminal."""

    def on_train_start(self, trainer: Any, loop: Any) -> None:
        """Open the line."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("training", total=float(trainer.estimated_stepping_batches), rate="")
        self.start = time.monotonic()
        self.bar.start()

    def on_train_batch_end(self, trainer: Any, loop: Any, outputs: Any, batch: Any, index: int) -> None:
        """Move the line on."""
        seen = ", ".join(f"{key.replace('_', ' ')} {float(value):.4g}" for key, value in trainer.callback_metrics.items())
        rate = trainer.global_step / max(1e-9, time.monotonic() - self.start)
        about = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} {seen}"
        self.bar.update(self.task, completed=trainer.global_step, description=about, rate=f"{rate:.1f} steps/s")

    def teardown(self, trainer: Any, loop: Any, stage: str) -> None:
        """Close the line, however the run ended."""
        if stage == "fit" and hasattr(self, "bar"):
            self.bar.stop()

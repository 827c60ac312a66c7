"""The training loop as Lightning sees it: one module, two callbacks, and the data as it goes through them.

Nothing here decides anything: `fit` chooses data, losses and where to start.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from interfuse.data.dataset import Shuffled
from interfuse.errors import CheckpointError, DataError, Problem
from interfuse.evaluation.metrics import Metric, score
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import call, prediction, split_batch
from interfuse.training.losses import Loss
from interfuse.training.parameters import groups
from interfuse.training.statistics import of_one_example


def forward(model: nn.Module, batch: Any, *, from_readings: bool) -> tuple[Tensor, Any]:
    """(outputs, targets) for a batch of the data, or of a fusion's cached readings."""
    if from_readings:
        assert isinstance(model, ModelFusion)
        return model.fuse(batch[0]), batch[1]
    inputs, targets = split_batch(batch)
    return prediction(call(model, inputs)), targets


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The sum of what modules left in `auxiliary_loss` in their last forward, such as a load balance; then they hold none."""
    total: Tensor | float = 0.0
    for module in model.modules():
        if isinstance(left := getattr(module, "auxiliary_loss", None), Tensor):
            total = total + left
            module.auxiliary_loss = None  # type: ignore[assignment]  # torch's stubs know tensors and modules alone
    return total


class Rates(NamedTuple):
    """How fast weights change, and what holds them back; as `fit` has them."""

    learning_rate: float
    weight_decay: float = 0.0
    layer_decay: float | None = None
    l2_sp: float = 0.0


class Loop(lightning.LightningModule):
    """`model` trained with AdamW and a cosine schedule, validated by loss and metric."""

    def __init__(self, model: nn.Module, loss: Loss, metric: Metric | None, rates: Rates) -> None:
        super().__init__()
        self.model, self.loss, self.metric, self.rates = model, loss, metric, rates
        self.from_readings = False
        self.starts: list[tuple[nn.Parameter, Tensor]] = []
        self.factors: list[Any] = []
        self.seen: list[tuple[Tensor, Any]] = []

    def setup(self, stage: str) -> None:
        """Remember the start, where the loss needs it."""
        if self.rates.l2_sp:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.starts = [(p, p.detach().clone()) for name, p in named if ".lora_" not in name]
            self.factors = [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of one batch."""
        try:
            outputs, targets = forward(self.model, batch, from_readings=self.from_readings)
        except ValueError as error:
            raise of_one_example(error) from None
        loss = self.loss(outputs, targets)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(outputs), sync_dist=True)
        loss = loss + auxiliary_loss(self.model)
        return loss + self.rates.l2_sp / 2 * self._distance() if self.rates.l2_sp else loss

    def _distance(self) -> Tensor:
        """The squared distance of what is trained, LoRA's products added to their weights, from where training began."""
        moved = [(p - start.to(p)).float() for p, start in self.starts]
        moved += [layer.get_delta_weight(name).float() for layer in self.factors for name in layer.active_adapters]
        return torch.stack([part.square().sum() for part in moved]).sum()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the start: a resumed run is held to the same."""
        checkpoint["starts"] = [start for _, start in self.starts]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counterpart of `on_save_checkpoint`; without the start that the loss needs it is a `CheckpointError`."""
        trained, starts = [p for p, _ in self.starts], checkpoint.get("starts", [])
        if not trained:
            return
        name = str(getattr(self.trainer, "ckpt_path", None) or "the checkpoint")
        if not starts:
            wrong = "was made without l2_sp, and doesn't hold the start that weights are to be held to"
            raise CheckpointError(Problem("resume", f"{name} {wrong}", "resume it with l2_sp=0, or train anew"))
        if [p.shape for p in trained] != [start.shape for start in starts]:
            wrong = f"holds the start of {len(starts)} tensors, which aren't the {len(trained)} that are trained"
            raise CheckpointError(Problem("resume", f"{name} {wrong}", "resume it with the model and options it was made with"))
        self.starts = list(zip(trained, starts, strict=True))

    def validation_step(self, batch: Any, index: int) -> None:
        """Keep what the model gives for one batch."""
        outputs, targets = forward(self.model, batch, from_readings=self.from_readings)
        self.seen.append((outputs.detach(), targets))

    def on_validation_epoch_end(self) -> None:
        """Log loss and metric over all of the validation data, from every device."""
        parts = self.seen if self.trainer.world_size == 1 else [_flat(self.all_gather(part)) for part in self.seen]
        self.seen = []
        for name, value in measure(parts, self.loss, self.metric).items():
            self.log(f"validation_{name}", value, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained; the learning rate falls to zero along a cosine."""
        rates = self.rates
        trained = groups(self.model, rates.learning_rate, rates.layer_decay)
        optimizer = torch.optim.AdamW(trained, rates.learning_rate, weight_decay=rates.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Epochs:
    """Batches whose random order and changes depend only on the seed and the epoch, so that a resumed run has the same.

    A class, because Lightning starts iterators before the epoch they belong to, and takes lists for several loaders.
    """

    def __init__(self, data: Iterable[Any], loop: Loop, seed: int | None) -> None:
        self.data, self.loop, self.seed = data, loop, seed

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # Lightning takes a TypeError for "not known"

    def __iter__(self) -> Iterator[Any]:
        if self.seed is not None:
            epoch = self.loop.current_epoch
            torch.manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = getattr(self.data, "sampler", None)
            if isinstance(order, Shuffled):
                order.set_epoch(epoch)
        yield from self.data


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
        finite = bool(outputs.isfinite().all())
        values[metric.name] = score(metric, outputs, torch.cat([t.cpu() for _, t in parts])) if finite else math.nan
    return values


def rank(values: Mapping[str, float], metric: Metric | None) -> tuple[float, float]:
    """How good validation values are, to compare: by the metric, then by the loss; higher is better, NaN is worst."""
    value = 0.0 if metric is None else values[metric.name] if metric.higher else -values[metric.name]
    return tuple(-math.inf if math.isnan(v) else v for v in (value, -values["loss"]))  # type: ignore[return-value]


class KeepBest(lightning.Callback):
    """Keeps the trained weights of the best epoch, step 0 included, and stops `patience` epochs after it.

    With processes of Lightning's own making (`ddp_spawn`), what they found comes back through the file `handover`.
    """

    def __init__(
        self, model: nn.Module, metric: Metric | None, start: Mapping[str, float] | None, patience: int | None, handover: Path
    ) -> None:
        self.model, self.metric, self.patience, self.handover = model, metric, patience, handover
        self.history: list[dict[str, float]] = []
        self.epoch, self.best, self.state = 0, None if start is None else rank(start, metric), trained_state(model)
        self.begun = time.monotonic()
        self.process = os.getpid()
        self.validated, self.fresh = start is not None, False
        if start is not None:
            self.history.append({"epoch": 0, **{f"validation_{key}": value for key, value in start.items()}})

    def on_train_epoch_start(self, trainer: Any, loop: Any) -> None:
        """Start the epoch's clock."""
        self.begun = time.monotonic()

    def on_validation_end(self, trainer: Any, loop: Any) -> None:
        """Note that this epoch has validation values of its own."""
        self.fresh = True

    def on_train_epoch_end(self, trainer: Any, loop: Any) -> None:
        """Write the epoch down, and keep its weights if they are the best yet."""
        found = {key: float(value) for key, value in trainer.callback_metrics.items()}
        values = {key: value for key, value in found.items() if self.fresh or not key.startswith("validation_")}
        epoch, fresh, self.fresh = trainer.current_epoch + 1, self.fresh, False
        if not math.isfinite(values["train_loss"]):
            wrong = f"the loss was {values['train_loss']} in epoch {epoch}"
            raise DataError(Problem("training", wrong, "a lower learning_rate, or data without NaN or infinity"))
        self.history.append({"epoch": epoch, **values, "seconds": time.monotonic() - self.begun})
        if not self.validated:  # nothing to choose by: the last epoch
            self.epoch = epoch
        elif fresh:
            now = rank({key.removeprefix("validation_"): value for key, value in values.items()}, self.metric)
            if self.best is None or now > self.best:
                self.best, self.epoch, self.state = now, epoch, trained_state(self.model)
            elif self.patience is not None and epoch - self.epoch >= self.patience:
                trainer.should_stop = True

    def on_train_end(self, trainer: Any, loop: Any) -> None:
        """Hand over to the process that called `fit`, where this is another."""
        if os.getpid() != self.process and trainer.is_global_zero:
            torch.save(self.state_dict(), self.handover)

    def teardown(self, trainer: Any, loop: Any, stage: str) -> None:
        """Leave the group of processes, where this one was made for it: its threads may otherwise abort the exit."""
        if os.getpid() != self.process and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def finish(self) -> None:
        """Give the model the weights of the best epoch, if there is anything to choose by."""
        if self.handover.exists():
            self.load_state_dict(torch.load(self.handover, weights_only=True))
        if self.validated:
            self.put_back()

    def put_back(self) -> None:
        """Give the model the weights of the best epoch yet, or else of the start."""
        self.model.load_state_dict(self.state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints, so that a resumed run remembers its best epoch."""
        return {"best": self.best, "epoch": self.epoch, "state": self.state, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]
        self.state, self.history = state_dict["state"], state_dict["history"]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters that are trained, and of all buffers (running statistics)."""
    kept = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name not in kept}


class EpochProgress(lightning.Callback):
    """One line on standard error: epoch, step, losses, metric, rate and time left. Only on a terminal."""

    def on_train_start(self, trainer: Any, loop: Any) -> None:
        """Open the line."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not self._shown(trainer))
        self.task = self.bar.add_task("training", total=float(trainer.estimated_stepping_batches), rate="")
        self.start = time.monotonic()
        self.bar.start()

    @staticmethod
    def _shown(trainer: Any) -> bool:
        return bool(trainer.is_global_zero) and sys.stderr.isatty()

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


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl+C and SIGTERM raise `KeyboardInterrupt`: Lightning would end the process, and ignore Ctrl+C from then on."""
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if here else None
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        if here and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def types_kept(model: nn.Module) -> Iterator[None]:
    """Ends with the types of before: Lightning's precision "bf16-true" makes all of a model bf16. What wasn't trained has its
    own values again, none rounded."""
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    buffers = [(m, key, b) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        for parameter, before, learned in parameters:
            if parameter.dtype != before.dtype:
                parameter.data = parameter.data.to(before.dtype) if learned else before.to(parameter.device)
                parameter.grad = None
        for module, key, old in buffers:
            now = module._buffers[key]
            if now is not None and now.dtype != old.dtype:
                module._buffers[key] = now.to(old.dtype)

"""`fit`: train a fused network, or any network, and keep the best epoch.

Lightning runs the loop; its options (accelerator, devices, strategy, precision, logger, ...) are passed through as they
are. What is ours: where a fusion starts, the features of frozen networks computed once, and the best weights, step 0
included, restored at the end.
"""

from __future__ import annotations

import fnmatch
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from interfuse.errors import DataError, ModelError, OptionError, Problem, nearest
from interfuse.evaluation.metrics import AnyMetric, Metric, find_metric
from interfuse.extras import require
from interfuse.inference.batches import batches, first
from interfuse.inference.features import cached, default_folder, why_not
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import Composite, call, move, prediction, split_batch
from interfuse.modules.taps import quiet

if TYPE_CHECKING:
    from interfuse.training.loop import KeepBest, Loop

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]
Loaders: TypeAlias = "tuple[Any, Any]"  # train, and validation or None

_LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda outputs, targets: nn.functional.cross_entropy(outputs, targets.long()),
    "binary_cross_entropy": lambda outputs, targets: nn.functional.binary_cross_entropy_with_logits(
        outputs, targets.view(outputs.shape).to(outputs.dtype)
    ),
    "mse": lambda outputs, targets: nn.functional.mse_loss(outputs, targets.view(outputs.shape).to(outputs.dtype)),
    "mae": lambda outputs, targets: nn.functional.l1_loss(outputs, targets.view(outputs.shape).to(outputs.dtype)),
}
LOSSES = ("auto", *_LOSSES)


@dataclass(frozen=True)
class FitRecord:
    """How a training went.

    history: a dict an epoch, from 0 (before training) on: epoch, train_loss, validation_loss, validation_<metric>, seconds.
    best_epoch: whose weights the model has now; 0 is the start. best: that epoch's validation values.
    start: which network the fusion started from, "mean", or "" where it has no parents to start from.
    cached: whether the features of frozen networks came from the cache; `why_not` says why where they didn't.
    seconds: all of it; train_seconds: without finding the start and computing features.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best: dict[str, float] = field(default_factory=dict)
    metric: str = ""
    start: str = ""
    cached: bool = False
    why_not: str = ""
    seconds: float = 0.0
    train_seconds: float = 0.0


def fit(
    model: nn.Module,
    train: Any,
    validation: Any = None,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 0.01,
    loss: str | Loss = "auto",
    metric: AnyMetric | None = None,
    patience: int | None = 5,
    train_only: Sequence[str] | None = None,
    cache: bool | str | Path = True,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    checkpoints: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **trainer: Any,
) -> FitRecord:
    """Train `model` in place and leave it in evaluation mode, with the weights of the best epoch on `validation`.

    train, validation: a DataLoader, a data set, (inputs, targets), any iterable of batches, or a LightningDataModule as
        `train`. Data sets are shuffled and cut in batches of `batch_size`; loaders keep their own order.
    epochs: passes over the data, 0 or more; 0 only finds the best parent to start from.
    loss: a name or a function (outputs, targets) -> scalar. "auto": cross-entropy for whole-number targets (binary for one
        output), mean squared error for floats.
    metric: what the best epoch is chosen by, then the loss; default accuracy for classes, the loss alone otherwise.
    patience: epochs without a better validation before stopping; None never stops.
    train_only: globs of parameters' names; all others are kept as they are during this fit.
    cache: keep the features of frozen networks on disk and train on those; a folder to choose where, False to recompute
        them in each step. They are recomputed anyway where they can't be cached, as the record says.
    checkpoints: a folder for Lightning's checkpoints; resume: one of them to go on from.
    callbacks, **trainer: Lightning's own (accelerator, devices, strategy, precision, logger, ...).

    A fusion with residual parents starts from the best of them, or their mean, on `validation` (without it, on `train`).
    Raises `DataError`, `ModelError` and `OptionError` before anything is trained.
    """
    require("lightning.pytorch")
    from interfuse.training.loop import Loop

    begun = time.monotonic()
    _check(model, epochs, learning_rate, batch_size, weight_decay, patience, loss)
    with torch.random.fork_rng(devices=[]), _trained(model, train_only):
        torch.manual_seed(seed)
        loaders = _loaders(train, validation, batch_size, seed)
        inputs, targets = split_batch(first(loaders[0], "train"))
        outputs = _try(model, inputs)
        loop = Loop(model, _loss(loss, outputs, targets), _metric(metric, outputs, targets), learning_rate, weight_decay)
        loaders, reason = _from_cache(model, loaders, cache, progress)
        loop.from_readings = not reason
        start, values = _start(loop, loaders)
        torch.manual_seed(seed)
        ready = time.monotonic()
        keeper = _run(loop, loaders, values, epochs, patience, callbacks, checkpoints, resume, progress, trainer)
    now = time.monotonic()
    best = {key: v for row in keeper.history if row["epoch"] == keeper.epoch for key, v in row.items() if "validation" in key}
    return FitRecord(
        history=keeper.history,
        best_epoch=keeper.epoch,
        best=best,
        metric=loop.metric.name if loop.metric else "loss",
        start=start,
        cached=not reason,
        why_not=reason,
        seconds=now - begun,
        train_seconds=now - ready,
    )


def _check(model: Any, epochs: Any, learning_rate: Any, batch_size: Any, weight_decay: Any, patience: Any, loss: Any) -> None:
    rules = (
        (isinstance(model, nn.Module), "model", type(model).__name__, "a torch.nn.Module"),
        (isinstance(epochs, int) and epochs >= 0, "epochs", epochs, "a whole number from 0 up"),
        (isinstance(learning_rate, int | float) and learning_rate > 0, "learning_rate", learning_rate, "a number above 0"),
        (isinstance(batch_size, int) and batch_size > 0, "batch_size", batch_size, "a whole number from 1 up"),
        (isinstance(weight_decay, int | float) and weight_decay >= 0, "weight_decay", weight_decay, "a number from 0 up"),
        (patience is None or (isinstance(patience, int) and patience > 0), "patience", patience, "a whole number, or None"),
        (callable(loss) or loss in LOSSES, "loss", loss, nearest(str(loss), LOSSES) + " Or a function."),
    )
    problems = [Problem(path, f"got {got!r}", allowed) for fine, path, got, allowed in rules if not fine]
    if problems:
        raise OptionError(*problems)


@contextmanager
def _trained(model: nn.Module, train_only: Sequence[str] | None) -> Iterator[None]:
    """Within it, only what matches trains; modules without anything to train are in evaluation mode. Ends in evaluation."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    if train_only is not None:
        patterns = [train_only] if isinstance(train_only, str) else list(train_only)
        idle = [pattern for pattern in patterns if not fnmatch.filter(before, pattern)]
        if idle:
            wrong = [Problem("train_only", f"{p!r} matches no parameter", nearest(p, before)) for p in idle]
            raise OptionError(*wrong)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    try:
        yield
    finally:
        model.eval()
        for name, parameter in model.named_parameters():
            if train_only is not None:
                parameter.requires_grad_(before.get(name, True))


def _loaders(train: Any, validation: Any, batch_size: int, seed: int) -> Loaders:
    module = require("lightning.pytorch").LightningDataModule
    if isinstance(train, module):
        train.prepare_data()
        train.setup("fit")
        if validation is None and type(train).val_dataloader is not module.val_dataloader:
            validation = train.val_dataloader()
        train = train.train_dataloader()
    return (
        batches(train, batch_size, shuffle=True, seed=seed, name="train"),
        None if validation is None else batches(validation, batch_size, name="validation"),
    )


def _from_cache(model: nn.Module, loaders: Loaders, cache: bool | str | Path, progress: bool) -> tuple[Loaders, str]:
    """Loaders over the cached features, or `loaders` themselves and why."""
    if cache is False:
        return loaders, "caching is off"
    there = [loader for loader in loaders if loader is not None]
    for loader in there:
        if reason := why_not(model, loader):
            return loaders, reason
    assert isinstance(model, ModelFusion)
    folder = default_folder() if cache is True else Path(cache)
    stored = [cached(model, loader, folder, progress=progress) for loader in there]
    if None in stored:
        return loaders, "the number of tokens differs between batches"
    return (stored[0], stored[1] if len(stored) > 1 else None), ""


def _try(model: nn.Module, inputs: Any) -> Tensor:
    """The model's prediction for the first batch; this also builds what is built at the first forward."""
    place = next(model.parameters(), None)
    with quiet(model):
        return prediction(call(model, inputs if place is None else move(inputs, place.device)))


def _loss(
    loss: str | Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Tensor | None
) -> Callable[[Tensor, Any], Tensor]:
    if callable(loss):
        return loss
    if targets is None:
        raise DataError(Problem("train", "the batches hold no targets", "give (inputs, targets), or a loss of your own"))
    if loss == "auto":
        whole = not targets.is_floating_point()
        one = outputs.ndim == 1 or outputs.shape[-1] == 1
        loss = ("binary_cross_entropy" if one else "cross_entropy") if whole else "mse"
    problem = _misfit(loss, outputs, targets)
    if problem:
        raise ModelError(Problem("head", problem, "give the head one output for each class or value"))
    return _LOSSES[loss]


def _misfit(loss: str, outputs: Tensor, targets: Tensor) -> str:
    if loss == "cross_entropy":
        if outputs.ndim != 2:
            return f"{loss} of outputs {tuple(outputs.shape)}"
        high = int(targets.max()) if targets.numel() else 0
        return f"{outputs.shape[-1]} classes, but the targets go up to {high}" if high >= outputs.shape[-1] else ""
    return (
        ""
        if outputs.numel() == targets.numel()
        else f"{loss} of outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}"
    )


def _metric(metric: AnyMetric | None, outputs: Tensor, targets: Tensor | None) -> Metric | None:
    if metric is not None:
        return find_metric(metric)
    return find_metric("accuracy") if targets is not None and not targets.is_floating_point() and targets.ndim == 1 else None


def _start(loop: Loop, loaders: Loaders) -> tuple[str, dict[str, float] | None]:
    """Let a fusion start from its best parent; give its name, and the validation values at step 0."""
    from interfuse.training.loop import forward, measure, rank

    model, (train, validation) = loop.model, loaders
    fusion = model if isinstance(model, ModelFusion) and any(model.parents) else None
    source = validation if validation is not None else train if fusion is not None else None
    if source is None:
        return "", None
    names = [""]
    if fusion is not None:
        names = [name for name, parent in zip(fusion.names, fusion.parents, strict=True) if parent]
        names += ["mean"] if len(names) > 1 else []
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if fusion is not None:
            fusion.start_from(name)
        with quiet(model):
            parts = [forward(model, _moved(batch, place), from_readings=loop.from_readings) for batch in source]
        found[name] = measure(parts, loop.loss, loop.metric)
    best = max(names, key=lambda name: rank(found[name], loop.metric))
    if fusion is not None:
        fusion.start_from(best)
    return best, found[best] if validation is not None else None


def _moved(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], list):
        return [type(r)(*move(tuple(r), place)) for r in batch[0]], move(batch[1], place)
    return move(batch, place)


def _run(
    loop: Loop,
    loaders: Loaders,
    start: Mapping[str, float] | None,
    epochs: int,
    patience: int | None,
    callbacks: Sequence[Any],
    checkpoints: str | Path | None,
    resume: str | Path | None,
    progress: bool,
    trainer: Mapping[str, Any],
) -> KeepBest:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from interfuse.training.loop import EpochProgress, KeepBest

    model, metric = loop.model, loop.metric
    keeper = KeepBest(model, metric, start)
    if epochs == 0:
        return keeper
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(Problem("model", "nothing in it is trained", "freeze=False, a head, or train_only"))
    own: list[Any] = [*callbacks, keeper, *([EpochProgress()] if progress else [])]
    if patience is not None and loaders[1] is not None:
        mode = "max" if metric is not None and metric.higher else "min"
        own.append(EarlyStopping(f"validation_{metric.name if metric else 'loss'}", patience=patience, mode=mode))
    if checkpoints is not None:
        own.append(ModelCheckpoint(checkpoints, save_last=True))
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": None if loaders[1] is not None else 0,
        "enable_checkpointing": checkpoints is not None,
        **trainer,
    }
    _prepare(model)
    with _without_advice():
        runner = Trainer(max_epochs=epochs, callbacks=own, **options)
        runner.fit(loop, loaders[0], loaders[1], ckpt_path=None if resume is None else str(resume))
    if loaders[1] is None:
        keeper.epoch = int(keeper.history[-1]["epoch"])  # nothing to choose by: the last epoch
    else:
        model.load_state_dict(keeper.state, strict=False)
    return keeper


def _prepare(model: nn.Module) -> None:
    """Training mode for what is trained; modules of which nothing is trained keep their statistics and have no dropout."""
    model.train()
    if isinstance(model, Composite):
        return
    for module in model.modules():
        parameters: Iterable[nn.Parameter] = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without Lightning's remarks on hardware and workers; its warnings about real trouble stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for about in ("does not have many workers", "smaller than the logging interval", "in eval mode at the start"):
                warnings.filterwarnings("ignore", f".*{about}.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
            yield
    finally:
        logger.setLevel(level)

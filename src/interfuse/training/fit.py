"""`fit`: train a fused network, or any network, and keep the best epoch.

Lightning runs the loop; its options (accelerator, devices, strategy, precision, logger, ...) are passed through as they
are. What is ours: where a fusion starts, the features of frozen networks computed once, and the best weights, step 0
included, restored at the end.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from interfuse.data.dataset import Shuffled
from interfuse.errors import ModelError, OptionError, Problem
from interfuse.evaluation.metrics import AnyMetric
from interfuse.extras import require
from interfuse.inference.batches import batches, first
from interfuse.inference.features import cached, default_folder
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import call, move, prediction, split_batch
from interfuse.modules.taps import quiet
from interfuse.training.losses import Loss, loss_for, metric_for
from interfuse.training.options import options_problems
from interfuse.training.parameters import trained
from interfuse.training.statistics import renew_if_merged

if TYPE_CHECKING:
    from interfuse.training.loop import KeepBest, Loop

_Norm = nn.modules.batchnorm._BatchNorm
Loaders: TypeAlias = "tuple[Any, Any]"  # train, and validation or None


@dataclass(frozen=True)
class FitRecord:
    """How a training went.

    history: a dict an epoch, from 0 (before training) on: epoch, train_loss, validation_loss, validation_<metric>, seconds.
    best_epoch: whose weights the model has now; 0 is the start. best: that epoch's validation values.
    start: which network the fusion started from, "mean", or "" where it has no parents to start from.
    cached: whether the features of frozen networks came from the cache; `why_not` says why where they didn't.
    statistics: in how many layers BatchNorm's statistics were estimated anew, because the model came out of a merge.
    seconds: all of it; train_seconds: without finding the start and computing features.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best: dict[str, float] = field(default_factory=dict)
    metric: str = ""
    start: str = ""
    cached: bool = False
    why_not: str = ""
    statistics: int = 0
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
    train_only: str | Sequence[str] | None = None,
    lora: int | Mapping[str, Any] | None = None,
    layer_decay: float | None = None,
    l2_sp: float = 0.0,
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
        `train`. Data sets are shuffled and cut in batches of `batch_size`, without a last one of a single example where
        BatchNorm is trained; loaders keep their own order.
    epochs: passes over the data, 0 or more; 0 only finds the best parent to start from.
    loss: a name or a function (outputs, targets) -> scalar. "auto": cross-entropy for whole-number targets (binary for one
        output), mean squared error for floats.
    metric: what the best epoch is chosen by, then the loss; default accuracy for classes, the loss alone otherwise.
    patience: epochs without a better validation before stopping; None never stops.
    train_only: globs of parameters' names, or "head"; all others are kept as they are during this fit.
    lora: train low-rank factors in place of the linear and convolutional layers, and the head whole: their rank (with
        lora_alpha twice that), or options of peft's `LoraConfig`. In the end they are added to the weights.
    layer_decay: layer l of L is trained with learning_rate * layer_decay^(L - l), in (0, 1]; heads with the rate itself.
    l2_sp: adds l2_sp/2 |w - w0|^2 to the loss, w0 the start (L2-SP, Li et al. 2018, 1802.01483); with weight_decay=0 as there.
    cache: keep the features of frozen networks on disk and train on those; a folder to choose where, False to recompute
        them in each step. They are recomputed anyway where they can't be cached, as the record says.
    checkpoints: a folder for Lightning's checkpoints; resume: one of them to go on from, with the same options: on one
        device the run then ends with the weights of one that wasn't interrupted.
    callbacks, **trainer: Lightning's own (accelerator, devices, strategy, precision, logger, ...).

    A fusion with residual parents starts from the best of them, or their mean, on `validation` (without it, on `train`).
    Raises `DataError`, `ModelError` and `OptionError` before anything is trained, and `CheckpointError` for one to resume that
    lacks what `l2_sp` needs. A loss that isn't finite is a `DataError`;
    after this or any other error in training the model has the best weights until then.
    """
    require("lightning.pytorch")
    from interfuse.training.loop import Loop, Rates

    begun = time.monotonic()
    given = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "patience": patience,
        "seed": seed,
        "train_only": train_only,
        "lora": lora,
        "layer_decay": layer_decay,
        "l2_sp": l2_sp,
        "loss": loss,
        "metric": metric,
        "resume": resume,
    }
    _check(model, {**given, **trainer})
    with _random_numbers(seed), _place_and_mode_kept(model):
        loaders = _loaders(train, validation, batch_size, seed)
        inputs, targets = split_batch(first(loaders[0], "train"))
        outputs = _try(model, inputs)
        renewed = renew_if_merged(model, loaders[0])
        rates = Rates(learning_rate, weight_decay, layer_decay, l2_sp)
        loop = Loop(model, loss_for(loss, outputs, targets), metric_for(metric, outputs, targets), rates)
        with trained(model, inputs, train_only, lora):
            if epochs and not any(p.requires_grad for p in model.parameters()):
                raise ModelError(Problem("model", "nothing in it is trained", "freeze=False, a head, or train_only"))
            loaders, reason = _from_cache(model, loaders, cache, progress)
            loop.from_readings = not reason
            start, values = _start(loop, loaders)
            torch.manual_seed(seed)
            ready = time.monotonic()
            options = {"max_epochs": epochs, "callbacks": _callbacks(callbacks, checkpoints, progress), **trainer}
            keeper = _run(loop, loaders, values, seed, patience, resume, options)
    return _record(loop, keeper, start, reason, renewed, begun, ready)


def _record(loop: Loop, keeper: KeepBest, start: str, reason: str, renewed: int, begun: float, ready: float) -> FitRecord:
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
        statistics=renewed,
        seconds=now - begun,
        train_seconds=now - ready,
    )


def wrong_options(options: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong among options of `fit`, Lightning's included, as far as it shows without a network."""
    own = inspect.signature(fit).parameters
    given = {name: parameter.default for name, parameter in own.items() if name not in _DATA} | dict(options)
    return options_problems(given, [name for name in own if name not in _DATA])


#: What `fit` takes besides options.
_DATA = ("model", "train", "validation", "trainer")


def _check(model: Any, options: Mapping[str, Any]) -> None:
    """Raise an `OptionError` with everything that is wrong among the options."""
    problems = [] if isinstance(model, nn.Module) else [Problem("model", f"got {model!r}", "a torch.nn.Module")]
    problems += wrong_options(options)
    if problems:
        raise OptionError(*problems)


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Random numbers from `seed` on; afterwards those of before go on."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _place_and_mode_kept(model: nn.Module) -> Iterator[None]:
    """Ends in evaluation mode, with the model where it was (Lightning takes it away from a GPU)."""
    before = next((p.device for p in model.parameters()), None)
    try:
        yield
    finally:
        model.eval()
        if before is not None and next(model.parameters()).device != before:
            model.to(before)


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
    folder = default_folder() if cache is True else Path(cache)
    stored: list[Any] = [None, None]
    for k, loader in enumerate(loaders):
        if loader is not None:
            stored[k] = cached(model, loader, folder, progress=progress)
            if isinstance(stored[k], str):
                return loaders, stored[k]
    return (stored[0], stored[1]), ""


def _try(model: nn.Module, inputs: Any) -> Tensor:
    """The model's prediction for the first batch; this also builds what is built at the first forward."""
    place = next(model.parameters(), None)
    with quiet(model):
        return prediction(call(model, inputs if place is None else move(inputs, place.device)))


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
            parts = [forward(model, move(batch, place), from_readings=loop.from_readings) for batch in source]
        found[name] = measure(parts, loop.loss, loop.metric)
    best = max(names, key=lambda name: rank(found[name], loop.metric))
    if fusion is not None:
        fusion.start_from(best)
    return best, found[best] if validation is not None else None


def _callbacks(callbacks: Sequence[Any], checkpoints: str | Path | None, progress: bool) -> list[Any]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from interfuse.training.loop import EpochProgress

    own = [EpochProgress()] if progress else []
    return [*callbacks, *own, *([] if checkpoints is None else [ModelCheckpoint(checkpoints, save_last=True)])]


def _run(
    loop: Loop,
    loaders: Loaders,
    start: Mapping[str, float] | None,
    seed: int,
    patience: int | None,
    resume: str | Path | None,
    options: dict[str, Any],
) -> KeepBest:
    """Lightning's part: train, and end with the best weights, or on any error with the best until then."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Checkpoint

    from interfuse.training.loop import KeepBest, interruptible, types_kept

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        keeper = KeepBest(loop.model, loop.metric, start, patience, Path(folder) / "handover.pt")
        if options["max_epochs"] == 0:
            return keeper
        defaults = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": None if loaders[1] is not None else 0,
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in options["callbacks"]),
        }
        runner = Trainer(**{**defaults, **options, "callbacks": [*options["callbacks"], keeper]})
        _prepare(loop.model)
        train, validation = _turns(loop, loaders, seed, several=runner.world_size > 1)
        try:
            with interruptible(), types_kept(loop.model):
                runner.fit(loop, train, validation, ckpt_path=None if resume is None else str(resume))
        except BaseException:
            keeper.put_back()
            raise
        keeper.finish()
    return keeper


def _turns(loop: Loop, loaders: Loaders, seed: int, *, several: bool) -> Loaders:
    """The data as Lightning gets it: in an order of the epoch's own; to several processes it shares out loaders itself."""
    from interfuse.training.loop import Epochs

    train, validation = loaders
    _leave_out_a_single_one(loop.model, train)
    if not (several and isinstance(train, DataLoader)):
        train = Epochs(train, loop, seed)
    if not (validation is None or isinstance(validation, DataLoader)):
        validation = Epochs(validation, loop, None)
    return train, validation


def _leave_out_a_single_one(model: nn.Module, loader: Any) -> None:
    """Of a loader made here: BatchNorm can't be trained on a last batch of one example, which is another one each epoch."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, Shuffled):
        left = len(loader.sampler) % loader.batch_size if loader.batch_size else 0
        if left == 1 < len(loader.sampler) and any(isinstance(m, _Norm) and m.training for m in model.modules()):
            loader.batch_sampler.drop_last = True  # type: ignore[union-attr]


def _prepare(model: nn.Module) -> None:
    """Training mode for what is trained; modules of which nothing is trained keep their statistics and have no dropout."""
    model.train()
    for module in model.modules():
        parameters: Iterable[nn.Parameter] = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


#: What Lightning says of choices that are made here on purpose.
_ADVICE = (
    "does not have many workers",
    "smaller than the logging interval",
    "in eval mode at the start",
    "have no `val_dataloader`",
    "Checkpoint directory .* exists and is not empty",
    r'add the following callbacks: \["ModelCheckpoint{[^"]*}"\]',
)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without Lightning's remarks on hardware and workers; its warnings about real trouble stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for about in _ADVICE:
                warnings.filterwarnings("ignore", f".*{about}.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
            yield
    finally:
        logger.setLevel(level)

"""`fit_tasks`: several tasks' networks that share parameters, trained together: a batch of every task a step.

The loss of a step is the mean of the tasks' weighted losses, so that shared parameters follow all tasks and a task's own
follow its own. The loop, its options and the choice of the best epoch are `fit`'s; this is only the data and the loss.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interfuse.errors import DataError, OptionError, Problem, UserError, nearest
from interfuse.inference.batches import batches, length
from interfuse.modules.inputs import Composite, prediction, split_batch
from interfuse.training.fit import FitRecord, fit
from interfuse.training.losses import LOSSES, Loss, loss_for
from interfuse.transfer.sharing import SharedTrunk
from interfuse.transfer.tying import Tied


def fit_tasks(
    model: SharedTrunk | Tied,
    train: Mapping[str, Any],
    validation: Mapping[str, Any] | None = None,
    *,
    loss: str | Loss | Mapping[str, str | Loss] = "auto",
    weights: Mapping[str, float] | None = None,
    batch_size: int = 64,
    train_only: str | Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> FitRecord:
    """Train all tasks of a shared trunk, or of tied networks, together, in place; the record is `fit`'s.

    train, validation: task -> data as `fit` takes it. An epoch is as long as the longest task's data, and shorter ones begin
        anew. The best epoch has the least mean of the tasks' weighted validation losses, a batch of each counting alike.
    loss: as for `fit`, for all tasks or by task. weights: what each task's loss is multiplied by, 1 where none is given.
    train_only: globs of the model's parameters: "experts.*" keeps a shared trunk as it is and trains each task's own layers.
    options: `fit`'s (`epochs`, `learning_rate`, `patience`, Lightning's own, ...), besides `metric` and `layer_decay`.

    Targets may be probabilities (n, classes) with loss="cross_entropy": those that the experts give distil them, unlabelled.

    Raises `OptionError` and what `fit` raises.
    """
    globs = [train_only] if isinstance(train_only, str) else train_only
    _check(model, options, train=train, validation=validation, loss=loss, weights=weights, train_only=globs or ())
    losses = dict(loss) if isinstance(loss, Mapping) else dict.fromkeys(model.names, loss)
    joint = _Joint(model, losses, dict.fromkeys(model.names, 1.0) | dict(weights or {}))
    data = _Joined(
        {task: batches(source, batch_size, shuffle=True, seed=seed, name=task) for task, source in train.items()}, True
    )
    held = None
    if validation is not None:
        held = _Joined({task: batches(source, batch_size, name=task) for task, source in validation.items()}, False)
    chosen = None if globs is None else [f"model.{glob}" for glob in globs]
    return fit(joint, data, held, loss=_mean, train_only=chosen, seed=seed, **options)


def _mean(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.mean()


class _Joint(Composite):
    """{task: batch} -> the weighted losses of the tasks that there are, (tasks,)."""

    def __init__(self, model: SharedTrunk | Tied, losses: Mapping[str, str | Loss], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model, self.names = model, model.names
        self.losses, self.weights = losses, weights
        self.found: dict[str, Loss] = {}

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return torch.stack([self.weights[task] * self._loss(task, batch) for task, batch in inputs.items()])

    def _loss(self, task: str, batch: Any) -> Tensor:
        inputs, targets = split_batch(batch)
        outputs = prediction(self.model(inputs, task), task)
        if task not in self.found:
            try:
                self.found[task] = loss_for(self.losses[task], outputs, targets)
            except UserError as error:
                raise type(error)(*(p._replace(path=f"{task}: {p.path}") for p in error.problems)) from None
        return self.found[task](outputs, targets)


class _Joined:
    """Batches {task: batch} of several tasks' data side by side; with `again`, those that end early begin anew.

    A class, because `fit` goes through it again and again. Orders follow torch's random numbers.
    """

    def __init__(self, loaders: Mapping[str, Iterable[Any]], again: bool) -> None:
        self.loaders, self.again = loaders, again

    def __len__(self) -> int:
        known = [length(loader) for loader in self.loaders.values()]
        if None in known:
            raise TypeError("the length isn't known")
        return max(n for n in known if n is not None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for loader in self.loaders.values():
            order: Any = getattr(loader, "sampler", None)
            if hasattr(order, "set_epoch"):
                order.set_epoch(int(torch.randint(2**31, ())))
        streams = {task: iter(loader) for task, loader in self.loaders.items()}
        ended: set[str] = set()
        while True:
            batch: dict[str, Any] = {}
            for task, loader in self.loaders.items():
                found = next(streams[task], None)
                if found is None:
                    ended.add(task)
                    if len(ended) == len(self.loaders):
                        return
                    if self.again:
                        streams[task] = iter(loader)
                        found = next(streams[task], None)
                if found is not None:
                    batch[task] = found
            if not batch:
                raise DataError(Problem("data", "no batches", "give at least one a task"))
            yield batch


def _check(model: Any, options: Mapping[str, Any], **given: Any) -> None:
    if not isinstance(model, SharedTrunk | Tied):
        raise OptionError(Problem("model", f"got {type(model).__name__}", "what share_trunk or tie gives"))
    reasons = {"metric": "of several tasks the loss chooses the epoch", "layer_decay": "not for several networks at once"}
    problems = [Problem(name, f"got {options[name]!r}", why) for name, why in reasons.items() if options.get(name) is not None]
    for path in ("train", "validation"):
        value = given[path]
        if value is not None and (not isinstance(value, Mapping) or set(value) != set(model.names)):
            got = list(value) if isinstance(value, Mapping) else type(value).__name__
            problems.append(Problem(path, f"got {got}", f"task -> data, for {list(model.names)}"))
    problems += _weighing(model, given["loss"], given["weights"])
    parameters = [name for name, _ in model.named_parameters()]
    problems += [
        Problem("train_only", f"{glob!r} matches no parameter", nearest(glob, parameters))
        for glob in given["train_only"]
        if not fnmatch.filter(parameters, glob)
    ]
    if problems:
        raise OptionError(*problems)


def _weighing(model: SharedTrunk | Tied, loss: Any, weights: Any) -> list[Problem]:
    """What is wrong with the losses, and with what they are multiplied by."""
    problems = [
        Problem(f"{path}[{task!r}]", "no such task", nearest(str(task), model.names))
        for path, value in (("loss", loss), ("weights", weights))
        for task in (value if isinstance(value, Mapping) else ())
        if task not in model.names
    ]
    problems += [
        Problem(f"weights[{task!r}]", f"got {weight!r}", "a number from 0 up")
        for task, weight in (weights or {}).items()
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf)
    ]
    losses = {f"loss[{task!r}]": one for task, one in loss.items()} if isinstance(loss, Mapping) else {"loss": loss}
    problems += [
        Problem(path, f"got {one!r}", nearest(str(one), LOSSES))
        for path, one in losses.items()
        if not callable(one) and one not in LOSSES
    ]
    if isinstance(loss, Mapping):
        problems += [Problem(f"loss[{task!r}]", "missing", "a loss a task") for task in model.names if task not in loss]
    return problems

"""Greedy soup: models are added to an average, the best first, as long as a metric on validation data doesn't drop.

What is chosen is a plain average; the search looks at the data, so its value is no measure of the result: that takes other
data. Source: Model soups, https://arxiv.org/abs/2203.05482, recipe 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from interfuse.engine.merge import merge
from interfuse.errors import DataError, Problem
from interfuse.evaluation.metrics import AnyMetric, find_metric, score
from interfuse.inference.predict import predict


@dataclass(frozen=True)
class Step:
    """A model that was tried: its own value, that of the average with it, and whether it was kept."""

    model: str
    alone: float
    value: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """What was chosen: each model's weight, 1 of those that are averaged and 0 of the others; the metric, and every step.

    `value` is the chosen average's, on the data that it was chosen by.
    """

    weights: dict[str, float]
    metric: str
    value: float
    steps: tuple[Step, ...]


def greedy_soup(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    data: Any,
    metric: AnyMetric = "accuracy",
    *,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = True,
) -> Soup:
    """Which of these networks of one architecture to average: `interfuse.merge("linear", models, weights=soup.weights)`.

    models: networks, with names or without (`0`, `1`, ..); they are unchanged. data: validation data as `predict` takes it,
    with targets; not what the result is reported on. metric: a name, or a function as in `compare`; where two values are
    equal the model is added, as in the paper. The same models and data give the same soup.
    """
    named = dict(models) if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models)}

    def value(names: Sequence[str]) -> float:
        chosen = [named[name] for name in names]
        model = chosen[0] if len(chosen) == 1 else merge("linear", chosen)
        return measured(model, data, metric, batch_size=batch_size, device=device, progress=progress)

    return choose(list(named), value, metric)


def choose(names: Sequence[str], value: Callable[[Sequence[str]], float], metric: AnyMetric) -> Soup:
    """The soup of models by name; `value` gives the metric of the average of some, in the order of `names`."""
    known = find_metric(metric)
    alone = {name: value([name]) for name in names}
    worst = -math.inf if known.higher else math.inf
    rank = {name: worst if math.isnan(found) else found for name, found in alone.items()}
    order = sorted(names, key=rank.__getitem__, reverse=known.higher)  # of equal ones the first: sorting is stable
    kept, best = [order[0]], rank[order[0]]
    steps = [Step(order[0], alone[order[0]], alone[order[0]], True)]
    for name in order[1:]:
        found = value([one for one in names if one in kept or one == name])
        good = not math.isnan(found) and not known.better(best, found)
        steps.append(Step(name, alone[name], found, good))
        if good:
            kept.append(name)
            best = found
    return Soup({name: float(name in kept) for name in names}, known.name, best, tuple(steps))


def measured(
    model: nn.Module, data: Any, metric: AnyMetric, *, batch_size: int = 64, device: str | None = None, progress: bool = True
) -> float:
    """The metric of a network on data with targets."""
    was_training = model.training
    found = predict(model.eval(), data, batch_size=batch_size, device=device, progress=progress)
    model.train(was_training)
    if found.targets is None:
        raise DataError(Problem("data", "has no targets", "a soup is chosen by a metric: give data with targets"))
    return score(metric, found.outputs, found.targets)

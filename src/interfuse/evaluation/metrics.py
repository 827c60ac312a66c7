"""How good predictions are: one number, its bootstrap interval, and the paired difference between two models.

A metric is prepared once (what each example adds) and then read at any weighting of the examples. All weights one give
the score; a resample with replacement is a row of counts; so a thousand resamples are a few matrix products, and score
and interval can't disagree on a definition. Other measures (torchmetrics', your own) are passed as `(name, function,
higher_is_better)` and are recomputed for every resample. This isn't a training loss and nothing here runs a model.

Intervals are percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13). ECE is that of Guo et al. 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from interfuse.errors import DataError, OptionError, Problem, nearest

#: The value of a metric at each row of weights: `[rows, n] -> [rows]`, float64.
Weighted: TypeAlias = Callable[[Tensor], Tensor]

_BLOCK = 2**22  # entries of a weights matrix that are held at once: 32 MiB


@dataclass(frozen=True)
class Metric:
    """A measure of quality: its name, whether higher is better, what it applies to, and how it is prepared.

    `prepare(outputs, targets)` gives the function from weights `[rows, n]` to values `[rows]`.
    """

    name: str
    higher: bool
    kind: Literal["classification", "regression", "own"]
    prepare: Callable[[Tensor, Tensor], Weighted]

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`."""
        return a > b if self.higher else a < b


#: What `metric=` accepts: a name, a `Metric`, or `(name, function(outputs, targets) -> number, higher_is_better)`.
AnyMetric: TypeAlias = "str | Metric | tuple[str, Callable[[Tensor, Tensor], float | Tensor], bool]"


def metric_names() -> list[str]:
    """The names that `metric=` accepts."""
    return [*_METRICS, *_ALIASES]


def find_metric(metric: AnyMetric) -> Metric:
    """The metric of that name, or one around an own function; an `OptionError` with the nearest names otherwise."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        found = _METRICS.get(_ALIASES.get(metric, metric))
        if found is None:
            raise OptionError(Problem("metric", f"no metric is named {metric!r}", nearest(metric, metric_names())))
        return found
    if isinstance(metric, tuple) and len(metric) == 3 and isinstance(metric[2], bool) and callable(metric[1]):
        name, function, higher = metric
        return Metric(name, higher, "own", lambda outputs, targets: _recomputed(function, outputs, targets))
    raise OptionError(Problem("metric", f"got {metric!r}", "a name, or (name, function(outputs, targets), higher_is_better)"))


def score(metric: AnyMetric, outputs: Tensor, targets: Tensor) -> float:
    """The metric of `outputs` against `targets`.

    Classification: outputs are logits `[n, classes]`, or `[n]` or `[n, 1]` (the logit of class 1); rows that all are
    probabilities (of two classes or more) are taken as such. Targets are class numbers `[n]`. Regression: outputs and
    targets are `[n]` or `[n, values]`. Raises `DataError` where the metric doesn't fit them or isn't defined.
    """
    metric = find_metric(metric)
    outputs, targets = _fitting(metric, outputs, targets)
    return _value(metric, metric.prepare(outputs, targets), len(targets))


def resampled(
    metric: AnyMetric, outputs: Tensor, targets: Tensor, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, Tensor]:
    """The score, and its values `[resamples]` on resamples of the examples with replacement.

    The same seed and number of examples give the same resamples, so that the values of two models are paired.
    """
    metric = find_metric(metric)
    outputs, targets = _fitting(metric, outputs, targets)
    at = metric.prepare(outputs, targets)
    values = torch.cat([at(counts) for counts in _counts(len(targets), resamples, seed)])
    return _value(metric, at, len(targets)), values


def bootstrap(
    metric: AnyMetric,
    outputs: Tensor,
    targets: Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the score, as (low, high); `confidence` is in (0, 1)."""
    return interval(resampled(metric, outputs, targets, resamples=resamples, seed=seed)[1], confidence)


def paired_difference(
    metric: AnyMetric,
    outputs_a: Tensor,
    outputs_b: Tensor,
    targets: Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Score of a minus score of b on the same examples, as (difference, low, high): each resample is scored by both."""
    a, values_a = resampled(metric, outputs_a, targets, resamples=resamples, seed=seed)
    b, values_b = resampled(metric, outputs_b, targets, resamples=resamples, seed=seed)
    return a - b, *interval(values_a - values_b, confidence)


def interval(values: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """The quantiles of resampled values that leave (1 - confidence) / 2 on either side.

    Resamples on which the metric isn't defined (no example of a class) are left out.
    """
    if not 0 < confidence < 1:
        raise OptionError(Problem("confidence", f"got {confidence}", "a share in (0, 1), such as 0.95"))
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values.double().cpu().numpy(), [tail, 1 - tail])
    return float(low), float(high)


def _value(metric: Metric, at: Weighted, n: int) -> float:
    value = float(at(torch.ones(1, n, dtype=torch.float64))[0])
    if np.isnan(value):
        raise DataError(Problem("metric", f"{metric.name} isn't defined on these {n} targets", "choose another metric"))
    return value


def _counts(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each resample draws each example, `[rows, n]` at a time; each row sums to n."""
    if resamples < 1:
        raise OptionError(Problem("resamples", f"got {resamples}", "at least 1"))
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        yield torch.from_numpy(np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float64))


def _recomputed(function: Callable[[Tensor, Tensor], float | Tensor], outputs: Tensor, targets: Tensor) -> Weighted:
    def at(weights: Tensor) -> Tensor:
        values = []
        for row in weights:
            drawn = torch.repeat_interleave(torch.arange(len(row)), row.long())
            values.append(float(function(outputs[drawn], targets[drawn])))
        return torch.tensor(values, dtype=torch.float64)

    return at


# What fits: shapes and types, checked before anything is computed.


def _fitting(metric: Metric, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets on the CPU in the form that the metric reads, or a `DataError`."""
    outputs, targets = outputs.detach().cpu(), targets.detach().cpu()
    if outputs.ndim == 0 or targets.ndim == 0 or len(outputs) != len(targets) or len(targets) == 0:
        wrong = f"{tuple(outputs.shape)} outputs for {tuple(targets.shape)} targets"
        raise DataError(Problem("targets", wrong, "one target an example, and at least one example"))
    if bad := int(outputs.reshape(len(outputs), -1).isnan().any(1).sum()):
        raise DataError(Problem("outputs", f"{bad} of {len(outputs)} are NaN", "the model has diverged or overflows"))
    if metric.kind == "classification":
        return _classes(metric.name, outputs, targets)
    if metric.kind == "regression":
        return _numbers(metric.name, outputs, targets)
    return outputs, targets


def _classes(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[n, classes]` and class numbers `[n]`."""
    if outputs.ndim > 2 or not outputs.is_floating_point():
        got = f"{outputs.dtype} outputs {tuple(outputs.shape)}"
        raise DataError(Problem("outputs", f"{name} got {got}", "logits (n, classes), or (n) for two classes"))
    logits = outputs.double().reshape(len(outputs), -1)
    classes = max(2, logits.shape[1])
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(Problem("targets", f"{name} got targets {tuple(targets.shape)}", "class numbers (n)"))
    numbers = targets.long()
    if targets.is_floating_point() and not (logits.shape[1] == 1 and bool((targets == numbers).all())):
        allowed = "class numbers as integers; for numbers use mse, mae or r2"
        raise DataError(Problem("targets", f"{name} got {targets.dtype} targets", allowed))
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= classes:
        wrong = f"class {low if low < 0 else high}, but the outputs are of {classes} classes"
        raise DataError(Problem("targets", wrong, f"0 to {classes - 1}"))
    return _log_probabilities(logits), numbers


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return torch.nn.functional.logsigmoid(torch.cat([-logits, logits], 1))
    return logits.log() if are_probabilities(logits) else logits.log_softmax(1)


def are_probabilities(outputs: Tensor) -> bool:
    """Whether every row of (n, 2 or more classes) is in [0, 1] and sums to one. Logits don't by chance: it's a softmax."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    return bool(((outputs >= 0) & (outputs <= 1)).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all())


def _numbers(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets as `[n, values]`."""
    flat, wanted = (values.double().reshape(len(values), -1) for values in (outputs, targets))
    if flat.shape != wanted.shape:
        wrong = f"{name} got outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}"
        raise DataError(Problem("outputs", wrong, "the same shape; for classes use accuracy"))
    return flat, wanted


# The metrics. Each is prepared from what `_classes` or `_numbers` gives.


def _mean(each: Tensor) -> Weighted:
    return lambda weights: weights @ each / weights.sum(1)


def _sums(weights: Tensor, group: Tensor, groups: int) -> Tensor:
    """Weights summed by group: `[rows, n] -> [rows, groups]`."""
    return weights.new_zeros(len(weights), groups).index_add_(1, group, weights)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Mean over columns of the ratio, leaving out the columns whose denominator is zero."""
    return torch.where(denominator > 0, numerator / denominator, torch.nan).nanmean(1)


def _accuracy(outputs: Tensor, targets: Tensor) -> Weighted:
    return _mean((outputs.argmax(1) == targets).double())


def _balanced_accuracy(outputs: Tensor, targets: Tensor) -> Weighted:
    """Recall, averaged over the classes that occur among the targets."""
    hit, classes = (outputs.argmax(1) == targets).double(), outputs.shape[1]
    return lambda weights: _over(_sums(weights * hit, targets, classes), _sums(weights, targets, classes))


def _f1(outputs: Tensor, targets: Tensor) -> Weighted:
    """2 TP / (2 TP + FP + FN), averaged over the classes that occur among targets or predictions (macro)."""
    chosen, classes = outputs.argmax(1), outputs.shape[1]
    hit = (chosen == targets).double()
    return lambda weights: _over(
        2 * _sums(weights * hit, targets, classes),
        _sums(weights, targets, classes) + _sums(weights, chosen, classes),
    )


def _auroc(outputs: Tensor, targets: Tensor) -> Weighted:
    """The share of pairs (of the class, not of the class) that are in order, ties half; averaged one against the rest."""
    classes = [1] if outputs.shape[1] == 2 else list(range(outputs.shape[1]))
    # Of two classes the log-odds: they order as probabilities do, and don't round to ties near 0 and 1.
    scores = outputs[:, 1:] - outputs[:, :1] if outputs.shape[1] == 2 else outputs
    ranks = [torch.unique(column, return_inverse=True) for column in scores.unbind(1)]

    def at(weights: Tensor) -> Tensor:
        values = []
        for number, (levels, rank) in zip(classes, ranks, strict=True):
            positive = (targets == number).double()
            of = _sums(weights * positive, rank, len(levels))
            rest = _sums(weights * (1 - positive), rank, len(levels))
            ordered = (of * (rest.cumsum(1) - rest / 2)).sum(1)
            values.append(ordered / (of.sum(1) * rest.sum(1)))  # 0 / 0 is NaN where either is missing
        return torch.stack(values, 1).nanmean(1)

    return at


def _log_loss(outputs: Tensor, targets: Tensor) -> Weighted:
    """Mean of -log p(target); a probability below the smallest float64 counts as that one, so the mean is finite."""
    return _mean(-outputs.gather(1, targets[:, None])[:, 0].clamp_min(math.log(torch.finfo(torch.float64).tiny)))


def _ece(outputs: Tensor, targets: Tensor) -> Weighted:
    """The gap between confidence in the chosen class and accuracy, over 15 bins of equal width, by share of examples."""
    confidence, chosen = outputs.exp().max(1)
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gap = (chosen == targets).double() - confidence
    return lambda weights: _sums(weights * gap, bins, 15).abs().sum(1) / weights.sum(1)


def _mse(outputs: Tensor, targets: Tensor) -> Weighted:
    return _mean((outputs - targets).square().mean(1))


def _mae(outputs: Tensor, targets: Tensor) -> Weighted:
    return _mean((outputs - targets).abs().mean(1))


def _r2(outputs: Tensor, targets: Tensor) -> Weighted:
    """1 - residual over total sum of squares, averaged over the values of an example."""
    residual, centred = (outputs - targets).square(), targets - targets.mean(0)

    def at(weights: Tensor) -> Tensor:
        mean = weights @ centred / weights.sum(1, keepdim=True)
        total = weights @ centred.square() - weights.sum(1, keepdim=True) * mean.square()
        return 1 - _over(weights @ residual, torch.where(total > 1e-12 * (weights @ centred.square()), total, 0))

    return at


_METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, "classification", _accuracy),
        Metric("balanced_accuracy", True, "classification", _balanced_accuracy),
        Metric("f1", True, "classification", _f1),
        Metric("auroc", True, "classification", _auroc),
        Metric("log_loss", False, "classification", _log_loss),
        Metric("ece", False, "classification", _ece),
        Metric("mse", False, "regression", _mse),
        Metric("mae", False, "regression", _mae),
        Metric("r2", True, "regression", _r2),
    )
}
_ALIASES = {"nll": "log_loss"}

"""What some methods should give, in float64 with whole tensors and full sorts, and how far an output is from it.

Written from the papers, slow on purpose. Only methods without chance are here. Of equal magnitudes the first by index are
kept, and counts are rounded down, as in mergekit's recipes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from benchmarks.merge_speed.model import read_tensor

Tensors = Sequence[np.ndarray]


def linear(models: Tensors, base: np.ndarray | None, weight: Sequence[float]) -> np.ndarray:
    """sum w t / sum w."""
    return np.tensordot(np.asarray(weight) / sum(weight), np.stack(models), 1)


def task_arithmetic(models: Tensors, base: np.ndarray, weight: Sequence[float]) -> np.ndarray:
    """t0 + sum w d."""
    return base + sum(w * (t - base) for w, t in zip(weight, models, strict=True))


def slerp(models: Tensors, base: np.ndarray, t: float) -> np.ndarray:
    """On the arc from the base to the model; on the line where they are almost parallel."""
    (model,) = models
    cosine = np.vdot(base, model) / (np.linalg.norm(base) * np.linalg.norm(model))
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * model
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * model) / np.sin(angle)


def model_stock(models: Tensors, base: np.ndarray) -> np.ndarray:
    """Between the base and the mean, by the mean cosine of the deltas."""
    deltas = [t - base for t in models]
    if not all(np.any(delta) for delta in deltas):
        return base  # a delta without a direction has no cosine, and counts as orthogonal
    cosines = [np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in itertools.combinations(deltas, 2)]
    cosine, count = float(np.mean(cosines)), len(models)
    t = np.clip(count * cosine / ((count - 1) * cosine + 1), 0, 1)
    return base + t * sum(deltas) / count


def karcher(models: Tensors, base: np.ndarray | None) -> np.ndarray:
    """The Riemannian mean of the directions, by fixed-point iteration, times the mean norm."""
    norms = [np.linalg.norm(t) for t in models]
    units = [t / norm for t, norm in zip(models, norms, strict=True)]
    mean = sum(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(10):
        angles = [np.arccos(np.clip(np.vdot(mean, unit), -1, 1)) for unit in units]
        pulls = [(a / np.sin(a) if a > 1e-12 else 1) * (u - np.cos(a) * mean) for a, u in zip(angles, units, strict=True)]
        tangent = sum(pulls) / len(units)
        step = np.linalg.norm(tangent)
        if step < 1e-5:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
    return mean * np.mean(norms)


def ties(models: Tensors, base: np.ndarray, weight: Sequence[float], density: float) -> np.ndarray:
    """The largest of each delta, those that agree with the sign of the weighted sum, their weighted mean."""
    return base + _agreed([w * _band(t - base, density, 0.0) for w, t in zip(weight, models, strict=True)], weight)


def breadcrumbs(models: Tensors, base: np.ndarray, weight: Sequence[float], density: float, gamma: float) -> np.ndarray:
    """The sum of deltas without their largest and their smallest entries."""
    return base + sum(w * _band(t - base, density, gamma) for w, t in zip(weight, models, strict=True))


def sce(models: Tensors, base: np.ndarray, select_topk: float) -> np.ndarray:
    """The positions of largest variance, weights by mean square, the majority's sign, the weighted mean."""
    deltas = np.stack([t - base for t in models])
    variance = deltas.var(axis=0)
    kept = _largest(variance, int(select_topk * np.count_nonzero(variance)))
    deltas *= kept
    energy = np.array([np.mean(delta**2) for delta in deltas])
    weight = list(energy / energy.sum() if energy.any() else np.full(len(models), 1 / len(models)))
    return base + _agreed([w * d for w, d in zip(weight, deltas, strict=True)], weight)


METHODS: dict[str, Callable[..., np.ndarray]] = {
    method.__name__: method for method in (linear, task_arithmetic, slerp, model_stock, karcher, ties, breadcrumbs, sce)
}


def error(
    method: str, out: Path, models: Sequence[Path], base: Path | None, options: dict[str, object], names: Sequence[str]
) -> tuple[float, float] | None:
    """The largest and the mean distance from the reference over the tensors, in steps of bf16 at the reference's value.

    One correct rounding is 0.5 at most, and 0.25 in the mean. None for a method that has no reference.
    """
    if method not in METHODS:
        return None
    largest, total, count = 0.0, 0.0, 0
    for name in names:
        start = None if base is None else read_tensor(base, name)
        wanted = METHODS[method]([read_tensor(path, name) for path in models], start, **options)
        steps = np.abs(read_tensor(out, name) - wanted) / _step(wanted)
        steps = steps[~np.isnan(steps)]  # where the vote is undecided, either sign is right
        largest, total, count = max(largest, float(steps.max())), total + float(steps.sum()), count + steps.size
    return largest, total / count


def _step(values: np.ndarray) -> np.ndarray:
    """The distance between neighbours in bf16; below 1e-4 of the tensor's largest value, that at this place."""
    size = np.maximum(np.abs(values), 1e-4 * np.nanmax(np.abs(values)))
    return np.exp2(np.floor(np.log2(np.maximum(size, np.finfo(np.float32).tiny))) - 7)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """True for the `count` largest, of equal ones the first."""
    order = np.argsort(-values, axis=None, kind="stable")
    kept = np.zeros(values.size, bool)
    kept[order[:count]] = True
    return kept.reshape(values.shape)


def _band(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """The `density` share of largest magnitude after the `gamma` share of the very largest; fewer of those where needed."""
    kept = max(1, int(density * delta.size))
    skipped = min(int(gamma * delta.size), delta.size - kept)
    size = np.abs(delta)
    return delta * (_largest(size, skipped + kept) & ~_largest(size, skipped))


def _agreed(deltas: Tensors, weight: Sequence[float]) -> np.ndarray:
    """The weighted mean over the models whose (weighted) delta has the sign of the sum; NaN where that is 0."""
    vote, size = sum(deltas), sum(np.abs(delta) for delta in deltas)
    sign = np.where(vote >= 0, 1, -1)
    agree = [np.sign(delta) == sign for delta in deltas]
    total = sum(delta * mask for delta, mask in zip(deltas, agree, strict=True))
    share = sum(w * mask for w, mask in zip(weight, agree, strict=True))
    return np.where((np.abs(vote) < 1e-9 * size), np.nan, total / np.where(share == 0, 1, share))

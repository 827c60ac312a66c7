"""Means along great circles. Every one is a combination of its models, whose coefficients follow from inner products alone.

So nothing here sees a tensor: the engine sums up a Gram matrix, these functions turn it into coefficients, and iterations
run on coefficients too. `gram` is [..., n, n] in float64; leading axes, where a matrix belongs to each part of a tensor
(`AXIS`), are the leading axes of the coefficients. Where the direction isn't defined (a norm of 0, opposite vectors) the
mean is the straight one. Sources: Shoemake 1985, Karcher 1977, Model Stock, and mergekit for what has no paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Coefficient, Combination, normalized
from interfuse.registry import register

_MERGEKIT = "https://github.com/arcee-ai/mergekit"

#: Above this |cos| the classical SLERP is straight.
_NEARLY_PARALLEL = 0.9995
#: Below this squared sine NuSLERP is straight: arcs and chords then agree to float32's last bit.
_COLLINEAR = 1e-8
#: A mean of directions shorter than this share of its parts is what rounding leaves of opposite ones: 1e-8 of a Gram matrix in
#: float64, more of vectors in float32.
_OPPOSITE = 1e-6

#: Methods that may take a Gram matrix for each part of a tensor: options -> the axis that it sums over, None for all. Its
#: leading axes are the tensor's shape without that axis. A tensor of one axis has one matrix in any case.
AXIS: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
    "nuslerp": lambda options: None if options["nuslerp_flatten"] else 0 if options["nuslerp_row_wise"] else -1,
    "model_stock": lambda options: -1 if options["filter_wise"] else None,
}

Share = Annotated[float, Field(ge=0, le=1, description="The way from the base, at 0, to the other model, at 1.")]


@register(
    "slerp",
    "weights",
    form="coefficients",
    of="models",
    paper="https://doi.org/10.1145/325334.325242",
    needs="a base and one other model",
)
def slerp(weights: Sequence[float], gram: np.ndarray, *, t: Share) -> Combination:
    """From the base a to another model b along their arc: [sin((1-t) th) a + sin(t th) b] / sin th, cos th = <a,b>/(|a||b|).

    `gram` is [..., 2, 2], the base first. `t` 0 gives exactly the base, 1 exactly the model. Straight, (1-t) a + t b,
    where |cos th| > 0.9995 or a norm is 0. `weights` aren't used: `t` says it all. Any other number of models than one
    beside the base is an `OptionError`.
    """
    beside = gram.shape[-1] - 1
    if beside != 1:
        raise OptionError(Problem("models", f"got {beside} beside the base", "slerp takes a base and exactly one other model"))
    norms, cosines = _directions(gram)
    cosine = cosines[..., 0, 1]
    pair = _arc(cosine, t, (abs(cosine) > _NEARLY_PARALLEL) | (norms == 0).any(-1))
    base, model = (_plain(part) for part in pair)
    return Combination(base, (model,), _plain(_total(np.stack(pair, -1))))


@register("nuslerp", "weights", form="coefficients", of="deltas", paper=_MERGEKIT)
def nuslerp(
    weights: Sequence[float],
    gram: np.ndarray,
    *,
    nuslerp_flatten: Annotated[bool, Field(description="Whether a tensor is one vector.")] = True,
    nuslerp_row_wise: Annotated[
        bool, Field(description="Where it isn't one: whether the vectors run along the first axis, not the last.")
    ] = False,
) -> Combination:
    """SLERP of two models, or of their deltas where there is a base, at t = w_2 / (w_1 + w_2).

    `gram` is [..., 2, 2]; see `AXIS` for its leading axes. The option names are mergekit's, and so is what they do:
    `nuslerp_row_wise` true takes the columns of an [out, in] matrix as vectors, false its rows. Any other number of models
    than two is an `OptionError`, and so are weights that sum to 0 (mergekit takes t = 0.5). Straight where a norm is 0.
    """
    if gram.shape[-1] != 2:
        raise OptionError(Problem("models", f"got {gram.shape[-1]}", "nuslerp takes exactly two models"))
    norms, cosines = _directions(gram)
    cosine = cosines[..., 0, 1]
    pair = _arc(cosine, normalized(weights)[1], (1 - cosine**2 <= _COLLINEAR) | (norms == 0).any(-1))
    return _of_deltas(np.stack(pair, -1))


@register(
    "multislerp",
    "weights",
    form="coefficients",
    of="deltas",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
)
def multislerp(
    weights: Sequence[float],
    gram: np.ndarray,
    *,
    normalize_weights: Annotated[bool, Field(description="Whether the models' weights are divided by their sum.")] = True,
    eps: Annotated[float, Field(gt=0, lt=1, description="Added to norms; a shorter mean has no direction.")] = 1e-8,
) -> Combination:
    """Weighted mean direction of the models, or of their deltas where there is a base, times the weighted mean norm.

    sum w_i u_i / |sum w_i u_i| * sum w_i |x_i|, with u_i = x_i / (|x_i| + eps). The published form then moves along the
    mean of the tangents at that point; by the choice of the point that mean is 0, so the step is left out. Where the mean
    direction is shorter than `eps`, or the directions' own mean than 1e-6 of sum |w_i|, as for opposite models or deltas that
    are all 0, the sum is straight: sum w_i x_i (mergekit refuses more than two models there).
    """
    w = np.array(normalized(weights) if normalize_weights else weights, np.float64)
    norms, cosines = _directions(gram)
    mean = w * norms / (norms + eps)  # as coefficients of x_i / |x_i|
    length = _length(mean, cosines)[..., None]
    size = (w * norms).sum(-1, keepdims=True)
    straight = (length < eps) | (_length(np.broadcast_to(w, norms.shape), cosines)[..., None] < _OPPOSITE * abs(w).sum())
    bent = size * mean / np.where(straight, 1.0, length * np.where(norms > 0, norms, 1.0))
    return _of_deltas(np.where(straight, w, bent))


@register("karcher", "weights", form="coefficients", of="models", paper="https://doi.org/10.1002/cpa.3160300502")
def karcher(
    weights: Sequence[float],
    gram: np.ndarray,
    *,
    max_iter: Annotated[int, Field(ge=0, description="The most steps.")] = 10,
    tol: Annotated[float, Field(gt=0, lt=1, description="Steps and angles below this, in radians, count as 0.")] = 1e-5,
) -> Combination:
    """The point with the least weighted sum of squared angles to the models' directions, times the weighted mean norm.

    Begins at the weighted mean of the directions u_i and moves by the mean of the logarithms, sum w_i th_i / sin th_i
    (u_i - cos th_i m), with w_i over their sum. A model of norm 0 has no direction, and counts for the norm alone. Where
    the directions' mean vanishes it begins at the first one. A base takes no part. `gram` is [..., M, M].
    """
    w = np.array(normalized(weights), np.float64)
    norms, cosines = _directions(gram)
    pull = w * (norms > 0)
    whole = pull.sum(-1, keepdims=True)
    pull = pull / np.where(whole == 0, 1.0, whole)
    mean = _unit(pull, cosines, tol, otherwise=np.eye(len(w))[(norms > 0).argmax(-1)])
    for _ in range(max_iter):
        cosine = (cosines @ mean[..., None])[..., 0].clip(-1, 1)
        angle, sine = np.arccos(cosine), np.sqrt(1 - cosine**2)
        # The logarithm isn't defined at the opposite point, and is 0 at the point itself.
        log = np.where((angle < tol) | (sine < tol), 0.0, pull * angle / np.where(sine < tol, 1.0, sine))
        step = log - (log * cosine).sum(-1, keepdims=True) * mean
        length = _length(step, cosines)[..., None]
        if (length < tol).all():
            break
        moved = np.cos(length) * mean + np.sin(length) * step / np.where(length < tol, 1.0, length)
        mean = np.where(length < tol, mean, _unit(moved, cosines, tol, otherwise=mean))
    return _of_models((w * norms).sum(-1, keepdims=True) * mean / np.where(norms > 0, norms, 1.0))


@register(
    "model_stock",
    "weights",
    form="coefficients",
    of="deltas",
    paper="https://arxiv.org/abs/2403.19522",
    needs="a base and two or more models",
)
def model_stock(
    weights: Sequence[float],
    gram: np.ndarray,
    *,
    filter_wise: Annotated[bool, Field(description="Whether each row (along the last axis) has a cosine of its own.")] = False,
) -> Combination:
    """From the base towards the models' average, by how well their deltas agree: t mean(t_i) + (1 - t) t0.

    t = M cos / ((M - 1) cos + 1), with cos the mean cosine over pairs of deltas, 0 for a pair with a delta of norm 0.
    We keep t in [0, 1]: a negative cos gives the base, not a step away from the models. The mean is by `weights` over
    their sum, equal ones being the paper's. `gram` is [..., M, M]. One model is an `OptionError`.
    """
    count = gram.shape[-1]
    if count < 2:
        raise OptionError(Problem("models", f"got {count} beside the base", "model_stock takes two or more"))
    norms, cosines = _directions(gram)
    cosine = (cosines.sum((-2, -1)) - (norms > 0).sum(-1)) / (count * (count - 1))
    agreeing = cosine.clip(0, 1)
    t = count * agreeing / ((count - 1) * agreeing + 1)
    return _of_deltas(t[..., None] * np.array(normalized(weights)))


def _directions(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms [..., n] and cosines [..., n, n]: 1 on the diagonal, save 0 in the row and column of a vector of norm 0."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1).clip(min=0))
    safe = np.where(norms > 0, norms, 1.0)
    cosines = (gram / safe[..., :, None] / safe[..., None, :]).clip(-1, 1)
    there = (norms > 0).astype(np.float64)
    cosines *= there[..., :, None] * there[..., None, :]
    at = np.arange(gram.shape[-1])
    cosines[..., at, at] = there
    return norms, cosines


def _arc(cosine: np.ndarray, t: float, straight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two coefficients of SLERP at t, or of the straight line where `straight`."""
    angle = np.arccos(np.where(straight, 0.0, cosine))
    sine = np.sin(angle)
    first, second = np.sin((1 - t) * angle) / sine, np.sin(t * angle) / sine
    return np.where(straight, 1 - t, first), np.where(straight, t, second)


def _length(coefficients: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """The norms [...] of combinations [..., n] of unit vectors with these cosines."""
    squared = (coefficients[..., None, :] @ cosines @ coefficients[..., :, None])[..., 0, 0]
    return np.sqrt(squared.clip(min=0))


def _unit(coefficients: np.ndarray, cosines: np.ndarray, least: float, otherwise: np.ndarray) -> np.ndarray:
    """The combinations scaled to norm 1, or `otherwise` where their norm is below `least`."""
    length = _length(coefficients, cosines)[..., None]
    return np.where(length < least, otherwise, coefficients / np.where(length < least, 1.0, length))


def _of_models(coefficients: np.ndarray) -> Combination:
    """sum c_i t_i, for coefficients [..., n]."""
    return Combination(0.0, _parts(coefficients), _plain(_total(coefficients)))


def _of_deltas(coefficients: np.ndarray) -> Combination:
    """t0 + sum c_i (t_i - t0), for coefficients [..., n]."""
    return Combination(_plain(1.0 - _total(coefficients)), _parts(coefficients), 1.0)


def _parts(coefficients: np.ndarray) -> tuple[Coefficient, ...]:
    return tuple(_plain(part) for part in np.moveaxis(coefficients, -1, 0))


def _total(coefficients: np.ndarray) -> np.ndarray:
    """Their sum over the last axis, 1 where it is that but for rounding: equal models then give themselves exactly."""
    total = coefficients.sum(-1)
    return np.where(abs(total - 1) < 1e-14, 1.0, total)


def _plain(value: np.ndarray) -> Coefficient:
    return float(value) if np.ndim(value) == 0 else value

"""Merging by singular vectors: each weight matrix's deltas as a whole, after their spectrum.

Of form `matrices`: `deltas` is [M, out, in], in float32 as a rule, and so is the result, [out, in]; a convolution's weight
comes as [out, in * height * width]. A tensor of one axis isn't a matrix: it takes `lambda` times the weighted mean of the
deltas, which is `task_arithmetic(weights, lambda_=..., normalize=True)`.

Each runs on NumPy arrays and torch tensors, in float64 within. Beside the deltas it needs memory for 4 (`iso_c`,
`subspace_boost`) to 7 float64 copies of one matrix, however many models, and LAPACK's workspace of 2 more if it's square. A
model's weight multiplies its delta before anything else unless said otherwise. Directions whose singular value is zero have
no vectors of their own, and get nothing here (the papers' codes fill in arbitrary ones).
On language models these methods often hurt: https://arxiv.org/abs/2511.21437.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

from interfuse.methods.decompose import ZERO, Array, Directions, directions, like, namespace, orthogonal, wide, with_spectrum
from interfuse.methods.forms import Normalize, Scale, normalized
from interfuse.registry import register

_ISO = "https://arxiv.org/abs/2502.04959"


@register("tsv_m", "weights", form="matrices", paper="https://arxiv.org/abs/2412.00081", needs="a base")
def tsv_m(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    rank_share: Annotated[
        float | None, Field(ge=0, le=1, description="The share of each delta's singular vectors that is kept; none: 1/M.")
    ] = None,
) -> Array:
    """Task singular vectors: lambda U S V', from the leading vectors of every delta, made orthogonal to each other.

    D_i = U_i S_i V_i' keeps floor(min(out, in) * rank_share) directions, at least one; U is the nearest orthonormal
    matrix to [U_1 .. U_M], V' to [V_1; ..; V_M]'. Equal models give their own leading part.
    """
    rank = _rank(deltas, 1 / len(deltas) if rank_share is None else rank_share)
    left, values, right = _joined(directions(weight * wide(delta), rank) for delta, weight in zip(deltas, weights, strict=True))
    if not len(values):
        return namespace(deltas).zeros_like(deltas[0])
    left = orthogonal(left)
    left *= lambda_ * values
    return like(left @ orthogonal(right), deltas)


@register("iso_c", "weights", form="matrices", paper=_ISO, needs="a base")
def iso_c(deltas: Array, weights: Sequence[float], *, lambda_: Scale = 1.0) -> Array:
    """Isotropic merging: the sum of the deltas, sum w_i D_i = U S V', with every singular value the mean of S.

    The mean is over min(out, in).
    """
    flat = with_spectrum(_sum(deltas, weights), lambda s: s * 0 + s.mean())
    return like(lambda_ * flat, deltas)


@register("iso_cts", "weights", form="matrices", paper=_ISO, needs="a base")
def iso_cts(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    common_share: Annotated[
        float, Field(ge=0, le=1, description="The share of directions that comes from the sum; the models share the rest.")
    ] = 0.8,
) -> Array:
    """Isotropic merging in common and task-specific directions: lambda mean(S) U V'.

    Of r = min(out, in) directions, round(r (1 - common_share) / M) come from each D_i less its part in the span of the
    common left vectors, and the others from sum w_i D_i. U and V' are the nearest orthonormal matrices to all of them, and
    mean(S) is over r. With `common_share` 1 it's `iso_c`.
    """
    side, count = min(deltas.shape[1:]), len(deltas)
    # The nearest whole number, for equal shares of what is over; never more than there are.
    own = min(int((side - _floor(side * common_share)) / count + 0.5), side // count)
    common = directions(_sum(deltas, weights), side - own * count)
    parts = [common]
    if own:
        for delta, weight in zip(deltas, weights, strict=True):
            delta = weight * wide(delta)
            rest = delta - common.left @ (common.left.T @ delta)
            parts.append(directions(rest, own, ZERO * float((delta**2).sum()) ** 0.5))
    left, values, right = _joined(parts)
    del common, parts
    if not len(values):
        return namespace(deltas).zeros_like(deltas[0])
    left = orthogonal(left)
    left *= lambda_ * values.sum() / side
    return like(left @ orthogonal(right), deltas)


@register("subspace_boost", "weights", form="matrices", paper="https://arxiv.org/abs/2506.16506", needs="a base")
def subspace_boost(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    leading_share: Annotated[
        float, Field(ge=0, le=1, description="The share of the sum of singular values that the untouched, leading ones have.")
    ] = 0.01,
    normalize: Normalize = False,
) -> Array:
    """Subspace boosting of the sum of deltas: singular values after the k-th are raised to the k-th.

    k is the first at which s_1 + .. + s_k reaches `leading_share` (the paper's beta) of all: 0 gives a flat spectrum at
    s_1, 1 the plain sum.
    """
    summed = _sum(deltas, normalized(weights) if normalize else weights)
    return like(lambda_ * with_spectrum(summed, lambda s: _raised(s, _reaching(s, leading_share))), deltas)


@register("cart", "weights", form="matrices", paper="https://arxiv.org/abs/2412.12153")
def cart(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    rank_share: Annotated[
        float, Field(ge=0, le=1, description="The share of each centred delta's singular vectors that is kept.")
    ] = 0.08,
    centred_scale: Annotated[
        float,
        Field(allow_inf_nan=False, description="What the sum of the centred deltas is multiplied by (the paper's lambda)."),
    ] = 1.0,
) -> Array:
    """Centred arithmetic: lambda (m + centred_scale sum w_i SVD_k(D_i - m)), with m the weighted mean of the D_i.

    SVD_k keeps the k = floor(min(out, in) * rank_share) leading directions, at least one, none at 0. Equal models give
    themselves. Weights that sum to zero have no mean: an `OptionError`.
    """
    mean = _sum(deltas, normalized(weights))
    rank = _rank(deltas, rank_share)
    merged = mean
    for delta, weight in zip(deltas, weights, strict=True):
        if rank and weight:
            merged = merged + centred_scale * weight * with_spectrum(wide(delta) - mean, lambda s: _first(s, rank))
    return like(lambda_ * merged, deltas)


@register("star", "weights", form="matrices", paper="https://arxiv.org/abs/2502.10339", needs="a base")
def star(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    kept_share: Annotated[
        float, Field(ge=0, le=1, description="The share of each delta's nuclear norm that its kept directions have at least.")
    ] = 0.4,
    normalize: Normalize = True,
) -> Array:
    """Spectral truncation and rescale: each D_i keeps its fewest leading directions, at its own nuclear norm.

    D_i keeps the first k singular values that reach `kept_share` (the paper's eta) of their sum, multiplied by
    sum(s) / (s_1 + .. + s_k); then the weighted mean, or sum where `normalize` is false.
    """
    merged = wide(deltas[0]) * 0
    for delta, weight in zip(deltas, normalized(weights) if normalize else weights, strict=True):
        merged = merged + weight * with_spectrum(delta, lambda s: _truncated(s, _reaching(s, kept_share)))
    return like(lambda_ * merged, deltas)


def _sum(deltas: Array, weights: Sequence[float]) -> Array:
    """sum w_i D_i, in float64."""
    total = weights[0] * wide(deltas[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total = total + weight * wide(delta)
    return total


def _joined(parts: Iterable[Directions]) -> Directions:
    """All directions side by side."""
    left, values, right = zip(*parts, strict=True)
    xp = namespace(values[0])
    return Directions(xp.concatenate(left, 1), xp.concatenate(values, 0), xp.concatenate(right, 0))


def _floor(number: float) -> int:
    """Rounded down, where a third of 6 is 2 whatever the rounding of a third."""
    return int(number + 1e-9)


def _rank(deltas: Array, share: float) -> int:
    """That share of the singular vectors, at least one unless it is 0."""
    return max(1, _floor(min(deltas.shape[1:]) * share)) if share else 0


def _reaching(values: Array, share: float) -> int:
    """How many of the leading values reach that share of their sum; at least one."""
    sums = namespace(values).cumsum(values, 0)
    return min(len(values), 1 + int((sums < share * sums[-1] * (1 - 1e-12)).sum()))


def _first(values: Array, count: int) -> Array:
    """The first ones, and zeros."""
    kept = values * 1
    kept[count:] = 0
    return kept


def _raised(values: Array, count: int) -> Array:
    """Those after the first `count` at the last of these."""
    raised = values * 1
    raised[count:] = values[count - 1]
    return raised


def _truncated(values: Array, count: int) -> Array:
    """The first ones, scaled to the sum of all."""
    kept = _first(values, count)
    return kept * (values.sum() / kept.sum()) if kept.sum() > 0 else kept

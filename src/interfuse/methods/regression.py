"""Merging by least squares: the matrix whose outputs are nearest to every model's, on inputs of a known covariance.

    W* = (sum w_i D_i C_i + m P)(sum w_i C_i + P)^-1,   P = prior * trace(sum w_i C_i) / in * I,   m the weighted mean

minimises sum w_i |(W - D_i) C_i^(1/2)|^2 plus a pull to m, so that a direction no model has an input in takes the mean,
and equal models give themselves. Methods differ in the estimate of C_i, [in, in]; `regress` is the one solver for all. Those
registered here need no data. Forms and tensors of one axis are as in `spectral`; memory, beside the deltas, is 6 float64
matrices [in, in] and 3 copies of one delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.decompose import Array, like, namespace, wide
from interfuse.methods.forms import Scale, normalized
from interfuse.registry import register

Prior = Annotated[
    float,
    Field(ge=1e-8, allow_inf_nan=False, description="How strong the pull to the mean is, relative to the mean eigenvalue."),
]
_BLOCK = 256  # rows that are solved for at a time


@register("wudi", "weights", form="matrices", paper="https://arxiv.org/abs/2503.08099", needs="a base")
def wudi(
    deltas: Array,
    weights: Sequence[float],
    *,
    lambda_: Scale = 1.0,
    solver: Annotated[
        Literal["closed", "descent"], Field(description="The minimum, or the paper's steps towards it.")
    ] = "closed",
    prior: Prior = 0.1,
    steps: Annotated[int, Field(ge=0, description="How many steps of Adam `descent` takes.")] = 300,
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False, description="The size of a step of `descent`.")] = 1e-5,
) -> Array:
    """The delta that disturbs every model least: the minimum of sum w_i |(D - D_i) D_i'|^2 / |D_i|^2.

    Rows of a delta span the inputs that it was trained on, so C_i = D_i' D_i / |D_i|^2 stands for their covariance.
    `closed` is the regression above; `descent` the paper's Adam from sum w_i D_i, without the pull, whose steps don't scale
    with the deltas. Weights below 0 are an `OptionError`.
    """
    if solver == "closed":
        return like(lambda_ * regress(deltas, map(_directed, deltas), weights, prior=prior), deltas)
    return like(lambda_ * _descend(deltas, weights, steps, learning_rate), deltas)


@register("ace", "weights", form="matrices", paper="https://arxiv.org/abs/2603.02945", needs="a base")
def ace(deltas: Array, weights: Sequence[float], *, lambda_: Scale = 1.0, prior: Prior = 0.1) -> Array:
    """Regression on the covariance of every delta's rows, and a prior that all models share.

    C_i is that covariance (rows less their mean, as the samples) over its trace: a model counts by its weight, not by how
    far it moved. The prior is the P above. The authors' program differs: it divides by the trace only where models differ
    much in size, and then adds a flat low-rank correction; both depend on the deltas' unit, and neither is done here.
    Weights below 0 are an `OptionError`.
    """
    return like(lambda_ * regress(deltas, map(_row_covariance, deltas), weights, prior=prior), deltas)


def regress(targets: Sequence[Array] | Array, grams: Iterable[Array], weights: Sequence[float], *, prior: float) -> Array:
    """W* of the module's formula, [out, in] in float64, for targets [out, in] and their C_i, [in, in], positive semidefinite.

    `grams` is gone through once, so that it may make them on the way. Where all are 0 it's the weighted mean. A negative
    weight, or weights that sum to 0, are an `OptionError`: there is no minimum, or none alone.
    """
    mean = _mean(targets, weights)
    total: Array = 0.0
    moment: Array = 0.0
    for target, gram, weight in zip(targets, grams, weights, strict=True):
        total = total + weight * gram
        # From the mean, so that equal models cancel exactly.
        moment = moment + weight * ((wide(target) - mean) @ gram)
    diagonal = total.diagonal()
    pull = prior * diagonal.sum() / len(diagonal)
    if not pull > 0:
        return mean
    at = range(len(diagonal))
    total[at, at] += pull
    return mean + solve_positive(total, moment.T).T


def solve_positive(matrix: Array, right: Array) -> Array:
    """x of `matrix @ x = right`, for a positive definite [n, n] and [n, m], by Cholesky's factors and substitution.

    NumPy has no triangular solve: blocks on the diagonal are solved for, and the rest is products.
    """
    xp = namespace(matrix)
    lower = xp.linalg.cholesky(matrix)
    solution = right * 1.0
    starts = range(0, len(matrix), _BLOCK)
    for start in starts:
        rows = slice(start, start + _BLOCK)
        rest = solution[rows] - lower[rows, :start] @ solution[:start]
        solution[rows] = xp.linalg.solve(lower[rows, rows], rest)
    for start in reversed(starts):
        rows, after = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        rest = solution[rows] - lower[after, rows].T @ solution[after]
        solution[rows] = xp.linalg.solve(lower[rows, rows].T, rest)
    return solution


def _mean(targets: Sequence[Array] | Array, weights: Sequence[float]) -> Array:
    if min(weights) < 0:
        got = ", ".join(map(str, weights))
        raise OptionError(Problem("weights", f"got {got}", "a regression's weights are at least 0"))
    shares = normalized(weights)
    # From the first, so that the mean of equal ones is exactly that.
    first = wide(targets[0])
    return first + sum(share * (wide(target) - first) for share, target in zip(shares, targets, strict=True))


def _directed(delta: Array) -> Array:
    """C = D'D / |D|^2, 0 for a delta of 0."""
    delta = wide(delta)
    square = delta.T @ delta
    trace = square.diagonal().sum()
    return square / trace if trace > 0 else square


def _row_covariance(delta: Array) -> Array:
    """The same of a delta whose rows have a mean of 0."""
    delta = wide(delta)
    return _directed(delta - delta.mean(0))


def _descend(deltas: Array, weights: Sequence[float], steps: int, learning_rate: float) -> Array:
    """Adam on sum w_i |(D - D_i) D_i'|^2 / |D_i|^2 from sum w_i D_i, with the usual constants.

    What moves is the way from the start, whose slope is found in float64: where it is 0 Adam would take rounding for a slope,
    and go full steps by it.
    """
    xp = namespace(deltas)
    _mean(deltas, weights)  # the same weights are refused
    start = sum(weight * wide(delta) for delta, weight in zip(deltas, weights, strict=True))
    total: Array = 0.0
    slope: Array = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        gram = _directed(delta)
        total = total + weight * gram
        slope = slope + weight * ((start - wide(delta)) @ gram)
    total, at_start = like(total, deltas), like(slope, deltas)
    way, first, second = at_start * 0, at_start * 0, at_start * 0
    for step in range(1, steps + 1):
        slope = 2 * (way @ total + at_start)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        way = way - learning_rate * (first / (1 - 0.9**step)) / (xp.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return start + wide(way)

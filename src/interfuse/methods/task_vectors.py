"""Arithmetic on task vectors, d_i = t_i - t0: a sum, and three ways to choose its scale. No entry is looked at alone.

Sources: Task arithmetic, https://arxiv.org/abs/2212.04089; ExPO, https://arxiv.org/abs/2404.16792; LiNeS,
https://arxiv.org/abs/2410.17146; NAN, https://arxiv.org/abs/2505.16148.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from interfuse.methods.forms import Combination, Normalize, Scale, normalized
from interfuse.registry import register

_SCALE = "What the sum of task vectors is multiplied by; 0 gives the base."

Finite = Field(allow_inf_nan=False)


@register("task_arithmetic", "weights", form="coefficients", paper="https://arxiv.org/abs/2212.04089", needs="a base")
def task_arithmetic(
    weights: Sequence[float],
    *,
    lambda_: Annotated[float, Field(alias="lambda", allow_inf_nan=False, description=_SCALE)] = 1.0,
    normalize: Normalize = False,
) -> Combination:
    """The base plus the scaled sum of task vectors: t0 + lambda sum w_i (t_i - t0), w_i over their sum if `normalize`.

    `weights` has one number a model; negative ones, or a negative `lambda`, take a task away. Weights that sum to zero
    can't be normalized: an `OptionError`.
    """
    scaled = tuple(lambda_ * weight for weight in (normalized(weights) if normalize else weights))
    return Combination(1.0 - math.fsum(scaled), scaled, 1.0)


@register("expo", "weights", form="coefficients", paper="https://arxiv.org/abs/2404.16792", needs="a base")
def expo(
    weights: Sequence[float],
    *,
    alpha: Annotated[float, Finite, Field(description="How far beyond the model, in steps from base to model.")] = 0.3,
) -> Combination:
    """Extrapolation from the base through an aligned model: t1 + alpha (t1 - t0).

    t0 is the model before alignment, such as the fine-tuned one that preference training began from. Several models are
    averaged first, by `weights` over their sum. `alpha` 0 gives the model, -1 the base. On top of another method, the
    same is that method's `lambda` at 1 + alpha.
    """
    scaled = tuple((1 + alpha) * weight for weight in normalized(weights))
    return Combination(-alpha, scaled, 1.0)


@register("lines", "weights", form="coefficients", paper="https://arxiv.org/abs/2410.17146", needs="a base")
def lines(
    weights: Sequence[float],
    depth: float,
    *,
    alpha: Annotated[float, Finite, Field(description="What the first layer's task vectors are multiplied by.")],
    beta: Annotated[float, Finite, Field(description="What is added to that by the last layer, evenly with depth.")],
    normalize: Normalize = False,
) -> Combination:
    """Task arithmetic whose scale grows evenly with depth: t0 + (alpha + beta (l - 1) / (L - 1)) sum w_i (t_i - t0).

    `depth` is the tensor's (l - 1) / (L - 1), in [0, 1], as the engine counts it: 0 before the first layer, 1 after the
    last. The paper's code scales what follows the last layer by `alpha` as well. For one model it takes beta = 1 - alpha;
    for M models about alpha = 1/M. On top of another method, the same is the ramp `lambda: [alpha, alpha + beta]`.
    """
    return task_arithmetic(weights, lambda_=alpha + beta * depth, normalize=normalize)


@register("nan", "weights", form="coefficients", of="deltas", paper="https://arxiv.org/abs/2505.16148")
def nan(weights: Sequence[float], gram: np.ndarray, *, lambda_: Scale = 1.0) -> Combination:
    """Task vectors weighed by the inverse of their norm: t0 + lambda sum c_i d_i, c_i = (w_i / |d_i|) / sum_j (w_j / |d_j|).

    `gram` is [..., M, M], the inner products of one tensor's deltas: shares are per tensor. A delta of norm 0 adds nothing,
    and takes no share. Made from the paper's statement that coefficients go by "the inverse of parameter norm"; we take
    the norm of what is summed, the delta, and of the weights themselves only where there is no base.
    """
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1).clip(min=0))
    shares = np.array(weights, np.float64) * np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    whole = shares.sum(-1, keepdims=True)
    even = np.broadcast_to(normalized(weights), shares.shape)
    scaled = lambda_ * np.divide(shares, whole, out=even.copy(), where=whole != 0)
    base = 1.0 - lambda_
    if gram.ndim == 2:
        return Combination(base, tuple(map(float, scaled)), 1.0)
    return Combination(base, tuple(np.moveaxis(scaled, -1, 0)), 1.0)

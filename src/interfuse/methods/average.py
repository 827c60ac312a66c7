"""Averages of models' weights: by given weights, of equal weights, of a run's checkpoints. None of them needs a base.

Sources: Model soups, https://arxiv.org/abs/2203.05482; averages of a run's checkpoints, https://arxiv.org/abs/1803.05407.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Combination, Normalize, normalized
from interfuse.registry import register

_SOUPS = "https://arxiv.org/abs/2203.05482"

Decay = Annotated[float, Field(ge=0, lt=1, description="How much of the average so far is kept at each checkpoint.")]


@register("linear", "weights", form="coefficients", paper=_SOUPS)
def linear(weights: Sequence[float], *, normalize: Normalize = True) -> Combination:
    """Weighted average of the models: sum w_i t_i / sum w_i, without the division where `normalize` is false.

    `weights` has one number a model, of any sign. A base, where one is given, takes no part in the sum. Weights that sum
    to zero can't be normalized: an `OptionError`.
    """
    if normalize:
        return Combination(0.0, normalized(weights), 1.0)
    return Combination(0.0, tuple(weights), math.fsum(weights))


@register("uniform_soup", "weights", form="coefficients", paper=_SOUPS)
def uniform_soup(weights: Sequence[float]) -> Combination:
    """Plain average of the models: sum t_i / M, which is `linear` with equal weights.

    Weights that differ are an `OptionError`: they would be ignored. A base takes no part in the sum.
    """
    if len(set(weights)) > 1:
        got = ", ".join(map(str, weights))
        raise OptionError(Problem("weights", f"got {got}", "a uniform soup weighs all models alike; use linear"))
    return Combination(0.0, (1 / len(weights),) * len(weights), 1.0)


@register("greedy_soup", "weights", form="coefficients", paper=_SOUPS, needs="validation data")
def greedy_soup(weights: Sequence[float]) -> Combination:
    """Plain average of the models that help: the best first, each is added while a metric on validation data doesn't drop.

    A run chooses by `data.validation` and `evaluate.metric`, and is then the `linear` merge of the chosen, recorded with
    every step. In Python: `interfuse.greedy_soup`. Numbers alone can't say which models help: an `OptionError`.
    """
    allowed = "run a recipe with data.validation, or choose by interfuse.greedy_soup and merge by linear"
    raise OptionError(Problem("merge_method", "greedy_soup chooses its models by validation data", allowed))


@register("ema", "weights", form="coefficients", paper="https://arxiv.org/abs/1803.05407")
def ema(weights: Sequence[float], *, decay: Decay) -> Combination:
    """Exponential moving average of a run's checkpoints, oldest first: s_1 = t_1, s_k = decay s_(k-1) + (1 - decay) t_k.

    Written out, the last of M has 1 - decay, each one before it `decay` times as much, and the first decay^(M-1).
    `decay` 0 gives the last checkpoint. `weights` multiply these shares, which are then divided by their sum; equal ones
    change nothing. The paper averages with equal weights, as `uniform_soup` does.
    """
    last = len(weights) - 1
    shares = [decay**last, *((1 - decay) * decay ** (last - k) for k in range(1, last + 1))]
    return Combination(0.0, normalized([weight * share for weight, share in zip(weights, shares, strict=True)]), 1.0)


@register("passthrough", "weights", form="coefficients", paper="https://arxiv.org/abs/2312.15166")
def passthrough(
    weights: Sequence[float],
    *,
    scale: Annotated[float, Field(allow_inf_nan=False, description="What every entry is multiplied by.")] = 1.0,
) -> Combination:
    """Copy one model's tensors, times `scale`: layers of several models stacked by `slices` are a frankenmerge.

    `weights` isn't used. More than one model for a tensor is an `OptionError`. Source of stacking: depth up-scaling.
    """
    if len(weights) != 1:
        raise OptionError(Problem("models", f"got {len(weights)}", "passthrough copies one model; stack several as slices"))
    return Combination(0.0, (scale,), scale)

"""Averages of models' weights. Source: Model soups, https://arxiv.org/abs/2203.05482 (the uniform soup is equal weights)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from interfuse.methods.forms import Combination, Normalize, normalized
from interfuse.registry import register


@register("linear", "weights", form="coefficients", paper="https://arxiv.org/abs/2203.05482")
def linear(weights: Sequence[float], *, normalize: Normalize = True) -> Combination:
    """Weighted average of the models: sum w_i t_i / sum w_i, without the division where `normalize` is false.

    `weights` has one number a model, of any sign. A base, where one is given, takes no part in the sum. Weights that sum
    to zero can't be normalized: an `OptionError`.
    """
    if normalize:
        return Combination(0.0, normalized(weights), 1.0)
    return Combination(0.0, tuple(weights), math.fsum(weights))

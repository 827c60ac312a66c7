"""Arithmetic on task vectors, d_i = t_i - t0. Source: Task arithmetic, https://arxiv.org/abs/2212.04089."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from interfuse.methods.forms import Combination, Normalize, normalized
from interfuse.registry import register

_SCALE = "What the sum of task vectors is multiplied by; 0 gives the base."


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

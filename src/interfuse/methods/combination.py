"""What a coefficient method gives: the numbers of one linear combination of models. Not the sum itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from interfuse.errors import OptionError, Problem

#: The option of that name.
Normalize = Annotated[bool, Field(description="Whether the models' weights are divided by their sum.")]


class Combination(NamedTuple):
    """`base * t0 + sum_i models[i] * t_i`, for a base t0 and models t_1..t_M.

    `total` is the sum of all coefficients as the method knows it, 1 for an average: equal models then give themselves
    to the last bit, which a sum of rounded coefficients wouldn't promise.
    """

    base: float
    models: tuple[float, ...]
    total: float


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights over their sum, or an `OptionError` where that sum is zero."""
    total = math.fsum(weights)
    if total == 0:
        got = ", ".join(map(str, weights))
        raise OptionError(Problem("weights", f"{got} sum to 0", "change one, or set normalize to false"))
    return tuple(weight / total for weight in weights)

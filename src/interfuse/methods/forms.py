"""The four forms a weight method can have, and what its function is given and gives back. No method, and no reading.

A method is a plain function whose keyword-only arguments are its options; `weights` has one number a model, and so has
an option marked `EACH`.

| form | the function | gives |
|---|---|---|
| `coefficients` | `(weights, *, ...)`; also `gram`, the models' geometry, or `depth`, the layer's | a `Combination` |
| `rule` | `(weights, *, ...)` | a `Rule`: trim, elect, scale, which the engine's kernels run |
| `blocks` | `(tensor: Blocks, weights, *, ...)` | a function from a `Block` to its merged delta, `[n]`, in the deltas' type |
| `matrices` | `(deltas[M, out, in], weights, *, ...)` | the merged delta, `[out, in]` |

Deltas are differences from the base, d_i = t_i - t0; where there is no base they are the models themselves, t0 = 0.
A method that sees more than the weights is run once for each tensor, by the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.registry import EACH

#: Options that many methods have, by these names.
Normalize = Annotated[bool, Field(description="Whether the models' weights are divided by their sum.")]
Density = Annotated[tuple[float, ...], EACH, Field(ge=0, le=1, description="The share of each delta's entries that is kept.")]
Scale = Annotated[
    float, Field(alias="lambda", allow_inf_nan=False, description="What the merged delta is multiplied by; 0 gives the base.")
]


#: A number, or one for each part of the tensor that has a Gram matrix of its own.
Coefficient = float | np.ndarray


class Combination(NamedTuple):
    """`base * t0 + sum_i models[i] * t_i`, for a base t0 and models t_1..t_M.

    Each is a number, or an array with the leading axes of the Gram matrix that the method was given. `total` is the sum
    of all coefficients as the method knows it, 1 for an average: equal models then give themselves to the last bit, which
    a sum of rounded coefficients wouldn't promise. Where there is no base, t0 = 0 and the models' sum is `total - base`.
    """

    base: Coefficient
    models: tuple[Coefficient, ...]
    total: Coefficient


class Trim(NamedTuple):
    """Which entries of each model's delta are kept, and how the kept ones are scaled.

    | how | kept | scaled by |
    |---|---|---|
    | `all` | every entry | 1 |
    | `largest` | the `density` share of largest magnitude, after the `skip` share of the very largest | 1, or see `l1` |
    | `random` | each entry with probability `density` | 1/density, or see `l1` |
    | `ranked` | each with a probability rising with its rank in its row, density - spread to density + spread | 1/p |
    | `variance` | the `density` share of positions with the largest variance over the models | 1 |

    Counts are exact and per tensor: all above the cut, and those at the cut by lowest index. With the `scope` `global`,
    for `largest` without `skip`, they are over all of a model's tensors that have one density, and earlier tensors come
    first. `rescale` is `none`, `density` (1/density, or 1/p for `ranked`), or `l1` (to the L1 norm that the delta had).
    """

    how: Literal["all", "largest", "random", "ranked", "variance"] = "all"
    density: tuple[float, ...] = ()  # one a model
    skip: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    rescale: Literal["none", "density", "l1"] = "none"
    scope: Literal["tensor", "global"] = "tensor"


class Rule(NamedTuple):
    """trim -> elect -> scale, for each entry: what TIES, DARE, DELLA, breadcrumbs and SCE have in common.

    `weights` has one number a model; `energy` puts the mean square of each model's trimmed delta in their place.
    `elect` drops the entries whose sign isn't that of the weighted sum. `mean` divides the weighted sum by the weights
    of the entries that are left, else the sum stays. `scale` multiplies the result.
    """

    weights: tuple[float, ...]
    trim: Trim = Trim()
    elect: bool = False
    mean: bool = False
    scale: float = 1.0
    energy: bool = False


class Block(NamedTuple):
    """Consecutive elements of one tensor: where they begin, the base's (or None), and the deltas `[M, n]`.

    In float32, or in float64 where an input or the output is.
    """

    start: int
    base: np.ndarray | None
    deltas: np.ndarray


class Blocks(Protocol):
    """One tensor, to be gone through in blocks, as often as a method needs: it may be larger than memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def models(self) -> int:
        """How many models."""

    def __iter__(self) -> Iterator[Block]:
        """Every block in order; each is valid until the next one. Whole rows (the last axis) where a row fits a block."""


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights over their sum, or an `OptionError` where that sum is zero."""
    total = math.fsum(weights)
    if total == 0:
        got = ", ".join(map(str, weights))
        raise OptionError(Problem("weights", f"{got} sum to 0", "change one, or set normalize to false"))
    return tuple(weight / total for weight in weights)

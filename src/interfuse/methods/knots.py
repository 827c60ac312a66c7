"""KnOTS: deltas merged in the directions that they share. Source: https://arxiv.org/abs/2410.19735.

[D_1 .. D_M] = U S [V_1' .. V_M']; the aligned parts S V_i' are merged entry by entry, and U times that is the result. For
adapters D_i = up_i down_i, `align_factors` gives the same from the small factors, without forming any D_i, and
`merge_aligned` does for both: the pair (basis, merged) is then itself an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from interfuse.methods.decompose import Array, directions, like, namespace, wide
from interfuse.methods.forms import Density, Scale, normalized
from interfuse.registry import register

Combine = Literal["ties", "dare_ties", "dare_linear", "linear"]


@register("knots", "weights", form="matrices", paper="https://arxiv.org/abs/2410.19735", needs="a base")
def knots(
    deltas: Array,
    weights: Sequence[float],
    *,
    combine: Annotated[Combine, Field(description="How the aligned parts are merged.")] = "ties",
    density: Density = (0.5,),
    normalize: Annotated[
        bool, Field(description="Whether the weighted sum is divided by the weights of what takes part in it.")
    ] = True,
    lambda_: Scale = 1.0,
    seed: Annotated[int, Field(ge=0, description="What the entries that `dare_*` drops are drawn from.")] = 0,
) -> Array:
    """Deltas [M, out, in] merged by TIES, DARE or linearly in their shared directions: lambda U merge(S V_i').

    Weights count in the merge, not in finding the directions. `combine: linear` is the weighted mean of the deltas, or
    their sum where `normalize` is false; it has no use for `density`. Densities are shares of joint rank * in entries.
    Memory: 5 float64 copies of all deltas.
    """
    basis, aligned = align(deltas)
    merged = merge_aligned(aligned, weights, combine=combine, density=density, normalize=normalize, seed=seed)
    return like(lambda_ * (basis @ merged), deltas)


def align(deltas: Sequence[Array] | Array) -> tuple[Array, list[Array]]:
    """U [out, r] and the M aligned parts S V_i' [r, in] of deltas [out, in], with r their joint rank; in float64.

    U has orthonormal columns, and U @ part i is delta i.
    """
    basis, values, right = directions(namespace(deltas[0]).concatenate(list(deltas), 1))
    right *= values[:, None]
    width = deltas[0].shape[1]
    return basis, [right[:, start : start + width] for start in range(0, right.shape[1], width)]


def align_factors(ups: Sequence[Array], downs: Sequence[Array]) -> tuple[Array, list[Array]]:
    """`align` for D_i = ups[i] @ downs[i], [out, r_i] and [r_i, in], whose ranks may differ; no D_i is formed.

    The joint rank is at most the sum of the r_i, and so are the sizes of everything here but the factors themselves.
    """
    xp = namespace(ups[0])
    outer, inner = xp.linalg.qr(xp.concatenate([wide(up) for up in ups], 1))
    parts, start = [], 0
    for up, down in zip(ups, downs, strict=True):
        parts.append(inner[:, start : start + up.shape[1]] @ wide(down))
        start += up.shape[1]
    basis, aligned = align(parts)
    return outer @ basis, aligned


def merge_aligned(
    aligned: Sequence[Array],
    weights: Sequence[float],
    *,
    combine: Combine = "ties",
    density: Sequence[float] = (0.5,),
    normalize: bool = True,
    seed: int = 0,
) -> Array:
    """The M aligned parts [r, in] merged entry by entry to one [r, in], before the scale.

    `ties` keeps the `density` share of each part's entries of largest magnitude, at least one; `dare_*` keeps each entry
    with probability `density`, and divides it by that. `density` has one number a model, or one for all. `ties` and
    `dare_ties` then drop, at each entry, the weighted parts whose sign isn't that of their sum. `normalize` divides by the
    weights of those that are left, and without a vote on signs by all weights.
    """
    xp = namespace(aligned[0])
    shares = list(density) * (len(weights) if len(density) == 1 else 1)
    parts = []
    for index, (part, share) in enumerate(zip(aligned, shares, strict=True)):
        if combine == "ties":
            part = part * _largest(part, share)
        elif combine != "linear":
            part = part * _drawn(part, share, (seed, index)) / (share or 1)
        parts.append(part)
    if combine in ("linear", "dare_linear"):
        coefficients = normalized(weights) if normalize else weights
        return sum(weight * part for weight, part in zip(coefficients, parts, strict=True))
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    merged, kept = 0 * total, 0 * total
    for weight, part in zip(weights, parts, strict=True):
        agrees = weight * part * total > 0
        merged = merged + xp.where(agrees, weight * part, 0.0)
        kept = kept + xp.where(agrees, weight, 0.0)
    return merged / xp.where(kept == 0, 1.0, kept) if normalize else merged


def _largest(part: Array, share: float) -> Array:
    """Whether each entry is among the floor(share * count) of largest magnitude, at least one; equal ones by lowest index."""
    xp = namespace(part)
    sizes = xp.abs(part).reshape(-1)
    if not share or not len(sizes):  # joint rank 0: there are no entries
        return sizes.reshape(part.shape) < 0
    count = max(1, int(share * len(sizes) + 1e-9))
    order = np.partition(sizes, len(sizes) - count) if xp is np else xp.sort(sizes).values
    cut = order[len(sizes) - count]
    above, at = sizes > cut, sizes == cut
    first = xp.cumsum(at, 0) <= count - above.sum()
    return (above | (at & first)).reshape(part.shape)


def _drawn(part: Array, share: float, seed: tuple[int, int]) -> Array:
    """Whether each entry is kept, each with that probability: the same entries for an array and for a tensor."""
    kept = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(tuple(part.shape)) < share
    xp = namespace(part)
    return kept if xp is np else xp.asarray(kept, device=part.device)

"""What a merge of LoRA adapters computes of one module: from each adapter's factors, the merged one's. No file is touched.

Registered at the level `adapters`, where recipes find them whose models are adapters without a base. An adapter's change is
up @ down. `linear`, `svd` and `knots` work in the factors; the others form one module's changes. Sources: LoRA 2106.09685;
KnOTS 2410.19735; TIES 2306.01708; DARE 2311.03099.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from interfuse.engine.adapters.extract import leading
from interfuse.engine.merge import merge
from interfuse.methods.forms import Density, Normalize, Scale, normalized
from interfuse.methods.knots import Combine, align_factors, merge_aligned
from interfuse.registry import register

_TIES = "https://arxiv.org/abs/2306.01708"
_DARE = "https://arxiv.org/abs/2311.03099"

Rank = Annotated[int | None, Field(ge=1, description="The rank of each module's factors; none: the adapters' largest.")]
Seed = Annotated[int, Field(ge=0, description="What the entries that `dare_*` drops are drawn from.")]


class Factors(NamedTuple):
    """A change `up @ down` of a weight: `[out, r]` and `[r, in]`, float64, the scale in `up`. An absent one has r = 0."""

    up: np.ndarray
    down: np.ndarray


@register("linear", "adapters", paper="https://arxiv.org/abs/2203.05482")
def linear(factors: Sequence[Factors], weights: Sequence[float], *, normalize: Normalize = True) -> Factors:
    """The weighted mean (or sum) of the changes, exactly: their factors side by side, of the sum of their ranks."""
    coefficients = normalized(weights) if normalize else weights
    up = np.concatenate([weight * pair.up for pair, weight in zip(factors, coefficients, strict=True)], 1)
    return Factors(up, np.concatenate([pair.down for pair in factors], 0))


@register("svd", "adapters", paper="https://arxiv.org/abs/2106.09685")
def svd(factors: Sequence[Factors], weights: Sequence[float], *, rank: Rank = None, normalize: Normalize = True) -> Factors:
    """The weighted mean (or sum) of the changes, as near as a change of that rank can be: its leading singular vectors."""
    return truncate(linear(factors, weights, normalize=normalize), rank or max(len(pair.down) for pair in factors))


@register("knots", "adapters", paper="https://arxiv.org/abs/2410.19735")
def knots(
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    combine: Annotated[Combine, Field(description="How the aligned parts are merged.")] = "ties",
    density: Density = (0.5,),
    normalize: Normalize = True,
    lambda_: Scale = 1.0,
    rank: Rank = None,
    seed: Seed = 0,
) -> Factors:
    """Changes merged by TIES, DARE or linearly in the directions that they share, then truncated to `rank`.

    [D_1 .. D_M] = U S [V_1' .. V_M'], from the factors; the parts S V_i' are merged entry by entry. `density` is a share
    of joint rank * in entries, and isn't used by `combine: linear`.
    """
    basis, parts = align_factors([pair.up for pair in factors], [pair.down for pair in factors])
    merged = merge_aligned(parts, weights, combine=combine, density=density, normalize=normalize, seed=seed)
    return truncate(Factors(lambda_ * basis, merged), rank or max(len(pair.down) for pair in factors))


def _of_models(name: str, paper: str, about: str, *, normalize: bool, draws: bool) -> None:
    """Register a weight method that goes by entries: on the changes themselves, as on models with these adapters.

    `normalize` is that option's default, `draws` whether there is a seed to be given.
    """

    def merged(
        factors: Sequence[Factors],
        weights: Sequence[float],
        *,
        density: Density = (1.0,),
        normalize: Normalize = normalize,
        lambda_: Scale = 1.0,
        rank: Rank = None,
        seed: Seed = 0,
    ) -> Factors:
        change = _entrywise(name, factors, weights, density, seed=seed, normalize=normalize, lambda_=lambda_)
        norm = float(np.square(change, dtype=np.float64).sum())
        if not norm:
            return Factors(np.zeros((len(change), 1)), np.zeros((1, change.shape[1])))
        return Factors(*leading(change, norm, rank or max(len(pair.down) for pair in factors), None))

    merged.__name__, merged.__doc__ = name, f"{about}, then as near as a change of `rank` can be."
    taken = inspect.signature(merged)
    options = [option for option in taken.parameters.values() if draws or option.name != "seed"]
    merged.__signature__ = taken.replace(parameters=options)  # type: ignore[attr-defined]  # what the registry reads
    register(name, "adapters", paper=paper)(merged)


_of_models("ties", _TIES, "TIES on the changes themselves, as on models with these adapters", normalize=True, draws=False)
_of_models("dare_linear", _DARE, "DARE on the changes themselves, and their sum", normalize=False, draws=True)
_of_models("dare_ties", _DARE, "DARE on the changes themselves, with TIES' election of signs", normalize=False, draws=True)


def _entrywise(
    method: str, factors: Sequence[Factors], weights: Sequence[float], density: Sequence[float], **options: Any
) -> np.ndarray:
    """A method of models' deltas on the changes of one module, formed whole, onto a base of zeros."""
    names = [str(i) for i in range(len(factors))]
    changes = {name: {"change": (pair.up @ pair.down).astype(np.float32)} for name, pair in zip(names, factors, strict=True)}
    shares = dict(zip(names, list(density) * (len(names) if len(density) == 1 else 1), strict=True))
    base = {"change": np.zeros_like(changes[names[0]]["change"])}
    found: np.ndarray = merge(method, changes, base=base, weights=list(weights), density=shares, **options)["change"]
    return found


def truncate(factors: Factors, rank: int) -> Factors:
    """The nearest factors of at most that rank, each with the roots of the singular values; at least of rank 1."""
    left, outer = np.linalg.qr(factors.up)
    right, inner = np.linalg.qr(factors.down.T)
    u, values, v = np.linalg.svd(outer @ inner.T, full_matrices=False)
    keep = max(1, min(rank, int(np.count_nonzero(values > 1e-12 * values[:1]))))
    roots = np.sqrt(values[:keep])
    return Factors((left @ u[:, :keep]) * roots, roots[:, None] * (v[:keep] @ right.T))

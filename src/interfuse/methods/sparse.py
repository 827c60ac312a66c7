"""Sparse task vectors: trim -> elect -> scale. Each method is a row of data, a `Rule`, that the engine's kernels run.

Sources: TIES, https://arxiv.org/abs/2306.01708; DARE, https://arxiv.org/abs/2311.03099; DELLA,
https://arxiv.org/abs/2406.11617; Model Breadcrumbs, https://arxiv.org/abs/2312.06795; SCE, https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Density, Normalize, Rule, Scale, Trim, normalized
from interfuse.registry import EACH, register

_TIES, _DARE = "https://arxiv.org/abs/2306.01708", "https://arxiv.org/abs/2311.03099"
_DELLA, _CRUMBS = "https://arxiv.org/abs/2406.11617", "https://arxiv.org/abs/2312.06795"

Rescale = Annotated[
    bool | Literal["l1"],
    Field(description="Whether kept entries are divided by the chance of being kept; l1: so that the delta's L1 norm stays."),
]
ToNorm = Annotated[bool, Field(description="Whether kept entries are scaled so that the delta's L1 norm stays.")]
Gamma = Annotated[tuple[float, ...], EACH, Field(ge=0, lt=1, description="The share of the largest entries that is dropped.")]
Epsilon = Annotated[
    tuple[float, ...], EACH, Field(ge=0, lt=0.5, description="How far chances reach below and above `density`.")
]
Scope = Annotated[
    Literal["tensor", "global"],
    Field(description="Whether `density` counts within each tensor, or over all of a model's tensors, as in the paper."),
]
Top = Annotated[float, Field(ge=0, le=1, description="The share of positions, of those that vary at all, that is kept.")]


def _sum(weights: Sequence[float], trim: Trim, *, elect: bool, normalize: bool, scale: float) -> Rule:
    """The rule with these parts. Without an election a mean is a sum by normalized weights."""
    chosen = normalized(weights) if normalize and not elect else tuple(weights)
    return Rule(chosen, trim, elect=elect, mean=normalize and elect, scale=scale)


def _each(value: Sequence[float], models: int) -> tuple[float, ...]:
    return tuple(value) * models if len(value) == 1 else tuple(value)


@register("ties", "weights", form="rule", paper=_TIES, needs="a base")
def ties(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    trim: Scope = "tensor",
    normalize: Normalize = True,
    rescale: ToNorm = False,
    lambda_: Scale = 1.0,
) -> Rule:
    """Trim each delta to its largest entries, elect a sign for each position, average the entries that agree: TIES.

    t0 + lambda sum w_i d_i / sum w_i over the models whose trimmed entry has the sign of sum w_i d_i (0 counts as plus);
    without the division where `normalize` is false. `density` of each tensor's entries is kept, exactly: floor(density n),
    at least one unless it's 0, equal magnitudes by lowest index. The paper trims over a whole model, which is
    `trim: global`: n is then that of all tensors for which a model has this density, and equal magnitudes go by the
    order of the tensors first. It takes a pass over all tensors more; `rescale` stays a tensor's own.
    """
    kept = Trim("largest", _each(density, len(weights)), rescale="l1" if rescale else "none", scope=trim)
    return _sum(weights, kept, elect=True, normalize=normalize, scale=lambda_)


def _rescale(chosen: bool | str) -> Literal["none", "density", "l1"]:
    return "l1" if chosen == "l1" else "density" if chosen else "none"


def _random(weights: Sequence[float], density: Sequence[float], rescale: bool | str) -> Trim:
    return Trim("random", _each(density, len(weights)), rescale=_rescale(rescale))


@register("dare_linear", "weights", form="rule", paper=_DARE, needs="a base")
def dare_linear(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
) -> Rule:
    """Keep entries at random, divide them by `density`, and sum: DARE. t0 + lambda sum w_i m_i d_i / density_i.

    The masks m_i are Bernoulli(density_i), by the recipe's seed; the sum is unbiased: its mean over seeds is that of task
    arithmetic. mergekit rescales to the L1 norm instead, which is `rescale: l1`.
    """
    return _sum(weights, _random(weights, density, rescale), elect=False, normalize=normalize, scale=lambda_)


@register("dare_ties", "weights", form="rule", paper=_DARE, needs="a base")
def dare_ties(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
) -> Rule:
    """DARE's random masks, then TIES' election of signs. Options as in `dare_linear` and `ties`."""
    return _sum(weights, _random(weights, density, rescale), elect=True, normalize=normalize, scale=lambda_)


def _ranked(weights: Sequence[float], density: Sequence[float], epsilon: Sequence[float], rescale: bool | str) -> Trim:
    """DELLA's trim; `OptionError` where a chance would leave [0, 1]. A density of 0 or 1 has no spread."""
    shares, spreads = _each(density, len(weights)), _each(epsilon, len(weights))
    for i, (share, spread) in enumerate(zip(shares, spreads, strict=True)):
        if 0 < share < 1 and not spread <= share <= 1 - spread:
            wrong = f"got {spread:g} beside density {share:g} for model {i}"
            raise OptionError(Problem("parameters.epsilon", wrong, f"at most {min(share, 1 - share):g}"))
    spreads = tuple(spread if 0 < share < 1 else 0.0 for share, spread in zip(shares, spreads, strict=True))
    return Trim("ranked", shares, spread=spreads, rescale=_rescale(rescale))


@register("della", "weights", form="rule", paper=_DELLA, needs="a base")
def della(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: Normalize = True,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
) -> Rule:
    """Keep entries at random, larger ones more probably, over their chance, then elect signs as TIES does: DELLA.

    An entry's chance rises evenly with the rank of its magnitude in its row (last axis), from density - epsilon to
    density + epsilon, which must lie in [0, 1]; equal magnitudes share their mean rank, told apart to 8 binary places.
    """
    trim = _ranked(weights, density, epsilon, rescale)
    return _sum(weights, trim, elect=True, normalize=normalize, scale=lambda_)


@register("della_linear", "weights", form="rule", paper=_DELLA, needs="a base")
def della_linear(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    epsilon: Epsilon = (0.15,),
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Scale = 1.0,
) -> Rule:
    """DELLA's chances by magnitude, then a plain weighted sum. Options as in `della`."""
    trim = _ranked(weights, density, epsilon, rescale)
    return _sum(weights, trim, elect=False, normalize=normalize, scale=lambda_)


def _crumbs(weights: Sequence[float], density: Sequence[float], gamma: Sequence[float], rescale: bool) -> Trim:
    models = len(weights)
    return Trim("largest", _each(density, models), skip=_each(gamma, models), rescale="l1" if rescale else "none")


@register("breadcrumbs", "weights", form="rule", paper=_CRUMBS, needs="a base")
def breadcrumbs(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: Normalize = False,
    rescale: ToNorm = False,
    lambda_: Scale = 1.0,
) -> Rule:
    """Drop each delta's very largest entries and its smallest, then sum: Model Breadcrumbs. t0 + lambda sum w_i m_i d_i.

    `gamma` of the entries are dropped from the top, and of the rest the largest are kept until `density` of all is; where
    both don't fit, less is dropped from the top.
    """
    trim = _crumbs(weights, density, gamma, rescale)
    return _sum(weights, trim, elect=False, normalize=normalize, scale=lambda_)


@register("breadcrumbs_ties", "weights", form="rule", paper=_CRUMBS, needs="a base")
def breadcrumbs_ties(
    weights: Sequence[float],
    *,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: Normalize = False,
    rescale: ToNorm = False,
    lambda_: Scale = 1.0,
) -> Rule:
    """Breadcrumbs' trim, then TIES' election of signs. Options as in `breadcrumbs` and `ties`."""
    trim = _crumbs(weights, density, gamma, rescale)
    return _sum(weights, trim, elect=True, normalize=normalize, scale=lambda_)


@register("sce", "weights", form="rule", paper="https://arxiv.org/abs/2408.07990", needs="a base")
def sce(weights: Sequence[float], *, select_topk: Top = 1.0, lambda_: Scale = 1.0) -> Rule:
    """Select positions by variance over the models, calculate weights from energy, erase minority signs: SCE (FuseChat).

    Of the positions whose deltas differ at all, the `select_topk` share with the largest variance is kept (floor of the
    count, equal ones by lowest index; 1 keeps all). A model's weight is its kept delta's mean square, times `weights`; the
    elected sign is that of the plain sum. Weights go by shares, with no absolute threshold.
    """
    trim = Trim("variance", (select_topk,)) if select_topk < 1 else Trim()
    return Rule(tuple(weights), trim, elect=True, mean=True, scale=lambda_, energy=True)

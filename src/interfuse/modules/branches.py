"""What every fusion module starts with: a branch a model, h_k = P_k f_k, and the bookkeeping of models that are missing.

Everything that belongs to one model is in its branch and everything else is shared, so that permuting the models permutes
the weights and changes nothing else. P_k is layer normalisation and a linear map: features of different networks come in
very different scales. There is no fusing here.

The one signature of all fusion modules:

    forward(features, present=None) -> (fused, weights)

`features[k]` is (batch, width_k) or (batch, tokens_k, width_k), or None for a model that is missing. `present[k]` is None
(all there) or booleans, (batch,) or (batch, tokens_k). `fused` is (batch, dim), or (batch, tokens, dim) from the modules
that fuse token by token; `weights` is (batch, models): what share each model has in the result, 0 for a missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem

Features = Sequence[Tensor | None]
Present = Sequence[Tensor | None] | None
Fused = tuple[Tensor, Tensor]

Heads = Annotated[int, Field(ge=1, description="How many parts of the features are weighted each on its own; divides dim.")]
Depth = Annotated[int, Field(ge=1, description="How many layers the encoder has.")]
Share = Annotated[float, Field(ge=0, lt=1, description="Share of the fused features that training drops.")]


class Branch(nn.Module):
    """P_k: features of one width, normalised and projected to the common width.

    With `token`, a learned vector (dim,) stands in wherever the model is missing.
    """

    def __init__(self, width: int, dim: int, *, token: bool) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        self.missing = nn.Parameter(torch.zeros(dim)) if token else None

    def forward(self, features: Tensor, there: Tensor) -> Tensor:
        """(..., width), booleans (...) -> (..., dim)."""
        projected = self.project(self.norm(features))
        if self.missing is None:
            return projected
        return torch.where(there.unsqueeze(-1), projected, self.missing.to(projected.dtype))


def branches(widths: Sequence[int], dim: int, *, token: bool = False) -> nn.ModuleList:
    """A branch a model."""
    return nn.ModuleList(Branch(width, dim, token=token) for width in widths)


def check_heads(dim: int, heads: int) -> None:
    """Raise an `OptionError` unless `heads` divides `dim`."""
    if dim % heads:
        raise OptionError(Problem("heads", f"dim {dim} isn't a multiple of {heads} heads", "choose heads that divide dim"))


def project(each: nn.ModuleList, features: Features, present: Present) -> tuple[list[Tensor], list[Tensor]]:
    """Every model's h_k (batch, dim) or (batch, tokens, dim), and booleans of the same shape less dim: is it there?

    What isn't there is read as zeros, so that it may hold anything, NaN too.
    """
    if len(features) != len(each):
        raise ModelError(
            Problem(
                "features",
                f"{len(features)} given for {len(each)} models",
                "give one entry a model, None for a missing one",
            )
        )
    some = next((f for f in features if f is not None), None)
    if some is None:
        raise ModelError(Problem("features", "all models are missing", "give the features of at least one"))
    if present is not None and len(present) != len(each):
        raise ModelError(Problem("present", f"{len(present)} given for {len(each)} models", "give one entry a model"))
    parts, there = [], []
    branch: Any
    for k, (branch, feature) in enumerate(zip(each, features, strict=True)):
        if feature is None:
            feature = some.new_zeros(*some.shape[:-1], branch.width)
            mask = torch.zeros(some.shape[:-1], dtype=torch.bool, device=some.device)
        else:
            if feature.ndim not in (2, 3) or feature.shape[-1] != branch.width or feature.shape[0] != some.shape[0]:
                allowed = f"(batch, {branch.width}) or (batch, tokens, {branch.width}), the same batch for all"
                raise ModelError(Problem(f"features[{k}]", f"got shape {tuple(feature.shape)}", allowed))
            mask = torch.ones(feature.shape[:-1], dtype=torch.bool, device=feature.device)
            entry = None if present is None else present[k]
            if entry is not None:
                mask = mask & _like(mask, entry, k)
                feature = feature.masked_fill(~mask.unsqueeze(-1), 0.0)
        parts.append(branch(feature, mask))
        there.append(mask)
    return parts, there


def _like(mask: Tensor, entry: Tensor, k: int) -> Tensor:
    if not 1 <= entry.ndim <= mask.ndim or entry.shape != mask.shape[: entry.ndim]:
        allowed = f"booleans {tuple(mask.shape[:1])}" + (f" or {tuple(mask.shape)}" if mask.ndim > 1 else "")
        raise ModelError(Problem(f"present[{k}]", f"got shape {tuple(entry.shape)}", allowed))
    return entry.to(mask.device).bool().reshape(*entry.shape, *[1] * (mask.ndim - entry.ndim))


def by_token(fuse: Callable[[Tensor, Tensor], Fused], parts: Sequence[Tensor], there: Sequence[Tensor]) -> Fused:
    """Apply `fuse((n, models, dim), (n, models)) -> ((n, dim), (n, models))` to each example, or to each of its tokens.

    Models with one vector an example are repeated over the tokens of the others, which must have equally many.
    """
    counts = sorted({part.shape[1] for part in parts if part.ndim == 3})
    if len(counts) > 1:
        raise ModelError(Problem("features", f"token counts differ: {counts}", "pool them, or use attention or transformer"))
    if not counts:
        return fuse(torch.stack(list(parts), dim=1), torch.stack(list(there), dim=1))
    tokens = counts[0]
    parts = [p if p.ndim == 3 else p.unsqueeze(1).expand(-1, tokens, -1) for p in parts]
    there = [t if t.ndim == 2 else t.unsqueeze(1).expand(-1, tokens) for t in there]
    stacked, mask = torch.stack(parts, dim=2), torch.stack(there, dim=2)  # (batch, tokens, models, dim)
    fused, weights = fuse(stacked.flatten(0, 1), mask.flatten(0, 1))
    real = mask.any(dim=2).to(weights.dtype).unsqueeze(-1)
    mean = (weights.unflatten(0, mask.shape[:2]) * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return fused.unflatten(0, mask.shape[:2]), mean


def in_one_row(parts: Sequence[Tensor], there: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All models' tokens in one row: (batch, n, dim), their mask (batch, n), and whose each is, one-hot (n, models)."""
    parts = [p if p.ndim == 3 else p.unsqueeze(1) for p in parts]
    there = [t if t.ndim == 2 else t.unsqueeze(1) for t in there]
    rows = torch.eye(len(parts), device=parts[0].device, dtype=parts[0].dtype)
    owner = torch.cat([row.expand(p.shape[1], -1) for row, p in zip(rows, parts, strict=True)])
    return torch.cat(parts, dim=1), torch.cat(there, dim=1), owner


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis among what the mask keeps; zeros where it keeps nothing."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(dim=-1) * mask


def shares(amounts: Tensor, mask: Tensor) -> Tensor:
    """Non-negative amounts (n, models) over their sum among what the mask keeps; zeros where that is nothing."""
    kept = amounts * mask
    return kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(amounts.dtype).tiny)

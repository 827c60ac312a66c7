"""Averages of projected features, the plainest fusions: with equal weights, and with one learned weight a model.

    mean:      z = 1/M sum_k h_k
    weighted:  z = sum_k softmax_k(a) h_k

The weights don't depend on the input; where they should, use `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interfuse.modules.branches import Features, Fused, Present, Share, branches, by_token, masked_softmax, project, shares
from interfuse.registry import register


@register("mean", "features", needs="training data")
class Mean(nn.Module):
    """The mean of the models' projected features: z = 1/M sum_k h_k.

    Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__()
        self.branches = branches(widths, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        return by_token(self._fuse, *project(self.branches, features, present))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        weights = shares(h.new_ones(h.shape[:2]), mask)
        return self.dropout((h * weights.unsqueeze(-1)).sum(dim=1)), weights


@register("weighted", "features", needs="training data")
class Weighted(nn.Module):
    """A learned weight a model, the same for all inputs: z = sum_k softmax_k(a) h_k, equal at the start.

    Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__()
        self.branches = branches(widths, dim)
        self.scores = nn.ParameterList(torch.zeros(()) for _ in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        return by_token(self._fuse, *project(self.branches, features, present))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        weights = masked_softmax(torch.stack(list(self.scores)).to(h.dtype).expand(h.shape[:2]), mask)
        return self.dropout((h * weights.unsqueeze(-1)).sum(dim=1)), weights

"""Shared-layer fusion: one layer that all models' features pass, its weights tied.

    s_k = phi( W h_k + b ),   z = mean_k s_k

(Hard parameter sharing, Caruana 1997, with networks in place of tasks.) The layer sees every model's features, so it is
trained by all of them, and M models cost one layer, not M. It doesn't weigh the models: `attention` and `gate` do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from interfuse.modules.branches import Features, Fused, Present, Share, branches, by_token, project, shares
from interfuse.registry import register


@register("shared", "features", paper="Caruana 1997, Multitask Learning, doi:10.1023/A:1007379606734", needs="training data")
class Shared(nn.Module):
    """All models' features pass one shared layer and are averaged: z = mean_k gelu(W h_k + b).

    The weights given are equal. Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__()
        self.branches = branches(widths, dim)
        self.layer = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout))

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        return by_token(self._fuse, *project(self.branches, features, present))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        weights = shares(h.new_ones(h.shape[:2]), mask)
        return (self.layer(h) * weights.unsqueeze(-1)).sum(dim=1), weights

"""Concatenation, the baseline: a small MLP over all models' features side by side.

    z = W phi( sum_k P_k f_k ) + b,   where [P_1 ... P_M] is the first layer's matrix over the concatenation

A missing model's part is a learned token. Its first layer grows with the number of models; it weighs nothing by input.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from interfuse.modules.branches import Features, Fused, Present, Share, branches, by_token, project, shares
from interfuse.registry import register


@register("concat", "features", needs="training data")
class Concat(nn.Module):
    """A two-layer MLP over the concatenation of the models' features.

    The weights given are the shares of each model's part in the hidden layer, by norm: they describe, nothing is
    multiplied by them. Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__()
        self.branches = branches(widths, dim, token=True)
        self.layer = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        return by_token(self._fuse, *project(self.branches, features, present))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        return self.layer(h.sum(dim=1)), shares(h.norm(dim=-1), mask)

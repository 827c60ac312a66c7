"""Gated fusion: every model's features pass a gate that looks at all of them.

    z = sum_k sigmoid( A h_k + B mean_j h_j ) * h_k

The gated multimodal unit (Arevalo et al. 2017, 1702.01992) for any number of models: its gate of the concatenation,
g_k([h]), with the blocks for the other models tied, so that it doesn't grow with their number and doesn't depend on their
order. Gates don't compete: all may be open. It isn't a router: every model is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interfuse.modules.branches import Features, Fused, Present, Share, branches, by_token, project
from interfuse.registry import register


@register("gate", "features", paper="Arevalo et al. 2017, arXiv:1702.01992", needs="training data")
class Gate(nn.Module):
    """Each model's features times an open or closed gate per entry, summed: z = sum_k sigmoid(g_k([h])) * h_k.

    The weights given are the gates' means over the entries, each in [0, 1]; they don't sum to 1.
    Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__()
        self.branches = branches(widths, dim)
        self.own = nn.Linear(dim, dim)
        self.others = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        return by_token(self._fuse, *project(self.branches, features, present))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        kept = mask.unsqueeze(-1).to(h.dtype)
        mean = (h * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        gates = torch.sigmoid(self.own(h) + self.others(mean).unsqueeze(1)) * kept
        return self.dropout((gates * h).sum(dim=1)), gates.mean(dim=-1)

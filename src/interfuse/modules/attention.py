"""Attention fusion: features weighted in proportion, for each input anew.

    alpha_k(x) = softmax_k( q . tanh(V h_k) / sqrt(d) ),   z = sum_k alpha_k h_k

with q and V shared by the models (Bahdanau et al. 2015, 1409.0473; over bags of instances, Ilse et al. 2018, 1802.04712).
With tokens the softmax runs over all models' tokens at once: a learned query that attends across the models. Unlike the
papers it starts at q = 0, where all models weigh the same, and divides by sqrt(d), d the entries of q: else it falls for
one model within an epoch and never learns of the others. It mixes; it doesn't let features change one another, as
`transformer` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from interfuse.modules.branches import (
    Features,
    Fused,
    Heads,
    Present,
    Share,
    branches,
    check_heads,
    in_one_row,
    masked_softmax,
    project,
)
from interfuse.registry import register


@register("attention", "features", paper="Bahdanau et al. 2015, arXiv:1409.0473", needs="training data")
class Attention(nn.Module):
    """Features weighted in proportion by a learned query, per input: z = sum_k softmax_k(q . tanh(V h_k) / sqrt(d)) h_k.

    `heads` queries, each weighting its own dim/heads part of the features; the weights given are their mean, and sum to 1.
    Takes (batch, width_k) or (batch, tokens_k, width_k), the counts of tokens may differ; gives (batch, dim).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, heads: Heads = 1, dropout: Share = 0.0) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.branches = branches(widths, dim)
        self.key = nn.Linear(dim, dim)
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        h, mask, owner = in_one_row(*project(self.branches, features, present))
        keys = torch.tanh(self.key(h)).unflatten(-1, (self.heads, -1))  # (batch, n, heads, dim/heads)
        scores = (keys * self.query).sum(dim=-1) * keys.shape[-1] ** -0.5
        alpha = masked_softmax(scores.transpose(1, 2), mask.unsqueeze(1))  # (batch, heads, n)
        z = torch.einsum("bhn,bnhd->bhd", alpha, h.unflatten(-1, (self.heads, -1))).flatten(1)
        return self.dropout(z), alpha.mean(dim=1) @ owner

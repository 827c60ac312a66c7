"""Gated fusion: every model's features pass a gate that looks at all of them.

    z = sum_k sigmoid( A h_k + B mean_j h_j ) * h_k

The gated multimodal unit (Arevalo et al. 2017, 1702.01992) for any number of models: its gate of the concatenation,
g_k([h]), with the blocks for the other models tied, so that it doesn't grow with their number and doesn't depend on their
order. Gates don't compete: all may be open, unless `top_k` lets only the most open ones count, w_k being a gate's mean:

    z = sum over the top_k by w_k                  balance * M sum_k f_k P_k is added to the loss in training

with f_k the share of the places that model k takes, and P_k its mean share of the weights (Shazeer et al. 2017, 1701.06538;
the loss as Fedus et al. 2021, 2101.03961: least, 1, when all are used alike). All networks are run all the same: this
chooses whose features count, and saves none of their cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from interfuse.errors import OptionError, Problem
from interfuse.modules.branches import Features, Fused, Present, Share, branches, by_token, project, shares
from interfuse.registry import register

TopK = Annotated[int | None, Field(ge=1, description="How many models count in each example, the most open ones; null is all.")]
Balance = Annotated[float, Field(ge=0, description="With top_k: how much of the load-balance loss is added in training.")]


@register("gate", "features", paper="Arevalo et al. 2017, arXiv:1702.01992", needs="training data")
class Gate(nn.Module):
    """Each model's features times an open or closed gate per entry, summed: z = sum_k sigmoid(g_k([h])) * h_k.

    The weights given are the gates' means over the entries, each in [0, 1]; they don't sum to 1.
    Takes (batch, width_k), gives (batch, dim); token by token with (batch, tokens, width_k).
    """

    auxiliary_loss: Tensor | None = None

    def __init__(
        self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0, top_k: TopK = None, balance: Balance = 0.0
    ) -> None:
        super().__init__()
        if balance and top_k is None:
            raise OptionError(Problem("balance", f"got {balance} without top_k", "top_k, or a balance of 0"))
        self.top_k, self.balance = top_k, balance
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
        if self.top_k is not None:
            weights = gates.mean(dim=-1)
            chosen = most(weights, mask, self.top_k)
            if self.training and self.balance:
                self.auxiliary_loss = self.balance * imbalance(weights, chosen)
            gates = gates * chosen.unsqueeze(-1)
        return self.dropout((gates * h).sum(dim=1)), gates.mean(dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last loss, whose graph can't be copied."""
        return {**self.__dict__, "auxiliary_loss": None}


def most(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """Which of the models (n, models) have the `count` largest weights among those that the mask keeps."""
    places = weights.masked_fill(~mask, -1.0).topk(min(count, weights.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter(1, places, True) & mask


def imbalance(weights: Tensor, chosen: Tensor) -> Tensor:
    """M sum_k f_k P_k of weights (n, models) from 0 up and of who was chosen: 1 when all are used alike, at most M."""
    there = chosen.any(dim=1)
    taken = chosen.to(weights.dtype).sum(dim=0) / chosen.sum().clamp(min=1)
    share = shares(weights, torch.ones_like(weights)).sum(dim=0) / there.sum().clamp(min=1)
    return weights.shape[1] * (taken * share).sum()

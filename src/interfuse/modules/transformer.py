"""Transformer fusion: the models' features as tokens, with a class token, through a small encoder.

    [c, h_1 ... h_M] -> encoder -> c attends to the h_k -> z

(FT-Transformer, Gorishniy et al. 2021, 2106.11959, with networks in place of columns.) Features change one another before
they are read; the class token reads them by a last attention, whose weights are given. Far more parameters than
`attention`: for more data, or for token features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from interfuse.modules.branches import Depth, Features, Fused, Heads, Present, Share, branches, check_heads, in_one_row, project
from interfuse.registry import register


@register("transformer", "features", paper="Gorishniy et al. 2021, arXiv:2106.11959", needs="training data")
class Transformer(nn.Module):
    """The models' tokens and a class token through `depth` encoder layers of `heads` heads, read by attention.

    The weights given are the last attention's, and sum to 1 over the models; a missing model is a learned token, which
    is not attended to. Takes (batch, width_k) or (batch, tokens_k, width_k); gives (batch, dim).
    """

    def __init__(self, widths: Sequence[int], dim: int, *, heads: Heads = 4, depth: Depth = 1, dropout: Share = 0.1) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.branches = branches(widths, dim, token=True)
        self.cls = nn.Parameter(torch.randn(dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.reader = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, features: Features, present: Present = None) -> Fused:
        """See `branches`: -> (batch, dim), (batch, models)."""
        h, mask, owner = in_one_row(*project(self.branches, features, present))
        away = ~mask & mask.any(dim=1, keepdim=True)  # where nothing is there, the learned tokens are read
        row = torch.cat([self.cls.to(h.dtype).expand(h.shape[0], 1, -1), h], dim=1)
        row = self.encoder(row, src_key_padding_mask=nn.functional.pad(away, (1, 0)))
        z, alpha = self.reader(row[:, :1], row[:, 1:], row[:, 1:], key_padding_mask=away)
        return (row[:, :1] + z).squeeze(1), (alpha.squeeze(1) * mask) @ owner

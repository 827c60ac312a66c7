"""What is read of each network for a batch, which of it is there, and what stands in for the rest.

    f_k(x) where network k has its input, t_k where it hasn't;  in training, each input that is there is dropped with p

t_k is learned: a vector as wide as the network's features. Dropping whole branches teaches a fusion to do without any of them
(ModDrop, Neverova et al. 2014, 1501.00102; of an example in which all would go, one at random stays). A fusion without tokens
leaves out what is missing by itself (`branches`). Nothing is fused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interfuse.modules.inputs import Marked, batch_size, with_each


class Reading(NamedTuple):
    """What is read from one network: features (None: missing), the tokens' mask, its own logits where they count, and in
    which examples (batch,) it has an input at all (None: all)."""

    features: Tensor | None
    mask: Tensor | None = None
    logits: Tensor | None = None
    present: Tensor | None = None


def rows_there(marked: Marked) -> tuple[object, Tensor]:
    """The inputs of those examples that have one, and their numbers."""
    rows = marked.present.nonzero().squeeze(1)
    count = batch_size(marked.inputs)
    kept = with_each(marked.inputs, lambda t: t[rows.to(t.device)] if t.ndim and len(t) == count else t)
    return kept, rows


def spread(reading: Reading, rows: Tensor, present: Tensor) -> Reading:
    """The reading of some rows as one of all of them, zeros where there is none."""

    def over(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        return part.new_zeros(present.shape[0], *part.shape[1:]).index_copy(0, rows.to(part.device), part)

    whole = Reading(over(reading.features), over(reading.mask), over(reading.logits))
    return whole._replace(present=None if whole.features is None else present.to(whole.features.device))


def presence(readings: Sequence[Reading]) -> Tensor:
    """Which networks have an input in which examples: (batch, models)."""
    some = next(r.features for r in readings if r.features is not None)
    columns = []
    for reading in readings:
        if reading.features is None:
            columns.append(torch.zeros(some.shape[0], dtype=torch.bool, device=some.device))
        elif reading.present is None:
            columns.append(torch.ones(some.shape[0], dtype=torch.bool, device=some.device))
        else:
            columns.append(reading.present.to(some.device))
    return torch.stack(columns, dim=1)


def dropped(there: Tensor, share: float) -> Tensor:
    """What is left of what is there, (batch, models), after each is dropped with this probability, never all of an example."""
    draw = torch.rand(there.shape, device=there.device)
    kept = there & (draw >= share)
    last = nn.functional.one_hot(draw.masked_fill(~there, -1.0).argmax(dim=1), there.shape[1]).bool() & there
    return torch.where(kept.any(dim=1, keepdim=True), kept, last)


def marked(readings: Sequence[Reading], there: Tensor) -> list[Reading]:
    """The readings with masks that leave out what isn't there."""
    found = []
    for k, reading in enumerate(readings):
        features, mask = reading.features, there[:, k]
        if features is not None and features.ndim == 3:
            mask = mask.unsqueeze(1).expand(features.shape[:2])
            mask = mask if reading.mask is None else mask & reading.mask
        found.append(reading._replace(mask=mask, present=there[:, k]))
    return found


def with_tokens(readings: Sequence[Reading], there: Tensor, tokens: Sequence[Tensor]) -> list[Reading]:
    """The readings with each network's token where it isn't there; among token features it is the first and only one."""
    like = next(r.features for r in readings if r.features is not None)
    length = next((r.features.shape[1] for r in readings if r.features is not None and r.features.ndim == 3), None)
    found = []
    for k, (reading, token) in enumerate(zip(readings, tokens, strict=True)):
        features = reading.features
        if features is None:
            batch, width = there.shape[0], token.shape[0]  # not len(), which would fix the batch of an exported program
            shape = (batch, width) if length is None else (batch, length, width)
            features = like.new_zeros(shape)
        away = ~there[:, k].reshape(-1, *[1] * (features.ndim - 1))
        features = torch.where(away, token.to(features.dtype), features)
        mask = reading.mask if features.ndim == 3 else None
        if features.ndim == 3:
            first = torch.arange(features.shape[1], device=away.device) == 0
            own = torch.ones_like(first).expand(features.shape[:2]) if mask is None or mask.ndim == 1 else mask
            mask = torch.where(away.squeeze(2), first, own)
        found.append(reading._replace(features=features, mask=mask))
    return found

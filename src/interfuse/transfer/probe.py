"""Whether a network computes what it did: its outputs on an example, before and after. Only compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from interfuse.modules.inputs import call, tensors_of

#: How far an output may be from what it was, as a part of the largest output, or of 1 where all are smaller.
TOLERANCE = 1e-5


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors of floating-point numbers that the network gives, copied."""
    return [tensor.clone() for _, tensor in tensors_of(call(model, example)) if tensor.is_floating_point()]


def change(model: nn.Module, example: Any, before: Sequence[Tensor]) -> float:
    """How far the outputs are from `before`; infinite where the network can't be run any more."""
    try:
        return difference(before, outputs(model, example))
    except (RuntimeError, ValueError, IndexError, TypeError):  # shapes that don't meet, in whatever way it is noticed
        return float("inf")


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest change of an output, as a part of the largest, or of 1; infinite for other shapes, or NaN."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after] or not before:
        return float("inf")
    found = [0.0]
    for a, b in zip(before, after, strict=True):
        if a.numel():
            gap = float((a.double() - b.double()).abs().max()) / max(1.0, float(a.double().abs().max()))
            found.append(gap if gap == gap else float("inf"))
    return max(found)

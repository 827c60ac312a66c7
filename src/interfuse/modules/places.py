"""Features as (batch, places ..., width), whatever order a network keeps its axes in, and from one set of places to another.

Places are none (a vector an example), tokens, or the points of a map. Between maps of different sizes they are
interpolated; tokens are taken for a map, with or without a class token before it, where their number allows it. Nothing is
learned here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from interfuse.errors import ModelError, Problem
from interfuse.modules.taps import Axes, axes_of

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Layout:
    """How one network keeps the features of a place: the places' numbers along each axis, the width, and the axes' order."""

    places: tuple[int, ...]
    width: int
    axes: Axes

    def arranged(self, tensor: Tensor) -> Tensor:
        """The network's own order -> (batch, places ..., width)."""
        if self.axes.batch_second:
            tensor = tensor.transpose(0, 1)
        return tensor.movedim(1, -1) if self.axes.channels_first else tensor

    def put_back(self, tensor: Tensor) -> Tensor:
        """(batch, places ..., width) -> the network's own order."""
        if self.axes.channels_first:
            tensor = tensor.movedim(-1, 1).contiguous()  # the order that convolutions are fast in, and round the same
        return tensor.transpose(0, 1) if self.axes.batch_second else tensor


def layout_of(tensor: Tensor, inputs: Any, module: nn.Module, name: str = "model") -> Layout:
    """The layout of what `module` gave for a batch; a `ModelError` where these aren't features of that batch."""
    axes = axes_of(tensor, inputs, module, name)
    shape = Layout((), 0, axes).arranged(tensor).shape
    return Layout(tuple(shape[1:-1]), int(shape[-1]), axes)


def join(features: Tensor, places: tuple[int, ...]) -> Tensor:
    """(batch, places ..., width) at other places; each width stays by itself, so that a linear map may come before or after.

    To none: the mean; from none: the same at each. Maps are interpolated, smoothed where they shrink. A number of tokens that
    is a square, or one more (a class token: the mean of a map that has none), is a square map; other tokens are interpolated
    along their order. Raises `ModelError` where places can't be joined.
    """
    here = tuple(features.shape[1:-1])
    if here == places:
        return features
    if not places:
        return features.flatten(1, -2).mean(dim=1)
    if not here:
        return features.reshape(len(features), *[1] * len(places), -1).expand(-1, *places, -1)
    if len(here) == len(places) > 1:
        return _resized(features, places)
    source, target = _as_map(here), _as_map(places)
    if source is None or target is None:
        if len(here) == len(places):
            return _resized(features, places)
        raise ModelError(
            Problem("at", f"places {here} can't be joined to {places}", "two modules with maps, or two with tokens")
        )
    first, grid = features.flatten(1, -2)[:, : source[0]], features.flatten(1, -2)[:, source[0] :]
    if not source[0] and target[0]:
        first = grid.mean(dim=1, keepdim=True)
    moved = _resized(grid.unflatten(1, source[1]), target[1]).flatten(1, -2)
    return torch.cat([first[:, : target[0]], moved], dim=1).unflatten(1, places)


def _as_map(places: tuple[int, ...]) -> tuple[int, tuple[int, int]] | None:
    """(class tokens, (height, width)); None for what isn't a map of two axes."""
    if len(places) == 2:
        return 0, (places[0], places[1])
    if len(places) == 1:
        for extra in (0, 1):
            side = math.isqrt(places[0] - extra)
            if side and side * side == places[0] - extra:
                return extra, (side, side)
    return None


def _resized(features: Tensor, places: tuple[int, ...]) -> Tensor:
    if tuple(features.shape[1:-1]) == places:
        return features
    if len(places) not in _MODES:
        raise ModelError(Problem("at", f"maps of {len(places)} axes and different sizes", "maps of equal sizes"))
    mode, smooth = _MODES[len(places)], len(places) == 2
    return functional.interpolate(features.movedim(-1, 1), size=places, mode=mode, antialias=smooth).movedim(1, -1)

"""Least squares from sums: an affine map between two tables of rows that come batch by batch and are never kept.

    W, c = argmin sum |y - W x - c|^2 + ridge tr(Sxx)/d |W|^2,    Sxx = sum (x - mean)(x - mean)'

in float64 from the sums of x, y, xx', xy' and |y|^2 (as Csiszarik et al. 2021, 2110.14633, fit stitches). Directions in
which x doesn't vary get no weight, so that W is the smallest of all the best. Memory is d^2, whatever the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """The sums, for rows x (n, d) and y (n, e); `add` them, then `solve`. Sums of two parts of the rows can be added up."""

    def __init__(self) -> None:
        self.rows = 0
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor, shift: tuple[Tensor, Tensor] | None = None) -> None:
        """Take up rows. shift: about where the means are, which spares digits; by default those of the first rows."""
        if not len(x):
            return
        x, y = x.detach().double(), y.detach().double()
        if self._shift is None:
            self._shift = shift or (x.mean(dim=0), y.mean(dim=0))
            self.x, self.y = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])
            self.xx, self.xy = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
            self.yy = y.new_zeros(())
        x, y = x - self._shift[0], y - self._shift[1]
        self.rows += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()

    @property
    def shift(self) -> tuple[Tensor, Tensor] | None:
        """Where the sums are taken from; parts that are added up must share it."""
        return self._shift

    def __add__(self, other: Moments) -> Moments:
        both = Moments()
        both.rows, both._shift = self.rows + other.rows, self._shift
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.x / self.rows
        xx = self.xx - torch.outer(mean, self.x)
        xy = self.xy - torch.outer(mean, self.y)
        return xx, xy, self.yy - self.y @ self.y / self.rows

    def solve(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """(W (e, d), c (e,)) in float64; `ridge` from 0 up is relative to the mean variance of x."""
        assert self._shift is not None
        xx, xy, _ = self._centred()
        values, vectors = torch.linalg.eigh(xx)
        values = values.clamp(min=0)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(kept, 1 / torch.where(kept, values + ridge * values.mean(), 1.0), 0.0)
        weight = ((vectors * inverse) @ (vectors.T @ xy)).T
        x, y = (shift + total / self.rows for shift, total in zip(self._shift, (self.x, self.y), strict=True))
        return weight, y - weight @ x

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """The map's squared error on these rows over their squared distance from their mean (1 - R^2)."""
        assert self._shift is not None
        at_shift = bias + weight @ self._shift[0] - self._shift[1]  # the map of shifted rows
        squared = self.yy + (weight @ self.xx * weight).sum() - 2 * (weight.T * self.xy).sum()
        squared = squared + self.rows * at_shift @ at_shift + 2 * at_shift @ (weight @ self.x - self.y)
        variance = float(self._centred()[2])
        return max(0.0, float(squared)) / variance if variance > 0 else float(squared > 0)

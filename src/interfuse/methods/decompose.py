"""Singular values and vectors of matrices too large for a full SVD, on NumPy arrays and torch tensors alike.

All of it goes through the eigenvectors of the shorter side's Gram matrix, in float64: a third of an SVD's time or less.
Squaring loses what lies below 1e-8 of the largest singular value; `ZERO` is above that.

A direction whose singular value is zero has no singular vectors of its own, only what a library happens to fill in. Here
it's left out, so that results depend on the matrix alone: not on signs, not on the library. Not a general SVD, therefore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

#: A NumPy array or a torch tensor.
Array = Any

#: Singular values up to this share of the largest are zero: float32 rounding of a matrix of lower rank gives as much.
ZERO = 1e-6


class Directions(NamedTuple):
    """A matrix, or its leading part, as `(left * values) @ right`: [out, r], [r] descending, [r, in], all float64."""

    left: Array
    values: Array
    right: Array


def namespace(array: Array) -> Any:
    """The library that `array` belongs to, `numpy` or `torch`: what's used here of both has the same names."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def wide(array: Array) -> Array:
    """In float64; the array itself where it is that already."""
    xp = namespace(array)
    return xp.asarray(array, dtype=xp.float64)


def like(array: Array, model: Array) -> Array:
    """In the type of `model`, rounded once."""
    return namespace(array).asarray(array, dtype=model.dtype)


def directions(matrix: Array, rank: int | None = None, least: float = 0.0) -> Directions:
    """The singular vectors and values of `[out, in]`, the `rank` leading ones (all), fewer where the others are zero.

    Zero are values up to `ZERO` of the largest, and any up to `least`: a matrix that is a difference of larger ones may be
    rounding as a whole.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = directions(matrix.T, rank, least)
        return Directions(left.T, values, right.T)
    matrix = wide(matrix)
    values, vectors = _shorter_side(matrix)
    there = _count(values[:rank], least)
    # Copies, for a slice would keep all vectors alive.
    left, values = vectors[:, :there] * 1.0, values[:there] * 1.0
    del vectors
    right = left.T @ matrix
    right /= values[:, None]
    return Directions(left, values, right)


def with_spectrum(matrix: Array, change: Callable[[Array], Array]) -> Array:
    """The matrix with singular values `change(s)` in place of its s, in float64; zeros stay zero.

    `change` is given all min(out, in) values, descending, and gives as many.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return with_spectrum(matrix.T, change).T
    matrix = wide(matrix)
    values, vectors = _shorter_side(matrix)
    there = _count(values)
    factors = change(values)[:there] / values[:there]
    return ((vectors[:, :there] * factors) @ vectors[:, :there].T) @ matrix


def orthogonal(matrix: Array) -> Array:
    """The nearest matrix with orthonormal columns or rows (the polar factor), zero in directions where `matrix` is."""
    return with_spectrum(matrix, namespace(matrix).ones_like)


def _shorter_side(matrix: Array) -> tuple[Array, Array]:
    """Singular values, descending, and left vectors [out, out] of `[out, in]`, out <= in, in float64."""
    xp = namespace(matrix)
    squares, vectors = xp.linalg.eigh(matrix @ matrix.T)
    return xp.sqrt(xp.clip(xp.flip(squares, (0,)), 0, None)), xp.flip(vectors, (1,))


def _count(values: Array, least: float = 0.0) -> int:
    """How many of these, descending, aren't zero."""
    return int(((values > ZERO * values[:1]) & (values > least)).sum())

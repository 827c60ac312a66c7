"""Exact statistics of a tensor that is gone through in blocks: order statistics, sums of magnitudes.

Memory doesn't depend on the tensor's size, and results don't depend on how it is cut into blocks. An order statistic takes
two histograms: of the upper 16 bits of all numbers, then of the lower 16 of those that share the upper ones sought. No
sort, no sample, and no reading: scores come from a function that goes through them anew at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

#: Goes through rows of scores, in blocks [rows, n] of float32 in the order of their elements.
Scores = Callable[[], Iterable[np.ndarray]]

_HALF = 1 << 16


def order_statistics(scores: Scores, rows: int, ranks: Sequence[int]) -> np.ndarray:
    """The numbers of these ranks, from 0 for the smallest, in each row: float32 [rows, ranks]. Two passes.

    Ranks lie below the number of scores in a row; a row without scores gives zeros. 0 and -0 are equal, and given as 0.
    """
    upper: np.ndarray = np.zeros((rows, _HALF), np.int64)
    for block in scores():
        for row, keys in enumerate(_keys(block)):
            upper[row] += np.bincount(keys >> np.uint32(16), minlength=_HALF)
    before = upper.cumsum(1)
    if not before[:, -1].all():
        return np.zeros((rows, len(ranks)), np.float32)
    halves = np.array([[np.searchsorted(row, rank, side="right") for rank in ranks] for row in before], np.uint32)
    lower: np.ndarray = np.zeros((rows, len(ranks), _HALF), np.int64)
    for block in scores():
        for row, keys in enumerate(_keys(block)):
            for at, half in enumerate(halves[row]):
                found = keys[keys >> np.uint32(16) == half] & np.uint32(_HALF - 1)
                lower[row, at] += np.bincount(found, minlength=_HALF)
    within = np.array(ranks) - np.take_along_axis(before - upper, halves.astype(np.int64), 1)
    rest = (lower.cumsum(2) <= within[..., None]).sum(2)
    return _numbers(halves << np.uint32(16) | rest.astype(np.uint32))


def magnitudes(blocks: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """The sum of |x| over each row of float32 blocks [rows, n]: float64 [rows], rounded once. Not finite: NaN. One pass.

    Significands are whole numbers, so that adding up those that share an exponent is exact in whatever order.
    """
    sums: np.ndarray = np.zeros((rows, 256), np.int64)
    for block in blocks:
        bits = np.ascontiguousarray(block).view(np.uint32) & np.uint32(0x7FFFFFFF)
        exponents = bits >> np.uint32(23)
        significands = (bits & np.uint32(0x7FFFFF)) | (exponents > 0).astype(np.uint32) << np.uint32(23)
        for row in range(rows):
            sums[row] += np.bincount(exponents[row], significands[row], 256).astype(np.int64)
    unit = 1 << 150  # a significand counts 2^-150 times 2^exponent; exponents 0 and 1 mean the same
    totals = [sum(int(whole) << max(exponent, 1) for exponent, whole in enumerate(row)) / unit for row in sums]
    return np.where(sums[:, 255] > 0, np.nan, totals)


def _keys(scores: np.ndarray) -> np.ndarray:
    """float32 to uint32 in the same order: negative ones turned round, the others above them."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def _numbers(keys: np.ndarray) -> np.ndarray:
    bits = np.where(keys >> np.uint32(31), keys & np.uint32(0x7FFFFFFF), ~keys)
    return bits.astype(np.uint32).view(np.float32)

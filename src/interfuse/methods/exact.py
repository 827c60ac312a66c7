"""Order statistics of a tensor that is gone through in blocks, exactly.

Memory doesn't depend on the tensor's size, and results don't depend on how it is cut into blocks. It takes histograms of the
numbers' bits, 16 of them at a time, from the upper ones down: of those numbers that share the bits found so far. No sort, no
sample, and no reading: scores come from a function that goes through them anew at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

#: Goes through rows of scores, in blocks [rows, n] of float32 or float64, in the order of their elements.
Scores = Callable[[], Iterable[np.ndarray]]

_BITS = 16
_WIDTH = 1 << _BITS


def order_statistics(scores: Scores, rows: int, ranks: Sequence[int]) -> np.ndarray:
    """The numbers of these ranks, from 0 for the smallest, in each row: [rows, ranks]. A pass for each 16 bits of theirs.

    Ranks lie below the number of scores in a row; a row without scores gives zeros. 0 and -0 are equal, and given as 0.
    """
    kind: Any = next((block.dtype for block in scores()), np.dtype(np.float32))
    bits = 8 * kind.itemsize
    found: np.ndarray = np.zeros((rows, len(ranks)), np.uint64)
    left: np.ndarray = np.tile(np.array(ranks, np.int64), (rows, 1))
    for shift in range(bits - _BITS, -1, -_BITS):
        counts = _counted(scores, found[:, :1] if shift == bits - _BITS else found, shift, kind)
        for row, at in np.ndindex(*found.shape):
            until = counts[row, min(at, counts.shape[1] - 1)].cumsum()
            if not until[-1]:
                return np.zeros(found.shape, kind)
            bucket = int(np.searchsorted(until, left[row, at], side="right"))
            left[row, at] -= int(until[bucket - 1]) if bucket else 0
            found[row, at] = found[row, at] << np.uint64(_BITS) | np.uint64(bucket)
    return _numbers(found, kind)


def _counted(scores: Scores, prefixes: np.ndarray, shift: int, kind: Any) -> np.ndarray:
    """How many scores of a row begin with each prefix, by their 16 bits from `shift` on: int64 [rows, prefixes, 2^16]."""
    unsigned = np.dtype(f"u{kind.itemsize}").type
    counts: np.ndarray = np.zeros((*prefixes.shape, _WIDTH), np.int64)
    for block in scores():
        for row, scored in enumerate(block):
            keys = _keys(scored, unsigned) >> unsigned(shift)
            for at, prefix in enumerate(prefixes[row]):
                same = keys if shift == 8 * kind.itemsize - _BITS else keys[keys >> unsigned(_BITS) == prefix]
                counts[row, at] += np.bincount(same & unsigned(_WIDTH - 1), minlength=_WIDTH)
    return counts


def _keys(scores: np.ndarray, unsigned: Any) -> np.ndarray:
    """Numbers to unsigned ones in the same order: negative ones turned round, the others above them."""
    bits = (scores + scores.dtype.type(0)).view(unsigned)  # -0 becomes 0
    top = unsigned(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def _numbers(keys: np.ndarray, kind: Any) -> np.ndarray:
    unsigned = np.dtype(f"u{kind.itemsize}").type
    keys, top = keys.astype(unsigned), unsigned(1 << (8 * kind.itemsize - 1))
    return np.where(keys & top, keys & ~top, ~keys).astype(unsigned).view(kind)

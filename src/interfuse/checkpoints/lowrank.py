"""One compiled loop: a run of elements of the product of two thin matrices. Not a general product (BLAS is that).

Each element is summed in the order of the rank, whatever run it's asked for in, so that a tensor's bits don't depend on
the blocks or threads that it's read by. A general product promises no such thing.
"""

from __future__ import annotations

import numba
import numpy as np

_TILE = 1024


@numba.njit(nogil=True, cache=True)
def add_product(out: np.ndarray, first: int, left: np.ndarray, right: np.ndarray) -> None:  # pragma: no cover
    """Add to `out`, flat, the elements of `left` `[rows, r]` times `right` `[r, columns]` from element `first` on.

    The last row may be begun and not ended. All three have one type.
    """
    rank, columns = right.shape
    tile = np.empty(_TILE, out.dtype)
    done = 0
    row = first // columns
    column = first % columns
    while done < out.size:
        end = min(columns, column + out.size - done)
        while column < end:
            length = min(_TILE, end - column)
            tile[:length] = 0
            for k in range(rank):
                factor = left[row, k]
                for j in range(length):
                    tile[j] += factor * right[k, column + j]
            for j in range(length):
                out[done + j] += tile[j]
            done += length
            column += length
        row += 1
        column = 0

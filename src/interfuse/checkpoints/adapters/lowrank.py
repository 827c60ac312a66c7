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
            k = 0
            while k + 4 <= rank:  # four at a time, in order: a sum is loaded and stored once for them
                a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
                first_row = right[k, column : column + length]
                second = right[k + 1, column : column + length]
                third = right[k + 2, column : column + length]
                fourth = right[k + 3, column : column + length]
                for j in range(length):
                    tile[j] = (((tile[j] + a * first_row[j]) + b * second[j]) + c * third[j]) + d * fourth[j]
                k += 4
            while k < rank:
                factor, line = left[row, k], right[k, column : column + length]
                for j in range(length):
                    tile[j] += factor * line[j]
                k += 1
            place = out[done : done + length]
            for j in range(length):
                place[j] += tile[j]
            done += length
            column += length
        row += 1
        column = 0

"""How the block loops are compiled."""

from __future__ import annotations

from numba import njit

compiled = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

# Sums may be reordered into vector lanes where this is used, and only there: float64 carries them far below float32's
# rounding.
compiled_sum = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})

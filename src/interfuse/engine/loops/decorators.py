"""How loops are compiled: without a lock, without checks, and with sums in order unless they say otherwise."""

from __future__ import annotations

from numba import njit

compiled = njit(nogil=True, error_model="numpy", boundscheck=False)

# Sums may be reordered into vector lanes where this is used, and only there: float64 carries them far below float32's
# rounding.
compiled_sum = njit(nogil=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})

"""Stored numbers to numbers that can be summed, and back with one rounding (to nearest, ties to even). Not a sum itself.

NumPy lacks bfloat16: its bits are the upper half of a float32. Formats: IEEE 754-2019; bfloat16 as in
https://arxiv.org/abs/1905.12322.
"""

from __future__ import annotations

import numpy as np

#: The types that are computed with, as people name them and as safetensors does.
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORED_FLOATS = tuple(FLOATS.values())


def float_named(name: str) -> str | None:
    """safetensors' name of a type: of `bfloat16`, `torch.bfloat16` or `BF16`; None for what isn't computed with.

    >>> float_named("torch.bfloat16")
    'BF16'
    """
    plain = name.removeprefix("torch.")
    return FLOATS.get(plain, plain if plain in STORED_FLOATS else None)


def widen(raw: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Write the stored block `raw` of type `dtype` into `out`, float32 or float64, exactly where `out` can hold it."""
    if dtype == "BF16":
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
        out[...] = raw


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 or float64 block rounded once to the storage type of `dtype`. NaN stays NaN; too large is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            return _to_bfloat16(values)
        return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def nonfinite(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Where a stored block holds infinity or NaN."""
    if dtype == "BF16":
        return (raw & np.uint16(0x7F80)) == np.uint16(0x7F80)
    return ~np.isfinite(raw)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = (_round_to_odd(values) if values.dtype == np.float64 else values).view(np.uint32)
    # Add just under half of the last place kept, and the rest of the half where that place is odd.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 to float32 such that a second rounding gives what one would: inexact results get an odd last place."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = np.isfinite(values) & (near.astype(np.float64) != values)
    bits -= (inexact & (np.abs(near.astype(np.float64)) > np.abs(values))).astype(np.uint32)
    bits |= inexact.astype(np.uint32)
    return near

"""Formats: widening is exact, rounding is torch's, once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interfuse.checkpoints.numbers import narrow, nonfinite, widen

ALL_16 = np.arange(2**16, dtype=np.uint16)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


def float32_edges() -> np.ndarray:
    """Every bfloat16, each with lower halves that round down, tie, round up, and just beside."""
    lows = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return ((ALL_16.astype(np.uint32) << 16)[:, None] | lows).reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_is_exact_for_all_values(dtype: str) -> None:
    raw = ALL_16 if dtype == "BF16" else ALL_16.view(np.float16)
    expected = torch.from_numpy(ALL_16.view(np.int16).copy()).view(TORCH[dtype])
    for kind, torch_kind in ((np.float32, torch.float32), (np.float64, torch.float64)):
        out = np.empty(2**16, kind)
        widen(raw, dtype, out)
        np.testing.assert_array_equal(out, expected.to(torch_kind).numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_of_float32_is_torch_s(dtype: str) -> None:
    values = float32_edges()
    got = narrow(values, dtype).view(np.uint16)
    expected = torch.from_numpy(values).to(TORCH[dtype])
    nan = torch.isnan(expected).numpy()
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(got[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan])
    back = torch.from_numpy(got.view(np.int16)).view(TORCH[dtype])
    assert torch.isnan(back).numpy()[nan].all()


def test_stored_values_come_back_unchanged() -> None:
    out = np.empty(2**16, np.float32)
    widen(ALL_16, "BF16", out)
    number = ~np.isnan(out)
    np.testing.assert_array_equal(narrow(out, "BF16")[number], ALL_16[number])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-2, 2))
def test_rounding_of_float64_happens_once(value: float, beside: int) -> None:
    # Near the middle between two bfloat16 numbers, rounding to float32 first gives the wrong one.
    below = float(np.array(np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    middle = float(np.array(np.float32(below).view(np.uint32) | np.uint32(0x8000)).view(np.float32))
    exact = middle
    for _ in range(abs(beside)):
        exact = float(np.nextafter(exact, np.inf if beside > 0 else -np.inf))
    got = np.empty(1)
    widen(narrow(np.array([exact]), "BF16"), "BF16", got)
    above = below + 2 * (middle - below)
    if exact == middle:
        even = below if not (int(np.float32(below).view(np.uint32)) >> 16) & 1 else above
        assert got[0] == even or not np.isfinite(got[0])
    else:
        nearer = below if abs(exact - below) < abs(above - exact) else above
        assert got[0] == nearer or not np.isfinite(got[0])


@pytest.mark.parametrize(
    ("dtype", "largest"), [("BF16", 3.3895313892515355e38), ("F16", 65504.0), ("F32", 3.4028234663852886e38)]
)
def test_too_large_is_infinite(dtype: str, largest: float) -> None:
    raw = narrow(np.array([largest, largest * 1.01, -largest * 1.01, np.nan, 0.0]), dtype)
    assert nonfinite(raw, dtype).tolist() == [False, True, True, True, False]

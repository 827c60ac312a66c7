"""Kernels: what they store is rounded once, what they hash is XXH3, and how blocks are gathered in runs changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse import merge
from interfuse.checkpoints.numbers import narrow, widen
from interfuse.checkpoints.source import BLOCK, spans
from interfuse.engine import kernels, reading, selection
from interfuse.engine.kernels import IN_MEMORY, KINDS, LANES, NOTHING, Stream, Target

ALL_16 = np.arange(2**16, dtype=np.uint16)
LIMITS = {"BF16": 3.39e38, "F16": 65520.0, "F32": np.inf, "F64": np.inf}


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def stream_of(array: np.ndarray, kind: int) -> Stream:
    """One input, without a base."""
    return Stream(
        np.array([NOTHING, IN_MEMORY], np.int32), np.zeros(2, np.int64), np.array([0, array.itemsize], np.int64),
        np.array([0, address(array)], np.uint64), np.array([kernels.ZERO, kind], np.uint8), np.zeros(2 + LANES, np.uint64),
    )  # fmt: skip


def converted(raw: np.ndarray, dtype: str, to: str, wide: Any = np.float32) -> tuple[np.ndarray, bytes]:
    """A tensor loaded and stored in another type, by the kernel of sums; and the hash that it gives."""
    storage = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[to]
    out: np.ndarray = np.zeros(raw.size, storage)
    hashes: np.ndarray = np.zeros((1, 2), np.uint64)
    target = Target(
        np.uint64(address(out)), np.uint8(KINDS[to]), out.itemsize, np.ones(1, np.bool_), hashes, np.zeros(LANES, np.uint64)
    )
    work = np.zeros((5, kernels.CHUNK), wide)
    kernels.sum_blocks(
        stream_of(raw, KINDS[dtype]), np.array([0, raw.size]), np.zeros((1, 2, 2), np.uint64), False, (wide(1),), wide(1),
        target, wide(LIMITS[to]), work,
    )  # fmt: skip
    return out, hashes.byteswap().tobytes()


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, NaN aside, which may have any."""
    kind = np.uint16 if got.itemsize == 2 else np.uint32
    wrong = got.view(kind) != expected.view(kind)
    if got.dtype != np.uint16:
        wrong &= ~(np.isnan(got) & np.isnan(expected))
    assert not wrong.any()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number_is_widened_exactly(dtype: str) -> None:
    raw = ALL_16 if dtype == "BF16" else ALL_16.view(np.float16)
    expected: np.ndarray = np.empty(2**16, np.float32)
    widen(raw, dtype, expected)
    same(converted(raw, dtype, "F32")[0], expected)


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_results_are_rounded_once(dtype: str, wide: Any) -> None:
    """Numbers whose lower halves round down, tie, round up, and lie just beside a tie."""
    lows = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((ALL_16.astype(np.uint32) << 16)[:, None] | lows).reshape(-1).view(np.float32)
    values = values[np.isfinite(values)]
    given_ = values if wide is np.float32 else np.concatenate([np.nextafter(values.astype(wide), s) for s in (-np.inf, np.inf)])
    got, _ = converted(given_, "F32" if wide is np.float32 else "F64", dtype, wide)
    same(got, narrow(given_, dtype))


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.integers(241, 3000), st.integers(BLOCK - 70, BLOCK)), st.integers(0, 2**32))
def test_the_hash_is_xxh3(nbytes: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    hashes: np.ndarray = np.zeros((1, 2, 2), np.uint64)
    assert kernels.hash_stream(stream_of(data, kernels.ZERO), np.array([0, nbytes]), hashes, True) == 0
    assert hashes[0, 1].byteswap().tobytes() == xxhash.xxh3_128_digest(data.data)


def test_a_result_s_hash_is_of_what_is_stored() -> None:
    out, found = converted(np.arange(5000, dtype=np.float32), "F32", "F16")
    assert found == xxhash.xxh3_128_digest(out.data)


def test_a_file_that_ends_early_is_told(tmp_path: Any) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(1000))
    room: np.ndarray = np.zeros(4000, np.uint8)
    with path.open("rb") as file:
        stream = Stream(
            np.array([file.fileno()], np.int32), np.zeros(1, np.int64), np.ones(1, np.int64),
            np.array([address(room)], np.uint64), np.zeros(1, np.uint8), np.zeros(1 + LANES, np.uint64),
        )  # fmt: skip
        hashes: np.ndarray = np.zeros((2, 1, 2), np.uint64)
        assert kernels.hash_stream(stream, np.array([0, 500, 1000]), hashes, True) == 0
        assert kernels.hash_stream(stream, np.array([0, 500, 1001]), hashes, True) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 40))
def test_spans_cover_a_tensor_in_whole_rows_where_they_fit(shape: list[int], size: int) -> None:
    found, count = spans(shape, size), int(np.prod(shape))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found)][: len(found)]
    assert sum(stop - start for start, stop in found) == count
    assert all(0 < stop - start <= size for start, stop in found)
    row = shape[-1] if shape else 1
    if 0 < row <= size:
        assert all(start % row == 0 for start, _ in found)
    elif row:
        assert all(start // row == (stop - 1) // row for start, stop in found)


def tensors(count: int, width: int = 30, seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((40, width)).astype(np.float32)
    change = lambda: (draw.standard_normal(base.shape) * draw.integers(0, 2, base.shape) * 2**-9).astype(np.float32)
    return {"w": base}, [{"w": base + change()} for _ in range(count)]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("task_arithmetic", {"lambda": -0.3}), ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "normalize": False}), ("dare_ties", {"density": 0.4}), ("dare_linear", {"density": 0.4}),
    ("della", {"density": 0.5, "epsilon": 0.2}), ("breadcrumbs", {"density": 0.5, "gamma": 0.1}), ("sce", {"select_topk": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), CASES)
def test_loops_over_few_models_and_over_many_give_the_same(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = tensors(3)
    weights = [0.5, -0.2, 0.8]
    run = lambda: merge(method, models, base=None if method == "linear" else base, weights=weights, **options)["w"]
    few = run()
    for module in ("rules", "outputs"):
        monkeypatch.setattr(f"interfuse.engine.{module}.FEW", 0)
    many = run()
    np.testing.assert_allclose(many, few, rtol=0, atol=1e-6)
    assert np.mean(many != few) < 0.01  # a sum of three may be taken in another order


@pytest.mark.parametrize(("method", "options"), CASES)
def test_runs_of_blocks_change_nothing(method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = tensors(2, width=7000)
    run = lambda: merge(method, models, base=None if method == "linear" else base, **options)["w"]
    whole = run()
    monkeypatch.setattr(reading, "RUN", 1)
    assert run().tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("narrowed", [{}, {"_ROOM": 64}, {"_MOST": 0}, {"_SMALL": 0}])
@pytest.mark.parametrize("method", ["ties", "sce"])
def test_cuts_are_exact_whatever_finds_them(
    method: str, narrowed: dict[str, int], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(3)
    base = draw.standard_normal((3, 20_000)).astype(kind)
    models = [base + (draw.standard_normal(base.shape) * 0.1).astype(kind) for _ in range(3)]
    for name, value in narrowed.items():
        monkeypatch.setattr(selection, name, value)
    options: dict[str, Any] = {"density": 0.2} if method == "ties" else {"select_topk": 0.2}
    got = merge(method, [{"w": m} for m in models], base={"w": base}, **options)["w"]
    deltas = np.stack([m - base for m in models])
    scores = np.abs(deltas) if method == "ties" else np.broadcast_to(variance(deltas), deltas.shape)
    kept = np.zeros(deltas.shape, bool)
    for mask, score in zip(kept.reshape(3, -1), scores.reshape(3, -1), strict=True):
        mask[np.argsort(-score, kind="stable")[: int(0.2 * base.size)]] = True
    trimmed = np.where(kept, deltas, 0).astype(np.float64)
    energy = (trimmed**2).sum((1, 2))
    weights = np.ones(3) if method == "ties" else energy / energy.sum()
    sign = np.where((trimmed if method == "sce" else trimmed * weights[:, None, None]).sum(0) >= 0, 1, -1)
    agree = trimmed * sign > 0
    divisor = (agree * weights[:, None, None]).sum(0)
    expected = base + (agree * trimmed * weights[:, None, None]).sum(0) / np.where(divisor, divisor, 1)
    np.testing.assert_allclose(got, expected, atol=1e-5 if kind is np.float32 else 1e-12)


def variance(deltas: np.ndarray) -> np.ndarray:
    mean = (deltas[0] + deltas[1] + deltas[2]) / deltas.dtype.type(3)
    result: np.ndarray = sum(((d - mean) * (d - mean) for d in deltas), np.zeros_like(mean))
    return result


def test_della_ranks_rows_that_are_longer_than_a_block() -> None:
    """A row's entries are kept more often the larger they are, to the rank in the whole row."""
    width = BLOCK + 5000
    values = np.tile(np.linspace(1, 2, width, dtype=np.float32), (2, 1))
    got = merge("della_linear", [{"w": values}], base={"w": np.zeros_like(values)}, density=0.5, epsilon=0.4, rescale=False)[
        "w"
    ]
    parts = np.array_split((got != 0).mean(0), 10)
    for i, part in enumerate(parts):
        assert abs(part.mean() - (0.1 + 0.8 * (i + 0.5) / 10)) < 5 * np.sqrt(0.25 / (2 * len(part)))
    assert not np.array_equal(got[0], got[1])

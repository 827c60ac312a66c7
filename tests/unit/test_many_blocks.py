"""What a merge keeps of a tensor's blocks is bounded, and doesn't depend on how they are gone through."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from interfuse import merge
from interfuse.checkpoints.source import BLOCK
from interfuse.engine import rules, selection
from interfuse.engine.scheduler import Total

Tensors = dict[str, np.ndarray]


def tensors(shape: tuple[int, ...], models: int = 2, kind: Any = np.float32) -> tuple[Tensors, list[Tensors]]:
    draw = np.random.default_rng(0)
    base = draw.standard_normal(shape, dtype=np.float32).astype(kind)
    tuned = [base + kind(0.1) * draw.standard_normal(shape, dtype=np.float32).astype(kind) for _ in range(models)]
    return {"w": base}, [{"w": one} for one in tuned]


def test_a_total_is_added_up_in_order() -> None:
    parts = [np.array([10.0**e]) for e in range(-8, 17)]
    ranges = [(i, i + 1) for i in range(len(parts))]
    expected = np.zeros(1)
    for part in parts:
        expected += part
    for seed in range(5):
        total = Total(1)
        for i, j in random.Random(seed).sample(ranges, len(ranges)):
            total.add(i, j, parts[i])
        assert total.value.tobytes() == expected.tobytes()


#: A method, its options, a shape of many blocks, and how many MB it may take beside its result.
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    ("ties", {"density": 0.5}, (4_000_000,), 12),
    ("sce", {"select_topk": 0.5}, (4_000_000,), 12),
    ("della", {"density": 0.5}, (1, 4_000_000), 12),
    ("della", {"density": 0.5}, (30, 140_000), 24),
    ("model_stock", {"filter_wise": True}, (1, 4_000_000), 24),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, (40, 100_000), 64),
]


@pytest.mark.parametrize(("method", "options", "shape", "most"), CASES)
def test_memory_does_not_grow_with_the_blocks(
    method: str, options: dict[str, Any], shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_MOST", 0)  # as for tensors of billions: by histograms
    base, models = tensors(shape)
    merge(method, models, base=base, threads=1, **options)  # kernels are compiled
    tracemalloc.start()
    merge(method, models, base=base, threads=1, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < base["w"].nbytes + most * 10**6, f"{peak / 1e6:.0f} MB"


def test_of_many_models_pieces_are_smaller_and_rows_the_same() -> None:
    base, models = tensors((7, 1300), 40, np.float64)
    got = merge("model_stock", models, base=base, filter_wise=True)["w"]
    rows = [merge("model_stock", [{"w": m["w"][i]} for m in models], base={"w": base["w"][i]})["w"] for i in range(7)]
    np.testing.assert_allclose(got, rows, atol=1e-13)


def test_columns_of_rows_longer_than_a_block_are_those_of_a_narrow_tensor() -> None:
    options: dict[str, Any] = {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weights": [1.0, 3.0]}
    base, models = tensors((3, BLOCK + 2))
    whole = merge("nuslerp", models, base=base, **options)["w"]
    part = slice(BLOCK - 3, BLOCK + 2)
    narrow = merge("nuslerp", [{"w": m["w"][:, part]} for m in models], base={"w": base["w"][:, part]}, **options)["w"]
    np.testing.assert_array_equal(whole[:, part], narrow)


@pytest.mark.parametrize("rescale", [True, "l1"])
def test_long_rows_ranked_together_or_one_by_one_give_the_same(rescale: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = tensors((5, BLOCK + 7))
    found = []
    for together, threads in ((32, 1), (4, 2), (1, 3)):
        monkeypatch.setattr(rules, "_TOGETHER", together)
        found.append(merge("della", models, base=base, density=0.5, rescale=rescale, threads=threads)["w"].tobytes())
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("method", ["ties", "sce"])
def test_cuts_are_the_same_where_too_many_are_within_a_bracket(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = tensors((600_000,))
    options: dict[str, Any] = {"density": 0.4} if method == "ties" else {"select_topk": 0.4}
    wanted = merge(method, models, base=base, **options)["w"].tobytes()
    for room in (32, 500):
        monkeypatch.setattr(selection, "_ROOM", room)
        assert merge(method, models, base=base, **options)["w"].tobytes() == wanted


@pytest.mark.parametrize("count", [5000, 600_000])
def test_nan_that_is_allowed_changes_no_cut_from_run_to_run(count: int) -> None:
    base, models = tensors((count,))
    models[0]["w"][[3, 100, count - 5]] = np.nan
    found = []
    for threads in (1, 2, 1):
        found.append(merge("ties", models, base=base, density=0.4, allow_nonfinite=True, threads=threads)["w"].tobytes())
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("method", ["magmax", "nearswap", "consensus", "emr", "ram", "iso_c"])
def test_float64_is_merged_in_float64(method: str) -> None:
    """In thirds, which float32 can't hold: the same in another unit, to float64's precision."""
    base, models = tensors((30, 20), 1 if method == "nearswap" else 3, np.float64)
    options: dict[str, Any] = {"nearswap": {"t": 0.1}, "ram": {"epsilon": 0.0}}.get(method, {})
    wanted = merge(method, models, base=base, **options)["w"]
    smaller = [{"w": one["w"] / 3} for one in (base, *models)]
    options = {"nearswap": {"t": 0.1 / 3}}.get(method, options)
    got = merge(method, smaller[1:], base=smaller[0], **options)["w"]
    np.testing.assert_allclose(got * 3, wanted, rtol=0, atol=1e-12)

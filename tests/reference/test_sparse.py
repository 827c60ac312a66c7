"""Trim, elect, scale against slow float64 versions written from the papers, and against what the methods claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from interfuse import merge
from interfuse.engine import selection

SHAPES = [(1,), (1, 1), (1, 7), (7, 1), (40, 30), (0, 3), ()]


def models(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    base = np.asarray(draw.standard_normal(shape), np.float32)
    return base, [np.asarray(base + draw.standard_normal(shape) * 0.1, np.float32) for _ in range(count)]


def merged(method: str, base: np.ndarray, tuned: list[np.ndarray], **options: Any) -> np.ndarray:
    result: np.ndarray = merge(method, [{"t": t} for t in tuned], base={"t": base}, **options)["t"]
    return result


def largest(values: np.ndarray, keep: int, skip: int = 0) -> np.ndarray:
    """A mask of the `keep` largest after the `skip` very largest, equal ones by lowest index."""
    order = np.argsort(-np.abs(values).reshape(-1), kind="stable")[skip : skip + keep]
    mask = np.zeros(values.size, bool)
    mask[order] = True
    return mask.reshape(values.shape)


def elected(deltas: np.ndarray, weights: list[float], mean: bool) -> np.ndarray:
    """TIES' election and merge of trimmed deltas [M, ...], entry by entry."""
    result = np.zeros(deltas.shape[1:])
    for at in np.ndindex(result.shape):
        votes = [w * d[at] for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [(v, w) for v, w in zip(votes, weights, strict=True) if v * sign > 0]
        total, weight = sum(v for v, _ in agreeing), sum(w for _, w in agreeing)
        result[at] = total / weight if mean and weight else total
    return result


def deltas_of(base: np.ndarray, tuned: list[np.ndarray]) -> np.ndarray:
    return np.stack([t - base for t in tuned])  # float32, as the magnitudes are compared


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_the_paper(shape: tuple[int, ...], normalize: bool) -> None:
    base, tuned = models(shape)
    deltas, weights = deltas_of(base, tuned), [1.0, 0.5, 2.0]
    keep = min(base.size, max(1, int(0.3 * base.size)))
    trimmed = np.stack([np.where(largest(d, keep), d, 0) for d in deltas]).astype(np.float64)
    expected = base + 0.7 * elected(trimmed, weights, normalize)
    got = merged("ties", base, tuned, weights=weights, density=0.3, normalize=normalize, **{"lambda": 0.7})
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_drops_both_ends(shape: tuple[int, ...], method: str) -> None:
    base, tuned = models(shape)
    deltas, count = deltas_of(base, tuned), base.size
    keep = min(count, max(1, int(0.5 * count)))
    skip = min(int(0.1 * count), count - keep)
    trimmed = np.stack([np.where(largest(d, keep, skip), d, 0) for d in deltas]).astype(np.float64)
    summed = trimmed.sum(0) if method == "breadcrumbs" else elected(trimmed, [1.0] * 3, False)
    np.testing.assert_allclose(merged(method, base, tuned, density=0.5, gamma=0.1), base + summed, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [1.0, 0.4])
def test_sce_selects_calculates_erases(shape: tuple[int, ...], top: float) -> None:
    base, tuned = models(shape)
    deltas = deltas_of(base, tuned).astype(np.float64)
    variance = deltas_of(base, tuned).astype(np.float64).var(0)
    mask = largest(variance, int(top * np.count_nonzero(variance))) if top < 1 else np.ones(shape, bool)
    kept = deltas * mask
    energy = (kept**2).reshape(3, -1).sum(1)
    shares = energy / energy.sum() if energy.sum() else np.full(3, 1 / 3)
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agreeing = (kept * sign > 0) * shares.reshape(3, *[1] * len(shape))
    weight = agreeing.sum(0)
    expected = base + (kept * agreeing).sum(0) / np.where(weight == 0, 1, weight)
    np.testing.assert_allclose(merged("sce", base, tuned, select_topk=top), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs_ties", "sce"])
def test_equal_models_at_full_density_give_that_model(method: str) -> None:
    base, (one,) = models((20, 30), 1)
    options: dict[str, Any] = {} if method == "sce" else {"normalize": True}
    np.testing.assert_allclose(merged(method, base, [one] * 3, **options), one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_masks_are_unbiased_and_differ_by_seed(method: str) -> None:
    base, tuned = models((30, 40), 2)
    runs = np.stack([merged(method, base, tuned, density=0.4, epsilon=0.2, seed=s) if "della" in method
                     else merged(method, base, tuned, density=0.4, seed=s) for s in range(200)]).astype(np.float64)  # fmt: skip
    wanted = base + deltas_of(base, tuned).sum(0)
    error = (runs.mean(0) - wanted) / (runs.std(0) / np.sqrt(len(runs)) + 1e-9)
    assert abs(error.mean()) < 4 / np.sqrt(error.size) * 2
    assert 0.8 < error.std() < 1.2
    assert not np.array_equal(runs[0], runs[1])


def test_dare_keeps_its_share_and_other_models_have_other_masks() -> None:
    base = np.zeros((200, 300), np.float32)
    ones = np.ones_like(base)
    masks = [merged("dare_linear", base, [ones, ones], weights=w, density=0.3) > 0 for w in ([1, 0], [0, 1])]
    for mask in masks:
        assert abs(mask.mean() - 0.3) < 4 * np.sqrt(0.21 / mask.size)
    assert abs((masks[0] & masks[1]).mean() - 0.09) < 4 * np.sqrt(0.09 / base.size)


def test_della_keeps_larger_entries_more_often() -> None:
    base = np.zeros((2000, 64), np.float32)
    tuned = np.tile(np.arange(1, 65, dtype=np.float32), (2000, 1))
    kept = (merged("della_linear", base, [tuned], density=0.5, epsilon=0.3, rescale=False) != 0).mean(0)
    expected = 0.2 + 0.6 * np.arange(64) / 63
    assert np.abs(kept - expected).max() < 4 * np.sqrt(0.25 / 2000)


@pytest.mark.parametrize(("density", "epsilon"), [(0.0, 0.15), (0.15, 0.15), (0.85, 0.15)])
@pytest.mark.parametrize("shape", [(40, 30), (5, 1), (2, 140_000)])
def test_della_with_chances_of_0_and_1_is_finite(density: float, epsilon: float, shape: tuple[int, ...]) -> None:
    base = np.zeros(shape, np.float32)
    tuned = np.arange(1, base.size + 1, dtype=np.float32).reshape(shape)
    got = merged("della_linear", base, [tuned], density=density, epsilon=epsilon)
    kept = (got != 0).mean()
    assert np.isfinite(got).all()
    assert abs(kept - density) <= 5 * np.sqrt(density * (1 - density) / base.size)


@pytest.mark.parametrize("kind", ["ties", "equal", "smooth"])
@pytest.mark.parametrize("route", ["bracket", "histogram"])
def test_cuts_are_those_of_a_stable_sort(kind: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    count = 400_003
    values = {
        "ties": draw.integers(-3, 4, count) * np.float32(2**-12) * draw.integers(0, 2, count),
        "equal": np.full(count, 0.5),
        "smooth": draw.standard_normal(count),
    }[kind].astype(np.float32)
    if route == "histogram":
        monkeypatch.setattr(selection, "_MOST", 0)
    base = np.zeros(count, np.float32)
    for density in (1e-6, 0.1, 0.5, 0.9):
        keep = max(1, int(density * count))
        got = merged("ties", base, [values], density=density)
        np.testing.assert_array_equal(got, np.where(largest(values, keep), values, 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_are_merged_as_well(dtype: str) -> None:
    import torch

    base, tuned = models((30, 40), 2)
    kind = getattr(torch, dtype)
    low = [torch.from_numpy(t).to(kind) for t in (base, *tuned)]
    got = merge("ties", [{"t": t} for t in low[1:]], base={"t": low[0]}, density=0.5)["t"]
    wide = [t.double().numpy() for t in low]
    deltas = np.stack([(t - wide[0]).astype(np.float32 if dtype != "float64" else np.float64) for t in wide[1:]])
    trimmed = np.stack([np.where(largest(d, 600), d, 0) for d in deltas]).astype(np.float64)
    expected = wide[0] + elected(trimmed, [1.0, 1.0], True)
    assert got.dtype == kind
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=tolerance, atol=tolerance / 10)

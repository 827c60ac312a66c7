"""Spectral methods against each paper's steps written out slowly, in float64 and with full SVDs; and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.errors import OptionError
from interfuse.methods.knots import align, align_factors, knots, merge_aligned
from interfuse.methods.spectral import cart, iso_c, iso_cts, star, subspace_boost, tsv_m

SHAPES = [(3, 5, 7), (3, 16, 12), (2, 12, 12), (3, 1, 4), (3, 4, 1), (2, 1, 1), (1, 6, 9)]
METHODS: list[Callable[..., np.ndarray]] = [tsv_m, iso_c, iso_cts, subspace_boost, cart, star, knots]
ONES = (1.0,) * 6


def made(models: int, rows: int, columns: int, seed: int = 0, rank: int | None = None) -> np.ndarray:
    """Deltas [models, rows, columns], in float64, of that rank or full."""
    random = np.random.default_rng((seed, models, rows, columns))
    if rank is None:
        return random.standard_normal((models, rows, columns))
    return random.standard_normal((models, rows, rank)) @ random.standard_normal((models, rank, columns))


def polar(matrix: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ np.diag((values > 1e-9 * values.max()).astype(float)) @ right


def leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return sum((values[k] * np.outer(left[:, k], right[k]) for k in range(rank)), np.zeros_like(matrix))


def slow_tsv_m(deltas: np.ndarray) -> np.ndarray:
    count, rank = len(deltas), max(1, min(deltas.shape[1:]) // len(deltas))
    svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.hstack([svds[i][0][:, :rank] for i in range(count)])
    values = np.hstack([svds[i][1][:rank] for i in range(count)])
    right = np.vstack([svds[i][2][:rank] for i in range(count)])
    return polar(left) @ np.diag(values) @ polar(right)


def slow_iso_c(deltas: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(deltas.sum(0), full_matrices=False)
    return values.mean() * left @ right


def slow_iso_cts(deltas: np.ndarray, common_share: float = 0.8) -> np.ndarray:
    count, side = len(deltas), min(deltas.shape[1:])
    own = min(round((side - int(side * common_share)) / count), side // count)
    left, values, right = np.linalg.svd(deltas.sum(0), full_matrices=False)
    common = side - own * count
    lefts, all_values, rights = [left[:, :common]], [values[:common]], [right[:common]]
    for delta in deltas:
        rest = delta - left[:, :common] @ left[:, :common].T @ delta
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        lefts, all_values, rights = [*lefts, u[:, :own]], [*all_values, s[:own]], [*rights, v[:own]]
    return np.hstack(all_values).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))


def slow_subspace_boost(deltas: np.ndarray, share: float = 0.01) -> np.ndarray:
    left, values, right = np.linalg.svd(deltas.sum(0), full_matrices=False)
    k = next(k for k in range(len(values)) if values[: k + 1].sum() / values.sum() >= share)
    return left @ np.diag([max(value, values[k]) for value in values]) @ right


def slow_cart(deltas: np.ndarray, share: float = 0.08, scale: float = 1.0) -> np.ndarray:
    mean, rank = deltas.mean(0), max(1, int(min(deltas.shape[1:]) * share))
    return mean + scale * sum(leading(delta - mean, rank) for delta in deltas)


def slow_star(deltas: np.ndarray, share: float = 0.4) -> np.ndarray:
    kept = []
    for delta in deltas:
        values = np.linalg.svd(delta, compute_uv=False)
        rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= share * values.sum())
        kept.append(leading(delta, rank) * values.sum() / values[:rank].sum())
    return np.mean(kept, 0)


def slow_knots(deltas: np.ndarray, density: float = 0.5) -> np.ndarray:
    """KnOTS-TIES: one entry after the other."""
    count, _, columns = deltas.shape
    left, values, right = np.linalg.svd(np.hstack(list(deltas)), full_matrices=False)
    parts = np.stack([np.diag(values) @ right[:, i * columns : (i + 1) * columns] for i in range(count)])
    keep = max(1, int(density * parts[0].size))
    for part in parts:
        for at in np.argsort(-abs(part), axis=None, kind="stable")[keep:]:
            part.flat[at] = 0
    merged = np.zeros_like(parts[0])
    for at in np.ndindex(merged.shape):
        agreeing = [part[at] for part in parts if part[at] * parts[(slice(None), *at)].sum() > 0]
        merged[at] = np.mean(agreeing) if agreeing else 0
    return left @ merged


SLOW: dict[Callable[..., np.ndarray], Callable[..., np.ndarray]] = {
    tsv_m: slow_tsv_m,
    iso_c: slow_iso_c,
    iso_cts: slow_iso_cts,
    subspace_boost: slow_subspace_boost,
    cart: slow_cart,
    star: slow_star,
    knots: slow_knots,
}


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-7) -> None:
    np.testing.assert_allclose(got, expected, atol=tolerance * max(1e-30, float(abs(expected).max())), rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_each_is_its_paper_written_out(method: Callable[..., np.ndarray], shape: tuple[int, int, int]) -> None:
    deltas = made(*shape)
    close(method(deltas, ONES[: shape[0]]), SLOW[method](deltas))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_float32_is_as_good_as_its_rounding(method: Callable[..., np.ndarray], shape: tuple[int, int, int]) -> None:
    deltas = made(*shape).astype(np.float32)
    got = method(deltas, ONES[: shape[0]])
    assert got.dtype == np.float32
    assert got.shape == shape[1:]
    close(got, SLOW[method](deltas.astype(np.float64)), 1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (iso_cts, {"common_share": 0.4}),
        (iso_cts, {"common_share": 0.0}),
        (subspace_boost, {"leading_share": 0.3}),
        (subspace_boost, {"leading_share": 1.0}),
        (cart, {"rank_share": 0.4}),
        (cart, {"rank_share": 0.25, "centred_scale": 0.3}),
        (star, {"kept_share": 0.9}),
        (star, {"kept_share": 0.0}),
        (knots, {"density": (0.2,)}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_options_are_the_papers_parameters(method: Callable[..., np.ndarray], options: dict[str, Any]) -> None:
    deltas = made(3, 16, 12)
    slow = {name: value[0] if isinstance(value, tuple) else value for name, value in options.items()}
    close(method(deltas, ONES[:3], **options), SLOW[method](deltas, *slow.values()))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
    method=st.sampled_from(METHODS),
    factor=st.floats(1e-5, 1e3),
)
def test_the_models_order_is_irrelevant_and_units_carry_over(
    shape: tuple[int, int, int], seed: int, method: Callable[..., np.ndarray], factor: float
) -> None:
    deltas = made(*shape, seed=seed)
    weights = [1.0, 0.5, 2.0, 0.25][: shape[0]]
    got = method(deltas, weights)
    close(method(deltas[::-1].copy(), weights[::-1]), got, 1e-6)
    close(method(deltas * factor, weights), got * factor, 1e-6)
    close(method(deltas, weights, lambda_=-0.3), -0.3 * got, 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_deltas_of_zero_give_zero(method: Callable[..., np.ndarray], shape: tuple[int, int, int]) -> None:
    assert not method(np.zeros(shape, np.float32), ONES[: shape[0]]).any()


@pytest.mark.parametrize("method", [tsv_m, iso_c, iso_cts, subspace_boost], ids=lambda method: method.__name__)
def test_a_weight_multiplies_its_delta(method: Callable[..., np.ndarray]) -> None:
    deltas, weights = made(3, 8, 11), (0.5, -2.0, 1.5)
    weighted = deltas * np.array(weights)[:, None, None]
    close(method(deltas, weights), method(weighted, (1.0, 1.0, 1.0)), 1e-6)


def test_equal_models_give_what_the_formula_says() -> None:
    delta = made(1, 12, 9)[0]
    equal = np.stack([delta] * 3)
    close(tsv_m(equal, ONES[:3]), leading(delta, 3))  # a third of the directions, each at its own value
    close(cart(equal, (0.3, 2.0, 1.0)), delta)
    close(iso_c(equal, ONES[:3]), 3 * iso_c(delta[None], (1.0,)))
    close(star(equal, (1.0, 5.0, 0.5)), star(delta[None], (1.0,)))
    close(knots(equal, ONES[:3], density=(1.0,)), delta)
    close(subspace_boost(equal, ONES[:3], leading_share=1.0), 3 * delta)


def test_tsv_m_of_one_model_is_its_delta_and_of_orthogonal_ones_their_sum() -> None:
    delta = made(1, 7, 10)
    close(tsv_m(delta, (1.0,)), delta[0])
    apart = np.zeros((2, 8, 8))
    apart[0, :4, :4], apart[1, 4:, 4:] = made(2, 4, 4)
    close(tsv_m(apart, (1.0, 1.0)), apart.sum(0))


def test_isotropic_results_have_one_singular_value() -> None:
    deltas = made(3, 10, 14)
    flat = np.linalg.svd(iso_c(deltas, ONES[:3]), compute_uv=False)
    close(flat, np.full(10, np.linalg.svd(deltas.sum(0), compute_uv=False).mean()))
    values = np.linalg.svd(iso_cts(deltas, ONES[:3], common_share=0.5), compute_uv=False)
    close(values, np.full(10, values.mean()))
    close(iso_cts(deltas, ONES[:3], common_share=1.0), iso_c(deltas, ONES[:3]))


def test_low_rank_deltas_get_no_arbitrary_directions() -> None:
    """The papers' flat spectrum would be as strong in directions that no model has, and there it's arbitrary."""
    deltas = made(2, 12, 16, rank=2)
    outside = np.eye(12) - polar(np.hstack(list(deltas))) @ polar(np.hstack(list(deltas))).T
    for method in METHODS:
        got = method(deltas.astype(np.float32), (1.0, 1.0))
        assert abs(outside @ got).max() < 1e-5 * abs(got).max(), method.__name__
    values = np.linalg.svd(iso_c(deltas, (1.0, 1.0)), compute_uv=False)
    close(values[:4], np.full(4, values[0]))
    close(values[0], np.linalg.svd(deltas.sum(0), compute_uv=False).mean())


def test_cart_keeps_no_directions_at_0_and_needs_a_mean() -> None:
    deltas = made(2, 5, 6)
    close(cart(deltas, (1.0, 3.0), rank_share=0.0), np.average(deltas, 0, weights=[1, 3]))
    with pytest.raises(OptionError, match="weights: 1, -1 sum to 0"):
        cart(deltas, (1, -1))


def test_star_keeps_the_nuclear_norm_of_each() -> None:
    delta = made(1, 9, 6)
    full = np.linalg.svd(delta[0], compute_uv=False)
    kept = np.linalg.svd(star(delta, (1.0,)), compute_uv=False)
    assert kept.sum() == pytest.approx(full.sum(), rel=1e-9)
    assert (kept > 1e-9 * kept[0]).sum() < len(full)
    close(star(delta, (1.0,), kept_share=1.0), delta[0])
    close(star(made(2, 5, 5), (1.0, 3.0), normalize=False), 4 * star(made(2, 5, 5), (1.0, 3.0)))


def test_knots_linear_is_the_weighted_sum_or_mean() -> None:
    deltas, weights = made(3, 6, 9), (1.0, 2.0, -0.5)
    expected = np.einsum("m,moi->oi", weights, deltas)
    close(knots(deltas, weights, combine="linear", normalize=False), expected)
    close(knots(deltas, weights, combine="linear"), expected / 2.5)


@pytest.mark.parametrize("combine", ["dare_linear", "dare_ties"])
def test_knots_with_dare_is_seeded_and_drops_what_density_says(combine: Any) -> None:
    deltas = made(2, 40, 50)
    drawn = knots(deltas, (1.0, 1.0), combine=combine, density=(0.3,), seed=1)
    assert (drawn == knots(deltas, (1.0, 1.0), combine=combine, density=(0.3,), seed=1)).all()
    assert abs(drawn - knots(deltas, (1.0, 1.0), combine=combine, density=(0.3,), seed=2)).max() > 0.1
    close(knots(deltas, (1.0, 1.0), combine="dare_linear", density=(1.0,)), deltas.mean(0))
    assert not knots(deltas, (1.0, 1.0), combine=combine, density=(0.0,)).any()
    part = np.ones((200, 300))
    merged = merge_aligned([part], (1.0,), combine=combine, density=(0.3,), seed=4)
    assert set(np.unique(merged)) == {0.0, part[0, 0] / 0.3}
    assert (merged > 0).mean() == pytest.approx(0.3, abs=0.01)


def test_dare_is_unbiased() -> None:
    deltas = made(2, 6, 5)
    draws = [knots(deltas, (1.0, 2.0), combine="dare_linear", density=(0.5, 0.8), seed=seed) for seed in range(2000)]
    close(np.mean(draws, 0), np.average(deltas, 0, weights=[1, 2]), 0.12)


def test_each_model_has_its_density() -> None:
    parts = [np.arange(1.0, 11.0)[None], -np.arange(1.0, 11.0)[None] * 100]
    merged = merge_aligned(parts, (1.0, 1.0), density=(0.4, 0.2), normalize=False)
    assert merged.tolist() == [[0, 0, 0, 0, 0, 0, 7, 8, -900, -1000]]


def test_equal_magnitudes_are_kept_by_lowest_index() -> None:
    merged = merge_aligned([np.array([[1.0, -2.0, 2.0, 2.0, 0.0]])], (1.0,), density=(0.4,))
    assert merged.tolist() == [[0, -2, 2, 0, 0]]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(1, 3))
def test_aligned_parts_are_the_deltas_and_factors_give_the_same(models: int, rows: int, columns: int, rank: int) -> None:
    random = np.random.default_rng((models, rows, columns, rank))
    ranks = [rank + i for i in range(models)]
    ups = [random.standard_normal((rows, r)) for r in ranks]
    downs = [random.standard_normal((r, columns)) for r in ranks]
    deltas = np.stack([up @ down for up, down in zip(ups, downs, strict=True)])
    basis, parts = align(deltas)
    joint = np.linalg.matrix_rank(np.hstack(list(deltas)))
    assert basis.shape == (rows, joint)
    close(basis.T @ basis, np.eye(joint))
    small_basis, small_parts = align_factors(ups, downs)
    assert small_basis.shape == basis.shape
    for delta, part, small in zip(deltas, parts, small_parts, strict=True):
        close(basis @ part, delta)
        close(small_basis @ small, delta)
    weights = ONES[:models]
    close(small_basis @ merge_aligned(small_parts, weights), knots(deltas, weights))

"""Means along great circles, and averages: each method's coefficients against its formula on whole tensors in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.methods.average import ema
from interfuse.methods.forms import Combination
from interfuse.methods.geodesic import karcher, model_stock, multislerp, nuslerp, slerp
from interfuse.methods.task_vectors import expo, lines, nan

SEEDS = st.integers(0, 10_000)
few = settings(deadline=None, max_examples=40)


def tensors(seed: int, count: int, shape: Sequence[int] = (4, 6)) -> tuple[np.ndarray, np.ndarray]:
    """A base and models near one another, so that no angle is at the edge of a rule."""
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape)
    return base, base + 0.7 * random.standard_normal((count, *shape))


def gram(vectors: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Inner products over all axes, or over one, with the others leading."""
    if axis is None:
        flat = vectors.reshape(len(vectors), -1)
        return flat @ flat.T
    rows = np.moveaxis(np.moveaxis(vectors, axis % (vectors.ndim - 1) + 1, -1), 0, -2)
    return rows @ np.swapaxes(rows, -1, -2)


def applied(combination: Combination, base: np.ndarray, models: np.ndarray, axis: int | None = None) -> np.ndarray:
    """What the engine does with a combination, in float64: equal inputs cancel."""

    def wide(coefficient: Any) -> Any:
        return coefficient if axis is None else np.expand_dims(coefficient, axis) if np.ndim(coefficient) else coefficient

    total, anchor = wide(combination.total), models[-1]
    terms = [wide(combination.base) * (base - anchor)]
    terms += [wide(c) * (model - anchor) for c, model in zip(combination.models, models, strict=True)]
    return total * anchor + sum(terms)


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_slerp_is_shoemakes_formula() -> None:
    base, models = tensors(1, 1)
    got = slerp((1.0,), gram(np.stack([base, *models])), t=0.3)
    np.testing.assert_allclose(applied(got, base, models), arc(base, models[0], 0.3), rtol=1e-12)


@pytest.mark.parametrize("cosine", [0.9994, 0.9996, -0.9994, -0.9996])
def test_slerp_is_straight_where_the_cosine_is_above_its_bound(cosine: float) -> None:
    a, b = np.array([2.0, 0.0]), 3 * np.array([cosine, np.sqrt(1 - cosine**2)])
    expected = 0.6 * a + 0.4 * b if abs(cosine) > 0.9995 else arc(a, b, 0.4)
    got = applied(slerp((1.0,), gram(np.stack([a, b])), t=0.4), a, b[None])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_of_whole_tensors(with_base: bool) -> None:
    base, models = tensors(2, 2)
    origin = base if with_base else np.zeros_like(base)
    a, b = models - origin
    got = nuslerp((1.0, 3.0), gram(np.stack([a, b])))
    np.testing.assert_allclose(applied(got, origin, models), origin + arc(a, b, 0.75), rtol=1e-10)


@pytest.mark.parametrize(("row_wise", "axis"), [(False, -1), (True, 0)])
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5), (1, 6), (6, 1)])
def test_nuslerp_along_one_axis(row_wise: bool, axis: int, shape: tuple[int, ...]) -> None:
    base, models = tensors(3, 2, shape)
    a, b = models - base
    moved = [np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) for x in (a, b)]
    # In one dimension vectors are parallel: the mean is straight.
    rows = [0.6 * x + 0.4 * y if len(x) == 1 else arc(x, y, 0.4) for x, y in zip(*moved, strict=True)]
    rest = np.moveaxis(a, axis, -1).shape
    expected = base + np.moveaxis(np.array(rows).reshape(rest), -1, axis)
    got = nuslerp((0.6, 0.4), gram(models - base, axis), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    np.testing.assert_allclose(applied(got, base, models, axis), expected, rtol=1e-9, atol=1e-12)


def spherical_mean(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Multi-SLERP with the tangent step that we leave out."""
    norms = np.linalg.norm(x.reshape(len(x), -1), axis=1)
    units = x / (norms + eps)[:, None, None]
    mean = np.tensordot(w, units, 1)
    mean /= np.linalg.norm(mean)
    tangents = units - (units * mean).sum((1, 2))[:, None, None] * mean
    step = np.tensordot(w, tangents, 1)
    length = np.linalg.norm(step) + eps
    return (np.cos(length) * mean + np.sin(length) / length * step) * (w @ norms)


@given(SEEDS, st.integers(1, 5), st.booleans())
@few
def test_multislerp_is_the_published_procedure(seed: int, count: int, normalize: bool) -> None:
    base, models = tensors(seed, count)
    weights = np.random.default_rng(seed).uniform(0.2, 2, count)
    w = weights / weights.sum() if normalize else weights
    got = multislerp(tuple(weights), gram(models - base), normalize_weights=normalize)
    np.testing.assert_allclose(applied(got, base, models), base + spherical_mean(models - base, w, 1e-8), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [1, 50])
def test_multislerp_of_opposite_directions_is_straight_whatever_their_norms(size: int) -> None:
    """What rounding leaves of a mean direction that vanishes is no direction."""
    random = np.random.default_rng(0)
    for _ in range(50):
        one = random.standard_normal(size).astype(np.float32)
        models = np.stack([one, -one * np.float32(random.random())]).astype(np.float64)
        got = multislerp((1.0, 1.0), gram(models))
        np.testing.assert_allclose(applied(got, np.zeros(size), models), models.mean(0), rtol=1e-6, atol=1e-9)


def riemannian_mean(x: np.ndarray, w: np.ndarray, steps: int, tol: float) -> np.ndarray:
    norms = np.array([np.linalg.norm(one) for one in x])
    units = [one / norm for one, norm in zip(x, norms, strict=True) if norm]
    share = w[norms > 0] / w[norms > 0].sum()
    mean = sum(s * unit for s, unit in zip(share, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        step = np.zeros_like(mean)
        for s, unit in zip(share, units, strict=True):
            angle = np.arccos(np.clip((mean * unit).sum(), -1, 1))
            if angle >= tol:
                step += s * angle / np.sin(angle) * (unit - np.cos(angle) * mean)
        length = np.linalg.norm(step)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean /= np.linalg.norm(mean)
    return (w @ norms) * mean


@given(SEEDS, st.integers(1, 5), st.integers(0, 12))
@few
def test_karcher_is_the_riemannian_mean(seed: int, count: int, steps: int) -> None:
    _, models = tensors(seed, count)
    weights = np.random.default_rng(seed).uniform(0.2, 2, count)
    got = karcher(tuple(weights), gram(models), max_iter=steps)
    expected = riemannian_mean(models, weights / weights.sum(), steps, 1e-5)
    np.testing.assert_allclose(applied(got, np.zeros_like(models[0]), models), expected, rtol=1e-6, atol=1e-8)


def test_karcher_of_a_model_of_norm_0_counts_its_norm_alone() -> None:
    _, models = tensors(5, 3)
    models[1] = 0
    got = karcher((1.0, 1.0, 1.0), gram(models))
    expected = riemannian_mean(models, np.full(3, 1 / 3), 10, 1e-5)
    np.testing.assert_allclose(applied(got, np.zeros_like(models[0]), models), expected, rtol=1e-6)


def test_karchers_point_is_a_stationary_one() -> None:
    _, models = tensors(6, 4)
    coefficients = np.array(karcher((1.0,) * 4, gram(models), max_iter=100, tol=1e-12).models)
    mean = np.tensordot(coefficients, models, 1)
    mean /= np.linalg.norm(mean)
    units = models / np.linalg.norm(models.reshape(4, -1), axis=1)[:, None, None]
    angles = np.arccos((units * mean).sum((1, 2)))
    pull = np.tensordot(angles / np.sin(angles), units - np.cos(angles)[:, None, None] * mean, 1)
    assert np.linalg.norm(pull) < 1e-7


def stock(base: np.ndarray, models: np.ndarray) -> np.ndarray:
    deltas = models - base
    pairs = [(i, j) for i in range(len(deltas)) for j in range(i)]
    norm = np.linalg.norm
    cosine = np.mean([(deltas[i] * deltas[j]).sum() / norm(deltas[i]) / norm(deltas[j]) for i, j in pairs])
    t = np.clip(len(models) * cosine / ((len(models) - 1) * cosine + 1), 0, 1)
    return t * models.mean(0) + (1 - t) * base


@given(SEEDS, st.integers(2, 5), st.booleans())
@few
def test_model_stock_is_the_papers_formula(seed: int, count: int, filter_wise: bool) -> None:
    base, models = tensors(seed, count)
    models += 0.8  # what the models share: cosines above 0
    expected = np.array([stock(*pair) for pair in zip(base, models.swapaxes(0, 1), strict=True)])
    axis = -1 if filter_wise else None
    got = model_stock((1.0,) * count, gram(models - base, axis), filter_wise=filter_wise)
    wanted = expected if filter_wise else stock(base, models)
    np.testing.assert_allclose(applied(got, base, models, axis), wanted, rtol=1e-10, atol=1e-12)


def test_model_stock_with_deltas_that_oppose_each_other_gives_the_base() -> None:
    base = np.ones((2, 3))
    models = np.stack([base + 1, base - 1])
    got = model_stock((1.0, 1.0), gram(models - base))
    np.testing.assert_array_equal(applied(got, base, models), base)


@given(st.integers(1, 6), st.floats(0, 0.999))
@few
def test_ema_is_its_recursion(count: int, decay: float) -> None:
    _, models = tensors(7, count)
    state = models[0]
    for model in models[1:]:
        state = decay * state + (1 - decay) * model
    got = applied(ema((1.0,) * count, decay=decay), np.zeros_like(state), models)
    np.testing.assert_allclose(got, state, rtol=1e-9, atol=1e-12)


def test_expo_goes_beyond_the_model() -> None:
    base, models = tensors(8, 1)
    got = applied(expo((2.0,), alpha=0.4), base, models)
    np.testing.assert_allclose(got, models[0] + 0.4 * (models[0] - base), rtol=1e-12)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_lines_scales_evenly_with_depth(depth: float) -> None:
    base, models = tensors(9, 2)
    got = applied(lines((1.0, 2.0), depth, alpha=0.2, beta=0.6), base, models)
    expected = base + (0.2 + 0.6 * depth) * ((models[0] - base) + 2 * (models[1] - base))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_nan_weighs_by_the_inverse_norm() -> None:
    base, models = tensors(10, 3)
    deltas = models - base
    inverse = np.array([w / np.linalg.norm(d) for w, d in zip((1, 2, 3), deltas, strict=True)])
    expected = base + 0.7 * np.tensordot(inverse / inverse.sum(), deltas, 1)
    got = applied(nan((1.0, 2.0, 3.0), gram(deltas), lambda_=0.7), base, models)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)

"""Regression methods against their formulas with explicit inverses, and against what their objectives say of a minimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.errors import OptionError
from interfuse.methods.regression import ace, regress, solve_positive, wudi

SHAPES = [(3, 5, 7), (3, 16, 12), (2, 30, 300), (3, 1, 4), (3, 4, 1), (2, 1, 1), (1, 6, 9)]
METHODS: list[Callable[..., np.ndarray]] = [wudi, ace]
WEIGHTS = (1.0, 0.5, 2.0, 0.25)


def made(models: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, models, rows, columns)).standard_normal((models, rows, columns))


def gram_of(method: Callable[..., Any], delta: np.ndarray) -> np.ndarray:
    if method is ace:
        delta = delta - delta.mean(0)
        covariance = sum((np.outer(row, row) for row in delta), np.zeros((delta.shape[1],) * 2))
        return covariance / max(np.trace(covariance), 1e-300)
    return delta.T @ delta / np.linalg.norm(delta) ** 2


def slow(method: Callable[..., Any], deltas: np.ndarray, weights: Sequence[float], prior: float) -> np.ndarray:
    grams = [gram_of(method, delta) for delta in deltas]
    mean = np.average(deltas, 0, weights=weights)
    total = np.sum([weight * gram for weight, gram in zip(weights, grams, strict=True)], 0)
    pull = prior * np.trace(total) / len(total) * np.eye(len(total))
    moment = sum(weight * delta @ gram for weight, delta, gram in zip(weights, deltas, grams, strict=True))
    return (moment + mean @ pull) @ np.linalg.inv(total + pull) if np.trace(total) > 1e-20 else mean


def objective(delta: Any, deltas: Any, weights: Sequence[float]) -> Any:
    """WUDI's: how much the merged delta, put in the place of each, disturbs that model's inputs."""
    return sum(
        weight * (((delta - own) @ own.T) ** 2).sum() / (own**2).sum() for weight, own in zip(weights, deltas, strict=True)
    )


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-7) -> None:
    np.testing.assert_allclose(got, expected, atol=tolerance * max(1e-30, float(abs(expected).max())), rtol=0)


@pytest.mark.parametrize("prior", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_each_is_its_formula_written_out(method: Any, shape: tuple[int, int, int], prior: float) -> None:
    deltas, weights = made(*shape), WEIGHTS[: shape[0]]
    close(method(deltas, weights, prior=prior), slow(method, deltas, weights, prior))
    got = method(deltas.astype(np.float32), weights, prior=prior)
    assert got.dtype == np.float32
    close(got, slow(method, deltas.astype(np.float32).astype(float), weights, prior), 1e-6)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
    method=st.sampled_from(METHODS),
    factor=st.floats(1e-5, 1e3),
)
def test_the_models_order_is_irrelevant_and_units_carry_over(
    shape: tuple[int, int, int], seed: int, method: Any, factor: float
) -> None:
    deltas, weights = made(*shape, seed=seed), WEIGHTS[: shape[0]]
    got = method(deltas, weights)
    close(method(deltas[::-1].copy(), weights[::-1]), got, 1e-6)
    close(method(deltas * factor, weights), got * factor, 1e-6)
    close(method(deltas, [weight * factor for weight in weights]), got, 1e-6)
    close(method(deltas, weights, lambda_=-0.3), -0.3 * got, 1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_equal_models_give_themselves_and_zeros_give_zero(method: Any) -> None:
    delta = made(1, 7, 5)[0].astype(np.float32)
    assert (method(np.stack([delta] * 3), (0.3, 1.0, 0.7)) == delta).all()
    assert (method(delta[None], (2.0,)) == delta).all()
    assert not method(np.zeros((2, 3, 4), np.float32), (1.0, 1.0)).any()


def test_wudi_solves_its_normal_equations() -> None:
    """With next to no prior, the slope of the paper's objective vanishes, and no step from there leads down."""
    deltas, weights = made(3, 20, 6), (1.0, 0.5, 2.0)
    merged = wudi(deltas, weights, prior=1e-8)
    leaf = torch.from_numpy(merged).requires_grad_()
    objective(leaf, torch.from_numpy(deltas), weights).backward()
    at_mean = torch.from_numpy(deltas.mean(0)).requires_grad_()
    objective(at_mean, torch.from_numpy(deltas), weights).backward()
    assert leaf.grad is not None
    assert at_mean.grad is not None
    assert leaf.grad.abs().max() < 1e-6 * at_mean.grad.abs().max()
    random = np.random.default_rng(5)
    best = objective(merged, deltas, weights)
    for size in (1e-3, 1e-1, 1):
        assert objective(merged + size * random.standard_normal(merged.shape), deltas, weights) > best


def test_wudi_of_models_on_separate_inputs_is_their_sum() -> None:
    deltas = np.zeros((2, 5, 8))
    deltas[0, :, :3], deltas[1, :, 3:] = made(1, 5, 3)[0], made(1, 5, 5)[0]
    close(wudi(deltas, (1.0, 1.0), prior=1e-8), deltas.sum(0), 1e-5)


def test_descent_is_the_papers_adam() -> None:
    deltas = made(3, 6, 9).astype(np.float32)
    leaf = torch.from_numpy(deltas).sum(0).requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1e-3)
    for _ in range(50):
        adam.zero_grad()
        objective(leaf, torch.from_numpy(deltas), (1.0, 1.0, 1.0)).backward()
        adam.step()
    got = wudi(deltas, (1.0, 1.0, 1.0), solver="descent", steps=50, learning_rate=1e-3)
    close(got, leaf.detach().numpy(), 1e-5)
    assert (wudi(deltas, (1.0, 1.0, 1.0), solver="descent", steps=0) == deltas.astype(float).sum(0).astype(np.float32)).all()


def test_descent_goes_down_from_the_sum_and_below_the_mean() -> None:
    deltas, weights = made(3, 8, 40) * 1e-3, (1.0, 1.0, 1.0)
    got = [wudi(deltas, weights, solver="descent", steps=steps) for steps in (0, 100, 300)]
    heights = [objective(delta, deltas, weights) for delta in (*got, wudi(deltas, weights, prior=1e-8))]
    assert heights == sorted(heights, reverse=True)
    assert heights[2] < objective(deltas.mean(0), deltas, weights)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 600])
def test_substitution_in_blocks_solves(size: int) -> None:
    random = np.random.default_rng(size)
    half = random.standard_normal((size, size + 3))
    matrix, right = half @ half.T + np.eye(size), random.standard_normal((size, 4))
    before = right.copy()
    close(matrix @ solve_positive(matrix, right), right, 1e-9)
    assert (right == before).all()


def test_regress_takes_any_gram_and_makes_the_least_squares_fit() -> None:
    """One model's inputs in each half of space: the fit has each model's columns there."""
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((50, 6)) * mask for mask in ([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1])]
    targets = made(2, 4, 6)
    got = regress(targets, (x.T @ x for x in inputs), (1.0, 1.0), prior=1e-8)
    close(got, np.hstack([targets[0][:, :3], targets[1][:, 3:]]), 1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("solver", ["closed", "descent"])
def test_weights_that_make_no_minimum_are_refused(method: Any, solver: str) -> None:
    options = {"solver": solver} if method is wudi else {}
    with pytest.raises(OptionError, match=r"weights: got 1\.0, -0\.5; a regression's weights are at least 0"):
        method(made(2, 3, 3), (1.0, -0.5), **options)
    with pytest.raises(OptionError, match=r"weights: 0\.0, 0\.0 sum to 0"):
        method(made(2, 3, 3), (0.0, 0.0), **options)

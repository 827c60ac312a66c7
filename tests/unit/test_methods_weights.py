"""Coefficients: each method's numbers, applied to float64 vectors, against its formula written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from interfuse import registry
from interfuse.errors import OptionError
from interfuse.methods.average import linear
from interfuse.methods.forms import Combination
from interfuse.methods.task_vectors import task_arithmetic

WEIGHTS = st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=5)


def applied(combination: Combination, base: np.ndarray, models: np.ndarray) -> np.ndarray:
    return combination.base * base + np.array(combination.models) @ models


def vectors(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    return random.standard_normal(7), random.standard_normal((count, 7))


@given(WEIGHTS)
def test_linear_is_the_weighted_average(weights: list[float]) -> None:
    assume(abs(sum(weights)) > 1e-3)
    base, models = vectors(len(weights))
    expected = sum(w * t for w, t in zip(weights, models, strict=True)) / sum(weights)
    got = linear(weights)
    np.testing.assert_allclose(applied(got, base, models), expected, rtol=1e-9, atol=1e-9)
    assert (got.base, got.total) == (0, 1)


@given(WEIGHTS)
def test_linear_without_normalize_is_the_weighted_sum(weights: list[float]) -> None:
    base, models = vectors(len(weights))
    expected = sum(w * t for w, t in zip(weights, models, strict=True))
    got = linear(weights, normalize=False)
    np.testing.assert_allclose(applied(got, base, models), expected, rtol=1e-12, atol=1e-12)
    assert got.total == pytest.approx(sum(weights), abs=1e-12)


@given(WEIGHTS, st.floats(-2, 2), st.booleans())
def test_task_arithmetic_adds_scaled_differences_to_the_base(weights: list[float], scale: float, normalize: bool) -> None:
    assume(not normalize or abs(sum(weights)) > 1e-3)
    base, models = vectors(len(weights))
    differences = sum(w * (t - base) for w, t in zip(weights, models, strict=True))
    expected = base + scale * differences / (sum(weights) if normalize else 1)
    got = task_arithmetic(weights, lambda_=scale, normalize=normalize)
    np.testing.assert_allclose(applied(got, base, models), expected, rtol=1e-9, atol=1e-9)
    assert got.total == 1


@pytest.mark.parametrize("method", [linear, task_arithmetic])
def test_weights_that_sum_to_zero_are_not_normalized(method: Callable[..., Combination]) -> None:
    with pytest.raises(OptionError, match="weights: 1, -1 sum to 0; change one, or set normalize to false"):
        method((1, -1), normalize=True)
    assert method((1, -1), normalize=False).models == (1, -1)


def test_lambda_zero_is_the_base_and_one_model_at_lambda_one_is_the_model() -> None:
    assert task_arithmetic((1.0, 2.0), lambda_=0.0) == Combination(1.0, (0.0, 0.0), 1.0)
    assert task_arithmetic((1.0,)) == Combination(0.0, (1.0,), 1.0)


#: Form -> the arguments that the engine may be asked for, in order.
GIVEN = {
    "coefficients": (["weights"], ["weights", "gram"], ["weights", "depth"]),
    "rule": (["weights"],),
    "blocks": (["tensor", "weights"],),
    "matrices": (["deltas", "weights"],),
}


@pytest.mark.parametrize("method", registry.methods("weights"), ids=lambda method: method.name)
def test_every_method_has_the_signature_of_its_form(method: registry.Method) -> None:
    positional = [p for p in inspect.signature(method.make).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in positional] in GIVEN[method.form]
    assert method.of in ("deltas", "models")
    assert method.summary
    assert method.paper.startswith("https://")


def test_lambda_is_an_option_by_its_own_name() -> None:
    method = registry.find("task_arithmetic", "weights")
    assert method.check({"lambda": 0.5}) == {"lambda_": 0.5, "normalize": False}
    assert method.check({"lambda_": 0.5}) == {"lambda_": 0.5, "normalize": False}
    assert method.check({}) == {"lambda_": 1.0, "normalize": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lamda": 1}, "parameters.lamda: unknown option; did you mean 'lambda'?"),
        ({"lambda": "much"}, "parameters.lambda: got 'much'"),
        ({"lambda": float("inf")}, "parameters.lambda: got inf"),
        ({"normalize": 3}, "parameters.normalize: got 3"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        registry.find("task_arithmetic", "weights").check(options)
    assert message in str(caught.value)

"""The shipped checks of weight methods find what they are there for: each catches a method that breaks one promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import Field

from interfuse import registry, testing
from interfuse.engine.merge import merge
from interfuse.methods.average import linear
from interfuse.methods.forms import Block, Blocks, Combination, Rule, Trim
from interfuse.methods.selection import magmax
from interfuse.testing import WeightClaims, weights

Merge = Callable[[Block], np.ndarray]
CALLS = itertools.count()


def sound(weights: Sequence[float], *, share: Annotated[float, Field(ge=0, le=1, description="How far.")] = 1.0) -> Combination:
    """A third party's average."""
    return linear(weights)


def larger(weights: Sequence[float]) -> Combination:
    """Gives too much."""
    return Combination(0.0, tuple(1.1 / len(weights) for _ in weights), 1.1)


def beyond(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Moves what no model moved."""
    return lambda block: block.deltas[0] + np.float32(1)


def first(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Prefers the first model."""
    return lambda block: block.deltas[0]


def above(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """An absolute threshold."""
    return lambda block: np.where(abs(block.deltas) > 0.2, block.deltas, np.float32(0)).max(0)


def forgetful(weights: Sequence[float], gram: np.ndarray) -> Combination:
    """Another result each time."""
    return Combination(1.0, (1e-2 * next(CALLS),) * len(weights), 1.0)


def by_block(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Divides by a block's own largest entry."""
    return lambda block: block.deltas[0] / np.float32(max(abs(block.deltas[0]).max(), 1e-9))


def divided(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Divides by what may be zero."""
    return lambda block: block.deltas[0] / np.sqrt((block.deltas**2).sum()).clip(min=1e-9)


def drawn(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Draws from a generator of its own."""
    return lambda block: block.deltas[0] * np.random.default_rng().random(block.deltas.shape[1], np.float32)


def unchecked(weights: Sequence[float], *, share: Annotated[Any, Field(description="How far.")] = 1.0) -> Combination:
    """An option that may be anything."""
    return linear(weights)


def silent(weights: Sequence[float], *, share: float = 1.0) -> Combination:
    """An option without a word."""
    return linear(weights)


def halves(weights: Sequence[float]) -> Rule:
    """Trims by chance."""
    return Rule(tuple(weights), Trim("random", (0.5,) * len(weights)))


def use(monkeypatch: pytest.MonkeyPatch, make: Any, form: str, needs: str = "a base", paper: str = "https://a.b") -> str:
    """Register for this test alone."""
    name = make.__name__
    method = registry.Method(name, "weights", make, paper, needs, form, "deltas")
    monkeypatch.setitem(registry._METHODS, ("weights", name), method)
    return name


def test_a_sound_method_of_a_third_party_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.check_weight_method(use(monkeypatch, sound, "coefficients", needs=""))


@pytest.mark.parametrize(
    ("make", "form", "check", "match"),
    [
        (larger, "sums", weights.check_registration, "the form is 'sums', not one of coefficients"),
        (silent, "coefficients", weights.check_registration, "options without a description: share"),
        (larger, "coefficients", weights.check_equal_models, "models that are the base don't give the base"),
        (beyond, "blocks", weights.check_equal_models, "models that are the base don't give the base"),
        (magmax, "matrices", weights.check_registration, r"given \['tensor', 'weights'\]"),
        (above, "blocks", weights.check_equal_models, "equal models give another: 0.1"),
        (first, "blocks", weights.check_order, "in another order give another"),
        (above, "blocks", weights.check_unit, "in another unit the result is another"),
        (forgetful, "coefficients", weights.check_types, "float64 and float32 give different"),
        (forgetful, "coefficients", weights.check_threads, "depend on the threads"),
        (by_block, "blocks", weights.check_blocks, "blocks of [0-9]+ give other bytes than whole tensors"),
        (divided, "blocks", weights.check_blocks, "float32 gives float64|other bytes"),
        (drawn, "blocks", weights.check_seeds, "changes a method that has no chance"),
        (unchecked, "coefficients", weights.check_options, "the error says 'nothing', and doesn't name 'share'"),
    ],
)
def test_a_faulty_method_is_found(
    monkeypatch: pytest.MonkeyPatch, make: Any, form: str, check: testing.WeightCheck, match: str
) -> None:
    with pytest.raises(AssertionError, match=match):
        check(use(monkeypatch, make, form), WeightClaims())


def test_a_method_without_a_paper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="the paper is '', not an address"):
        weights.check_registration(use(monkeypatch, sound, "coefficients", paper=""), WeightClaims())


def changed(how: str) -> Callable[..., Any]:
    """`merge` with a fault."""

    def faulty(name: str, models: list[Any], **options: Any) -> Any:
        if how == "inputs":
            next(iter(models[0].values())).reshape(-1)[:1] += 1
        if how == "base":
            options.setdefault("base", models[0])
        if how == "seed":
            options.pop("seed", None)
        result = merge(name, models, **options)
        for key, value in result.items():
            if how == "integers" and value.dtype == np.int64:
                result[key] = value.astype(np.int32)
            if how == "shapes":
                result[key] = np.atleast_1d(value)
            if how == "nan":
                result[key] = np.where(abs(value) > 1e14, np.nan, value)
            if how == "rounded twice" and "bfloat16" in str(value.dtype):
                result[key] = (value * 1.004).bfloat16()
        return result

    return faulty


@pytest.mark.parametrize(
    ("how", "check", "match"),
    [
        ("inputs", weights.check_inputs, "the inputs have changed"),
        ("integers", weights.check_inputs, "'steps': int64 in, int32 out"),
        ("base", weights.check_base, "the error says 'nothing', and doesn't name 'base'"),
        ("seed", weights.check_seeds, "gives the same with every seed"),
        ("shapes", weights.check_edges, r"'zero': shape \(\) in, \(1,\) out"),
        ("nan", weights.check_finite, "weights of size 1e\\+15: NaN or infinite in layers.0.weight"),
        ("rounded twice", weights.check_types, "BF16: [0-9]+ entries of layers.0.weight aren't the nearest"),
    ],
)
def test_a_fault_of_the_merge_is_found(
    monkeypatch: pytest.MonkeyPatch, how: str, check: testing.WeightCheck, match: str
) -> None:
    name = use(monkeypatch, halves, "rule")
    monkeypatch.setattr(weights, "merge", changed(how))
    with pytest.raises(AssertionError, match=match):
        check(name, WeightClaims())

"""What holds of means along great circles whatever the tensors: exact ends, equal models, shapes at the edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.errors import OptionError
from interfuse.methods.average import ema, uniform_soup
from interfuse.methods.forms import Combination
from interfuse.methods.geodesic import AXIS, karcher, model_stock, multislerp, nuslerp, slerp
from interfuse.methods.task_vectors import expo, lines, nan
from interfuse.registry import find

Method = Callable[..., Combination]

#: Methods of any number of models (two at least), and which of them sum up deltas.
MEANS: list[tuple[Method, bool]] = [(multislerp, True), (karcher, False), (model_stock, True), (nan, True)]

VECTORS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6)
few = settings(deadline=None, max_examples=50)


def gram(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(vectors) @ np.stack(vectors).T


def applied(got: Combination, base: np.ndarray, models: Sequence[np.ndarray]) -> np.ndarray:
    """The engine's sum, about the last model."""
    rest = sum(c * (model - models[-1]) for c, model in zip(got.models, models, strict=True))
    return got.total * models[-1] + rest + got.base * (base - models[-1])


@given(VECTORS, VECTORS)
@few
def test_slerps_ends_are_exact(a: list[float], b: list[float]) -> None:
    size = min(len(a), len(b))
    matrix = gram([np.array(a[:size]), np.array(b[:size])])
    start, end = slerp((1.0,), matrix, t=0.0), slerp((1.0,), matrix, t=1.0)
    assert (start.base, *start.models, start.total) == (1, 0, 1)
    assert (end.base, *end.models, end.total) == (0, 1, 1)


@given(VECTORS, st.floats(0, 1))
@few
def test_slerp_of_equal_models_is_the_model_to_the_last_bit(vector: list[float], t: float) -> None:
    x = np.array(vector)
    np.testing.assert_array_equal(applied(slerp((1.0,), gram([x, x]), t=t), x, [x]), x)


@given(VECTORS, st.integers(2, 5), st.integers(0, 100))
@few
@pytest.mark.parametrize(("method", "of_deltas"), MEANS)
def test_equal_models_give_that_model_to_the_last_bit(
    method: Method, of_deltas: bool, vector: list[float], count: int, seed: int
) -> None:
    x = np.array(vector)
    base = x + np.random.default_rng(seed).standard_normal(len(x)) if of_deltas else np.zeros_like(x)
    got = method((1.0,) * count, gram([x - base] * count))
    np.testing.assert_array_equal(applied(got, base, [x] * count), x)


@given(VECTORS, st.integers(2, 5), st.integers(0, 1000))
@few
@pytest.mark.parametrize(("method", "of_deltas"), MEANS)
def test_the_order_of_models_does_not_matter(
    method: Method, of_deltas: bool, vector: list[float], count: int, seed: int
) -> None:
    base, random = np.array(vector), np.random.default_rng(seed)
    models = list(base + random.standard_normal((count, len(base))))
    weights, order = random.uniform(0.5, 2, count), random.permutation(count)
    origin = base if of_deltas else np.zeros_like(base)
    straight = applied(method(tuple(weights), gram([m - origin for m in models])), origin, models)
    moved = [models[i] for i in order]
    turned = applied(method(tuple(weights[order]), gram([m - origin for m in moved])), origin, moved)
    if method is karcher and len(base) == 1:
        return  # in one dimension a mean of opposite directions is on neither side: it begins at the first
    np.testing.assert_allclose(turned, straight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("method", "of_deltas"), [*MEANS, (nuslerp, True)])
@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 2.0], [1.0, -1.0], [1e-30, 1e-30], [1e30, 1e30]])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3)])
def test_shapes_at_the_edge_are_finite(method: Method, of_deltas: bool, values: list[float], leading: tuple[int, ...]) -> None:
    """One entry, norm 0, all 0, opposite, tiny and huge; with no, one and several leading axes."""
    matrix = np.broadcast_to(np.outer(values, values), (*leading, 2, 2))
    got = method((1.0, 1.0), matrix)
    parts = (got.base, *got.models, got.total)
    assert all(np.isfinite(part).all() for part in parts)
    assert all(isinstance(part, float) if not leading else np.shape(part) in ((), leading) for part in parts)
    assert np.shape(got.models[0]) == leading
    if values == [0.0, 0.0] and of_deltas:
        assert np.all(got.total == 1)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 2.0], [1.0, -1.0]])
def test_slerp_without_an_angle_is_straight(values: list[float]) -> None:
    got = slerp((1.0,), np.outer(values, values), t=0.25)
    assert (got.base, got.models, got.total) == (0.75, (0.25,), 1)


def test_nuslerp_beside_a_delta_of_norm_0_is_straight() -> None:
    got = nuslerp((1.0, 3.0), np.diag([0.0, 4.0]))
    assert (got.base, got.models, got.total) == (0, (0.25, 0.75), 1)


def test_multislerp_of_opposite_deltas_is_straight() -> None:
    x = np.array([1.0, 2.0])
    got = multislerp((1.0, 1.0, 1.0), gram([x, -x, 0 * x]))
    assert got.models == pytest.approx((1 / 3,) * 3)


def test_nan_leaves_out_a_delta_of_norm_0() -> None:
    got = nan((1.0, 1.0, 1.0), np.diag([4.0, 0.0, 1.0]))
    assert (got.base, got.models) == (0, pytest.approx((1 / 3, 0, 2 / 3)))


def test_rows_get_what_they_would_get_alone() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((5, 3, 7))
    matrices = rows @ rows.swapaxes(1, 2)
    for method, _ in MEANS:
        together = method((1.0, 2.0, 3.0), matrices)
        for row, matrix in enumerate(matrices):
            alone = method((1.0, 2.0, 3.0), matrix)
            np.testing.assert_allclose(np.array(together.models)[:, row], np.array(alone.models), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "axis"),
    [
        ("nuslerp", {}, None),
        ("nuslerp", {"nuslerp_row_wise": True}, None),
        ("nuslerp", {"nuslerp_flatten": False}, -1),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
        ("model_stock", {}, None),
        ("model_stock", {"filter_wise": True}, -1),
    ],
)
def test_axis_says_what_a_gram_matrix_sums_over(name: str, options: dict[str, Any], axis: int | None) -> None:
    assert AXIS[name](find(name, "weights").check(options)) == axis


@pytest.mark.parametrize(
    ("method", "count", "options", "match"),
    [
        (slerp, 1, {"t": 0.5}, "got 0 beside the base; slerp takes a base and exactly one other"),
        (slerp, 3, {"t": 0.5}, "got 2 beside the base; slerp takes a base and exactly one other"),
        (nuslerp, 3, {}, "got 3; nuslerp takes exactly two"),
        (model_stock, 1, {}, "got 1 beside the base; model_stock takes two or more"),
    ],
)
def test_a_wrong_number_of_models_is_an_error(method: Method, count: int, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        method((1.0,) * count, np.eye(count), **options)


@pytest.mark.parametrize("method", [nuslerp, multislerp, karcher, model_stock, nan])
def test_weights_that_sum_to_0_are_an_error(method: Method) -> None:
    with pytest.raises(OptionError, match=r"1\.0, -1\.0 sum to 0"):
        method((1.0, -1.0), np.eye(2))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("slerp", {}, "parameters.t: missing"),
        ("slerp", {"t": 1.5}, "got 1.5; at most 1"),
        ("ema", {"decay": 1.0}, "got 1.0; below 1"),
        ("karcher", {"tol": 0.0}, "got 0.0; above 0"),
        ("lines", {"alpha": 1.0}, "parameters.beta: missing"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        find(name, "weights").check(options)


def test_uniform_soup_is_the_plain_average() -> None:
    assert uniform_soup((2.0, 2.0, 2.0, 2.0)) == (0, (0.25,) * 4, 1)
    with pytest.raises(OptionError, match=r"got 1.0, 2.0; .* use linear"):
        uniform_soup((1.0, 2.0))


def test_ema_of_one_checkpoint_and_without_memory() -> None:
    assert ema((1.0,), decay=0.9) == (0, (1,), 1)
    assert ema((1.0, 1.0, 1.0), decay=0.0) == (0, (0, 0, 1), 1)
    assert ema((1.0, 1.0, 1.0), decay=0.5).models == pytest.approx((0.25, 0.25, 0.5))


def test_scales_of_task_vectors_at_their_ends() -> None:
    assert expo((1.0,), alpha=0.0) == (0, (1,), 1)
    assert expo((1.0,), alpha=-1.0) == (1, (0,), 1)
    assert lines((1.0,), 1.0, alpha=0.25, beta=0.75) == (0, (1,), 1)

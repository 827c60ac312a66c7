"""What holds of the methods that choose entries whatever the tensor, and the exact statistics that they rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.errors import OptionError
from interfuse.methods import balance, exact
from interfuse.methods.balance import arcee_fusion, pcb
from interfuse.methods.forms import Block
from interfuse.methods.selection import PER_TASK, consensus, emr, magmax, nearswap, ram, ramplus_tl
from interfuse.registry import find

Method = Callable[..., Any]

#: Methods of several models, then those of one beside the base; with options for which equal models give that model.
SEVERAL: list[tuple[Method, dict[str, Any]]] = [
    (magmax, {}),
    (emr, {}),
    (ram, {"epsilon": 0.0}),
    (ramplus_tl, {"epsilon": 0.0}),
]
SINGLE: list[tuple[Method, dict[str, Any]]] = [(nearswap, {"t": 1e9}), (arcee_fusion, {})]
OTHERS: list[tuple[Method, dict[str, Any]]] = [(consensus, {"k": 1}), (pcb, {})]

few = settings(deadline=None, max_examples=40)
NUMBERS = st.floats(-1e3, 1e3, width=32)


class Memory:
    """A tensor in memory as `Blocks`, of at most `length` elements each: whole rows where a row fits."""

    def __init__(self, base: np.ndarray, deltas: np.ndarray, length: int = 1 << 20) -> None:
        self.shape, self.models = base.shape, len(deltas)
        row = max(base.shape[-1] if base.ndim else 1, 1)
        self._length = length // row * row if length >= row else length
        self._base, self._deltas = base.reshape(-1).astype(np.float32), deltas.reshape(len(deltas), -1).astype(np.float32)

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, self._base.size, self._length):
            part = slice(start, start + self._length)
            yield Block(start, self._base[part].copy(), self._deltas[:, part].copy())


def run(method: Method, tensor: Memory, weights: tuple[float, ...], options: dict[str, Any]) -> np.ndarray:
    merge = method(tensor, weights, **options)
    return np.concatenate([np.zeros(0, np.float32), *(merge(block) for block in tensor)])


def random_tensor(seed: int, count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal(shape), random.standard_normal((count, *shape)).round(1)


@pytest.mark.parametrize(("method", "options"), [*SEVERAL, *OTHERS, *SINGLE])
def test_blocks_of_any_length_give_the_same_bits(method: Method, options: dict[str, Any]) -> None:
    for shape in [(30, 20), (600,), (2, 3, 100)]:
        base, deltas = random_tensor(1, 1 if (method, options) in SINGLE else 3, shape)
        results = [run(method, Memory(base, deltas, n), (0.7,) * len(deltas), options) for n in (1 << 20, 256, 97, 20, 7, 1)]
        for result in results[1:]:
            np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))


def test_rows_longer_than_a_piece_give_the_same_bits_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_PIECE", 64)
    base, deltas = random_tensor(2, 1, (3, 500))
    results = [run(arcee_fusion, Memory(base, deltas, n), (1.0,), {}) for n in (1500, 500, 499, 70, 64, 9)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.integers(1, 4))
@few
@pytest.mark.parametrize(("method", "options"), SEVERAL)
def test_equal_models_give_that_model(method: Method, options: dict[str, Any], values: list[float], count: int) -> None:
    delta = np.array(values, np.float32)
    got = run(method, Memory(np.ones_like(delta), np.stack([delta] * count)), (1.0,) * count, options)
    np.testing.assert_array_equal(got, delta)


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.integers(1, 4))
@few
def test_pcb_of_equal_models_takes_the_models_entries_or_none(values: list[float], count: int) -> None:
    delta = np.array(values, np.float32)
    got = run(pcb, Memory(np.ones_like(delta), np.stack([delta] * count)), (1.0,) * count, {"density": 0.5})
    assert np.all((got == 0) | np.isclose(got, delta, rtol=1e-6, atol=0))
    assert np.any(got != 0) == np.any(delta != 0)


@given(st.integers(0, 1000), st.integers(2, 4))
@few
@pytest.mark.parametrize(("method", "options"), [*SEVERAL, *OTHERS])
def test_the_order_of_models_does_not_matter(method: Method, options: dict[str, Any], seed: int, count: int) -> None:
    base, deltas = random_tensor(seed, count, (4, 5))
    random = np.random.default_rng(seed)
    weights, order = random.uniform(0.5, 2, count), random.permutation(count)
    straight = run(method, Memory(base, deltas), tuple(weights), options)
    turned = run(method, Memory(base, deltas[order]), tuple(weights[order]), options)
    np.testing.assert_allclose(turned, straight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), [*SEVERAL, *OTHERS, *SINGLE])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1), (0,), (0, 3)])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-42, 1e18])
def test_shapes_at_the_edge_are_finite(method: Method, options: dict[str, Any], shape: tuple[int, ...], value: float) -> None:
    count = 1 if (method, options) in SINGLE else 2
    deltas = np.full((count, *shape), value)
    got = run(method, Memory(np.ones(shape), deltas), (1.0,) * count, options)
    assert got.shape == (deltas[0].size,)
    assert np.isfinite(got).all()
    if value == 0:
        assert not got.any()


def test_a_base_equal_to_the_model_stays() -> None:
    for method, options in SINGLE:
        assert not run(method, Memory(np.arange(6.0), np.zeros((1, 6))), (1.0,), options).any()


def test_magmax_of_opposite_entries_takes_the_positive_one() -> None:
    for deltas in ([[2.0, -1.0], [-2.0, -3.0]], [[-2.0, -3.0], [2.0, -1.0]]):
        assert run(magmax, Memory(np.zeros(2), np.array(deltas)), (1.0, 1.0), {}).tolist() == [2, -3]


def test_consensus_at_k_0_is_task_arithmetic_and_at_2_needs_two() -> None:
    tensor = Memory(np.zeros(3), np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert run(consensus, tensor, (1.0, 1.0), {"k": 0}).tolist() == [2, 1, 0]
    assert run(consensus, tensor, (1.0, 1.0), {"k": 2}).tolist() == [2, 0, 0]


def test_consensus_of_more_models_than_there_are_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"parameters\.k: got 3 with 2 models.*at most 2"):
        consensus(Memory(np.zeros(2), np.zeros((2, 2))), (1.0, 1.0), k=3)


@pytest.mark.parametrize(("method", "options"), SINGLE)
def test_two_models_beside_the_base_are_an_error(method: Method, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"got 2 beside the base; .* exactly one other"):
        method(Memory(np.zeros(2), np.zeros((2, 2))), (1.0, 1.0), **options)


def test_emr_of_a_model_without_a_change_keeps_nothing() -> None:
    [block] = Memory(np.zeros(2), np.array([[1.0, -3.0], [0.0, 0.0]]))
    found = PER_TASK["emr"](block, (1.0, 1.0), {})
    assert found.sums.tolist() == [[4, 0], [4, 0]]
    assert found.masks.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("nearswap", {}, "parameters.t: missing"),
        ("nearswap", {"t": -1.0}, "got -1.0; at least 0"),
        ("pcb", {"density": 0.0}, "got 0.0; above 0"),
        ("consensus", {"threshold": -0.5}, "got -0.5; at least 0"),
        ("ramplus_tl", {"epsilon": float("inf")}, "got inf; a finite number"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        find(name, "weights").check(options)


def test_consensus_takes_a_threshold_for_each_model() -> None:
    assert find("consensus", "weights").each == ("threshold",)


SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.5]), st.floats(width=32, allow_nan=False)), min_size=1, max_size=40
)


def blocks_of(rows: np.ndarray, length: int) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (rows[:, start : start + length] for start in range(0, rows.shape[1], length))


@given(SCORES, st.integers(1, 9), st.sampled_from([np.float32, np.float64]))
@few
def test_order_statistics_are_those_of_a_sort(values: list[float], length: int, kind: Any) -> None:
    rows = np.array([values, values[::-1]], kind) / kind(3)
    ranks = [0, len(values) // 2, len(values) - 1]
    got = exact.order_statistics(blocks_of(rows, length), 2, ranks)
    assert got.dtype == kind
    np.testing.assert_array_equal(got, np.sort(rows, 1)[:, ranks])
    assert not np.signbit(got[got == 0]).any()


def test_a_row_without_scores_has_zeros() -> None:
    assert exact.order_statistics(list, 2, [0, 0]).tolist() == [[0, 0], [0, 0]]

"""What methods on whole matrices share: decompositions, options, memory, and the same numbers from NumPy and torch."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interfuse as itf
from interfuse import registry
from interfuse.errors import OptionError
from interfuse.methods.decompose import ZERO, directions, like, orthogonal, with_spectrum
from interfuse.methods.knots import align, align_factors, merge_aligned
from interfuse.methods.regression import solve_positive

METHODS = [method for method in registry.methods("weights") if method.form == "matrices"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((method.name, {}) for method in METHODS),
    ("wudi", {"solver": "descent", "steps": 30}),
    ("knots", {"combine": "dare_ties"}),
    ("knots", {"combine": "dare_linear", "normalize": False}),
    ("knots", {"combine": "linear"}),
    ("cart", {"rank_share": 0.0}),
    ("iso_cts", {"common_share": 0.3}),
    ("star", {"normalize": False}),
    ("subspace_boost", {"normalize": True, "leading_share": 0.4}),
]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 10), st.integers(1, 10))


def made(*shape: int, rank: int | None = None) -> np.ndarray:
    random = np.random.default_rng(shape)
    if rank is None:
        return random.standard_normal(shape).astype(np.float32)
    left, right = random.standard_normal((*shape[:-1], rank)), random.standard_normal((*shape[:-2], rank, shape[-1]))
    return (left @ right).astype(np.float32)


def run(name: str, options: dict[str, Any], deltas: Any, weights: tuple[float, ...]) -> Any:
    method = registry.find(name, "weights")
    values = method.check({key: value[0] if isinstance(value, tuple) else value for key, value in options.items()})
    return method.make(deltas, weights, **{key: (v,) if key in method.each else v for key, v in values.items()})


def test_the_methods_on_matrices_are_these() -> None:
    names = ["cart", "iso_c", "iso_cts", "knots", "star", "subspace_boost", "tsv_m", "wudi", "ace"]
    assert sorted(method.name for method in METHODS) == sorted(names)
    for method in METHODS:
        assert method.paper.startswith("https://arxiv.org/abs/")
        assert "lambda" in [field.alias for field in method.options.model_fields.values()], method.name
        assert (method.needs == "a base") == (method.name != "cart")


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@settings(deadline=None, max_examples=12)
@given(shape=SHAPES, rank=st.sampled_from([None, 1, 2]))
def test_numpy_and_torch_agree(name: str, options: dict[str, Any], shape: tuple[int, int, int], rank: int | None) -> None:
    deltas, weights = made(*shape, rank=rank), (1.0, 0.5, 2.0, 0.25)[: shape[0]]
    before = deltas.copy()
    array = run(name, options, deltas, weights)
    tensor = run(name, options, torch.from_numpy(deltas), weights)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    assert array.shape == tuple(tensor.shape) == shape[1:]
    np.testing.assert_allclose(array, tensor.numpy(), atol=1e-5 * max(abs(array).max(), 1e-30), rtol=0)
    assert (deltas == before).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_same_bits_again(name: str, options: dict[str, Any]) -> None:
    deltas = made(3, 40, 30)
    assert run(name, options, deltas, (1.0, 1.0, 2.0)).tobytes() == run(name, options, deltas, (1.0, 1.0, 2.0)).tobytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tsv_m", {"rank_share": 1.5}, "parameters.rank_share: got 1.5; at most 1"),
        ("iso_cts", {"common_share": -0.1}, "parameters.common_share: got -0.1; at least 0"),
        ("iso_c", {"alpha": 1}, "parameters.alpha: unknown option; "),
        ("subspace_boost", {"leading_share": "all"}, "parameters.leading_share: got 'all'"),
        ("cart", {"lambda": float("nan")}, "parameters.lambda: got nan"),
        ("star", {"kept_share": 2}, "parameters.kept_share: got 2; at most 1"),
        ("knots", {"combine": "tie"}, "parameters.combine: got 'tie'"),
        ("knots", {"density": 1.1}, "parameters.density: got 1.1; at most 1"),
        ("wudi", {"solver": "open"}, "parameters.solver: got 'open'"),
        ("wudi", {"prior": 0.0}, "parameters.prior: got 0.0; at least 1e-08"),
        ("ace", {"prior": -1.0}, "parameters.prior: got -1.0; at least 1e-08"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        registry.find(name, "weights").check(options)
    assert message in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12), kept=st.integers(0, 12))
def test_truncated_directions_are_the_full_ones_first(rows: int, columns: int, rank: int, kept: int) -> None:
    matrix = made(rows, columns, rank=rank)
    left, values, right = directions(matrix, kept)
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    there = min(kept, int((s > ZERO * s[0]).sum()))
    assert len(values) == there
    np.testing.assert_allclose(values, s[:there], atol=1e-9 * s[0])
    np.testing.assert_allclose((left * values) @ right, (u[:, :there] * s[:there]) @ v[:there], atol=1e-6 * s[0])
    np.testing.assert_allclose(left.T @ left, np.eye(there), atol=1e-9)
    np.testing.assert_allclose(right @ right.T, np.eye(there), atol=1e-4)


def test_directions_below_least_are_none() -> None:
    matrix = np.diag([4.0, 2.0, 1.0])
    assert directions(matrix).values.tolist() == [4, 2, 1]
    assert directions(matrix, least=1.5).values.tolist() == [4, 2]
    assert directions(matrix, 1, least=5.0).left.shape == (3, 0)
    assert directions(np.diag([1.0, ZERO / 2])).values.tolist() == [1]


def test_spectra_are_changed_as_told_and_zeros_stay() -> None:
    matrix = made(9, 14, rank=3).astype(np.float64)
    seen = []
    doubled = with_spectrum(matrix, lambda s: seen.append(s) or 2 * s + 1)  # type: ignore[func-returns-value]
    s = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(seen[0][:3], s[:3], rtol=1e-9)
    assert len(seen[0]) == 9
    np.testing.assert_allclose(np.linalg.svd(doubled, compute_uv=False), [*(2 * s[:3] + 1), *[0] * 6], atol=1e-6)
    np.testing.assert_allclose(with_spectrum(matrix.T, lambda s: 2 * s + 1), doubled.T, atol=1e-8)


def test_the_polar_factor_is_the_nearest_orthonormal_matrix() -> None:
    matrix = made(12, 5).astype(np.float64)
    nearest = orthogonal(matrix)
    np.testing.assert_allclose(nearest.T @ nearest, np.eye(5), atol=1e-9)
    random = np.random.default_rng(0)
    for _ in range(50):
        other = np.linalg.qr(nearest + 0.1 * random.standard_normal(nearest.shape))[0]
        other *= np.sign((other * nearest).sum(0))
        assert np.linalg.norm(matrix - other) >= np.linalg.norm(matrix - nearest)


def test_results_do_not_depend_on_the_signs_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weights = made(3, 12, 9), (1.0, 0.5, 2.0)
    expected = [run(name, options, deltas, weights) for name, options in CASES]
    plain, random = np.linalg.eigh, np.random.default_rng(1)

    def flipped(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squares, vectors = plain(matrix)
        return squares, vectors * random.choice([-1, 1], len(squares))

    monkeypatch.setattr(np.linalg, "eigh", flipped)
    for (name, options), before in zip(CASES, expected, strict=True):
        after = run(name, options, deltas, weights)
        np.testing.assert_allclose(after, before, atol=1e-6 * abs(before).max(), err_msg=name)


def test_a_part_of_the_directions_is_found_faster_than_all_by_svd() -> None:
    matrix = made(400, 1600)

    def fastest(what: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            what()
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(lambda: directions(matrix, 130)) < fastest(lambda: np.linalg.svd(matrix, full_matrices=False))


@pytest.mark.parametrize("models", [2, 5])
@pytest.mark.parametrize(
    ("name", "copies"),
    [("tsv_m", 6), ("iso_c", 4), ("iso_cts", 7), ("subspace_boost", 4), ("cart", 6), ("star", 6), ("wudi", 9), ("ace", 9)],
)
def test_memory_is_a_few_matrices_whatever_the_number_of_models(name: str, copies: int, models: int) -> None:
    side = 200
    deltas = made(models, side, side)
    run(name, {}, deltas, (1.0,) * models)
    tracemalloc.start()
    run(name, {}, deltas, (1.0,) * models)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (copies + 0.5) * side * side * 8


def test_helpers_run_on_tensors_too() -> None:
    half = torch.from_numpy(made(300, 310)).double()
    matrix, right = half @ half.T + torch.eye(300), torch.from_numpy(made(300, 3)).double()
    torch.testing.assert_close(matrix @ solve_positive(matrix, right), right)
    ups, downs = [torch.from_numpy(made(8, r)) for r in (2, 3)], [torch.from_numpy(made(r, 6)) for r in (2, 3)]
    basis, parts = align_factors(ups, downs)
    assert basis.shape == (8, 5)
    expected = align(torch.stack([up @ down for up, down in zip(ups, downs, strict=True)]))
    got = basis @ merge_aligned(parts, (1.0, 1.0))
    torch.testing.assert_close(got, expected[0] @ merge_aligned(expected[1], (1.0, 1.0)), atol=1e-5, rtol=0)
    assert like(got, ups[0]).dtype == torch.float32


def test_numpy_alone_does_it() -> None:
    code = (
        "import sys, numpy as np; from interfuse import registry; "
        "d = np.eye(3, dtype=np.float32)[None]; "
        "[m.make(d, (1.0,)) for m in registry.methods('weights') if m.form == 'matrices']; "
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("based", [True, False])
def test_vectors_take_the_scaled_mean_delta_from_a_base_if_there_is_one(based: bool) -> None:
    base, first, second = (np.array(values, np.float32) for values in ([1, 2, 3], [3, 2, 1], [2, 2, 6]))
    got = itf.merge("cart", [{"x": first}, {"x": second}], base={"x": base} if based else None, lambda_=0.5)["x"]
    t0 = base if based else np.zeros(3)
    np.testing.assert_allclose(got, t0 + 0.5 * ((first + second) / 2 - t0), rtol=1e-6)

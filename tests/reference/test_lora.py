"""LoRA against the papers' formulas, written slowly in float64: W + s B A, DoRA's norms, KnOTS and SVD on whole matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from interfuse.checkpoints.adapters.lora import open_adapter, with_adapter
from interfuse.checkpoints.source import open_checkpoint
from interfuse.engine.adapters.extract import extract_lora
from interfuse.engine.adapters.methods import Factors, knots, linear, svd, truncate


def slow_weight(weight: np.ndarray, up: np.ndarray, down: np.ndarray, scale: float) -> np.ndarray:
    """2106.09685, equation 3: W + (alpha / r) B A, element by element."""
    result = weight.astype(np.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] += scale * math.fsum(float(up[i, k]) * float(down[k, j]) for k in range(up.shape[1]))
    return result


def slow_dora(weight: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """2402.09353, equation 5: m V / |V|; the paper's columns are the rows of a weight stored [out, in]."""
    result = weight.copy()
    for i, row in enumerate(weight):
        result[i] = magnitude[i] * row / math.sqrt(math.fsum(float(x) ** 2 for x in row))
    return result


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_patched_weight(tmp_path: Path, dora: bool, stabilised: bool) -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((7, 5)).astype("f4")
    up, down = random.standard_normal((7, 3)).astype("f4"), random.standard_normal((3, 5)).astype("f4")
    magnitude = random.uniform(0.5, 2, 7).astype("f4")
    tensors = {"base_model.model.x.lora_A.weight": down, "base_model.model.x.lora_B.weight": up}
    if dora:
        tensors["base_model.model.x.lora_magnitude_vector"] = magnitude
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_rslora": stabilised, "use_dora": dora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = slow_weight(weight, up, down, 5 / math.sqrt(3) if stabilised else 5 / 3)
    if dora:
        expected = slow_dora(expected, magnitude)
    got = with_adapter(open_checkpoint({"x.weight": weight}), open_adapter(tmp_path)).read("x.weight")
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def slow_truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return sum((s[k] * np.outer(u[:, k], v[k]) for k in range(min(rank, len(s)))), np.zeros_like(matrix))


def slow_knots(changes: list[np.ndarray], weights: list[float], density: float, rank: int) -> np.ndarray:
    """2410.19735: one SVD of the changes side by side, TIES (2306.01708) on its right parts, back by its left vectors."""
    u, s, v = np.linalg.svd(np.concatenate(changes, 1), full_matrices=False)
    there = s > 1e-9 * s[0]
    u, right = u[:, there], (s[:, None] * v)[there]
    width = changes[0].shape[1]
    parts = [right[:, i * width : (i + 1) * width] for i in range(len(changes))]
    merged = np.zeros_like(parts[0])
    kept = []
    for part in parts:
        order = sorted(np.ndindex(*part.shape), key=lambda at: (-abs(part[at]), at))
        trimmed = np.zeros_like(part)
        for at in order[: int(density * part.size)]:
            trimmed[at] = part[at]
        kept.append(trimmed)
    for at in np.ndindex(*merged.shape):
        sign = np.sign(sum(w * part[at] for w, part in zip(weights, kept, strict=True)))
        agreeing = [(w, part[at]) for w, part in zip(weights, kept, strict=True) if sign and np.sign(part[at]) == sign]
        if agreeing:
            merged[at] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return slow_truncated(u @ merged, rank)


def some(seed: int, ranks: list[int], rows: int, columns: int) -> list[Factors]:
    random = np.random.default_rng(seed)
    return [Factors(random.standard_normal((rows, r)), random.standard_normal((r, columns))) for r in ranks]


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 6),
)
def test_merges_in_factors_are_merges_of_matrices(seed: int, ranks: list[int], rows: int, columns: int, rank: int) -> None:
    factors = some(seed, ranks, rows, columns)
    weights = [1.0, 2.0, 0.5][: len(ranks)]
    changes = [pair.up @ pair.down for pair in factors]
    mean = sum(w * change for w, change in zip(weights, changes, strict=True)) / sum(weights)
    got = linear(factors, weights)
    np.testing.assert_allclose(got.up @ got.down, mean, atol=1e-12)
    assert got.up.shape[1] == sum(ranks)
    best = slow_truncated(mean, rank)
    got = svd(factors, weights, rank=rank)
    assert len(got.down) <= rank
    assert np.linalg.norm(got.up @ got.down - mean) == pytest.approx(float(np.linalg.norm(best - mean)), abs=1e-10)


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_knots_in_factors_is_knots_of_matrices(density: float) -> None:
    for seed in range(4):
        factors, weights = some(seed, [2, 3], 9, 7), [1.0, 2.0]
        expected = slow_knots([pair.up @ pair.down for pair in factors], weights, density, 4)
        got = knots(factors, weights, density=(density,), rank=4)
        np.testing.assert_allclose(got.up @ got.down, expected, atol=1e-8)


def test_an_absent_change_counts_as_zero() -> None:
    (pair,) = some(1, [2], 5, 4)
    absent = Factors(np.zeros((5, 0)), np.zeros((0, 4)))
    for method in (linear, svd):
        got = method([pair, absent], [1.0, 1.0])
        np.testing.assert_allclose(got.up @ got.down, pair.up @ pair.down / 2, atol=1e-12)
    zero = truncate(Factors(np.zeros((5, 2)), np.zeros((2, 4))), 2)
    assert (zero.up.shape, np.abs(zero.up @ zero.down).max()) == ((5, 1), 0)


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 4), ((90, 120), 6), ((120, 90), 6)])
def test_extraction_loses_no_more_than_it_must(tmp_path: Path, shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: the least that a product of that rank can lose. The larger ones are found by subspace iteration."""
    random = np.random.default_rng(2)
    spectrum = np.diag(0.9 ** np.arange(max(shape)))[: shape[0], : shape[1]]
    u, v = (np.linalg.qr(random.standard_normal((side, side)))[0] for side in shape)
    change = (u @ spectrum @ v).astype("f4")
    got = extract_lora({"x.weight": change}, {"x.weight": 0 * change}, tmp_path / "out", rank=rank)
    values = np.linalg.svd(change.astype("f8"), compute_uv=False)
    least = math.sqrt(float((values[rank:] ** 2).sum() / (values**2).sum()))
    assert got.error == pytest.approx(least, rel=1e-4)
    assert got.tensors[0].rank == rank


def test_energy_keeps_the_fewest_directions_that_reach_it(tmp_path: Path) -> None:
    change = np.random.default_rng(4).standard_normal((12, 10)).astype("f4")
    share = np.cumsum(np.linalg.svd(change.astype("f8"), compute_uv=False) ** 2)
    share /= share[-1]
    for energy in (0.3, 0.8, 0.99, 1.0):
        out = tmp_path / str(energy)
        got = extract_lora({"x.weight": change}, {"x.weight": 0 * change}, out, rank=None, energy=energy)
        assert got.tensors[0].rank == int(np.argmax(share >= energy * (1 - 1e-9))) + 1

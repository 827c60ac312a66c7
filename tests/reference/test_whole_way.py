"""Methods by the whole way of a merge, engine and torch form, against slow float64 references that are the papers' words.

Nothing of the library is in a reference: not its sums, not its draws. Where a method draws, its result must be what some
draw gives, at every entry, and the draws it must have had are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import interfuse as itf
from interfuse.checkpoints.source import BLOCK, open_checkpoint
from interfuse.checkpoints.writer import MemoryWriter
from interfuse.engine.chain import plan_recipe
from interfuse.engine.local import execute
from interfuse.recipe import Recipe

Tensors = dict[str, np.ndarray]
SHAPES: dict[str, tuple[int, ...]] = {"layers.0.w": (24, 14), "layers.1.w": (9, 30), "conv": (5, 3, 2, 2), "bias": (17,)}
WEIGHTS = (1.0, 0.5, 2.0)


def made(count: int, spread: float, seed: int = 0, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Tensors]:
    """A base, and models that lie about it."""
    draw = np.random.default_rng(seed)
    base = {name: np.asarray(draw.standard_normal(shape, np.float32)) for name, shape in (shapes or SHAPES).items()}
    moved = lambda value: np.asarray(value + np.float32(spread) * draw.standard_normal(value.shape, np.float32))
    return [base, *({name: moved(value) for name, value in base.items()} for _ in range(count))]


def merged(states: Sequence[Tensors], method: str, device: str | None, seed: int = 0, **options: Any) -> Tensors:
    """What the engine (None) or the torch form ("cpu") makes of a base and models."""
    names = [f"m{i}" for i in range(len(states) - 1)]
    entries = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, WEIGHTS, strict=False)]
    content = {"merge_method": method, "base_model": "base", "models": entries, "parameters": options, "seed": seed}
    held = {name: open_checkpoint(state) for name, state in zip(["base", *names], states, strict=True)}
    plan, sources = plan_recipe(Recipe.model_validate(content), held)
    writer = MemoryWriter(plan.specs)
    execute(plan, sources, writer, device=device, progress=False)
    return writer.tensors


def deltas(states: Sequence[Tensors], name: str) -> np.ndarray:
    return np.stack([state[name].astype(np.float64) - states[0][name] for state in states[1:]])


def check(got: Tensors, states: Sequence[Tensors], wanted: Callable[[np.ndarray], np.ndarray]) -> None:
    """Each tensor is its base plus what is wanted of the deltas, to float32's rounding."""
    for name, base in states[0].items():
        d = deltas(states, name)
        tolerance = 4e-7 * float(abs(base).max() + abs(d).max())
        np.testing.assert_allclose(got[name], base.astype(np.float64) + wanted(d), rtol=0, atol=tolerance, err_msg=name)


# --- WUDI, https://arxiv.org/abs/2503.08099: 300 steps of Adam on sum |(D - D_i) D_i'|^2 / |D_i|^2, from the sum ---


def wudi_by_descent(d: np.ndarray, steps: int, rate: float) -> np.ndarray:
    weights = WEIGHTS[: len(d)]
    if d[0].ndim == 1:
        return np.asarray(sum(w * one for w, one in zip(weights, d, strict=True)) / sum(weights))
    matrices = [one.reshape(len(one), -1) for one in d]
    found = sum(w * one for w, one in zip(weights, matrices, strict=True))
    mean, square = np.zeros_like(matrices[0]), np.zeros_like(matrices[0])
    for step in range(1, steps + 1):
        slope = sum(w * 2 * (found - one) @ one.T @ one / (one**2).sum() for w, one in zip(weights, matrices, strict=True))
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        found = found - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return np.asarray(found).reshape(d.shape[1:])


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("models", "spread"), [(1, 1e-3), (1, 1.0), (2, 1e-2), (3, 1e-3), (3, 1.0)])
def test_wudi_by_descent(models: int, spread: float, device: str | None) -> None:
    """One model starts at the minimum, and must stay there though Adam makes a full step of any slope."""
    states = made(models, spread)
    got = merged(states, "wudi", device, solver="descent", steps=60, learning_rate=1e-4)
    check(got, states, lambda d: wudi_by_descent(d, 60, 1e-4))


# --- PCB-Merging, https://arxiv.org/abs/2410.02396, as its authors compute it ---


def pcb(d: np.ndarray, density: float, scale: float) -> np.ndarray:
    """Each entry counts by its place within its task and by its agreement with the others; the best compete."""
    flat = d.reshape(len(d), -1)
    total, shares = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
    for weight, one in zip(WEIGHTS, flat, strict=False):
        size = abs(one)
        within = np.exp(len(d) * ((size - size.min()) / (size.max() - size.min())) ** 2)
        score = within * np.tanh(one * flat.sum(0))
        ranks = sorted(range(len(score)), key=lambda at: score[at])
        cut, top = score[ranks[int(len(score) * (1 - density))]], score[ranks[-1]]
        share = np.array([(value - cut) / (top - cut) if value >= cut else 0.0 for value in score])
        total, shares = total + weight * share * one, shares + share
    return np.array([scale * t / s if s else 0.0 for t, s in zip(total, shares, strict=True)]).reshape(d.shape[1:])


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("models", "spread", "density"), [(2, 1.0, 0.1), (3, 1e-2, 0.3), (3, 1.0, 1.0)])
def test_pcb(models: int, spread: float, density: float, device: str | None) -> None:
    """No tensor is so large that its 0.01% of outliers is one entry."""
    states = made(models, spread, seed=2)
    got = merged(states, "pcb", device, density=density, lambda_=0.5)
    check(got, states, lambda d: pcb(d, density, 0.5))


# --- KnOTS with DARE, https://arxiv.org/abs/2410.19735 and https://arxiv.org/abs/2311.03099 ---


def knots_parts(d: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """U and S V_i' of [D_1 .. D_M] = U S [V_1' .. V_M']."""
    matrices = [one.reshape(len(one), -1) for one in d]
    left, values, right = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    return left, np.split(values[:, None] * right, len(d), 1)


def dare(parts: Sequence[float], kept: Sequence[int], share: float, elect: bool, normalize: bool) -> float:
    """One entry: what is kept, over the chance of it; with an election, only what has the sum's sign."""
    terms = [(w, w * part / share if k else 0.0) for w, part, k in zip(WEIGHTS, parts, kept, strict=False)]
    if elect:
        terms = [(w, term) for w, term in terms if term * sum(t for _, t in terms) > 0]
    return sum(t for _, t in terms) / ((sum(w for w, _ in terms) or 1) if normalize else 1)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("combine", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_knots_with_dare(combine: str, normalize: bool, device: str | None) -> None:
    states = made(2, 1.0, seed=3, shapes={"w": (20, 30), "conv": (12, 4, 2, 2)})
    got = merged(states, "knots", device, seed=5, combine=combine, density=0.3, normalize=normalize, lambda_=0.5)
    counts, entries = np.zeros(2), 0
    for name, base in states[0].items():
        left, parts = knots_parts(deltas(states, name))
        found = left.T @ (got[name].astype(np.float64) - base).reshape(len(base), -1) / 0.5
        for at in np.ndindex(found.shape):
            here = [float(part[at]) for part in parts]
            draws = itertools.product((0, 1), repeat=2)
            fits = {kept: dare(here, kept, 0.3, combine == "dare_ties", normalize) for kept in draws}
            kept, value = min(fits.items(), key=lambda fit: abs(fit[1] - found[at]))
            assert abs(value - found[at]) < 2e-5, f"{name}: no draw gives entry {at}"
            counts, entries = counts + kept, entries + 1
    if combine == "dare_linear":  # an election hides who lost it
        assert np.allclose(counts / entries, 0.3, atol=0.05)  # three standard deviations


# --- An output for each task: EMR, https://arxiv.org/abs/2405.17461, and TALL masks, https://arxiv.org/abs/2405.07813 ---


def emr_of(d: dict[str, np.ndarray], task: int) -> Tensors:
    """The sign of the sum, the largest magnitude of that sign; the task takes its own share of it, scaled as a whole."""
    mine: Tensors = {}
    own = kept = 0.0
    for name, values in d.items():
        weighted = values * np.reshape(WEIGHTS[: len(values)], (-1, *[1] * (values.ndim - 1)))
        sign = np.sign(weighted.sum(0))
        unified = sign * np.where(np.sign(weighted) == sign, abs(weighted), 0).max(0)
        mine[name] = np.where(weighted[task] * unified > 0, unified, 0)
        own, kept = own + abs(weighted[task]).sum(), kept + abs(mine[name]).sum()
    return {name: own / kept * value for name, value in mine.items()}


def tall_of(d: dict[str, np.ndarray], task: int) -> Tensors:
    """The sum of the task vectors where the task's own is at least 0.4 of what the others add."""
    found: Tensors = {}
    for name, values in d.items():
        weighted = values * np.reshape(WEIGHTS[: len(values)], (-1, *[1] * (values.ndim - 1)))
        total = weighted.sum(0)
        found[name] = np.where(abs(weighted[task]) >= 0.4 * abs(total - weighted[task]), total, 0)
    return found


@pytest.mark.parametrize(("method", "of"), [("emr", emr_of), ("consensus", tall_of)])
def test_an_output_for_each_task(tmp_path: Path, method: str, of: Callable[..., Tensors]) -> None:
    """The last tensor is in more than one block, and its end isn't a whole byte of the mask."""
    states = made(3, 0.1, seed=4, shapes={**SHAPES, "none": (0, 3), "one": (), "long": (BLOCK + 13,)})
    for name, state in zip(("base", "x", "y", "z"), states, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    models = {name: tmp_path / f"{name}.safetensors" for name in "xyz"}
    base = tmp_path / "base.safetensors"
    out = itf.merge(method, models, base=base, out=tmp_path / "out", weights=list(WEIGHTS), output="per_task")
    d = {name: deltas(states, name) for name in states[0]}
    for task, name in enumerate("xyz"):
        got = itf.task_model(out, name)
        assert isinstance(got, dict)
        wanted = of(d, task)
        for tensor, value in wanted.items():
            full = states[0][tensor] + value
            wrong = abs(np.asarray(got[tensor]) - full) > 1e-6
            # A mask decides by a comparison, which float32 may see otherwise at a tie.
            assert wrong.sum() <= 1e-5 * wrong.size, f"{tensor} of {name}"

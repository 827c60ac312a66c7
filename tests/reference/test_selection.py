"""Methods that choose entries, streamed in blocks, against their formulas on whole tensors in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.methods.balance import arcee_fusion, pcb
from interfuse.methods.forms import Block
from interfuse.methods.selection import PER_TASK, consensus, emr, magmax, nearswap, ram, ramplus_tl

few = settings(deadline=None, max_examples=40)


class Memory:
    """A tensor in memory as `Blocks`, of at most `length` elements each: whole rows where a row fits."""

    def __init__(self, base: np.ndarray, models: np.ndarray, length: int = 1 << 20) -> None:
        self.shape, self.models = base.shape, len(models)
        row = max(base.shape[-1] if base.ndim else 1, 1)
        self._length = length // row * row if length >= row else length
        self._base = base.reshape(-1)
        self._deltas = models.reshape(len(models), -1) - self._base

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, self._base.size, self._length):
            part = slice(start, start + self._length)
            # A block is valid until the next one: what is kept of it would turn to NaN.
            base, deltas = self._base[part].copy(), self._deltas[:, part].copy()
            yield Block(start, base, deltas)
            base[:], deltas[:] = np.nan, np.nan


def run(method: Callable[..., Any], tensor: Memory, weights: tuple[float, ...], **options: Any) -> np.ndarray:
    merge = method(tensor, weights, **options)
    parts = [merge(block) for block in tensor]
    assert all(part.dtype == np.float32 for part in parts)
    return np.concatenate(parts).reshape(tensor.shape) if parts else np.zeros(tensor.shape, np.float32)


def tensors(seed: int, count: int, shape: tuple[int, ...] = (5, 7), spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A base and models whose entries are small fractions, so that deltas are exact and some are equal or 0."""
    random = np.random.default_rng(seed)
    base = random.integers(-64, 65, shape) / 64 * spread
    models = base + random.integers(-8, 9, (count, *shape)) / 32 * spread
    return base.astype(np.float32), models.astype(np.float32)


def exact(base: np.ndarray, models: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    return (models.astype(np.float64) - base) * np.reshape(weights, (-1, *[1] * base.ndim))


def magmax_reference(d: np.ndarray, scale: float) -> np.ndarray:
    out = np.zeros(d.shape[1:])
    for at in np.ndindex(out.shape):
        out[at] = scale * max(d[(slice(None), *at)], key=lambda x: (abs(x), x))
    return out


def consensus_reference(d: np.ndarray, k: int, threshold: np.ndarray, scale: float) -> np.ndarray:
    total = d.sum(0)
    used = [abs(one) >= least * abs(total - one) for one, least in zip(d, threshold, strict=True)]
    return scale * total * (np.sum(used, 0) >= k)


def emr_reference(d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The unified vector, the masks and the scales."""
    sign = np.sign(d.sum(0))
    unified = sign * np.where(d * sign > 0, abs(d), 0).max(0)
    masks = d * unified > 0
    kept = (masks * abs(unified)).reshape(len(d), -1).sum(1)
    own = abs(d).reshape(len(d), -1).sum(1)
    return unified, masks, np.array([a / b if b else 0.0 for a, b in zip(own, kept, strict=True)])


def ram_reference(d: np.ndarray, weights: np.ndarray, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    changed = abs(d) > epsilon
    count = changed.sum(0)
    out = np.zeros(d.shape[1:])
    for i in range(len(d)):
        own, shared = (changed[i] & (count == 1)).sum(), (changed[i] & (count > 1)).sum()
        boost = 1 + r * np.clip(shared / own, 0, alpha) if own else 1.0
        out += np.where(changed[i], weights[i] * d[i] * np.where(count == 1, boost, 1 / np.maximum(count, 1)), 0)
    return out


def pcb_reference(d: np.ndarray, weights: np.ndarray, density: float, scale: float) -> np.ndarray:
    flat = d.reshape(len(d), -1)
    size = flat.shape[1]
    clip = int(size * 1e-4)
    scores, kept = [], []
    for one in flat:
        order = np.sort(abs(one))
        low, high = order[clip], order[size - 1 - clip]
        c = np.sign(one) * np.clip(abs(one), low, high)
        intra = (abs(c) - low) / (high - low) if high > low else np.zeros(size)
        intra = np.where(one == 0, 0, intra)
        scores.append(np.exp(len(d) * intra**2) * np.tanh(one * flat.sum(0)))
        kept.append(c)
    shares = []
    for score in np.array(scores, np.float32):
        order = np.sort(score)
        cut, top = order[min(int(size * (1 - density)), size - 1)], order[-1]
        within = (np.clip(score, cut, top) - cut) / (float(top) - cut) if top > cut else 1.0 * (score >= cut)
        shares.append(within)
    total = np.sum(shares, 0)
    summed = np.sum([w * s * c for w, s, c in zip(weights, shares, kept, strict=True)], 0)
    return (scale * np.divide(summed, total, out=np.zeros(size), where=total > 0)).reshape(d.shape[1:])


def arcee_reference(base: np.ndarray, model: np.ndarray, weight: float) -> np.ndarray:
    a, b = (np.atleast_1d(x.astype(np.float64)) for x in (base, model))
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) + 1e-8 for x in (a, b))
    kl = np.maximum((p * np.log(p / q)).sum(-1, keepdims=True), 0)
    importance = np.float32(abs(b - a) * kl)
    order = np.sort(importance.reshape(-1)).astype(np.float64)
    first, median, third = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    return (weight * np.where(importance >= median + 1.5 * (third - first), b - a, 0)).reshape(base.shape)


SHAPES = st.sampled_from([(5, 7), (35,), (1, 9), (9, 1), (2, 3, 4), (1,), (), (40, 30)])
CASE = {
    "seed": st.integers(0, 10_000),
    "count": st.integers(1, 5),
    "shape": SHAPES,
    "length": st.sampled_from([1, 3, 16, 4096]),
}
WEIGHTS = (1.0, 0.5, 2.0, -1.0, 0.25)


@given(**CASE, scale=st.sampled_from([1.0, 0.5]))
@few
def test_magmax(seed: int, count: int, shape: tuple[int, ...], length: int, scale: float) -> None:
    base, models = tensors(seed, count, shape)
    got = run(magmax, Memory(base, models, length), WEIGHTS[:count], lambda_=scale)
    np.testing.assert_array_equal(got, magmax_reference(exact(base, models, WEIGHTS[:count]), scale))


@given(**CASE, k=st.integers(0, 5))
@few
def test_consensus(seed: int, count: int, shape: tuple[int, ...], length: int, k: int) -> None:
    base, models = tensors(seed, count, shape)
    threshold = (0.5, 0.25, 1.0, 2.0, 0.0)[:count]
    options = {"k": min(k, count), "threshold": threshold, "lambda_": 0.5}
    got = run(consensus, Memory(base, models, length), WEIGHTS[:count], **options)
    expected = consensus_reference(exact(base, models, WEIGHTS[:count]), min(k, count), np.array(threshold), 0.5)
    np.testing.assert_array_equal(got, expected)


@given(**CASE)
@few
def test_emr(seed: int, count: int, shape: tuple[int, ...], length: int) -> None:
    base, models = tensors(seed, count, shape)
    tensor, weights = Memory(base, models, length), WEIGHTS[:count]
    unified, masks, scales = emr_reference(exact(base, models, weights))
    np.testing.assert_array_equal(run(emr, tensor, weights), unified)
    found = [PER_TASK["emr"](block, weights, {}) for block in tensor]
    got = np.concatenate([tasks.masks for tasks in found], axis=1)
    np.testing.assert_array_equal(got.reshape(masks.shape), masks)
    own, kept = np.sum([tasks.sums for tasks in found], axis=0)
    np.testing.assert_allclose(np.divide(own, kept, out=np.zeros(count), where=kept > 0), scales, rtol=1e-12)


def test_emr_keeps_each_tasks_mean_magnitude() -> None:
    base, models = tensors(3, 4, (30, 20))
    d = exact(base, models, (1.0,) * 4)
    tensor = Memory(base, models)
    unified = run(emr, tensor, (1.0,) * 4)
    own, kept = np.sum([PER_TASK["emr"](block, (1.0,) * 4, {}).sums for block in tensor], axis=0)
    scales = own / kept
    for one, scale in zip(d, scales, strict=True):
        task = scale * unified * (one * unified > 0)
        assert abs(task).mean() == pytest.approx(abs(one).mean())


@given(**CASE, epsilon=st.sampled_from([0.0, 0.04, 0.1]))
@few
def test_ram(seed: int, count: int, shape: tuple[int, ...], length: int, epsilon: float) -> None:
    base, models = tensors(seed, count, shape)
    got = run(ram, Memory(base, models, length), WEIGHTS[:count], epsilon=epsilon)
    expected = ram_reference(exact(base, models, (1.0,) * count), np.array(WEIGHTS[:count]), epsilon)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@given(**CASE, alpha=st.sampled_from([0.2, 5.0]))
@few
def test_ramplus(seed: int, count: int, shape: tuple[int, ...], length: int, alpha: float) -> None:
    base, models = tensors(seed, count, shape)
    options = {"epsilon": 0.1, "r": 0.3, "alpha": alpha}
    got = run(ramplus_tl, Memory(base, models, length), WEIGHTS[:count], **options)
    expected = ram_reference(exact(base, models, (1.0,) * count), np.array(WEIGHTS[:count]), 0.1, 0.3, alpha)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@given(**CASE, density=st.sampled_from([0.1, 0.3, 1.0]))
@few
def test_pcb(seed: int, count: int, shape: tuple[int, ...], length: int, density: float) -> None:
    base, models = tensors(seed, count, shape)
    got = run(pcb, Memory(base, models, length), WEIGHTS[:count], density=density, lambda_=0.5)
    expected = pcb_reference(exact(base, models, (1.0,) * count), np.array(WEIGHTS[:count]), density, 0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_pcb_clips_outliers() -> None:
    base, models = tensors(1, 2, (150, 200))
    models[0, 3, 4] = base[3, 4] + 1000
    models[1, 3, 4] = base[3, 4] + 1000
    got = run(pcb, Memory(base, models, 1000), (1.0, 1.0))
    expected = pcb_reference(exact(base, models, (1.0, 1.0)), np.ones(2), 0.1, 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert got[3, 4] == 0.25


@given(seed=st.integers(0, 10_000), shape=SHAPES, length=st.sampled_from([1, 3, 16, 4096]), t=st.sampled_from([0.0, 0.1, 9.0]))
@few
def test_nearswap(seed: int, shape: tuple[int, ...], length: int, t: float) -> None:
    base, models = tensors(seed, 1, shape)
    d = exact(base, models, (1.0,))[0]
    share = np.clip(np.divide(t, abs(d), out=np.ones_like(d), where=d != 0), 0, 1)
    got = run(nearswap, Memory(base, models, length), (0.5,), t=t)
    np.testing.assert_allclose(got, 0.5 * share * d, rtol=1e-6)


@given(seed=st.integers(0, 10_000), shape=SHAPES, length=st.sampled_from([1, 3, 16, 4096]))
@few
def test_arcee_fusion(seed: int, shape: tuple[int, ...], length: int) -> None:
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape).astype(np.float32)
    models = base[None] + random.standard_normal((1, *shape)).astype(np.float32)
    got = run(arcee_fusion, Memory(base, models, length), (0.5,))
    expected = arcee_reference(base, base + (models - base)[0].astype(np.float64), 0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)

"""Means along arcs of models that have no base: their coefficients needn't sum to 1, and nothing is put in to make them."""

from __future__ import annotations

import numpy as np
import pytest

import interfuse


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_the_norm_is_kept(method: str) -> None:
    random = np.random.default_rng(0)
    models = [{"w": random.normal(size=(8, 8)).astype(np.float32)} for _ in range(2)]
    for model in models:
        model["w"] /= np.linalg.norm(model["w"])
    merged = interfuse.merge(method, models, weights=[0.6, 0.4])["w"]
    assert np.linalg.norm(np.asarray(merged)) == pytest.approx(1, abs=1e-6)

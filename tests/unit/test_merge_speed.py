"""The merge benchmark works on a tiny model, and its float64 references are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from /proc, which is Linux's")
def test_the_quick_benchmark_measures_every_method_it_is_asked_for(tmp_path: Path) -> None:
    methods = ["linear", "slerp", "ties"]
    command = [sys.executable, "-m", "benchmarks.merge_speed", "--quick", "--only", ",".join(methods)]
    done = subprocess.run(
        [*command, "--data", str(tmp_path), "--out", str(tmp_path / "out")], cwd=HERE, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "README.md").read_text()
    for method in methods:
        assert f"| {method} |" in table
        assert found[method]["own"] > 1
        assert found[method]["process"][0] > found[method]["engine"][0] > 0
        # One rounding of a sum in float32: half a step, and a hair where float32 rounded to the middle of two.
        assert found[method]["error"][0] < 0.51
        assert found[method]["error"][1] < 0.26


def test_the_made_fine_tunes_are_as_full_of_zeros_as_real_ones(tmp_path: Path) -> None:
    from benchmarks.merge_speed.model import TINY, make_models, read_tensor

    base, first, second = make_models(tmp_path, TINY, 2)
    name = "model.layers.1.mlp.down_proj.weight"
    deltas = [read_tensor(path, name) - read_tensor(base, name) for path in (first, second)]
    assert deltas[0].shape == TINY.tensors[name]
    for delta in deltas:
        assert 0.40 < np.mean(delta == 0) < 0.48
    assert not np.array_equal(*deltas)


def test_the_reference_of_ties_on_an_example_by_hand() -> None:
    from benchmarks.merge_speed.reference import ties

    base = np.zeros(4)
    one, two = np.array([4.0, 1.0, -3.0, 0.0]), np.array([2.0, 5.0, 3.5, 0.0])
    # Each keeps its two largest: (4, 0, -3, 0) and (0, 5, 3.5, 0); at the third place the signs elect the second.
    assert ties([one, two], base, [1.0, 1.0], 0.5).tolist() == [4.0, 5.0, 3.5, 0.0]

"""The benchmark of all levels works on tiny networks, does nothing twice, and takes its reference by validation."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("sklearn")


def network(width: int) -> Any:
    """A builder of a small network of that width."""

    def build(classes: int, cache: Path) -> nn.Module:
        torch.manual_seed(width)
        stem = nn.Sequential(nn.Conv2d(1, width, 4, stride=4), nn.ReLU())
        return nn.Sequential(stem, nn.Conv2d(width, width, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, classes))

    return build


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark on a set of two kinds of small images, with two small networks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    names = ("data", "networks", "bench", "outputs", "layers", "__main__")
    part: dict[str, Any] = {name: importlib.import_module(f"benchmarks.levels.{name}") for name in names}
    monkeypatch.setattr(part["data"], "VALIDATION", 20)
    monkeypatch.setattr(part["data"], "TEST", 30)
    monkeypatch.setitem(part["data"].SETS, "notmnist", ("image", 24))
    monkeypatch.setitem(part["networks"].PARENTS, "image", {"small": network(4), "wide": network(6)})
    for name in ("small", "wide"):
        monkeypatch.setitem(part["networks"].PLACES, name, ("0", "1"))
        monkeypatch.setitem(part["networks"].UPPER, name, ("4.*",))
    monkeypatch.setitem(part["bench"].RATES, "image", 1e-2)
    monkeypatch.setitem(part["bench"].EPOCHS, "image", 3)
    for name in ("bench", "outputs"):
        monkeypatch.setattr(part[name], "SEEDS", (0, 1))
    random = np.random.default_rng(0)
    folder = tmp_path / "data" / "notmnist"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"labels": ["dark", "light"]}))
    for which in ("train", "test"):
        y = np.arange(100) % 2
        x = (random.integers(0, 160, (100, 8, 8)) + 60 * y[:, None, None]).astype(np.uint8)
        np.savez(folder / f"{which}.npz", x=x, y=y)
    return part["__main__"]


def run(main: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *methods: str) -> list[dict[str, Any]]:
    """The benchmark's command; its results."""
    arguments = ["--data", str(folder / "data"), "--cache", str(folder / "cache"), "--out", str(folder), "--sets", "notmnist"]
    monkeypatch.setattr(sys, "argv", ["levels", *arguments, "--methods", *methods])
    main.main()
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_a_row_a_method_and_nothing_is_trained_twice(levels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(levels, monkeypatch, tmp_path, "parents", "ensembles", "joined")
    assert {row["level"] for row in rows} == {"parents", "baselines", "outputs", "layers"}
    best = [row for row in rows if row["best"]]
    assert len(best) == 1
    parents = [row for row in rows if row["level"] == "parents"]
    assert best[0]["validation"] == max(row["validation"] for row in parents)
    assert all((row["difference"] is None) == row["best"] for row in rows)
    text = (tmp_path / "README.md").read_text()
    assert all(row["method"] in text for row in rows)
    fit = importlib.import_module("interfuse.training.fit")
    monkeypatch.setattr(fit, "_run", lambda *_: pytest.fail("trained again"))
    assert run(levels, monkeypatch, tmp_path, "parents") == rows


def test_batches_of_near_lengths_hold_every_row_once(levels: Any) -> None:
    data = importlib.import_module("benchmarks.levels.data")
    batches = list(data.NearLengths(100, 8))
    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert max(max(batch) - min(batch) for batch in batches) < 80
    assert list(data.NearLengths(100, 8)) != batches

"""A schedule of weights in a recipe: what Python does, logged, drawn, and only where there are weights to set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.recipes import built, folder_of, net, problems

from interfuse import ModelFusion, WeightSchedule, fit
from interfuse.data import load_data
from interfuse.pipeline import run

NETS = """
import torch
from torch import nn

def seeing():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

def blind():
    network = seeing()
    for p in network.parameters():
        p.data.zero_()
    return network
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data and code, which is the current folder."""
    x = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x, y=x[:, :3].argmax(1))
    yield from folder_of(NETS, tmp_path, monkeypatch)


def weighted(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "weighted",
        "models": [net("seeing"), net("blind")],
        "data": {"train": "train.npz", "validation": 0.25},
        "training": {"epochs": 3, "learning_rate": 0.01, "schedule": {"temperature": 0.2}},
        **changes,
    }


def test_weights_are_set_by_validation_logged_and_drawn(work: Path) -> None:
    record = run(weighted(), "out", trust_code=True, progress=False)
    models = {name: built(name) for name in ("seeing", "blind")}
    rest, part = load_data("train.npz").split(0.25, 0)
    schedule = WeightSchedule(temperature=0.2)
    fusion = ModelFusion(models, "weighted", head=3)
    found = fit(fusion, rest, part, epochs=3, learning_rate=0.01, progress=False, callbacks=[schedule.callback()])
    assert record.training is not None
    assert record.training["schedule"] == {"options": {"temperature": 0.2}, "history": schedule.history}
    assert [row.get("weight_seeing") for row in record.training["history"]] == [
        row.get("weight_seeing") for row in found.history
    ]
    last = schedule.history[-1]
    assert last["seeing"] > last["blind"]
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["run"]["training"]["schedule"]["history"] == schedule.history
    picture = (work / "out" / "weights.svg").read_text()
    assert "<svg" in picture
    card = (work / "out" / "README.md").read_text()
    assert "![Each model's weight by epoch](weights.svg)" in card
    kept = schedule.history[max(record.training["best_epoch"], 1) - 1]
    assert f"weights set by validation: seeing {kept['seeing']:.4g}, blind {kept['blind']:.4g}" in card
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    names = sorted(path.name for path in (work / "out").iterdir())
    assert names == sorted(path.name for path in (work / "again").iterdir())
    assert all((work / "again" / name).read_bytes() == (work / "out" / name).read_bytes() for name in names)


def test_a_schedule_stands_where_there_are_weights_to_set(work: Path) -> None:
    assert set(problems(weighted(fusion="mean"))) == {"training.schedule"}
    assert set(problems(weighted(data={"train": "train.npz"}))) == {"data.validation"}
    assert set(problems(weighted(training={"schedule": {"temperature": 0, "smoothing": 1, "x": 2}}))) == {
        "training.schedule.temperature",
        "training.schedule.smoothing",
        "training.schedule.x",
    }
    run(weighted(training={"epochs": 1, "schedule": {}}), "none", trust_code=True, dry_run=True)

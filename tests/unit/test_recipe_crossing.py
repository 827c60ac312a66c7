"""Recipes of networks side by side: joined and trained as in Python, loaded again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.recipes import built, folder_of, net, problems, quadrants

from interfuse import CrossStitch, fit
from interfuse.cli import main
from interfuse.data import load_data
from interfuse.inference.predict import predict
from interfuse.pipeline import compare_runs, load_run, run

NETS = """
import torch
from torch import nn

def _net(seed, width=6, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))

def a():
    return _net(1)

def b():
    return _net(2, 8)

def pair():
    return _net(3, 8, 2)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data and code, which is the current folder."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 96), ("test", 48)):
        x, y = quadrants(draw, count)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    yield from folder_of(NETS, tmp_path, monkeypatch)


def crossed(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "cross_stitch",
        "models": [net("a"), net("b")],
        "parameters": {"at": ["1", "3"], "examples": 72},
        "data": {"train": "train.npz", "validation": 0.25, "test": "test.npz"},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 16},
        **changes,
    }


@pytest.mark.parametrize(("heads", "freeze"), [("own", True), ("shared", True), ("shared", False)])
def test_networks_are_joined_and_trained_as_in_python(heads: str, freeze: bool, work: Path) -> None:
    parameters = {"at": {"b": ["1", "3"], "a": ["1", "3"]}, "examples": 72, "heads": heads, "own": 0.8}
    models = [net("a", freeze=freeze), net("b", freeze=freeze)]
    record = run(crossed(parameters=parameters, models=models), "out", trust_code=True, progress=False)
    rest, part = load_data("train.npz").split(0.25, 0)
    example = next(iter(rest.loader(72, shuffle=True)))[0]
    head = 3 if heads == "shared" else None
    torch.manual_seed(0)
    model = CrossStitch({"a": built("a"), "b": built("b")}, ["1", "3"], example, own=0.8, freeze=freeze, head=head)
    fit(model, rest, part, epochs=2, learning_rate=0.01, batch_size=16, progress=False)
    found = load_run("out", trust_code=True)
    assert isinstance(found, CrossStitch)
    test = load_data("test.npz")
    outputs = predict(found, test, progress=False)
    assert torch.allclose(outputs.outputs, predict(model, test, progress=False).outputs, atol=1e-5)
    assert outputs.targets is not None
    assert record.test is not None
    assert record.test["value"] == pytest.approx(float((outputs.outputs.argmax(1) == outputs.targets).double().mean()))
    assert "# Cross-stitch of a and b" in (work / "out" / "README.md").read_text()
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "again" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()


def test_one_head_joins_other_classes_and_a_run_is_compared(work: Path) -> None:
    parameters = {"at": ["1"], "heads": "shared"}
    record = run(crossed(models=[net("a"), net("pair")], parameters=parameters), "out", trust_code=True, progress=False)
    assert record.test is not None
    compared = compare_runs(["out"], "test.npz", trust_code=True, progress=False)
    assert compared["out"].score.value == pytest.approx(record.test["value"])
    assert json.loads((work / "out" / "interfuse.json").read_text())["made"]["by"] == "cross_stitch"


def test_what_is_wrong_is_said_at_once(work: Path) -> None:
    wrong = crossed(
        models=[net("a"), net("b", freeze=False, tap="1")],
        parameters={"at": {"a": ["1"], "c": ["1", "3"]}, "own": 2},
        data={"test": "test.npz"},
        head=3,
        target="python:recipenets:a",
    )
    assert set(problems(wrong)) == {
        "models[1].freeze",
        "models[1].tap",
        "parameters.at.b",
        "parameters.at.c",
        "parameters.at",
        "parameters.own",
        "data.train",
        "head",
        "target",
    }
    assert set(problems(crossed(parameters={}))) == {"parameters.at"}
    assert set(problems(crossed(parameters={"at": [["1"], ["1", "3"]]}))) == {"parameters.at"}
    assert set(problems(crossed(models=[net("a")], parameters={"at": [["1"], ["1"]]}))) == {"models", "parameters.at"}


def test_a_dry_run_says_what_would_be_done(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "r.yaml").write_text(json.dumps(crossed()))
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out", "--dry-run", "--trust-code"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "cross_stitch\n" in shown
    assert "own: 0.9" in shown
    assert not (work / "out").exists()

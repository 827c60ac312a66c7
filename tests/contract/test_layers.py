"""What every method of layers promises, in Python and in recipes: all that are registered are held to it, on small networks."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import CheckpointError, RecipeError
from interfuse.pipeline import load_run, run
from interfuse.registry import Method, methods

NETS = """
import torch
from torch import nn

def net(seed=1, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

def other():
    return net(2)

def target():
    return net(3)
"""
MODELS = [{"model": "python:contractnets:net", "name": "a"}, {"model": "python:contractnets:other", "name": "b"}]
DATA = {"train": "train.npz", "validation": 0.25, "test": "test.npz"}
TRAINING = {"epochs": 2, "learning_rate": 0.02, "batch_size": 16}


def parents() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for seed, name in enumerate("ab", 1):
        torch.manual_seed(seed)
        found[name] = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return found


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(48) % 3
    return torch.eye(3, 6)[targets] * 2 + torch.randn(48, 6, generator=generator), targets


@dataclass(frozen=True)
class Case:
    """How one method is run: what its recipe adds, and its Python form on networks that it mustn't change."""

    recipe: dict[str, Any]
    make: Callable[[dict[str, nn.Module]], Any]
    tasks: bool = False
    models: list[dict[str, Any]] = field(default_factory=lambda: MODELS)


def _transplant(models: dict[str, nn.Module]) -> Any:
    return itf.transplant(models["a"], itf.build(models["b"]), show=False)


def _stages(models: dict[str, nn.Module]) -> Any:
    stage = itf.Stage("all", copied={"a": ["0.*"]}, options={"epochs": 1})
    return itf.Stages([stage]).run(itf.build(models["b"]), models, samples(), progress=False, accelerator="cpu")


CASES = {
    "transplant": Case(
        {
            "target": "python:contractnets:target",
            "parameters": {"rules": {"0.*": "0.*", "*": None}},
            "data": {"test": "test.npz"},
        },
        _transplant,
        models=MODELS[:1],
    ),
    "stages": Case(
        {
            "target": "python:contractnets:target",
            "stages": [
                {"copied": {"a": ["0.*"], "b": ["2.*"]}, "training": {"train_only": "head"}},
                {"grow": {"wider": {"0": 12}}},
            ],
            "training": TRAINING,
        },
        _stages,
    ),
    "share_trunk": Case(
        {"parameters": {"depth": 2}, "training": TRAINING}, lambda models: itf.share_trunk(models, 2), tasks=True
    ),
    "tie": Case({"parameters": {"layers": ["2"]}, "training": TRAINING}, lambda models: itf.tie(models, ["2"]), tasks=True),
    "stitch": Case(
        {"parameters": {"at": ["1", "3"]}, "training": TRAINING},
        lambda models: itf.stitch(models["a"], models["b"], ("1", "3"), samples()[0], progress=False),
    ),
    "cross_stitch": Case(
        {"parameters": {"at": ["1"]}, "training": TRAINING},
        lambda models: itf.CrossStitch(models, at=["1"], example=samples()[0]),
    ),
}
EVERY = pytest.mark.parametrize("method", methods("layers"), ids=lambda method: method.name)


def recipe(method: Method, **changes: Any) -> dict[str, Any]:
    case = CASES[method.name]
    return {"fusion": method.name, "models": case.models, "data": DATA, "seed": 3, **case.recipe, **changes}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data and code that builds networks, and the current one while these tests run."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "contractnets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    for name, count in (("train", 64), ("test", 48)):
        y = np.arange(count) % 3
        x = draw.normal(size=(count, 6)) + 2 * np.eye(6)[y]
        np.savez(folder / f"{name}.npz", x=x.astype(np.float32), y=y)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder
    sys.modules.pop("contractnets", None)


@pytest.fixture(scope="module")
def runs(place: Path) -> Callable[[Method], Path]:
    """Each method's output, made once."""

    def made(method: Method) -> Path:
        out = place / method.name
        if not out.exists():
            run(recipe(method), out, trust_code=True, progress=False)
        return out

    return made


def outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found if isinstance(found, dict) else {"": found}


def test_every_method_of_layers_is_held_to_this() -> None:
    assert [method.name for method in methods("layers")] == list(CASES)


@EVERY
def test_the_networks_given_stay_as_they_are(method: Method) -> None:
    models = parents()
    models["a"].train()
    models["b"].eval()
    before = {name: copy.deepcopy(network.state_dict()) for name, network in models.items()}
    made = CASES[method.name].make(models)
    assert made is not None
    for name, network in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert (models["a"].training, models["b"].training) == (True, False)
    assert not any(network._forward_hooks for model in models.values() for network in model.modules())


@EVERY
def test_what_is_saved_is_loaded_to_the_bit(method: Method, runs: Callable[[Method], Path]) -> None:
    out, inputs = runs(method), samples()[0]
    first, second = (load_run(out, trust_code=True) for _ in range(2))
    stored = load_file(out / "model.safetensors")
    shared = json.loads((out / "interfuse.json").read_text()).get("shared", {})
    state = first.state_dict()
    assert set(state) == {*stored, *shared}
    for name, value in state.items():
        assert np.array_equal(value.numpy(), stored[shared.get(name, name)]), name
    again = outputs(second, inputs)
    assert again
    assert all(torch.equal(value, again[task]) for task, value in outputs(first, inputs).items())


@EVERY
def test_every_tensor_is_stored_once(method: Method, runs: Callable[[Method], Path]) -> None:
    out = runs(method)
    model = load_run(out, trust_code=True)
    held = {id(tensor): tensor.numel() for tensor in (*model.parameters(), *model.buffers())}
    assert sum(value.size for value in load_file(out / "model.safetensors").values()) == sum(held.values())


@EVERY
def test_one_recipe_gives_one_folder(method: Method, runs: Callable[[Method], Path]) -> None:
    out = runs(method)
    again = out.with_name(f"{method.name}-again")
    run(out / "recipe.yaml", again, trust_code=True, progress=False)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert [name for name in names if (out / name).read_bytes() != (again / name).read_bytes()] == []


@EVERY
def test_the_record_is_of_what_is_loaded(method: Method, runs: Callable[[Method], Path]) -> None:
    out = runs(method)
    about = json.loads((out / "interfuse.json").read_text())["run"]
    model: Any = load_run(out, trust_code=True)
    data = itf.load_data(str(out.parent / "test.npz"))
    tested = {"": (model, about["test"])}
    if CASES[method.name].tasks:
        tested = {name: (model.network(name), task["test"]) for name, task in about["tasks"].items()}
    for network, said in tested.values():
        found = itf.predict(network, data, progress=False)
        assert found.targets is not None
        assert said["value"] == pytest.approx(float((found.outputs.argmax(1) == found.targets).double().mean()))
        assert said["low"] <= said["value"] <= said["high"]
    assert [model["name"] for model in about["inputs"]["models"]][: len(about["models"])] == about["models"]
    assert all(model["xxh3"] for model in about["inputs"]["models"])
    assert all(source["sha256"] for source in about["inputs"]["data"].values())
    card = (out / "README.md").read_text()
    assert all(entry["model"] in card for entry in CASES[method.name].models)
    assert "test accuracy" in card


@EVERY
def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(method: Method, place: Path) -> None:
    wrong = recipe(method, dada={}, dtype="float16", parameters={"nonsense": 1})
    wrong["data"] = {**wrong["data"], "test": "absent.npz"}
    with pytest.raises(RecipeError) as raised:
        run(wrong, place / "never")
    found = {problem.path for problem in raised.value.problems}
    assert {"dada", "dtype", "parameters.nonsense", "data.test", "models[0].model"} <= found
    assert not (place / "never").exists()
    assert not list(place.glob(".never*"))


@EVERY
def test_a_dry_run_writes_nothing(method: Method, place: Path) -> None:
    text = run(recipe(method), place / "dry", trust_code=True, dry_run=True, progress=False).text()
    assert method.name in text
    assert all(entry["name"] in text for entry in CASES[method.name].models)
    assert "nothing was written" in text
    assert not (place / "dry").exists()


@EVERY
def test_an_output_that_is_there_is_kept(method: Method, runs: Callable[[Method], Path]) -> None:
    out = runs(method)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is there already"):
        run(recipe(method), out, trust_code=True, progress=False)
    assert (out / "model.safetensors").read_bytes() == before

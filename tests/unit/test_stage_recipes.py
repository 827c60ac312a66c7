"""Stages in recipes: growth, data of a stage's own, and a run that is killed and goes on to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.unit.recipes import SEEDED, folder_of

import interfuse as itf
from interfuse.data import load_data
from interfuse.errors import CheckpointError, ModelError, OptionError, RecipeError
from interfuse.pipeline import load_run, run
from interfuse.pipeline.growing import form_of, made_of

NETS = """
def net(seed=1):
    return _seeded(seed, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def source():
    return net(2)

import os, signal

class Fatal(nn.Module):
    steps = 0

    def forward(self, x):
        Fatal.steps += self.training
        if Fatal.steps == int(os.environ.get("KILLED_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        return x

def fatal():
    return nn.Sequential(*net(), Fatal())
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data, and code that builds networks; it is the current folder."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 64), ("later", 48), ("test", 60)):
        y = np.arange(count) % 3
        x = draw.normal(size=(count, 6)).astype(np.float32) + 2 * np.eye(6, dtype=np.float32)[y]
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    yield from folder_of(SEEDED + NETS, tmp_path, monkeypatch)


def staged(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "stages",
        "target": "python:recipenets:net",
        "models": [{"model": "python:recipenets:source", "name": "a"}],
        "stages": [
            {"name": "copy", "copied": {"a": ["0.*"]}, "training": {"train_only": "head", "epochs": 1}},
            {"name": "grow", "grow": {"wider": {"0": 12}, "deeper": ["3"]}, "training": {"epochs": 1}},
            {"name": "all", "data": {"train": "later.npz"}},
        ],
        "data": {"train": "train.npz", "validation": 0.25, "test": "test.npz"},
        "training": {"epochs": 2, "learning_rate": 0.02, "batch_size": 16},
        **changes,
    }


def accuracy(network: torch.nn.Module) -> float:
    outputs, targets, _ = itf.predict(network, load_data("test.npz"), progress=False)
    assert targets is not None
    return float((outputs.argmax(1) == targets).double().mean())


def test_a_stage_grows_the_network_which_is_loaded_again(work: Path) -> None:
    record = run(staged(), "out", trust_code=True, progress=False)
    made = load_run("out", trust_code=True)
    assert made[0].out_features == 12  # type: ignore[index]
    assert len(list(made)) == 7  # type: ignore[call-overload]
    assert record.test is not None
    assert record.test["value"] == pytest.approx(accuracy(made))
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["grown"][0]["wider"] == {"0": 12}
    assert about["grown"][0]["example"]["shape"] == [4, 6]
    assert not (work / "out" / ".stages").exists()
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "out/model.safetensors").read_bytes() == (work / "again/model.safetensors").read_bytes()
    text = run(staged(), "dry", trust_code=True, dry_run=True).text()
    assert "grow: {'grow': {'wider': {'0': 12}, 'deeper': ['3']}" in text


def test_growth_changes_nothing_that_the_network_computes(work: Path) -> None:
    recipe = staged(stages=[{"grow": {"wider": {"0": 12}, "deeper": ["3"]}}], training={"epochs": 0})
    run(recipe, "out", trust_code=True, progress=False)
    from recipenets import net  # type: ignore[import-not-found]

    x = torch.randn(9, 6)
    torch.testing.assert_close(load_run("out", trust_code=True)(x), net().eval()(x), rtol=0, atol=1e-5)


def test_a_target_grows_and_learns_without_models_to_copy_from(work: Path) -> None:
    recipe = staged(stages=[{"grow": {"deeper": ["3"]}}])
    del recipe["models"]
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.title() == "stages"
    assert len(list(load_run("out", trust_code=True))) == 7  # type: ignore[call-overload]


def test_a_stage_trains_on_data_of_its_own(work: Path) -> None:
    own = staged(stages=[{"data": {"train": "later.npz"}}])
    run(own, "own", trust_code=True, progress=False)
    plain = staged(stages=[{}], data={"train": "later.npz", "validation": 0.25, "test": "test.npz"})
    run(plain, "plain", trust_code=True, progress=False)
    assert (work / "own/model.safetensors").read_bytes() == (work / "plain/model.safetensors").read_bytes()
    alone = staged(stages=[{"data": {"train": "later.npz", "validation": 0.25}}], data={"test": "test.npz"})
    run(alone, "alone", trust_code=True, progress=False)
    assert (work / "alone/model.safetensors").read_bytes() == (work / "plain/model.safetensors").read_bytes()


def killed(work: Path, at: int, *flags: str) -> int:
    """The status of a run in another process, which kills itself in that step of training."""
    environment = {**os.environ, "KILLED_AT": str(at), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; from interfuse.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "run", "recipe.yaml", "out", "--trust-code", *flags]
    return subprocess.run(command, cwd=work, env=environment, check=False, capture_output=True).returncode


def test_a_killed_run_goes_on_in_its_stage_to_the_same_weights(work: Path) -> None:
    recipe = staged(target="python:recipenets:fatal")
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("recipe.yaml", "whole", trust_code=True, progress=False)
    assert killed(work, 3 + 3 + 2) == -signal.SIGKILL  # in the first epoch of the last stage; each has 3 batches
    part = work / ".out.interfuse-part"
    kept = json.loads(next((part / ".stages").glob("*/stages.json")).read_text())
    assert kept["done"] == 2
    assert killed(work, 3 + 1, "--resume") == -signal.SIGKILL  # in its second epoch
    assert next((part / ".stages").glob("*/running-2/last.ckpt")).exists()
    (part / "left").mkdir()
    record = run("recipe.yaml", "out", trust_code=True, resume=True, progress=False)
    assert not part.exists()
    assert (work / "out/model.safetensors").read_bytes() == (work / "whole/model.safetensors").read_bytes()
    assert record.training is not None
    assert [stage["name"] for stage in record.training["stages"]] == ["copy", "grow", "all"]
    assert sorted(path.name for path in (work / "out").iterdir()) == sorted(path.name for path in (work / "whole").iterdir())
    first, second = (json.loads((work / name / "interfuse.json").read_text())["run"]["training"] for name in ("whole", "out"))
    assert [stage["training"]["best"] for stage in first["stages"]] == [stage["training"]["best"] for stage in second["stages"]]


def test_a_finished_run_is_left_as_it_is(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(staged(), "out", trust_code=True, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("interfuse.transfer.stages.fit", lambda *args, **how: pytest.fail("trained"))
        again = run(staged(), "out", trust_code=True, resume=True, progress=False)
    assert again.before
    assert again.test == first.test
    np.savez(work / "later.npz", **{key: value[:24] for key, value in np.load(work / "later.npz").items()})
    with pytest.raises(CheckpointError, match="is there already"):
        run(staged(), "out", trust_code=True, resume=True, progress=False)


def test_what_another_recipe_left_is_not_gone_on_with(work: Path) -> None:
    left = work / ".out.interfuse-part" / ".stages" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / "stages.json").write_text(json.dumps({"stages": "of another recipe", "done": 2}))
    other = staged(training={"epochs": 1, "learning_rate": 0.1})
    run(other, "whole", trust_code=True, progress=False)
    run(other, "out", trust_code=True, resume=True, progress=False)
    assert (work / "out/model.safetensors").read_bytes() == (work / "whole/model.safetensors").read_bytes()


def test_what_cannot_grow_is_said_before_anything_is_trained(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interfuse.transfer.stages.fit", lambda *args, **how: pytest.fail("trained"))
    recipe = staged()
    recipe["stages"][1]["grow"] = {"wider": {"nowhere": 12}}
    with pytest.raises(ModelError, match=r"stages\[1\]\.grow: .*nowhere"):
        run(recipe, "out", trust_code=True, progress=False)
    recipe = staged()
    recipe["stages"][1]["training"]["train_only"] = ["4.*", "9.*"]  # the first is there once it has grown
    with pytest.raises(OptionError) as raised:
        run(recipe, "out", trust_code=True, progress=False)
    assert [problem.path for problem in raised.value.problems] == ["stages[1].training.train_only"]
    assert "'9.*' matches no parameter" in str(raised.value)
    assert not (work / "out").exists()


def test_what_is_wrong_with_stages_is_said_at_once(work: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"grow": {}},
        {"grow": {"wider": {"0": 0}}},
        {"data": {"train": "none.npz"}, "training": {"epochs": 0}},
        {"data": {"test": "test.npz"}, "training": {"patience": 2}},
    ]
    with pytest.raises(RecipeError) as raised:
        run(staged(stages=stages, data={"train": "train.npz"}), "out", trust_code=True)
    assert {p.path for p in raised.value.problems} == {
        "stages[0].grow",
        "stages[1].grow.wider",
        "stages[2].data",
        "stages[3].data.test",
        "stages[3].training.patience",
    }


def test_an_example_s_form_makes_one_that_a_network_reads() -> None:
    inputs = {"ids": torch.tensor([[5, 9], [1, 0]]), "mask": torch.ones(2, 2, dtype=torch.bool), "x": (torch.zeros(2, 3),)}
    form = json.loads(json.dumps(form_of(inputs)))
    made = made_of(form)
    assert torch.equal(made["ids"], torch.full((2, 2), 9))
    assert made["mask"].all()
    assert made["x"][0].shape == (2, 3)
    assert form_of(made)["named"]["ids"]["dtype"] == "int64"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_transformers_target_grows_to_what_its_config_can_say(work: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(work / "bert")
    np.savez(work / "ids.npz", x=np.arange(96).reshape(24, 4) % 6, y=np.arange(24) % 3)
    paths = [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    recipe = {
        "fusion": "stages",
        "target": "./bert",
        "models": [{"model": "./bert", "name": "a"}],
        "stages": [{"grow": {"wider": dict.fromkeys(paths, 12)}, "training": {"epochs": 1}}],
        "data": {"train": "ids.npz"},
    }
    run(recipe, "out", progress=False)
    made: Any = load_run("out")
    assert made.config.intermediate_size == 12
    assert made.bert.encoder.layer[1].intermediate.dense.out_features == 12
    recipe["stages"] = [{"grow": {"wider": {paths[0]: 12}}}]
    with pytest.raises(ModelError, match=r"stages\[0\]\.grow: the target: its Transformers config has no word"):
        run(recipe, "other", progress=False)

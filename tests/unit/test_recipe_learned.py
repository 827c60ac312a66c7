"""Recipes whose merge coefficients are learned: the plain recipe and what it gives, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tests.unit.recipes import built, folder_of, net, problems, quadrants

from interfuse.cli import main
from interfuse.data import load_data
from interfuse.errors import CheckpointError, ModelError, RecipeError
from interfuse.models import load_model
from interfuse.pipeline import check, load_run, run, verify
from interfuse.training.coefficients import learn_coefficients

NETS = """
import torch
from torch import nn

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

def _tuned(seed):
    network = base()
    torch.manual_seed(seed)
    for p in network.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return network

def a():
    return _tuned(1)

def b():
    return _tuned(2)

def other():
    network = _tuned(3)
    network[4] = nn.Linear(6, 2)
    return network
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data and code, which is the current folder."""
    draw = np.random.default_rng(0)
    for name, count in (("one", 64), ("two", 64), ("test", 48)):
        x, y = quadrants(draw, count)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
        np.savez(tmp_path / f"{name}-bare.npz", x=x)
    yield from folder_of(NETS, tmp_path, monkeypatch)


def learned(**changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "adamerging",
        "base_model": "python:recipenets:base",
        "models": [net("a", data={"train": "one.npz"}), net("b", data={"train": "two.npz"})],
        "parameters": {"steps": 6},
        "training": {"learning_rate": 0.05},
        "data": {"test": "test.npz"},
        **changes,
    }


@pytest.mark.parametrize("per", ["task", "layer"])
def test_what_is_learned_is_python_s_and_a_plain_recipe(per: str, work: Path) -> None:
    record = run(learned(parameters={"steps": 6, "per": per}), "out", trust_code=True, progress=False)
    sets = {"a": load_data("one.npz"), "b": load_data("two.npz")}
    experts = {name: built(name) for name in "ab"}
    found = learn_coefficients(built("base"), experts, sets, per=per, steps=6, learning_rate=0.05, progress=False)  # type: ignore[arg-type]
    plain = yaml.safe_load((work / "out" / "recipe.yaml").read_text())
    assert plain["merge_method"] == "task_arithmetic"
    assert "training" not in plain
    assert "train" not in plain["data"]
    assert [model["parameters"]["weight"] for model in plain["models"]] == [found.setting(name) for name in "ab"]
    made = load_file(work / "out" / "model.safetensors")
    merged = found.merge()
    assert all(np.array_equal(value, merged.state_dict()[name].numpy()) for name, value in made.items())
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "again" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()
    about = json.loads((work / "out" / "interfuse.json").read_text())["run"]
    assert about["coefficients"]["values"] == found.values
    assert len(about["coefficients"]["history"]) == 6
    assert {task: len(data["sha256"]) for task, data in about["coefficients"]["data"].items()} == {"a": 64, "b": 64}
    assert "https://arxiv.org/abs/2310.02575" in about["papers"]
    assert "coefficients learned on train data by entropy" in (work / "out" / "README.md").read_text()
    assert "coefficient of a: " in record.text()
    assert record.test is not None
    load_run("out", trust_code=True)


def test_labels_are_read_where_they_are_learned_from_alone(work: Path) -> None:
    bare = {"train": "one-bare.npz", "labels": False, "test": "test.npz"}
    models = [net("a"), net("b")]
    run(learned(models=models, data=bare), "out", trust_code=True, progress=False)
    run(learned(models=models, data={**bare, "train": "one.npz"}), "same", trust_code=True, progress=False)
    assert (work / "out" / "model.safetensors").read_bytes() == (work / "same" / "model.safetensors").read_bytes()
    wrong = learned(models=models, data=bare, parameters={"objective": "cross_entropy"})
    assert problems(wrong).keys() == {"data.labels"}
    made = run(
        learned(parameters={"objective": "cross_entropy", "steps": 20, "per": "task"}), "ce", trust_code=True, progress=False
    )
    assert made.coefficients is not None
    history = made.coefficients["history"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_heads_that_differ_are_kept_where_the_recipe_says_so(work: Path) -> None:
    models = [net("a", data={"train": "one.npz"}), net("other", data={"train": "two.npz"})]
    with pytest.raises(ModelError, match=r"4\.weight"):
        run(learned(models=models), "out", trust_code=True, progress=False)
    assert not (work / "out").exists()
    run(learned(models=models, keep=["4."]), "out", trust_code=True, progress=False)
    made, base = load_file(work / "out" / "model.safetensors"), built("base").state_dict()
    assert np.array_equal(made["4.weight"], base["4.weight"].numpy())
    assert not np.array_equal(made["0.weight"], base["0.weight"].numpy())


def test_what_is_wrong_is_said_at_once(work: Path) -> None:
    wrong = learned(
        models=[
            net("a", parameters={"weight": 1.0, "steps": 2}, data={"train": "test.npz", "validation": 0.1}),
            net("b", data={"test": "one.npz"}),
        ],
        parameters={"objective": "entrop", "steps": 0},
        training={"epochs": 3, "learning_rate": 0.1},
    )
    del wrong["base_model"]
    assert set(problems(wrong)) == {
        "base_model",
        "models[0].parameters.weight",
        "models[0].parameters.steps",
        "models[1].parameters.weight",
        "models[0].data.train",
        "models[0].data.validation",
        "models[1].data.train",
        "models[1].data.test",
        "parameters.objective",
        "parameters.steps",
        "training.epochs",
    }
    both = {"data": {"train": "test.npz", "test": "test.npz"}, "models": [net("a"), net("b")]}
    assert problems(learned(**both)) == {"data.train": "is data.test too"}
    with pytest.raises(RecipeError, match="adamerging loads its models, and stands beside other recipes"):
        check(
            [{"name": "first", "merge_method": "linear", "models": [net("a"), net("b")]}, learned(models=["first", net("b")])]
        )
    check(learned(**both, parameters={"split": "reported"}), trust_code=True)
    assert "models[0].data" in problems({"merge_method": "linear", "models": [net("a", data={"train": "one.npz"}), net("b")]})


def test_a_dry_run_shows_the_plan_at_the_start(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "r.yaml").write_text(json.dumps(learned()))
    with pytest.raises(SystemExit):
        main(["run", "r.yaml", "out", "--dry-run", "--trust-code"])
    shown = capsys.readouterr().out
    assert "the weights are where learning begins: 6 steps on" in shown
    assert "0.3" in shown
    assert not (work / "out").exists()


# --- Transformers ---


def berts() -> None:
    """Folders of a base, its bare encoder, and fine-tunes of it for 2, 2 and 3 classes, with texts; in the current folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "dull"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )  # fmt: skip
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=6, num_labels=2, **sizes))
    for name, labels in (("base", 2), ("p", 2), ("q", 2), ("r", 3)):
        config = transformers.BertConfig(vocab_size=6, num_labels=labels, **sizes)
        network = transformers.BertForSequenceClassification(config)
        own = network.state_dict() if labels == 3 else {}
        network.load_state_dict({**base.state_dict(), **{key: value for key, value in own.items() if "classifier" in key}})
        for parameter in network.parameters() if name != "base" else ():
            parameter.data += 0.3 * torch.randn_like(parameter)
        network.save_pretrained(name)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
        wrapped.save_pretrained(name)
    base.bert.save_pretrained("bare")
    rows = ["good film,yes", "bad film,no", "dull,no", "good good,yes"] * 8
    Path("t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    Path("u.csv").write_text("text\n" + "\n".join(row.partition(",")[0] for row in rows) + "\n")


BARE = {"train": "u.csv", "labels": False}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_folders_are_merged_from_file_to_file(work: Path) -> None:
    berts()
    record = run(learned(base_model="base", models=["p", "q"], data={**BARE, "test": "t.csv"}), "out", progress=False)
    assert record.test is not None
    assert type(load_model("out")).__name__ == "BertForSequenceClassification"
    run("out/recipe.yaml", "again", progress=False)
    assert (work / "again" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()
    assert verify("out", again=True, progress=False).good
    plain = yaml.safe_load((work / "out" / "recipe.yaml").read_text())
    assert len(plain["models"][0]["parameters"]["weight"]) == 4  # before, two layers, after
    trunk = run(learned(base_model="bare", models=["p", "q"], keep=["classifier"], data=BARE), "trunk", progress=False)
    assert trunk.coefficients is not None
    assert not any("classifier" in name for names in trunk.coefficients["groups"].values() for name in names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_task_may_keep_its_head(work: Path) -> None:
    berts()
    recipe = learned(base_model="base", models=["p", {"model": "r", "data": {"train": "u.csv"}}], data=BARE)
    with pytest.raises(CheckpointError, match="classifier"):
        run(recipe, "none", progress=False)
    record = run({**recipe, "heads": "separate"}, "out", progress=False)
    assert record.coefficients is not None
    assert not any("classifier" in name for names in record.coefficients["groups"].values() for name in names)
    tasks: dict[str, Any] = {name: load_model(f"out#{name}") for name in "pr"}
    for name, labels in (("p", 2), ("r", 3)):
        own: Any = load_model(name)
        assert tasks[name].config.num_labels == labels
        assert torch.equal(tasks[name].classifier.weight, own.classifier.weight)
    key = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(tasks["p"].get_parameter(key), tasks["r"].get_parameter(key))
    assert verify("out", again=True, progress=False).good

"""Recipes of shared trunks, tied layers and stitches, from end to end on small networks with a task each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.unit.recipes import SEEDED, folder_of, net
from torch import nn

import interfuse as itf
from interfuse.cli import main
from interfuse.data import load_data
from interfuse.errors import DataError, ModelError, OptionError, RecipeError, UserError
from interfuse.models import load_tokenizer
from interfuse.pipeline import compare_runs, load_run, run

NETS = """
def net(seed=1, classes=3):
    parts = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return _seeded(seed, *parts, nn.Linear(8, classes))

def other():
    return net(2, 2)

def wide():
    return _seeded(3, nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two tasks' data over the same inputs, and code that builds networks; it is the current folder."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 90), ("held", 45), ("test", 60)):
        which = np.arange(count) % 3
        x = draw.normal(size=(count, 6)).astype(np.float32) + 2 * np.eye(6, dtype=np.float32)[which]
        np.savez(tmp_path / f"{name}.npz", x=x, which=which, first=(which == 0).astype(np.int64))
    yield from folder_of(SEEDED + NETS, tmp_path, monkeypatch)


def trunk(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "share_trunk",
        "models": [net("net", name="which", data={"target": "which"}), net("other", name="first", data={"target": "first"})],
        "data": {"validation": "held.npz", "test": "test.npz"},
        **changes,
    }


def tied(**changes: Any) -> dict[str, Any]:
    recipe = trunk(fusion="tie", parameters={"layers": ["0", {"which": "2", "first": "4"}]})
    recipe["data"] = {"train": "train.npz", "validation": 0.2, "test": "test.npz"}
    return recipe | {"training": {"epochs": 2, "learning_rate": 0.01}, **changes}


def about(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "interfuse.json").read_text())
    return found


def accuracy(network: nn.Module, target: str) -> float:
    outputs, targets, _ = itf.predict(network, load_data("test.npz", target=target), progress=False)
    assert targets is not None
    return float((outputs.argmax(1) == targets).double().mean())


def same(first: nn.Module, second: nn.Module) -> None:
    assert {n: t.shape for n, t in first.state_dict().items()} == {n: t.shape for n, t in second.state_dict().items()}
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_trunk_of_a_given_depth(work: Path) -> None:
    record = run(trunk(parameters={"depth": 3}, data={"test": "test.npz"}), "out", trust_code=True, progress=False)
    shared = load_run("out", trust_code=True)
    from recipenets import net as build  # type: ignore[import-not-found]
    from recipenets import other

    expected = itf.share_trunk({"which": build(), "first": other()}, 3)
    same(shared, expected)
    assert record.tasks is not None
    assert list(record.tasks) == ["which", "first"]
    for name, task in record.tasks.items():
        assert task["test"]["value"] == pytest.approx(accuracy(expected.network(name), name))
        assert task["before"]["value"] == pytest.approx(accuracy({"which": build, "first": other}[name](), name))
    with pytest.raises(ModelError, match=r"models\['which'\]: missing"):
        itf.load("out")
    same(itf.load("out", {"which": build(), "first": other()}), expected)
    same(itf.load("out", itf.share_trunk({"which": build(), "first": other()}, 3)), expected)
    stored = load_file("out/model.safetensors")
    assert sum(value.size for value in stored.values()) == sum(p.numel() for p in expected.parameters())
    card = (work / "out" / "README.md").read_text()
    assert "# Shared trunk of which and first" in card
    assert "which: test accuracy" in card
    assert "3 of 6 blocks" in " ".join(record.notes)


def test_the_depth_is_found_by_validation_and_the_curve_is_drawn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = trunk(parameters={"depths": [1, 3, 6], "tolerance": 0.05, "options": {"weights": [0.7, 0.3]}})
    recipe["evaluate"] = {"metric": "balanced_accuracy"}
    run(recipe, "out", trust_code=True, progress=False)
    found = about("out")["run"]
    assert [point["depth"] for point in found["curve"]["points"]] == [0, 1, 3, 6]
    assert [point["parameters"] for point in found["curve"]["points"]] == sorted(
        (point["parameters"] for point in found["curve"]["points"]), reverse=True
    )
    assert "<svg" in (work / "out" / "curve.svg").read_text()
    from recipenets import net as build
    from recipenets import other

    shared = itf.share_trunk({"which": build(), "first": other()}, found["curve"]["chosen"], weights=[0.7, 0.3])
    same(load_run("out", trust_code=True), shared)
    (point,) = [point for point in found["curve"]["points"] if point["depth"] == found["curve"]["chosen"]]
    for name, task in found["tasks"].items():
        assert task["test"]["value"] == pytest.approx(point["test"][name])
    assert "latency" not in json.dumps(found)
    card = (work / "out" / "README.md").read_text()
    assert "](curve.svg)" in card
    assert 'model.network("which")' in card


def test_tasks_of_a_trunk_are_trained_together_and_repeat(work: Path) -> None:
    recipe = trunk(parameters={"depth": 4}, training={"epochs": 3, "learning_rate": 0.02, "train_only": "experts.*"})
    recipe["data"] = {"train": "train.npz", "validation": 0.2, "test": "test.npz"}
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.training is not None
    assert len(record.training["history"]) == 4
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "out/model.safetensors").read_bytes() == (work / "again/model.safetensors").read_bytes()
    from recipenets import net as build
    from recipenets import other

    merged, made = itf.share_trunk({"which": build(), "first": other()}, 4), load_run("out", trust_code=True).state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, made[name]) == (not name.startswith("experts"))


def test_a_sweep_trains_each_depth_before_it_is_measured(work: Path) -> None:
    recipe = trunk(parameters={"depths": [2]}, training={"epochs": 2, "learning_rate": 0.05})
    recipe["data"] = {"train": "train.npz", "validation": 0.2, "test": "test.npz"}
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.curve is not None
    assert record.curve["chosen"] == 2
    shared = load_run("out", trust_code=True)
    assert record.tasks is not None
    assert record.tasks["which"]["test"]["value"] == pytest.approx(accuracy(shared.network("which"), "which"))  # type: ignore[operator]


def test_tied_layers_are_one_and_saved_once(work: Path) -> None:
    record = run(tied(), "out", trust_code=True, progress=False)
    made: Any = load_run("out", trust_code=True)
    assert made.networks[0][2].weight is made.networks[1][4].weight
    assert made.networks[0][0].weight is made.networks[1][0].weight
    stored = load_file("out/model.safetensors")
    assert sum(value.size for value in stored.values()) == sum(p.numel() for p in made.parameters())
    assert about("out")["shared"]["networks.1.4.weight"] == "networks.0.2.weight"
    assert record.tasks is not None
    for name, task in record.tasks.items():
        assert task["test"]["value"] == pytest.approx(accuracy(made.network(name), name))
    assert len(record.training["history"]) == 3  # type: ignore[index]
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "out/model.safetensors").read_bytes() == (work / "again/model.safetensors").read_bytes()


def test_a_stitch_says_what_survives(work: Path) -> None:
    recipe = {
        "fusion": "stitch",
        "models": [net("net"), net("wide")],
        "parameters": {"at": ["3", "1"]},
        "data": {"train": "train.npz", "test": "test.npz", "target": "which"},
    }
    record = run(recipe, "out", trust_code=True, progress=False)
    from recipenets import net as build
    from recipenets import wide

    samples = load_data("train.npz", target="which")
    expected = itf.stitch(build(), wide(), ("3", "1"), samples, test=load_data("test.npz", target="which"), progress=False)
    made = load_run("out", trust_code=True)
    same(made, expected)
    assert expected.record is not None
    assert record.stitch is not None
    assert record.stitch["error"] == pytest.approx(expected.record.error)
    assert record.stitch["survives"] == pytest.approx(expected.record.survives)
    assert record.test is not None
    assert record.test["value"] == pytest.approx(accuracy(made, "which"))
    assert "survives the stitch" in record.text()
    assert made.record.held_out == pytest.approx(expected.record.held_out)  # type: ignore[union-attr]
    unlabelled = recipe | {"data": {"train": "train.npz", "labels": False, "input": "x"}}
    again = run(unlabelled, "plain", trust_code=True, progress=False)
    assert again.stitch is not None
    assert again.stitch["error"] == pytest.approx(expected.record.error)
    assert again.stitch["survives"] is None
    trained = run(recipe | {"training": {"epochs": 2}}, "trained", trust_code=True, progress=False)
    assert trained.training is not None


def test_a_stitch_of_places_that_are_not_there(work: Path) -> None:
    recipe = {
        "fusion": "stitch",
        "models": [net("net"), net("wide")],
        "parameters": {"at": ["nowhere", "9"]},
        "data": {"train": "train.npz", "target": "which"},
    }
    with pytest.raises(ModelError) as raised:
        run(recipe, "out", trust_code=True, progress=False)
    assert [p.path for p in raised.value.problems] == ["parameters.at[0]", "parameters.at[1]"]
    assert not (work / "out").exists()


def test_what_is_wrong_is_said_at_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = trunk(
        parameters={"method": "ties", "tolerance": 2, "options": {"densty": 1}, "depth": "auto"},
        models=[net("net", name="which", data={"target": "which", "validation": "none.npz"}), net("other", name="first")],
        data={"test": "test.npz"},
        target="python:recipenets:wide",
    )
    with pytest.raises(RecipeError) as raised:
        run(wrong, "out", trust_code=True)
    assert {p.path for p in raised.value.problems} == {
        "parameters.tolerance",
        "target",
        "base_model",
        "parameters.options.densty",
        "models[1].data.validation",
        "models[0].data.validation",
    }
    with pytest.raises(RecipeError) as raised:
        run(tied(parameters={}, data={"validation": 0.1}, training={"metric": "f1"}, stages=[]), "out", trust_code=True)
    found = {p.path for p in raised.value.problems}
    assert found >= {"parameters.layers", "models[0].data.train", "models[1].data.train", "training.metric"}
    (work / "wrong.yaml").write_text("fusion: stitch\nmodels: [python:recipenets:net]\nparameters: {at: [a]}\n")
    with pytest.raises(SystemExit) as end:
        main(["run", "wrong.yaml", "out"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert all(path in said for path in ("models:", "parameters.at:", "data.train:"))
    assert not (work / "out").exists()


def test_a_task_s_data_are_checked_where_they_are_written(work: Path) -> None:
    recipe = trunk(parameters={"depth": 1})
    recipe["models"][0]["data"] = {"target": "nothing"}
    recipe["models"][1]["data"] = {"target": "neither"}
    with pytest.raises(DataError) as raised:
        run(recipe | {"data": {"test": "test.npz"}}, "out", trust_code=True, progress=False)
    assert len(raised.value.problems) == 2
    held = dict(np.load("held.npz"))
    np.savez("held.npz", **held, much=held["x"][:, 0])
    mixed = trunk(data={"validation": "held.npz"})
    mixed["models"][1]["data"] = {"target": "much"}
    with pytest.raises(OptionError, match=r"evaluate\.metric: missing, and some tasks have classes"):
        run(mixed, "out", trust_code=True, progress=False)
    with pytest.raises(RecipeError, match=r"models\[0\]\.data: a model has its own only with"):
        run({"fusion": "mean", "models": [net("net", data={"target": "y"})], "data": {"train": "train.npz"}}, "out")


def test_the_plan_says_what_would_be_done(work: Path) -> None:
    text = run(trunk(), "out", trust_code=True, dry_run=True).text()
    assert "layers: share_trunk" in text
    assert "depth: auto" in text
    assert "data {'target': 'first'}" in text
    assert "nothing was written" in text
    assert not (work / "out").exists()


def test_one_task_of_an_output_is_a_model(work: Path) -> None:
    run(trunk(parameters={"depth": 3}, data={"test": "test.npz"}), "out", trust_code=True, progress=False)
    shared: Any = load_run("out", trust_code=True)
    recipe = {"models": ["./out#first"], "data": {"test": "test.npz", "target": "first"}}
    record = run(recipe, "again", trust_code=True, progress=False)
    assert record.test is not None
    assert record.test["value"] == pytest.approx(accuracy(shared.network("first"), "first"))
    same(load_run("again", trust_code=True), shared.network("first"))
    with pytest.raises(RecipeError, match=r"is built by python:recipenets:net, python:recipenets:other, which runs code"):
        run(recipe, "never")
    with pytest.raises(ModelError, match="has no task 'frist'; did you mean 'first'"):
        run(recipe | {"models": ["./out#frist"]}, "never", trust_code=True, progress=False)
    with pytest.raises(UserError, match="would replace the input"):
        run(recipe, "out", trust_code=True, overwrite=True, progress=False)
    table = compare_runs(["out#first", "again"], "test.npz", trust_code=True, progress=False)
    assert table["out#first"].score.value == table["again"].score.value


def bert(folder: Path, seed: int, labels: list[str]) -> None:
    """A small classifier of texts that Transformers loads, with a tokenizer and its classes' names."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "dull"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tasks_of_texts_share_a_trunk_that_loads_by_itself(work: Path) -> None:
    bert(work / "mood", 0, ["yes", "no"])
    bert(work / "topic", 1, ["film", "book", "song"])
    rows = ["good film,yes,film", "bad film,no,book", "dull,no,song", "good good,yes,film"] * 8
    (work / "t.csv").write_text("text,mood,topic\n" + "\n".join(rows) + "\n")
    recipe = {
        "fusion": "share_trunk",
        "models": [{"model": "mood", "data": {"target": "mood"}}, {"model": "topic", "data": {"target": "topic"}}],
        "data": {"train": "t.csv", "validation": 0.25, "test": "t.csv", "input": "text"},
        "parameters": {"depth": "bert.encoder.layer.0"},
        "training": {"epochs": 1},
    }
    record = run(recipe, "out", progress=False)
    assert record.tasks is not None
    assert list(record.tasks["mood"]["classes"]) == ["yes", "no"]
    assert list(record.tasks["topic"]["classes"]) == ["film", "book", "song"]
    alone: Any = itf.load("out")
    same(alone, load_run("out"))
    itf.save(alone, "kept")
    same(itf.load("kept"), alone)
    data = load_data("t.csv", input="text", target="topic", classes=["film", "book", "song"])
    found = itf.predict(alone.network("topic"), data.tokenize(load_tokenizer("topic")), progress=False)
    assert found.targets is not None
    expected = float((found.outputs.argmax(1) == found.targets).double().mean())
    assert record.tasks["topic"]["test"]["value"] == pytest.approx(expected)
    single = {"models": ["out#topic"], "data": {"test": "t.csv", "input": "text", "target": "topic"}}
    again = run(single, "again", progress=False)
    assert again.test is not None
    assert again.test["value"] == pytest.approx(expected)
    assert set(alone({"input_ids": torch.ones(1, 3, dtype=torch.long)})) == {"mood", "topic"}

"""Recipes of the outputs: students of one or several teachers, data without labels, and classes joined by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.unit.recipes import built, folder_of, net, problems, quadrants

from interfuse.cli import main
from interfuse.data import load_data
from interfuse.data.joining import joined
from interfuse.ensemble.network import Ensemble
from interfuse.errors import DataError
from interfuse.inference.predict import predict
from interfuse.pipeline import compare_runs, load_run, run
from interfuse.training.distill import distill

NETS = """
import torch
from torch import nn

def _net(seed, classes=3, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, classes))

def a():
    return _net(1)

def b():
    return _net(2)

def two():
    return _net(3, 2)

def pair():
    return _net(4, 2)

def student():
    return _net(5, width=4)

def number():
    return _net(6, 1)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data and code, which is the current folder."""
    draw = np.random.default_rng(0)
    names = np.array(["cat", "dog", "owl"])
    for name, count in (("train", 96), ("test", 48)):
        x, y = quadrants(draw, count)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
        np.savez(tmp_path / f"{name}-named.npz", x=x, y=names[y])
        np.savez(tmp_path / f"{name}-bare.npz", x=x)
    yield from folder_of(NETS, tmp_path, monkeypatch)


def student(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "distill",
        "models": [net("a"), net("b")],
        "target": "python:recipenets:student",
        "data": {"train": "train.npz", "validation": 0.25, "test": "test.npz"},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 16},
        **changes,
    }


def weights(folder: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(Path(folder) / "model.safetensors")
    return found


# --- students ---


def test_a_student_is_trained_as_in_python(work: Path) -> None:
    record = run(student(parameters={"temperature": 3.0, "alpha": 0.25}), "out", trust_code=True, progress=False)
    data = load_data("train.npz")
    rest, part = data.split(0.25, 0)
    taught = built("student")
    found = distill(
        {"a": built("a"), "b": built("b")}, taught, rest, part, temperature=3.0, alpha=0.25,
        epochs=2, learning_rate=0.01, batch_size=16, progress=False,
    )  # fmt: skip
    assert all(np.array_equal(value, taught.state_dict()[name].numpy()) for name, value in weights("out").items())
    assert record.training is not None
    assert record.training["agreement"] == found.agreement
    assert record.notes == (f"agreement with the teachers' outputs on validation data {found.agreement:.4g}",)
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["run"]["form"] == about["run"]["method"] == "distill"
    assert [model["name"] for model in about["run"]["inputs"]["models"]] == ["a", "b", "target"]
    assert "# Student of a and b" in (work / "out" / "README.md").read_text()
    outputs = predict(load_run("out", trust_code=True), load_data("test.npz"), progress=False)
    assert outputs.targets is not None
    assert record.test is not None
    assert record.test["value"] == pytest.approx(float((outputs.outputs.argmax(1) == outputs.targets).double().mean()))
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert (work / "again" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()
    compared = compare_runs(["out"], "test.npz", trust_code=True, progress=False)
    assert compared["out"].score.value == pytest.approx(record.test["value"])


def test_a_student_needs_no_labels(work: Path) -> None:
    data = {"train": "train-bare.npz", "validation": 0.25, "test": "test.npz", "labels": False}
    record = run(student(data=data), "out", trust_code=True, progress=False)
    assert record.training is not None
    assert not record.training["labelled"]
    assert record.training["metric"] == "agreement"
    assert record.notes[0].endswith(", without labels")
    labelled = run(student(data={**data, "train": "train.npz"}), "same", trust_code=True, progress=False)
    assert labelled.test == record.test
    assert all(np.array_equal(value, weights("same")[name]) for name, value in weights("out").items())
    wrong = student(data=data, parameters={"alpha": 0.5, "combine": "per_task"}, training={"metric": "f1", "loss": "mse"})
    assert set(problems(wrong)) == {
        "parameters.alpha",
        "parameters.combine",
        "parameters.classes",
        "training.metric",
        "training.loss",
    }
    assert "data.labels" in problems({"models": [net("a")], "data": {"train": "train.npz", "labels": False}})


def test_hints_are_followed(work: Path) -> None:
    run(student(models=[net("a")], parameters={"hints": {"0": "0"}}), "out", trust_code=True, progress=False)
    run(student(models=[net("a")]), "plain", trust_code=True, progress=False)
    assert not np.array_equal(weights("out")["0.weight"], weights("plain")["0.weight"])
    both = {"hints": {"a": {"0": "0"}, "b": {"0": "0"}}}
    run(student(parameters=both), "two", trust_code=True, progress=False)
    wrong = student(parameters={"hints": {"c": {"0": "0"}, "a": "0"}}, training={"train_only": "head"})
    assert set(problems(wrong)) == {"parameters.hints.c", "parameters.hints.a", "training.train_only"}


def test_numbers_are_taught_too(work: Path) -> None:
    np.savez("numbers.npz", x=np.load("train.npz")["x"], y=np.load("train.npz")["y"].astype(np.float32))
    recipe = student(models=[net("number")], target="python:recipenets:number", data={"train": "numbers.npz"})
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.notes[0].startswith("mean squared difference from the teachers' outputs on train data")


def test_what_is_wrong_with_a_student_is_said_at_once(work: Path) -> None:
    wrong = student(
        models=[net("a", name="student", freeze=True), net("b", tap="0")],
        parameters={"temperature": 0, "classes": {"student": ["x", "x"]}, "combine": "per_class"},
        head=3,
        stages=[{}],
        evaluate={"metric": "acc"},
    )
    del wrong["target"]
    assert set(problems(wrong)) == {
        "target",
        "models[0].name",
        "models[0].freeze",
        "models[1].tap",
        "parameters.temperature",
        "parameters.combine",
        "parameters.classes.student",
        "parameters.classes.b",
        "head",
        "stages",
        "evaluate.metric",
    }
    assert problems(student(data={"test": "test.npz"})).keys() == {"data.train"}


def test_a_dry_run_says_what_would_be_done(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "r.yaml").write_text(json.dumps(student(parameters={"combine": "confidence"})))
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out", "--dry-run", "--trust-code"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    for line in ("distill\n", "combine: confidence", "temperature: 2.0", "target: python:recipenets:student"):
        assert line in shown
    assert not (work / "out").exists()
    (work / "r.yaml").write_text(json.dumps(student(parameters={"combin": "mean"})))
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out", "--trust-code"])
    assert ended.value.code == 2
    assert "parameters.combin: unknown option; did you mean 'combine'?" in capsys.readouterr().err


def test_a_student_may_itself_be_made_of_networks(work: Path) -> None:
    small = {**student(), "fusion": "mean", "models": [net("student"), net("b")]}
    del small["target"]
    run(small, "fused", trust_code=True, progress=False)
    record = run(student(models=[net("a")], target="fused"), "out", trust_code=True, progress=False)
    assert record.test is not None
    found = predict(load_run("out", trust_code=True), load_data("test.npz"), progress=False)
    assert found.targets is not None
    assert record.test["value"] == pytest.approx(float((found.outputs.argmax(1) == found.targets).double().mean()))


# --- classes ---

SPACES = {"two": ["cat", "dog"], "pair": ["owl", "dog"]}


def ensemble(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "ensemble",
        "models": [net("two"), net("pair")],
        "parameters": {"classes": SPACES},
        "data": {"test": "test-named.npz"},
        **changes,
    }


def test_class_numbers_are_those_of_the_joined_classes(work: Path) -> None:
    record = run(ensemble(), "out", trust_code=True, progress=False)
    assert record.classes == ("cat", "dog", "owl")
    model = load_run("out", trust_code=True)
    assert isinstance(model, Ensemble)
    assert model.classes == ("cat", "dog", "owl")
    x, y = np.load("test.npz")["x"], np.load("test.npz")["y"]
    right = float((model(torch.from_numpy(x)).argmax(1).numpy() == y).mean())
    assert record.test is not None
    assert record.test["value"] == pytest.approx(right)
    swapped = {"classes": {"two": ["dog", "cat"], "pair": ["owl", "dog"]}}
    other = run(ensemble(parameters=swapped), "swapped", trust_code=True, progress=False)
    assert other.classes == ("dog", "cat", "owl")
    named = {"test": "test.npz", "classes": ["cat", "dog", "owl"]}  # numbers whose names the recipe gives
    found = run(ensemble(parameters=swapped, data=named), "numbers", trust_code=True, progress=False)
    assert found.test == other.test
    compared = compare_runs(["swapped", "numbers"], "test-named.npz", trust_code=True, progress=False)
    assert other.test is not None
    assert [row.score.value for row in compared.rows] == pytest.approx([other.test["value"]] * 2)


def test_a_class_that_no_model_knows_is_an_error(work: Path) -> None:
    spaces = {"classes": {"two": ["cat", "dog"], "pair": ["bee", "dog"]}}
    with pytest.raises(DataError, match=r"data\.test: row \d+: no model knows the class 'owl'; known: cat, dog, bee"):
        run(ensemble(parameters=spaces), "out", trust_code=True, progress=False)
    assert not (work / "out").exists()
    wrong = {"classes": {"two": ["cat", "cat"], "par": ["owl"]}}
    assert set(problems(ensemble(parameters=wrong))) == {
        "parameters.classes.two",
        "parameters.classes.pair",
        "parameters.classes.par",
    }


def test_teachers_of_different_classes_teach_one_student(work: Path) -> None:
    parameters = {"classes": SPACES, "combine": "per_task"}
    data = {"train": "train-named.npz", "validation": 0.25, "test": "test-named.npz"}
    recipe = student(models=[net("two"), net("pair")], parameters=parameters, data=data)
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.classes == ("cat", "dog", "owl")
    rest, part = load_data("train-named.npz").split(0.25, 0)
    taught = built("student")
    distill(
        [built("two"), built("pair")], taught, rest, part, combine="per_task", classes=list(SPACES.values()),
        epochs=2, learning_rate=0.01, batch_size=16, progress=False,
    )  # fmt: skip
    assert all(np.array_equal(value, taught.state_dict()[name].numpy()) for name, value in weights("out").items())


def test_models_that_say_their_classes_are_joined_by_them(work: Path) -> None:
    for name, column in (("two", [0, 1]), ("pair", [1, 2])):
        y = np.load("train-named.npz")["y"]
        kept = np.isin(y, np.array(["cat", "dog", "owl"])[column])
        np.savez("part.npz", x=np.load("train.npz")["x"][kept], y=y[kept])
        run({"models": [net(name)], "data": {"train": "part.npz"}}, name, trust_code=True, progress=False)
    record = run(ensemble(models=["two", "pair"], parameters={}), "out", trust_code=True, progress=False)
    assert record.classes == ("cat", "dog", "owl")
    assert record.notes == ("the models' classes are joined by the names that they have themselves: cat, dog, owl",)


# --- Transformers ---


def bert(folder: Path, seed: int, width: int = 8) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "dull"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )  # fmt: skip
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_transformers_student_is_a_folder_that_transformers_loads(work: Path) -> None:
    bert(work / "p", 0)
    bert(work / "q", 1)
    bert(work / "small", 2, width=4)
    rows = ["good film,yes", "bad film,no", "dull,no", "good good,yes"] * 8
    (work / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (work / "bare.csv").write_text("text\n" + "\n".join(row.partition(",")[0] for row in rows) + "\n")
    data = {"train": "bare.csv", "validation": 0.25, "test": "t.csv", "labels": False}
    recipe = student(models=["p", "q"], target="small", data=data)
    record = run(recipe, "out", progress=False)
    assert record.test is not None
    import transformers

    made = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    assert made.config.hidden_size == 4
    assert (work / "out" / "tokenizer.json").exists()
    run({**recipe, "data": {"train": "t.csv"}}, "named", progress=False)
    config = transformers.AutoConfig.from_pretrained("named")
    assert config.id2label == {0: "no", 1: "yes"}
    assert compare_runs(["out"], "t.csv", progress=False)["out"].score.value == pytest.approx(record.test["value"])


def test_teachers_teach_on_data_of_their_own(work: Path) -> None:
    x, y = np.load("train.npz")["x"], np.load("train-named.npz")["y"]
    for name, column in (("two", ["cat", "dog"]), ("pair", ["owl", "dog"])):
        kept = np.isin(y, column)
        np.savez(f"{name}.npz", x=x[kept], y=np.array([column.index(label) for label in y[kept]]))  # the model's numbers
    models = [net("two", data={"train": "two.npz"}), net("pair", data={"train": "pair.npz"})]
    parameters = {"classes": SPACES, "combine": "per_task"}
    recipe = student(models=models, parameters=parameters, data={"validation": 0.25, "test": "test-named.npz"})
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.classes == ("cat", "dog", "owl")
    parts = [load_data(f"{name}.npz").named(SPACES[name]).named(("cat", "dog", "owl")) for name in ("two", "pair")]
    whole = joined(parts)
    assert len(whole) == sum(map(len, parts))
    rest, part = whole.split(0.25, 0)
    taught = built("student")
    distill(
        [built("two"), built("pair")], taught, rest, part, combine="per_task", classes=list(SPACES.values()),
        epochs=2, learning_rate=0.01, batch_size=16, progress=False,
    )  # fmt: skip
    assert all(np.array_equal(value, taught.state_dict()[name].numpy()) for name, value in weights("out").items())
    about = json.loads((work / "out" / "interfuse.json").read_text())["run"]["inputs"]
    assert "two.npz" in json.dumps(about)
    wrong = student(models=[net("a", data={"test": "test.npz", "labels": False}), net("b")], data={"test": "test.npz"})
    assert set(problems(wrong)) == {"models[0].data.train", "models[0].data.test", "models[0].data.labels"}


def test_a_fusion_takes_its_networks_classes_for_its_own(work: Path) -> None:
    """Their predictions are added to the head's, class by class: the order counts."""
    recipes = {"three": ["owl", "cat", "dog"], "other": ["cat", "dog", "owl"]}
    for (name, names), function in zip(recipes.items(), "ab", strict=True):
        data = {"train": "train.npz", "classes": ["cat", "dog", "owl"]}
        run({"models": [net(function)], "data": data, "training": {"epochs": 1}}, name, trust_code=True, progress=False)
        about = json.loads(Path(name, "interfuse.json").read_text())
        about["run"]["classes"] = names
        Path(name, "interfuse.json").write_text(json.dumps(about))
    recipe = {
        "fusion": "mean",
        "models": ["three", net("b")],
        "data": {"train": "train-named.npz", "validation": 0.25, "test": "test-named.npz"},
        "training": {"epochs": 1},
    }
    record = run(recipe, "one", trust_code=True, progress=False)
    assert record.classes == ("owl", "cat", "dog")
    model: Any = load_run("one", trust_code=True)
    assert any(model.parents)
    both = run({**recipe, "models": ["three", "other"]}, "both", trust_code=True, progress=False)
    assert both.classes == ("cat", "dog", "owl")
    assert both.notes == ("the predictions of three aren't added: their classes are in another order than the data's",)
    model = load_run("both", trust_code=True)
    assert not any(model.parents)
    asked = {**recipe, "models": ["three", "other"], "parameters": {"residual": True}}
    model = run(asked, "asked", trust_code=True, progress=False)
    assert model.notes == ()

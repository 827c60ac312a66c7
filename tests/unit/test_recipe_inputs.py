"""Recipes whose models read different inputs: text, image and table in one csv, and what is missing of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.unit.recipes import folder_of, net

from interfuse import ModelFusion, OptionError, load_run, predict, run, write_report
from interfuse.data import load_data
from interfuse.errors import DataError, RecipeError
from interfuse.pipeline import check, compare_runs

NETS = """
import torch
from torch import nn

def seeded(seed, *layers):
    torch.manual_seed(seed)
    return nn.Sequential(*layers)

def pixels():
    return seeded(0, nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

def table():
    return seeded(1, nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

def number():
    return seeded(2, nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a csv of pictures, reviews and numbers, some of them missing; it is the current folder."""
    image = pytest.importorskip("PIL.Image")
    draw, rows = np.random.default_rng(0), ["picture,review,a,b,label"]
    for i in range(48):
        y = i % 2
        image.fromarray((draw.integers(0, 60, (4, 4)) + 120 * y).astype(np.uint8)).save(tmp_path / f"{i}.png")
        numbers = ",".join(f"{value:.3f}" for value in draw.normal(size=2) + 3 * y)
        picture, review = f"{i}.png" if i % 5 else "", ("good film" if y else "bad dull") if i % 4 else ""
        rows.append(f"{picture},{review},{numbers if i % 7 or i % 5 == 0 else ','},{'yes' if y else 'no'}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    yield from folder_of(NETS, tmp_path, monkeypatch)


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "attention",
        "models": [net("pixels", input="picture"), net("table", name="row", input=["a", "b"])],
        "data": {"train": "t.csv", "validation": 0.25, "test": "t.csv"},
        "parameters": {"branch_dropout": 0.25},
        "training": {"epochs": 3, "learning_rate": 0.01, "batch_size": 12},
        **changes,
    }


def test_models_say_what_they_read_and_the_record_what_each_is_worth(work: Path) -> None:
    record = run(recipe(), "out", trust_code=True, progress=False)
    assert record.test is not None
    assert record.training is not None
    assert record.training["cached"]
    assert list(record.test["without"]) == ["picture", "row"]
    model = load_run("out", trust_code=True)
    assert isinstance(model, ModelFusion)
    assert (model.inputs, model.branch_dropout, model.missing) == (("picture", "row"), 0.25, "token")
    data = load_data("t.csv", input={"pixels": "picture", "row": ["a", "b"]})
    assert data.missing == {"pixels": 10, "row": 5}
    for name in ("picture", "row"):
        with model.without(name):
            found = predict(model, data, progress=False)
        assert found.targets is not None
        value = float((found.outputs.argmax(1) == found.targets).double().mean())
        about = record.test["without"][name]
        assert about["value"] == pytest.approx(value)
        assert about["change"] == pytest.approx(value - record.test["value"])
        assert f"without {name} {value:.4g} ({about['change']:+.4g}, 95% interval" in record.text()
        assert f"without {name} {value:.4g}" in (work / "out" / "README.md").read_text()
    assert json.loads((work / "out" / "interfuse.json").read_text())["run"]["test"] == record.test
    recorded = yaml.safe_load((work / "out" / "recipe.yaml").read_text())
    assert recorded["data"]["input"] == {"pixels": "picture", "row": ["a", "b"]}
    again = run(recorded, "again", trust_code=True, progress=False)
    assert again.test == record.test
    table = compare_runs(["out"], "t.csv", trust_code=True, progress=False)
    assert [row.name for row in table.rows] == ["out", "out without picture", "out without row"]
    assert table["out without row"].score.value == pytest.approx(record.test["without"]["row"]["value"])
    assert "out without picture" in write_report(table, work / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_text_image_and_table(work: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film", "dull"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(work / "bert")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=6, **size)).save_pretrained(work / "bert")
    models = [
        net("pixels", name="look", input="picture"),
        {"model": "./bert", "name": "read", "input": "review"},
        net("table", name="row", input=["a", "b"]),
    ]
    training = {"epochs": 15, "learning_rate": 0.05, "batch_size": 12}
    record = run(recipe(models=models, training=training), "out", trust_code=True, progress=False)
    assert record.test is not None
    assert list(record.test["without"]) == ["picture", "review", "row"]
    assert record.test["value"] > 0.7
    table = compare_runs(["out"], "t.csv", trust_code=True, progress=False)
    assert table["out without review"].score.value == pytest.approx(record.test["without"]["review"]["value"])


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check(given, trust_code=True)
    return [str(problem) for problem in caught.value.problems]


def test_what_is_wrong_with_inputs_is_said_at_once(work: Path) -> None:
    part = [net("pixels", input="picture"), net("table", name="row")]
    wrong = recipe(models=part, parameters={"branch_dropout": 1, "missing": "tokn"})
    wrong["data"]["input"] = {"pixels": "picture", "row": []}
    assert problems(wrong) == [
        "data.input: got {'pixels': 'picture', 'row': []}; should be a name, a list of names, or a mapping of model names "
        "to these",
        "parameters.branch_dropout: got 1; below 1",
        "parameters.missing: got 'tokn'; allowed: 'token' or 'none'",
        "models[1].input: missing, and other models have one; what row reads",
    ]
    wrong["data"]["input"] = "picture"
    wrong["parameters"] = {}
    assert problems(wrong)[:1] == ["data.input: stands beside models with an input of their own; keep one of the two"]
    assert problems(recipe(models=[net("pixels", input=""), net("table", input=["a", "a"])])) == [
        "models[0].input: got ''; should be a name, or a list of names",
        "models[1].input: got ['a', 'a']; should be a name, or a list of names",
    ]
    merge = {"merge_method": "linear", "models": [net("pixels", input="picture"), net("pixels", name="b")]}
    assert problems(merge) == ["models[0].input: the models of this recipe read the same data; remove the key"]


def test_only_a_fusion_of_features_does_without_an_input(work: Path) -> None:
    ensemble = {key: value for key, value in recipe(fusion="ensemble").items() if key not in ("parameters", "training")}
    ensemble["data"] = {"test": "t.csv"}
    with pytest.raises(DataError) as caught:
        run(ensemble, "out", trust_code=True, progress=False)
    assert [str(problem) for problem in caught.value.problems] == [
        "data.test: pixels is missing in 10 of 48 examples; a fusion of features, or whole examples",
        "data.test: row is missing in 5 of 48 examples; a fusion of features, or whole examples",
    ]
    assert not (work / "out").exists()


def test_a_model_alone_and_an_ensemble_read_their_own_columns(work: Path) -> None:
    whole = [row for row in (work / "t.csv").read_text().splitlines() if ",," not in row and not row.startswith(",")]
    (work / "whole.csv").write_text("\n".join(whole) + "\n")
    models = [net("pixels", input="picture"), net("number", input="b")]
    ensemble = {"fusion": "ensemble", "models": models, "data": {"test": "whole.csv"}}
    record = run(ensemble, "out", trust_code=True, progress=False)
    assert record.test is not None
    assert "without" not in record.test
    alone = {"models": models[1:], "data": {"train": "whole.csv", "test": "whole.csv"}, "training": {"epochs": 1}}
    assert run(alone, "alone", trust_code=True, progress=False).test is not None


def test_models_that_read_the_same_are_missing_together(work: Path) -> None:
    models = [net("pixels", input="picture"), net("table", input=["a", "b"]), net("table", name="other", input=["a", "b"])]
    record = run(recipe(models=models, training={"epochs": 0}), "out", trust_code=True, progress=False)
    assert record.test is not None
    assert list(record.test["without"]) == ["picture", "table"]
    model = load_run("out", trust_code=True)
    assert isinstance(model, ModelFusion)
    with pytest.raises(OptionError, match="leaves no network an input"), model.without("picture", "table"):
        pass

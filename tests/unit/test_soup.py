"""Greedy soups: the search against a slow one, networks that stay as they are, and runs from recipe to record."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import interfuse as itf
from interfuse.evaluation.metrics import score
from interfuse.evaluation.soup import choose
from interfuse.registry import find

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 3))
"""


def value_of(seed: int, names: Sequence[str]) -> float:
    """A value for each set of models, with many that are equal."""
    return float(np.random.default_rng([seed, *(ord(name) for name in sorted(names))]).integers(0, 6))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["accuracy", "mse"]))
def test_a_soup_is_recipe_1_of_the_paper(seed: int, count: int, metric: str) -> None:
    names = list("abcde"[:count])
    sign = 1 if metric == "accuracy" else -1
    order = sorted(names, key=lambda name: -sign * value_of(seed, [name]))
    ingredients: list[str] = []
    best = -math.inf
    for name in order:
        found = sign * value_of(seed, [*ingredients, name])
        if found >= best:
            ingredients.append(name)
            best = found
    soup = choose(names, lambda chosen: value_of(seed, chosen), metric)
    assert [name for name in names if soup.weights[name]] == [name for name in names if name in ingredients]
    assert (soup.value, [step.model for step in soup.steps]) == (sign * best, order)
    assert [step.alone for step in soup.steps] == [value_of(seed, [name]) for name in order]


def test_what_is_no_number_is_never_kept() -> None:
    values = {"a": math.nan, "b": 0.5, "c": 0.4}
    soup = choose("abc", lambda names: values[names[0]] if len(names) == 1 else math.nan, "accuracy")
    assert soup.weights == {"a": 0.0, "b": 1.0, "c": 0.0}


def networks() -> tuple[dict[str, nn.Module], tuple[torch.Tensor, torch.Tensor]]:
    """Near copies of one that fits the data, one that is far off; the data."""
    torch.manual_seed(0)
    right = torch.randn(3, 4)
    x = torch.randn(200, 4)
    models: dict[str, nn.Module] = {}
    for name, noise in (("far", 3.0), ("near", 0.3), ("nearer", 0.2), ("also", 0.3)):
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(right + noise * torch.randn(3, 4))
            layer.bias.zero_()
        models[name] = nn.Sequential(layer)
    return models, (x, (x @ right.T).argmax(1))


def test_networks_are_chosen_by_their_averages_and_stay_as_they_are() -> None:
    models, data = networks()
    models["near"].train()
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    soup = itf.greedy_soup(models, data, progress=False)
    assert models["near"].training
    assert all(torch.equal(model.state_dict()[k], v) for name, model in models.items() for k, v in before[name].items())
    assert soup.weights["far"] == 0
    kept = [name for name, weight in soup.weights.items() if weight]
    assert len(kept) > 1
    with torch.no_grad():
        merged = itf.merge("linear", models, weights=soup.weights).eval()
        assert soup.value == pytest.approx(score("accuracy", merged(data[0]), data[1]))
        assert soup.value >= max(score("accuracy", model.eval()(data[0]), data[1]) for model in models.values())
    assert soup == itf.greedy_soup(models, data, progress=False)
    assert list(itf.greedy_soup(list(models.values()), data, "log_loss", progress=False).weights) == ["0", "1", "2", "3"]
    with pytest.raises(itf.DataError, match="has no targets"):
        itf.greedy_soup(models, [data[0]], progress=False)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights of four networks, the code of one, and data; it is the current folder."""
    (tmp_path / "soupnets.py").write_text(NETS)
    models, (x, y) = networks()
    for name, model in models.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    np.savez(tmp_path / "validation.npz", x=x[:120].numpy(), y=y[:120].numpy())
    np.savez(tmp_path / "test.npz", x=x[120:].numpy(), y=y[120:].numpy())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("soupnets", None)


def recipe(**changes: Any) -> dict[str, Any]:
    models = [
        {"model": "python:soupnets:net", "weights": f"{name}.safetensors", "name": name} for name in ("far", "near", "also")
    ]
    data = {"validation": "validation.npz", "test": "test.npz"}
    return {"merge_method": "greedy_soup", "models": models, "data": data, **changes}


def test_a_run_chooses_writes_a_linear_recipe_and_records_each_step(work: Path) -> None:
    record = itf.run(recipe(evaluate={"metric": "balanced_accuracy"}), "out", trust_code=True, progress=False)
    about = json.loads((work / "out" / "interfuse.json").read_text())["run"]
    steps = about["soup"]["steps"]
    assert about["soup"]["metric"] == "balanced_accuracy"
    assert about["soup"]["validation"] == str(work / "validation.npz")
    assert len(about["soup"]["sha256"]) == 64
    assert sorted(step["model"] for step in steps) == ["also", "far", "near"]
    assert not next(step for step in steps if step["model"] == "far")["kept"]
    kept = [step["model"] for step in steps if step["kept"]]
    assert set(about["inputs"]["data"]) == {"test"}
    written = yaml.safe_load((work / "out" / "recipe.yaml").read_text())
    assert written["merge_method"] == "linear"
    assert sorted(entry["name"] for entry in written["models"]) == sorted(kept)
    assert all(entry["parameters"] == {"weight": 1.0} for entry in written["models"])
    assert "validation" not in written["data"]
    parts = [load_file(work / f"{name}.safetensors")["0.weight"] for name in kept]
    torch.testing.assert_close(load_file(work / "out" / "model.safetensors")["0.weight"], sum(parts) / len(parts))
    assert f"{kept[0]}: balanced_accuracy" in record.text()
    assert "far: balanced_accuracy" in (work / "out" / "README.md").read_text()
    assert record.test is not None
    assert record.test["examples"] == 80
    again = itf.run(work / "out" / "recipe.yaml", "again", trust_code=True, progress=False)
    assert again.test == record.test
    assert (work / "again" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()
    assert itf.load_run("out", trust_code=True) is not None


def test_a_dry_run_tries_no_model(work: Path) -> None:
    record = itf.run(recipe(), "out", trust_code=True, dry_run=True, progress=False)
    assert f"chosen on {work / 'validation.npz'}" in record.text()
    assert not (work / "out").exists()


def test_models_in_folders_are_merged_from_file_to_file(work: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "fine", "poor"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=6, max_position_embeddings=8, num_labels=2, **sizes)
    for seed, name in enumerate(("p", "q", "r")):
        torch.manual_seed(seed)
        transformers.BertForSequenceClassification(config).save_pretrained(work / name)
        wrapped.save_pretrained(work / name)
    (work / "v.csv").write_text("text,label\n" + "good fine,yes\nbad poor,no\n" * 6)
    soup = {"merge_method": "greedy_soup", "models": ["p", "q", "r"], "data": {"validation": "v.csv"}}
    record = itf.run(soup, "out", progress=False)
    assert record.soup is not None
    kept = [step["model"] for step in record.soup["steps"] if step["kept"]]
    assert kept
    itf.merge("linear", [work / name for name in ("p", "q", "r") if name in kept], out=work / "plain")
    assert (work / "out" / "model.safetensors").read_bytes() == (work / "plain" / "model.safetensors").read_bytes()
    assert (work / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": {"test": "test.npz"}}, r"data\.validation: missing; the models are chosen by it"),
        ({"data": {"validation": 0.2}}, r"data\.validation: got 0.2; the models are chosen by it"),
        ({"data": {"validation": "test.npz", "test": "./test.npz"}}, r"data\.validation: is data\.test too"),
        ({"data": {"validation": "validation.npz", "train": "test.npz"}}, r"data\.train: nothing is trained here"),
        ({"parameters": {"weight": 0.3}}, r"parameters\.weight: the models that are chosen weigh the same"),
        ({"parameters": {"density": 0.3}}, r"parameters\.density: greedy_soup has no such option"),
        ({"evaluate": {"metric": "acuracy"}}, r"evaluate\.metric.*did you mean 'accuracy'"),
    ],
)
def test_what_a_soup_cant_be_is_said(work: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(itf.RecipeError, match=match):
        itf.run(recipe(**changes), "out", trust_code=True, progress=False)
    assert not (work / "out").exists()


def test_a_soup_stands_alone_and_isnt_a_formula(work: Path) -> None:
    first = {
        "name": "s",
        "merge_method": "greedy_soup",
        "models": ["far.safetensors"],
        "data": {"validation": "validation.npz"},
    }
    with pytest.raises(itf.RecipeError, match="stands beside other recipes; give it a file of its own"):
        itf.run([first, {"merge_method": "linear", "models": ["s"]}], "out", progress=False)
    with pytest.raises(itf.OptionError, match=r"data\.validation: missing; .* \(in Python: interfuse\.greedy_soup\)"):
        itf.merge("greedy_soup", [load_file("far.safetensors")])
    with pytest.raises(itf.OptionError, match="greedy_soup chooses its models by validation data"):
        find("greedy_soup", "weights").make((1.0, 1.0))
    (work / "out").mkdir()
    (work / "out" / "x").write_text("")
    with pytest.raises(itf.CheckpointError, match="is there already"):
        itf.run(recipe(), "out", trust_code=True, progress=False)

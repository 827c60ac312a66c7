"""Recipes of transplants: from folder to folder without a network, and rows by token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import interfuse as itf
from interfuse.cli import main
from interfuse.errors import CheckpointError, OptionError, UserError
from interfuse.pipeline import load_run, run, verify

THEIRS, OURS = ["a", "b", "c"], ["c", "x", "a", "y"]


def checkpoint(folder: Path, words: Sequence[str], layers: int, seed: int, **more: Any) -> Path:
    """A folder of weights with an embedding, layers, a tokenizer, a config, and a card of its own."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    tensors = {"embed_tokens.weight": draw.normal(size=(len(words), 4)).astype(np.float32)}
    tensors |= {f"layers.{i}.weight": draw.normal(size=(4, 4)).astype(np.float32) for i in range(layers)}
    save_file(tensors, folder / "model.safetensors")
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(words), **more}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Its own\n")
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source of two layers and a target of four; it is the current folder."""
    checkpoint(tmp_path / "source", THEIRS, 2, 0)
    checkpoint(tmp_path / "target", OURS, 4, 1, hidden_size=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**parameters: Any) -> dict[str, Any]:
    return {
        "fusion": "transplant",
        "target": "./target",
        "models": ["./source"],
        "parameters": {"depth": "spread", "vocabulary": True, **parameters},
    }


def values(folder: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(Path(folder) / "model.safetensors")
    return found


def test_folders_give_a_folder_that_says_how_it_was_made(work: Path) -> None:
    record = run(recipe(), "out", progress=False)
    theirs, ours, made = values("source"), values("target"), values("out")
    rows = made["embed_tokens.weight"]
    for word in OURS:
        expected = (
            theirs["embed_tokens.weight"][THEIRS.index(word)]
            if word in THEIRS
            else ours["embed_tokens.weight"][OURS.index(word)]
        )
        assert np.array_equal(rows[OURS.index(word)], expected), word
    for layer, source in ((0, 0), (2, 1)):
        assert np.array_equal(made[f"layers.{layer}.weight"], theirs[f"layers.{source}.weight"])
    for layer in (1, 3):
        assert np.array_equal(made[f"layers.{layer}.weight"], ours[f"layers.{layer}.weight"])
    for name in ("tokenizer.json", "config.json"):
        assert (work / "out" / name).read_bytes() == (work / "target" / name).read_bytes()
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["kind"] == "transplant"
    assert [source["model"] for source in about["sources"]] == [str(work / "source"), str(work / "target")]
    assert about["run"]["inputs"]["models"][1]["xxh3"] == about["sources"][1]["xxh3"]
    assert any(note.startswith("from source: ") for note in record.notes)
    card = (work / "out" / "README.md").read_text()
    assert "# Transplant from source" in card
    assert "Its own" not in card
    assert (work / "out" / "recipe.yaml").is_file()
    run("out/recipe.yaml", "again", progress=False)
    for name in ("model.safetensors", "interfuse.json", "recipe.yaml"):
        assert (work / "out" / name).read_bytes() == (work / "again" / name).read_bytes()


def test_it_is_verified_and_what_differs_is_found(work: Path) -> None:
    run(recipe(), "out", progress=False)
    found = verify("out", again=True, progress=False)
    assert found.good, found.text()
    assert {check.what for check in found.checks} == {"tensors", "files", "recipe", "inputs", "again"}
    changed = values("out")
    changed["layers.1.weight"] = changed["layers.1.weight"] + 1
    save_file(changed, work / "out" / "model.safetensors")
    (work / "out" / "config.json").write_text("{}")
    assert {c.name for c in verify("out", progress=False).checks if c.good is False} == {"layers.1.weight", "config.json"}
    run(recipe(), "out", overwrite=True, progress=False)
    source = values("source")
    source["layers.0.weight"] = source["layers.0.weight"] * 2
    save_file(source, work / "source" / "model.safetensors")
    wrong = [check for check in verify("out", again=True, progress=False).checks if check.good is False]
    assert {(check.what, check.name) for check in wrong} == {("inputs", str(work / "source")), ("again", "layers.0.weight")}
    more = {f"layers.{i}.weight": source["layers.0.weight"] for i in (2, 3)}
    save_file(source | more, work / "source" / "model.safetensors")  # now every layer of the target is given one
    assert ("recipe", "interfuse.json") in {(c.what, c.name) for c in verify("out", progress=False).checks if c.good is False}


def test_a_dry_run_says_what_becomes_of_each_tensor(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "r.yaml").write_text(json.dumps(recipe()))
    with pytest.raises(SystemExit) as end:
        main(["run", "r.yaml", "out", "--dry-run"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "layers.*.weight" in text
    assert "adapted" in text
    assert "nothing was written" in text
    assert not (work / "out").exists()


def test_nothing_is_written_where_it_cannot_be(work: Path) -> None:
    (work / "full").mkdir()
    (work / "full" / "x").write_text("x")
    with pytest.raises(UserError) as raised:
        run(recipe(rules={"nothing.*": "x.*"}), "full", progress=False)
    assert len(raised.value.problems) == 2
    with pytest.raises(CheckpointError, match="is given nothing"):
        run(recipe(strict=True, depth=None), "out", progress=False)
    (work / "target" / "tokenizer.json").unlink()
    with pytest.raises(OptionError, match=r"parameters\.vocabulary: .*target has no tokenizer"):
        run(recipe(), "out", progress=False)
    assert not (work / "out").exists()


def test_tokenizers_of_other_folders(work: Path) -> None:
    run(recipe(), "out", progress=False)
    (work / "elsewhere").mkdir()
    (work / "target" / "tokenizer.json").rename(work / "elsewhere" / "tokenizer.json")
    (work / "sub").mkdir()
    asked = recipe(vocabulary={"target": "../elsewhere"}) | {"target": "../target", "models": ["../source"]}
    (work / "sub" / "r.yaml").write_text(json.dumps(asked))
    run("sub/r.yaml", "named", progress=False)
    assert all(np.array_equal(value, values("named")[name]) for name, value in values("out").items())


def test_stages_copy_rows_by_token(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "rows.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, rows):\n"
        "        super().__init__()\n"
        "        self.embed_tokens = nn.Embedding(rows, 4)\n"
        "        self.head = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.embed_tokens(x).mean(1))\n"
        "def three():\n    torch.manual_seed(0)\n    return Net(3)\n"
        "def four():\n    torch.manual_seed(1)\n    return Net(4)\n"
    )
    monkeypatch.syspath_prepend(str(work))
    np.savez(work / "d.npz", x=np.arange(40).reshape(20, 2) % 3, y=np.arange(20) % 2)
    vocabulary = {"source": "./source", "target": "./target"}
    staged = {
        "fusion": "stages",
        "target": "python:rows:four",
        "models": [{"model": "python:rows:three", "name": "a"}],
        "stages": [{"copied": {"a": {"vocabulary": vocabulary}}, "training": {"epochs": 0}}],
        "data": {"train": "d.npz"},
    }
    run(staged, "out", trust_code=True, progress=False)
    from rows import four, three  # type: ignore[import-not-found]

    target = four()
    itf.transplant(three(), target, vocabulary=(work / "source", work / "target"), show=False)
    assert np.array_equal(values("out")["embed_tokens.weight"], target.embed_tokens.weight.detach().numpy())
    sys.modules.pop("rows")


def test_verify_and_a_dry_run_load_no_network(work: Path) -> None:
    (work / "r.yaml").write_text(json.dumps(recipe()))
    code = (
        "import sys; from interfuse.pipeline import run, verify\n"
        "run('r.yaml', 'out', progress=False); assert verify('out', progress=False).good\n"
        "assert 'transformers' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=work)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_transformers_folder_is_filled_and_evaluated(work: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for seed, (name, layers) in enumerate({"small": 1, "large": 2}.items()):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=6, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
        transformers.BertForSequenceClassification(config).save_pretrained(work / name)
    np.savez(work / "ids.npz", x=np.arange(96).reshape(24, 4) % 6, y=np.arange(24) % 3)
    asked: dict[str, Any] = {"fusion": "transplant", "target": "large", "models": ["small"], "parameters": {"depth": "repeat"}}
    record = run(asked | {"data": {"test": "ids.npz"}}, "out", progress=False)
    made = load_run("out")
    expected = itf.load_model("large")
    itf.transplant(itf.load_model("small"), expected, depth="repeat", show=False)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in expected.state_dict().items())
    found = itf.predict(made, itf.load_data("ids.npz"), progress=False)
    assert found.targets is not None
    assert record.test is not None
    assert record.test["value"] == pytest.approx(float((found.outputs.argmax(1) == found.targets).double().mean()))
    assert verify("out", again=True, progress=False).good
    assert "transformers" in (work / "out" / "README.md").read_text()
    (work / "target" / "config.json").unlink()
    with pytest.raises(UserError, match=r"data\.test: .*target has no network to evaluate"):
        run(recipe() | {"data": {"test": "ids.npz"}}, "none", progress=False)

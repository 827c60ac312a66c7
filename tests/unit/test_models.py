"""`load_model`: folders, code that is trusted, and weights that fit; every other reference says the way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interfuse.errors import CheckpointError, ModelError
from interfuse.models import call_reference, load_model, load_tokenizer

CODE = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

def number():
    return 3

class Box:
    made = staticmethod(make)

value = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's in the current folder."""
    (tmp_path / "users_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("users_code", None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight


def tied() -> nn.Module:
    return Tied()


def bert(seed: int = 0, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **options))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_folder_of_transformers_is_loaded(tmp_path: Path) -> None:
    model = bert(num_labels=4)
    model.save_pretrained(tmp_path)
    back = load_model(str(tmp_path))
    assert type(back) is type(model)
    assert same(back, model)
    assert not back.training


@pytest.mark.parametrize("exactly", [False, True])
def test_half_precision_becomes_float32_unless_asked_otherwise(exactly: bool, tmp_path: Path) -> None:
    bert().to(torch.bfloat16).save_pretrained(tmp_path)
    found = {p.dtype for p in load_model(str(tmp_path), exactly=exactly).parameters()}
    assert found == {torch.bfloat16 if exactly else torch.float32}


def test_weights_that_transformers_would_make_up_are_an_error(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.bias"]
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"classifier\.bias: missing; the BertForSequenceClassification needs it"):
        load_model(str(tmp_path))


def test_code_is_called_only_when_trusted(code: Path) -> None:
    with pytest.raises(ModelError, match=r"python:users_code:make: this runs code; give --trust-code"):
        load_model("python:users_code:make")
    assert "users_code" not in sys.modules
    path = list(sys.path)
    network = load_model("python:users_code:make", trust_code=True)
    assert isinstance(network, nn.Sequential)
    assert not network.training
    assert sys.path == path
    assert isinstance(load_model("python:users_code:Box.made", trust_code=True), nn.Sequential)
    assert call_reference("python:users_code:number", trust_code=True) == 3


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("python:users_code", r"isn't python:package\.module:function; name a module and a function"),
        ("python::make", r"isn't python:package\.module:function"),
        ("python:no_such_module:make", "no module named 'no_such_module'; install it, or run from its folder"),
        ("python:users_code:maek", "users_code has no function 'maek'"),
        ("python:users_code:value", "users_code has no function 'value'"),
        ("python:users_code:number", r"returned int; a function that returns a torch\.nn\.Module"),
        ("weights.safetensors", r"is a file of weights without the network's code; name the code .* as `weights`"),
        ("empty", r"has no config\.json; a folder written by save_pretrained or interfuse\.save"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_bad_references_say_the_way_out(ref: str, error: str, code: Path) -> None:
    save_file({"x": torch.zeros(1)}, code / "weights.safetensors")
    (code / "empty").mkdir()
    with pytest.raises(ModelError, match=error):
        load_model(ref, trust_code=True)


def test_a_folder_that_transformers_can_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(ModelError, match="a folder or hub id that Transformers can load"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="a folder or hub id that Transformers can load"):
        load_model(str(tmp_path))
    bert().config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a folder or hub id that Transformers can load"):
        load_model(str(tmp_path))


def tensors() -> dict[str, Tensor]:
    return {"0.weight": torch.arange(12.0).reshape(3, 4), "0.bias": torch.ones(3)}


def test_weights_fill_what_code_makes(code: Path) -> None:
    for kind, weights in (("file", "w.safetensors"), ("folder", "w"), ("torch", "w.pt")):
        (code / "w").mkdir(exist_ok=True)
        if kind == "torch":
            torch.save(tensors(), code / weights)
        else:
            save_file(tensors(), code / (weights if kind == "file" else "w/model.safetensors"))
        network = load_model("python:users_code:make", weights=code / weights, trust_code=True)
        assert torch.equal(network.state_dict()["0.weight"], tensors()["0.weight"])


def test_weights_that_do_not_fit_are_all_named(code: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 5), "1.bias": torch.zeros(3)}, code / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model("python:users_code:make", weights="w.safetensors", trust_code=True)
    text = str(caught.value)
    assert "w.safetensors: 0.weight: shape (3, 5); the network has (3, 4)" in text
    assert "w.safetensors: 0.bias: missing; the network needs it, shape (3,)" in text
    assert "w.safetensors: 1.bias: not in the network" in text
    with pytest.raises(CheckpointError, match=r"w2\.safetensors: no such file"):
        load_model("python:users_code:make", weights="w2.safetensors", trust_code=True)


def test_types_of_weights_are_the_networks_or_exactly_the_files(code: Path) -> None:
    save_file({key: value.half() for key, value in tensors().items()}, code / "w.safetensors")
    for exactly, dtype in ((False, torch.float32), (True, torch.float16)):
        network = load_model("python:users_code:make", weights="w.safetensors", trust_code=True, exactly=exactly)
        assert network.state_dict()["0.weight"].dtype == dtype


def test_of_tied_weights_one_is_enough(tmp_path: Path) -> None:
    save_file({"one.weight": torch.eye(3)}, tmp_path / "w.safetensors")
    network = load_model(f"python:{__name__}:tied", weights=tmp_path / "w.safetensors", trust_code=True)
    assert isinstance(network, Tied)
    assert torch.equal(network.two.weight, torch.eye(3))
    assert network.two.weight is network.one.weight


def test_tokenizers_lie_with_their_network(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    bert().save_pretrained(tmp_path / "none")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "some")
    bert().save_pretrained(tmp_path / "some")
    assert load_tokenizer(str(tmp_path / "none")) is None
    assert load_tokenizer("python:anything:at_all") is None
    assert load_tokenizer(str(tmp_path / "some"))(["a b"])["input_ids"] == [[2, 5, 6, 3]]


def test_texts_are_cut_at_what_the_network_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "some")
    bert(max_position_embeddings=12).save_pretrained(tmp_path / "some")
    assert len(load_tokenizer(str(tmp_path / "some"))("a " * 40, truncation=True)["input_ids"]) == 10


def test_folders_load_without_a_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    bert().save_pretrained(tmp_path / "net")
    capsys.readouterr()
    load_model(str(tmp_path / "net"))
    assert capsys.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()

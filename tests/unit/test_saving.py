"""`save` and `load`: the same bits come back, nothing is pickled, and what doesn't fit is named."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from interfuse.engine.merge import merge
from interfuse.ensemble.combine import COMBINE, LEARNS
from interfuse.ensemble.network import Ensemble
from interfuse.errors import CheckpointError, ModelError, OptionError
from interfuse.modules.fused import ModelFusion
from interfuse.registry import methods
from interfuse.saving import load, save
from interfuse.training.fit import fit

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


class Tied(nn.Module):
    """Two layers with one matrix, and buffers of whole numbers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("table", torch.arange(4, dtype=torch.int16) + seed)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype
        and one[k].shape == two[k].shape
        and torch.equal(one[k].reshape(-1).view(torch.uint8), two[k].reshape(-1).view(torch.uint8))
        for k in one
    )


def trained(fusion: str = "attention", **options: Any) -> ModelFusion:
    model = ModelFusion({"a": network(1), "b": network(2, 6)}, fusion, head=3, **options)
    data = (X, torch.arange(6) % 3)
    fit(model, data, data, epochs=2, learning_rate=0.1, cache=False, accelerator="cpu", progress=False)
    return model


def fresh() -> dict[str, nn.Module]:
    return {"a": network(8), "b": network(9, 6)}


@pytest.mark.parametrize("fusion", [method.name for method in methods("features")])
def test_a_fusion_of_every_kind_comes_back(fusion: str, tmp_path: Path) -> None:
    model = trained(fusion)
    assert save(model, tmp_path / "out") == tmp_path / "out"
    for given in (fresh(), list(fresh().values())):
        back = load(tmp_path / "out", given)
        assert isinstance(back, ModelFusion)
        assert same_bits(back, model)
        assert torch.equal(back(X), model(X))
        assert torch.equal(back(X, return_weights=True)[1], model(X, return_weights=True)[1])
        assert (back.names, back.taps, back.widths, back.parents) == (model.names, model.taps, model.widths, model.parents)
        assert (back.dim, back.pool, back.freeze, back.kind, back.options) == (
            *(model.dim, model.pool, model.freeze, model.kind, model.options),
        )
        assert not back.training
        assert not any(p.requires_grad for p in back.backbones.parameters())


def test_it_can_be_saved_again_and_trained_on(tmp_path: Path) -> None:
    model = trained("transformer", freeze={"a": False}, pool="none", taps={"a": "0"}, heads=2)
    save(model, tmp_path / "one")
    back = load(tmp_path / "one", fresh())
    save(back, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "interfuse.json").read_text() == (tmp_path / "two" / "interfuse.json").read_text()
    data = (X, torch.arange(6) % 3)
    fit(back, data, epochs=1, cache=False, accelerator="cpu", progress=False)
    assert not same_bits(back, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    inner = network()
    model = nn.Sequential(inner, Tied(3)).to(dtype)
    weight = inner.state_dict()["0.weight"]
    weight[0, 0], weight[0, 1] = float("nan"), -0.0
    save(model, tmp_path / "out")
    back = load(tmp_path / "out", nn.Sequential(network(5), Tied(6)))
    assert same_bits(back, model)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied(1)
    save(model, tmp_path / "out")
    assert "two.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    back = load(tmp_path / "out", Tied(2))
    assert isinstance(back, Tied)
    assert same_bits(back, model)
    assert back.two.weight is back.one.weight
    shared = network()
    both = Ensemble([shared, shared], copy=False)
    save(both, tmp_path / "both")
    assert len(load_file(tmp_path / "both" / "model.safetensors")) == len(shared.state_dict())
    assert same_bits(load(tmp_path / "both", [network(1), network(2)]), both)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_ensemble_comes_back(combine: Any, calibrated: bool, tmp_path: Path) -> None:
    model = Ensemble({"a": network(1), "b": network(2, 6)}, combine=combine, classes=[list("uvw"), list("wuv")]).eval()
    if calibrated:
        model.calibrate((X, torch.arange(6) % 3), progress=False)
    save(model, tmp_path / "out")
    back = load(tmp_path / "out", fresh())
    assert isinstance(back, Ensemble)
    assert same_bits(back, model)
    assert (back.combine, back.classes) == (combine, ("u", "v", "w"))
    if calibrated or not LEARNS[combine]:
        assert torch.equal(back(X), model(X))


def test_what_ensembles_within_ensembles_learned_comes_back(tmp_path: Path) -> None:
    inner = Ensemble([network(1), network(2)], combine="stacking")
    inner.calibrate((X, torch.arange(6) % 3), progress=False)
    model = Ensemble([inner, network(3)], copy=False)
    model.calibrate((X, torch.arange(6) % 3), progress=False)
    save(model, tmp_path / "out")
    fresh = Ensemble([network(4), network(5)], combine="stacking")
    assert same_bits(load(tmp_path / "out", [fresh, network(6)]), model)


def test_heads_that_are_modules(tmp_path: Path) -> None:
    model = ModelFusion(fresh(), head=nn.Sequential(nn.Linear(8, 5), nn.Tanh()), example=X)
    save(model, tmp_path / "out")
    with pytest.raises(ModelError, match=r"head: missing; .* give a torch\.nn\.modules\.container\.Sequential"):
        load(tmp_path / "out", fresh())
    back = load(tmp_path / "out", fresh(), head=nn.Sequential(nn.Linear(8, 5), nn.Tanh()))
    assert torch.equal(back(X), model.eval()(X))
    none = ModelFusion(fresh(), example=X)
    save(none, tmp_path / "none")
    assert load(tmp_path / "none", fresh())(X).shape == (6, 8)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    save(trained(), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["interfuse.json", "model.safetensors"]
    for name in names:
        with pytest.raises(ValueError, match=r"opcode|pickle|expected"):
            list(pickletools.genops((tmp_path / "out" / name).read_bytes()))


def test_a_fusion_that_is_not_built_can_not_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its widths aren't known yet; give it `example`, or call it once"):
        save(ModelFusion(fresh(), head=3), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="got 'values'; did you mean 'value'"):
        save(trained(), tmp_path / "out", backbones="values")  # type: ignore[arg-type]


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    save(network(1), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is there already"):
        save(network(2), out)
    with pytest.raises(ModelError, match="widths"):
        save(ModelFusion(fresh()), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    (out / "old").write_text("of the old model")
    save(network(2), out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["interfuse.json", "model.safetensors"]
    assert same_bits(load(out, network()), network(2))
    monkeypatch.chdir(out)
    with pytest.raises(CheckpointError, match="current folder"):
        save(network(3), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_networks_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    save(trained(), tmp_path / "out")
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "out")
    assert [problem.path for problem in caught.value.problems] == ["models['a']", "models['b']"]
    assert "it was saved without its code: give a torch.nn.modules.container.Sequential" in str(caught.value)
    with pytest.raises(ModelError, match=r"models\['b'\]: missing"):
        load(tmp_path / "out", {"a": network()})
    with pytest.raises(ModelError, match=r"models\['c'\]: no member has this name"):
        load(tmp_path / "out", {**fresh(), "c": network()})
    with pytest.raises(ModelError, match=r"models: 1 given for 2 members; in this order: \['a', 'b'\]"):
        load(tmp_path / "out", [network()])
    save(network(), tmp_path / "single")
    with pytest.raises(ModelError, match=r"holds the weights of a? ?torch.nn.modules.container.Sequential, without its code"):
        load(tmp_path / "single")


def test_networks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = trained()
    save(model, tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "out", [network(1, 6), network(2)])  # swapped
    text = str(caught.value)
    assert "models['a'].0.weight: the network has (6, 4); saved was (8, 4)" in text
    assert "models['b'].3.weight: the network has (3, 8); saved was (3, 6)" in text
    with pytest.raises(CheckpointError, match=r"models\['a'\]\.4\.weight: wasn't saved"):
        load(tmp_path / "out", {**fresh(), "a": nn.Sequential(*network(), nn.Linear(3, 3))})
    with pytest.raises(CheckpointError, match=r"models\['a'\]\.3\.bias: was saved, but the network has no such tensor"):
        load(tmp_path / "out", {**fresh(), "a": nn.Sequential(*list(network())[:3], nn.Linear(8, 3, bias=False))})


def test_one_network_can_not_stand_for_two(tmp_path: Path) -> None:
    save(Ensemble([network(1), network(2)]), tmp_path / "out")
    one = network()
    with pytest.raises(
        CheckpointError, match=r"models\['Sequential_2'\]\.0\.weight: is the same tensor as models\['Sequential'\]"
    ):
        load(tmp_path / "out", [one, one])


def test_nothing_is_filled_when_something_does_not_fit(tmp_path: Path) -> None:
    save(trained(), tmp_path / "out")
    given = {"a": network(7), "b": network(8, 5)}
    with pytest.raises(CheckpointError):
        load(tmp_path / "out", given)
    assert same_bits(given["a"], network(7))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("{", "can't be read"),
        ("[1]", "can't be read"),
        ('{"format": 1}', "can't be read: KeyError"),
        ('{"kind": "fusion", "format": 1}', r"interfuse\.json\.members: missing"),
        ('{"kind": "ensemble", "format": 1, "members": 3, "combine": "sum", "shared": {}}', r"members: got 3"),
        ('{"kind": "ensemble", "format": 1, "members": 3, "combine": "sum", "shared": {}}', r"combine: got 'sum'"),
        ('{"kind": "network", "format": 2}', "holds a 'network' in format 2; a newer interfuse; this one reads format 1"),
        ('{"kind": "cascade", "format": 1}', "holds a 'cascade'"),
    ],
)
def test_a_damaged_description_is_an_error(damage: str, error: str, tmp_path: Path) -> None:
    save(trained(), tmp_path / "out")
    (tmp_path / "out" / "interfuse.json").write_text(damage)
    with pytest.raises(CheckpointError, match=error):
        load(tmp_path / "out", fresh())


def test_damaged_tensors_are_an_error(tmp_path: Path) -> None:
    save(trained(), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-4], b"", b"\xff" * 64, whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(tmp_path / "out", fresh())
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load(tmp_path / "out", fresh())
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_a_state_that_holds_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(ModelError, match="_extra_state: its state is a dict; a state of tensors only"):
        save(Extra(2, 2), tmp_path / "out")


def bert(seed: int = 0, classes: int = 3) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=classes)).eval()


WORDS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny text classifier, saved as Transformers does."""
    bert(1).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_network_is_saved_as_transformers_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = bert().to(dtype)
    save(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    back = load(tmp_path / "out")
    assert type(back) is type(model)
    assert same_bits(back, model)


def test_members_from_a_folder_are_saved_by_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ModelFusion({"text": "bert", "own": bert(2)}, head=3, example=WORDS)
    save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any(name.startswith("backbones.0.") for name in names)
    assert any(name.startswith("backbones.1.") for name in names)
    monkeypatch.chdir(folder)  # the reference holds from anywhere
    back = load(tmp_path / "out", {"own": bert(3)})
    assert same_bits(back, model)
    assert torch.equal(back(WORDS), model.eval()(WORDS))
    save(back, tmp_path / "again")
    assert (tmp_path / "again" / "interfuse.json").read_text() == (tmp_path / "out" / "interfuse.json").read_text()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_reference_that_changed_is_found_out(folder: Path, tmp_path: Path) -> None:
    model = ModelFusion({"text": str(folder)}, head=3, example=WORDS)
    save(model, tmp_path / "out")
    bert(5).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"models\['text'\]: .*bert has changed since this was saved"):
        load(tmp_path / "out")
    assert same_bits(load(tmp_path / "out", {"text": bert(1)}), model)
    save(model, tmp_path / "now")  # the folder no longer gives these weights: by value
    assert same_bits(load(tmp_path / "now"), model)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"models\['text'\]: .*has no config\.json"):
        load(tmp_path / "out")


def test_members_are_saved_by_value_when_asked(folder: Path, tmp_path: Path) -> None:
    model = ModelFusion({"text": str(folder)}, head=3, example=WORDS)
    save(model, tmp_path / "out", backbones="value")
    assert any(n.startswith("backbones.0.") for n in load_file(tmp_path / "out" / "model.safetensors"))
    bert(5).save_pretrained(folder)
    assert same_bits(load(tmp_path / "out"), model)


@pytest.mark.parametrize("kind", ["fusion", "ensemble", "half"])
def test_members_that_were_changed_are_saved_by_value(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "ensemble":
        model: Any = Ensemble({"text": str(folder)})
    else:
        model = ModelFusion({"text": str(folder)}, head=3, freeze=kind == "half", example=WORDS)
    if kind == "half":
        model.half()
    else:
        data = [{**WORDS, "labels": torch.tensor([0, 2])}]
        fit(model, data, epochs=2, learning_rate=0.01, cache=False, accelerator="cpu", progress=False)
    save(model, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "interfuse.json").read_text())
    assert description["members"][0]["stored"] is True
    assert same_bits(load(tmp_path / "out"), model)


def test_a_model_may_not_replace_what_it_refers_to(folder: Path) -> None:
    model = ModelFusion({"text": str(folder)}, head=3, example=WORDS)
    with pytest.raises(CheckpointError, match="would replace the input"):
        save(model, folder, overwrite=True)
    assert (folder / "config.json").exists()


def test_merged_folders_are_loaded(folder: Path, tmp_path: Path) -> None:
    bert(2).save_pretrained(tmp_path / "other")
    merge("linear", [str(folder), str(tmp_path / "other")], out=tmp_path / "merged")
    one, two, back = (m.state_dict()["classifier.weight"] for m in (bert(1), bert(2), load(tmp_path / "merged")))
    assert torch.allclose(back, (one + two) / 2)
    save(network(1), tmp_path / "a")
    save(network(2), tmp_path / "b")
    merge("linear", [str(tmp_path / name / "model.safetensors") for name in "ab"], out=tmp_path / "plain")
    with pytest.raises(ModelError, match="holds the weights of a network, without its code; give such a network to fill"):
        load(tmp_path / "plain")
    one, two, filled = (m.state_dict()["0.bias"] for m in (network(1), network(2), load(tmp_path / "plain", network())))
    assert torch.allclose(filled, (one + two) / 2)

"""What is wrong with a merge is said all at once, with the way out, before a byte is read or written: exit status 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.cli import main

Shapes = Mapping[str, tuple[int, ...]]


def net(layers: int = 3) -> dict[str, tuple[int, ...]]:
    inner = {f"model.layers.{i}.{part}.weight": (4, 4) for i in range(layers) for part in ("attn", "mlp")}
    return {"model.embed_tokens.weight": (8, 4), **inner, "model.norm.weight": (4,)}


def write(folder: Path, shapes: Shapes, dtype: str = "F32") -> Path:
    folder.mkdir()
    specs = {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
    head, _ = encode_header(specs, None)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
    return folder / "model.safetensors"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "a", "b"):
        write(tmp_path / name, net())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(recipe: str, work: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The problems of a run, a line each; it has ended with 2 and left nothing."""
    (work / "r.yaml").write_text(recipe)
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert sorted(work.rglob("*")) == before
    return err.replace(str(work), "W").splitlines()


Capture = pytest.CaptureFixture[str]


def test_keys_options_and_ranges(work: Path, capsys: Capture) -> None:
    recipe = """
merge_method: ties
base_model: ./base
modles: []
models:
  - {model: ./a, parameters: {densty: 0.3, weight: .inf}}
  - {model: ./b, paramters: {}, parameters: {density: [0.2, 1.5], normalise: true}}
parameters: {lambda: big, normalize: 1}
dtype: bfloat15
"""
    assert said(recipe, work, capsys) == [
        "models[1].paramters: unknown key; did you mean 'parameters'?",
        "modles: unknown key; did you mean 'modules' or 'models'?",
        "parameters.lambda: got 'big'; a number",
        "parameters.normalize: got 1; true or false",
        "models[0].parameters.densty: ties has no such option; did you mean 'density'?",
        "models[0].parameters.weight: got inf; a number, true or false, a text, a list of them over depth, "
        "{filter, value}, or a list of those",
        "models[1].parameters.density[1]: got 1.5; at most 1",
        "models[1].parameters.normalise: ties has no such option; did you mean 'normalize'?",
        "models[1].parameters.weight: missing while other models have one; give every model a weight, or none",
        "dtype: got 'bfloat15'; did you mean 'bfloat16', 'float16', 'float64' or 'float32'?",
    ]


@pytest.mark.parametrize("method", ["ties", "nuslerp", "karcher"])
def test_a_model_without_a_weight_where_others_have_one(method: str, work: Path, capsys: Capture) -> None:
    """The base needs none where the method sees it apart, whether or not it needs a base; a model among others does."""
    entries = "models: [./base, {model: ./a, parameters: {weight: 1}}, ./b]"
    apart = method != "karcher"
    lines = said(f"merge_method: {method}\nbase_model: ./base\n{entries}\n", work, capsys)
    found = [line.partition(":")[0] for line in lines if "missing while other models have one" in line]
    assert found == [f"models[{i}].parameters.weight" for i in ([2] if apart else [0, 2])]
    assert "give every model a weight, or none" in lines[-1]


def test_weights_that_sum_to_zero_name_the_tensor_where_they_do(work: Path, capsys: Capture) -> None:
    models = "models: [{model: ./a, parameters: {weight: [1, 0]}}, {model: ./b, parameters: {weight: [-1, 1]}}]"
    lines = said(f"merge_method: linear\n{models}\n", work, capsys)
    assert lines == [
        "weights: 1.0, -1.0 sum to 0 for 'model.embed_tokens.weight' and 2 more; change one, or set normalize to false"
    ]
    models = "models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: -1}}]"
    lines = said(f"merge_method: linear\n{models}\n", work, capsys)
    assert lines == ["weights: 1, -1 sum to 0; change one, or set normalize to false"]


def test_layers_outside_the_model(work: Path, capsys: Capture) -> None:
    recipe = """
merge_method: passthrough
slices:
  - sources: [{model: ./a, layer_range: [0, 9]}]
  - sources: [{model: ./b, layer_range: [2, 2]}]
  - sources: [{model: ./b, layer_rnge: [1, 2], layer_range: [1, 2]}]
"""
    lines = said(recipe, work, capsys)
    assert "slices[0].sources[0].layer_range: got [0, 9], and W/a has 3 layers; at most [0, 3]" in lines
    assert "slices[1].sources[0].layer_range: got [2, 2]; the first layer and the one after the last" in lines
    assert "slices[2].sources[0].layer_rnge: unknown key; did you mean 'layer_range'?" in lines


def test_shapes_and_names_with_what_is_wrong_in_the_recipe(work: Path, capsys: Capture) -> None:
    other = net(3) | {"model.norm.weight": (5,)} | {f"extra.{i}.weight": (2,) for i in range(7)}
    write(work / "c", {name: shape for name, shape in other.items() if name != "model.layers.1.mlp.weight"})
    recipe = "merge_method: linear\nmodels: [./a, {model: ./c, parameters: {wieght: 1}}]\n"
    names = ", ".join(f"'extra.{i}.weight'" for i in range(5))
    one = "give models of one architecture, or name the tensors under `drop` or `keep`"
    assert said(recipe, work, capsys) == [
        "models[1].parameters.wieght: linear has no such option; did you mean 'weight'?",
        f"models[1] (W/c): tensor 'model.layers.1.mlp.weight' is missing; unlike models[0] (W/a): {one}",
        f"models[1] (W/c): 7 tensors are extra: {names} and 2 more; models[0] (W/a) has none: {one}",
        "W/c: tensor 'model.norm.weight' is F32[5]; W/a has F32[4]",
    ]


def test_files_that_are_damaged_or_missing_and_an_output_that_is_there(work: Path, capsys: Capture) -> None:
    whole = (work / "a" / "model.safetensors").read_bytes()
    (work / "a" / "model.safetensors").write_bytes(whole[:-10])
    longer = work / "b" / "model.safetensors"
    longer.write_bytes(longer.read_bytes().replace(b'"shape":[8,4]', b'"shape":[9,4]'))
    (work / "out").mkdir()
    (work / "out" / "mine").write_text("x")
    lines = said("merge_method: linear\nmodels: [./a, ./b, ./base]\n", work, capsys)
    assert [line.partition(":")[0] for line in lines] == ["W/a/model.safetensors", "W/b/model.safetensors", "out"]
    assert "damaged: tensor 'model.norm.weight': its data ends at byte 528, the file has 518 bytes of data" in lines[0]
    assert "F32[9, 4] takes 144 bytes, data_offsets give 128; get the file again" in lines[1]
    assert "is there already" in lines[2]
    lines = said("merge_method: linear\nmodels: [./a, ./gone, ./b]\nsead: 1\n", work, capsys)
    assert [line.partition(":")[0] for line in lines] == [
        "sead", "models[1].model", "W/a/model.safetensors", "W/b/model.safetensors", "out"
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--overwrite",)])
def test_an_output_that_the_disk_has_no_room_for(
    work: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=5000))
    (line,) = said("merge_method: linear\nmodels: [./a, ./b]\n", work, capsys, *arguments)
    assert re.fullmatch(
        r"out: needs [\d.]+ kB, and 5 kB are free at W; free some space, or choose a folder on another disk", line
    )


def test_nothing_but_headers_is_read(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A plan asks for no block of a tensor."""

    def refused(*_: object) -> None:
        raise AssertionError("a plan reads headers alone")

    monkeypatch.setattr("interfuse.checkpoints.places.LocalFile.handle", refused)
    monkeypatch.setattr("interfuse.checkpoints.places.LocalFile.read", refused)
    (work / "r.yaml").write_text("merge_method: ties\nbase_model: ./base\nmodels: [./a, ./b]\n")
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out", "--dry-run"])
    assert ended.value.code in (0, None)
    assert "nothing was written" in capsys.readouterr().out
    monkeypatch.setattr("interfuse.checkpoints.places.LocalFile.handle", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main(["run", "r.yaml", "out"])
    assert ended.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_absent_models_tokenizers_and_sums_of_weights_come_with_the_rest(work: Path, capsys: Capture) -> None:
    """What may be a hub id is asked for though the recipe has faults, and a faulty key hides no other."""
    recipe = """
merge_method: linear
models:
  - {model: ./a, parameters: {weight: 1}}
  - {model: nobody/nothing, parameters: {weight: -1}}
tokenizer_source: unoin
sead: 1
"""
    lines = said(recipe, work, capsys)
    assert lines[:2] == ["sead: unknown key; did you mean 'seed', 'head' or 'heads'?", WEIGHTS]
    assert lines[2].startswith("models[1].model: nobody/nothing: is no file or folder here")
    assert lines[3:] == ["tokenizer_source: got 'unoin'; did you mean 'union'?"]
    sound = recipe.replace("sead: 1\n", "").replace("weight: -1", "weight: 1")
    assert [line.partition(": ")[0] for line in said(sound, work, capsys)] == ["models[1].model", "tokenizer_source"]


WEIGHTS = "weights: 1, -1 sum to 0; change one, or set normalize to false"


def test_a_sum_of_weights_is_known_where_another_option_is_at_fault(work: Path, capsys: Capture) -> None:
    entries = "models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: -1, wieght: 1}}]"
    lines = said(f"merge_method: linear\n{entries}\n", work, capsys)
    assert lines == ["models[1].parameters.wieght: linear has no such option; did you mean 'weight'?", WEIGHTS]
    assert WEIGHTS not in said(f"merge_method: linear\n{entries}\nparameters: {{normalize: false}}\n", work, capsys)


@pytest.mark.parametrize("model", ["./a+nobody/adapter", "./a+./gone"])
def test_an_adapter_that_is_absent_is_named_with_its_place(model: str, work: Path, capsys: Capture) -> None:
    (line,) = said(f"merge_method: linear\nmodels: [./b, {model}]\n", work, capsys)
    assert line.startswith("models[1].model: ")
    assert model.partition("+")[2].removeprefix("./") in line


def test_configs_with_values_of_another_type_are_refused_together(work: Path, capsys: Capture) -> None:
    (work / "a" / "config.json").write_text("[1, 2]")
    text = {"vocab_size": 8.5, "layer_types": 3, "mlp_only_layers": None}
    (work / "b" / "config.json").write_text(
        json.dumps({"num_hidden_layers": "3", "text_config": text, "depth": [1, 2], "num_layers": {"a": 1}})
    )
    assert said("merge_method: linear\nmodels: [./a, ./b, ./base]\n", work, capsys) == [
        "W/a/config.json: holds a list, not a mapping; get the file again",
        "W/b/config.json: num_hidden_layers is '3'; it is a whole number in a sound file",
        "W/b/config.json: text_config.vocab_size is 8.5; it is a whole number in a sound file",
        "W/b/config.json: text_config.layer_types is 3; it is a list in a sound file",
    ]


def test_what_is_wrong_with_options_and_output_is_said_beside_the_recipe(work: Path, capsys: Capture) -> None:
    write(work / "other", {"x": (2,)})
    (work / "out").write_text("")
    recipe = "merge_method: linear\nmodels: [./a, ./other]\nsead: 1\n"
    places = [line.partition(": ")[0] for line in said(recipe, work, capsys, "--device", "tpu")]
    apart = "models[1] (W/other)"
    assert places == ["sead", apart, apart, "device", "out"]
    sound = recipe.replace("sead: 1\n", "")
    places = [line.partition(": ")[0] for line in said(sound, work, capsys, "--device", "tpu")]
    assert places == ["device", apart, apart, "out"]


def test_ranges_that_end_before_they_begin_have_no_length(work: Path, capsys: Capture) -> None:
    sources = "[{model: ./a, layer_range: [3, 2]}, {model: ./b, layer_range: [0, 2]}]"
    assert said(f"merge_method: linear\nslices: [{{sources: {sources}}}]\n", work, capsys) == [
        "slices[0].sources[0].layer_range: got [3, 2]; the first layer and the one after the last"
    ]

"""What stands in a folder beside the weights, and folders in other forms: read, merged, written back where it belongs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from interfuse.checkpoints.folders import find_weights
from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import open_checkpoint, open_folder
from interfuse.engine.merge import merge
from interfuse.errors import CheckpointError
from interfuse.pipeline import run


def state(value: float, names: tuple[str, ...] = ("a", "b")) -> dict[str, np.ndarray]:
    return {name: np.full((2, 3), value + i, np.float32) for i, name in enumerate(names)}


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Files by their path: arrays as safetensors, tensors as torch's own, else JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (str, bytes)):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif name.endswith(".safetensors"):
            save_file(content, path)
        elif name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            torch.save(content, path)
        else:
            path.write_text(json.dumps(content))
    return folder


def as_torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- folders in all forms ---

FORMS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, Any]]] = {
    "one file of another name": lambda s: {"weights.safetensors": s},
    "a variant": lambda s: {"diffusion_pytorch_model.fp16.safetensors": s},
    "a variant beside it": lambda s: {"model.safetensors": s, "model.fp16.safetensors": state(99)},
    "the same in torch's form beside it": lambda s: {"model.safetensors": s, "pytorch_model.bin": as_torch(state(99))},
    "consolidated": lambda s: {"consolidated.00.pt": as_torch(s)},
    "consolidated beside shards": lambda s: {
        "model-00001-of-00001.safetensors": s,
        "model.safetensors.index.json": {"weight_map": dict.fromkeys(s, "model-00001-of-00001.safetensors")},
        "consolidated.safetensors": state(99),
    },
    "shards without an index": lambda s: {
        f"model-{i + 1:05d}-of-00002.safetensors": {name: s[name]} for i, name in enumerate(s)
    },
    "torch's shards without an index": lambda s: {
        f"consolidated.{i:02d}.pth": as_torch({name: s[name]}) for i, name in enumerate(s)
    },
    "ckpt": lambda s: {"last.ckpt": {"epoch": 3, "state_dict": as_torch(s), "optimizer_states": []}},
    "nested under model": lambda s: {"best.pt": {"model": as_torch(s), "step": 3}},
    "beside a trainer's files": lambda s: {"pytorch_model.bin": as_torch(s), "training_args.bin": {}, "optimizer.pt": {}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_without_a_config_merges_in_any_form(form: str, tmp_path: Path) -> None:
    folders = [put(tmp_path / name, FORMS[form](state(value))) for name, value in (("x", 1.0), ("y", 3.0))]
    out = merge("linear", folders, out=tmp_path / "out")
    (file,) = out.glob("*.safetensors")
    wanted = "diffusion_pytorch_model.fp16.safetensors" if form == "a variant" else "model.safetensors"
    assert file.name == wanted
    got = load_file(file)
    assert {name: array.tolist() for name, array in got.items()} == {n: a.tolist() for n, a in state(2).items()}
    assert "config.json" not in os.listdir(out)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model-00001-of-00003.safetensors": state(1), "model-00003-of-00003.safetensors": state(1)}, "has 2 of 3 shards"),
        ({"consolidated.00.pth": as_torch(state(1)), "consolidated.01.pth": as_torch(state(2))}, "'a' is in"),
        ({"epoch-10.pt": as_torch(state(1)), "epoch-20.pt": as_torch(state(2))}, "2 files of weights, none named model"),
        ({"a.safetensors": state(1), "b.safetensors": state(2)}, "2 files of weights, none named model: a.safetensors"),
        ({"sub/config.json": {}, "sub/model.safetensors": state(1)}, "no file of weights"),
        ({"model_index.json": [], "unet/model.safetensors": state(1)}, "isn't a list of a model's parts"),
    ],
)
def test_a_folder_that_isn_t_clear_is_an_error(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(put(tmp_path, files))


def test_a_folder_of_models_says_which_sub_folders_are_some(tmp_path: Path) -> None:
    put(tmp_path, {"unet/config.json": {}, "unet/diffusion_pytorch_model.safetensors": state(1), "notes.txt": "x"})
    with pytest.raises(CheckpointError, match="no file of weights; name the file itself, or the sub-folder: unet"):
        open_checkpoint(tmp_path)
    assert list(open_checkpoint(tmp_path / "unet").specs) == ["a", "b"]


# --- pipelines ---


def pipeline(folder: Path, value: float, **more: Any) -> Path:
    parts = {"unet": ["diffusers", "UNet2DModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    index = {"_class_name": "P", **parts, "scheduler": ["diffusers", "DDIM"], "safety_checker": [None, None]}
    files = {
        "model_index.json": index,
        "unet/config.json": {"_class_name": "UNet2DModel"},
        "unet/diffusion_pytorch_model.safetensors": state(value, ("conv.weight", "down_blocks.0.weight")),
        "unet/diffusion_pytorch_model.fp16.safetensors": state(99),
        "text_encoder/config.json": {"model_type": "clip_text_model", "torch_dtype": "float32"},
        "text_encoder/model-00001-of-00002.safetensors": {"conv.weight": np.full(4, value, np.float32)},
        "text_encoder/model-00002-of-00002.safetensors": {"z": np.full(4, value, np.float32)},
        "text_encoder/model.safetensors.index.json": {
            "weight_map": {"conv.weight": "model-00001-of-00002.safetensors", "z": "model-00002-of-00002.safetensors"}
        },
        "scheduler/scheduler_config.json": {"steps": 3},
        "tokenizer/vocab.json": {"a": 0},
        "v1-pruned.ckpt": as_torch(state(99)),
    }
    return put(folder, files | more)


def test_pipelines_are_merged_part_by_part_and_written_back(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name, value) for name, value in (("x", 1.0), ("y", 3.0))]
    assert list(open_checkpoint(folders[0]).specs) == [
        "unet/conv.weight", "unet/down_blocks.0.weight", "text_encoder/conv.weight", "text_encoder/z",
    ]  # fmt: skip
    out = merge("linear", folders, out=tmp_path / "out", dtype="float16")
    assert tree(out) == [
        "README.md", "interfuse.json", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: array.tolist() for name, array in unet.items()} == {
        name: array.tolist() for name, array in state(2, ("conv.weight", "down_blocks.0.weight")).items()
    }
    encoder = load_file(out / "text_encoder" / "model.safetensors")
    assert {name: set(array.tolist()) for name, array in encoder.items()} == {"conv.weight": {2.0}, "z": {2.0}}
    assert json.loads((out / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    assert json.loads((out / "unet" / "config.json").read_text()) == {"_class_name": "UNet2DModel"}
    assert open_checkpoint(out).hash() == json.loads((out / "interfuse.json").read_text())["output"]


def test_filters_tell_parts_apart(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name, value) for name, value in (("x", 1.0), ("y", 3.0))]
    only_unet = [{"filter": "unet/", "value": 1}, {"value": 0}]
    models = [{"model": str(folders[0]), "parameters": {"weight": 1}}]
    models += [{"model": str(folders[1]), "parameters": {"weight": only_unet}}]
    run({"merge_method": "linear", "models": models}, tmp_path / "out", progress=False)
    got = open_checkpoint(tmp_path / "out")
    assert (float(got.read("unet/conv.weight").flat[0]), float(got.read("text_encoder/conv.weight").flat[0])) == (2.0, 1.0)


def test_parts_must_match(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name, value) for name, value in (("x", 1.0), ("y", 3.0))]
    (folders[1] / "text_encoder" / "model.safetensors.index.json").unlink()
    (folders[1] / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has 1 of 2 shards"):
        merge("linear", folders, out=tmp_path / "out")
    other = pipeline(tmp_path / "z", 3.0, **{"unet/diffusion_pytorch_model.safetensors": state(1, ("conv.weight",))})
    with pytest.raises(CheckpointError, match=r"unet/down_blocks\.0\.weight"):
        merge("linear", [folders[0], other], out=tmp_path / "out")


def test_one_sub_folder_of_a_pipeline_merges_alone(tmp_path: Path) -> None:
    folders = [pipeline(tmp_path / name, value) for name, value in (("x", 1.0), ("y", 3.0))]
    out = merge("linear", [folder / "unet" for folder in folders], out=tmp_path / "out")
    assert tree(out) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "interfuse.json"]


def test_an_adversary_s_list_leads_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "secret", {"model.safetensors": state(1)})
    put(tmp_path / "x", {"model_index.json": {"../secret": ["a", "b"]}, "model.safetensors": state(2)})
    assert list(open_checkpoint(tmp_path / "x").specs) == ["a", "b"]


# --- sentence-transformers ---


def sentences(folder: Path, value: float) -> Path:
    modules = [{"idx": i, "path": path, "type": "x"} for i, path in enumerate(["", "1_Pooling", "2_Dense", "3_Normalize"])]
    return put(
        folder,
        {
            "modules.json": modules,
            "config.json": {"model_type": "bert"},
            "model.safetensors": state(value, ("encoder.layer.0.weight", "embeddings.weight")),
            "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
            "2_Dense/config.json": {"in_features": 3},
            "2_Dense/model.safetensors": {"linear.weight": np.full((2, 3), value, np.float32)},
            "config_sentence_transformers.json": {},
        },
    )


def test_a_stack_of_modules_is_merged_with_its_dense_layers(tmp_path: Path) -> None:
    folders = [sentences(tmp_path / name, value) for name, value in (("x", 1.0), ("y", 3.0))]
    out = merge("linear", folders, out=tmp_path / "out")
    assert tree(out) == sorted([*tree(folders[0]), "README.md", "interfuse.json"])
    assert load_file(out / "2_Dense" / "model.safetensors")["linear.weight"].tolist() == [[2.0] * 3] * 2
    assert set(load_file(out / "model.safetensors")) == {"encoder.layer.0.weight", "embeddings.weight"}


# --- what comes along ---


def test_side_files_come_along_and_what_speaks_of_the_parent_alone_doesn_t(tmp_path: Path) -> None:
    files = {
        "model.safetensors": state(1),
        "config.json": {"model_type": "x"},
        "generation_config.json": {"max_length": 5},
        "tokenizer.json": {},
        "tokenizer_config.json": {},
        "special_tokens_map.json": {},
        "vocab.txt": "a\nb\n",
        "spiece.model": b"\x00\x01",
        "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": {"size": 3},
        "processor_config.json": {},
        "modeling_x.py": "x = 1\n",
        "assets/words.txt": "w",
        "onnx/model.onnx": b"onnx",
        "tf_model.h5": b"h5",
        "model.gguf": b"gguf",
        "pytorch_model.bin": as_torch(state(9)),
        "rng_state.pth": as_torch(state(9)),
        "README.md": "# the parent\n",
        ".git/HEAD": "x",
        "__pycache__/x.pyc": b"x",
        "checkpoint-5/model.safetensors": state(7),
    }
    x, y = put(tmp_path / "x", files), put(tmp_path / "y", {"model.safetensors": state(3), "other.json": {}})
    out = merge("linear", [x, y], out=tmp_path / "out")
    left = ("onnx/", "tf_model", "model.gguf", "pytorch_model", "rng_state", ".git", "__pycache__", "checkpoint-5")
    assert tree(out) == sorted([*(name for name in files if not name.startswith(left)), "interfuse.json"])
    assert (out / "spiece.model").read_bytes() == b"\x00\x01"
    assert (out / "modeling_x.py").read_text() == "x = 1\n"
    assert "# the parent" not in (out / "README.md").read_text()
    assert json.loads((out / "interfuse.json").read_text())["left_out"] == [
        *("checkpoint-5", "model.gguf", "onnx/model.onnx", "tf_model.h5")
    ]


def test_a_layer_list_in_the_config_follows_a_stack(tmp_path: Path) -> None:
    names = tuple(f"layers.{i}.w" for i in range(4))
    config = {"num_hidden_layers": 4, "layer_types": ["full", "sliding", "full", "sliding"], "no_rope_layers": [1, 1, 1, 0]}
    put(tmp_path / "x", {"model.safetensors": state(1, names), "config.json": config})
    slices = [{"sources": [{"model": str(tmp_path / "x"), "layer_range": span}]} for span in ([0, 2], [1, 2], [3, 4])]
    run({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", progress=False)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made == {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "sliding", "sliding"],
        "no_rope_layers": [1, 1, 1, 0],
        "torch_dtype": "float32",
    }


# --- writing ---


def test_shards_of_sub_folders_have_their_own_index(tmp_path: Path) -> None:
    tensors = {f"{inner}{name}": array for inner in ("", "unet/") for name, array in state(1).items()}
    specs = {name: TensorSpec("F32", array.shape) for name, array in tensors.items()}
    stems = {"": "model", "unet/": "unet/diffusion_pytorch_model"}
    with ShardWriter(tmp_path, specs, 24, stems=stems) as writer:
        for name, array in tensors.items():
            writer.write(name, 0, array)
    assert tree(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"]["b"] == "diffusion_pytorch_model-00002-of-00002.safetensors"
    there = open_folder(tmp_path, stems=stems)
    assert {name: there.read(name).tolist() for name in there.specs} == {n: a.tolist() for n, a in tensors.items()}


def test_files_are_told_from_their_names_alone() -> None:
    names = ["a/model.safetensors", "model.safetensors", "b/x.safetensors", "modules.json"]
    listed = json.dumps([{"path": ""}, {"path": "a"}])
    found = find_weights("F", names, lambda name: listed)
    assert [(w.inner, w.stem, w.files) for w in found] == [
        ("", "model", ("model.safetensors",)),
        ("a/", "a/model", ("a/model.safetensors",)),
    ]


def test_links_out_of_a_models_folder_bring_nothing_along(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret", {"key.json": {"a": 1}})
    for name in ("one", "two"):
        put(tmp_path / name, {"model.safetensors": state(1), "sub/inner.json": {}})
    one = tmp_path / "one"
    (one / "linked").symlink_to(secret)
    (one / "same").symlink_to(one / "sub")
    (one / "file.json").symlink_to(secret / "key.json")
    (one / "sub" / "deep.json").symlink_to(secret / "key.json")
    (one / "again.json").symlink_to(Path("sub") / "inner.json")
    (one / "endless.json").symlink_to("endless.json")
    out = merge("linear", [one, tmp_path / "two"], out=tmp_path / "out")
    assert tree(out) == [
        "README.md", "again.json", "interfuse.json", "model.safetensors", "same/inner.json", "sub/inner.json"
    ]  # fmt: skip
    record = json.loads((out / "interfuse.json").read_text())
    assert record["left_out"] == ["endless.json", "file.json", "linked", "same/deep.json", "sub/deep.json"]
    assert f"file.json is a link out of {one}, and was left out" in record["notes"]


def test_links_to_weights_and_configs_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    put(tmp_path / "kept", {"a.bin": b"", "model.safetensors": state(1), "config.json": {"model_type": "x"}})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "config.json"):
            (tmp_path / name / file).symlink_to(tmp_path / "kept" / file)
    out = merge("linear", [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    assert tree(out) == ["README.md", "config.json", "interfuse.json", "model.safetensors"]
    assert not (out / "config.json").is_symlink()
    assert load_file(out / "model.safetensors")["a"].tolist() == state(1)["a"].tolist()


def test_all_of_a_hub_caches_links_are_followed(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "model.safetensors": state(1),
        "config.json": {},
        "tokenizer.json": {},
        "1_Pooling/config.json": {},
    }
    models = []
    for name in ("models--org--one", "models--org--two"):
        put(tmp_path / name / "blobs", {file.replace("/", "-"): content for file, content in files.items()})
        snapshot = tmp_path / name / "snapshots" / "0f"
        for file in files:
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).symlink_to(tmp_path / name / "blobs" / file.replace("/", "-"))
        models.append(snapshot)
    (models[0] / "stolen.json").symlink_to(tmp_path / "models--org--two" / "blobs" / "config.json")
    out = merge("linear", models, out=tmp_path / "out")
    assert tree(out) == sorted([*files, "README.md", "interfuse.json"])
    assert json.loads((out / "interfuse.json").read_text())["left_out"] == ["stolen.json"]


def test_a_sub_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        put(tmp_path / name, {"model.safetensors": state(1), "sub/inner.json": {}})
    listed = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("one/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="one/sub"):
        merge("linear", [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

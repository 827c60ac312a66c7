"""Model cards: what hubs read in their first lines, and what people read below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from interfuse.checkpoints.source import open_checkpoint
from interfuse.engine.merge import merge
from interfuse.engine.output.card import Made, use_of, write_card
from interfuse.pipeline import run


def model(folder: Path, value: float, license: str | None = "license: mit", config: Any = None) -> Path:
    folder.mkdir(parents=True)
    save_file({"t": np.full(4, value, np.float32)}, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    if license is not None:
        (folder / "README.md").write_text(f"---\n{license}\nlanguage: en\n---\n# A model\n")
    return folder


def header(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text[4:].partition("\n---\n")[0])
    return found


def test_a_merge_of_paths_and_a_run_write_the_same_card(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 3)
    out = merge("task_arithmetic", [b], base=a, out=tmp_path / "out", lambda_=0.5)
    assert header(out) == {"library_name": "transformers", "license": "mit", "tags": ["merge", "interfuse"]}
    card = (out / "README.md").read_text()
    assert "# Task_arithmetic merge of b\n" in card
    assert f"- base: `{a}`\n- `{b}`" in card
    assert 'model = LlamaForCausalLM.from_pretrained("this-folder")' in card
    assert "- https://arxiv.org/abs/2212.04089" in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    record = run(recipe, tmp_path / "again", progress=False)
    assert record.out is not None
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert open_checkpoint(tmp_path / "again").hash() == open_checkpoint(out).hash()


@pytest.mark.parametrize(
    ("licenses", "said"),
    [
        (("license: mit", "license: apache-2.0"), {}),
        (("license: mit", None), {}),
        (("license: other\nlicense_name: x", "license: other\nlicense_name: y"), {}),
        (("license: other\nlicense_name: x",) * 2, {"license": "other", "license_name": "x"}),
        (("license: [", "license: ["), {}),
    ],
)
def test_a_licence_is_said_only_if_all_models_have_it(licenses: tuple[str | None, ...], said: Any, tmp_path: Path) -> None:
    models = [model(tmp_path / str(i), i, text) for i, text in enumerate(licenses)]
    found = header(merge("linear", models, out=tmp_path / "out"))
    assert {key: value for key, value in found.items() if key.startswith("license")} == said


def test_base_models_are_those_with_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "model").mkdir(parents=True)
    names = ["org/a", "org/b@v1+org/lora@main", "local/model", "/abs/path", "https://x.org/a", "python:m:f", "org/a"]
    write_card(tmp_path, "a title", [Made("", name) for name in names], "x: 1\n")
    assert header(tmp_path)["base_model"] == ["org/a", "org/b", "org/lora"]
    assert header(tmp_path)["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("files", "library", "code"),
    [
        ({"model_index.json": {}}, "diffusers", "DiffusionPipeline.from_pretrained"),
        ({"modules.json": [], "config.json": {"model_type": "bert"}}, "sentence-transformers", "SentenceTransformer("),
        ({"config.json": {"_class_name": "UNet2DModel"}}, "diffusers", "UNet2DModel.from_pretrained"),
        ({"config.json": {"model_type": "bert"}}, "transformers", "AutoModel.from_pretrained"),
        ({"config.json": {"model_type": "x", "auto_map": {}}}, "transformers", "trust_remote_code=True"),
        ({"config.json": {"name": 1}}, "", 'load_file("this-folder/model.safetensors")'),
        ({}, "", "load_file"),
    ],
)
def test_the_library_is_told_by_what_is_there(files: dict[str, Any], library: str, code: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    use = use_of(tmp_path)
    assert use.library == library
    assert code in use.code

"""Plans as they are printed, to the letter: what `--dry-run` shows and its JSON, for recipes on tiny models made here.

After a change that is meant: `pytest tests/golden --update-golden`, and look at what git says has changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.pipeline import run
from interfuse.report.plan import text

HERE = {
    "work": {"threads": 2, "seconds": 3.2, "memory": 90_000_000},
    "disk": {"out": "OUT", "needs": 2_200_000_000, "free": 55_000_000_000, "place": "WORK"},
}


def language(layers: int, dtype: str = "BF16") -> dict[str, TensorSpec]:
    """A small language model's header, with a buffer of integers."""
    wide, narrow = (16, 8), (8, 8)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 8)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{part}_proj.weight": narrow for part in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.up_proj.weight": wide, f"model.layers.{i}.mlp.down_proj.weight": wide[::-1]}
        shapes |= {f"model.layers.{i}.input_layernorm.weight": (8,)}
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()} | {"position_ids": TensorSpec("I64", (1, 16))}


def vision() -> dict[str, TensorSpec]:
    tower = {f"visual.blocks.{i}.attn.qkv.weight": TensorSpec("BF16", (24, 8)) for i in range(3)}
    return {"visual.patch_embed.proj.weight": TensorSpec("BF16", (8, 3, 2, 2)), **tower, **language(2)}


def write(folder: Path, specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None) -> None:
    """A model's folder whose data is a hole: nothing may read it."""
    folder.mkdir()
    head, _ = encode_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def without(specs: Mapping[str, TensorSpec], *names: str) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if name not in names}


def adapter(folder: Path, layers: Iterable[int]) -> None:
    """An adapter as peft writes it, for the query projections of these layers."""
    head = "base_model.model.model.layers"
    shapes = {f"{head}.{i}.self_attn.q_proj.lora_A.weight": (4, 8) for i in layers}
    shapes |= {f"{head}.{i}.self_attn.q_proj.lora_B.weight": (8, 4) for i in layers}
    write(folder, {name: TensorSpec("F32", shape) for name, shape in shapes.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))


CASES = {
    "linear": """
        merge_method: linear
        models:
          - {model: ./a, parameters: {weight: 0.75}}
          - {model: ./untied, parameters: {weight: 0.25}}
        drop: [position_ids]
        keep: [norm.weight]
        dtype: float32
    """,
    "ties": """
        merge_method: ties
        base_model: ./base
        models:
          - model: ./a
            parameters: {weight: 1, density: [1, 0.7, 0.1]}
          - model: ./b
            parameters: {weight: [{filter: mlp, value: [0, 1, 0]}, {value: 0.5}], density: 0.5}
        parameters: {lambda: 0.9}
        seed: 7
    """,
    "slices": """
        merge_method: passthrough
        slices:
          - sources: [{model: ./a, layer_range: [0, 3]}]
          - sources: [{model: ./b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}]
    """,
    "modules": """
        merge_method: task_arithmetic
        base_model: ./seen
        modules:
          text_decoder: {models: [{model: ./seen2, parameters: {weight: 0.5}}]}
        parameters: {lambda: 0.8}
    """,
    "lora": """
        merge_method: linear
        models: [./a+./adapter, ./b]
    """,
    "chain": """
        name: soup
        merge_method: linear
        models: [./a, ./b]
        ---
        merge_method: nuslerp
        models:
          - {model: soup, parameters: {weight: 1}}
          - {model: ./base, parameters: {weight: 3}}
    """,
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the recipes name."""
    config = {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": True}
    for name in ("base", "a", "b"):
        write(tmp_path / name, without(language(4), "lm_head.weight"), config)
    write(tmp_path / "untied", language(4), config)
    write(tmp_path / "seen", vision())
    write(tmp_path / "seen2", vision())
    adapter(tmp_path / "adapter", range(1, 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(case: str, work: Path) -> Any:
    """A recipe's plan as data, wherever the models lie."""
    documents = CASES[case].replace("\n        ", "\n")
    (work / "recipe.yaml").write_text(documents)
    plan = run(work / "recipe.yaml", work / "out", dry_run=True).plan
    return json.loads(json.dumps(plan).replace(str(work), "WORK"))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_printed_as_it_was(case: str, work: Path, request: pytest.FixtureRequest) -> None:
    plan = planned(case, work)
    shown = {"txt": text(plan, HERE) + "\n", "json": json.dumps(plan, indent=1) + "\n"}
    for ending, found in shown.items():
        path = Path(__file__).with_name(f"{case}.{ending}")
        if request.config.getoption("--update-golden"):
            path.write_text(found, encoding="utf-8")
        assert found == path.read_text(encoding="utf-8"), "refresh it with --update-golden if this is meant"


def test_a_plan_is_the_same_in_another_process_and_for_other_hashes(work: Path) -> None:
    (work / "recipe.yaml").write_text(CASES["ties"].replace("\n        ", "\n"))
    command = [
        sys.executable,
        "-c",
        "from interfuse.cli import main; main()",
        "run",
        "recipe.yaml",
        "out",
        "--dry-run",
        "--json",
    ]
    found = []
    for seed in ("1", "2"):
        done = subprocess.run(command, cwd=work, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        document = json.loads(done.stdout)
        found.append(json.dumps(document["plan"]))
        assert list(document["here"]) == ["work", "disk"]
        assert document["out"] is None
    assert found[0] == found[1]
    assert not (work / "out").exists()

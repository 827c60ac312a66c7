"""A merge runs no code that lies in a model's folder, whether code is trusted or not: it only comes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interfuse import run

WIDTH = 4
CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
"""


def model(folder: Path, marker: Path, seed: int, *, mapped: bool) -> str:
    """A small Llama whose folder has code that leaves a mark when it's imported, and a config that asks for it or not."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (8, WIDTH), "model.norm": (WIDTH,), "lm_head": (8, WIDTH)}
    for i in range(2):
        inner = f"model.layers.{i}"
        shapes |= {f"{inner}.self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{inner}.mlp.{part}_proj": (WIDTH, WIDTH) for part in ("gate", "up", "down")}
        shapes |= {f"{inner}.{part}_layernorm": (WIDTH,) for part in ("input", "post_attention")}
    folder.mkdir()
    save_file(
        {f"{n}.weight": draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, folder / "model.safetensors"
    )
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
    config |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 1, "num_hidden_layers": 2}
    classes = {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    config |= {"auto_map": classes} if mapped else {}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["modeling_mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("modeling_mine.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    return str(folder)


@pytest.mark.parametrize("trust_code", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_code_in_a_models_folder_never_runs_in_a_merge(
    mapped: bool, trust_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proofs: None
) -> None:
    marker = tmp_path / "marker"
    models = [model(tmp_path / name, marker, i, mapped=mapped) for i, name in enumerate("ab")]
    monkeypatch.chdir(models[0])
    run({"merge_method": "linear", "models": models}, tmp_path / "whole", trust_code=trust_code, progress=False)
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in models]
    out = tmp_path / "stacked"
    run({"merge_method": "passthrough", "slices": slices}, out, trust_code=trust_code, progress=False)
    assert not marker.exists()
    assert (out / "modeling_mine.py").read_text() == CODE.format(marker=str(marker))
    said = json.loads((out / "interfuse.json").read_text())["loads"]
    assert said.startswith("not checked: its code is in its folder" if mapped else "by transformers")
    exec((out / "modeling_mine.py").read_text())  # the mark would have been seen
    assert marker.exists()

"""`verify`: what was changed is found and named, what wasn't isn't; a second run gives the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import interfuse
from interfuse.checkpoints.shards import ShardWriter
from interfuse.cli import main
from interfuse.errors import CheckpointError
from interfuse.pipeline import Verification

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out, err


def model(folder: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"layers.{i}.{part}.weight" for i in range(2) for part in ("q", "up")]
    tensors = {name: random.normal(size=(6, 4)).astype(np.float32) for name in names}
    folder.mkdir()
    save_file({**tensors, "norm.weight": random.normal(size=4).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 2}))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models, and a TIES merge of two of them onto the third in `out`."""
    for seed, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    interfuse.run({"merge_method": "ties", "base_model": "base", "models": ["a", "b"], "parameters": {"density": 0.5}}, "out")
    return tmp_path


def wrong(found: Verification) -> list[tuple[str, str]]:
    return [
        (check.what, Path(check.name).name if check.what == "inputs" else check.name)
        for check in found.checks
        if not check.good
    ]


def flip(path: Path, tensor: str) -> None:
    """Change one bit in the middle of a tensor."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"]
    raw[8 + length + (start + stop) // 8 * 4 + 2] ^= 0x40  # not a last digit, which a sum may round away
    path.write_bytes(raw)


def test_an_untouched_folder_is_well(capsys: Capture, work: Path) -> None:
    code, out, err = call(capsys, "verify", "out", "--again")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "tensors  5 of 5 the same",
        "files    1 of 1 the same",
        "recipe   2 of 2 the same",
        "inputs   3 of 3 the same",
        "again    5 of 5 the same",
        "out: all is well",
    ]
    assert sorted(item.name for item in work.iterdir()) == ["a", "b", "base", "out"]


def test_one_flipped_bit_names_its_tensor(capsys: Capture, work: Path) -> None:
    flip(work / "out" / "model.safetensors", "layers.1.up.weight")
    code, out, err = call(capsys, "verify", "out", "--json")
    document = json.loads(out)
    assert (code, err, document["good"]) == (1, "", False)
    assert [c["name"] for c in document["checks"] if not c["good"]] == ["layers.1.up.weight"]
    code, out, _ = call(capsys, "verify", "out")
    assert "  layers.1.up.weight: its values aren't those that were written\n" in out
    assert out.endswith("out: 1 thing differs\n")
    assert wrong(interfuse.verify("out", again=True)) == [("tensors", "layers.1.up.weight"), ("again", "layers.1.up.weight")]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight", "is missing"),
        (lambda t: t.update(more=np.zeros(2, np.float32)), "more", "wasn't written"),
        (
            lambda t: t.update({"norm.weight": t["norm.weight"].astype(np.float16)}),
            "norm.weight",
            "is F16[4], and was written as F32[4]",
        ),
        (
            lambda t: t.update({"norm.weight": t["norm.weight"].reshape(2, 2)}),
            "norm.weight",
            "is F32[2, 2], and was written as F32[4]",
        ),
    ],
)
def test_tensors_that_come_or_go_or_change_their_form(
    work: Path, change: Callable[[dict[str, Any]], Any], name: str, said: str
) -> None:
    rewrite(work / "out" / "model.safetensors", change)
    found = [check for check in interfuse.verify("out").checks if not check.good]
    assert [(check.what, check.name, check.said) for check in found] == [("tensors", name, said)]


def test_a_changed_input_is_named(work: Path) -> None:
    flip(work / "b" / "model.safetensors", "norm.weight")
    assert wrong(interfuse.verify("out")) == [("inputs", "b")]
    found = interfuse.verify("out", again=True)
    assert wrong(found)[0] == ("inputs", "b")
    assert ("again", "norm.weight") in wrong(found)


def test_inputs_that_are_gone_are_told_and_the_others_looked_at(capsys: Capture, work: Path) -> None:
    shutil.rmtree(work / "b")
    found = interfuse.verify("out")
    assert found.good
    assert [(Path(c.name).name, c.good) for c in found.checks if c.what == "inputs"] == [
        ("b", None),
        ("base", True),
        ("a", True),
    ]
    assert "1 not to be told" in call(capsys, "verify", "out")[1]
    flip(work / "a" / "model.safetensors", "norm.weight")
    assert wrong(interfuse.verify("out")) == [("inputs", "b"), ("inputs", "a")]
    assert call(capsys, "verify", "out", "--again")[0] == 1


def test_another_shape_of_an_input_is_found(work: Path) -> None:
    rewrite(work / "b" / "model.safetensors", lambda t: t.update({"norm.weight": np.zeros(5, np.float32)}))
    found = [check for check in interfuse.verify("out").checks if not check.good]
    assert [check.what for check in found] == ["recipe"]
    assert "tensor 'norm.weight' is F32[5]" in found[0].said


def test_a_changed_recipe_is_found(work: Path) -> None:
    path = work / "out" / "interfuse.json"
    record = json.loads(path.read_text())
    record["recipes"][0]["parameters"]["density"] = 0.75
    path.write_text(json.dumps(record))
    found = interfuse.verify("out", again=True)
    assert wrong(found)[:2] == [("recipe", "recipe.yaml"), ("recipe", "interfuse.json")]
    assert any(check.what == "again" and not check.good for check in found.checks)
    assert all(check.good for check in found.checks if check.what == "tensors")
    record["recipes"] = [{"merge_methode": "ties"}]
    path.write_text(json.dumps(record))
    assert wrong(interfuse.verify("out")) == [("recipe", "interfuse.json")]


def test_a_changed_recipe_file_and_config_are_found(work: Path) -> None:
    path = work / "out" / "recipe.yaml"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    (work / "out" / "config.json").write_text("{}")
    (work / "out" / "README.md").write_text("my own words")
    assert wrong(interfuse.verify("out")) == [("files", "config.json"), ("recipe", "recipe.yaml")]


def test_a_missing_shard_is_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ShardWriter.__init__
    monkeypatch.setattr(ShardWriter, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "shard": 200}))
    interfuse.run({"merge_method": "linear", "models": ["a", "b"]}, "shards")
    assert interfuse.verify("shards", again=True).good
    shard = sorted((work / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    found = [check for check in interfuse.verify("shards").checks if not check.good]
    assert [(check.what, shard.name in check.said) for check in found] == [("tensors", True)]
    (work / "shards" / "model.safetensors.index.json").unlink()
    assert not interfuse.verify("shards").good


def test_merges_that_were_resumed_are_well(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from interfuse.engine.output.journal import Journal

    note, seen = Journal.note, []

    def stop(self: Journal, *arguments: Any) -> None:
        note(self, *arguments)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    recipe = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": ["a", "b"],
        "parameters": {"density": 0.5},
        "seed": 4,
    }
    monkeypatch.setattr(Journal, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        interfuse.run(recipe, "resumed", threads=1)
    monkeypatch.undo()
    monkeypatch.chdir(work)
    interfuse.run(recipe, "resumed", resume=True)
    assert interfuse.verify("resumed", again=True, threads=1).good


def test_recipes_of_several_documents(work: Path) -> None:
    first = {"name": "first", "merge_method": "linear", "models": ["a", "b"]}
    (work / "r.yaml").write_text(
        yaml.safe_dump_all(
            [first, {"merge_method": "slerp", "base_model": "base", "models": ["first"], "parameters": {"t": 0.3}}]
        )
    )
    interfuse.run("r.yaml", "chain")
    assert interfuse.verify("chain", again=True).good
    flip(work / "b" / "model.safetensors", "layers.0.q.weight")
    found = [check for check in interfuse.verify("chain").checks if not check.good]
    assert [(check.what, check.name) for check in found] == [("inputs", "first")]
    assert found[0].said.startswith("made of ")
    shutil.rmtree(work / "b")
    assert wrong(interfuse.verify("chain")) == [("inputs", "b"), ("inputs", "first")]


def adapter(folder: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = {"A": (2, 4), "B": (6, 2)}
    folder.mkdir()
    tensors = {
        f"base_model.model.layers.0.q.lora_{part}.weight": random.normal(size=shape).astype(np.float32)
        for part, shape in names.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_models_with_adapters(work: Path) -> None:
    adapter(work / "lora", 7)
    interfuse.run({"merge_method": "linear", "models": ["a+lora", "b"]}, "with")
    assert interfuse.verify("with", again=True).good
    flip(work / "lora" / "adapter_model.safetensors", "base_model.model.layers.0.q.lora_B.weight")
    assert wrong(interfuse.verify("with")) == [("inputs", "lora")]
    shutil.rmtree(work / "lora")
    assert wrong(interfuse.verify("with")) == [("inputs", "lora")]


def test_folders_that_merge_wrote(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interfuse.merge("linear", ["a", "b"], out="api", weights=[1, 3])
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    found = interfuse.verify("../api", again=True)
    assert found.good
    assert [check.good for check in found.checks if check.what == "inputs"] == [True, True]


def test_what_mergekit_compat_and_nonfinite_values_were_allowed_for_counts(work: Path) -> None:
    ramp = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": [0, 1]}}, {"model": "b", "parameters": {"weight": 1}}],
    }
    rewrite(work / "a" / "model.safetensors", lambda t: t["norm.weight"].__setitem__(0, np.nan))
    interfuse.run(ramp, "theirs", mergekit_compat=True, allow_nonfinite=True)
    interfuse.run(ramp, "ours", allow_nonfinite=True)
    theirs, ours = (load_file(work / name / "model.safetensors")["norm.weight"] for name in ("theirs", "ours"))
    assert theirs[1] != ours[1]
    assert interfuse.verify("theirs", again=True).good


def test_extracted_and_merged_adapters(work: Path) -> None:
    interfuse.extract_lora("a", "base", "one", rank=2, dtype="bfloat16")
    interfuse.extract_lora("b", "base", "two", rank=1, include=["*.q.*"], alpha=3)
    assert interfuse.verify("one", again=True).good
    assert interfuse.verify("two", again=True).good
    flip(work / "one" / "adapter_model.safetensors", "base_model.model.layers.1.q.lora_A.weight")
    assert wrong(interfuse.verify("one")) == [("tensors", "base_model.model.layers.1.q.lora_A.weight")]
    flip(work / "a" / "model.safetensors", "layers.0.q.weight")
    assert ("inputs", "a") in wrong(interfuse.verify("one"))
    adapter(work / "x", 8)
    adapter(work / "y", 9)
    from interfuse.engine.adapters.merging import merge_adapters

    merge_adapters("knots", ["x", "y"], "both", weights=[1, 2], density=0.5, seed=3)
    assert interfuse.verify("both", again=True).good
    flip(work / "y" / "adapter_model.safetensors", "base_model.model.layers.0.q.lora_A.weight")
    assert ("inputs", "y") in wrong(interfuse.verify("both"))


def test_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}
    config |= {"intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 10, "num_key_value_heads": 2}
    head = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {f"{head}self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {
        f"{head}mlp.gate_proj.weight": (12, 8),
        f"{head}mlp.up_proj.weight": (12, 8),
        f"{head}mlp.down_proj.weight": (8, 12),
    }
    shapes |= {f"{head}input_layernorm.weight": (8,), f"{head}post_attention_layernorm.weight": (8,)}
    shapes |= {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    experts: list[dict[str, Any]] = [{"source_model": "a", "noise_scale": 0.1}, {"source_model": "b", "residual_scale": 0.5}]
    interfuse.moe({"base_model": "base", "experts": experts, "gate_mode": "random"}, "out", seed=3)
    assert interfuse.verify("out", again=True).good
    flip(tmp_path / "out" / "model.safetensors", f"{head}block_sparse_moe.gate.weight")
    flip(tmp_path / "b" / "model.safetensors", f"{head}mlp.up_proj.weight")
    assert wrong(interfuse.verify("out")) == [("tensors", f"{head}block_sparse_moe.gate.weight"), ("inputs", "b")]
    path = tmp_path / "out" / "interfuse.json"
    record = json.loads(path.read_text())
    record["recipes"][0]["seed"] = 4
    path.write_text(json.dumps(record))
    assert ("recipe", "recipe.yaml") in wrong(interfuse.verify("out"))


def test_folders_that_have_no_such_record(capsys: Capture, work: Path) -> None:
    code, out, err = call(capsys, "verify", "gone")
    assert (code, out, err) == (2, "", "gone: no such folder; give a folder that interfuse wrote\n")
    with pytest.raises(CheckpointError, match=r"a: has no interfuse.json"):
        interfuse.verify("a")
    path = work / "out" / "interfuse.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({"kind": "fusion"}))
    with pytest.raises(CheckpointError, match="holds a fusion; what can be verified: merge, mixture"):
        interfuse.verify("out")
    record.pop("tensors")
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="has no tensors"):
        interfuse.verify("out")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="can't be read"):
        interfuse.verify("out")

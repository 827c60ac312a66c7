"""`interfuse extract-lora`: an adapter that peft loads, a report of what it keeps, and mistakes told in time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import interfuse
from interfuse.cli import main

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out, err


@pytest.fixture
def _quiet() -> Iterator[None]:
    """peft's and transformers' own warnings aren't what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and a fine-tune: `a` changed by rank 2, `b` by rank 1, a norm changed, `c` not."""
    random = np.random.default_rng(0)
    base = {f"{name}.weight": random.normal(size=(12, 8)).astype(np.float32) for name in "abc"}
    base["norm.weight"] = np.ones(8, np.float32)
    tuned = {name: value.copy() for name, value in base.items()}
    tuned["a.weight"] += (random.normal(size=(12, 2)) @ random.normal(size=(2, 8))).astype(np.float32)
    tuned["b.weight"] += (random.normal(size=(12, 1)) @ random.normal(size=(1, 8))).astype(np.float32)
    tuned["norm.weight"] += 0.5
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(folder: Path, module: str) -> np.ndarray:
    """What the adapter adds to a module's weight."""
    stored, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    up, down = (stored[f"base_model.model.{module}.lora_{part}.weight"] for part in "BA")
    rank = len(down)
    alphas = [value for pattern, value in config["alpha_pattern"].items() if pattern == f"^{module}"]
    product: np.ndarray = (alphas or [config["lora_alpha"]])[0] / rank * (up @ down)
    return product


@pytest.mark.parametrize("alpha", [(), ("--alpha", "7")])
def test_the_adapter_and_what_is_said_of_it(capsys: Capture, models: Path, alpha: tuple[str, ...]) -> None:
    code, out, err = call(capsys, "extract-lora", "tuned", "out", "--base", "base", "--rank", "2", *alpha)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["a.weight", "b.weight", "norm.weight"]
    assert [how in line for how, line in zip(("rank 2", "rank 1", "whole"), lines, strict=False)] == [True] * 3
    assert all("100.0000% kept" in line for line in lines[:3])
    assert lines[3] == "out: 100.0000% of the changes' energy kept"
    base, tuned = (load_file(models / name / "model.safetensors") for name in ("base", "tuned"))
    for module in "ab":
        name = f"{module}.weight"
        np.testing.assert_allclose(change(models / "out", module), tuned[name] - base[name], atol=1e-5)
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == (7 if alpha else config["r"])


def test_json_says_how_much_is_kept(capsys: Capture, models: Path) -> None:
    code, out, _ = call(capsys, "extract-lora", "tuned", "out", "--base", "base", "--rank", "1", "--json")
    record = json.loads(out)
    found = {item["name"]: item for item in record["tensors"]}
    base, tuned = (load_file(models / name / "model.safetensors")["a.weight"] for name in ("base", "tuned"))
    values = np.linalg.svd((tuned - base).astype(np.float64), compute_uv=False)
    assert code == 0
    assert found["a.weight"]["kept"] == pytest.approx(values[0] ** 2 / (values**2).sum(), abs=1e-5)
    assert found["b.weight"]["kept"] == pytest.approx(1, abs=1e-6)
    assert 0 < record["kept"] < 1


def test_patterns_choose_the_tensors(capsys: Capture, models: Path) -> None:
    arguments = ("extract-lora", "tuned", "--base", "base", "--json")
    _, out, _ = call(capsys, *arguments, "one", "--include", "?.weight", "--exclude", "b.*")
    assert [item["name"] for item in json.loads(out)["tensors"]] == ["a.weight"]
    _, out, _ = call(capsys, *arguments, "two", "--include", "b.*", "--include", "c.*", "--dtype", "bfloat16")
    assert [item["name"] for item in json.loads(out)["tensors"]] == ["b.weight"]
    assert not list(models.glob(".*part*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tuned", "out", "--base", "gone/x/y"), "gone/x/y: no such file or folder"),
        (
            ("tuned", "out", "--base", "base", "--energy", "1.5", "--dtype", "floot16"),
            "energy: got 1.5; above 0 and at most 1\n",
        ),
        (("tuned", "out", "--base", "base", "--dtype", "floot16"), "dtype: got 'floot16'; did you mean 'float16'"),
        (("tuned", "out", "--base", "base", "--alpha", "0"), "alpha: got 0.0; above 0"),
        (("tuned", "out", "--base", "base", "--include", "zz*"), "include: 'zz*' fits no tensor"),
        (("base", "out", "--base", "base"), "base: no tensor differs from base's"),
        (("tuned", "base", "--base", "base", "--overwrite"), "the output would replace the input"),
        (("tuned", "tuned", "--base", "base"), "the output would replace the input"),
        (("tuned", "out", "--base", "base", "--rank", "0"), "rank"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    capsys: Capture, models: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = call(capsys, "extract-lora", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(item.name for item in models.iterdir()) == ["base", "tuned"]


def test_a_folder_that_is_there_needs_overwrite(capsys: Capture, models: Path) -> None:
    arguments = ("extract-lora", "tuned", "out", "--base", "base")
    assert call(capsys, *arguments)[0] == 0
    code, _, err = call(capsys, *arguments)
    assert (code, "is there already" in err) == (2, True)
    assert call(capsys, *arguments, "--overwrite")[0] == 0


@pytest.mark.usefixtures("_quiet")
def test_peft_loads_it(tmp_path: Path) -> None:
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))

    def llama(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config).eval()

    llama(0).save_pretrained(tmp_path / "base", max_shard_size="5KB")
    llama(1).save_pretrained(tmp_path / "tuned", max_shard_size="5KB")
    extraction = interfuse.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=16, alpha=8)
    assert extraction.error < 1e-6
    tokens = torch.tensor([[3, 5, 8, 13]])
    with torch.no_grad():
        wanted = llama(1)(tokens).logits
        found = peft.PeftModel.from_pretrained(llama(0), tmp_path / "out").eval()(tokens).logits
    assert float((found - wanted).abs().max()) < 1e-4

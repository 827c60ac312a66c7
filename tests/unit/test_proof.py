"""That outputs load: by equality where nothing changed, by transformers itself where names, shapes or config did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interfuse.engine.merge import merge
from interfuse.engine.output import proof
from interfuse.engine.output.proof import judged, missing_parts
from interfuse.errors import CheckpointError
from interfuse.pipeline import run

pytestmark = pytest.mark.usefixtures("proofs")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=40)
    folder = tmp_path_factory.mktemp("models") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loads(out: Path) -> str:
    said: str = json.loads((out / "interfuse.json").read_text())["loads"]
    return said


def stack(model: Path, *spans: tuple[int, int]) -> dict[str, Any]:
    sources = [{"sources": [{"model": str(model), "layer_range": list(span)}]} for span in spans]
    return {"merge_method": "passthrough", "slices": sources}


def test_a_plain_merge_loads_as_its_parent_does_and_nothing_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_started", lambda *args: pytest.fail("a process was started"))
    out = merge("linear", [llama, llama], out=tmp_path / "out", dtype="bfloat16")
    assert loads(out) == f"as {llama} does: tensor names, shapes and config are the same"


def test_a_frankenmerge_is_loaded_by_transformers(llama: Path, tmp_path: Path) -> None:
    run(stack(llama, (0, 2), (1, 3)), tmp_path / "out", progress=False)
    assert loads(tmp_path / "out").startswith("by transformers ")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_an_output_that_is_as_a_parent_is_loads_as_that_does(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.BertConfig(**sizes)
    for name, pooler in (("with", True), ("without", False)):
        transformers.BertModel(config, add_pooling_layer=pooler).save_pretrained(tmp_path / name)
    out = merge("linear", [tmp_path / "with", tmp_path / "without"], drop=["pooler"], out=tmp_path / "out")
    assert loads(out) == f"as {tmp_path / 'without'} does: tensor names, shapes and config are the same"
    out = merge("linear", [tmp_path / "without", tmp_path / "with"], keep=["pooler"], out=tmp_path / "other")
    assert loads(out) == f"as {tmp_path / 'with'} does: tensor names, shapes and config are the same"


def test_an_output_that_wouldn_t_load_isn_t_written(llama: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"merge_method": "linear", "models": [{"model": str(llama), "parameters": {"weight": 1}}]}
    slip = recipe | {"drop": ["rotary_emb", "model.norm.weight"]}
    with pytest.raises(CheckpointError, match=r"^drop\[0\]: 'rotary_emb' matches no tensor"):
        run(slip, tmp_path / "out", progress=False)
    for dry in (True, False):
        with pytest.raises(
            CheckpointError, match=r"^drop\[0\]: .* finds missing tensors in it: model\.norm\.weight; check the"
        ) as caught:
            run(recipe | {"drop": ["model.norm.weight"]}, tmp_path / "out", dry_run=dry, progress=False)
        assert len(caught.value.problems) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_can_t_be_told_is_said(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((llama / "config.json").read_text())
    for change, said in [
        ({"auto_map": {"AutoModel": "x.Y"}}, "not checked: its code is in its folder, and isn't run"),
        ({"architectures": None}, "not checked: config.json doesn't say which of transformers' classes it is for"),
        ({"architectures": ["NoSuchModel"]}, "has no NoSuchModel"),
        ({"hidden_size": "x"}, f"doesn't load {tmp_path / 'x'} either"),
    ]:
        folder = tmp_path / "x"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | change))
        run(stack(folder, (0, 1)), tmp_path / "out", progress=False, overwrite=True)
        assert said in loads(tmp_path / "out")
    monkeypatch.setattr(proof, "available", lambda: False)
    run(stack(llama, (0, 1)), tmp_path / "out", progress=False, overwrite=True)
    assert loads(tmp_path / "out") == "not checked: transformers isn't installed"


def outcome(**found: Any) -> dict[str, Any]:
    return {"by": "transformers 5", "missing": [], "unexpected": [], "mismatched": []} | found


def test_a_misfit_that_the_parent_has_is_a_note() -> None:
    misfit = outcome(unexpected=["layers.0.inv_freq"])
    said, notes = judged("a", outcome(unexpected=["layers.0.inv_freq", "layers.9.inv_freq"]), misfit)
    assert said == "by transformers 5, from its header"
    assert notes == ["transformers 5 finds 2 unexpected tensors in the result, as in a: layers.0.inv_freq, ..."]
    with pytest.raises(CheckpointError, match=r"unexpected tensors in it: x; name them under `drop`"):
        judged("a", outcome(unexpected=["layers.0.inv_freq", "x"]), misfit)
    with pytest.raises(
        CheckpointError, match=r"missing tensors in it: 0, 1, 2, 3, 4 and 3 more(.|\n)*mismatched tensors in it: w"
    ):
        judged("a", outcome(missing=[str(i) for i in range(8)], mismatched=["w"]), outcome())
    with pytest.raises(CheckpointError, match="loads a, and wouldn't load the result"):
        judged("a", {"by": "transformers 5", "error": "ValueError: x"}, outcome())


def test_parts_that_are_listed_and_not_there_are_noted(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = {"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"], "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert missing_parts(tmp_path) == ["vae is listed, and wasn't there to come along"]
    (tmp_path / "model_index.json").unlink()
    normalize = {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "unet"}, {"path": "2_Dense"}, normalize]))
    assert missing_parts(tmp_path) == ["2_Dense is listed, and wasn't there to come along"]

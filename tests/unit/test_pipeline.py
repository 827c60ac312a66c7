"""Runs from end to end on small networks: every form, the files, repeatability, and that nothing is left of a failure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from tests.unit.recipes import SEEDED, built, folder_of, net
from torch import nn

from interfuse.data import load_data
from interfuse.ensemble.network import Ensemble
from interfuse.errors import CheckpointError, DataError, ModelError, OptionError, RecipeError, UserError
from interfuse.inference.predict import predict
from interfuse.pipeline import check, compare_runs, load_run, run

NETS = """
def cnn():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return _seeded(1, *layers)

def mlp(seed=2, classes=3):
    return _seeded(seed, nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, classes))

def mlp2():
    return mlp(3)

def wide():
    return mlp(4, 5)

def headless():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3))

def broken():
    raise RuntimeError("boom")
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data, and code to build networks; it is the current folder."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 96), ("test", 48)):
        y = np.arange(count) % 3
        x = draw.integers(0, 80, (count, 6, 6), dtype=np.uint8)
        for i, label in enumerate(y):
            x[i, 2 * label : 2 * label + 2] += 150
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    yield from folder_of(SEEDED + NETS, tmp_path, monkeypatch)


def fusion(**changes: Any) -> dict[str, Any]:
    return {
        "fusion": "attention",
        "models": [net("cnn"), net("mlp")],
        "data": {"train": "train.npz", "validation": 0.25, "test": "test.npz"},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 16},
        **changes,
    }


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    return found


def same(model: nn.Module, folder: Path) -> None:
    """Another load of the folder predicts the same bits, and those that its test was scored on."""
    again = predict(load_run(folder, trust_code=True), load_data("test.npz"))
    assert torch.equal(predict(model, load_data("test.npz")).outputs, again.outputs)
    assert again.targets is not None
    accuracy = (again.outputs.argmax(1) == again.targets).double().mean()
    about = json.loads((folder / "interfuse.json").read_text())
    assert about["run"]["test"]["value"] == pytest.approx(float(accuracy))


# --- the forms ---


def test_a_fusion_is_trained_evaluated_and_loaded_again(work: Path) -> None:
    record = run(fusion(), "out", trust_code=True, progress=False)
    assert record.training is not None
    assert record.test is not None
    assert [row["epoch"] for row in record.training["history"]] == [0, 1, 2]
    assert record.test["low"] <= record.test["value"] <= record.test["high"]
    assert record.test["examples"] == 48
    assert sorted(p.name for p in (work / "out").iterdir()) == [
        "README.md",
        "interfuse.json",
        "model.safetensors",
        "recipe.yaml",
    ]
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["run"]["seed"] == 0
    assert about["run"]["papers"] == ["Bahdanau et al. 2015, arXiv:1409.0473"]
    assert [len(model["xxh3"]) for model in about["run"]["inputs"]["models"]] == [32, 32]
    assert set(about["run"]["inputs"]["data"]) == {"train", "test"}
    card = (work / "out" / "README.md").read_text()
    assert "# Attention fusion of cnn and mlp" in card
    assert f"test accuracy {record.test['value']:.4g}" in card
    same(load_run("out", trust_code=True), work / "out")


def test_an_ensemble_is_evaluated_without_training(work: Path) -> None:
    recipe = {"fusion": "ensemble", "models": [net("mlp"), net("mlp2")], "data": {"test": "test.npz"}}
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.training is None
    model = load_run("out", trust_code=True)
    same(model, work / "out")
    x = torch.rand(4, 1, 6, 6)
    parents = [built(name) for name in ("mlp", "mlp2")]
    mean = torch.stack([parent(x).softmax(1) for parent in parents]).mean(0)
    torch.testing.assert_close(model(x).softmax(1), mean)


@pytest.mark.parametrize("combine", ["probabilities", "stacking"])
def test_an_ensemble_learns_from_validation_data(combine: str, work: Path) -> None:
    data = {"validation": "train.npz", "test": "test.npz"}
    recipe = {"fusion": "ensemble", "models": [net("mlp"), net("mlp2")], "parameters": {"combine": combine}, "data": data}
    record = run(recipe, "out", trust_code=True, progress=False)
    (note,) = record.notes
    assert re.search(r"log_loss (\S+) -> .*\(96 validation examples, 5-fold cross-validation\)$", note)
    model = load_run("out", trust_code=True)
    assert isinstance(model, Ensemble)
    assert set(model.numbers) == ({"scale"} if combine == "probabilities" else {"matrix", "bias"})
    same(model, work / "out")


def test_one_model_alone_is_trained_whole_or_only_its_last_layer(work: Path) -> None:
    data = {"train": "train.npz", "validation": 0.25, "test": "test.npz"}
    start = built("mlp").state_dict()
    for freeze, moved in ((False, 4), (True, 2)):
        recipe = {"models": [net("mlp", freeze=freeze)], "data": data, "training": {"epochs": 1, "learning_rate": 0.01}}
        record = run(recipe, f"out-{freeze}", trust_code=True, progress=False)
        assert record.training is not None
        assert record.training["best_epoch"] == 1
        trained = weights(work / f"out-{freeze}")
        changed = [name for name in trained if not np.array_equal(trained[name], start[name].numpy())]
        assert len(changed) == moved
        assert {"3.weight", "3.bias"} <= set(changed)
        same(load_run(f"out-{freeze}", trust_code=True), work / f"out-{freeze}")


def test_training_may_be_of_parts_or_of_factors(work: Path) -> None:
    data = {"train": "train.npz", "validation": 0.25}
    start = built("mlp").state_dict()
    for name, how, moved in (
        ("head", {"train_only": "head"}, {"3.weight", "3.bias"}),
        ("lora", {"lora": 2, "layer_decay": 0.5, "l2_sp": 0.1, "precision": "32-true"}, {"1.weight", "3.weight", "3.bias"}),
    ):
        training = {"epochs": 1, "learning_rate": 0.01, **how}
        run({"models": [net("mlp")], "data": data, "training": training}, name, trust_code=True, progress=False)
        trained = weights(work / name)
        assert {n for n in trained if not np.array_equal(trained[n], start[n].numpy())} == moved


def test_one_model_alone_can_only_be_evaluated(work: Path) -> None:
    record = run({"models": [net("mlp")], "data": {"test": "test.npz"}}, "out", trust_code=True, progress=False)
    assert record.training is None
    assert record.test is not None
    start = built("mlp").state_dict()
    assert all(np.array_equal(value, start[name].numpy()) for name, value in weights(work / "out").items())


def test_a_probe_needs_a_linear_layer_at_the_end(work: Path) -> None:
    recipe = {"models": [net("headless", freeze=True)], "data": {"train": "train.npz", "validation": 0.25}}
    with pytest.raises(ModelError, match=r"models\[0\]\.freeze: the network doesn't end in a Linear layer"):
        run(recipe, "out", trust_code=True, progress=False)


def test_a_merge_of_networks(work: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "python:recipenets:mlp",
        "models": [net("mlp2", parameters={"weight": 0.4})],
        "parameters": {"lambda": 0.5},
        "data": {"test": "test.npz"},
    }
    run(recipe, "out", trust_code=True, progress=False)
    base, expert = built("mlp").state_dict(), built("mlp2").state_dict()
    for name, value in weights(work / "out").items():
        torch.testing.assert_close(torch.from_numpy(value), base[name] + 0.2 * (expert[name] - base[name]))
    same(load_run("out", trust_code=True), work / "out")


def test_a_transplant_copies_into_its_target(work: Path) -> None:
    recipe = {
        "fusion": "transplant",
        "target": "python:recipenets:wide",
        "models": [net("mlp")],
        "parameters": {"rules": {"1.*": "1.*", "*": None}},
        "data": {"test": "test.npz"},
    }
    record = run(recipe, "out", trust_code=True, progress=False)
    start, source, made = built("wide").state_dict(), built("mlp").state_dict(), weights(work / "out")
    for name in made:
        assert np.array_equal(made[name], (source if name.startswith("1.") else start)[name].numpy()), name
    assert any(note.startswith("from mlp: ") for note in record.notes)
    same(load_run("out", trust_code=True), work / "out")


def test_stages_build_up_their_target(work: Path) -> None:
    recipe = {
        "fusion": "stages",
        "target": "python:recipenets:mlp",
        "models": [net("mlp2", name="a"), net("wide", name="b")],
        "stages": [
            {"name": "copy", "copied": {"a": ["1.*"]}, "training": {"train_only": "head", "epochs": 1}},
            {"copied": {"b": {"rules": {"1.bias": "1.bias", "*": None}}}, "training": {"epochs": 0}},
            {"name": "all", "training": {"layer_decay": 0.5}},
        ],
        "data": {"train": "train.npz", "validation": 0.25, "test": "test.npz"},
        "training": {"epochs": 2, "learning_rate": 0.01, "batch_size": 16},
    }
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.training is not None
    assert [stage["name"] for stage in record.training["stages"]] == ["copy", "stage 2", "all"]
    assert [stage["training"] is None for stage in record.training["stages"]] == [False, True, False]
    assert len(record.training["stages"][0]["training"]["history"]) == 2
    assert len(record.training["stages"][2]["training"]["history"]) == 3
    same(load_run("out", trust_code=True), work / "out")
    first = weights(work / "out")
    run("out/recipe.yaml", "again", trust_code=True, progress=False)
    assert all(np.array_equal(first[name], value) for name, value in weights(work / "again").items())
    assert "target: python:recipenets:mlp" in run(recipe, "dry", trust_code=True, dry_run=True).text()


def test_what_is_wrong_with_layers_is_said_at_once(work: Path) -> None:
    wrong = {
        "fusion": "stages",
        "models": [net("mlp", name="a", freeze=True)],
        "stages": [{"copied": {"x": ["*"]}}],
        "head": 3,
        "data": {"test": "test.npz"},
    }
    with pytest.raises(RecipeError) as raised:
        run(wrong, "out", trust_code=True)
    assert {p.path for p in raised.value.problems} == {"target", "stages[0].copied.x", "head", "data.train", "models[0].freeze"}
    with pytest.raises(RecipeError) as raised:
        run(fusion(target="t"), "out", trust_code=True)
    assert "target" in {p.path for p in raised.value.problems}


def test_a_run_is_exported_on_its_own_data(work: Path) -> None:
    from interfuse.pipeline.exported import export_run

    run(fusion(), "out", trust_code=True, progress=False)
    record = export_run("out", "net.pt2", trust_code=True)
    x = load_data("test.npz").loader(48)
    inputs = next(iter(x))[0]
    expected = load_run("out", trust_code=True)(inputs)
    assert torch.allclose(torch.export.load(record.path).module()(inputs), expected, atol=1e-4)
    checkpoints(work, "a", "b")
    run({"merge_method": "linear", "models": ["a", "b"]}, "merged", progress=False)
    with pytest.raises(OptionError, match="without data"):
        export_run("merged", "merged.pt2")
    with pytest.raises(OptionError, match=r"holds no recipe\.yaml"):
        export_run("a", "a.pt2")


def test_outputs_are_models_of_further_recipes(work: Path) -> None:
    single = {"models": [net("mlp")], "data": {"train": "train.npz", "validation": 0.25}, "training": {"epochs": 1}}
    run(single, "one", trust_code=True, progress=False)
    run(fusion(models=["one", net("cnn")]), "two", trust_code=True, progress=False)
    same(load_run("two", trust_code=True), work / "two")
    run({"merge_method": "linear", "models": ["one", net("mlp")]}, "three", trust_code=True, progress=False)
    halfway = (weights(work / "one")["1.weight"] + built("mlp").state_dict()["1.weight"].numpy()) / 2
    np.testing.assert_allclose(weights(work / "three")["1.weight"], halfway, atol=1e-6)


def checkpoints(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).mkdir()
        tensor = np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)
        save_file({"l.weight": tensor}, folder / name / "model.safetensors")


def test_a_merge_of_files_loads_no_torch(work: Path) -> None:
    checkpoints(work, "a", "b")
    (work / "r.yaml").write_text(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 3}}\n"
    )
    code = "import sys; from interfuse.pipeline import run; run('r.yaml', 'out'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=work)
    a, b = (weights(work / name)["l.weight"] for name in "ab")
    np.testing.assert_allclose(weights(work / "out")["l.weight"], a / 4 + 3 * b / 4, rtol=1e-6)
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert about["run"]["inputs"]["models"][0]["xxh3"] == about["sources"][0]["xxh3"]
    with pytest.raises(ModelError, match="holds merged weights without their network's code"):
        load_run("out")


def test_a_merge_that_cannot_be_is_refused_before_anything_is_written(work: Path) -> None:
    checkpoints(work, "a", "b")
    save_file({"l.weight": np.zeros((2, 2), np.float32)}, work / "b" / "model.safetensors")
    (work / "c").mkdir()
    with pytest.raises(CheckpointError, match=r"\[2, 2\]"):
        run({"merge_method": "linear", "models": ["a", "b"]}, "out", dry_run=True)
    with pytest.raises(RecipeError, match=r"data\.test: .*a has no network to evaluate the merge with"):
        run({"merge_method": "linear", "models": ["a", "b"], "data": {"test": "test.npz"}}, "out")
    with pytest.raises(CheckpointError, match="c: no file of weights"):
        run({"merge_method": "linear", "models": ["a", "c"]}, "out")
    assert not (work / "out").exists()


def test_the_command_trains_and_prints_one_document(work: Path) -> None:
    (work / "r.yaml").write_text(yaml.safe_dump(fusion(models=[net("mlp"), net("mlp2")])))
    command = [sys.executable, "-c", "from interfuse.cli import main; main()"]
    arguments = ["run", "r.yaml", "out", "--trust-code", "--json", "--device", "cpu", "--threads", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=work)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert record["training"]["best_epoch"] in (0, 1, 2)
    assert record["test"]["metric"] == "accuracy"


# --- repeatability, whole or not at all ---


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others(work: Path) -> None:
    for name, seed in (("a", None), ("b", None), ("c", 7)):
        run(fusion(), name, trust_code=True, progress=False, seed=seed, threads=1)
    a, b, c = (weights(work / name) for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_the_recorded_recipe_runs_again_from_another_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fusion(seed=3), "out", trust_code=True, progress=False)
    monkeypatch.syspath_prepend(str(work))
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    run(work / "out" / "recipe.yaml", "again", trust_code=True, progress=False)
    first, second = weights(work / "out"), weights(work / "elsewhere" / "again")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_code_beside_the_recipe_is_found_from_any_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "r.yaml").write_text(yaml.safe_dump({"models": [net("mlp")], "data": {"test": "test.npz"}}))
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    before = list(sys.path)
    assert run(work / "r.yaml", "out", trust_code=True, progress=False).test is not None
    assert sys.path == before


def test_random_numbers_outside_are_left_alone(work: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    run({"models": [net("mlp")], "data": {"test": "test.npz"}}, "out", trust_code=True, progress=False)
    assert (torch.rand(1), np.random.rand()) == expected


def test_a_failure_leaves_nothing_behind(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p.name for p in work.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("interfuse.pipeline.networks.write_model", fail)
    with pytest.raises(KeyboardInterrupt):
        run(fusion(training={"epochs": 0}), "out", trust_code=True, progress=False)
    after = sorted(p.name for p in work.iterdir() if p.name != "__pycache__")
    assert after == [name for name in before if name != "__pycache__"]


def test_an_output_that_is_there_needs_overwrite_and_inputs_are_never_replaced(work: Path) -> None:
    checkpoints(work, "a", "b")
    recipe = {"merge_method": "linear", "models": ["a", "b"]}
    run(recipe, "out")
    with pytest.raises(CheckpointError, match="is there already"):
        run(recipe, "out")
    run(recipe, "out", overwrite=True)
    with pytest.raises(CheckpointError, match="would replace the input"):
        run(recipe, "a", overwrite=True)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(work: Path) -> None:
    before = sorted(work.iterdir())
    record = run(fusion(), "out", trust_code=True, dry_run=True)
    assert record.out is None
    assert "fusion: attention\n  heads: 1" in record.plan
    assert "model mlp: python:recipenets:mlp" in record.plan
    assert sorted(work.iterdir()) == before
    checkpoints(work, "a", "b")
    merged = run({"merge_method": "linear", "models": ["a", "b"]}, "out", dry_run=True)
    assert isinstance(merged.plan, dict)
    assert merged.plan["recipes"][0]["tensors"][0]["names"] == "l.weight"
    assert merged.here is not None
    assert merged.here["disk"]["needs"] == 48 + 1000
    assert "l.weight   1 x   [4, 3]   F32    linear   0-1" in merged.text()


# --- problems ---


def test_every_problem_of_a_run_at_once() -> None:
    recipe = fusion(
        evaluate={"metric": "acuracy"},
        training={"loss": "mean", "metric": "f2", "epochs": -1},
        data={"train": "gone.npz", "test": "python:d:f"},
    )
    with pytest.raises(RecipeError) as caught:
        check(recipe)
    assert [p.path for p in caught.value.problems] == [
        "training.epochs",
        "data.train",
        "data.test",
        "models[0].model",
        "models[1].model",
        "training.metric",
        "evaluate.metric",
        "training.loss",
    ]


def test_types_that_do_not_exist_are_named() -> None:
    with pytest.raises(RecipeError, match=r"dtype: got 'float17'; did you mean.*\nout_dtype: got 'int8'"):
        check({"merge_method": "linear", "models": ["org/a"], "dtype": "float17", "out_dtype": "int8"})
    (read,) = check({"merge_method": "linear", "models": ["org/a"], "dtype": "torch.bfloat16"})
    assert read.dtype == "torch.bfloat16"


def test_models_and_data_that_cannot_be_loaded_are_named_together(work: Path) -> None:
    recipe = fusion(models=[net("mlp", weights="train.npz"), net("nosuch"), net("cnn")])
    with pytest.raises(ModelError, match=r"(?s)models\[0\].*models\[1\].*no function 'nosuch'"):
        run(recipe, "out", trust_code=True, progress=False)
    np.savez("bad.npz", x=np.zeros((4, 6, 6), np.uint8), z=[0, 1, 2, 0])
    with pytest.raises(DataError, match=r"(?s)data\.train: nothing is named 'y'.*data\.test: nothing is named 'y'"):
        run(fusion(data={"train": "bad.npz", "test": "bad.npz"}), "out", trust_code=True, progress=False)
    assert not (work / "out").exists()


def test_networks_that_cannot_read_the_data_are_named_together(work: Path) -> None:
    (work / "oddnets.py").write_text(
        "from torch import nn\n\ndef flat():\n    return nn.Linear(5, 3)\n\ndef two():\n    return nn.Bilinear(2, 2, 3)\n"
    )
    with pytest.raises(ModelError) as caught:
        run(fusion(models=[net("mlp"), "python:oddnets:flat", "python:oddnets:two"]), "out", trust_code=True, progress=False)
    flat, two = map(str, caught.value.problems)
    assert flat.startswith("models[1] (flat): can't read the data, float32 [2, 1, 6, 6]: RuntimeError: mat1 and mat2 shapes")
    assert two.startswith("models[2] (two): takes the inputs ['input1', 'input2'], but gets 1 by position")
    assert not (work / "out").exists()
    sys.modules.pop("oddnets", None)


def test_heads_and_devices_that_do_not_fit(work: Path) -> None:
    with pytest.raises(ModelError, match=r"head\.classes: 2, but the data has 3; at least 3"):
        run(fusion(head=2), "out", trust_code=True, progress=False)
    with pytest.raises(OptionError, match="device: got 'tpu'; cpu or cuda"):
        run(fusion(), "out", trust_code=True, device="tpu")
    with pytest.raises(OptionError, match=r"seed: got -1.*\nthreads: got 0"):
        run(fusion(), "out", trust_code=True, seed=-1, threads=0)


def test_a_loaded_run_needs_trust_for_its_code(work: Path) -> None:
    run({"models": [net("mlp")], "data": {"test": "test.npz"}}, "out", trust_code=True, progress=False)
    with pytest.raises(UserError, match="trust"):
        load_run("out")


# --- inputs for each model, numbers to predict, compare ---


def test_each_model_has_its_own_input_and_targets_may_be_numbers(work: Path) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(60, 36)).astype("f"), draw.normal(size=(60, 36)).astype("f")
    np.savez("pair.npz", a=a, b=b, y=(a[:, 0] + b[:, 0]).astype("f"))
    recipe = fusion(
        fusion="concat",
        models=[net("mlp", name="left"), net("mlp2", name="right")],
        data={"train": "pair.npz", "validation": 0.2, "test": "pair.npz", "input": {"left": "a", "right": "b"}},
    )
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.test is not None
    assert record.test["metric"] == "mse"
    comparison = compare_runs(["out"], "pair.npz", trust_code=True, progress=False)
    assert comparison["out"].score.value == pytest.approx(record.test["value"], rel=1e-5)


def test_runs_recipes_and_models_are_compared_on_the_same_data(work: Path) -> None:
    run(fusion(), "out", trust_code=True, progress=False)
    (work / "both.yaml").write_text(
        yaml.safe_dump({"fusion": "ensemble", "models": [net("mlp"), net("cnn")], "data": {"test": "test.npz"}})
    )
    references = ["out", "both.yaml", "python:recipenets:mlp"]
    comparison = compare_runs(references, "test.npz", trust_code=True, progress=False)
    assert [row.name for row in comparison.rows] == ["out", "both", "mlp"]
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert comparison["out"].score.value == pytest.approx(about["run"]["test"]["value"])
    with pytest.raises(OptionError, match=r"both\.yaml: models\[0\]\.model: python:recipenets:mlp runs code"):
        compare_runs(references, "test.npz")


def test_every_run_reads_the_data_in_its_own_way_and_parents_are_marked(work: Path) -> None:
    for name, more in (("a", {}), ("b", {"mean": [0.5]})):
        recipe = {"models": [net("mlp")], "data": {"test": "test.npz", **more}, "evaluate": {"metric": "log_loss"}}
        run(recipe, name, trust_code=True, progress=False)
    run({"fusion": "ensemble", "models": ["a", "b"], "data": {"test": "test.npz"}}, "both", trust_code=True)
    compared = compare_runs(["a", "b", "both"], "test.npz", metric="log_loss", trust_code=True, progress=False)
    values = [json.loads((work / name / "interfuse.json").read_text())["run"]["test"]["value"] for name in "ab"]
    assert [compared[name].score.value for name in "ab"] == pytest.approx(values)
    assert values[0] != pytest.approx(values[1])
    assert [row.parent for row in compared.rows] == [True, True, False]


def test_what_is_wrong_is_said_before_a_recipe_is_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "r.yaml").write_text(yaml.safe_dump(fusion()))
    monkeypatch.setattr("interfuse.pipeline.steps.run", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(OptionError) as caught:
        compare_runs(["r.yaml"], "none.npz", metric="acuracy", device="tpu", trust_code=True)
    assert [p.path for p in caught.value.problems] == ["--data", "device", "--metric"]
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        compare_runs(["r.yaml", "./nowhere"], "test.npz", trust_code=True)


def test_classes_keep_their_numbers_where_the_test_data_lacks_one(work: Path) -> None:
    draw = np.random.default_rng(0)
    for name, labels in (("train", "abc"), ("test", "bc")):
        rows = [f"{'abc'.index(label) + draw.normal() / 9:.3f},{draw.normal():.3f},{label}" for label in labels * 30]
        (work / f"{name}.csv").write_text("p,q,label\n" + "\n".join(rows) + "\n")
    model = "import torch\n\ndef line():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(2, 3))\n"
    (work / "linenet.py").write_text(model)
    data = {"train": "train.csv", "test": "test.csv"}
    recipe = {"models": ["python:linenet:line"], "data": data, "training": {"epochs": 30, "learning_rate": 0.3}}
    record = run(recipe, "out", trust_code=True, progress=False)
    assert record.classes == ("a", "b", "c")
    assert record.test is not None
    assert record.test["value"] > 0.9
    found = compare_runs(["out"], "test.csv", trust_code=True, progress=False)["out"].score.value
    assert found == pytest.approx(record.test["value"])
    sys.modules.pop("linenet", None)


def test_runs_of_other_classes_are_not_compared(work: Path) -> None:
    for name in "ab":
        run({"models": [net("mlp")], "data": {"test": "test.npz"}}, name, trust_code=True, progress=False)
    about = json.loads((work / "b" / "interfuse.json").read_text())
    about["run"]["classes"] = ["2", "1", "0"]
    (work / "b" / "interfuse.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"a knows the classes \['0', '1', '2'\], b \['2', '1', '0'\]"):
        compare_runs(["a", "b"], "test.npz", trust_code=True, progress=False)


def test_a_folder_built_by_code_needs_trust_before_anything_is_loaded(work: Path) -> None:
    run({"models": [net("mlp")], "data": {"test": "test.npz"}}, "a", trust_code=True, progress=False)
    run({"fusion": "ensemble", "models": ["a"]}, "b", trust_code=True, progress=False)
    with pytest.raises(RecipeError, match=r"models\[0\]\.model: .*b is built by python:recipenets:mlp, which runs code"):
        run({"fusion": "mean", "models": ["b"], "data": {"train": "train.npz"}}, "c", dry_run=True)


def test_what_a_merge_resolved_is_said(work: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, work / "a.safetensors")
    save_file({"module.w": np.ones(2, np.float32)}, work / "b.safetensors")
    record = run({"merge_method": "linear", "models": ["a.safetensors", "b.safetensors"]}, "out")
    assert record.notes == (f"models[1] ({work / 'b.safetensors'}): the prefix 'module.' of its names is left out",)
    assert f"note: {record.notes[0]}" in record.text()


# --- transformers: folders, texts, tokenizers ---


def bert(folder: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "dull"]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )  # fmt: skip
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_texts_are_read_by_each_models_tokenizer(work: Path) -> None:
    bert(work / "p", 0)
    bert(work / "q", 1)
    rows = ["good film,yes", "bad film,no", "dull,no", "good good,yes"] * 8
    (work / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    data = {"train": "t.csv", "validation": 0.25, "test": "t.csv"}
    record = run(fusion(models=["p", "q"], data=data), "out", progress=False)
    assert record.test is not None
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert [member["stored"] for member in about["members"]] == [False, False]
    single = run({"models": ["p"], "data": data, "training": {"epochs": 1}}, "one", progress=False)
    assert {"config.json", "tokenizer.json", "recipe.yaml"} <= {p.name for p in (work / "one").iterdir()}
    assert single.test is not None
    assert compare_runs(["one"], "t.csv", progress=False)["one"].score.value == pytest.approx(single.test["value"])
    merged = run({"merge_method": "linear", "models": ["p", "q"], "data": {"test": "t.csv"}}, "mix", progress=False)
    assert merged.test is not None
    compared = compare_runs(["p", "q", "out", "one", "mix"], "t.csv", progress=False)
    assert compared["mix"].score.value == pytest.approx(merged.test["value"])
    assert compared["out"].score.value == pytest.approx(record.test["value"])
    assert [row.name for row in compared.rows if row.parent] == ["p", "q"]

"""Merges with an output for each task: what is rebuilt is what a slow reference gives, from a bit an element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import interfuse as itf
from interfuse.checkpoints.source import open_checkpoint
from interfuse.checkpoints.tasks import open_task, split_task
from interfuse.engine import per_task

Tensors = dict[str, np.ndarray]
SHAPES = {"a.weight": (9, 7), "a.bias": (5,), "b.weight": (3, 2, 2, 5), "one": (), "none": (0,)}
NAMES = ("x", "y", "z")


def make(folder: Path, seed: int = 1, *, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Tensors]:
    """A base and three models on a grid, with integers that aren't merged, in folders; as float64."""
    random = np.random.default_rng(seed)
    base = {name: random.integers(-64, 65, shape) / 64 for name, shape in shapes.items()}
    drawn = [{name: base[name] + random.integers(-8, 9, shape) / 32 for name, shape in shapes.items()} for _ in NAMES]
    for name, tensors in zip(("base", *NAMES), (base, *drawn), strict=True):
        (folder / name).mkdir()
        stored = {key: np.array(value, dtype) for key, value in tensors.items()} | {"steps": np.arange(3)}
        save_file(stored, folder / name / "model.safetensors")
    return [base, *drawn]


def emr_reference(base: Tensors, models: list[Tensors], weights: list[float]) -> list[Tensors]:
    """Every task's model: t0 + s_i (m_i * unified), with s_i over the whole model."""
    d = [{name: w * (model[name] - base[name]) for name in base} for w, model in zip(weights, models, strict=True)]
    unified, masks = {}, [dict[str, np.ndarray]() for _ in d]
    for name in base:
        sign = np.sign(sum(one[name] for one in d))
        unified[name] = sign * np.max([np.where(one[name] * sign > 0, abs(one[name]), 0) for one in d], axis=0)
        for one, mask in zip(d, masks, strict=True):
            mask[name] = one[name] * unified[name] > 0
    rebuilt = []
    for one, mask in zip(d, masks, strict=True):
        own, kept = sum(abs(v).sum() for v in one.values()), sum((mask[n] * abs(unified[n])).sum() for n in base)
        rebuilt.append({name: base[name] + own / kept * mask[name] * unified[name] for name in base})
    return rebuilt


def tall_reference(base: Tensors, models: list[Tensors], threshold: list[float], scale: float) -> list[Tensors]:
    """Every task's model: t0 + scale D where |d_i| >= threshold_i |D - d_i|."""
    d = [{name: model[name] - base[name] for name in base} for model in models]
    total = {name: sum(one[name] for one in d) for name in base}
    return [
        {name: base[name] + scale * total[name] * (abs(one[name]) >= least * abs(total[name] - one[name])) for name in base}
        for one, least in zip(d, threshold, strict=True)
    ]


def merged(folder: Path, method: str = "emr", out: str = "out", **options: Any) -> Path:
    models = {name: folder / name for name in NAMES}
    found = itf.merge(method, models, base=folder / "base", out=folder / out, output="per_task", **options)
    return Path(found)


def same(got: Any, expected: Tensors, tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(got[name], np.float64), value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-6), (np.float16, 1e-3)])
def test_emr_gives_each_tasks_model(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    base, *models = make(tmp_path, dtype=dtype)
    out = merged(tmp_path, weights=[1.0, 0.5, 2.0])
    for name, expected in zip(NAMES, emr_reference(base, models, [1.0, 0.5, 2.0]), strict=True):
        got = itf.task_model(out, name)
        assert isinstance(got, dict)
        same(got, expected, tolerance)
        assert got["steps"].tolist() == [0, 1, 2]
        assert {value.numpy().dtype for key, value in got.items() if key != "steps"} == {np.dtype(dtype)}


def test_consensus_gives_each_tasks_model_and_its_trunk_drops_nothing(tmp_path: Path) -> None:
    base, *models = make(tmp_path)
    out = merged(tmp_path, "consensus", threshold={"x": 0.3, "y": 0.6, "z": 1.0}, lambda_=0.5)
    for name, expected in zip(NAMES, tall_reference(base, models, [0.3, 0.6, 1.0], 0.5), strict=True):
        same(itf.task_model(out, name), expected)
    whole = {name: base[name] + 0.5 * sum(model[name] - base[name] for model in models) for name in base}
    same(load_file(out / "model.safetensors"), whole)


def test_bfloat16_is_rebuilt_as_it_was_trained_where_a_task_is_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(40, 30).bfloat16()}
    model = {"w": base["w"] + (torch.randn(40, 30) * 0.01).bfloat16()}
    for name, tensors in (("base", base), ("x", model)):
        (tmp_path / name).mkdir()
        save_torch(tensors, tmp_path / name / "model.safetensors")
    out = itf.merge("emr", [tmp_path / "x"], base=tmp_path / "base", out=tmp_path / "out", output="per_task")
    got = itf.task_model(out, "x")
    assert isinstance(got, dict)
    assert torch.equal(got["w"], model["w"])


def test_a_mask_is_one_bit_an_element_and_the_form_is_said(tmp_path: Path) -> None:
    base, *models = make(tmp_path, shapes={"w": (100, 81), "b": (11,)})
    out = merged(tmp_path)
    masks = load_file(out / "tasks" / "x" / "mask.safetensors")
    assert {name: (mask.dtype.name, mask.shape) for name, mask in masks.items()} == {
        "w": ("uint8", (1013,)),
        "b": ("uint8", (2,)),
    }
    unified = load_file(out / "model.safetensors")["w"] - base["w"]
    bits = np.unpackbits(masks["w"], bitorder="little")
    np.testing.assert_array_equal(bits[:8100].reshape(100, 81), (models[0]["w"] - base["w"]) * unified > 0)
    assert not bits[8100:].any()
    about = json.loads((out / "tasks" / "tasks.json").read_text())
    assert (about["version"], about["method"], about["base"]["model"]) == (1, "emr", str(tmp_path / "base"))
    assert list(about["tasks"]) == list(NAMES)
    assert about["tensors"]["w"][0] == "w"
    listed = json.loads((out / "interfuse.json").read_text())["files"]
    assert {"tasks/tasks.json", *(f"tasks/{name}/mask.safetensors" for name in NAMES)} <= set(listed)


def test_a_task_is_a_model_wherever_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    (tmp_path / "base" / "notes.txt").write_text("of the base")
    out = merged(tmp_path)
    expected = itf.task_model(out, "y")
    assert isinstance(expected, dict)
    recipe = "merge_method: linear\nmodels: [{model: out#y}, {model: 'out#y', name: again}]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    record = itf.run(tmp_path / "r.yaml", tmp_path / "two", progress=False)
    written = itf.task_model(out, "y", out=tmp_path / "three")
    assert isinstance(written, Path)
    monkeypatch.chdir(tmp_path)
    itf.merge("passthrough", ["out#y"], out="four")
    for folder in ("two", "three", "four"):
        got = load_file(tmp_path / folder / "model.safetensors")
        assert all(got[name].tobytes() == value.numpy().tobytes() for name, value in expected.items()), folder
        assert (tmp_path / folder / "notes.txt").read_text() == "of the base"
        assert not (tmp_path / folder / "tasks").exists()
    assert str(tmp_path / "out") in str(record.inputs["models"][0]["model"])
    with pytest.raises(itf.CheckpointError, match="the output would replace the input"):
        itf.task_model(out, "y", out=out, overwrite=True)
    with pytest.raises(itf.CheckpointError, match="out: has no task 'q'; allowed: x, y, z"):
        itf.run({"merge_method": "linear", "models": ["out#y", "out#q"]}, tmp_path / "five", progress=False)


def test_a_network_is_filled_with_a_tasks_weights(tmp_path: Path) -> None:
    shapes = {"weight": (3, 4), "bias": (3,)}
    random = np.random.default_rng(0)
    for name in ("base", *NAMES):
        save_file(
            {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()},
            tmp_path / f"{name}.safetensors",
        )
    models = {name: tmp_path / f"{name}.safetensors" for name in NAMES}
    out = itf.merge("emr", models, base=tmp_path / "base.safetensors", out=tmp_path / "out", output="per_task")
    from interfuse.models import fill

    network = torch.nn.Linear(4, 3)
    fill(network, f"{out}#z")
    expected = itf.task_model(out, "z")
    assert isinstance(expected, dict)
    assert torch.equal(network.weight, expected["weight"])


def test_blocks_and_threads_change_no_byte_and_parts_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, shapes={"w": (100, 81)})
    first = merged(tmp_path, threads=1)
    monkeypatch.setattr(per_task, "most_of", lambda reader: 64)
    second = merged(tmp_path, out="again", threads=3)
    for name in NAMES:
        path = f"tasks/{name}/mask.safetensors"
        assert (first / path).read_bytes() == (second / path).read_bytes()
    task = open_task(first, "x")
    whole = task.read("w").reshape(-1)
    for start, stop in ((0, 1), (3, 5), (7, 9), (13, 8100), (8099, 8100)):
        np.testing.assert_array_equal(task.block("w", start, stop), whole[start:stop])


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    first = merged(tmp_path)

    def killed(*given: Any, **more: Any) -> bool:
        (given[2] / "tasks" / "rest").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("interfuse.engine.output.folder.write_tasks", killed)
    with pytest.raises(KeyboardInterrupt):
        merged(tmp_path, out="again")
    assert not (tmp_path / "again").exists()
    monkeypatch.undo()
    again = merged(tmp_path, out="again", resume=True)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files if file.name != "interfuse.json")


def test_a_base_that_moved_is_named_and_one_that_changed_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    out = merged(tmp_path)
    before = itf.task_model(out, "x")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(itf.CheckpointError, match=r"the base of .*: .*base: no such file.*tasks\.json where it is"):
        itf.task_model(out, "x")
    after = itf.task_model(out, "x", base=tmp_path / "moved")
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = load_file(tmp_path / "moved" / "model.safetensors")
    changed["b.weight"][0] += 1
    save_file(changed, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(itf.CheckpointError, match=r"tensor 'b\.weight' isn't the one that the tasks of"):
        itf.task_model(out, "x", base=tmp_path / "moved")


def test_what_is_wrong_with_tasks_is_said(tmp_path: Path) -> None:
    make(tmp_path)
    out = merged(tmp_path)
    with pytest.raises(itf.CheckpointError, match="has no task 'xx'; did you mean 'x'"):
        itf.task_model(out, "xx")
    with pytest.raises(itf.CheckpointError, match="holds no tasks; merge with heads: separate, or with output: per_task"):
        itf.task_model(tmp_path / "x", "x")
    table = out / "tasks" / "tasks.json"
    about = json.loads(table.read_text())
    table.write_text(json.dumps(about | {"version": 3}))
    with pytest.raises(itf.CheckpointError, match="is of version 3; this interfuse reads 1 and 2"):
        itf.task_model(out, "x")
    table.write_text("{")
    with pytest.raises(itf.CheckpointError, match="isn't a list of tasks"):
        itf.task_model(out, "x")
    about["tensors"]["a.bias"][0] = "a.weight"
    table.write_text(json.dumps(about))
    with pytest.raises(itf.CheckpointError, match=r"tensor 'a\.bias' of task 'x' doesn't fit"):
        itf.task_model(out, "x")


def test_what_tasks_cant_be_made_of_is_said_before_anything_is_written(tmp_path: Path) -> None:
    make(tmp_path)
    base, x = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "x")
    held = [{name: one.read(name) for name in one.specs} for one in (base, x)]
    with pytest.raises(itf.OptionError, match="output: got 'per_task' for mappings; give paths"):
        itf.merge("emr", held[1:], base=held[0], output="per_task")
    with pytest.raises(itf.OptionError, match="magmax has no such option"):
        itf.merge("magmax", held[1:], base=held[0], output="per_task")
    paths = {name: str(tmp_path / name) for name in ("base", "x", "y")}
    per = {"output": "per_task"}
    parts = {"modules": {"a": {"models": [{"model": paths["x"]}]}}}
    with pytest.raises(itf.RecipeError, match="got 'per_task' beside slices or modules"):
        itf.run(
            {"merge_method": "emr", "base_model": paths["base"], **parts, "parameters": per}, tmp_path / "no", progress=False
        )
    first = {"name": "s", "merge_method": "emr", "base_model": paths["base"], "models": [paths["x"]], "parameters": per}
    with pytest.raises(itf.RecipeError, match="later recipes see the trunk alone"):
        itf.run([first, {"merge_method": "linear", "models": ["s", paths["y"]]}], tmp_path / "no", progress=False)
    stage = {"name": "s", "merge_method": "linear", "models": [paths["x"]]}
    last = {"merge_method": "emr", "base_model": "s", "models": [paths["y"]], "parameters": per}
    with pytest.raises(itf.RecipeError, match="'s' is an earlier recipe's"):
        itf.run([stage, last], tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()


def test_a_sign_in_a_path_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "a#b").mkdir()
    make(tmp_path)
    out = merged(tmp_path)
    assert split_task(tmp_path / "a#b") is None
    assert split_task(f"{out}#x") == (out, "x")
    assert split_task(f"{tmp_path}#x") is None
    assert split_task("some/model") is None
    (tmp_path / "out#x").mkdir()
    assert split_task(f"{out}#x") is None

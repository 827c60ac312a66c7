"""Runs that are killed at each of their last steps, and runs that are asked for once more: the same bytes, file by file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interfuse import merge, verify
from interfuse.checkpoints.adapters.writer import AdapterWriter
from interfuse.engine.adapters.merging import merge_adapters
from interfuse.errors import CheckpointError
from interfuse.pipeline import run

#: Forks runs that kill themselves before, between and after all that they do to files: the n-th such call is the last.
DRIVER = """
import os, pathlib, shutil, signal, sys
from interfuse.pipeline import run
folder, overwrite = sys.argv[1], sys.argv[2] == "over"
def go(**options):
    run(f"{folder}/recipe.yaml", f"{folder}/out", resume=True, overwrite=overwrite, threads=1, progress=False, **options)

def killed_at(last):
    seen = 0
    def watched(name, call):
        def wrapped(*given, **options):
            nonlocal seen
            seen += 1
            if seen == last:
                os.write(1, f"{last} {name} {given[0]}\\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **options)
        return wrapped
    for owner, name in [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "pwrite"), (os, "replace"), (shutil, "copyfile"),
                        (shutil, "rmtree"), (pathlib.Path, "write_text"), (pathlib.Path, "write_bytes"),
                        (pathlib.Path, "unlink")]:
        setattr(owner, name, watched(name, getattr(owner, name)))
    go()

def forked(work, *given):
    child = os.fork()
    if not child:
        try:
            work(*given)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files():
    out = pathlib.Path(folder, "out")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

def fresh():
    shutil.rmtree(f"{folder}/out", ignore_errors=True)
    if overwrite:
        os.mkdir(f"{folder}/out")
        pathlib.Path(folder, "out", "old").write_text("old")

fresh()
go()  # here, so that those forked have it all loaded
wanted, last, status = files(), 0, -signal.SIGKILL
assert "old" not in wanted
while status == -signal.SIGKILL:
    last += 1
    fresh()
    status = forked(killed_at, last)
    assert status in (0, -signal.SIGKILL), status
    assert forked(go) == 0, f"after a kill at call {last}"
    assert files() == wanted, f"after a kill at call {last}"
    assert not [name for name in os.listdir(folder) if name.startswith(".")], os.listdir(folder)
print("kills", last - 1)
"""

ONCE = "import sys; from interfuse.cli import main; main(sys.argv[1:])"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two models with small files beside them, and a recipe that merges them."""
    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        save_file({f"layers.{i}.w": draw.standard_normal((16, 24), np.float32) for i in range(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
        for file in ("tokenizer.json", "sub/words.txt"):
            (folder / file).write_text("{}")
    (tmp_path / "recipe.yaml").write_text(f"""
merge_method: ties
base_model: {tmp_path}/one
models:
  - {{model: {tmp_path}/two, parameters: {{weight: 0.6, density: 0.5}}}}
dtype: float16
""")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dates(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("over", ["new", "over"])
def test_a_run_that_is_killed_at_any_step_is_resumed_to_the_same_folder(work: Path, over: str) -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER, str(work), over], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    for name, file in [("copyfile", "one/tokenizer.json"), ("fsync", ""), ("rename", ".out.interfuse-part"), ("pwrite", "")]:
        assert any(step[1] == name and step[-1].endswith(file) for step in steps), f"no kill came at {name} {file}"
    renamed = [step[-1] for step in steps if step[1] == "rename"]
    assert len(renamed) == (2 if over == "over" else 1)
    assert {"write_text", "write_bytes", "unlink", *(["rmtree"] if over == "over" else [])} <= {step[1] for step in steps}


def test_what_was_finished_is_left_as_it_is(work: Path) -> None:
    arguments = ["run", str(work / "recipe.yaml"), str(work / "out")]
    run(work / "recipe.yaml", work / "out", progress=False)
    before = dates(work / "out")
    (work / ".out.interfuse-part.old").mkdir()  # as a run leaves it that is killed when it has replaced a folder
    for more in ([], ["--overwrite"]):
        done = subprocess.run(
            [sys.executable, "-c", ONCE, *arguments, "--resume", *more], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        said = "ties merge of two, finished by an earlier run, nothing was left to do"
        assert done.stdout.splitlines()[0] == f"{work / 'out'}: {said}"
        assert dates(work / "out") == before
    assert not [name for name in os.listdir(work) if name.startswith(".")]
    record = run(work / "recipe.yaml", work / "out", resume=True, progress=False)
    assert record.before
    assert record.models == ("two",)
    assert isinstance(record.plan, dict)


def change_a_weight(work: Path) -> None:
    path = work / "two" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change_the_recipe(work: Path) -> None:
    path = work / "recipe.yaml"
    path.write_text(path.read_text().replace("0.6", "0.7"))


def damage_the_output(work: Path) -> None:
    with (work / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55")


def damage_a_side_file(work: Path) -> None:
    (work / "out" / "tokenizer.json").write_text("[]")


def lose_the_record(work: Path) -> None:
    (work / "out" / "interfuse.json").write_text("{}")


@pytest.mark.parametrize("change", [change_a_weight, change_the_recipe, damage_the_output, damage_a_side_file, lose_the_record])
def test_what_another_run_gave_is_not_taken_for_finished(work: Path, change: Any) -> None:
    run(work / "recipe.yaml", work / "out", progress=False)
    change(work)
    with pytest.raises(CheckpointError, match="out: is there already"):
        run(work / "recipe.yaml", work / "out", resume=True, progress=False)
    assert not run(work / "recipe.yaml", work / "out", resume=True, overwrite=True, progress=False).before


def test_merge_leaves_what_was_finished_as_it_is(work: Path) -> None:
    models = [work / "one", work / "two"]
    out = merge("linear", models, out=work / "out")
    before = dates(out)
    assert merge("linear", models, out=out, resume=True) == out
    assert dates(out) == before
    with pytest.raises(CheckpointError, match="is there already"):
        merge("linear", models, out=out, weights=[1, 2], resume=True)


@pytest.mark.parametrize("torch_first", [False, True])
def test_every_file_of_the_folder_is_the_same_whatever_runs_it(work: Path, torch_first: bool) -> None:
    found = []
    for i, threads in enumerate((1, 2)):
        environment = {**os.environ, "PYTHONHASHSEED": str(i)}
        code = f"import torch; {ONCE}" if torch_first and i else ONCE
        arguments = ["run", str(work / "recipe.yaml"), str(work / f"out{i}"), "--threads", str(threads)]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(files(work / f"out{i}"))
    assert found[0] == found[1]
    assert len(found[0]) == 7
    assert b'"seconds"' not in found[0]["interfuse.json"]


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_run_of_another_recipe_goes_on_with_nothing_of_the_one_before(work: Path, end: str) -> None:
    """What is left may have files that the other recipe's output has not."""
    left = work / ".out.interfuse-part"
    run(work / "recipe.yaml", left, progress=False)
    (left / "journal.jsonl").write_text('{"plan": "another"}\n' if end == "stopped" else "")
    (left / "vocab.txt").write_text("of another model")
    merge("linear", [work / "one", work / "two"], out=work / "out", resume=True)
    merge("linear", [work / "one", work / "two"], out=work / "fresh")
    assert files(work / "out") == files(work / "fresh")


SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (10, 12), "layers.1.q": (12, 8), "layers.1.up": (10, 12)}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Two adapters with biases and a tensor saved whole, and a recipe that merges them."""
    draw = np.random.default_rng(0)
    for name, rank in (("a", 2), ("b", 3)):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"norm.weight": draw.standard_normal(8, np.float32)}
        for module, (rows, columns) in SHAPES.items():
            tensors[f"{module}.lora_A.weight"] = draw.standard_normal((rank, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = draw.standard_normal((rows, rank), np.float32)
            tensors[f"{module}.lora_B.bias"] = draw.standard_normal(rows, np.float32)
        save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q", "up"], "modules_to_save": ["norm"]}
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    (tmp_path / "recipe.yaml").write_text(f"""
merge_method: knots
models: [{tmp_path}/a, {tmp_path}/b]
parameters: {{combine: dare_ties, density: 0.5}}
seed: 3
""")
    return tmp_path


def test_a_merge_of_adapters_that_is_killed_at_any_step_is_resumed_to_the_same_folder(adapters: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER, str(adapters), "over"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    assert steps.count("pwrite") >= 2 * (2 * len(SHAPES) + len(SHAPES) + 1)  # beside, and in the adapter's file
    assert {"fsync", "rename", "replace", "unlink", "write_text"} <= set(steps)


def seen(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[str]:
    """The tensors that are written from now on, of which the one numbered `stop` is never noted: the run ends before."""
    added: list[str] = []
    note = AdapterWriter._note

    def noted(self: AdapterWriter, line: Any) -> None:
        added.extend([line["done"]] if "done" in line else [])
        if len(added) == stop:
            raise KeyboardInterrupt
        note(self, line)

    monkeypatch.setattr(AdapterWriter, "_note", noted)
    return added


def test_what_of_adapters_is_there_and_whole_is_not_made_again(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("knots", [adapters / "a", adapters / "b"])
    calls: list[str] = []
    from interfuse.engine.adapters import merging

    made = merging._merge_module
    wanted = files(merge_adapters(*given, adapters / "whole"))
    with monkeypatch.context() as stopping:
        seen(stopping, stop=4)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(*given, adapters / "out")
    left = adapters / ".out.interfuse-part"
    journal = (left / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 3

    def counted(*these: Any) -> None:
        calls.append(these[2])
        made(*these)

    monkeypatch.setattr(merging, "_merge_module", counted)
    for cut, again in [(0, 1), (5, 2)]:  # a line that the end cut short, too
        part = adapters / f".out{cut}.interfuse-part"
        part.mkdir()
        (part / ".factors").write_bytes((left / ".factors").read_bytes())
        text = (left / "journal.jsonl").read_text()
        (part / "journal.jsonl").write_text(text[: len(text) - cut])
        calls.clear()
        assert files(merge_adapters(*given, adapters / f"out{cut}", resume=True)) == wanted
        assert calls == list(SHAPES)[-again:]
    with (left / ".factors").open("r+b") as file:
        file.write(b"damage")
    calls.clear()
    assert files(merge_adapters(*given, adapters / "out", resume=True)) == wanted
    assert calls == list(SHAPES)


def another_scale(folder: Path) -> None:
    """The same factors, which count for more."""
    path = folder / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))


def another_seed(folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))


def another_bit(folder: Path) -> None:
    path = folder / "b" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def another_output(folder: Path) -> None:
    with (folder / "out" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55")


@pytest.mark.parametrize("change", [another_scale, another_seed, another_bit, another_output])
def test_another_merge_of_adapters_is_neither_gone_on_with_nor_taken_for_finished(
    adapters: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = adapters / "recipe.yaml", adapters / "out"
    run(recipe, out, progress=False)
    before = dates(out)
    assert run(recipe, out, resume=True, progress=False).before
    assert dates(out) == before
    assert verify(out, again=True, progress=False).good
    with monkeypatch.context() as stopping:
        seen(stopping, stop=4)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, adapters / "part", progress=False)
    change(adapters)
    with pytest.raises(CheckpointError, match="out: is there already"):
        run(recipe, out, resume=True, progress=False)
    assert not verify(out, progress=False).good or change is another_seed
    run(recipe, adapters / "part", resume=True, progress=False)
    run(recipe, adapters / "fresh", progress=False)
    assert files(adapters / "part") == files(adapters / "fresh")

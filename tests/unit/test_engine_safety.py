"""Merges of files: the same bytes whatever happens on the way, or a clear error and nothing at the output."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interfuse import merge
from interfuse.engine.output.journal import Journal
from interfuse.errors import CheckpointError

#: Writes slowly, so that a merge takes long enough to be killed in its middle.
DRIVER = """
import os, sys, time
from interfuse import merge
write = os.pwrite
def slow(*arguments): time.sleep(0.03); return write(*arguments)
os.pwrite = slow
folder, resume = sys.argv[1], sys.argv[2] == "resume"
paths = [f"{folder}/{name}.safetensors" for name in "abc"]
merge("ties", paths[1:], base=paths[0], out=f"{folder}/out", density=0.4, threads=2, resume=resume)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and two fine-tunes of it, of forty tensors."""
    draw = np.random.default_rng(0)
    base = {f"layers.{i}.w": draw.standard_normal((64, 96), np.float32) for i in range(40)}
    for name in "abc":
        moved = {k: v if name == "a" else v + draw.standard_normal(v.shape, np.float32) * 0.1 for k, v in base.items()}
        save_file(moved, tmp_path / f"{name}.safetensors")
    return tmp_path


def paths(folder: Path) -> list[str]:
    return [str(folder / f"{name}.safetensors") for name in "abc"]


def ties(folder: Path, out: str = "out", **options: Any) -> bytes:
    first, *others = paths(folder)
    found = merge("ties", others, base=first, out=folder / out, density=0.4, **options)
    return bytes((found / "model.safetensors").read_bytes())


def rest(folder: Path) -> list[str]:
    """What a run left beside its inputs."""
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def test_the_threads_do_not_change_a_byte(models: Path) -> None:
    assert len({ties(models, f"out{n}", threads=n) for n in (1, 2, 3)}) == 1


def noted(journal: Path) -> int:
    """How many tensors a run has written down as done."""
    with contextlib.suppress(FileNotFoundError):  # the run may end meanwhile
        return len(journal.read_text().splitlines()[1:])
    return 0


def test_a_killed_run_goes_on_and_gives_the_same_bytes(models: Path) -> None:
    expected = ties(models, "whole")
    whole = json.loads((models / "whole" / "interfuse.json").read_text())
    draw, out, partial = random.Random(0), models / "out", 0
    journal = models / ".out.interfuse-part" / "journal.jsonl"
    for turn in range(30):
        before = noted(journal)
        child = subprocess.Popen([sys.executable, "-c", DRIVER, str(models), "resume"], stderr=subprocess.PIPE)
        while turn % 2 and child.poll() is None and noted(journal) <= before:  # however busy the machine is
            time.sleep(0.01)
        time.sleep(
            draw.uniform(0.0, 0.2) if turn % 2 else draw.uniform(0.2, 1.2)
        )  # from before the first tensor to after the last
        child.send_signal(signal.SIGKILL)
        child.communicate()
        partial += noted(journal) > before
        if out.exists():
            assert (out / "model.safetensors").read_bytes() == expected
            for item in out.iterdir():
                item.unlink()
            out.rmdir()
    assert partial >= 5, "hardly a kill came in the middle of a merge"
    assert ties(models, resume=True) == expected
    assert json.loads((out / "interfuse.json").read_text())["output"] == whole["output"]
    assert rest(models) == []


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ties(models, "whole")
    written, write = 0, os.pwrite

    def full(handle: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="out: can't be written: No space left on device; free some space"):
            ties(models)
    assert not (models / "out").exists()
    lines = (models / ".out.interfuse-part" / "journal.jsonl").read_text().splitlines()
    assert 1 < len(lines) < 41
    assert ties(models, resume=True) == expected
    assert rest(models) == []


def test_a_journal_is_not_believed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ties(models, "whole")
    monkeypatch.setattr("interfuse.engine.output.folder._checked", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        ties(models)
    monkeypatch.undo()
    part = models / ".out.interfuse-part"
    with (part / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 500)
    with (part / "journal.jsonl").open("a") as file:
        file.write('{"tensor": "layers.0')
    assert ties(models, resume=True) == expected


def _interrupt(*arguments: Any) -> str:
    raise KeyboardInterrupt


def test_a_file_that_changes_on_the_way_is_an_error(models: Path) -> None:
    from interfuse.checkpoints.source import open_checkpoint

    checkpoint = open_checkpoint(models / "b.safetensors")
    checkpoint.read("layers.0.w")
    os.utime(models / "b.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match=r"b.safetensors: changed since it was opened"):
        checkpoint.read("layers.1.w")


def test_a_torch_file_that_changes_on_the_way_is_an_error(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("b", "c"):
        torch.save({"w": torch.randn(8, 8)}, models / f"{name}.pt")
    note = Journal.note

    def change(*arguments: Any) -> None:
        note(*arguments)
        os.utime(models / "c.pt", (1, 1))

    monkeypatch.setattr(Journal, "note", change)
    with pytest.raises(CheckpointError, match=r"c\.pt: changed since it was opened"):
        merge("linear", [models / "b.pt", models / "c.pt"], out=models / "out")
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}), ("ties", {"density": 0.1}), ("dare_ties", {"density": 0.1}), ("della", {"density": 0.3}),
        ("magmax", {}), ("consensus", {}), ("emr", {}), ("pcb", {}), ("iso_c", {}), ("karcher", {}),
    ],
)  # fmt: skip
def test_nan_in_a_model_is_named_even_where_a_trim_drops_it(method: str, options: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    base, good, bad = ({"w": draw.standard_normal((16, 16), np.float32)} for _ in range(3))
    bad["w"][3, 3] = np.nan
    ancestor = None if method in ("linear", "karcher") else base
    with pytest.raises(CheckpointError, match=r"models\[1\] \(dict\): tensor 'w': holds NaN or infinite values"):
        merge(method, [good, bad], base=ancestor, **options)


def test_what_the_disk_changed_is_noticed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def spoil(handle: int, data: memoryview, offset: int) -> int:
        bytes_ = bytearray(data)
        if len(bytes_) > 1000 and offset > 100_000:
            bytes_[17] ^= 4
        return write(handle, bytes_, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", spoil)
        with pytest.raises(CheckpointError, match=r"tensor 'layers\.\d+\.w': reads back otherwise than it was written"):
            ties(models)
    assert not (models / "out").exists()

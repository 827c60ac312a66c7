"""Writing: a file or folder is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from interfuse.checkpoints.header import STORAGE
from interfuse.checkpoints.source import TensorSpec, open_checkpoint
from interfuse.checkpoints.writer import MemoryWriter, TensorWriter, check_output, whole_folder
from interfuse.errors import CheckpointError

SPECS = {
    "mask": TensorSpec("BOOL", (3,)),
    "w": TensorSpec("F32", (2, 3)),
    "b": TensorSpec("BF16", (5,)),
    "n": TensorSpec("I64", ()),
    "empty": TensorSpec("F16", (0, 2)),
}


def arrays(specs: Mapping[str, TensorSpec] = SPECS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: (random.integers(0, 2, spec.shape)).astype(spec.storage).reshape(spec.shape) for name, spec in specs.items()}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    values = arrays()
    with TensorWriter(tmp_path / "m.safetensors", SPECS, {"format": "pt"}) as writer:
        for start in range(6):  # interleaved, one element at a time
            for name, array in values.items():
                writer.append(name, array.reshape(-1)[start : start + 1])
    got = load_file(tmp_path / "m.safetensors")
    assert got["b"].dtype == torch.bfloat16
    assert got["b"].view(torch.int16).numpy().tobytes() == values["b"].tobytes()
    for name in ("mask", "w", "n", "empty"):
        assert got[name].numpy().tolist() == values[name].tolist()
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(open_checkpoint(tmp_path / "m.safetensors").specs) == list(SPECS)
    assert os.listdir(tmp_path) == ["m.safetensors"]


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(sorted(STORAGE)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_any_header_comes_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, list[int]]]) -> None:
    specs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in content.items()}
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    with TensorWriter(path, specs) as writer:
        for name, spec in specs.items():
            writer.append(name, np.ones(spec.shape, spec.storage))
    checkpoint = open_checkpoint(path)
    assert checkpoint.specs == specs
    for name, spec in specs.items():
        assert checkpoint.read(name).tobytes() == np.ones(spec.shape, spec.storage).tobytes()


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "m.safetensors", SPECS) as writer:
        for name, array in arrays().items():
            writer.append(name, array)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    for name in SPECS:
        assert checkpoint.read(name).flags.aligned


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("x", np.zeros(1, np.float32), "tensor 'x' wasn't announced"),
        ("w", np.zeros(1, np.float64), "tensor 'w' got float64; F32[2, 3] takes float32"),
        ("w", np.zeros(7, np.float32), "tensor 'w' got 7 elements; F32[2, 3] takes 6"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        with TensorWriter(tmp_path / "m.safetensors", SPECS) as writer:
            writer.append(name, array)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        MemoryWriter(SPECS).append(name, array)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_the_format_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"a tensor can't be named {name!r}")):
        TensorWriter(tmp_path / "m.safetensors", {name: TensorSpec("F32", ())})


def test_a_tensor_that_did_not_come_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape("tensor 'w' got 2 elements; F32[2, 3] takes 6")) as caught:
        with TensorWriter(tmp_path / "m.safetensors", SPECS) as writer:
            writer.append("w", np.zeros(2, np.float32))
    assert len(caught.value.problems) == 4
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_an_older_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with TensorWriter(tmp_path / "m.safetensors", SPECS):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_text() == "old"


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert folder.parent == out.parent
        assert not out.exists()
    assert (out / "sub" / "a").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_files_and_folders_are_on_the_disk_before_they_take_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str | int] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def note_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    with TensorWriter(tmp_path / "m.safetensors", {"e": TensorSpec("F32", (0,))}):
        pass
    assert events == [(tmp_path / "m.safetensors").stat().st_ino, tmp_path.stat().st_ino]
    events.clear()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    out = tmp_path / "out"
    assert events == [(out / "a").stat().st_ino, out.stat().st_ino, "rename", tmp_path.stat().st_ino]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail_after_a_file() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_a_file()
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with whole_folder(out) as folder:  # an empty one is free
        (folder / "old").write_text("x")
    with pytest.raises(CheckpointError, match="is there already; choose another folder, or give --overwrite"):
        with whole_folder(out):
            pass
    with pytest.raises(ZeroDivisionError):
        with whole_folder(out, overwrite=True):
            _ = 1 / 0
    assert os.listdir(out) == ["old"]
    with whole_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
        assert os.listdir(out) == ["old"]
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_older_folder_comes_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    rename = os.rename
    calls = []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        with whole_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]


@pytest.mark.parametrize("ended", ["between", "after"])
def test_a_run_that_was_ended_while_it_replaced_a_folder_loses_nothing(tmp_path: Path, ended: str) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.interfuse-part.old"
    for folder in [out, old] if ended == "after" else [old]:
        folder.mkdir()
        (folder / ("new" if folder == out else "old")).write_text("x")
    with pytest.raises(CheckpointError, match="is there already"):
        with whole_folder(out):
            pass
    if ended == "between":
        assert os.listdir(out) == ["old"]
    with whole_folder(out, overwrite=True) as folder:
        (folder / "newest").write_text("x")
    assert os.listdir(out) == ["newest"]
    assert os.listdir(tmp_path) == ["out"]


def test_files_folders_in_use_and_inputs_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    source = tmp_path / "models" / "a"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source.parent)
    for path, message in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "sub", "can't be made: "),
        (source.parent, "the current folder, or one that holds it"),
        (tmp_path, "the current folder, or one that holds it"),
        (source, f"the output would replace the input {source}"),
        (tmp_path / "link", f"the output would replace the input {source}"),
        (source / "out", f"the output would lie in the input {source}"),
        (tmp_path / "link" / "deep" / "out", f"the output would lie in the input {source}"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            with whole_folder(path, overwrite=True, inputs=[source]):
                pass
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "models"]


def test_memory_keeps_what_it_is_given() -> None:
    writer = MemoryWriter(SPECS)
    values = arrays()
    for name, array in values.items():
        for element in array.reshape(-1):
            writer.append(name, np.array([element]))
    for name, array in values.items():
        assert writer.tensors[name].tolist() == array.tolist()
        assert writer.tensors[name].dtype == SPECS[name].storage


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out: can't be written: No space left on device; free some space"):
        with whole_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_the_disk_has_no_room_for_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_500_000))
    out = tmp_path / "new" / "out"
    with pytest.raises(CheckpointError) as caught:
        with whole_folder(out, nbytes=2_000_000):
            pass
    said = f"{out}: needs 2 MB, and 1.5 MB are free at {tmp_path}; free some space, or choose a folder on another disk"
    assert str(caught.value) == said
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    (out / "old").write_bytes(bytes(1_000_000))  # it stays until the new one is in place
    with pytest.raises(CheckpointError, match=r"is there already(.|\n)*1\.5 MB are free"):
        check_output(out, nbytes=2_000_000)
    with pytest.raises(CheckpointError, match=r"needs 2 MB, and 1\.5 MB are free"):
        check_output(out, overwrite=True, nbytes=2_000_000)
    check_output(out, overwrite=True, nbytes=1_500_000)


def test_what_a_killed_run_has_left_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_500_000))
    (tmp_path / ".out.interfuse-part").mkdir()
    (tmp_path / ".out.interfuse-part" / "model.safetensors").write_bytes(b"x" * 1_000_000)
    check_output(tmp_path / "out", nbytes=2_000_000)
    with pytest.raises(CheckpointError, match=r"needs 3 MB, and 2\.5 MB are free"):
        check_output(tmp_path / "out", nbytes=3_000_000)


def test_a_file_that_the_disk_takes_no_more_of_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be written: File too large"):
        with whole_folder(tmp_path / "out"):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert os.listdir(tmp_path) == []

"""Torch's own files: read where their tensors lie, as .safetensors files are, and never mapped."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interfuse import merge
from interfuse.checkpoints.places import Resident, Stored, Strided
from interfuse.checkpoints.source import open_checkpoint
from interfuse.checkpoints.tensors import to_array
from interfuse.errors import CheckpointError

TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def state() -> dict[str, torch.Tensor]:
    """Tensors of every type and of every way to lie in a storage."""
    table = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    tensors = {f"of.{str(kind).removeprefix('torch.')}": (table * 3).to(kind) for kind in TYPES}
    return tensors | {
        "table": table, "tied": table, "rows": table[3:9], "turned": table.t(), "columns": table[:, 3:9],
        "spread": table[:1].expand(5, 24), "number": torch.tensor(3.5), "one": table[2, 3], "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(table[1].clone()),
    }  # fmt: skip


def agree(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    there = open_checkpoint(path)
    assert list(there.specs) == list(wanted)
    for name, tensor in wanted.items():
        expected = to_array(tensor)
        found = there.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert found.tobytes() == expected.tobytes(), name
        pieces = [there.block(name, i, min(i + 7, expected.size)) for i in range(0, expected.size, 7)]
        assert b"".join(piece.tobytes() for piece in pieces) == expected.tobytes(), name


@pytest.mark.parametrize("ending", [".pt", ".bin", ".pth", ".ckpt"])
@pytest.mark.parametrize("under", [None, "state_dict", "model_state_dict", "model"])
def test_every_tensor_is_read_where_it_lies(tmp_path: Path, ending: str, under: str | None) -> None:
    path = tmp_path / f"x{ending}"
    torch.save(state() if under is None else {under: collections.OrderedDict(state()), "step": 3}, path)
    agree(path, state())
    places = open_checkpoint(path).places
    apart = {"turned", "columns", "spread"}
    assert {name for name, place in places.items() if isinstance(place, Strided)} == apart
    assert {name for name, place in places.items() if isinstance(place, Stored)} == state().keys() - apart


def test_a_large_transposed_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.arange(600.0).reshape(20, 30).t()}, tmp_path / "x.pt")
    there, reads = open_checkpoint(tmp_path / "x.pt"), []
    read = os.preadv

    def counted(*given: Any) -> int:
        reads.append(given)
        return read(*given)

    monkeypatch.setattr(os, "preadv", counted)
    for i in range(10):
        there.block("w", i, i + 1)
    assert len(reads) == 1


def squeezed(path: Path) -> None:
    """The same file with compressed records."""
    with zipfile.ZipFile(path) as old:
        content = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


@pytest.mark.parametrize("form", ["before torch 1.6", "conjugate", "sparse beside it"])
def test_other_forms_are_loaded_whole(tmp_path: Path, form: str) -> None:
    path, wanted = tmp_path / "x.pt", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    if form == "conjugate":
        wanted["c"] = (torch.ones(3, dtype=torch.complex64) * (1 + 2j)).conj()
    if form == "sparse beside it":
        torch.save({"state_dict": wanted, "other": torch.eye(3).to_sparse()}, path)
    else:
        torch.save(wanted, path, _use_new_zipfile_serialization=form != "before torch 1.6")
    agree(path, wanted)
    loaded = {name for name, place in open_checkpoint(path).places.items() if isinstance(place, Resident)}
    assert loaded == {"before torch 1.6": {"a", "b"}, "conjugate": {"c"}, "sparse beside it": set()}[form]


def test_a_compressed_file_is_not_read_as_if_it_were_not(tmp_path: Path) -> None:
    wanted = {"a": torch.zeros(50, 50)}
    torch.save(wanted, tmp_path / "x.pt")
    squeezed(tmp_path / "x.pt")
    agree(tmp_path / "x.pt", wanted)


def test_a_shape_that_the_file_has_no_bytes_for_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        content = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name, data in content.items():
            new.writestr(name, data[:8] if name.endswith("data/1") else data)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        open_checkpoint(tmp_path / "x.pt").read("b")


CUT = """
import os, sys
from interfuse import merge
from interfuse.engine.output.journal import Journal
from interfuse.errors import CheckpointError
first, second, out = sys.argv[1:]
note, seen = Journal.note, []
def cut(*given):
    note(*given)
    if not seen:
        seen.append(os.truncate(second, os.path.getsize(second) // 3))
Journal.note = cut
try:
    merge("linear", [first, second], out=out, threads=1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors"])
def test_a_file_that_is_cut_short_on_the_way_is_an_error(tmp_path: Path, ending: str) -> None:
    save: Any = save_file if ending == ".safetensors" else torch.save
    for name in "xy":
        save({f"layers.{i}.w": torch.full((300, 700), float(i)) for i in range(8)}, tmp_path / f"{name}{ending}")
    paths = [str(tmp_path / name) for name in (f"x{ending}", f"y{ending}", "out")]
    done = subprocess.run([sys.executable, "-c", CUT, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # SIGBUS is -7
    assert done.stdout == f"{paths[1]}: changed since it was opened; run again when nothing else writes to it\n"
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=r"x\.pt: can't be read as plain weights"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_merge_of_torch_files_gives_the_bytes_of_one_of_safetensors(tmp_path: Path) -> None:
    for name in "xy":
        values = {
            "w": torch.randn(300, 500),
            "h": torch.randn(40, 40).bfloat16(),
            "t": torch.randn(30, 60).t(),
            "n": torch.tensor(7),
        }
        torch.save(values, tmp_path / f"{name}.pt")
        save_file({key: value.contiguous() for key, value in values.items()}, tmp_path / f"{name}.safetensors")
    outs = [
        merge("linear", [tmp_path / f"x{end}", tmp_path / f"y{end}"], out=tmp_path / f"out{end}", weights=[0.3, 0.7])
        for end in (".pt", ".safetensors")
    ]
    first, second = (open_checkpoint(out) for out in outs)
    assert all(np.array_equal(first.read(name), second.read(name)) for name in first.specs)
    assert first.specs == second.specs

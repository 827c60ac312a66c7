"""Kernels that a later process loads as machine code: nothing in them may need what only Numba's own process has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interfuse.engine import native

LOOPS = Path(__file__).parents[2] / "src" / "interfuse" / "engine" / "loops"

#: A merge whose cuts go by histograms, as the sample finds no bracket: most entries are near 0, and a few lie far off.
MERGE = """
import numpy as np
import interfuse
random = np.random.default_rng(0)
factors = [(random.standard_normal((576, 8)), random.standard_normal((8, 1536))) for _ in range(2)]
models = [{"w": (up @ down).astype(np.float32)} for up, down in factors]
base = {"w": np.zeros((576, 1536), np.float32)}
print(float(np.abs(interfuse.merge("ties", models, base=base, density=0.5)["w"]).sum()))
"""


def test_a_second_process_merges_as_the_first_did() -> None:
    done = [subprocess.run([sys.executable, "-c", MERGE], capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done[1].stderr
    assert done[0].stdout == done[1].stdout != ""


@pytest.mark.parametrize("path", sorted(LOOPS.glob("*.py")), ids=lambda path: path.stem)
def test_no_loop_makes_an_array(path: Path) -> None:
    """Making one takes Numba's own memory, which kept code doesn't have: the call would end the process."""
    text = path.read_text()
    inside = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    made = [line for line in inside for name in ("abs", "empty", "zeros", "ones", "copy") if f"np.{name}(" in line]
    assert made == []


def folders(home: Path, count: int) -> list[Path]:
    """Folders of code, the first used longest ago."""
    made = [home / f"{i:016x}" for i in range(count)]
    for i, folder in enumerate(made):
        folder.mkdir(parents=True)
        (folder / "loop-0").write_bytes(b"code")
        os.utime(folder, (i + 1, i + 1))
    return made


def test_code_that_was_used_last_is_kept_and_older_code_removed(tmp_path: Path) -> None:
    made = folders(tmp_path / "kernels", native._MOST + 3)
    other = tmp_path / "kernels" / "notes"
    other.mkdir()
    native._used.cache_clear()
    native._used(made[0])  # the oldest comes into use
    assert {*(tmp_path / "kernels").iterdir()} == {made[0], other, *made[4:]}
    assert len(made[4:]) == native._MOST - 1


def test_code_that_another_process_removes_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = native.Code("f", b"code", ())
    mine = tmp_path / f"{1:016x}"
    monkeypatch.setattr(native, "_folders", lambda: [mine])
    native._keep("loop", code)
    assert native._kept("loop") == code
    shutil.rmtree(mine)
    assert native._kept("loop") is None
    native._keep("loop", code)
    assert native._kept("loop") == code


def test_processes_may_all_remove_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another has just removed is no error; here it goes between the list and the look at each."""
    made = folders(tmp_path, native._MOST + 3)
    removed: list[Path] = []
    remove = shutil.rmtree

    def twice(path: Path, **options: Any) -> None:
        removed.append(path)
        remove(path)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", twice)
    native._used.cache_clear()
    native._used(made[-1])
    assert sorted(removed) == made[:3]

"""Files that are cut short while they are mapped: in processes of their own, which a failure would end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is guarded elsewhere")

READ = """
import os, sys, threading
import numpy as np
from interfuse.checkpoints.cut import unbroken
from interfuse.checkpoints.source import open_checkpoint
from interfuse.errors import CheckpointError
one, other = (open_checkpoint(path) for path in sys.argv[1:3])
views = [one.read("w"), other.read("w")]
def look(view): print(int(np.count_nonzero(view)), flush=True)
try:
    with unbroken(one.files()), unbroken([]):
        for number in map(int, sys.argv[3]):
            os.truncate(sys.argv[1 + number], 8192)
            threads = [threading.Thread(target=look, args=(views[number],)) for _ in range(3)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
except CheckpointError as error:
    print(error, flush=True)
if len(sys.argv) > 4:
    os.truncate(sys.argv[1], 4096)
    look(open_checkpoint(sys.argv[2]).read("w") if sys.argv[4] == "other" else views[1 - number])
"""

MERGE = """
import os, sys
from interfuse import merge
from interfuse.engine.reading import Reader
from interfuse.errors import CheckpointError
stream, calls = Reader.stream, []
def cutting(self, *arguments):
    found = stream(self, *arguments)
    calls.append(None)
    if len(calls) == int(sys.argv[3]):
        os.truncate(sys.argv[2], 8192)
    return found
Reader.stream = cutting
try:
    merge("ties", sys.argv[1:3], base=sys.argv[1], out=sys.argv[4], density=0.4, threads=2)
except CheckpointError as error:
    print(error)
print(len(calls))
"""


def ran(code: str, *arguments: object) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one tensor of ones."""
    for name in ("one", "other"):
        save_file({"w": np.ones((512, 256), np.float32)}, tmp_path / f"{name}.safetensors")
    return tmp_path / "one.safetensors", tmp_path / "other.safetensors"


def test_a_cut_file_reads_as_zeros_and_is_named(files: tuple[Path, Path]) -> None:
    status, (*counts, error) = ran(READ, *files, "0")
    assert status == 0
    assert error == f"{files[0]}: was cut short or can't be read any more; run again when nothing else writes to it"
    left = (8192 - files[0].stat().st_size % 4096 - 100) // 4  # what the first two pages hold, the header aside
    assert len(counts) == 3
    assert all(0 < int(count) < 2048 and left for count in counts)


def test_a_cut_file_of_somebody_elses_ends_the_process_as_ever(files: tuple[Path, Path]) -> None:
    assert ran(READ, *files, "1") == (-signal.SIGBUS, [])


def test_nothing_is_guarded_once_the_work_is_done(files: tuple[Path, Path]) -> None:
    code = READ.replace("os.truncate(sys.argv[1], 4096)", "os.truncate(sys.argv[2], 4096)")
    status, lines = ran(code, *files, "0", "it")
    assert status == -signal.SIGBUS
    assert len(lines) == 4


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_model_that_is_cut_under_a_kernel_is_an_error_and_no_output(files: tuple[Path, Path], call: int) -> None:
    out = files[0].parent / "out"
    status, lines = ran(MERGE, *files, call, out)
    assert status == 0
    assert lines[0].startswith(f"{files[1]}: ")
    assert not out.exists()
    assert int(lines[-1]) >= call

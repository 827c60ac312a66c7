"""Kernels that a later process loads as machine code: nothing in them may need what only Numba's own process has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_second_process_merges_as_the_first_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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

"""What tests of recipes share: code that builds networks, data of three classes, and what is found wrong with a recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from interfuse.errors import RecipeError
from interfuse.models import load_model
from interfuse.pipeline import run

#: The module of networks in `folder_of`'s folder.
MODULE = "recipenets"
#: Networks of `layers` that start from a seed, for the code of `folder_of`.
SEEDED = """
import torch
from torch import nn

def _seeded(seed, *layers):
    torch.manual_seed(seed)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return nn.Sequential(*layers)
"""


def folder_of(code: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fixture's part: the folder with that code as `MODULE`; it is the current folder until the test ends."""
    (folder / f"{MODULE}.py").write_text(code)
    patch.chdir(folder)
    yield folder
    sys.modules.pop(MODULE, None)


def quadrants(draw: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four numbers, and how many of the first two are positive: 0, 1 or 2."""
    x = draw.normal(size=(count, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)


def net(function: str, **more: Any) -> dict[str, Any]:
    """A recipe's entry of the network that a function of `MODULE` builds."""
    return {"model": f"python:{MODULE}:{function}", **more}


def built(function: str) -> nn.Module:
    """That network."""
    return load_model(f"python:{MODULE}:{function}", trust_code=True)


def problems(recipe: dict[str, Any]) -> dict[str, str]:
    """What is wrong, by where; nothing is written."""
    with pytest.raises(RecipeError) as raised:
        run(recipe, "none", trust_code=True)
    assert not Path("none").exists()
    return {problem.path: problem.wrong for problem in raised.value.problems}

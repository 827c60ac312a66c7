"""Whether weights came out of a merge: what was measured of its parents (BatchNorm's statistics) isn't true of them.

A network in memory has a mark, a folder says it in `interfuse.json`. What follows from it is for who trains it.
"""

from __future__ import annotations

import json
from pathlib import Path

#: The attribute of a module that came out of a merge.
MERGED = "_merged_by_interfuse"


def is_merge(weights: str | Path) -> bool:
    """Whether a folder, or a file in it, was written by a merge."""
    folder = Path(str(weights).partition("#")[0]).expanduser()
    try:
        about = json.loads(((folder if folder.is_dir() else folder.parent) / "interfuse.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("kind") == "merge"

"""Whether a folder is the finished output of a merge that is asked for again, as after a run that was killed at its very end.

A name and a date prove nothing here: the recipe and the plan must be those of the record, and every tensor that was read or
written, and every small file, must have the hash that the record says. What is wrong with a folder isn't looked for (that's
`interfuse verify`): it just isn't finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.adapters.pairs import WEIGHTS
from interfuse.checkpoints.hashes import file_hashes, lines_of
from interfuse.checkpoints.source import Checkpoint, hash_block, hash_blocks, hash_of, open_checkpoint, open_folder
from interfuse.engine.separate import same_heads
from interfuse.errors import UserError
from interfuse.plan import Plan


def finished(
    folder: Path,
    plan: Plan,
    sources: Sequence[Checkpoint],
    recipes: Sequence[Mapping[str, Any]],
    *,
    compat: bool = False,
    allow_nonfinite: bool = False,
) -> dict[str, Any] | None:
    """What `interfuse.json` in `folder` says, if a merge as `merge_into` would do it has given all that is there; else None.

    The arguments are those of `merge_into`. Inputs and output are read whole, once.
    """
    asked: dict[str, Any] = {"kind": "merge", "recipes": list(recipes), "plan": plan.digest()}
    asked |= {"mergekit_compat": compat, "allow_nonfinite": allow_nonfinite}
    try:
        record: dict[str, Any] = json.loads((folder / "interfuse.json").read_text(encoding="utf-8"))
        if {key: record[key] for key in asked} != json.loads(json.dumps(asked)):
            return None
        known = [_read_hash(source, said) == said["xxh3"] for source, said in zip(sources, record["sources"], strict=True)]
        known.append(same_heads(folder, sources, recipes[-1]))
        there = open_folder(folder, stems=sources[plan.lead].stems)
        files = file_hashes(folder, [file.path for file in there.files()])
        whole = lines_of(there) == record["tensors"] and record["files"].items() <= files.items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None
    return record if whole and all(known) else None


def finished_adapter(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """`finished` of a merge of adapters: `asked` is what its record says of how it is made, its inputs' hashes included."""
    try:
        record: dict[str, Any] = json.loads((folder / "interfuse.json").read_text(encoding="utf-8"))
        if {key: record[key] for key in asked} != json.loads(json.dumps(asked)):
            return None
        there = open_checkpoint(folder / WEIGHTS)
        files = file_hashes(folder, [file.path for file in there.files()])
        whole = lines_of(there) == record["tensors"] and record["files"].items() <= files.items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None
    return record if whole else None


def _read_hash(source: Checkpoint, said: Mapping[str, Any]) -> str:
    """The hash of the tensors of a model that the record says were read."""
    names = [name for name in source.specs if name not in said.get("unread", ())]
    return hash_of({name: (source.specs[name], hash_blocks(map(hash_block, source.blocks(name)))) for name in names})

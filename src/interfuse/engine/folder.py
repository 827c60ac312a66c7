"""A merge from files to a folder: weights at their offsets, everything that comes along, and how it was made.

The folder is one that appears by rename (`checkpoints.writer.whole_folder`); with a journal in it, a run that was killed
goes on. What was written is read back before it counts.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import interfuse
from interfuse.checkpoints.config import output_config
from interfuse.checkpoints.folders import TORCH, is_weights, split
from interfuse.checkpoints.layers import find_layers
from interfuse.checkpoints.numbers import FLOATS
from interfuse.checkpoints.remote import OTHER_FORMS
from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import Checkpoint, hash_block, hash_of, open_folder
from interfuse.engine.journal import Journal
from interfuse.engine.local import execute
from interfuse.engine.merging import Merging
from interfuse.engine.opening import fetch
from interfuse.engine.reading import ranges_of
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import Plan, config_of
from interfuse.registry import find

#: What speaks of the copied model alone: its card, and how it was itself made.
_ITS_OWN = ("README.md", "interfuse.json")
_LARGEST_SIDE_FILE = 64 * 2**20


def merge_into(
    plan: Plan,
    sources: Sequence[Checkpoint],
    folder: Path,
    *,
    recipes: Sequence[Mapping[str, Any]],
    threads: int | None = None,
    allow_nonfinite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the plan into `folder`, which is there; what `interfuse.json` then says.

    Weights are `model.safetensors`, or shards with an index, in each sub-folder that the plan's lead has weights in; config,
    tokenizer and other small files come from that. What isn't on this machine is fetched first. Whatever is wrong with the
    data is a `CheckpointError`.
    """
    fetch(plan, sources, shown=progress)
    lead = sources[plan.lead]
    stems = {inner: stem for inner, stem, _ in split(list(plan.specs), lead.stems)}
    journal = Journal(folder, plan, sources, stems, resume=resume)
    with ShardWriter(folder, plan.specs, stems=stems) as writer:
        merging = execute(
            plan, sources, writer,
            threads=threads, allow_nonfinite=allow_nonfinite, progress=progress,
            done=journal.note, skip=lambda output: output.name in journal.done,
        )  # fmt: skip
    journal.restore(merging)
    output_hash = _read_back(folder, plan, merging, stems)
    journal.close()
    left_out = _copy_side_files(lead.folder, folder, list(stems)) if lead.folder else []
    notes = _set_config(folder / "config.json", plan, sources)
    made = provenance(plan, sources, merging, recipes)
    record = {**made, "notes": [*made["notes"], *notes], "output": output_hash, "left_out": left_out}
    (folder / "interfuse.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _read_back(folder: Path, plan: Plan, merging: Merging, stems: Mapping[str, str]) -> str:
    """Compare the files with what was meant to be in them: names, types, shapes, and every block's hash; the whole hash."""
    there = open_folder(folder, stems=stems)
    wrong = [name for name, spec in plan.specs.items() if there.specs.get(name) != spec]
    wrong += [name for name in there.specs if name not in plan.specs]
    blocks: dict[str, list[bytes]] = {}
    for name, spec in there.specs.items():
        written = merging.written.get(name, {})
        found = {span: hash_block(there.block(name, *span)) for span in sorted(written)}
        if found != written or sum(stop - start for start, stop in written) != spec.count:
            wrong.append(name)
        usual = ranges_of(spec.count)
        same = list(found) == usual
        blocks[name] = [found[span] if same else hash_block(there.block(name, *span)) for span in usual]
    if wrong:
        shown = ", ".join(map(repr, list(dict.fromkeys(wrong))[:5]))
        raise CheckpointError(Problem(str(folder), f"reads back otherwise than it was written: {shown}", "check the disk"))
    return hash_of({name: (spec, blocks[name]) for name, spec in there.specs.items()})


def provenance(
    plan: Plan, sources: Sequence[Checkpoint], merging: Merging, recipes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `interfuse.json` says: enough to run the merge again, and to know that it was these models.

    `recipes` is the merge's, behind those whose results it uses.
    """
    method = find(plan.method, "weights")
    return {
        "kind": "merge",
        "method": plan.method,
        "recipes": list(recipes),
        "seed": plan.seed,
        "sources": [{"model": s.name, "xxh3": read_hash(s, i, merging)} for i, s in enumerate(sources)],
        "dtypes": sorted({output.spec.dtype for output in plan.outputs}),
        "plan": plan.digest(),
        "notes": list(plan.notes),
        "papers": [method.paper] if method.paper else [],
        "versions": {"interfuse": interfuse.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def read_hash(source: Checkpoint, number: int, merging: Merging) -> str:
    """The hash of what was read of a source: of all of it where nothing was left out."""
    names = [name for i, name in merging.read if i == number]
    read = {name: (source.specs[name], [block for _, block in sorted(merging.read[number, name].items())]) for name in names}
    return hash_of(read)


def _copy_side_files(source: Path, folder: Path, merged: Sequence[str]) -> list[str]:
    """Copy config, tokenizer, code, sub-folders and the like; what was left behind, weights in `merged` ones aside."""
    left_out: list[str] = []
    for item in sorted(source.iterdir()):
        if item.name.startswith(".") or item.name in _ITS_OWN or (folder / item.name).is_file():
            continue
        if item.name.startswith("checkpoint-"):  # what a trainer kept on the way
            left_out.append(item.name)
        elif item.is_dir():
            left_out += [f"{item.name}/{name}" for name in _copy_folder(item, folder / item.name, merged)]
        elif is_weights(item.name) or item.name.endswith((*TORCH, *OTHER_FORMS)):
            continue
        elif not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE:
            left_out.append(item.name)
        else:
            shutil.copyfile(item, folder / item.name)
    return left_out


def _copy_folder(source: Path, folder: Path, merged: Sequence[str]) -> list[str]:
    """Copy a sub-folder's small files, weights among them that aren't merged; what was left behind: other forms, large ones."""
    left_out = []
    ours = f"{source.name}/" in merged
    for item in sorted(source.rglob("*")):
        name = item.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if item.is_dir() or hidden or (ours and len(name.parts) == 1 and is_weights(item.name)):
            continue
        if not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE or item.name.endswith(OTHER_FORMS):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item, folder / name)
    return left_out


def _set_config(path: Path, plan: Plan, sources: Sequence[Checkpoint]) -> list[str]:
    """Count the output's layers in its config, rebuild what is listed for each, and say its type; what is to be noted.

    A config of which nothing changes stays as it is, to the byte.
    """
    configs = [config_of(source) for source in sources]
    config = configs[plan.lead]
    if not path.is_file() or config is None:
        return []
    stored = list(dict.fromkeys(output.spec.dtype for output in plan.outputs if output.how == "merge"))
    dtype = next((name for name, kind in FLOATS.items() if [kind] == stored), None)
    before = {stack.head: stack.count for stack in find_layers(sources[plan.lead].specs).stacks}
    layers = {head: picks for head, picks in plan.layers if before.get(head, len(picks)) != len(picks) or _moved(picks, plan)}
    made, notes = output_config(configs, plan.lead, layers, before, dtype=dtype)
    if made != config:
        path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return notes


def _moved(picks: Sequence[tuple[int, int]], plan: Plan) -> bool:
    """Whether a stack's layers are others than the lead's own, in their order."""
    return any(source != plan.lead or layer != i for i, (source, layer) in enumerate(picks))

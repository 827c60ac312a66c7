"""A merge from files to a folder: weights at their offsets, everything that comes along, and how it was made.

The folder is one that appears by rename (`checkpoints.writer.whole_folder`); with a journal in it, a run that was killed
goes on. What was written is read back before it counts.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import interfuse
from interfuse.checkpoints.config import changed, output_config
from interfuse.checkpoints.folders import MODULES, PIPELINE, TORCH, inner_of, is_weights, split
from interfuse.checkpoints.hashes import file_hashes, tensor_lines
from interfuse.checkpoints.layers import find_layers
from interfuse.checkpoints.numbers import FLOATS
from interfuse.checkpoints.remote.headers import OTHER_FORMS
from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import Checkpoint, hash_of, open_folder
from interfuse.checkpoints.tasks import FOLDER as TASKS
from interfuse.checkpoints.tasks import TABLE
from interfuse.checkpoints.tokenizers.tokenizer import decode, encode
from interfuse.engine.local import execute
from interfuse.engine.merging import Merging
from interfuse.engine.opening import fetch
from interfuse.engine.output.card import write_merge_card
from interfuse.engine.output.journal import Journal
from interfuse.engine.output.proof import missing_parts, proof
from interfuse.engine.per_task import write_tasks
from interfuse.engine.separate import write_heads
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import Output, Plan, config_of
from interfuse.registry import find

#: What speaks of the copied model alone: its card, and how it was itself made.
_ITS_OWN = ("README.md", "interfuse.json")
_LARGEST_SIDE_FILE = 64 * 2**20
#: What of a model is parsed whoever it is linked to.
_READ = ("config.json", PIPELINE, MODULES)


def merge_into(
    plan: Plan,
    sources: Sequence[Checkpoint],
    folder: Path,
    *,
    recipes: Sequence[Mapping[str, Any]],
    compat: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    resume: bool = False,
    progress: bool = True,
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the plan into `folder`, which is there; what `interfuse.json` then says.

    Weights are `model.safetensors`, or shards with an index, in each sub-folder that the plan's lead has weights in; config,
    tokenizer and other small files come from that. What isn't on this machine is fetched first. `compat` says that the plan
    was made so; `device` as in `execute`; `config` is the output's where it doesn't follow from the lead's. Whatever is wrong
    with the data is a `CheckpointError`, and so is an output that wouldn't load (`proof`).
    """
    fetch(plan, sources, shown=progress)
    lead = sources[plan.lead]
    stems = {inner: stem for inner, stem, _ in split(list(plan.specs), lead.stems)}
    beside, notes = files_beside(plan, sources)
    beside |= {} if config is None else {"config.json": encode(config)}
    with proof(plan.specs, lead, beside, sources) as loading:
        journal = Journal(folder, plan, sources, stems, resume=resume)

        def done(output: Output, merging: Merging) -> None:
            journal.note(output, merging)
            loading.look()

        with ShardWriter(folder, plan.specs, stems=stems) as writer:
            merging = execute(
                plan, sources, writer,
                threads=threads, allow_nonfinite=allow_nonfinite, progress=progress, device=device,
                done=done, skip=lambda output: output.name in journal.done,
            )  # fmt: skip
        journal.restore(merging)
        there = _checked(folder, plan, merging, stems)
        write_tasks(plan, merging, folder, recipes[-1], threads=threads)
        write_heads(plan, sources, folder, recipes[-1], progress=progress)
        loading.finish()
        journal.close()
    left_out = copy_side_files(lead.folder, folder, list(stems)) if lead.folder else []
    linked = [name for name in left_out if lead.folder and links_out(lead.folder / name, lead.folder)]
    notes += [f"{name} is a link out of {lead.name}, and was left out" for name in linked]
    _put(folder, beside)
    made = provenance(plan, sources, merging, recipes)
    written = {name: (spec, merging.written[name]) for name, spec in there.specs.items()}
    record = {
        **made,
        "notes": [*made["notes"], *notes, *loading.notes, *missing_parts(folder)],
        "left_out": left_out,
        **({"tokenizer_origins": plan.wording.origins} if plan.wording and plan.wording.origins else {}),
        "mergekit_compat": compat,
        "allow_nonfinite": allow_nonfinite,
        "loads": loading.said,
        "output": hash_of(written),
        "files": file_hashes(folder, [file.path for file in there.files()]),
        "tensors": tensor_lines(written),
    }
    (folder / "interfuse.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_merge_card(folder, plan, sources, recipes)
    return record


def _checked(folder: Path, plan: Plan, merging: Merging, stems: Mapping[str, str]) -> Checkpoint:
    """The output. Its tensors have been read back; its headers are here."""
    there = open_folder(folder, stems=stems)
    wrong = [name for name, spec in plan.specs.items() if there.specs.get(name) != spec or name not in merging.written]
    wrong += [name for name in there.specs if name not in plan.specs]
    if wrong:
        shown = ", ".join(map(repr, wrong[:5]))
        raise CheckpointError(Problem(str(folder), f"reads back otherwise than it was written: {shown}", "check the disk"))
    return there


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
        "sources": [{"model": s.name, **s.origins(), **read_hash(s, i, merging)} for i, s in enumerate(sources)],
        "dtypes": sorted({output.spec.dtype for output in plan.outputs}),
        "plan": plan.digest(),
        "notes": list(plan.notes),
        "papers": [method.paper] if method.paper else [],
        "versions": {"interfuse": interfuse.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def read_hash(source: Checkpoint, number: int, merging: Merging) -> dict[str, Any]:
    """The hash of what was read of a source, and the names of what wasn't, where there is such."""
    read = {name: (source.specs[name], found) for (i, name), found in merging.read.items() if i == number}
    unread = [name for name in source.specs if name not in read]
    return {"xxh3": hash_of(read), **({"unread": unread} if unread else {})}


def copy_side_files(source: Path, folder: Path, merged: Sequence[str]) -> list[str]:
    """Copy config, tokenizer, code, sub-folders and the like; what was left behind, the merged weights aside.

    A link is followed within the model's folder and to the blobs of its hub cache; one that leads elsewhere is left behind,
    for whoever made the model could link any file of this machine. What is parsed before it is copied, the model's own
    `config.json`, `model_index.json` and `modules.json`, may lie anywhere, and so may weights, which aren't copied.
    """
    left_out: list[str] = []
    for item in sorted(source.iterdir()):
        if item.name.startswith((".", "__pycache__")) or item.name in _ITS_OWN or (folder / item.name).is_file():
            continue
        if item.name == TASKS and (item / TABLE).is_file():  # masks of another trunk
            continue
        trained = item.name.startswith("checkpoint-")  # what a trainer kept on the way
        if trained or (links_out(item, source) and not (item.is_file() and item.name in _READ) and not is_weights(item.name)):
            left_out.append(item.name)
        elif item.is_dir():
            left_out += [f"{item.name}/{name}" for name in _copy_folder(item, folder / item.name, merged)]
        elif is_weights(item.name) or item.name.endswith(TORCH):
            continue
        elif not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE or item.name.endswith(OTHER_FORMS):
            left_out.append(item.name)
        else:
            shutil.copyfile(item, folder / item.name)
    return left_out


def links_out(item: Path, home: Path) -> bool:
    """Whether a link leads out of the model's folder, and not to where a hub's cache keeps that model's files."""
    real, home = Path(os.path.realpath(item)), home.resolve()
    blobs = [place.parent.parent / "blobs" for place in (home, *home.parents) if place.parent.name == "snapshots"]
    return not any(place in real.parents for place in (home, *blobs))


def _refuse(error: OSError) -> None:
    """A folder that can't be listed isn't passed over."""
    raise error


def _copy_folder(source: Path, folder: Path, merged: Sequence[str]) -> list[str]:
    """Copy a sub-folder's small files, weights among them that aren't merged; what was left behind: other forms, large ones."""
    left_out = []
    ours = f"{source.name}/" in merged
    for item in sorted(Path(at, file) for at, _, files in os.walk(source, onerror=_refuse) for file in files):
        name = item.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if hidden or (ours and len(name.parts) == 1 and is_weights(item.name)):
            continue
        foreign = links_out(item, source.parent) and not (ours and str(name) in _READ)
        if foreign or not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE or item.name.endswith(OTHER_FORMS):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item, folder / name)
    return left_out


def files_beside(plan: Plan, sources: Sequence[Checkpoint]) -> tuple[dict[str, bytes | None], list[str]]:
    """The small files that the output has otherwise than the lead's folder (None: hasn't), and what is to be noted.

    The config has the output's layers, what is listed for each, its rows, its type; one of which nothing changes stays as it
    is, to the byte.
    """
    wording, lead = plan.wording, sources[plan.lead]
    files = {**lead.beside, **(wording.files if wording else {})}
    notes: list[str] = []
    for inner in dict.fromkeys(["", *lead.stems]):
        made, said = _config(plan, sources, inner)
        files |= made
        notes += [f"{inner}{note}" if inner else note for note in said]
    other = "generation_config.json"
    if wording and other in wording.changes and lead.folder is not None:
        home = {other: lead.beside.get(other) or (lead.folder / other).read_bytes()}
        files[other] = encode(changed(decode(home, other, lead.name), wording.changes[other]))
    return files, notes


def _config(plan: Plan, sources: Sequence[Checkpoint], inner: str) -> tuple[dict[str, bytes | None], list[str]]:
    """The config of the output, or of the part of it in a sub-folder, if it isn't the lead's; and what is to be noted."""
    wording, lead = plan.wording, sources[plan.lead]
    configs = [config_of(source, inner) for source in sources]
    config = configs[plan.lead]
    if config is None:
        return {}, []
    mine = [output for output in plan.outputs if inner_of(output.name, lead.stems) == inner and output.how == "merge"]
    stored = list(dict.fromkeys(output.spec.dtype for output in mine))
    dtype = next((name for name, kind in FLOATS.items() if [kind] == stored), None)
    dtype = None if "_class_name" in config else dtype  # diffusers' configs say no type
    stacks = {stack.head: stack.count for stack in find_layers(lead.specs).stacks}
    before = {head.removeprefix(inner): n for head, n in stacks.items() if inner_of(head, lead.stems) == inner}
    layers = {
        head.removeprefix(inner): picks
        for head, picks in plan.layers
        if inner_of(head, lead.stems) == inner and (stacks.get(head, len(picks)) != len(picks) or _moved(picks, plan))
    }
    rows = wording.rows if wording and not inner else None
    made, notes = output_config(configs, plan.lead, layers, before, vocabulary=rows, dtype=dtype)
    made = changed(made, wording.changes.get(f"{inner}config.json", {})) if wording else made
    return {f"{inner}config.json": encode(made)} if made != config else {}, notes


def _put(folder: Path, files: Mapping[str, bytes | None]) -> None:
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def _moved(picks: Sequence[tuple[int, int]], plan: Plan) -> bool:
    """Whether a stack's layers are others than the lead's own, in their order."""
    return any(source != plan.lead or layer != i for i, (source, layer) in enumerate(picks))

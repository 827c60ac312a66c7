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
from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import Checkpoint, hash_block, hash_of, open_checkpoint
from interfuse.engine.journal import Journal
from interfuse.engine.local import execute
from interfuse.engine.outputs import Merging
from interfuse.engine.reading import ranges_of
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import FLOATS, Plan
from interfuse.registry import find

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".index.json")
#: What speaks of the copied model alone: its card, and how it was itself made.
_ITS_OWN = ("README.md", "interfuse.json")
_LARGEST_SIDE_FILE = 64 * 2**20


def merge_into(
    plan: Plan,
    sources: Sequence[Checkpoint],
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    threads: int | None = None,
    allow_nonfinite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the plan into `folder`, which is there; what `interfuse.json` then says.

    Weights are `model.safetensors`, or shards with an index; config, tokenizer and other small files come from the plan's
    lead. Whatever is wrong with the data is a `CheckpointError`.
    """
    journal = Journal(folder, plan, sources, resume=resume)
    with ShardWriter(folder, plan.specs) as writer:
        merging = execute(
            plan, sources, writer,
            threads=threads, allow_nonfinite=allow_nonfinite, progress=progress,
            done=journal.note, skip=lambda output: output.name in journal.done,
        )  # fmt: skip
    journal.restore(merging)
    output_hash = _read_back(folder, plan, merging)
    journal.close()
    lead = sources[plan.lead]
    left_out = _copy_side_files(lead.folder, folder) if lead.folder else []
    _set_config(folder / "config.json", plan)
    record = {
        **provenance(plan, sources, merging, recipe),
        "output": output_hash,
        "left_out": left_out,
    }
    (folder / "interfuse.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _read_back(folder: Path, plan: Plan, merging: Merging) -> str:
    """Compare the files with what was meant to be in them: names, types, shapes, and every block's hash; the whole hash."""
    there = open_checkpoint(folder)
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


def provenance(plan: Plan, sources: Sequence[Checkpoint], merging: Merging, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `interfuse.json` says: enough to run the merge again, and to know that it was these models."""
    method = find(plan.method, "weights")
    return {
        "kind": "merge",
        "method": plan.method,
        "recipe": dict(recipe),
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


def _copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy config, tokenizer, code, modules in sub-folders and the like; what was left behind, weights aside."""
    left_out: list[str] = []
    for item in sorted(source.iterdir()):
        if item.name.startswith(".") or item.name in _ITS_OWN or (folder / item.name).exists():
            continue
        if item.is_dir():
            left_out += [f"{item.name}/{name}" for name in _copy_folder(item, folder / item.name)]
        elif item.name.endswith(_WEIGHTS):
            continue
        elif not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE:
            left_out.append(item.name)
        else:
            shutil.copyfile(item, folder / item.name)
    return left_out


def _copy_folder(source: Path, folder: Path) -> list[str]:
    """Copy a sub-folder's small files, weights of other formats and what is linked aside; what was left behind."""
    left_out = []
    for item in sorted(source.rglob("*")):
        name = item.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if item.is_dir() or hidden:
            continue
        if not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE or item.name.endswith(_WEIGHTS[5:-1]):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item, folder / name)
    return left_out


def _set_config(path: Path, plan: Plan) -> None:
    """Say the new type in a transformers config that names one: it's the type in which the model is loaded."""
    stored = dict.fromkeys(output.spec.dtype for output in plan.outputs if output.how == "merge")
    if len(stored) != 1 or not path.is_file():
        return
    name = next(name for name, dtype in FLOATS.items() if dtype in stored)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise CheckpointError(Problem(str(path), "isn't JSON", "get the file again")) from None
    if _replace_dtype(config, name):
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_dtype(config: Any, name: str) -> bool:
    if not isinstance(config, dict):
        return False
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value in FLOATS and value != name:
            config[key] = name
            changed = True
        changed |= _replace_dtype(value, name)
    return changed

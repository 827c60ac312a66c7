"""A trunk with a head a task: beside the merged trunk in a folder, each model's own head and config. No arithmetic.

Which tensors are heads is `layout.heads`' to say; how they are read again, `checkpoints.tasks`'.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.remote.store import RemoteFile
from interfuse.checkpoints.remote.store import fetch as fetch_files
from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.checkpoints.tasks import FOLDER, HEAD, TABLE, heads_table
from interfuse.checkpoints.tokenizers.tokenizer import encode
from interfuse.engine.opening import fetch_side_files
from interfuse.layout.heads import heads_in
from interfuse.plan import Plan, config_of
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.pieces import references
from interfuse.recipe.references import Reference


def write_heads(plan: Plan, sources: Sequence[Checkpoint], folder: Path, written: Mapping[str, Any], *, progress: bool) -> None:
    """Write each task's head beside the trunk in `folder`, where `written`, the recipe, asks for it.

    A run that is resumed does it anew: it's the same bytes.
    """
    if written.get("heads") is None:
        return
    recipe = Recipe.model_validate(written)
    checkpoints = dict(zip(references(recipe), sources, strict=True))
    heads = heads_in(recipe, checkpoints).names
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    own: dict[str, list[str]] = {}
    for task, entry in zip(names_of(recipe), recipe.models, strict=True):
        if entry.model == recipe.base_model:
            continue
        source = checkpoints[Reference.parse(entry.model)]
        own[task] = [name for name in source.specs if name in heads]
        _write(source, own[task], folder / FOLDER / task, progress)
    shared = [name for name in plan.specs if any(name in checkpoint.specs for checkpoint in checkpoints.values())]
    trunk = [name for name in shared if name not in heads and all(name in c.specs for c in _experts(recipe, checkpoints))]
    (folder / FOLDER / TABLE).write_text(heads_table(plan.method, trunk, own), encoding="utf-8")


def same_heads(folder: Path, sources: Sequence[Checkpoint], written: Mapping[str, Any]) -> bool:
    """Whether the heads in `folder` are those that the recipe `written` gives, tensor by tensor; true where it has none."""
    if written.get("heads") is None:
        return True
    recipe = Recipe.model_validate(written)
    checkpoints = dict(zip(references(recipe), sources, strict=True))
    for task, entry in zip(names_of(recipe), recipe.models, strict=True):
        if entry.model == recipe.base_model:
            continue
        source, there = checkpoints[Reference.parse(entry.model)], open_checkpoint(folder / FOLDER / task / HEAD)
        for name, spec in there.specs.items():
            if source.specs.get(name) != spec or source.read(name).tobytes() != there.read(name).tobytes():
                return False
    return True


def _experts(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> list[Checkpoint]:
    base = None if recipe.base_model is None else Reference.parse(recipe.base_model)
    return [checkpoint for reference, checkpoint in checkpoints.items() if reference != base]


def _write(source: Checkpoint, names: Sequence[str], folder: Path, progress: bool) -> None:
    """One head, as it's stored in its model, and that model's config."""
    fetch_files([file for file in source.files(names) if isinstance(file, RemoteFile)], shown=progress)
    fetch_side_files(source)
    folder.mkdir(parents=True)
    stem = HEAD.removesuffix(".safetensors")
    specs = {name: source.specs[name] for name in names}
    with ShardWriter(folder, specs, sum(spec.nbytes for spec in specs.values()) + 1, stems={"": stem}) as writer:
        for name in names:
            start = 0
            for block in source.blocks(name):
                writer.write(name, start, block)
                start += block.size
    config = config_of(source)
    if config is not None:
        (folder / "config.json").write_bytes(encode(config))

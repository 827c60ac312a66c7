"""An output for each task: the trunk is merged as any model; then one pass over the inputs writes each task's masks.

What is written, and how it is read, is `checkpoints.tasks`' part; which entries a task takes, the method's.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import TensorSpec
from interfuse.checkpoints.tasks import FOLDER, MASK, TABLE, pack, packed, task_table
from interfuse.engine.merging import Merging, reader_of
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Job, Phase, Scratch, Total, run_jobs
from interfuse.engine.streamed import most_of, values_of
from interfuse.methods.forms import Block
from interfuse.methods.selection import PER_TASK
from interfuse.plan import Call, Output, Plan
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.references import Reference

#: Sums of a tensor, [2, tasks]: of each task, two numbers whose quotient over all tensors is its scale.
_Sums = dict[str, np.ndarray]


def write_tasks(plan: Plan, merging: Merging, folder: Path, written: Mapping[str, Any], *, threads: int | None = None) -> bool:
    """Write what makes each task's model beside the trunk in `folder`, for tensors whose plan says so; whether any does.

    `merging` has the hashes of the inputs, `written`, the recipe, the models' names, which are the tasks'. A run that is
    resumed does it anew: it's the same bytes.
    """
    masked = [output for output in plan.outputs if output.call is not None and _gives_tasks(output.call)]
    if not masked:  # what isn't a merge's recipe has none
        return False
    recipe = Recipe.model_validate(written)
    if recipe.base_model is None:
        return False
    specs = {output.name: packed(output.spec) for output in masked}
    names = [name for name, entry in zip(names_of(recipe), recipe.models, strict=True) if entry.model != recipe.base_model]
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    sums: _Sums = {}
    with contextlib.ExitStack() as files:
        writers = [files.enter_context(_writer(folder / FOLDER / name, specs)) for name in names]
        run_jobs((_masking(output, merging, writers, sums) for output in masked), threads or len(os.sched_getaffinity(0)))
    scales = {name: _scale(k, [sums[output.name] for output in masked]) for k, name in enumerate(names)}
    tensors = {}
    for output in masked:
        assert output.base is not None
        tensors[output.name] = (output.base.name, merging.read[output.base])
    base = Reference.parse(recipe.base_model)
    here = str(Path(base.path).resolve()) if Path(base.path).exists() else base.path
    text = task_table(plan.method, (here, base.revision), scales, tensors)
    (folder / FOLDER / TABLE).write_text(text, encoding="utf-8")
    return True


def _gives_tasks(call: Call) -> bool:
    return call.method in PER_TASK and dict(call.options).get("output") == "per_task"


def _writer(folder: Path, specs: dict[str, TensorSpec]) -> ShardWriter:
    folder.mkdir(parents=True)
    stem = MASK.removesuffix(".safetensors")
    return ShardWriter(folder, specs, sum(spec.nbytes for spec in specs.values()) + 1, stems={"": stem})


def _masking(output: Output, merging: Merging, writers: Sequence[ShardWriter], sums: _Sums) -> Job:
    """The masks of one tensor, in blocks that begin with a byte."""
    call = output.call
    assert call is not None
    reader, options = reader_of(output, call, merging), dict(call.options)
    tasks = PER_TASK[call.method]

    total = Total((2, reader.models))

    def task(start: int, stop: int, scratch: Scratch) -> None:
        found = tasks(_block(reader, start, stop), call.weights, options)
        for writer, bits in zip(writers, pack(found.masks), strict=True):
            writer.write(output.name, start // 8, bits)
        total.add(start, stop, found.sums)

    count, most = reader.count, max(most_of(reader) // 8, 1) * 8
    yield Phase(task, [(at, min(at + most, count)) for at in range(0, count, most)])
    sums[output.name] = total.value


def _block(reader: Reader, start: int, stop: int) -> Block:
    values = values_of(reader, start, stop, reader.wide)
    return Block(start, values[0], values[1:] - values[0])


def _scale(task: int, tensors: Sequence[np.ndarray]) -> float:
    """sum |d_i| / sum |what the mask keeps|, or 0 where nothing is kept."""
    own, kept = (math.fsum(float(found[row, task]) for found in tensors) for row in (0, 1))
    return own / kept if kept > 0 else 0.0

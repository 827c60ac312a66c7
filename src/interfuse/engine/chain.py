"""Recipes one after the other, later ones merging what earlier ones give: one run, and no copy of a stage on disk.

A stage's result is a checkpoint whose tensors are merged when they are first read, and forgotten soon after; a large one is
kept in a file without a name, which ends with the process. Nothing is written but the last recipe's output.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.tokenizers.tokenizer import MAIN, read_tokenizer
from interfuse.engine.global_trim import global_cuts
from interfuse.engine.merging import Merging
from interfuse.engine.opening import Commits, open_references
from interfuse.engine.output.folder import files_beside
from interfuse.engine.outputs import job
from interfuse.engine.scheduler import run_jobs
from interfuse.engine.selection import Cut
from interfuse.errors import CheckpointError, UserError
from interfuse.plan import Output, Plan, plan_merge, uncollected
from interfuse.recipe import Recipe
from interfuse.recipe.pieces import places, references

#: Bytes from which on a tensor of an earlier recipe is kept in a file, and how many of its tensors are remembered.
LARGE, HELD = 2**25, 8


class Planned(NamedTuple):
    """A recipe's name, if it has one, its plan, and the checkpoints that the plan is for."""

    name: str | None
    plan: Plan
    sources: list[Checkpoint]


@uncollected()
def plan_recipes(
    recipes: Sequence[Recipe], *, compat: bool = False, scratch: Path | None = None, commits: Commits | None = None
) -> list[Planned]:
    """Every recipe's plan, the output's last; what earlier recipes give is merged when it's read.

    `scratch` is a folder for large tensors of the stages (left out: the system's); `commits` as in `open_references`.
    """
    given: dict[str, Checkpoint] = {}
    stages: list[Planned] = []
    for i, recipe in enumerate(recipes):
        inside = f"documents[{i}]." if len(recipes) > 1 else ""
        plan, sources = plan_recipe(recipe, given, compat=compat, inside=inside, commits=commits)
        plan = replace(plan, earlier=tuple(stage.plan.digest() for stage in stages))
        stages.append(Planned(recipe.name, plan, sources))
        if recipe.name is not None:
            given[recipe.name] = merged(recipe.name, plan, sources, scratch)
    return stages


def plan_recipe(
    recipe: Recipe,
    given: Mapping[str, Checkpoint] | None = None,
    *,
    compat: bool = False,
    inside: str = "",
    commits: Commits | None = None,
) -> tuple[Plan, list[Checkpoint]]:
    """A recipe's plan, and the checkpoints that it is for; those `given` by name are taken as they are.

    `inside` is what stands before a place in the recipe, where it's one of several; `commits` as in `open_references`.
    """
    where = {reference: inside + path for reference, path in places(recipe).items()}
    try:
        checkpoints = open_references(references(recipe), given, where, commits)
    except UserError as error:
        from interfuse.engine.wording import source_problems

        raise CheckpointError(*dict.fromkeys([*error.problems, *source_problems(recipe, given or {})])) from None
    if recipe.tokenizer_source is None and recipe.tokenizer is None and recipe.chat_template is None:
        sources = list(checkpoints.values())
        plan = plan_merge(recipe, checkpoints, compat=compat)
        return replace(plan, notes=(*plan.notes, *_other_words(sources, sources[plan.lead]))), sources
    from interfuse.engine.wording import leveled, reworded, together  # most merges do without

    try:
        checkpoints, wording = reworded(recipe, checkpoints, given or {}, commits)
    except UserError as error:
        try:
            plan_merge(recipe, leveled(checkpoints), compat=compat)
        except UserError as further:
            raise together([error, further]) from None
        raise
    plan = plan_merge(recipe, checkpoints, compat=compat)
    return replace(plan, wording=wording, notes=(*plan.notes, *wording.notes)), list(checkpoints.values())


def _other_words(sources: Sequence[Checkpoint], lead: Checkpoint) -> Iterator[str]:
    """Notes on models whose tokens have other rows than the lead's: without a tokenizer, rows meet by their number.

    Files that are equal aren't read as JSON; those that can't be read, or aren't here yet, are passed over.
    """
    files = {source.name: _tokenizer_file(source) for source in (lead, *sources)}
    first = files[lead.name]
    for name, content in files.items():
        if first is None or content is None or content == first:
            continue
        try:
            mine, theirs = (found.tokens for file in (first, content) if (found := read_tokenizer({MAIN: file}, name)))
        except UserError:
            continue
        other = [token for token, row in theirs.items() if mine.get(token) != row]
        if other:
            wrong = f"{len(other)} tokens have other rows than in {lead.name}, e.g. {other[0]!r}"
            yield f"{name}: {wrong}; rows are merged by their number, with tokenizer_source: union by token"


def _tokenizer_file(source: Checkpoint) -> bytes | None:
    path = None if source.folder is None else source.folder / MAIN
    if MAIN in source.beside or path is None or not path.is_file():
        return source.beside.get(MAIN)
    return path.read_bytes()


def merged(name: str, plan: Plan, sources: Sequence[Checkpoint], scratch: Path | None) -> Checkpoint:
    """What the plan makes of its sources, as a checkpoint that is merged tensor by tensor, as they are read."""
    stage = _Stage(plan, sources, scratch)
    places = {output.name: _Merged(stage, output) for output in plan.outputs}
    lead = sources[plan.lead]
    beside, _ = files_beside(plan, sources)
    return replace(lead, name=name, specs=plan.specs, places=places, declared={}, within=tuple(sources), beside=beside)


class _Stage:
    """The tensors of one stage that have been merged and not yet forgotten; any thread may ask."""

    def __init__(self, plan: Plan, sources: Sequence[Checkpoint], scratch: Path | None):
        self._plan, self._sources, self._scratch = plan, sources, scratch
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cuts: dict[str, list[Cut]] | None = None
        self._lock = threading.Lock()

    def tensor(self, output: Output) -> np.ndarray:
        """The merged tensor, flat; NaN in it is the next stage's affair."""
        with self._lock:
            if output.name not in self._held:
                target = _Array(_room(output, self._scratch))
                if self._cuts is None:
                    self._cuts = global_cuts(self._plan.outputs, self._sources, 1)
                merging = Merging(self._sources, target, self._plan.seed, cuts=self._cuts)
                run_jobs([job(output, merging)], 1)
                if merging.refused:
                    raise CheckpointError(*merging.refused)
                self._held[output.name] = target.array
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(output.name)
            return self._held[output.name]


@dataclass(frozen=True)
class _Array:
    """A sink for one tensor."""

    array: np.ndarray

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        self.array[start : start + array.size] = array

    def place(self, name: str) -> None:
        """Nothing: it is read right away."""


@dataclass(frozen=True)
class _Merged:
    """A place whose tensor is merged when it is first read."""

    stage: _Stage
    output: Output

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`."""
        return self.stage.tensor(self.output)[start:stop]


def _room(output: Output, scratch: Path | None) -> np.ndarray:
    spec = output.spec
    if spec.nbytes < LARGE:
        return np.empty(spec.count, spec.storage)
    with tempfile.TemporaryFile(dir=scratch) as file:
        file.truncate(spec.nbytes)
        return np.memmap(file, spec.storage, "r+", shape=(spec.count,))

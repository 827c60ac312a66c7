"""Data of a model's, or of a stage's, own, read: each as the recipe of that one network alone would read it.

What such a section says stands before the recipe's `data` (`recipe/own_data.py`). Problems are told where they are written.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from interfuse.data import Data
from interfuse.errors import DataError, Problem, UserError
from interfuse.pipeline.classes import UNNAMED, Spaces, space_of
from interfuse.pipeline.reading import load_sets
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.own_data import effective, place_of
from interfuse.recipe.schema import ModelEntry
from interfuse.recipe.sections import DataSection

#: {"train": ..., "validation": ..., "test": ...}, as far as they are named.
Sets = dict[str, Data]


def load_tasks(recipe: Recipe, networks: Mapping[str, nn.Module], *, trust_code: bool) -> dict[str, Sets]:
    """Each model's own sets, by its name; every problem in any of them at once.

    Class numbers are in the order of the model's outputs, where it says which classes these are.
    """
    found: dict[str, Sets] = {}
    problems: list[Problem] = []
    for i, (name, entry) in enumerate(zip(names_of(recipe), recipe.models, strict=True)):
        try:
            spaces = space_of(entry.model, networks[name])
            found[name] = _read(recipe, entry, entry.data, f"models[{i}].data", trust_code, spaces)
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return found


def load_stages(recipe: Recipe, *, trust_code: bool) -> list[Sets | None]:
    """Each stage's own `train` and `validation`, as the target reads them; None for a stage that has no data of its own."""
    found: list[Sets | None] = []
    problems: list[Problem] = []
    target = ModelEntry(model=str(recipe.target))
    for i, stage in enumerate(recipe.stages or ()):
        try:
            own = stage.data
            found.append(None if own is None else _read(recipe, target, own, f"stages[{i}].data", trust_code, test=False))
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return found


def _read(
    recipe: Recipe,
    entry: ModelEntry,
    own: DataSection | None,
    path: str,
    trust_code: bool,
    spaces: Spaces = UNNAMED,
    *,
    test: bool = True,
) -> Sets:
    section = effective(recipe, own)
    section = section if test else section.model_copy(update={"test": None})
    alone = Recipe(models=[entry.model_copy(update={"data": None})], data=section, seed=recipe.seed)
    try:
        return load_sets(alone, trust_code=trust_code, spaces=spaces)
    except UserError as error:
        raise DataError(*(_placed(problem, recipe, path, own) for problem in error.problems)) from None


def _placed(problem: Problem, recipe: Recipe, path: str, own: DataSection | None) -> Problem:
    """A problem with `data.train` told where that is written."""
    if not problem.path.startswith("data."):
        return problem
    key, separator, rest = problem.path.removeprefix("data.").partition(".")
    return problem._replace(path=f"{place_of(recipe, path, own, key)}{separator}{rest}")

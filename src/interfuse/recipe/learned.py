"""What must hold in a recipe whose merge coefficients are learned. Pure; lists every problem, reads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from interfuse.errors import OptionError, Problem
from interfuse.recipe.merges import entries_in, weighing_problems
from interfuse.recipe.own_data import effective, place_of
from interfuse.recipe.schema import ModelEntry, Recipe
from interfuse.registry import find

_REMOVE = "remove the key"
#: What of `training` has a meaning here.
_TRAINING = ("learning_rate", "batch_size", "seed")


def learns(recipe: Recipe) -> bool:
    """Whether a merge's coefficients are learned from training data."""
    if recipe.form != "merge":
        return False
    try:
        return "training data" in find(str(recipe.merge_method), "weights").needs
    except OptionError:
        return False


def learned_problems(recipe: Recipe, experts: Sequence[ModelEntry]) -> Iterator[Problem]:
    """Everything that is wrong with such a recipe beside what is wrong with any merge; `experts` are what it combines."""
    yield from weighing_problems(recipe, "learns over", "is what is learned")
    for path, entry in entries_in(recipe):
        for key in entry.parameters:
            if key != "weight":
                yield Problem(f"{path}.parameters.{key}", "holds for all models", "write it under the recipe's `parameters`")
    for key in recipe.training.model_dump(exclude_none=True) if recipe.training is not None else ():
        if key not in _TRAINING:
            yield Problem(f"training.{key}", "means nothing where coefficients are learned", f"allowed: {', '.join(_TRAINING)}")
    yield from _data(recipe, experts)


def _data(recipe: Recipe, experts: Sequence[ModelEntry]) -> Iterator[Problem]:
    tested = recipe.data.test if recipe.data is not None else None
    labelled = recipe.parameters.get("objective") == "cross_entropy"
    said: dict[str, Problem] = {}
    for i, entry in enumerate(recipe.models):
        if entry not in experts:
            continue
        path, data = f"models[{i}].data", effective(recipe, entry.data)
        if data.train is None:
            problem = Problem(f"{path}.train", "missing", "what the coefficients are learned from: here, or under `data`")
            said.setdefault(problem.path, problem)
        elif data.train == tested and recipe.parameters.get("split") != "reported":
            allowed = "other data, or parameters.split: reported, to say that results are of data that were adapted to"
            where = place_of(recipe, path, entry.data, "train")
            said.setdefault(where, Problem(where, "is data.test too", allowed))
        if data.validation is not None:
            where = place_of(recipe, path, entry.data, "validation")
            said.setdefault(where, Problem(where, "no validation value chooses among coefficients", _REMOVE))
        if labelled and data.labels is False:
            where = place_of(recipe, path, entry.data, "labels")
            said.setdefault(where, Problem(where, "false, and cross_entropy is learned from labels", "entropy or teacher"))
        if isinstance(data.input, dict):
            where = place_of(recipe, path, entry.data, "input")
            said.setdefault(where, Problem(where, "a merged network reads one input", "give a name"))
        if entry.data is not None and entry.data.test is not None:
            allowed = "give it under the recipe's `data`"
            said[f"{path}.test"] = Problem(f"{path}.test", "the merged network is scored on one test set", allowed)
    yield from said.values()

"""Which column each model reads: written in one place as `data.input`, or with each model as its own `input`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from interfuse.errors import Problem
from interfuse.recipe.schema import Recipe

#: The forms whose models may each read an input of their own.
FORMS = ("fusion", "ensemble", "single")


def reads_problems(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the models' own inputs."""
    given = [entry.input is not None for entry in recipe.models]
    if not any(given):
        return
    if recipe.form not in FORMS:
        for i, there in enumerate(given):
            if there:
                yield Problem(f"models[{i}].input", "the models of this recipe read the same data", "remove the key")
        return
    if recipe.data is None:
        yield Problem("data", "missing, and models say what they read of it", "give data")
    elif recipe.data.input is not None:
        yield Problem("data.input", "stands beside models with an input of their own", "keep one of the two")
    for i, (name, there) in enumerate(zip(names, given, strict=True)):
        if not there:
            yield Problem(f"models[{i}].input", "missing, and other models have one", f"what {name} reads")


def settled(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """A sound recipe with its models' own inputs as the data's."""
    if recipe.data is None or not any(entry.input is not None for entry in recipe.models):
        return recipe
    input = {name: entry.input for name, entry in zip(names, recipe.models, strict=True)}
    models = [entry.model_copy(update={"input": None}) for entry in recipe.models]
    return recipe.model_copy(update={"models": models, "data": recipe.data.model_copy(update={"input": input})})


def reads_of(recipe: Recipe, names: Sequence[str]) -> dict[str, str]:
    """What each model of a settled recipe reads, by name: the column, or of several the first model that reads them."""
    input: Any = recipe.data.input if recipe.data is not None else None
    if not isinstance(input, dict):
        return {name: name for name in names} if input is None else {}
    found: dict[str, str] = {}
    for name in names:
        column = input[name]
        if not isinstance(column, str):
            column = next(other for other in names if input[other] == column)
        clash = column in names and input[column] not in (column, input[name])
        found[name] = name if clash else column
    return found

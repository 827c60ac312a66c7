"""What teachers with data of their own teach: every one's training data, read as it says, as one set for the student."""

from __future__ import annotations

from interfuse.data import Data, load_data
from interfuse.data.joining import joined
from interfuse.errors import DataError, Problem, UserError
from interfuse.pipeline.classes import Spaces
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.own_data import effective, place_of


def has_own(recipe: Recipe) -> bool:
    """Whether a student's teachers have data of their own."""
    return recipe.form == "distill" and any(entry.data is not None for entry in recipe.models)


def lessons(recipe: Recipe, common: Data | None, spaces: Spaces, *, trust_code: bool) -> Data:
    """The training data of the recipe, and of every teacher that has its own, one after the other, in the joined classes.

    Numbers without names in a teacher's own data count its own classes.
    """
    parts = [] if common is None else [common]
    problems: list[Problem] = []
    for i, (name, entry) in enumerate(zip(names_of(recipe), recipe.models, strict=True)):
        if entry.data is None:
            continue
        section, where = effective(recipe, entry.data), place_of(recipe, f"models[{i}].data", entry.data, "train")
        own = None if spaces.own is None else spaces.own[name]
        options = {key: getattr(section, key) for key in ("input", "target", "image_size", "mean", "std")}
        options |= {"labels": section.labels is not False, "trust_code": trust_code, "path": where}
        try:
            data = load_data(section.train, classes=section.classes, **options)
            unnamed = data.classes == tuple(map(str, range(len(data.classes or ()))))
            if own is not None and unnamed and not any(c in own for c in data.classes or ()):
                data = data.named(own)
            parts.append(spaces.order(data))
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return joined(parts, "models' data")

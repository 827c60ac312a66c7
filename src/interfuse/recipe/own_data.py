"""Data of a model's, or of a stage's, own: what it says stands before the recipe's `data`, key by key. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterator

from interfuse.recipe.schema import Recipe
from interfuse.recipe.sections import DataSection

#: The keys of a section that name data.
SOURCES = ("train", "validation", "test")


def sections(recipe: Recipe) -> Iterator[tuple[str, DataSection]]:
    """Every section of data as it is written, with its path: the recipe's, the models' own, the stages' own."""
    found = [("data", recipe.data)]
    found += [(f"models[{i}].data", entry.data) for i, entry in enumerate(recipe.models)]
    found += [(f"stages[{i}].data", stage.data) for i, stage in enumerate(recipe.stages or ())]
    yield from ((path, section) for path, section in found if section is not None)


def named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every source of data that a recipe names, once, with where it does."""
    seen: set[tuple[str, str]] = set()
    for path, section in sections(recipe):
        for key in SOURCES:
            source = getattr(section, key)
            if isinstance(source, str) and (key, source) not in seen:
                seen.add((key, source))
                yield f"{path}.{key}", source


def effective(recipe: Recipe, own: DataSection | None) -> DataSection:
    """The data of one model's task, or of one stage: its own keys, and the recipe's where it has none."""
    common = recipe.data or DataSection()
    return common if own is None else common.model_copy(update=own.model_dump(exclude_none=True))


def place_of(recipe: Recipe, path: str, own: DataSection | None, key: str) -> str:
    """Where a key of the effective section is written: in the section of its own at `path`, else in the recipe's."""
    inherited = recipe.data is not None and getattr(recipe.data, key, None) is not None
    written = own is not None and getattr(own, key, None) is not None
    return f"data.{key}" if inherited and not written else f"{path}.{key}"

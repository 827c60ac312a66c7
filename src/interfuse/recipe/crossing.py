"""What must hold in a recipe of cross-stitched networks. Pure; lists every problem, reads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from interfuse.errors import Problem
from interfuse.recipe.outputs import by_model_problems
from interfuse.recipe.schema import Recipe


def crossing_problems(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    """Every problem of the networks and places that no other check sees."""
    if recipe.form != "cross_stitch":
        return
    if len(names) < 2:
        yield Problem("models", f"{len(names)} given", "at least 2, which see each other's features")
    if recipe.data is None or recipe.data.train is None:
        yield Problem("data.train", "missing", "the networks are joined and trained on it")
    kept = [entry.freeze is not False for entry in recipe.models]
    for i, held in enumerate(kept):
        if held != kept[0]:
            yield Problem(f"models[{i}].freeze", "isn't models[0]'s", "all networks are frozen, or none")
    if recipe.head is not None and recipe.parameters.get("heads") != "shared":
        yield Problem("head", "each network keeps its own", "remove the key, or give parameters.heads: shared")
    yield from _places(recipe.parameters.get("at"), names)


def _places(at: Any, names: Sequence[str]) -> Iterator[Problem]:
    if isinstance(at, dict):
        yield from by_model_problems(at, names, "parameters.at", "the modules after which it is mixed with the others")
        rows = list(at.values())
    elif isinstance(at, list) and all(isinstance(row, list) for row in at):
        rows = at
        if len(rows) != len(names):
            yield Problem("parameters.at", f"{len(rows)} lists for {len(names)} models", "one list a model, or one for all")
    else:
        return
    counts = [len(row) for row in rows if isinstance(row, list)]
    if len(dict.fromkeys(counts)) > 1 or 0 in counts:
        yield Problem("parameters.at", f"lists of {counts} places", "equally many a model, at least 1")


def places_of(at: Any, names: Sequence[str]) -> list[Any]:
    """The places as `CrossStitch` takes them."""
    return [at[name] for name in names] if isinstance(at, dict) else list(at)

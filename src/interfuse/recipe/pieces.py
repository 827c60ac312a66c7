"""A merge's `models`, `slices` or `modules` in one form: pieces, each with its sources and the levels of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from interfuse.recipe.references import Reference
from interfuse.recipe.schema import ModelEntry, Recipe, Slice

Parameters = Mapping[str, Any]


class Source(NamedTuple):
    """A model in a piece: its place in the recipe, its reference, the range of layers (None: all), its own parameters."""

    path: str
    model: str
    layers: tuple[int, int] | None
    parameters: Parameters


class Piece(NamedTuple):
    """What is merged together: all of `models`, or one slice, of the whole network or of one of its modules.

    `levels` are the parameters that hold for all sources, by their path, most specific first.
    """

    path: str
    module: str | None
    sources: tuple[Source, ...]
    levels: tuple[tuple[str, Parameters], ...]
    base: str | None


def pieces(recipe: Recipe) -> list[Piece]:
    """The pieces of a merge in the order written."""
    top = (("parameters", recipe.parameters),)
    if recipe.modules is not None:
        found: list[Piece] = []
        for name, module in recipe.modules.items():
            path = f"modules.{name}"
            levels = ((f"{path}.parameters", module.parameters), *top)
            found += _listed(recipe, module.models or [], module.slices, path, name, levels)
        return found
    return list(_listed(recipe, recipe.models, recipe.slices, "", None, top))


def references(recipe: Recipe) -> list[Reference]:
    """Every model of a merge once, in the order written; the base, where it isn't among them, comes first."""
    entries = [source.model for piece in pieces(recipe) for source in piece.sources]
    bases = [piece.base for piece in pieces(recipe) if piece.base is not None and piece.base not in entries]
    return list(dict.fromkeys(Reference.parse(model) for model in [*bases, *entries]))


def places(recipe: Recipe) -> dict[Reference, str]:
    """Where each model of a merge stands first: `models[1].model`, `base_model`."""
    found: dict[Reference, str] = {}
    for piece in pieces(recipe):
        for source in piece.sources:
            found.setdefault(Reference.parse(source.model), f"{source.path}.model")
        if piece.base is not None:
            path = "base_model" if piece.base == recipe.base_model else f"{piece.path}.base_model"
            found.setdefault(Reference.parse(piece.base), path)
    return found


def _listed(
    recipe: Recipe,
    models: list[ModelEntry],
    slices: list[Slice] | None,
    path: str,
    module: str | None,
    levels: tuple[tuple[str, Parameters], ...],
) -> Iterator[Piece]:
    inside = f"{path}." if path else ""
    if slices is None:
        sources = tuple(Source(f"{inside}models[{i}]", e.model, None, e.parameters) for i, e in enumerate(models))
        if sources:
            yield Piece(f"{inside}models", module, sources, levels, recipe.base_model)
        return
    for i, part in enumerate(slices):
        where = f"{inside}slices[{i}]"
        sources = tuple(
            Source(f"{where}.sources[{j}]", s.model, (s.layer_range[0], s.layer_range[1]), s.parameters)
            for j, s in enumerate(part.sources)
        )
        mine = ((f"{where}.parameters", part.parameters), *levels)
        yield Piece(where, module, sources, mine, part.base_model or recipe.base_model)

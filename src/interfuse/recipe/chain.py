"""What a recipe refers to: paths made absolute, and the recipes of one file that use each other's results by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from interfuse.errors import Problem, RecipeError
from interfuse.recipe.check import chooses
from interfuse.recipe.learned import learns
from interfuse.recipe.merges import entries_in, gives_tasks, tokenizer_models
from interfuse.recipe.own_data import SOURCES
from interfuse.recipe.pieces import pieces
from interfuse.recipe.references import Reference, place
from interfuse.recipe.schema import ModelEntry, Recipe, Slice
from interfuse.recipe.sections import DataSection

#: Stands for a model that can't be read, so that the others keep their numbers. What is found wrong with it isn't said.
UNREADABLE = "?"

_Place = Callable[[str, str], str]


def absolute(recipe: Recipe, folder: Path, known: Sequence[str] = ()) -> tuple[Recipe, list[Problem]]:
    """The recipe with every path made absolute, so that it means the same from any folder; references that aren't any.

    `known` are the names of earlier recipes in its file: a model of such a name is that recipe's result.
    """
    problems: list[Problem] = []

    def model(path: str, ref: Any) -> str:
        try:
            reference = Reference(ref) if ref in known else Reference.parse(ref, folder)
        except RecipeError as error:
            problems.extend(Problem(f"{path}.{p.path}" if p.path else path, p.wrong, p.allowed) for p in error.problems)
            return UNREADABLE
        if recipe.form != "merge" and reference.path != ref:
            return place(str(ref), folder)  # of another form only the hub's own id@revision, read by its library
        lora = reference.lora if reference.lora is None or reference.lora in known else place(reference.lora, folder)
        path = reference.path if reference.path in known else place(reference.path, folder)
        return str(Reference(path, reference.revision, lora, reference.lora_revision))

    base = None if recipe.base_model is None else model("base_model", recipe.base_model)
    target = None if recipe.target is None else model("target", recipe.target)
    changes: dict[str, Any] = {"base_model": base, "target": target, "models": _entries(recipe.models, "models", model, folder)}
    if recipe.slices is not None:
        changes["slices"] = _slices(recipe.slices, "slices", model)
    if recipe.modules is not None:
        changes["modules"] = {
            name: module.model_copy(
                update={
                    "models": module.models and _entries(module.models, f"modules.{name}.models", model, folder),
                    "slices": module.slices and _slices(module.slices, f"modules.{name}.slices", model),
                }
            )
            for name, module in recipe.modules.items()
        }
    changes |= _tokenizer(recipe, model)
    changes["data"] = _data(recipe.data, folder)
    if recipe.fusion == "transplant":
        changes["parameters"] = _vocabulary(recipe.parameters, folder)
    if recipe.stages is not None:
        changes["stages"] = [
            stage.model_copy(
                update={
                    "data": _data(stage.data, folder),
                    "copied": stage.copied and {name: _vocabulary(how, folder) for name, how in stage.copied.items()},
                }
            )
            for stage in recipe.stages
        ]
    return recipe.model_copy(update=changes), problems


def _vocabulary(how: Any, folder: Path) -> Any:
    """Options of a transplant with the folders of its tokenizers, if it names any."""
    said = how.get("vocabulary") if isinstance(how, dict) else None
    if not isinstance(said, dict):
        return how
    return how | {"vocabulary": {side: place(ref, folder) if isinstance(ref, str) else ref for side, ref in said.items()}}


def _data(section: DataSection | None, folder: Path) -> DataSection | None:
    if section is None:
        return None
    parts = {key: getattr(section, key) for key in SOURCES}
    return section.model_copy(update={key: place(ref, folder) for key, ref in parts.items() if isinstance(ref, str)})


def _entries(entries: Sequence[ModelEntry], path: str, model: _Place, folder: Path) -> list[ModelEntry]:
    found = []
    for i, entry in enumerate(entries):
        weights = None if entry.weights is None else place(entry.weights, folder, always=True)
        own = {"weights": weights, "data": _data(entry.data, folder)}
        found.append(entry.model_copy(update={"model": model(f"{path}[{i}].model", entry.model), **own}))
    return found


def _slices(slices: Sequence[Slice], path: str, model: _Place) -> list[Slice]:
    found = []
    for i, part in enumerate(slices):
        sources = [
            source.model_copy(update={"model": model(f"{path}[{i}].sources[{j}].model", source.model)})
            for j, source in enumerate(part.sources)
        ]
        base = None if part.base_model is None else model(f"{path}[{i}].base_model", part.base_model)
        found.append(part.model_copy(update={"sources": sources, "base_model": base}))
    return found


def _tokenizer(recipe: Recipe, model: _Place) -> dict[str, Any]:
    """The tokenizer's keys with their models as text."""
    read = {path: model(path, ref) for path, ref in tokenizer_models(recipe)}
    changes: dict[str, Any] = {"tokenizer_source": read.get("tokenizer_source", recipe.tokenizer_source)}
    if recipe.tokenizer is not None:
        rows = {}
        for token, row in (recipe.tokenizer.tokens or {}).items():
            path = f"tokenizer.tokens.{token}.source"
            source = read.get(path, row.source)
            if f"{path}.model" in read:
                source = row.source | {"model": read[f"{path}.model"]}
            rows[token] = row.model_copy(update={"source": source})
        update = {"source": read.get("tokenizer.source", recipe.tokenizer.source)}
        changes["tokenizer"] = recipe.tokenizer.model_copy(update=update | ({"tokens": rows} if rows else {}))
    return changes


def chain_problems(recipes: Sequence[Recipe]) -> list[Problem]:
    """What is wrong between the recipes of one file: names that are missing, repeated, unused, or of what isn't there yet."""
    problems: list[Problem] = []
    names = [recipe.name for recipe in recipes]
    used: dict[str, None] = {}
    for i, recipe in enumerate(recipes):
        inside = f"documents[{i}]"
        if recipe.form != "merge":
            problems.append(Problem(f"{inside}.merge_method", "missing", "each recipe in a file of several is a merge"))
        if chooses(recipe) or learns(recipe):
            wrong = f"{recipe.merge_method} loads its models, and stands beside other recipes"
            problems.append(Problem(f"{inside}.merge_method", wrong, "give it a file of its own"))
        if recipe.name is None and i < len(recipes) - 1:
            problems.append(Problem(f"{inside}.name", "missing", "a name by which later recipes use its result"))
        elif recipe.name is not None and recipe.name in names[:i]:
            wrong = f"{recipe.name!r} is also documents[{names.index(recipe.name)}]'s"
            problems.append(Problem(f"{inside}.name", wrong, "choose another"))
        for path, ref in _refs(recipe):
            used[ref] = None
            if ref in names and ref not in names[:i] and not Path(ref).is_absolute():
                wrong = f"{ref!r} is this recipe itself" if names[i] == ref else f"{ref!r} comes later in the file"
                problems.append(Problem(f"{inside}.{path}", wrong, "refer to earlier recipes alone"))
    for i, recipe in enumerate(recipes[:-1]):
        if recipe.heads is not None:
            wrong = "later recipes see the trunk alone"
            problems.append(Problem(f"documents[{i}].heads", wrong, "give it in the last recipe"))
        if gives_tasks(recipe):
            wrong = "got 'per_task', and later recipes see the trunk alone"
            problems.append(Problem(f"documents[{i}].parameters.output", wrong, "give it in the last recipe"))
    for i, recipe in enumerate(recipes):
        if gives_tasks(recipe) and recipe.base_model in names:
            wrong = f"{recipe.base_model!r} is an earlier recipe's, and an output for each task refers to its base"
            problems.append(Problem(f"documents[{i}].base_model", wrong, "write it to a folder first"))
    for i, name in enumerate(names[:-1]):
        if name is not None and name not in used:
            problems.append(Problem(f"documents[{i}].name", f"no later recipe uses {name!r}", "use it, or remove the recipe"))
    return problems


def _refs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The paths, hub ids and names that a recipe's models consist of, with where they stand."""
    written = [(f"{path}.model", entry.model) for path, entry in entries_in(recipe)]
    for piece in pieces(recipe):
        written += [(f"{source.path}.model", source.model) for source in piece.sources]
        written += [("base_model", piece.base)] if piece.base is not None else []
    for path, model in dict.fromkeys(written):
        reference = Reference.parse(model)
        yield path, reference.path
        if reference.lora is not None:
            yield path, reference.lora

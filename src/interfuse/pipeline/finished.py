"""Finished runs: the model of an output folder, built again, and several of them compared on the same data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interfuse.errors import CheckpointError, DataError, ModelError, OptionError, Problem, UserError
from interfuse.pipeline.record import DESCRIPTION, RECIPE
from interfuse.recipe import Recipe, load_recipe
from interfuse.recipe.check import names_of

if TYPE_CHECKING:
    from torch import nn

    from interfuse.evaluation.comparison import Comparison


def description(folder: str | Path) -> dict[str, Any]:
    """What `interfuse.json` in `folder` says; empty where there is none."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"can't be read ({error})", "a file that interfuse wrote")) from None
    return about


def is_saved(ref: str) -> bool:
    """Whether `ref` is a folder whose network takes more than `load_model` to build: a fusion, or one made by code."""
    return description(ref).get("kind") in ("fusion", "ensemble", "network")


def load_run(folder: str | Path, *, trust_code: bool = False) -> nn.Module:
    """The model of an output folder, in evaluation mode, from its recorded recipe and its weights.

    trust_code: allow the `python:` references of the recipe. Raises `ModelError` or `CheckpointError`.
    """
    from interfuse.models import load_model
    from interfuse.pipeline.networks import load_network
    from interfuse.recipe.schema import ModelEntry
    from interfuse.saving import load

    about = description(folder)
    if not (Path(folder) / RECIPE).is_file():
        return load(folder, trust_code=trust_code)
    recipe = load_recipe(Path(folder) / RECIPE)
    if about.get("kind") == "network":
        first = recipe.models[0] if recipe.base_model is None else ModelEntry(model=recipe.base_model)
        plain = first.model_copy(update={"weights": None})
        return load(folder, load_network(plain, trust_code=trust_code), trust_code=trust_code)
    if about.get("kind") in ("fusion", "ensemble"):
        without = [member["name"] for member in about["members"] if member["reference"] is None]
        entries = dict(zip(names_of(recipe), recipe.models, strict=True))
        models = {name: load_network(entries[name], trust_code=trust_code) for name in without}
        return load(folder, models, trust_code=trust_code)
    if not (Path(folder) / "config.json").is_file():
        wrong = "holds merged weights without their network's code"
        raise ModelError(Problem(str(folder), wrong, "load them with load_model(CODE, weights=FOLDER)"))
    return load_model(str(folder), trust_code=trust_code)


def compare_runs(
    references: Sequence[str | Path],
    data: Any,
    *,
    metric: str | None = None,
    trust_code: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Finished runs side by side on the same test data: see `compare`.

    references: output folders; recipes, which are run first, into a folder that is thrown away; or models as `load_model`
        takes them. data: what `load_data` reads, in the way that the runs' own recipes say; these must agree.
    metric: left out, accuracy for classes and mse for numbers.
    """
    from interfuse.data import load_data
    from interfuse.evaluation.compare import compare
    from interfuse.pipeline.networks import default_metric

    models, recipes = _opened(references, trust_code, device, progress)
    options = _reading(recipes)
    loaded = load_data(data, trust_code=trust_code, path="--data", **options)
    if loaded.has_texts:
        loaded = loaded.tokenize(_tokenizers(recipes))
    return compare(models, loaded, metric=metric or default_metric(loaded), device=device, progress=progress)


def _opened(
    references: Sequence[str | Path], trust_code: bool, device: str | None, progress: bool
) -> tuple[dict[str, nn.Module], dict[str, Recipe]]:
    """Models by name, and the recipes of those that have one; recipes are checked before the first of them is run."""
    from interfuse.pipeline.networks import load_network
    from interfuse.pipeline.steps import check, run
    from interfuse.recipe.schema import ModelEntry

    problems: list[Problem] = []
    for reference in references:
        if _is_recipe(reference):
            try:
                check(reference, trust_code=trust_code)
            except UserError as error:
                problems += [Problem(f"{reference}: {p.path}", p.wrong, p.allowed) for p in error.problems]
    if problems:
        raise OptionError(*problems)
    models: dict[str, nn.Module] = {}
    recipes: dict[str, Recipe] = {}
    for reference in references:
        name = _name(reference, models)
        if _is_recipe(reference):
            with tempfile.TemporaryDirectory() as folder:
                run(reference, Path(folder) / "out", trust_code=trust_code, device=device, progress=progress)
                models[name] = load_run(Path(folder) / "out", trust_code=trust_code)
                recipes[name] = load_recipe(Path(folder) / "out" / RECIPE)
        elif (Path(reference) / DESCRIPTION).is_file():
            models[name] = load_run(reference, trust_code=trust_code)
            if (Path(reference) / RECIPE).is_file():
                recipes[name] = load_recipe(Path(reference) / RECIPE)
        else:
            models[name] = load_network(ModelEntry(model=str(reference)), trust_code=trust_code)
            recipes[name] = Recipe(models=[ModelEntry(model=str(reference))])
    return models, recipes


def _is_recipe(reference: str | Path) -> bool:
    return str(reference).endswith((".yaml", ".yml"))


def _name(reference: str | Path, taken: dict[str, Any]) -> str:
    last = Path(str(reference).rpartition(":")[2])
    plain = last.resolve().stem if _is_recipe(reference) else last.resolve().name
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name


def _reading(recipes: dict[str, Recipe]) -> dict[str, Any]:
    """How the data is read, and its classes' names: what the runs' recipes agree on."""
    from interfuse.pipeline.networks import read_options

    found = {name: read_options(recipe.data, names_of(recipe) if recipe.form == "single" else ())
             for name, recipe in recipes.items() if recipe.data is not None}  # fmt: skip
    different = [name for name, options in found.items() if options != next(iter(found.values()))]
    if different:
        first = next(iter(found))
        wrong = f"{first} reads {found[first]}, {different[0]} reads {found[different[0]]}"
        raise DataError(Problem("--data", f"the runs read their data differently: {wrong}", "compare runs that agree"))
    return dict(next(iter(found.values()))) if found else {}


def _tokenizers(recipes: dict[str, Recipe]) -> Any:
    """The tokenizers for all runs: one for plain networks, or one for each model's name."""
    from interfuse.pipeline.networks import load_tokenizers

    alone = [recipe for recipe in recipes.values() if recipe.form in ("single", "merge")]
    if alone and len(alone) < len(recipes):
        raise DataError(Problem("--data", "text is read differently by fusions and plain networks", "compare one kind"))
    if alone:
        references = list(dict.fromkeys(recipe.base_model or recipe.models[0].model for recipe in alone))
        if len(references) > 1:
            wrong = f"the models have tokenizers of their own: {references}"
            raise DataError(Problem("--data", wrong, "compare models with the same tokenizer"))
        return load_tokenizers(alone[0])
    joined: dict[str, Any] = {}
    for recipe in recipes.values():
        joined |= load_tokenizers(recipe)
    return joined

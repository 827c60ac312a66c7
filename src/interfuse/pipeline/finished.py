"""Finished runs: what an output folder says of itself, and its model built again. `comparing` puts several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from interfuse.checkpoints.adapters.pairs import is_adapter
from interfuse.checkpoints.tasks import holds_networks, split_task
from interfuse.errors import CheckpointError, ModelError, Problem, nearest
from interfuse.pipeline.record import DESCRIPTION, RECIPE
from interfuse.recipe import load_recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.schema import ModelEntry, Recipe

if TYPE_CHECKING:
    from torch import nn


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
    return split_network(ref) is not None or description(ref).get("kind") in ("fusion", "ensemble", "network")


def split_network(ref: str) -> tuple[Path, str] | None:
    """The folder and the task of `OUT#TASK` where networks that share layers are in `OUT`; None for any other reference."""
    found = split_task(ref)
    return found if found is not None and holds_networks(found[0]) else None


def home_of(ref: str) -> str:
    """Where a network's tokenizer lies: for `OUT#TASK` with the model that it was made of."""
    found = split_network(ref)
    if found is None or not (found[0] / RECIPE).is_file():
        return ref
    recipe = load_recipe(found[0] / RECIPE)
    entries = dict(zip(names_of(recipe), recipe.models, strict=True))
    return home_of(entries[found[1]].model) if found[1] in entries else ref


def reference_of(recipe: Recipe) -> ModelEntry:
    """The model whose code, config and tokenizer a single network has."""
    return next((ModelEntry(model=ref) for ref in recipe.beside.values()), None) or recipe.models[0]


def classes_of(ref: str) -> tuple[str, ...] | None:
    """The classes that `OUT#TASK` learned, in the order of its outputs, where it's known."""
    found = split_network(ref)
    tasks = {} if found is None else description(found[0]).get("run", {}).get("tasks") or {}
    classes = None if found is None else tasks.get(found[1], {}).get("classes")
    return tuple(classes) if classes else None


def load_network(entry: ModelEntry, *, trust_code: bool) -> nn.Module:
    """One network: from a folder that a run wrote, or else as `load_model` does."""
    from interfuse.models import load_model

    if not is_saved(entry.model):
        return load_model(entry.model, weights=entry.weights, trust_code=trust_code)
    if entry.weights is not None:
        raise ModelError(Problem(entry.model, "already has its weights", "remove `weights`"))
    found = split_network(entry.model)
    if found is None:
        return load_run(entry.model, trust_code=trust_code)
    whole: Any = load_run(found[0], trust_code=trust_code)
    if found[1] not in whole.names:
        raise ModelError(Problem(entry.model, f"has no task {found[1]!r}", nearest(found[1], whole.names)))
    return cast("nn.Module", whole.network(found[1]))


def load_run(folder: str | Path, *, trust_code: bool = False) -> nn.Module:
    """The model of an output folder, in evaluation mode, from its recorded recipe and its weights.

    trust_code: allow the `python:` references of the recipe. Raises `ModelError` or `CheckpointError`.
    """
    from interfuse.models import load_model
    from interfuse.saving import load

    about = description(folder)
    if about.get("kind") == "mixture":
        return load_model(str(folder), trust_code=trust_code)
    if is_adapter(folder):
        wrong = "holds a LoRA adapter, not a network"
        raise ModelError(Problem(str(folder), wrong, "load it with peft, or merge MODEL+ADAPTER"))
    if not (Path(folder) / RECIPE).is_file():
        return load(folder, trust_code=trust_code)
    recipe = load_recipe(Path(folder) / RECIPE)
    made_of_others = about.get("parts") or about.get("kind") in ("fusion", "ensemble")
    if recipe.form in ("single", "distill") and made_of_others:  # trained further, or taught: its members are its own
        whole: Any = load_network(ModelEntry(model=recipe.target or recipe.models[0].model), trust_code=trust_code)
        return load(folder, dict(zip(whole.names, whole.backbones, strict=True)), trust_code=trust_code)
    if about.get("parts"):
        entries, parts = dict(zip(names_of(recipe), recipe.models, strict=True)), [part["name"] for part in about["parts"]]
        networks = {name: load_network(_plain(entries[name]), trust_code=trust_code) for name in parts}
        return load(folder, networks, trust_code=trust_code)
    if about.get("kind") == "network":
        network = load_network(_plain(reference_of(recipe)), trust_code=trust_code)
        if about.get("grown"):
            from interfuse.pipeline.growing import grown_again

            network = grown_again(network, about, recipe.seed)
        return load(folder, network, trust_code=trust_code)
    if about.get("kind") in ("fusion", "ensemble"):
        without = [member["name"] for member in about["members"] if member["reference"] is None]
        entries = dict(zip(names_of(recipe), recipe.models, strict=True))
        models = {name: load_network(entries[name], trust_code=trust_code) for name in without}
        return load(folder, models, trust_code=trust_code)
    if not (Path(folder) / "config.json").is_file():
        wrong = "holds merged weights without their network's code"
        raise ModelError(Problem(str(folder), wrong, "load them with load_model(CODE, weights=FOLDER)"))
    return load_model(str(folder), trust_code=trust_code)


def _plain(entry: ModelEntry) -> ModelEntry:
    """A model without weights of its own, which are in the folder."""
    return entry.model_copy(update={"weights": None})


def code_of(folder: str | Path) -> list[str]:
    """The `python:` references that are called when the network of an output folder is built again."""
    split = split_network(str(folder))
    folder = folder if split is None else split[0]
    if not is_saved(str(folder)) or not (Path(folder) / RECIPE).is_file():
        return []
    recipe = load_recipe(Path(folder) / RECIPE)
    refs = [*(entry.model for entry in recipe.models), *recipe.beside.values()]
    found = [[ref] if ref.startswith("python:") else code_of(ref) for ref in refs]
    return list(dict.fromkeys(ref for part in found for ref in part))

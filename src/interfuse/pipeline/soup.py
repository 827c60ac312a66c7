"""A recipe of `greedy_soup` into a plain `linear` one: its models are tried on the validation data before anything is written.

The search itself is `evaluation.soup`'s. Models that are files are merged from file to file, into a folder that is thrown
away, and loaded one at a time; networks that code builds are merged in memory.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from interfuse.checkpoints.writer import check_output
from interfuse.engine.chain import plan_recipe
from interfuse.engine.merge import merge
from interfuse.engine.output.folder import merge_into
from interfuse.evaluation.soup import choose, measured
from interfuse.models import load_model
from interfuse.pipeline.finished import load_network
from interfuse.pipeline.networks import BASE, device_name, load_networks, load_sets, metric_of, settled, size_of
from interfuse.pipeline.record import hash_source
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, tested_alone


def soup_of(recipe: Recipe, names: Sequence[str] | None = None) -> Recipe:
    """The average of these models of a soup's recipe (None: of all), as the recipe of a `linear` merge."""
    entries = {
        name: entry.model_copy(update={"name": name, "parameters": {"weight": 1.0}})
        for name, entry in zip(names_of(recipe), recipe.models, strict=True)
    }
    models = [entries[name] for name in (entries if names is None else names)]
    return recipe.model_copy(update={"merge_method": "linear", "models": models, **tested_alone(recipe)})


def chosen_soup(
    recipe: Recipe,
    out: Path,
    *,
    inputs: Sequence[str],
    of_files: bool,
    dry_run: bool,
    overwrite: bool,
    trust_code: bool,
    threads: int | None,
    device: str | None,
    progress: bool,
) -> tuple[tuple[Recipe], dict[str, Any]]:
    """The `linear` recipe of the models that were chosen, and how they were, for the record; nothing is written to `out`.

    In a dry run none is tried: it's the recipe of all, and the record has no steps.
    """
    assert recipe.data is not None  # the check of the recipe asks for it
    if dry_run:
        return (soup_of(recipe),), {"validation": recipe.data.validation, "steps": []}
    check_output(out, overwrite=overwrite, inputs=inputs)
    if of_files:
        plan_recipe(soup_of(recipe))  # that they fit each other, before any is loaded
    with settled(recipe.seed, threads), tempfile.TemporaryDirectory(prefix="interfuse-soup-") as scratch:
        only = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": None})})
        data = load_sets(only, trust_code=trust_code)["validation"]
        metric, size = metric_of(recipe, data), size_of(recipe)
        networks = {} if of_files else load_networks(recipe, trust_code=trust_code)
        networks.pop(BASE, None)

        def value(names: Sequence[str]) -> float:
            if of_files:
                model = _from_files(recipe, names, Path(scratch), trust_code, threads)
            else:
                model = networks[names[0]] if len(names) == 1 else merge("linear", [networks[name] for name in names])
            return measured(model, data, metric, device=device_name(device), progress=progress, **size)

        soup = choose(names_of(recipe), value, metric)
    found = {
        "metric": soup.metric,
        "validation": recipe.data.validation,
        "sha256": hash_source(recipe.data.validation),
        "value": soup.value,
        "steps": [dataclasses.asdict(step) for step in soup.steps],
    }
    return (soup_of(recipe, [name for name, weight in soup.weights.items() if weight]),), found


def _from_files(recipe: Recipe, names: Sequence[str], folder: Path, trust_code: bool, threads: int | None) -> nn.Module:
    """The average of these models, loaded from a folder; a model alone as it is."""
    entries = dict(zip(names_of(recipe), recipe.models, strict=True))
    if len(names) == 1:
        return load_network(entries[names[0]], trust_code=trust_code)
    read = soup_of(recipe, names)
    plan, sources = plan_recipe(read)
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        written = [read.model_dump(mode="json", exclude_defaults=True)]
        merge_into(plan, sources, Path(inner), recipes=written, threads=threads, progress=False)
        return load_model(inner, trust_code=trust_code)

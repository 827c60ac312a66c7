"""A recipe of `adamerging` into a plain one of `task_arithmetic`: coefficients are learned before anything is written.

The learning itself is `training.coefficients`', of networks in memory; the plain recipe is then run as any other, by the
engine from file to file where its models are files, and has every number that was learned.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from interfuse.checkpoints.writer import check_output
from interfuse.data import Data
from interfuse.engine.chain import plan_recipe
from interfuse.errors import DataError, ModelError, Problem, UserError
from interfuse.layout.heads import find_heads
from interfuse.models import load_tokenizer
from interfuse.pipeline.classes import UNNAMED
from interfuse.pipeline.networks import BASE, device_name, load_networks, merged_networks, settled
from interfuse.pipeline.reading import in_order, read_options
from interfuse.pipeline.record import hash_source
from interfuse.pipeline.trial import try_networks
from interfuse.recipe import Recipe
from interfuse.recipe.check import experts_of, names_of, options_of, tested_alone
from interfuse.recipe.own_data import effective, place_of
from interfuse.recipe.values import matcher
from interfuse.training.coefficients import Coefficients, learn_coefficients


def plain_recipe(recipe: Recipe, weights: Mapping[str, Any]) -> Recipe:
    """The recipe of the merge with these weights, a model's name -> its `weight`; it has only test data."""
    experts = experts_of(recipe)
    models = []
    for name, entry in zip(names_of(recipe), recipe.models, strict=True):
        parameters = {"weight": weights[name]} if entry in experts else {}
        models.append(entry.model_copy(update={"name": name, "parameters": parameters, "data": None}))
    update: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {}, "models": models, "training": None}
    return recipe.model_copy(update=update | tested_alone(recipe))


def learned_merge(
    recipe: Recipe,
    out: Path,
    *,
    inputs: list[str],
    of_files: bool,
    dry_run: bool,
    overwrite: bool,
    trust_code: bool,
    threads: int | None,
    device: str | None,
    progress: bool,
) -> tuple[tuple[Recipe], dict[str, Any]]:
    """The plain recipe with what was learned, and how it was, for the record; nothing is written to `out`.

    In a dry run nothing is learned: it's the recipe with the coefficients' start, and the record has no history.
    """
    options = options_of(recipe)
    experts = experts_of(recipe)
    tasks = [name for name, entry in zip(names_of(recipe), recipe.models, strict=True) if entry in experts]
    begun = plain_recipe(recipe, dict.fromkeys(tasks, options["start"]))
    about = {**options, "data": _sources(recipe, tasks)}
    if dry_run:
        return (begun,), about | {"history": []}
    check_output(out, overwrite=overwrite, inputs=inputs)
    if of_files:
        plan_recipe(begun)  # that they fit each other, before any is loaded
    with settled(recipe.seed, threads):
        networks = load_networks(recipe, trust_code=trust_code)
        if not of_files:
            merged_networks(begun, networks)
        place = device_name(device)
        found = _learned(recipe, {name: network.to(place) for name, network in networks.items()}, options, trust_code, progress)
    said = {"history": found.history, "values": found.values, "groups": {k: list(v) for k, v in found.groups.items()}}
    return (plain_recipe(recipe, {name: found.setting(name) for name in tasks}),), about | said


def _learned(
    recipe: Recipe, networks: dict[str, nn.Module], options: Mapping[str, Any], trust_code: bool, progress: bool
) -> Coefficients:
    experts = {name: network for name, network in networks.items() if name != BASE}
    base, beyond = _as_expert(networks[BASE], next(iter(experts.values())))
    sets = _sets(recipe, experts, trust_code)
    for name, data in sets.items():
        try_networks({name: experts[name]}, data)
    kept = [matcher(pattern) for pattern in (*(recipe.drop or ()), *(recipe.keep or ()))]
    heads = _heads(recipe, experts)
    own = [name for name in base.state_dict() if name in beyond or name in heads or any(test(name) for test in kept)]
    given = recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}
    return learn_coefficients(
        base, experts, sets, own=list(map(glob.escape, own)), progress=progress, **{"seed": recipe.seed, **given, **options}
    )  # fmt: skip


def _heads(recipe: Recipe, experts: Mapping[str, nn.Module]) -> frozenset[str]:
    """The tensors that each task has for its own, where the recipe keeps heads apart; whether they fit has been looked at."""
    if recipe.heads is None:
        return frozenset()
    shapes = {name: {key: tuple(t.shape) for key, t in expert.state_dict().items()} for name, expert in experts.items()}
    return find_heads(shapes, recipe.heads).names


def _as_expert(base: nn.Module, expert: nn.Module) -> tuple[nn.Module, set[str]]:
    """The base as a network of the experts' kind, and its tensors that the base doesn't have: a head, of a bare Transformers
    encoder."""
    prefix = getattr(expert, "base_model_prefix", "")
    inner = getattr(expert, prefix, None) if isinstance(prefix, str) and prefix else None
    if type(base) is type(expert) or type(inner) is not type(base):
        return base, set()
    whole = copy.deepcopy(expert)
    absent = getattr(whole, prefix).load_state_dict(base.state_dict(), strict=False).missing_keys
    beyond = {name for name in whole.state_dict() if not name.startswith(f"{prefix}.")}
    return whole, beyond | {f"{prefix}.{name}" for name in absent}


def _sets(recipe: Recipe, experts: Mapping[str, nn.Module], trust_code: bool) -> dict[str, Data]:
    """Each task's training data; every problem in any of them at once."""
    sets: dict[str, Data] = {}
    problems: list[Problem] = []
    for i, (name, entry) in enumerate(zip(names_of(recipe), recipe.models, strict=True)):
        if name not in experts:
            continue
        section, where = effective(recipe, entry.data), place_of(recipe, f"models[{i}].data", entry.data, "train")
        options = read_options(section) | {"labels": section.labels is not False, "trust_code": trust_code, "path": where}
        try:
            data = in_order(str(section.train), section, None, UNNAMED, **options)
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if data.has_texts:
            tokenizer = load_tokenizer(entry.model)
            if tokenizer is None:
                problems.append(Problem(f"models[{i}]", "no tokenizer for the text in its data", "a folder with its tokenizer"))
                continue
            data = data.tokenize(tokenizer)
        sets[name] = data
    if problems:
        raise (DataError if any("data" in problem.path for problem in problems) else ModelError)(*problems)
    return sets


def _sources(recipe: Recipe, tasks: list[str]) -> dict[str, Any]:
    """What is learned from, by task, with its hash."""
    entries = dict(zip(names_of(recipe), recipe.models, strict=True))
    sources = {name: str(effective(recipe, entries[name].data).train) for name in tasks}
    return {name: {"source": source, "sha256": hash_source(source)} for name, source in sources.items()}

"""Runs that fill a target from trained networks: copied once, or built up in stages, which a killed run goes on with.

What is kept of finished stages lies in `STAGES` in the unfinished output folder, under a key of the recipe, its models and
its data. How tensors are copied, networks grow and stages follow is `transfer`'s part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from interfuse.checkpoints.source import open_checkpoint
from interfuse.data import Data
from interfuse.errors import OptionError, Problem
from interfuse.models import load_tokenizer
from interfuse.pipeline.finished import description
from interfuse.pipeline.growing import note_growth, rehearsed
from interfuse.pipeline.networks import (
    TARGET,
    Result,
    device_name,
    evaluate,
    lightning_on,
    load_networks,
    load_sets,
)
from interfuse.pipeline.record import RECIPE, STAGES, as_yaml, hash_data
from interfuse.pipeline.task_data import Sets, load_stages
from interfuse.pipeline.transplanting import asked_of
from interfuse.pipeline.trial import try_networks
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, options_of
from interfuse.recipe.sections import Stage as Written
from interfuse.saving import write_model
from interfuse.transfer.stages import Stage, Stages, StagesRecord
from interfuse.transfer.transplant import transplant


def run_layers(recipe: Recipe, folder: Path, *, trust_code: bool, device: str | None, progress: bool) -> Result:
    """Load, copy, grow, train, evaluate, and write the model's files to `folder`. The recipe has been checked."""
    place = device_name(device)
    networks = load_networks(recipe, trust_code=trust_code)
    hashes = {name: open_checkpoint(network).hash() for name, network in networks.items()}
    sets = load_sets(_common(recipe), trust_code=trust_code)
    own = load_stages(recipe, trust_code=trust_code)
    for data in [next(iter(found.values())) for found in (sets, *own) if found]:
        try_networks({TARGET: networks[TARGET]}, data)
    classes = next((data.classes for found in (sets, *own) for data in (found or {}).values() if data.classes), None)
    models = {name: networks[name] for name in names_of(recipe)}
    result = Result(networks[TARGET], hashes=hashes, classes=classes)
    if recipe.fusion == "transplant":
        (name, source), *_ = models.items()
        asked = asked_of(options_of(recipe), recipe.models[0].model, str(recipe.target), "parameters")
        report = transplant(source, result.model, **asked, show=progress)
        result.notes = (f"from {name}: {report.summary()}",)
    else:
        kept = folder / STAGES / _key(recipe, hashes)
        record = _stages(recipe, networks[TARGET], models, sets, own, kept, place, progress)
        result.model, result.training, result.notes = record.model, _trained(record), tuple(record.lines())
        shutil.rmtree(folder / STAGES)
    if "test" in sets:
        result.test = evaluate(recipe, result.model, sets["test"], place, progress=progress)
    result.model.to("cpu")
    write_model(result.model, folder)
    note_growth(recipe, sets, own, folder)
    if (folder / "config.json").exists():
        tokenizer = load_tokenizer(str(recipe.target))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return result


def finished(recipe: Recipe, out: Path, *, trust_code: bool) -> dict[str, Any] | None:
    """What `interfuse.json` in `out` says of the run, if that was of this recipe with the same models and data; else None."""
    about = description(out).get("run")
    if about is None or not (out / RECIPE).is_file() or (out / RECIPE).read_text(encoding="utf-8") != as_yaml([recipe]):
        return None
    known = {part["name"]: part["xxh3"] for part in about["inputs"]["models"]}
    networks = load_networks(recipe, trust_code=trust_code)
    same = all(known.get(name.strip()) == open_checkpoint(network).hash() for name, network in networks.items())
    found: dict[str, Any] = about
    return found if same and about["inputs"]["data"] == hash_data(recipe) else None


def _common(recipe: Recipe) -> Recipe:
    """The recipe with the data of all stages; a share of data that only stages have is theirs to split off."""
    data = recipe.data
    if data is None or data.train is not None or not isinstance(data.validation, float):
        return recipe
    return recipe.model_copy(update={"data": data.model_copy(update={"validation": None})})


def _key(recipe: Recipe, hashes: Mapping[str, str]) -> str:
    """By what finished stages are known again: the recipe, the networks' weights, the data's bytes."""
    parts = [recipe.model_dump(mode="json", exclude_defaults=True), recipe.seed, dict(hashes), hash_data(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _stages(
    recipe: Recipe,
    target: nn.Module,
    models: Mapping[str, nn.Module],
    sets: Mapping[str, Data],
    own: list[Sets | None],
    kept: Path,
    device: str,
    progress: bool,
) -> StagesRecord:
    grown = rehearsed(recipe, target, sets, own)
    common = recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}
    parts = zip(recipe.stages or [], own, grown, _copied(recipe), strict=True)
    stages = Stages(_stage(stage, common, data, growth, copied) for stage, data, growth, copied in parts)
    for other in kept.parent.glob("*"):
        if other != kept:  # of another recipe, or other models
            shutil.rmtree(other)
    how = {"folder": kept, "resume": True, "seed": recipe.seed, "progress": progress, **lightning_on(device)}
    return stages.run(target, models, sets.get("train"), sets.get("validation"), **how)


def _copied(recipe: Recipe) -> list[dict[str, Any]]:
    """What each stage copies, as `Stage` takes it."""
    entries = dict(zip(names_of(recipe), recipe.models, strict=True))
    found: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for i, stage in enumerate(recipe.stages or ()):
        copied = dict(stage.copied or {})
        for name, how in copied.items():
            try:
                if isinstance(how, dict):
                    copied[name] = asked_of(how, entries[name].model, str(recipe.target), f"stages[{i}].copied.{name}")
            except OptionError as error:
                problems += error.problems
        found.append(copied)
    if problems:
        raise OptionError(*problems)
    return found


def _stage(
    written: Written,
    common: Mapping[str, Any],
    own: Sets | None,
    grow: Callable[[nn.Module], nn.Module] | None,
    copied: Mapping[str, Any],
) -> Stage:
    said = written.training.model_dump(exclude_none=True) if written.training is not None else {}
    options = {**common, **said}
    train = options.pop("train_only", None)
    return Stage(
        written.name or "",
        copied,
        grow=grow,
        train=[] if options.get("epochs") == 0 else train,
        data=None if own is None else (own["train"], own.get("validation")),
        options=options,
    )


def _trained(record: StagesRecord) -> dict[str, Any] | None:
    """The last training that there was, with every stage's own."""
    stages = record.written()
    last = next((stage["training"] for stage in reversed(stages) if stage["training"] is not None), None)
    return None if last is None else {**last, "stages": stages}

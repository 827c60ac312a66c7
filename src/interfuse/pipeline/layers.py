"""Transplants and stages in a run: a recipe's target filled from its models, and trained where it has stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from interfuse.data import Data
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, options_of
from interfuse.recipe.sections import Stage as Written
from interfuse.transfer.stages import Stage, Stages, StagesRecord
from interfuse.transfer.transplant import transplant


def put_layers(
    recipe: Recipe,
    target: nn.Module,
    networks: Mapping[str, nn.Module],
    sets: Mapping[str, Data],
    device: Mapping[str, Any],
    *,
    progress: bool,
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Fill `target` as the recipe says; the last training's record with those of all stages, and what was copied."""
    models = {name: networks[name] for name in names_of(recipe)}
    if recipe.fusion == "transplant":
        (name, source), *_ = models.items()
        report = transplant(source, target, **options_of(recipe), show=progress)
        return None, (f"from {name}: {report.summary()}",)
    common = recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}
    stages = Stages(_stage(written, common) for written in recipe.stages or ())
    record = stages.run(target, models, sets["train"], sets.get("validation"), seed=recipe.seed, progress=progress, **device)
    return _trained(record), tuple(str(record).splitlines())


def _stage(written: Written, common: Mapping[str, Any]) -> Stage:
    own = written.training.model_dump(exclude_none=True) if written.training is not None else {}
    options = {**common, **own}
    train = options.pop("train_only", None)
    return Stage(written.name or "", written.copied or {}, train=[] if options.get("epochs") == 0 else train, options=options)


def _trained(record: StagesRecord) -> dict[str, Any] | None:
    """The last training that there was, with every stage's own."""
    stages = [
        {"name": stage.name, "copied": {name: report.summary() for name, report in stage.copies.items()}}
        | {"training": asdict(stage.training) if stage.training is not None else None}
        for stage in record.stages
    ]
    last = next((stage["training"] for stage in reversed(stages) if stage["training"] is not None), None)
    return None if last is None else {**last, "stages": stages}

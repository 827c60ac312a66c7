"""Distillation in a run: a recipe's target taught by its models. The loss and the training are `training.distill`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from interfuse.data import Data
from interfuse.pipeline.classes import Spaces, say_classes
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, options_of
from interfuse.training.distill import distill


def teach(
    recipe: Recipe,
    target: nn.Module,
    networks: Mapping[str, nn.Module],
    sets: Mapping[str, Data],
    spaces: Spaces,
    device: Mapping[str, Any],
    *,
    progress: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Train `target` in place; the training's record, and how far it follows its teachers."""
    teachers = {name: networks[name] for name in names_of(recipe)}
    given = recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}
    options = {"seed": recipe.seed, **given, **options_of(recipe), **device}
    options["classes"] = None if spaces.own is None else [spaces.own[name] for name in teachers]
    record = distill(teachers, target, sets["train"], sets.get("validation"), progress=progress, **options)
    say_classes(target, spaces.joined or sets["train"].classes)
    numbers = "mean squared difference from" if record.numbers else "agreement with"
    without = "" if record.labelled else ", without labels"
    said = f"{numbers} the teachers' outputs on {record.agreement_on} data {record.agreement:.4g}{without}"
    return asdict(record), (said,)

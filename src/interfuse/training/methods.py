"""The methods of outputs as recipes know them: `ensemble` and `distill`. What they do is in the modules that they name.

Importing this module registers both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from interfuse.ensemble import Ensemble as Ensemble
from interfuse.registry import register
from interfuse.training.distill import DistillRecord, distill

_GIVEN = inspect.signature(distill).parameters  # its defaults, which are written there alone

_TEMPERATURE = "What teachers' and student's logits are divided by before they are compared."
_ALPHA = "The share of the loss on labels, beside following the teachers; without labels it is 0."
_COMBINE = (
    "How several teachers are weighted for each example: all alike; by confidence in the label, or without labels in"
    " themselves; or per_task, those that know the label."
)
_CLASSES = "Each teacher's class names in the order of its outputs, where they differ: a list a model, or by model name."
_HINTS = "{teacher's module: target's module} whose features are to follow; of several teachers {teacher: {..}}."
_WEIGHT = "How much the hints count in the loss."


@register("distill", "outputs", paper="Hinton et al. 2015, arXiv:1503.02531", needs="a target, training data")
def distilled(
    teachers: Mapping[str, nn.Module],
    target: nn.Module,
    train: Any,
    validation: Any = None,
    *,
    temperature: Annotated[float, Field(gt=0, description=_TEMPERATURE)] = _GIVEN["temperature"].default,
    alpha: Annotated[float, Field(ge=0, le=1, description=_ALPHA)] = _GIVEN["alpha"].default,
    combine: Annotated[Literal["mean", "confidence", "per_task"], Field(description=_COMBINE)] = _GIVEN["combine"].default,
    classes: Annotated[Sequence[Sequence[str]] | Mapping[str, Sequence[str]] | None, Field(description=_CLASSES)] = None,
    hints: Annotated[dict[str, Any] | None, Field(description=_HINTS)] = None,
    hint_weight: Annotated[float, Field(ge=0, description=_WEIGHT)] = _GIVEN["hint_weight"].default,
) -> DistillRecord:
    """Trains `target` to predict what the models do, on data with or without labels; the models are its teachers."""
    spaces = [classes[name] for name in teachers] if isinstance(classes, Mapping) else classes
    return distill(
        teachers, target, train, validation, temperature=temperature, alpha=alpha, combine=combine, classes=spaces,
        hints=hints, hint_weight=hint_weight,
    )  # fmt: skip

"""Coefficients that are learned from data: what a recipe may say of them. Nothing is learned here.

A run learns them by `training.coefficients` and is then a plain recipe of `task_arithmetic`, which the engine runs.
Source: AdaMerging, https://arxiv.org/abs/2310.02575.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Combination
from interfuse.registry import register

_OBJECTIVE = (
    "What is made small, summed over the tasks: the predictions' entropy, KL(expert, merged) (teacher), or cross_entropy on"
    " labels."
)
_PER = "One coefficient a task, or one a task and layer."
_STEPS = "Steps of Adam, each on one batch of every task."
_START = "Every coefficient's first value."
_SPLIT = "What the training data are called; reported says that they may be what is reported on."


@register("adamerging", "weights", form="coefficients", paper="https://arxiv.org/abs/2310.02575", needs="a base, training data")
def adamerging(
    weights: Sequence[float],
    *,
    objective: Annotated[Literal["entropy", "teacher", "cross_entropy"], Field(description=_OBJECTIVE)] = "entropy",
    per: Annotated[Literal["task", "layer"], Field(description=_PER)] = "layer",
    steps: Annotated[int, Field(ge=1, description=_STEPS)] = 500,
    start: Annotated[float, Field(allow_inf_nan=False, description=_START)] = 0.3,
    split: Annotated[Literal["train", "reported"], Field(description=_SPLIT)] = "train",
) -> Combination:
    """Task arithmetic whose coefficients are learned by gradient through the merged network, without labels if need be.

    A run learns them from `data.train`, the recipe's or each model's own, and is then the `task_arithmetic` merge with these
    numbers, which `recipe.yaml` has. In Python: `interfuse.learn_coefficients`. Numbers alone can't say what is learned: an
    `OptionError`.
    """
    allowed = "run a recipe with data.train, or learn them by interfuse.learn_coefficients and merge by task_arithmetic"
    raise OptionError(Problem("merge_method", "adamerging learns its weights from data", allowed))

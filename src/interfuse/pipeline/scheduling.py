"""A schedule of weights in a run, as its recipe has it, and its picture. What it does is `training.schedule`'s."""

from __future__ import annotations

from pathlib import Path

from interfuse.extras import require
from interfuse.pipeline.record import WEIGHTS
from interfuse.recipe import Recipe
from interfuse.training.schedule import WeightSchedule


def schedule_of(recipe: Recipe) -> WeightSchedule | None:
    """The schedule that a recipe asks for, None where it asks for none; `MissingExtra` where it couldn't be drawn."""
    asked = recipe.training.schedule if recipe.training is not None else None
    if asked is None:
        return None
    require("matplotlib")  # before anything is trained
    return WeightSchedule(**asked.model_dump(exclude_none=True))


def draw_weights(schedule: WeightSchedule, folder: Path) -> None:
    """Each model's weight by epoch, as a picture in the run's folder."""
    schedule.save_figure(folder / WEIGHTS)

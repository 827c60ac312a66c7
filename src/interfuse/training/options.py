"""What is wrong among the options of `fit`, Lightning's included, before there is a network or data. Trains nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.errors import OptionError, Problem, nearest
from interfuse.evaluation.metrics import find_metric
from interfuse.extras import require, silenced
from interfuse.training.losses import LOSSES

#: Options of Lightning's that have another name here, or stand among `fit`'s own.
_OURS = {"max_epochs": "it is `epochs`"}


def options_problems(given: Mapping[str, Any], own: Sequence[str]) -> list[Problem]:
    """Every problem in `given`, which has a value for each option in `own`, and Lightning's."""
    problems = [
        Problem(name, f"got {given[name]!r}", allowed) for name, (fine, allowed) in _RULES.items() if not fine(given[name])
    ]
    loss, metric, resume = given["loss"], given["metric"], given["resume"]
    if not callable(loss) and loss not in LOSSES:
        problems.append(Problem("loss", f"got {loss!r}", f"{nearest(str(loss), LOSSES)} Or a function."))
    if metric is not None:
        try:
            find_metric(metric)
        except OptionError as error:
            problems += error.problems
    if resume is not None and not Path(resume).exists():
        problems.append(Problem("resume", f"no checkpoint at {str(resume)!r}", "a file that `checkpoints` left"))
    return problems + _of_lightning({name: value for name, value in given.items() if name not in own}, own)


def _of_lightning(given: Mapping[str, Any], own: Sequence[str]) -> list[Problem]:
    """What Lightning's trainer doesn't know, or refuses."""
    kind = require("lightning.pytorch").Trainer
    known = [name for name in inspect.signature(kind).parameters if name not in _OURS]
    problems = [
        Problem(name, "unknown option", _OURS.get(name) or nearest(name, [*known, *own])) for name in given if name not in known
    ]
    plain = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    if not problems and plain:
        try:
            with silenced("lightning.pytorch"):
                kind(**{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **plain})
        except Exception as error:  # whatever Lightning's many connectors raise
            problems.append(Problem(", ".join(plain), str(error), "what lightning.pytorch.Trainer takes on this machine"))
    return problems


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any) -> bool:
    listed = value if isinstance(value, Sequence) else [value]
    return value is None or isinstance(value, str) or all(isinstance(name, str) for name in listed)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (_whole(0), "a whole number from 0 up"),
    "learning_rate": (lambda v: _number(v) and v > 0, "a number above 0"),
    "batch_size": (_whole(1), "a whole number from 1 up"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a number from 0 up"),
    "patience": (lambda v: v is None or _whole(1)(v), "a whole number from 1 up, or None"),
    "seed": (_whole(0), "a whole number from 0 up"),
    "train_only": (_names, "patterns of parameters' names, or 'head'"),
    "lora": (
        lambda v: v is None or isinstance(v, Mapping) or _whole(1)(v),
        "a rank from 1 up, options of peft's LoraConfig, or None",
    ),
    "layer_decay": (lambda v: v is None or (_number(v) and 0 < v <= 1), "a number above 0, at most 1, or None"),
    "l2_sp": (lambda v: _number(v) and v >= 0, "a number from 0 up"),
}

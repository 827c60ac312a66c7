"""What is wrong with stages: with each alone when they are listed, and with networks and data before anything is changed.

What a stage copies and trains is tried on names and shapes as far as they are known: until a stage grows the network.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.engine.wording import together
from interfuse.errors import ModelError, OptionError, Problem, UserError, nearest
from interfuse.training.fit import wrong_options
from interfuse.training.parameters import HEAD
from interfuse.transfer.stage import Stage
from interfuse.transfer.transplant import prepare, transplant

#: What `Stages.run` itself gives to `fit`, and to `transplant`.
_FIXED = ("train_only", "checkpoints", "resume")
_ENDS = ("source", "target", "out", "overwrite")


def stage_problems(stages: Sequence[Any]) -> list[Problem]:
    """What is wrong with a list of stages, before there is a network."""
    problems = [] if stages else [Problem("stages", "none are given", "one or more")]
    wrong = [i for i, stage in enumerate(stages) if not isinstance(stage, Stage)]
    problems += [Problem(f"stages[{i}]", f"is a {type(stages[i]).__name__}", "a Stage") for i in wrong]
    if wrong:
        return problems
    for i, stage in enumerate(stages):
        problems += _options(stage, f"stages[{i}]")
    names = [stage.name for stage in stages if stage.name]
    twice = sorted({name for name in names if names.count(name) > 1})
    return problems + [Problem("stages", f"the name {name!r} stands twice", "different names") for name in twice]


def _options(stage: Stage, path: str) -> Iterator[Problem]:
    options = {name: value for name, value in stage.options.items() if name not in _FIXED}
    for problem in wrong_options({**options, "train_only": stage.train}):
        where = "train" if problem.path == "train_only" else f"options.{problem.path}"
        yield problem._replace(path=f"{path}.{where}")
    for name in _FIXED:
        if name in stage.options:
            yield Problem(f"{path}.options.{name}", "isn't an option of a stage", "`train`, and `folder` of Stages.run")
    if stage.grow is not None and not callable(stage.grow):
        yield Problem(f"{path}.grow", f"is a {type(stage.grow).__name__}", "a function from the network to a larger one")
    if stage.data is not None and (len(stage.data) != 2 or isinstance(stage.data[0], Tensor)):
        yield Problem(f"{path}.data", "isn't a pair of data sets", "(train, validation); validation may be None")
    for name, how in stage.copies().items():
        yield from _unknown(how, transplant, _ENDS, f"{path}.copied[{name!r}]")


def _unknown(given: Mapping[str, Any], function: Callable[..., Any], fixed: Sequence[str], path: str) -> list[Problem]:
    """Options that a function doesn't have."""
    known = [name for name in inspect.signature(function).parameters if name not in fixed]
    return [Problem(f"{path}.{name}", "unknown option", nearest(name, known)) for name in given if name not in known]


def check_run(stages: Sequence[Stage], target: nn.Module, models: Mapping[str, nn.Module] | None, train: Any) -> None:
    """Raise a `ModelError` or `OptionError` with all that is known to be wrong before the first stage."""
    if not isinstance(models, Mapping | None):
        raise OptionError(Problem("models", f"got a {type(models).__name__}", "a mapping of names to networks"))
    models = models or {}
    errors: list[UserError] = []
    missing = [
        Problem(f"stages[{i}].copied[{name!r}]", "no model has this name", nearest(name, models))
        for i, stage in enumerate(stages)
        for name in stage.copied
        if name not in models
    ]
    missing += [
        Problem(f"stages[{i}].data", "there is nothing to train on", "data of its own, or train= for all stages")
        for i, stage in enumerate(stages)
        if train is None and stage.data is None and (stage.train is None or stage.train)
    ]
    errors += [ModelError(*missing)] if missing else []
    goal, parameters = open_checkpoint(target), [name for name, _ in target.named_parameters()]
    for i, stage in enumerate(stages):
        errors += _copies(stage, f"stages[{i}]", goal, models)
        if stage.grow is not None:
            break
        unfit = [Problem(f"stages[{i}].train", *wrong) for wrong in unmatched(stage.train, parameters)]
        errors += [OptionError(*unfit)] if unfit else []
    if errors:
        raise together(errors)


def _copies(stage: Stage, path: str, goal: Checkpoint, models: Mapping[str, nn.Module]) -> Iterator[UserError]:
    """What `transplant` would refuse."""
    for name, how in stage.copies().items():
        if name not in models:
            continue
        asked = {key: value for key, value in how.items() if key != "show"}
        try:
            prepare(open_checkpoint(models[name]), goal, **asked)
        except UserError as error:
            kind = ModelError if not isinstance(error, OptionError) else OptionError
            yield kind(*(p._replace(path=f"{path}.copied[{name!r}]: {p.path}") for p in error.problems))


def unmatched(train: Sequence[str] | str | None, parameters: Sequence[str]) -> list[tuple[str, str]]:
    """Patterns of what is trained that fit no parameter."""
    patterns = [train] if isinstance(train, str) else list(train or ())
    return [
        (f"{pattern!r} matches no parameter", nearest(pattern, parameters))
        for pattern in patterns
        if pattern != HEAD and not fnmatch.filter(parameters, pattern)
    ]

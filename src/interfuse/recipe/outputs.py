"""What must hold in recipes of the outputs: distillation, and class names where models' classes differ; and of a schedule
of weights. Pure.

The models' class names are those of `parameters.classes`; what models say of themselves is `pipeline.classes`' to find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from interfuse.errors import Problem, nearest
from interfuse.recipe.learned import learns
from interfuse.recipe.schema import Recipe

#: What a distillation calls its target where inputs go by models' names.
STUDENT = "student"


def outputs_problems(recipe: Recipe, names: Sequence[str]) -> list[Problem]:
    """Every problem of an ensemble or a distillation, of models with these names, that no other check sees."""
    found: list[Problem] = []
    if recipe.form in ("ensemble", "distill"):
        found += _classes(recipe.parameters.get("classes"), names)
    if recipe.form == "distill":
        found += [*_distill(recipe, names), *_hints(recipe, names)]
    return [*found, *_labels(recipe), *_schedule(recipe)]


def readers(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """What inputs by name are called: the models, and the target of a distillation."""
    return [*names, STUDENT] if recipe.form == "distill" else list(names)


def written_classes(recipe: Recipe, names: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """Each model's class names in the order of its outputs, as `parameters.classes` has them; None where it's left out."""
    classes = recipe.parameters.get("classes") if recipe.form in ("ensemble", "distill") else None
    if classes is None:
        return None
    listed = [classes[name] for name in names] if isinstance(classes, Mapping) else classes
    return {name: tuple(space) for name, space in zip(names, listed, strict=True)}


def by_model_problems(given: Mapping[str, Any], names: Sequence[str], path: str, allowed: str) -> Iterator[Problem]:
    """What is wrong with the names in a mapping that has an entry, `allowed`, for each model."""
    for name in names:
        if name not in given:
            yield Problem(f"{path}.{name}", "missing", allowed)
    for name in given:
        if name not in names:
            yield Problem(f"{path}.{name}", "no model has this name", nearest(str(name), names))


def _classes(classes: Any, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with lists of class names; their types are checked with the other options."""
    if isinstance(classes, Mapping):
        yield from by_model_problems(classes, names, "parameters.classes", "its class names")
        listed = classes
    elif isinstance(classes, list):
        if len(classes) != len(names):
            yield Problem("parameters.classes", f"{len(classes)} lists for {len(names)} models", "one list a model")
        listed = dict(zip(names, classes, strict=False))
    else:
        return
    for name, space in listed.items():
        if isinstance(space, list) and len(dict.fromkeys(map(str, space))) < len(space):
            yield Problem(f"parameters.classes.{name}", "a name occurs twice", "each class has a name of its own")


def _distill(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    if recipe.target is None:
        yield Problem("target", "missing", "the network that is taught: a folder, a hub id, or python:module:function")
    own = [entry.data for entry in recipe.models]
    if not any(own) and (recipe.data is None or recipe.data.train is None):
        yield Problem("data.train", "missing", "the target is trained: give the data to train on, with or without labels")
    yield from _own_data(recipe)
    for i, name in enumerate(names):
        if name == STUDENT:
            yield Problem(f"models[{i}].name", f"{name!r} is what the target is called", "choose another")
    per_task = recipe.parameters.get("combine") == "per_task"
    if per_task and recipe.parameters.get("classes") is None:
        yield Problem("parameters.classes", "missing", "combine: per_task needs each model's class names")
    if recipe.data is None or recipe.data.labels is not False:
        return
    if per_task:
        yield Problem("parameters.combine", "got 'per_task' for data without labels", "mean or confidence")
    for path, section, key in (
        ("parameters.alpha", recipe.parameters, "alpha"),
        ("training.loss", recipe.training.model_dump(exclude_none=True) if recipe.training else {}, "loss"),
        ("training.metric", recipe.training.model_dump(exclude_none=True) if recipe.training else {}, "metric"),
    ):
        if section.get(key):
            yield Problem(path, "means nothing for data without labels", "remove the key, or give labels")


def _own_data(recipe: Recipe) -> Iterator[Problem]:
    """What teachers' own data can't be: all of it is one training set."""
    for i, entry in enumerate(recipe.models):
        if entry.data is None:
            continue
        if entry.data.train is None:
            yield Problem(f"models[{i}].data.train", "missing", "what is taught on: a teacher's own training data")
        for key in ("validation", "test", "labels", "input", "seed"):
            if getattr(entry.data, key) is not None:
                yield Problem(f"models[{i}].data.{key}", "holds for all teachers", "give it under the recipe's `data`")


def _hints(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    hints, training = recipe.parameters.get("hints"), recipe.training
    if not isinstance(hints, Mapping) or not hints:
        return
    if len(names) > 1:
        for name, pairs in hints.items():
            if name not in names:
                yield Problem(f"parameters.hints.{name}", "no model has this name", nearest(str(name), names))
            elif not isinstance(pairs, Mapping):
                yield Problem(f"parameters.hints.{name}", f"got {pairs!r}", "{this model's module: target's module}")
    for key in ("train_only", "lora"):
        if training is not None and getattr(training, key) is not None:
            allowed = "hints are for layers that are trained: leave one of the two out"
            yield Problem(f"training.{key}", "stands beside parameters.hints", allowed)


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    """A schedule of weights, which has them only in one fusion, and goes by validation data."""
    trainings = [("training", recipe.training)]
    trainings += [(f"stages[{i}].training", stage.training) for i, stage in enumerate(recipe.stages or ())]
    for path, training in trainings:
        if training is None or training.schedule is None:
            continue
        if recipe.fusion != "weighted":
            yield Problem(f"{path}.schedule", "sets the weights of a weighted fusion", "remove the key, or fusion: weighted")
        elif recipe.data is None or recipe.data.validation is None:
            yield Problem("data.validation", "missing", "the weights are set by it: give a source, or a share: 0.1")


def _labels(recipe: Recipe) -> Iterator[Problem]:
    """Data without labels where labels are learned from."""
    unread = recipe.form == "distill" or learns(recipe) or (recipe.fusion == "stitch" and recipe.training is None)
    if recipe.data is not None and recipe.data.labels is False and not unread:
        yield Problem("data.labels", "false, where labels are learned from", "remove the key, or give fusion: distill")

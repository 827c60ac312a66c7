"""What recipes of layers need: a target or none, stages, each task's data. Pure; lists every problem, reads nothing.

`transplant` and `stages` fill a target; the models of `share_trunk` and `tie` are one task each, with data of its own;
`stitch` joins two. What the options are is in `transfer/methods.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from interfuse.errors import OptionError, Problem, nearest
from interfuse.recipe.learned import learns
from interfuse.recipe.own_data import effective, place_of
from interfuse.recipe.schema import TARGETED, TASKS, Recipe
from interfuse.recipe.sections import Stage
from interfuse.registry import Method, find, methods

STITCHED = ("a", "b")
_REMOVE = "remove the key"


def layers_problems(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with a recipe of layers, and with data of a model's own in any other."""
    for i, entry in enumerate(recipe.models):
        if entry.data is not None and recipe.fusion not in (*TASKS, "distill") and not learns(recipe):
            users = "fusion: share_trunk, tie or distill, or merge_method: adamerging"
            yield Problem(f"models[{i}].data", f"a model has its own only with {users}", "use `data`")
    if recipe.form != "layers":
        return
    if recipe.fusion in TARGETED and recipe.target is None:
        yield Problem("target", "missing", "the network that is copied into: a folder, a hub id, or python:module:function")
    checks = {"transplant": _transplant, "stages": _stages, "share_trunk": _share_trunk, "tie": _tie, "stitch": _stitch}
    if recipe.fusion in checks:
        yield from checks[recipe.fusion](recipe, names)


def finds_depth(recipe: Recipe) -> bool:
    """Whether a shared trunk's depth is found by validation data."""
    return recipe.fusion == "share_trunk" and recipe.parameters.get("depth", "auto") == "auto"


def trains(stage: Stage, recipe: Recipe) -> bool:
    """Whether a stage trains at all: its own word on epochs, else that of all."""
    said = [part.epochs for part in (stage.training, recipe.training) if part is not None and part.epochs is not None]
    return not said or said[0] != 0


def _transplant(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    if len(names) > 1:
        yield Problem("models", f"{len(names)} given", "one to copy from, or fusion: stages")
    for key in ("stages", "training"):
        if getattr(recipe, key) is not None:
            yield Problem(key, "a transplant copies, and trains nothing", "remove the key, or give fusion: stages")


def _stages(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    if not recipe.stages:
        yield Problem("stages", "none given", "at least 1")
        if effective(recipe, None).train is None:
            yield Problem("data.train", "missing", "stages train: give the data to train on")
    said: set[str] = set()
    for i, stage in enumerate(recipe.stages or ()):
        at = f"stages[{i}]"
        for name in stage.copied or ():
            if name not in names:
                yield Problem(f"{at}.copied.{name}", "no model has this name", f"one of {names}")
        for problem in _stage_data(recipe, stage, at):
            if problem.path not in said:
                said.add(problem.path)
                yield problem
    yield from _tested(recipe, effective(recipe, None).test is not None)


def _stage_data(recipe: Recipe, stage: Stage, at: str) -> Iterator[Problem]:
    data = effective(recipe, stage.data)
    if stage.data is not None and stage.data.test is not None:
        yield Problem(f"{at}.data.test", "a stage isn't evaluated", "give it under the recipe's `data`")
    if stage.grow is not None and not (stage.grow.wider or stage.grow.deeper):
        yield Problem(f"{at}.grow", "nothing is named", "give wider: {path: width} or deeper: [path]")
    if stage.data is not None and stage.grow is None and not trains(stage, recipe):
        yield Problem(f"{at}.data", "this stage trains nothing", _REMOVE)
    if stage.grow is not None and data.train is None:
        yield Problem("data.train", "missing", "growth is tried on examples: give data, here or in the stage's `data`")
    if not trains(stage, recipe):
        return
    if data.train is None:
        yield Problem("data.train", "missing", "stages train: give the data to train on, here or in each stage's `data`")
    for path, training in ((f"{at}.training", stage.training), ("training", recipe.training)):
        if training is not None and training.patience is not None and data.validation is None:
            yield Problem(f"{path}.patience", "stands without validation data", "give data.validation, or a share: 0.1")


def _share_trunk(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    yield from _merge_of_trunks(recipe)
    chosen = finds_depth(recipe)
    for key in ("tolerance", "within", "depths"):
        if not chosen and key in recipe.parameters:
            yield Problem(f"parameters.{key}", "says how a depth is found, and one is given", "remove it, or depth: auto")
    if recipe.training is None:
        for path, own, key in _given(recipe, "train"):
            if not isinstance(effective(recipe, own).validation, float):
                yield Problem(place_of(recipe, path, own, key), "there is no `training`", "say how to train, or remove it")
    if not chosen and recipe.training is None:
        for path, own, key in _given(recipe, "validation"):
            yield Problem(place_of(recipe, path, own, key), "nothing is chosen by it here", "remove it, or depth: auto")
    yield from _tasks(recipe, names, train=recipe.training is not None, validation=chosen)


def _given(recipe: Recipe, key: str) -> Iterator[tuple[str, Any, str]]:
    """Every place where a task's data has a key; an inherited one once."""
    common = recipe.data is not None and getattr(recipe.data, key) is not None
    if common:
        yield "data", None, key
    for i, entry in enumerate(recipe.models):
        if entry.data is not None and getattr(entry.data, key) is not None:
            yield f"models[{i}].data", entry.data, key


def _merge_of_trunks(recipe: Recipe) -> Iterator[Problem]:
    """The method that merges trunks, its options, and its base."""
    name, options = recipe.parameters.get("method", "linear"), recipe.parameters.get("options")
    if not isinstance(name, str) or not (options is None or isinstance(options, dict)):
        return  # the types of options are looked at elsewhere
    try:
        method = find(name, "weights", "parameters.method")
    except OptionError as error:
        yield from error.problems
        return
    if "data" in method.needs:
        others = [other.name for other in methods("weights") if "data" not in other.needs]
        yield Problem("parameters.method", f"{name} learns from whole models", nearest(name, others))
        return
    if method.needs.startswith("a base") and recipe.base_model is None:
        yield Problem("base_model", "missing", f"{name} works on differences from a base")
    yield from _options(method, options or {})


def _options(method: Method, options: dict[str, Any]) -> Iterator[Problem]:
    try:
        method.check({key: value for key, value in options.items() if key != "weights"}, "parameters.options")
    except OptionError as error:
        yield from error.problems


def _tie(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    yield from _tasks(recipe, names, train=True, validation=False)
    for i, layer in enumerate(recipe.parameters.get("layers") or ()):
        for name in layer if isinstance(layer, dict) else ():
            if name not in names:
                yield Problem(f"parameters.layers[{i}].{name}", "no model has this name", f"one of {list(names)}")


def _tasks(recipe: Recipe, names: Sequence[str], *, train: bool, validation: bool) -> Iterator[Problem]:
    """The data of every task, as far as they are needed, and what training them together can't do."""
    if len(names) < 2:
        yield Problem("models", f"{len(names)} given", "at least 2, each with a task")
    tested = False
    for i, (name, entry) in enumerate(zip(names, recipe.models, strict=True)):
        path, data = f"models[{i}].data", effective(recipe, entry.data)
        tested = tested or data.test is not None
        if train and data.train is None:
            yield Problem(f"{path}.train", "missing", f"the tasks are trained together: {name}'s data, here or under `data`")
        if validation and data.validation is None:
            yield Problem(f"{path}.validation", "missing", "the depth is found by it: give it, or parameters.depth: a number")
        if isinstance(data.validation, float) and data.train is None and not train:
            yield Problem(f"{path}.train", "missing", "validation is a share of it")
        if isinstance(data.validation, str) and data.validation == data.test:
            where = place_of(recipe, path, entry.data, "validation")
            yield Problem(where, "is test data too", "what is chosen by can't be what is reported")
        if isinstance(data.input, dict):
            yield Problem(place_of(recipe, path, entry.data, "input"), "one network reads one input", "give a name")
        patient = recipe.training is not None and recipe.training.patience is not None
        if patient and data.validation is None:
            yield Problem("training.patience", f"stands without validation data of {name}", "give it, or a share: 0.1")
    held = [effective(recipe, entry.data).validation is not None for entry in recipe.models]
    if recipe.training is not None and any(held) and not all(held) and not validation:
        wrong = "missing, and other tasks have it"
        for i, there in enumerate(held):
            if not there:
                yield Problem(f"models[{i}].data.validation", wrong, "give every task its own, or a share for all")
    said = {"metric": "of several tasks the loss chooses the epoch", "layer_decay": "not for several networks at once"}
    for key, why in said.items():
        if recipe.training is not None and getattr(recipe.training, key) is not None:
            yield Problem(f"training.{key}", why, _REMOVE)
    yield from _tested(recipe, tested or validation)


def _stitch(recipe: Recipe, names: Sequence[str]) -> Iterator[Problem]:
    if len(names) != 2:
        yield Problem("models", f"{len(names)} given", "2: one up to a place, and one from a place on")
    for i, (entry, name) in enumerate(zip(recipe.models, STITCHED, strict=False)):
        if entry.name not in (None, name):
            yield Problem(f"models[{i}].name", f"got {entry.name!r}", f"{name}: the first model is a, the second b")
    data = effective(recipe, None)
    if data.train is None:
        yield Problem("data.train", "missing", "samples to fit the map to, a few hundred or more; labels aren't read")
    if isinstance(data.input, dict) and sorted(data.input) != sorted(STITCHED):
        yield Problem("data.input", f"{list(data.input)} fit no model one to one", f"one entry for each of {list(STITCHED)}")
    if data.validation is not None and recipe.training is None:
        yield Problem("data.validation", "nothing is trained here", "remove the key, or give `training`")
    if recipe.training is not None and recipe.training.patience is not None and data.validation is None:
        yield Problem("training.patience", "stands without data.validation", "give validation data, or a share: 0.1")
    yield from _tested(recipe, data.test is not None)


def _tested(recipe: Recipe, tested: bool) -> Iterator[Problem]:
    if recipe.evaluate is not None and not tested:
        yield Problem("evaluate", "there is no test data", "give data.test")

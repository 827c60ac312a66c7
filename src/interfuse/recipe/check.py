"""What must hold between a recipe's keys, and what a run of it needs: pure, lists every problem, changes nothing.

`form_problems` looks at the recipe alone; `run_problems` also at the files it names and at whether its code is trusted.
Neither reads a model or a data set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from interfuse.errors import OptionError, Problem
from interfuse.recipe.schema import ModelEntry, Recipe, Wide
from interfuse.registry import Level, Method, find, problems_of

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DATA_FILES = (".npz", ".csv", ".csv.gz")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?([:@][\w.\[\]%-]+)?")
_REMOVE = "remove the key"
TRUST = "read it, then allow it with --trust-code (trust_code=True)"


def names_of(recipe: Recipe) -> list[str]:
    """The models' names in order: as written, or read off the reference and numbered where they repeat."""
    taken = [entry.name for entry in recipe.models if entry.name]
    names: list[str] = []
    for entry in recipe.models:
        name = entry.name
        if name is None:
            last = entry.model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
            plain = re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"\.(safetensors|bin|pt|pth)$", "", last)).strip("_") or "model"
            name, number = plain, 2
            while name in names or name in taken:
                name, number = f"{plain}_{number}", number + 1
        names.append(name)
    return names


def method_of(recipe: Recipe) -> Method | None:
    """The recipe's method, or None for a model alone; `OptionError` with the nearest names."""
    if recipe.form == "single":
        return None
    key, level = _where(recipe)
    return find(getattr(recipe, key), level, key)


def options_of(recipe: Recipe) -> dict[str, Any]:
    """The method's options with their defaults; `OptionError` with every unknown name and bad value."""
    method = method_of(recipe)
    if method is None:
        return {}
    wide = {k: v for k, v in recipe.parameters.items() if recipe.form == "fusion" and k in Wide.model_fields}
    elsewhere = [*wide, *(("weight", "int8_mask") if recipe.form == "merge" else ())]
    problems = []
    try:
        Wide.model_validate(wide)
    except ValidationError as error:
        problems += problems_of(error, "parameters", allowed=list(Wide.model_fields))
    try:
        options = method.check({k: v for k, v in recipe.parameters.items() if k not in elsewhere})
    except OptionError as error:
        problems += error.problems
    if problems:
        raise OptionError(*problems)
    return options | wide


def weights_of(recipe: Recipe) -> list[float] | None:
    """The models' weights in a merge, a model's own before the recipe's; None where none is written."""
    common = recipe.parameters.get("weight")
    weights = [entry.parameters.get("weight", common) for entry in experts_of(recipe)]
    return None if None in weights else [float(weight) for weight in weights if weight is not None]


def experts_of(recipe: Recipe) -> list[ModelEntry]:
    """The models that a merge combines: all, but for the base where the method works on differences from it."""
    method = method_of(recipe)
    needs_base = method is not None and "base" in method.needs
    return [entry for entry in recipe.models if not (needs_base and entry.model == recipe.base_model)]


def form_problems(recipe: Recipe) -> list[Problem]:
    """Every problem that can be seen in the recipe alone."""
    return [*_shape(recipe), *_method(recipe), *_misplaced(recipe), *_data(recipe)]


def _where(recipe: Recipe) -> tuple[str, Level]:
    if recipe.form == "merge":
        return "merge_method", "weights"
    return "fusion", "outputs" if recipe.form == "ensemble" else "features"


def _shape(recipe: Recipe) -> Iterator[Problem]:
    count = len(recipe.models)
    if recipe.fusion is not None and recipe.merge_method is not None:
        yield Problem("merge_method", "stands beside fusion", "keep one of the two")
    elif recipe.form == "single" and count != 1:
        allowed = "give fusion or merge_method, or exactly one model"
        yield Problem("models", f"{count} models and no word on how to fuse them", allowed)
    elif count < 1:
        yield Problem("models", "none given", "at least 1")
    first: dict[str, int] = {}
    for i, entry in enumerate(recipe.models):
        if entry.name and first.setdefault(entry.name, i) != i:
            yield Problem(f"models[{i}].name", f"{entry.name!r} is also models[{first[entry.name]}]'s", "choose another")


def _method(recipe: Recipe) -> Iterator[Problem]:
    try:
        method = method_of(recipe)
    except OptionError as error:
        yield from error.problems
        return
    if method is None:
        if recipe.parameters:
            yield Problem("parameters", "a model alone has no method to set", "remove the key, or give `fusion`")
        return
    try:
        yield from _ramps(recipe.parameters, "parameters") if recipe.form == "merge" else []
        options_of(recipe)
    except OptionError as error:
        yield from (p for p in error.problems if not _is_ramp(recipe, p.path))
    if recipe.form == "merge":
        yield from _merge(recipe, method)


def _is_ramp(recipe: Recipe, path: str) -> bool:
    name = path.removeprefix("parameters.").partition("[")[0].partition(".")[0]
    return recipe.form == "merge" and isinstance(recipe.parameters.get(name), list | dict)


def _ramps(parameters: dict[str, Any], path: str) -> Iterator[Problem]:
    for key, value in parameters.items():
        if isinstance(value, list | dict):
            yield Problem(
                f"{path}.{key}", f"got {value!r}: ramps over depth and filters aren't supported by this version",
                "give one value",
            )  # fmt: skip


def _merge(recipe: Recipe, method: Method) -> Iterator[Problem]:
    if "base" in method.needs and recipe.base_model is None:
        yield Problem("base_model", "missing", f"{method.name} merges differences from a common base")
    common = recipe.parameters.get("weight")
    if "weight" in recipe.parameters and not isinstance(common, list | dict):
        yield from _weight(common, "parameters.weight")
    experts = experts_of(recipe)
    if recipe.models and not experts:
        yield Problem("models", "none besides the base", "give at least one model to merge into it")
    weighted = [entry for entry in experts if "weight" in entry.parameters]
    for i, entry in enumerate(recipe.models):
        path = f"models[{i}].parameters"
        yield from _ramps(entry.parameters, path)
        for key, value in entry.parameters.items():
            if key != "weight" and not isinstance(value, list | dict):
                yield Problem(f"{path}.{key}", f"{method.name} has no {key} for each model", "allowed here: weight")
            elif key == "weight" and not isinstance(value, list | dict):
                yield from _weight(value, f"{path}.weight")
        if weighted and common is None and entry in experts and "weight" not in entry.parameters:
            yield Problem(f"{path}.weight", "missing while other models have one", "give every model a weight, or none")


def _weight(value: Any, path: str) -> Iterator[Problem]:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if not number:
        yield Problem(path, f"got {value!r}", "a finite number")


def _misplaced(recipe: Recipe) -> Iterator[Problem]:
    """Keys that mean nothing in this form: said, never skipped."""
    form = recipe.form
    if form != "merge":
        for key in ("base_model", "dtype", "out_dtype"):
            if getattr(recipe, key) is not None:
                yield Problem(key, "means something only in a merge", f"{_REMOVE}, or give merge_method")
    if form != "fusion" and recipe.head is not None:
        yield Problem("head", "only a fusion of features gets a head", _REMOVE)
    if form in ("merge", "ensemble") and recipe.training is not None:
        yield Problem("training", f"{'a merge' if form == 'merge' else 'an ensemble'} isn't trained", _REMOVE)
    for i, entry in enumerate(recipe.models):
        if form != "merge" and entry.parameters:
            allowed = "options of the method stand under the recipe's own `parameters`"
            yield Problem(f"models[{i}].parameters", "a model has its own only in a merge", allowed)
        if form != "fusion" and entry.tap is not None:
            yield Problem(f"models[{i}].tap", "only a fusion of features reads a tap", _REMOVE)
        if form in ("merge", "ensemble") and entry.freeze is not None:
            yield Problem(f"models[{i}].freeze", "nothing is trained here", _REMOVE)


def _data(recipe: Recipe) -> Iterator[Problem]:
    data, form = recipe.data, recipe.form
    train, validation, test = (data.train, data.validation, data.test) if data else (None, None, None)
    if form == "fusion" and train is None:
        yield Problem("data.train", "missing", "a fusion of features is trained: give the data to train on")
    if form == "single" and train is None and test is None:
        yield Problem("data", "neither train nor test is given", "give data.train to train, data.test to evaluate")
    if form == "single" and train is None and recipe.training is not None:
        yield Problem("data.train", "missing while training is set", "give the data to train on")
    if form in ("merge", "ensemble") and (train is not None or validation is not None):
        yield Problem("data.train" if train is not None else "data.validation", "nothing is trained here", _REMOVE)
    elif validation is not None and train is None:
        yield Problem("data.validation", "stands without data.train", "give the data to train on")
    if recipe.training is not None and recipe.training.patience is not None and validation is None:
        yield Problem("training.patience", "stands without data.validation", "give validation data, or a share: 0.1")
    if recipe.evaluate is not None and test is None:
        yield Problem("evaluate", "there is no test data", "give data.test")
    if data is not None and isinstance(data.input, dict):
        names = names_of(recipe)
        wrong = [name for name in data.input if name not in names]
        wrong += [name for name in names if name not in data.input]
        if wrong:
            yield Problem("data.input", f"{wrong} fit no model one to one", f"one entry for each of {names}")


def run_problems(recipe: Recipe, *, trust_code: bool) -> list[Problem]:
    """Every file that is missing, and every reference to code that isn't trusted."""
    return [*_sources(recipe, trust_code), *_models(recipe, trust_code)]


def _sources(recipe: Recipe, trust_code: bool) -> Iterator[Problem]:
    for key in ("train", "validation", "test"):
        ref = getattr(recipe.data, key) if recipe.data else None
        if isinstance(ref, str):
            yield from source_problems(ref, f"data.{key}", trust_code)


def source_problems(ref: str, path: str, trust_code: bool) -> Iterator[Problem]:
    """What can be seen to be wrong with one data source: it isn't there, or runs code that isn't trusted."""
    if ref.startswith("python:"):
        yield from _code(ref, path, trust_code)
    elif _absent(ref, _DATA_FILES) and not Path(ref.rpartition(":")[0] or ref).exists():
        yield Problem(path, f"{ref} doesn't exist", "give a file, a folder, a hub id, or python:module:function")


def _models(recipe: Recipe, trust_code: bool) -> Iterator[Problem]:
    refs = [(f"models[{i}].model", entry.model) for i, entry in enumerate(recipe.models)]
    if recipe.base_model is not None:
        refs.append(("base_model", recipe.base_model))
    for path, ref in refs:
        if ref.startswith("python:"):
            yield from _code(ref, path, trust_code)
        elif Path(ref).is_file() and recipe.form != "merge":
            allowed = "name the code that builds it, python:module:function, and give this file as `weights`"
            yield Problem(path, f"{ref} is a file of weights without its network", allowed)
        elif _absent(ref, _WEIGHT_FILES):
            file = "a file of weights, " if recipe.form == "merge" else ""
            yield Problem(path, f"{ref} doesn't exist", f"give a folder, {file}a hub id, or python:module:function")
    for i, entry in enumerate(recipe.models):
        if entry.weights is not None and not Path(entry.weights).exists():
            yield Problem(f"models[{i}].weights", f"{entry.weights} doesn't exist", "give a file or folder of weights")


def _absent(ref: str, files: tuple[str, ...]) -> bool:
    """Whether `ref` can only be a path, and nothing is there; a hub id can't be told without the hub."""
    path_like = ref.startswith(("/", ".", "~")) or ref.endswith(files) or not _HUB_ID.fullmatch(ref)
    return path_like and not Path(ref).exists()


def _code(ref: str, path: str, trust_code: bool) -> Iterator[Problem]:
    if not re.fullmatch(r"python:[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", ref):
        yield Problem(path, f"got {ref!r}", "python:package.module:function")
    elif not trust_code:
        yield Problem(path, f"{ref} runs code", TRUST)

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

from interfuse.checkpoints.adapters.pairs import is_adapter
from interfuse.checkpoints.tasks import on_disk
from interfuse.errors import OptionError, Problem
from interfuse.recipe.crossing import crossing_problems
from interfuse.recipe.layers import STITCHED, layers_problems
from interfuse.recipe.learned import learned_problems, learns
from interfuse.recipe.merges import BESIDE, entries_in, is_plain, merge_problems, tokenizer_models, weighing_problems
from interfuse.recipe.outputs import outputs_problems, readers
from interfuse.recipe.own_data import named
from interfuse.recipe.pieces import pieces
from interfuse.recipe.reads import reads_problems
from interfuse.recipe.references import Reference
from interfuse.recipe.schema import APART, ModelEntry, Recipe, Wide
from interfuse.registry import Level, Method, find, problems_of

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_DATA_FILES = (".npz", ".csv", ".csv.gz")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?([:@][\w.\[\]%-]+)?")
_REMOVE = "remove the key"
TRUST = "read it, then allow it with --trust-code (trust_code=True)"


def names_of(recipe: Recipe) -> list[str]:
    """The models' names in order: as written, or read off the reference and numbered where they repeat.

    Those of a stitch are always `a` and `b`.
    """
    if recipe.fusion == "stitch" and len(recipe.models) == len(STITCHED):
        return list(STITCHED)
    taken = [entry.name for entry in recipe.models if entry.name]
    names: list[str] = []
    for entry in recipe.models:
        name = entry.name
        if name is None:
            plain = "_".join(filter(None, map(_short, _parts(entry.model)))) or "model"
            name, number = plain, 2
            while name in names or name in taken:
                name, number = f"{plain}_{number}", number + 1
        names.append(name)
    return names


def _parts(model: str) -> list[str]:
    """A model and its adapter."""
    reference = Reference.parse(model)
    return [reference.path, *([] if reference.lora is None else [reference.lora])]


def _short(ref: str) -> str:
    last = ref.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"\.(safetensors|bin|pt|pth)$", "", last)).strip("_")


def method_of(recipe: Recipe) -> Method | None:
    """The recipe's method, or None for a model alone; `OptionError` with the nearest names."""
    if recipe.form == "single":
        return None
    key, level = _where(recipe)
    return find(getattr(recipe, key), level, key)


def options_of(recipe: Recipe) -> dict[str, Any]:
    """The method's options with their defaults; `OptionError` with every unknown name and bad value.

    Of a merge, those that hold for every tensor alike: one that differs is an `OptionError`, for a `layout` has it.
    """
    method = method_of(recipe)
    if method is None:
        return {}
    if recipe.form == "merge" and not is_plain(recipe.parameters):
        uneven = [key for key, value in recipe.parameters.items() if isinstance(value, list | dict)]
        raise OptionError(*(Problem(f"parameters.{key}", "isn't the same for every tensor", "read a layout") for key in uneven))
    wide = {k: v for k, v in recipe.parameters.items() if recipe.form == "fusion" and k in Wide.model_fields}
    elsewhere = [*wide, *(BESIDE if recipe.form == "merge" else ())]
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


def adapters_alone(recipe: Recipe) -> bool:
    """Whether a merge is one of LoRA adapters with each other, without their base."""
    models = recipe.models if recipe.form == "merge" and recipe.base_model is None else []
    return bool(models) and all(is_adapter(entry.model) for entry in models)


def weights_of(recipe: Recipe) -> list[float] | None:
    """The models' weights in a merge, a model's own before the recipe's; None where none is written."""
    common = recipe.parameters.get("weight")
    weights = [entry.parameters.get("weight", common) for entry in experts_of(recipe)]
    return None if None in weights else [float(weight) for weight in weights if weight is not None]


def experts_of(recipe: Recipe) -> list[ModelEntry]:
    """The models that a merge combines: all, but for the base where the method works on differences from it."""
    method = method_of(recipe)
    apart = method is not None and method.sees_base
    return [entry for entry in recipe.models if not (apart and entry.model == recipe.base_model)]


def tested_alone(recipe: Recipe) -> dict[str, Any]:
    """The `data` and `evaluate` of a recipe whose other data has done its part: the test data, or None for both."""
    if recipe.data is None or recipe.data.test is None:
        return {"data": None, "evaluate": None}
    used = dict.fromkeys(("train", "validation", "labels"))
    return {"data": recipe.data.model_copy(update=used), "evaluate": recipe.evaluate}


def form_problems(recipe: Recipe) -> list[Problem]:
    """Every problem that can be seen in the recipe alone."""
    further = outputs_problems(recipe, names_of(recipe))
    further += crossing_problems(recipe, names_of(recipe))
    further += learned_problems(recipe, experts_of(recipe)) if learns(recipe) else []
    return [
        *_shape(recipe),
        *_method(recipe),
        *_misplaced(recipe),
        *layers_problems(recipe, names_of(recipe)),
        *reads_problems(recipe, names_of(recipe)),
        *_data(recipe),
        *further,
    ]


_SOURCES = ("models", "slices", "modules")


def _where(recipe: Recipe) -> tuple[str, Level]:
    if recipe.form == "merge":
        return "merge_method", "adapters" if adapters_alone(recipe) else "weights"
    if recipe.form in ("layers", "cross_stitch"):
        return "fusion", "layers"
    return "fusion", "outputs" if recipe.form in APART else "features"


def _shape(recipe: Recipe) -> Iterator[Problem]:
    count = len(recipe.models)
    given = [key for key in _SOURCES if getattr(recipe, key)]
    if recipe.fusion is not None and recipe.merge_method is not None:
        yield Problem("merge_method", "stands beside fusion", "keep one of the two")
    elif recipe.form == "single" and count != 1:
        allowed = "give fusion or merge_method, or exactly one model"
        yield Problem("models", f"{count} models and no word on how to fuse them", allowed)
    elif recipe.form == "merge" and len(given) > 1:
        yield Problem(given[1], f"stands beside {given[0]}", f"keep one of {', '.join(_SOURCES)}")
    elif (
        count < 1
        and recipe.fusion != "stages"
        and (recipe.form != "merge" or (recipe.slices is None and recipe.modules is None))
    ):
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
        yield from merge_problems(recipe, None) if recipe.form == "merge" else []
        return
    if method is None:
        if recipe.parameters:
            yield Problem("parameters", "a model alone has no method to set", "remove the key, or give `fusion`")
        return
    if recipe.form == "merge":
        yield from merge_problems(recipe, method)
        return
    try:
        options_of(recipe)
    except OptionError as error:
        yield from error.problems


_IN_MERGES = (
    *("base_model", "dtype", "out_dtype", "slices", "modules", "drop", "keep", "heads", "int8_mask"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)


def _misplaced(recipe: Recipe) -> Iterator[Problem]:
    """Keys that mean nothing in this form: said, never skipped."""
    form = recipe.form
    if form != "merge":
        for key in _IN_MERGES:
            if getattr(recipe, key) is not None and not (key == "base_model" and recipe.fusion == "share_trunk"):
                yield Problem(key, "means something only in a merge", f"{_REMOVE}, or give merge_method")
    for key, users in (("target", ("transplant", "stages", "distill")), ("stages", ("stages", "transplant"))):
        if recipe.fusion not in users and getattr(recipe, key) is not None:
            yield Problem(key, f"means something only with fusion: {' or '.join(users)}", _REMOVE)
    if form not in ("fusion", "cross_stitch") and recipe.head is not None:
        yield Problem("head", "only a fusion of features gets a head", _REMOVE)
    if form in ("merge", "ensemble") and recipe.training is not None and not learns(recipe):
        yield Problem("training", f"{'a merge' if form == 'merge' else 'an ensemble'} isn't trained", _REMOVE)
    for path, entry in entries_in(recipe):
        if form != "merge" and entry.parameters:
            allowed = "options of the method stand under the recipe's own `parameters`"
            yield Problem(f"{path}.parameters", "a model has its own only in a merge", allowed)
        if form != "fusion" and entry.tap is not None:
            yield Problem(f"{path}.tap", "only a fusion of features reads a tap", _REMOVE)
        if form in ("merge", "ensemble", "layers", "distill") and entry.freeze is not None:
            yield Problem(f"{path}.freeze", "nothing is trained here", _REMOVE)


def _data(recipe: Recipe) -> Iterator[Problem]:
    data, form = recipe.data, recipe.form
    if form == "layers" and recipe.fusion != "transplant":
        return  # `layers_problems` looks at it
    train, validation, test = (data.train, data.validation, data.test) if data else (None, None, None)
    if form == "fusion" and train is None:
        yield Problem("data.train", "missing", "a fusion of features is trained: give the data to train on")
    if form == "single" and train is None and test is None:
        yield Problem("data", "neither train nor test is given", "give data.train to train, data.test to evaluate")
    if form == "single" and train is None and recipe.training is not None:
        yield Problem("data.train", "missing while training is set", "give the data to train on")
    if chooses(recipe):
        yield from _choice(recipe, train, validation, test)
    elif form == "ensemble":
        yield from _calibration(recipe, train, validation, test)
    elif learns(recipe):
        pass  # `learned_problems` looks at it
    elif (form == "merge" or recipe.fusion == "transplant") and (train is not None or validation is not None):
        yield Problem("data.train" if train is not None else "data.validation", "nothing is trained here", _REMOVE)
    elif validation is not None and train is None and not (form == "distill" and any(e.data for e in recipe.models)):
        yield Problem("data.validation", "stands without data.train", "give the data to train on")
    if recipe.training is not None and recipe.training.patience is not None and validation is None:
        yield Problem("training.patience", "stands without data.validation", "give validation data, or a share: 0.1")
    if recipe.evaluate is not None and test is None and not chooses(recipe):
        yield Problem("evaluate", "there is no test data", "give data.test")
    if data is not None and isinstance(data.input, dict):
        names = readers(recipe, names_of(recipe))
        wrong = [name for name in data.input if name not in names]
        wrong += [name for name in names if name not in data.input]
        if wrong:
            yield Problem("data.input", f"{wrong} fit no model one to one", f"one entry for each of {names}")


def chooses(recipe: Recipe) -> bool:
    """Whether a merge chooses its models by validation data, and is then an average of those."""
    try:
        method = method_of(recipe)
    except OptionError:
        return False
    return recipe.form == "merge" and method is not None and "validation data" in method.needs


def _calibration(recipe: Recipe, train: Any, validation: Any, test: Any) -> Iterator[Problem]:
    """An ensemble learns from validation data alone: it has to where its kind does, and may otherwise."""
    method, kind = method_of(recipe), recipe.parameters.get("combine")
    if train is not None:
        yield Problem("data.train", "nothing is trained here", _REMOVE)
    if validation is None:
        if method is not None and isinstance(kind, str) and method.make.learns(kind):  # type: ignore[attr-defined]
            yield Problem("data.validation", "missing", f"{kind} is learned from it")
    elif not isinstance(validation, str):
        yield Problem("data.validation", f"got {validation!r}", "a source of its own, that no model was trained on")
    elif validation == test:
        yield Problem("data.validation", "is data.test too", "what an ensemble learns from can't be what is reported")


def _choice(recipe: Recipe, train: Any, validation: Any, test: Any) -> Iterator[Problem]:
    if train is not None:
        yield Problem("data.train", "nothing is trained here", _REMOVE)
    if not isinstance(validation, str):
        wrong = "missing" if validation is None else f"got {validation!r}"
        yield Problem(
            "data.validation", wrong, "the models are chosen by it: give a source of its own (in Python: interfuse.greedy_soup)"
        )
    elif validation == test:
        yield Problem("data.validation", "is data.test too", "what the models are chosen by can't be what is reported")
    yield from weighing_problems(recipe, "chooses among", "the models that are chosen weigh the same")


def run_problems(recipe: Recipe, *, trust_code: bool) -> list[Problem]:
    """Every file that is missing, and every reference to code that isn't trusted."""
    return [*_sources(recipe, trust_code), *_models(recipe, trust_code)]


def _sources(recipe: Recipe, trust_code: bool) -> Iterator[Problem]:
    for path, ref in named(recipe):
        yield from source_problems(ref, path, trust_code)


def source_problems(ref: str, path: str, trust_code: bool) -> Iterator[Problem]:
    """What can be seen to be wrong with one data source: it isn't there, or runs code that isn't trusted."""
    if ref.startswith("python:"):
        yield from _code(ref, path, trust_code)
    elif _absent(ref, _DATA_FILES) and not Path(ref.rpartition(":")[0] or ref).exists():
        yield Problem(path, f"{ref} doesn't exist", "give a file, a folder, a hub id, or python:module:function")


def _models(recipe: Recipe, trust_code: bool) -> Iterator[Problem]:
    for path, model in dict.fromkeys(_named(recipe)):
        for i, ref in enumerate(_parts(model)):
            yield from _model(ref, path, recipe.form, trust_code, adapter=i > 0)
        reference = Reference.parse(model)
        for part, revision in ((reference.path, reference.revision), (reference.lora, reference.lora_revision)):
            if part is not None and revision is not None and Path(part).exists():
                yield Problem(path, f"{part} is on this machine and has no revision {revision!r}", "leave it out")
    for path, entry in entries_in(recipe):
        if entry.weights is not None and on_disk(entry.weights) is None:
            yield Problem(f"{path}.weights", f"{entry.weights} doesn't exist", "give a file or folder of weights")


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every model that a recipe names, with where it does."""
    yield from ((f"{path}.model", entry.model) for path, entry in entries_in(recipe))
    if recipe.form == "merge":
        for piece in pieces(recipe):
            yield from ((f"{source.path}.model", source.model) for source in piece.sources)
            if piece.base is not None:
                yield ("base_model" if piece.base == recipe.base_model else f"{piece.path}.base_model", piece.base)
        yield from ((path, str(Reference.parse(model))) for path, model in tokenizer_models(recipe))
    yield from recipe.beside.items()


def _model(ref: str, path: str, form: str, trust_code: bool, *, adapter: bool) -> Iterator[Problem]:
    if ref.startswith("python:"):
        yield from _code(ref, path, trust_code)
    elif Path(ref).is_file() and form != "merge":
        allowed = "name the code that builds it, python:module:function, and give this file as `weights`"
        yield Problem(path, f"{ref} is a file of weights without its network", allowed)
    elif _absent(ref, _WEIGHT_FILES) and not (form == "merge" and "://" in ref):
        file = "a file of weights, a URL, " if form == "merge" else ""
        allowed = f"give a folder, {file}a hub id, or python:module:function"
        yield Problem(path, f"{ref} doesn't exist", "give an adapter's folder or hub id" if adapter else allowed)


def _absent(ref: str, files: tuple[str, ...]) -> bool:
    """Whether `ref` can only be a path, and nothing is there; a hub id can't be told without the hub."""
    path_like = ref.startswith(("/", ".", "~")) or ref.endswith(files) or not _HUB_ID.fullmatch(ref)
    return path_like and on_disk(ref) is None


def _code(ref: str, path: str, trust_code: bool) -> Iterator[Problem]:
    if not re.fullmatch(r"python:[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", ref):
        yield Problem(path, f"got {ref!r}", "python:package.module:function")
    elif not trust_code:
        yield Problem(path, f"{ref} runs code", TRUST)

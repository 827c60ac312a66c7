"""What must hold in a merge: its pieces, and the parameters at every level. Pure, and lists every problem.

An option may stand at any level. One that has a value for each model (`weight`, and those that the method marks) may also
stand with a source; one that the models share may only where a piece has a single source, for elsewhere it would be unclear
whose value counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from interfuse.errors import OptionError, Problem, nearest
from interfuse.methods.calls import make_call
from interfuse.recipe.pieces import Piece, pieces
from interfuse.recipe.references import Reference
from interfuse.recipe.schema import ModelEntry, Recipe
from interfuse.recipe.values import pattern_problems, scalars, setting_problems
from interfuse.registry import Method

#: What a merge's parameters may hold beside the method's options; the second changes nothing.
BESIDE = ("weight", "int8_mask")


def merge_problems(recipe: Recipe, method: Method | None) -> list[Problem]:
    """Everything wrong with a merge that can be seen in its recipe alone; `method` is None where it isn't known."""
    found = pieces(recipe)
    problems = [*_modules(recipe), *_patterns(recipe), *_tokenizer(recipe), *_heads(recipe, method)]
    if method is None:
        return problems
    problems += [*_bases(recipe, method, found), *_tasks(recipe, found)]
    levels = {path: (parameters, 1) for piece in found for path, parameters in piece.levels}
    levels["parameters"] = (recipe.parameters, 1)
    for piece in found:
        levels |= {f"{s.path}.parameters": (s.parameters, len(piece.sources)) for s in piece.sources}
    for path, (parameters, models) in levels.items():
        problems += _level(method, parameters, path, models)
    problems += [*_required(method, found), *_weights(method, found)]
    return [*problems, *dict.fromkeys(problem for piece in found for problem in _together(method, piece))]


def gives_tasks(recipe: Recipe) -> bool:
    """Whether a merge has an output for each task, for some tensors at least."""
    found = pieces(recipe)
    levels = [recipe.parameters, *(level for piece in found for _, level in piece.levels)]
    levels += [source.parameters for piece in found for source in piece.sources]
    settings = [parameters["output"] for parameters in levels if "output" in parameters]
    sound = [setting for setting in settings if not setting_problems(setting, "")]
    return any(value == "per_task" for setting in sound for _, value, _ in scalars(setting, ""))


def _tasks(recipe: Recipe, found: list[Piece]) -> Iterator[Problem]:
    """What an output for each task can't be made of."""
    if not gives_tasks(recipe):
        return
    if recipe.slices is not None or recipe.modules is not None:
        yield Problem("parameters.output", "got 'per_task' beside slices or modules", "give the tasks' models as `models`")
    if recipe.base_model is not None and Reference.parse(recipe.base_model).lora is not None:
        yield Problem("base_model", "has an adapter, and an output for each task refers to it", "write it to a folder first")


def _heads(recipe: Recipe, method: Method | None) -> Iterator[Problem]:
    """What models with heads of their own can't be merged with."""
    if recipe.heads is None:
        return
    beside = [key for key in ("slices", "modules", "tokenizer", "tokenizer_source") if getattr(recipe, key) is not None]
    for key in beside:
        yield Problem(key, "stands beside heads", "give whole models, each with a head of its own")
    if not beside and len([entry for entry in recipe.models if entry.model != recipe.base_model]) < 2:
        yield Problem("models", "fewer than two with a head of their own", "at least two")
    if recipe.data is not None and recipe.data.test is not None:
        yield Problem("data.test", "one data set can't score several tasks", "remove it, and compare FOLDER#NAME")
    if gives_tasks(recipe):
        yield Problem("heads", "stands beside output: per_task", "keep one of the two")
    if method is not None and method.level == "adapters":
        yield Problem("heads", "stands in a merge of adapters alone", "merge MODEL+ADAPTER")
    elif method is not None and "validation data" in method.needs:
        yield Problem("heads", f"{method.name} runs the merged network on data", "another method, or remove the key")


def is_plain(parameters: Mapping[str, Any]) -> bool:
    """Whether every value holds for all tensors alike."""
    return not any(isinstance(value, list | dict) for value in parameters.values())


def _modules(recipe: Recipe) -> Iterator[Problem]:
    for name, module in (recipe.modules or {}).items():
        if (module.slices is None) == (module.models is None):
            wrong = "has neither slices nor models" if module.slices is None else "has both slices and models"
            yield Problem(f"modules.{name}", wrong, "give one of them")
        elif not (module.slices or module.models):
            yield Problem(f"modules.{name}.{'models' if module.slices is None else 'slices'}", "none given", "at least 1")
    if recipe.modules == {}:
        yield Problem("modules", "none given", "at least 1")
    if recipe.slices == []:
        yield Problem("slices", "none given", "at least 1")


def _patterns(recipe: Recipe) -> Iterator[Problem]:
    for key in ("drop", "keep", *(() if isinstance(recipe.heads, str) else ("heads",))):
        for i, pattern in enumerate(getattr(recipe, key) or []):
            yield from pattern_problems(pattern, f"{key}[{i}]")


def _tokenizer(recipe: Recipe) -> Iterator[Problem]:
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        yield Problem("tokenizer_source", "stands beside tokenizer", "give tokenizer.source")
    for token, row in ((recipe.tokenizer.tokens if recipe.tokenizer else None) or {}).items():
        if isinstance(row.source, dict) and "kind" in row.source:
            yield from _row(row.source, f"tokenizer.tokens.{token}.source")


def _row(source: Mapping[str, Any], path: str) -> Iterator[Problem]:
    kind = source["kind"]
    allowed = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}.get(str(kind))
    if allowed is None:
        yield Problem(f"{path}.kind", f"got {kind!r}", "model_token or zero")
        return
    yield from (Problem(f"{path}.{k}", "unknown key", nearest(str(k), allowed)) for k in source if k not in allowed)
    if kind == "model_token":
        if "model" not in source:
            yield Problem(f"{path}.model", "missing", "give a value")
        if ("token" in source) == ("token_id" in source):
            wrong = "stands beside token" if "token" in source else "missing, and so is token"
            yield Problem(f"{path}.token_id", wrong, "give one of the two")
        for key, of, said in (("token", str, "a text"), ("token_id", int, "a whole number from 0")):
            value = source.get(key)
            if key in source and (type(value) is not of or (isinstance(value, int) and value < 0)):
                yield Problem(f"{path}.{key}", f"got {value!r}", said)


def tokenizer_models(recipe: Recipe) -> list[tuple[str, Any]]:
    """Where the tokenizer's keys name a model, and what is written there: not `base` and `union`."""
    written: list[tuple[str, Any]] = [("tokenizer_source", recipe.tokenizer_source)]
    if recipe.tokenizer is not None:
        written.append(("tokenizer.source", recipe.tokenizer.source))
        for token, row in (recipe.tokenizer.tokens or {}).items():
            path, source = f"tokenizer.tokens.{token}.source", row.source
            if isinstance(source, dict) and "kind" in source:
                path, source = f"{path}.model", source.get("model")
            written.append((path, source))
    words = (None, "base", "union")
    return [(path, source) for path, source in written if not (source is None or source in words)]


def _bases(recipe: Recipe, method: Method, found: list[Piece]) -> Iterator[Problem]:
    if "base" in method.needs:
        if recipe.base_model is None and not (found and all(piece.base for piece in found)):
            yield Problem("base_model", "missing", f"{method.name} needs {method.needs}")
        for piece in found:
            if piece.base is not None and all(source.model == piece.base for source in piece.sources):
                wrong = "none besides the base"
                yield Problem(_sources(piece), wrong, "give at least one model to merge into it")


def _sources(piece: Piece) -> str:
    return piece.path if piece.path.endswith("models") else f"{piece.path}.sources"


def _names(method: Method) -> dict[str, bool]:
    """The options that parameters may hold, by every name they go by, and whether each has one value a model."""
    found = {"weight": True, "int8_mask": False}
    for name, field in method.options.model_fields.items():
        found[field.alias or name] = found[name] = name in method.each
    return found


def _level(method: Method, parameters: Mapping[str, Any], path: str, models: int) -> Iterator[Problem]:
    """One level's parameters; `models` is how many sources the piece has, for a source's own, else 1."""
    names = _names(method)
    for option, setting in parameters.items():
        where = f"{path}.{option}"
        if option not in names:
            shown = [field.alias or name for name, field in method.options.model_fields.items()]
            yield Problem(where, f"{method.name} has no such option", nearest(option, [*shown, "weight"]))
        elif option == "int8_mask":
            continue
        elif not names[option] and models > 1:
            yield Problem(where, f"{method.name} has one {option} for all models", "write it under the recipe's `parameters`")
        elif wrong := setting_problems(setting, where):
            yield from wrong
        else:
            for place, value, in_ramp in scalars(setting, where):
                yield from _scalar(method, option, value, place, in_ramp)


def _scalar(method: Method, option: str, value: Any, path: str, in_ramp: bool) -> Iterator[Problem]:
    if option == "weight":
        if isinstance(value, bool | str) or not math.isfinite(value):
            yield Problem(path, f"got {value!r}", "a finite number")
        return
    wrong = _refused(method, option, value)
    if wrong is not None:
        yield Problem(path, wrong.wrong, wrong.allowed)
    elif in_ramp and isinstance(value, int) and _refused(method, option, float(value)):
        yield Problem(path, f"got {value!r} in a list over depth", f"{option} takes whole numbers: give one value")


def _refused(method: Method, option: str, value: Any) -> Problem | None:
    """What the method has against a value; other options that are missing aren't its business."""
    try:
        method.check({option: value})
    except OptionError as error:
        found = [p for p in error.problems if p.path.startswith(f"parameters.{option}") and p.wrong != "missing"]
        return found[0] if found else None
    return None


def _required(method: Method, found: list[Piece]) -> Iterator[Problem]:
    """Options without a default that no level gives."""
    for name, field in method.options.model_fields.items():
        if not field.is_required():
            continue
        for piece in found:
            levels = [parameters for _, parameters in piece.levels]
            for source in piece.sources if name in method.each else piece.sources[:1]:
                mine = [source] if name in method.each else piece.sources
                given = [*levels, *(other.parameters for other in mine)]
                if not any(key in level for level in given for key in (name, field.alias)):
                    yield Problem(f"parameters.{field.alias or name}", "missing", "give a value")
                    return


def _weights(method: Method, found: list[Piece]) -> Iterator[Problem]:
    """A model without a weight where others have one."""
    for piece in found:
        if any("weight" in parameters for _, parameters in piece.levels):
            continue
        merged = [s for s in piece.sources if not (method.sees_base and s.model == piece.base)]
        if any("weight" in source.parameters for source in merged):
            for source in merged:
                if "weight" not in source.parameters:
                    path, allowed = f"{source.path}.parameters.weight", "give every model a weight, or none"
                    yield Problem(path, "missing while other models have one", allowed)


def _together(method: Method, piece: Piece) -> Iterator[Problem]:
    """What the method has against a piece's weights as a whole, where they are the same for all tensors: a sum of 0."""
    levels = [parameters for _, parameters in piece.levels]
    names = {name: name for name in ("weight", *method.options.model_fields)}
    names |= {field.alias: name for name, field in method.options.model_fields.items() if field.alias}
    merged = [s for s in piece.sources if not (method.sees_base and s.model == piece.base)]
    rows = [{names[key]: value for level in (*reversed(levels), s.parameters) for key, value in level.items() if key in names}
            for s in merged]  # fmt: skip
    weights = tuple(row.pop("weight", 1.0) for row in rows)
    shared = {key: value for key, value in (rows[0] if rows else {}).items() if key not in method.each}
    if method.level != "weights" or not rows or any(type(w) not in (int, float) for w in weights) or not is_plain(shared):
        return
    try:
        options = method.check(shared)
        make_call(method, weights, options | {key: (options[key],) * len(rows) for key in method.each})
    except OptionError as error:
        yield from (problem for problem in error.problems if problem.path == "weights")


def entries_in(recipe: Recipe) -> list[tuple[str, ModelEntry]]:
    """The models that stand in a list `models`, the recipe's or a module's, each with its path."""
    found = [(f"models[{i}]", entry) for i, entry in enumerate(recipe.models)]
    for name, module in (recipe.modules or {}).items():
        found += [(f"modules.{name}.models[{i}]", entry) for i, entry in enumerate(module.models or [])]
    return found


def weighing_problems(recipe: Recipe, does: str, why: str) -> Iterator[Problem]:
    """What a merge that weighs its models itself can't have: pieces of models (it `does` something with whole ones), and
    weights, which `why` says."""
    for key in ("slices", "modules"):
        if getattr(recipe, key) is not None:
            yield Problem(key, f"{recipe.merge_method} {does} whole models", "give `models`")
    levels = [("parameters", recipe.parameters), *((f"{path}.parameters", e.parameters) for path, e in entries_in(recipe))]
    for path, parameters in levels:
        if "weight" in parameters:
            yield Problem(f"{path}.weight", why, "remove the key")

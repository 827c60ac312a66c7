"""`merge`: models of one architecture in, one out, in the form in which they came. The edge round plan and engine.

Modules and mappings are merged in memory, paths from file to file. No arithmetic here, and no loading of models.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from interfuse.checkpoints.merged import MERGED
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.checkpoints.tasks import on_disk
from interfuse.checkpoints.writer import MemoryWriter, settle, whole_folder
from interfuse.engine.chain import plan_recipe
from interfuse.engine.local import execute
from interfuse.engine.on_device import device_for
from interfuse.engine.output.finished import finished
from interfuse.engine.output.folder import merge_into
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem, UserError, nearest
from interfuse.plan import Plan
from interfuse.recipe import Recipe
from interfuse.recipe.chain import absolute
from interfuse.recipe.check import form_problems
from interfuse.recipe.merges import gives_tasks
from interfuse.recipe.pieces import references
from interfuse.recipe.values import pattern_problems, plain
from interfuse.registry import problems_of

if TYPE_CHECKING:
    import torch


def merge(
    method: str,
    models: Sequence[Any] | Mapping[str, Any],
    *,
    base: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    weights: float | Sequence[float] | Mapping[str, float] | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    drop: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    device: str | None = None,
    **options: Any,
) -> Any:
    """Merge models of one architecture by a weight method (`interfuse methods` lists them).

    `models` and `base` are all modules, all mappings name -> tensor, or all paths of checkpoints. Modules give a new
    module: a copy of the base, or else of the first, with merged parameters and persistent buffers; what's tied stays
    tied, and the inputs are unchanged. Mappings give a dict. Paths need `out` and give its Path: a new folder with
    `model.safetensors`, the base's (or first's) config, tokenizer and other small files, a model card, and
    `interfuse.json`, which says how it was made; `overwrite` lets it replace a folder, `resume` goes on where a run that was
    killed was, and leaves what one had finished, of the same models, as it is.

    `weights` is a number for all or one a model (1; a mapping goes by the models' names), `dtype` the type of the result's
    floating-point tensors (that of the base or first). `tokenizer` (`"union"`, `"base"`, a model's path, or what a recipe has
    under `tokenizer`) gives models of other tokens, as paths, one vocabulary; `chat_template` is as in a recipe. `drop` and
    `keep` are patterns of tensors' names, as in a recipe: those that are left out (in a module, they stay the reference's),
    and those that are taken as they are from the base, else from the first model that has them. `heads="separate"` (or
    patterns of the heads' tensors) takes models that differ in their heads: modules give a network whose `forward` gives
    {task: output} from one pass through the merged trunk, mappings give {task: mapping}, and in a folder `FOLDER#TASK` is each
    task's model, tasks being the models' names. `seed` is that of all chance,
    `threads` how many (as many as there are processors; the bytes are the same). `options` are the method's own, in any form
    that a recipe may have them: a number, a list over depth, filters; one with a value a model may also be a mapping by the
    models' names. An option named `lambda` is also taken as `lambda_`. NaN or infinity is an error unless `allow_nonfinite`.
    `device` "cuda" merges there what can be, as it does where modules or tensors are on a GPU (docs/devices.md). Raises
    `OptionError`, `CheckpointError`, `RecipeError` for the tokenizer or, for modules, `ModelError`, with every mismatch, and
    then nothing is written.
    """
    models = listed(models)
    names = list(models) if isinstance(models, Mapping) else None
    refs = list(models.values()) if isinstance(models, Mapping) else list(models)
    kind = _kind(refs, base)
    reference = refs[0] if base is None else base
    given, called, ancestor, faulty = _named(refs, base, names, in_memory=kind != "path")
    patterns = _patterns(drop=drop, keep=keep)
    words = _words(tokenizer, chat_template) | patterns
    words |= {} if heads is None else {"heads": heads if isinstance(heads, str) else list(heads)}
    chosen = None if dtype is None else str(dtype)
    recipe, wrong = _recipe(method, called, ancestor, names, weights, chosen, seed, options, words)
    wrong = [*_form_problems(kind, out, tokenizer, chat_template, recipe), *wrong]
    place = None
    try:
        place = device_for(device, [reference])
    except OptionError as error:
        wrong += error.problems
    if recipe is None or faulty or wrong:
        if kind != "path" and not faulty:
            faulty = _misfits(called, ancestor, patterns, given)
        raise (OptionError if not faulty else ModelError if kind == "module" else CheckpointError)(*wrong, *faulty)
    try:
        plan, sources = plan_recipe(recipe, given)
        if kind == "path":
            paths = [path for ref in references(recipe) for path in (ref.path, ref.lora) if path is not None]
            inputs = [path for ref in paths if (path := on_disk(ref)) is not None]
            written = [absolute(recipe, Path.cwd())[0].model_dump(exclude_defaults=True)]
            if resume and finished(Path(out or ""), plan, sources, written, allow_nonfinite=allow_nonfinite) is not None:
                settle(out or "")
                return Path(out or "")
            with whole_folder(Path(out or ""), overwrite=overwrite, inputs=inputs, resume=resume) as folder:
                merge_into(
                    plan, sources, folder, recipes=written,
                    threads=threads, allow_nonfinite=allow_nonfinite, resume=resume, device=place,
                )  # fmt: skip
            return Path(out or "")
        _check_result(reference, plan, kind)
        writer = MemoryWriter(plan.specs)
        execute(plan, sources, writer, threads=threads, allow_nonfinite=allow_nonfinite, device=place)
    except CheckpointError as error:
        if kind == "module":
            raise ModelError(*error.problems) from None
        raise
    return (_as_module if kind == "module" else _as_mapping)(reference, writer.tensors, plan)


def listed(models: Any) -> list[Any] | Mapping[str, Any]:
    """The models as a list, or as the mapping by name that they are; one alone, of any form, is an `OptionError`."""
    if isinstance(models, Mapping):
        return models
    torch = sys.modules.get("torch")
    module = torch and isinstance(models, torch.nn.Module) and not isinstance(models, torch.nn.ModuleList)
    if module or not isinstance(models, Iterable) or isinstance(models, (str, Path)):
        got = repr(str(models)) if isinstance(models, (str, Path)) else f"a {type(models).__name__}"
        raise OptionError(Problem("models", f"got {got}", "give a list of models"))
    return list(models)


def _form_problems(
    kind: str, out: Any, tokenizer: str | Path | Mapping[str, Any] | None, chat_template: str | None, recipe: Recipe | None
) -> list[Problem]:
    """What only folders have, asked for of models in memory; and models that are folders, without one for the result."""
    if kind == "path":
        allowed = "models given as paths are merged into a folder: give out=FOLDER"
        return [] if out is not None else [Problem("out", "missing", allowed)]
    tokenless = f"{kind}s have no tokenizer: leave it out"
    given = [
        ("out", None if out is None else str(out), f"a merge of {kind}s is returned: leave it out"),
        ("tokenizer", tokenizer, tokenless),
        ("chat_template", chat_template, tokenless),
    ]
    problems = [Problem(key, f"got {value!r}", allowed) for key, value, allowed in given if value is not None]
    if recipe is not None and gives_tasks(recipe):
        allowed = "give paths, and out=FOLDER: it's a folder's form"
        problems.append(Problem("output", f"got 'per_task' for {kind}s", allowed))
    return problems


def _misfits(
    models: Sequence[str], base: str | None, patterns: Mapping[str, Any], given: Mapping[str, Checkpoint]
) -> list[Problem]:
    """What is wrong between models in memory, and with the patterns of their names: all but the method and its numbers."""
    content: dict[str, Any] = {"merge_method": "linear", "models": list(models), **patterns}
    content |= {} if base is None else {"base_model": base}
    if any(not isinstance(value, list) or any(pattern_problems(item, "") for item in value) for value in patterns.values()):
        return []  # what they were to match can't be told
    try:
        plan_recipe(Recipe.model_validate(content), given)
    except CheckpointError as error:
        return list(error.problems)
    return []


def _words(tokenizer: str | Path | Mapping[str, Any] | None, chat_template: str | None) -> dict[str, Any]:
    """What a recipe has of the tokenizer."""
    key = "tokenizer" if isinstance(tokenizer, Mapping) else "tokenizer_source"
    words = {key: str(tokenizer) if isinstance(tokenizer, Path) else tokenizer, "chat_template": chat_template}
    return {key: value for key, value in words.items() if value is not None}


def _patterns(**given: Sequence[str] | None) -> dict[str, Any]:
    """What a recipe has under `drop` and `keep`; a text isn't a list of letters."""
    return {key: value if isinstance(value, str) else list(value) for key, value in given.items() if value is not None}


def _named(
    refs: Sequence[Any], base: Any, names: list[str] | None, *, in_memory: bool
) -> tuple[dict[str, Checkpoint], list[str], str | None, list[Problem]]:
    """The checkpoints that are in memory by what a recipe calls them, what it calls the models and the base, and what is wrong
    with their tensors."""
    if not in_memory:
        return {}, [str(ref) for ref in refs], None if base is None else str(base), []
    called = names or [f"models[{i}]" for i in range(len(refs))]
    given: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    places = list(zip(called, refs, strict=True))
    same = [name for name, ref in places if ref is base]  # it may be listed among the models, as in recipes
    ancestor = same[0] if len(same) == 1 < len(refs) else "base"
    if base is not None and ancestor == "base":
        places.insert(0, ("base", base))
    for name, ref in places:
        try:
            given[name] = replace(open_checkpoint(ref), name=f"{name} ({type(ref).__name__})")
        except UserError as error:
            problems += [Problem(f"{name}: {p.path}".rstrip(": "), p.wrong, p.allowed) for p in error.problems]
    return given, called, None if base is None else ancestor, problems


def _recipe(
    method: str,
    models: Sequence[str],
    base: str | None,
    names: list[str] | None,
    weights: float | Sequence[float] | Mapping[str, float] | None,
    dtype: str | None,
    seed: int,
    options: dict[str, Any],
    words: dict[str, Any],
) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that says the same, or None, and what is wrong with it."""
    chosen, wrong = _weights(weights, names, len(models))
    own: list[dict[str, Any]] = [{} if chosen is None else {"weight": weight} for weight in chosen or models]
    shared: dict[str, Any] = {}
    for option, value in options.items():
        if isinstance(value, Mapping) and names and set(value) <= set(names):
            for parameters, name in zip(own, names, strict=True):
                parameters.update({option: value[name]} if name in value else {})
        else:
            shared[option] = list(value) if isinstance(value, tuple) else value
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": m, "parameters": p} | ({"name": n} if n != m and re.fullmatch(r"[A-Za-z0-9_-]+", n) else {})
            for m, n, p in zip(models, names or models, own, strict=True)
        ],
        "parameters": shared,
        "seed": seed,
        **words,
    }
    content |= {} if base is None else {"base_model": base}
    content |= {} if dtype is None else {"out_dtype": dtype}
    recipe = None
    try:
        recipe = Recipe.model_validate(plain(content))
        wrong += form_problems(recipe)
    except ValidationError as error:
        wrong += problems_of(error, "", list(Recipe.model_fields))
    except UserError as error:
        wrong += error.problems
    return recipe, wrong


def _kind(refs: Sequence[Any], base: Any) -> str:
    """`path`, `mapping` or `module`: what all of these are."""
    if not refs:
        raise OptionError(Problem("models", "there are none", "give at least one"))
    places = {f"models[{i}]": ref for i, ref in enumerate(refs)} | ({} if base is None else {"base": base})
    kinds = {place: _kind_of(ref) for place, ref in places.items()}
    wrong = [
        Problem(place, f"is a {type(places[place]).__name__}", "give modules, mappings of tensors, or paths")
        for place, kind in kinds.items()
        if not kind
    ]
    mixed = [
        Problem(place, f"is a {kind}, models[0] a {kinds['models[0]']}", "give all in one form")
        for place, kind in kinds.items()
        if kind != kinds["models[0]"]
    ]
    if wrong or mixed:
        raise OptionError(*(wrong or mixed))
    return kinds["models[0]"]


def _kind_of(ref: Any) -> str:
    if isinstance(ref, (str, Path)):
        return "path"
    if isinstance(ref, Mapping):
        return "mapping"
    torch = sys.modules.get("torch")  # without it there can be no module, and a merge of files doesn't need it
    return "module" if torch and isinstance(ref, torch.nn.Module) else ""


def _weights(
    weights: float | Sequence[float] | Mapping[str, float] | None, names: list[str] | None, count: int
) -> tuple[list[float] | None, list[Problem]]:
    """One weight a model, None where they can't be told, and what is wrong with them."""
    if weights is None:
        return None, []
    if isinstance(weights, Real):
        return [float(weights)] * count, []
    if not isinstance(weights, Mapping):
        if not isinstance(weights, Iterable) or isinstance(weights, str):
            return None, [Problem("weights", f"got {weights!r}", "a number for all, one a model, or a mapping by name")]
        chosen = list(weights)
        fits = len(chosen) == count
        wrong = [] if fits else [Problem("weights", f"{len(chosen)} for {count} models", "give one a model")]
        return chosen if fits else None, wrong
    if names is None:
        return None, [Problem("weights", "a mapping, but the models have no names", "give models= as a mapping too")]
    unknown = [name for name in weights if name not in names]
    wrong = [Problem(f"weights.{name}", "no model has this name", nearest(name, names)) for name in unknown]
    return [weights.get(name, 1.0) for name in names], wrong


def _check_result(reference: Any, plan: Plan, kind: str) -> None:
    """That the result can be given in the reference's form, which is known before there are values."""
    if kind == "module":
        there = reference.state_dict()
        wrong, allowed = "has no place in the result", "name it under `drop`"
        problems = [Problem(f"tensor {name!r}", wrong, allowed) for name in plan.specs if name not in there]
        if problems:
            raise ModelError(*problems)
    elif any(spec.dtype == "BF16" and _in_numpy(reference, name) for name, spec in plan.specs.items()):
        raise OptionError(Problem("dtype", "NumPy has no bfloat16", "give torch tensors, or another dtype"))


def _as_module(reference: torch.nn.Module, arrays: Mapping[str, np.ndarray], plan: Plan) -> torch.nn.Module:
    """A copy of `reference` with the merged values."""
    from interfuse.checkpoints.tensors import to_tensor

    result = copy.deepcopy(reference)
    state = result.state_dict(keep_vars=True)
    _check_ties(state, arrays)
    merged = {name: to_tensor(array, plan.specs[name].dtype) for name, array in arrays.items()}
    for name, tensor in merged.items():
        if state[name].dtype != tensor.dtype:  # changed in place: a parameter stays the same object, and so tied
            state[name].data = state[name].data.to(tensor.dtype)
    result.load_state_dict({**state, **merged})
    result.__dict__[MERGED] = True
    return result


def _check_ties(state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Names that share one tensor in the result must have been given the same values."""
    first: dict[Any, str] = {}
    problems = []
    for name, array in arrays.items():
        tensor = state[name]
        if not array.size:
            continue
        tied = first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if tied != name and array.tobytes() != arrays[tied].tobytes():
            wrong = f"is tied to {tied!r} in the result, and the models give the two different values"
            problems.append(Problem(f"tensor {name!r}", wrong, "tie them in all models or in none"))
    if problems:
        raise ModelError(*problems)


def _as_mapping(reference: Mapping[str, Any], arrays: Mapping[str, np.ndarray], plan: Plan) -> dict[str, Any]:
    """Tensors where the reference has tensors, on their device, and arrays where it has arrays or NumPy's scalars."""
    result: dict[str, Any] = {}
    for name, array in arrays.items():
        if _in_numpy(reference, name):
            result[name] = array
            continue
        from interfuse.checkpoints.tensors import to_tensor

        result[name] = to_tensor(array, plan.specs[name].dtype).to(_like(reference, name).device)
    return result


def _like(reference: Mapping[str, Any], name: str) -> Any:
    """What the reference has under a name, or has at all: a tensor that is kept may be another model's."""
    return reference[name] if name in reference else next(iter(reference.values()))


def _in_numpy(reference: Mapping[str, Any], name: str) -> bool:
    return isinstance(_like(reference, name), np.ndarray | np.generic)

"""`merge`, the public function: the engine's, and for networks in memory with different heads one trunk and every head.

Nothing is computed here. It stands apart because the engine, which merges files without torch, doesn't know networks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from interfuse.engine import merge as engine
from interfuse.errors import CheckpointError, OptionError, Problem
from interfuse.layout.heads import SEPARATE, find_heads
from interfuse.recipe.values import pattern_problems


def merge(
    method: str, models: Sequence[Any] | Mapping[str, Any], *, heads: str | Sequence[str] | None = None, **given: Any
) -> Any:
    """Merge models of one architecture by a weight method (`interfuse methods` lists them)."""
    models = engine.listed(models)
    entries = list(models.values()) if isinstance(models, Mapping) else models
    kind = _kind(entries) if heads is not None else ""
    if heads is None or not kind:
        return engine.merge(method, models, heads=heads, **given)
    given = _checked(heads, given, kind)
    if kind == "mapping":
        return _mappings(method, models, heads, given)
    from interfuse.modules.members import unique_names
    from interfuse.transfer.heads import separate_heads

    names = list(map(str, models)) if isinstance(models, Mapping) else unique_names(entries)
    return separate_heads(method, dict(zip(names, entries, strict=True)), heads, **given)


merge.__doc__ = engine.merge.__doc__
merge.__signature__ = inspect.signature(engine.merge)  # type: ignore[attr-defined]


def _kind(entries: Sequence[Any]) -> str:
    """`module` or `mapping`, where all are; else the engine has to look at them."""
    torch = sys.modules.get("torch")  # without it there can be no network
    if entries and torch is not None and all(isinstance(entry, torch.nn.Module) for entry in entries):
        return "module"
    return "mapping" if entries and all(isinstance(entry, Mapping) for entry in entries) else ""


#: What a merge of folders has, and keys that would take tensors out of a trunk.
_OF_FOLDERS = ("out", "overwrite", "resume", "tokenizer", "chat_template", "drop", "keep")


def _checked(heads: str | Sequence[str], given: dict[str, Any], kind: str) -> dict[str, Any]:
    """The options of a merge in memory; an `OptionError` with those that mean nothing there."""
    problems = [
        Problem(key, f"got {given[key]!r} for {kind}s with heads of their own", "leave it out")
        for key in _OF_FOLDERS
        if given.get(key)
    ]
    if isinstance(heads, str) and heads != SEPARATE:
        problems.append(Problem("heads", f"got {heads!r}", "separate, or a list of patterns"))
    elif not isinstance(heads, str):
        problems += [problem for i, pattern in enumerate(heads) for problem in pattern_problems(pattern, f"heads[{i}]")]
    base = given.get("base")
    if base is not None and _kind([base]) != kind:
        problems.append(Problem("base", f"is a {type(base).__name__}, models[0] a {kind}", "give all in one form"))
    if problems:
        raise OptionError(*problems)
    return {key: value for key, value in given.items() if key not in _OF_FOLDERS}


def _mappings(method: str, models: Any, heads: str | Sequence[str], given: dict[str, Any]) -> Any:
    """Each task's tensors, of which those of the trunk are shared; in the form in which the models came."""
    named: dict[Any, Any] = dict(models) if isinstance(models, Mapping) else dict(enumerate(models))
    shapes = {f"models[{name!r}]": {key: tuple(t.shape) for key, t in model.items()} for name, model in named.items()}
    found = find_heads(shapes, heads)
    if found.problems:
        asked = any(problem.path.startswith("heads") for problem in found.problems)
        raise (OptionError if asked else CheckpointError)(*found.problems)
    parts = [{key: t for key, t in model.items() if key not in found.names} for model in named.values()]
    base = given.pop("base", None)
    if base is not None:
        given["base"] = {key: tensor for key, tensor in base.items() if key in parts[0]}
    by_name = dict(zip(map(str, named), parts, strict=True))
    trunk = engine.merge(method, by_name if isinstance(models, Mapping) else parts, **given)
    whole = {n: {k: model[k] if k in found.names else trunk[k] for k in model} for n, model in named.items()}
    return whole if isinstance(models, Mapping) else list(whole.values())

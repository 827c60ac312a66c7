"""A recipe whose models are all LoRA adapters, without their base: one adapter out, through `engine.adapters.merging`.

One value of each option holds for all modules here; what a recipe can say of layers, parts and tokenizers is of models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interfuse.checkpoints.writer import check_output, settle, whole_folder
from interfuse.engine.adapters.merging import Prepared, asked, prepare, write
from interfuse.engine.output.finished import finished_adapter
from interfuse.errors import Problem, RecipeError, UserError
from interfuse.pipeline.record import RECIPE, RunRecord, as_yaml, restored, versions
from interfuse.pipeline.record import write as write_record
from interfuse.recipe import Recipe
from interfuse.recipe.check import adapters_alone, method_of, names_of

_OF_MODELS = ("slices", "modules", "drop", "keep", "tokenizer_source", "tokenizer", "chat_template", "data", "evaluate")


def merges_adapters(chain: Sequence[Recipe]) -> bool:
    """Whether a recipe merges adapters with each other; in a file of several that is a `RecipeError`."""
    found = [i for i, recipe in enumerate(chain) if adapters_alone(recipe)]
    if found and len(chain) > 1:
        problems = [
            Problem(f"documents[{i}].models", "are adapters without a base", "merge them by a recipe of their own")
            for i in found
        ]
        raise RecipeError(*problems)
    return bool(found)


def run_adapters(recipe: Recipe, out: str | Path, *, overwrite: bool, resume: bool, dry_run: bool, progress: bool) -> RunRecord:
    """Merge the recipe's adapters into the folder `out`, or only check that it can be done."""
    started = time.monotonic()
    prepared = prepared_by(recipe)
    method = prepared.method
    record = RunRecord(
        out=None,
        form="merge",
        method=method.name,
        models=tuple(names_of(recipe)),
        seed=recipe.seed,
        plan=_described(prepared),
        papers=(method.paper,),
        versions=versions(),
    )
    inputs = [entry.model for entry in recipe.models]
    if dry_run:
        check_output(out, overwrite=overwrite, inputs=inputs)
        return replace(record, seconds=time.monotonic() - started)
    if resume and (run := _finished(recipe, prepared, Path(out))) is not None:
        settle(out)
        return replace(restored(record, Path(out), run), seconds=time.monotonic() - started)
    with whole_folder(out, overwrite=overwrite, inputs=inputs, resume=resume) as folder:
        made = write(prepared, folder, resume=resume, progress=progress)
        models = [
            {"name": name, "model": source["model"], "weights": None, "xxh3": source["xxh3"]}
            for name, source in zip(names_of(recipe), made["sources"], strict=True)
        ]
        about = {"models": models, "data": {}}
        record = replace(record, out=Path(out), inputs=about, versions=versions(), seconds=time.monotonic() - started)
        write_record(folder, [recipe], record, kind="adapter merge")
    return record


def _finished(recipe: Recipe, prepared: Prepared, out: Path) -> dict[str, Any] | None:
    """What an earlier run of this recipe wrote down of itself, if its output is in place, whole."""
    there = finished_adapter(out, asked(prepared)) or {}
    try:
        same = (out / RECIPE).read_text(encoding="utf-8") == as_yaml([recipe])
    except (OSError, ValueError):
        return None
    return there.get("run") if same else None


def prepared_by(recipe: Recipe) -> Prepared:
    """What the recipe asks for, once it's sure that it can be done."""
    problems = list(_problems(recipe))
    if problems:
        raise RecipeError(*problems)
    method = method_of(recipe)
    assert method is not None
    options: dict[str, Any] = {}
    for name, field in method.options.model_fields.items():
        key = field.alias or name
        each = [{**recipe.parameters, **entry.parameters}.get(key, field.default) for entry in recipe.models]
        options[name] = each if name in method.each else each[0]
    if "seed" in options and "seed" not in recipe.parameters:
        options["seed"] = recipe.seed
    weights = [{**recipe.parameters, **entry.parameters}.get("weight", 1.0) for entry in recipe.models]
    adapters = [entry.model for entry in recipe.models]
    return prepare(method.name, adapters, weights=weights, dtype=recipe.out_dtype or recipe.dtype, **options)


def adapters_problems(recipe: Recipe) -> list[Problem]:
    """What is wrong with a recipe's adapters and between them, whatever its method and its numbers are."""
    try:
        prepare("linear", [entry.model for entry in recipe.models])
    except UserError as error:
        return list(error.problems)
    return []


def _problems(recipe: Recipe) -> Iterator[Problem]:
    for key in _OF_MODELS:
        if getattr(recipe, key) is not None:
            yield Problem(key, "means nothing where adapters are merged", "remove the key, or merge models that have them")
    levels = {"parameters": recipe.parameters}
    levels |= {f"models[{i}].parameters": entry.parameters for i, entry in enumerate(recipe.models)}
    for path, parameters in levels.items():
        for key, value in parameters.items():
            if isinstance(value, list | dict):
                yield Problem(f"{path}.{key}", f"got {value!r}", "one value for all modules, where adapters are merged")


def _described(prepared: Prepared) -> str:
    """What would be done, as text."""
    modules = list(dict.fromkeys(module for adapter in prepared.adapters for module in adapter.pairs))
    lines = [f"{prepared.method.name} of adapters, in {len(modules)} modules"]
    lines += [f"  {name.rstrip('_')}: {value}" for name, value in prepared.options.items()]
    pairs = zip(prepared.adapters, prepared.weights, strict=True)
    return "\n".join([*lines, *(f"adapter {adapter.name}: weight {weight:g}" for adapter, weight in pairs)])

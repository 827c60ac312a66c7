"""What a run is about to do, before anything is written: its record as far as it's known, and what it would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.writer import check_output, room
from interfuse.engine.chain import Planned, plan_recipes
from interfuse.engine.estimate import estimate, room_for
from interfuse.engine.opening import open_references, wanted
from interfuse.engine.output.finished import finished
from interfuse.errors import Problem, UserError
from interfuse.pipeline.record import DESCRIPTION, RunRecord, hash_data, restored
from interfuse.plan import plan_merge, uncollected
from interfuse.recipe import Recipe
from interfuse.recipe.check import method_of, names_of, options_of
from interfuse.recipe.pieces import references
from interfuse.recipe.values import pattern_problems
from interfuse.report.outline import outline


def planned(chain: Sequence[Recipe], out: str | Path, *, compat: bool, overwrite: bool, inputs: Sequence[str]) -> list[Planned]:
    """The plans of a merge of files, none for no recipes; what is wrong with `out` is told beside what is with them."""
    errors: list[UserError] = []
    stages: list[Planned] = []
    try:
        stages = plan_recipes(chain, compat=compat, scratch=Path(out).resolve().parent)
    except UserError as error:
        errors.append(error)
    try:
        check_output(out, overwrite=overwrite, inputs=inputs, nbytes=room_for(stages))
    except UserError as error:
        errors.append(error)
    if errors:
        from interfuse.engine.wording import together

        raise together(errors)
    return stages


def finished_before(chain: Sequence[Recipe], out: str | Path, *, compat: bool, nonfinite: bool) -> RunRecord | None:
    """The record of a merge of files whose output is in place, whole, as these recipes give it; else None."""
    if not (Path(out) / DESCRIPTION).is_file():
        return None
    try:
        stages = plan_recipes(chain, compat=compat, scratch=Path(out).resolve().parent)
    except UserError:  # `planned` says it
        return None
    _, plan, sources = stages[-1]
    there = finished(Path(out), plan, sources, written(chain), compat=compat, allow_nonfinite=nonfinite) or {}
    run = there.get("run")
    same = run is not None and run["inputs"]["data"] == hash_data(chain[-1])
    return restored(intended(chain[-1], stages), Path(out), run) if same else None


def written(chain: Sequence[Recipe]) -> list[dict[str, Any]]:
    """The recipes as the record has them."""
    return [read.model_dump(mode="json", exclude_defaults=True) for read in chain]


def models_problems(recipe: Recipe) -> list[Problem]:
    """What is wrong with a merge's models that are on this machine, and between them: for a recipe that is faulty itself.

    Its numbers are left out, for they may be what is faulty.
    """
    from interfuse.engine.wording import leveled

    plain = Recipe.model_validate(_without_numbers(recipe.model_dump(exclude_defaults=True)))
    named = references(plain)
    here = [ref for ref in named if all(Path(path).exists() for path in (ref.path, ref.lora) if path is not None)]
    try:
        checkpoints = open_references(here)
        patterns = [*(recipe.drop or ()), *(recipe.keep or ())]
        if len(here) == len(named) and not any(pattern_problems(pattern, "") for pattern in patterns):
            asked = recipe.tokenizer is not None or recipe.tokenizer_source is not None
            plan_merge(plain, leveled(checkpoints) if asked else checkpoints)
    except UserError as error:
        return list(error.problems)
    return []


def _without_numbers(part: Any) -> Any:
    """A recipe, or a part of it, for a plain average of its models."""
    if isinstance(part, list):
        return list(map(_without_numbers, part))
    if not isinstance(part, dict):
        return part
    left = {key: _without_numbers(value) for key, value in part.items() if key not in ("parameters", "dtype", "out_dtype")}
    return left | ({"merge_method": "linear"} if "merge_method" in left else {})


@uncollected()
def intended(recipe: Recipe, stages: Sequence[Planned]) -> RunRecord:
    """The record of a run that has yet to be made; `stages` are the plans of a merge of files, else none."""
    method = method_of(recipe)
    return RunRecord(
        out=None,
        form=recipe.form,
        method=method.name if method else "",
        models=tuple(names_of(recipe) or (Path(ref.path).name for ref in references(recipe))),
        seed=recipe.seed,
        plan=outline(stages) if stages else _described(recipe),
        papers=(method.paper,) if method and method.paper else (),
        notes=stages[-1].plan.notes if stages else (),
    )


@uncollected()
def machine(stages: Sequence[Planned], out: str | Path, threads: int | None = None) -> dict[str, Any] | None:
    """What a plan leaves out, for it differs from machine to machine: work, memory, room on the disk of `out`.

    None where there is no plan.
    """
    if not stages:
        return None
    found = estimate(stages, threads)
    free, place = room(out)
    absent = [file for _, plan, sources in stages for file in wanted(plan, sources) if not file.path.is_file()]
    sizes = {file: file.store.sizes[file.name] or 0 for file in absent}
    fetched = {"fetch": {"files": len(sizes), "needs": sum(sizes.values())}} if sizes else {}
    return fetched | {
        "work": {"threads": found.threads, "seconds": round(found.seconds, 1), "memory": found.memory},
        "disk": {"out": str(out), "needs": found.nbytes, "free": free, "place": str(place)},
    }


def _described(recipe: Recipe) -> str:
    """What a run does, as text."""
    lines = [f"{recipe.form}{f': {method.name}' if (method := method_of(recipe)) else ''}"]
    lines += [f"  {key}: {value}" for key, value in options_of(recipe).items()]
    for name, entry in zip(names_of(recipe), recipe.models, strict=True):
        more = entry.model_dump(exclude_defaults=True, exclude={"model", "name"})
        lines.append(f"model {name}: {entry.model}" + "".join(f", {key} {value}" for key, value in more.items()))
    for key in ("base_model", "target", "head", "data", "training", "evaluate"):
        value = getattr(recipe, key)
        if value is not None:
            shown = value if isinstance(value, str) else value.model_dump(exclude_none=True)
            lines.append(f"{key}: {shown}")
    return "\n".join([*lines, f"seed: {recipe.seed}"])

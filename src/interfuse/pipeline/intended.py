"""What a run is about to do, before anything is written: its record as far as it's known, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.writer import check_output, room
from interfuse.engine.chain import Planned, plan_recipes
from interfuse.engine.estimate import estimate, room_for
from interfuse.engine.opening import open_references, wanted
from interfuse.engine.output.finished import finished
from interfuse.engine.output.folder import files_beside
from interfuse.engine.output.proof import proof
from interfuse.errors import CheckpointError, Problem, UserError
from interfuse.pipeline.adapting import adapters_problems
from interfuse.pipeline.record import DESCRIPTION, RunRecord, hash_data, restored
from interfuse.plan import plan_merge, uncollected
from interfuse.recipe import Recipe
from interfuse.recipe.chain import UNREADABLE
from interfuse.recipe.check import adapters_alone, chooses, method_of, names_of, options_of
from interfuse.recipe.learned import learns
from interfuse.recipe.pieces import places, references
from interfuse.recipe.references import Reference
from interfuse.recipe.values import matcher, pattern_problems
from interfuse.registry import find
from interfuse.report.outline import outline


def planned(chain: Sequence[Recipe], out: str | Path, *, compat: bool, overwrite: bool, inputs: Sequence[str]) -> list[Planned]:
    """The plans of a merge of files, none for no recipes; what is wrong with `out` is told beside what is with them."""
    errors: list[UserError] = []
    stages: list[Planned] = []
    try:
        stages = plan_recipes(chain, compat=compat, scratch=Path(out).resolve().parent)
        if stages and chain[-1].drop:
            _check_dropped(chain[-1].drop, stages[-1])
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


def _check_dropped(patterns: Sequence[str], stage: Planned) -> None:
    """That what is left loads where the model it follows does, which takes seconds; else an error that names the patterns."""
    _, plan, sources = stage
    lead = sources[plan.lead]
    try:
        with proof(plan.specs, lead, files_beside(plan, sources)[0], sources) as loading:
            loading.finish()
    except CheckpointError as error:
        gone = [name for name in lead.specs if name not in plan.specs]
        at_fault = " and ".join(f"drop[{i}]" for i, pattern in enumerate(patterns) if any(map(matcher(pattern), gone)))
        raise CheckpointError(*(Problem(at_fault or p.path, p.wrong, p.allowed) for p in error.problems)) from None


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
    if run is None or run["inputs"]["data"] != hash_data(chain[-1]):
        return None
    return restored(intended(chain[-1], stages), Path(out), run)


def written(chain: Sequence[Recipe]) -> list[dict[str, Any]]:
    """The recipes as the record has them."""
    return [read.model_dump(mode="json", exclude_defaults=True) for read in chain]


def models_problems(recipe: Recipe, found: Sequence[Problem], known: Sequence[str] = ()) -> list[Problem]:
    """What is wrong with a merge's models, and between them, for a recipe with the problems `found`.

    Left out is what these may be about: models that aren't there, a tokenizer, the method and its numbers. `known` are
    earlier recipes, whose results aren't there yet.
    """
    from interfuse.engine.wording import source_problems

    if adapters_alone(recipe):
        return adapters_problems(recipe)
    at_fault = [problem.path for problem in found]
    numbers = any(path.startswith(_NUMBERS) or "parameters" in path for path in at_fault)
    sound = not (chooses(recipe) or learns(recipe) or numbers)
    plain = recipe if sound else Recipe.model_validate(_without_numbers(recipe.model_dump(exclude_defaults=True)))
    where = places(plain)
    asked = not any(path.startswith(_WORDS) for path in at_fault)
    wanted = [ref for ref, path in where.items() if path not in at_fault and not {ref.path, ref.lora} & {UNREADABLE, *known}]
    try:
        checkpoints = open_references(wanted, places=where)
    except UserError as error:
        return [*error.problems, *(source_problems(recipe, {}) if asked else ())]
    listed = recipe.heads if isinstance(recipe.heads, list) else ()
    patterns = [*(recipe.drop or ()), *(recipe.keep or ()), *listed]
    if len(wanted) == len(where) and not any(pattern_problems(pattern, "") for pattern in patterns):
        return _between(plain, {ref: checkpoints[ref] for ref in references(plain)}, asked=asked)
    return source_problems(recipe, {}) if asked and not known else []


#: Keys of the method's numbers, and of the tokenizer.
_NUMBERS = ("merge_method", "dtype", "out_dtype", "weights")
_WORDS = ("tokenizer", "chat_template")


def _between(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint], *, asked: bool) -> list[Problem]:
    """What is wrong between models that are all there; `asked`: with the tokenizer too."""
    from interfuse.engine.wording import leveled, reworded

    problems: list[Problem] = []
    one_size = recipe.tokenizer is not None or recipe.tokenizer_source is not None
    try:
        if asked and (one_size or recipe.chat_template is not None):
            reworded(recipe, checkpoints, {})
    except UserError as error:
        problems += error.problems
    try:
        plan_merge(recipe, leveled(checkpoints) if one_size else checkpoints)
    except UserError as error:
        problems += error.problems
    return list(dict.fromkeys(problems))


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
        papers=_papers(recipe),
        notes=stages[-1].plan.notes if stages else (),
    )


def _papers(recipe: Recipe) -> tuple[str, ...]:
    """The sources of the recipe's method, and of the one that merges a shared trunk."""
    found = [method_of(recipe)]
    found += [find(options_of(recipe)["method"], "weights")] if recipe.fusion == "share_trunk" else []
    return tuple(method.paper for method in found if method is not None and method.paper)


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
    named = method.name if (method := method_of(recipe)) else recipe.form
    lines = [recipe.form if named == recipe.form else f"{recipe.form}: {named}"]
    lines += [f"  {key}: {value}" for key, value in options_of(recipe).items()]
    for name, entry in zip(names_of(recipe), recipe.models, strict=True):
        more = entry.model_dump(exclude_defaults=True, exclude={"model", "name"})
        lines.append(f"model {name}: {entry.model}" + "".join(f", {key} {value}" for key, value in more.items()))
    for i, stage in enumerate(recipe.stages or (), 1):
        lines.append(f"{stage.name or f'stage {i}'}: {stage.model_dump(exclude_none=True, exclude={'name'})}")
    for key in ("base_model", "target", "heads", "head", "data", "training", "evaluate"):
        value = getattr(recipe, key)
        if value is not None:
            shown = value if isinstance(value, str | list) else value.model_dump(exclude_none=True)
            lines.append(f"{key}: {shown}")
    return "\n".join([*lines, f"seed: {recipe.seed}"])

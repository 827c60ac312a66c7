"""What a run is about to do, before anything is written: its record as far as it's known, and what it would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.writer import room
from interfuse.engine.chain import Planned
from interfuse.engine.estimate import estimate
from interfuse.pipeline.record import RunRecord
from interfuse.plan import uncollected
from interfuse.recipe import Recipe
from interfuse.recipe.check import method_of, names_of, options_of
from interfuse.recipe.pieces import references
from interfuse.report.outline import outline


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
    return {
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
    for key in ("base_model", "head", "data", "training", "evaluate"):
        value = getattr(recipe, key)
        if value is not None:
            shown = value if isinstance(value, str) else value.model_dump(exclude_none=True)
            lines.append(f"{key}: {shown}")
    return "\n".join([*lines, f"seed: {recipe.seed}"])

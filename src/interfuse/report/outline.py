"""Plans as data, with like tensors rolled up: what `--dry-run` prints, and its JSON. Pure: of plans and headers alone.

Where the output goes and what the machine has aren't in it. How it's drawn is `plan`'s part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from interfuse.checkpoints.shards import count_files
from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.plan import Call, Output, Plan
from interfuse.report.rollup import Numbers, filled, template, turns

Document = dict[str, Any]
Stage = tuple[str | None, Plan, Sequence[Checkpoint]]


def outline(stages: Sequence[Stage]) -> Document:
    """The recipes of one run, each with its name, plan and checkpoints, as JSON; the last one's result is the output.

    docs/recipes.md says what each key is.
    """
    last = stages[-1][1]
    results = tuple(name for name, _, _ in stages[:-1])
    recipes = [_recipe(name, plan, sources, results) for name, plan, sources in stages]
    return {
        "digest": last.digest(),
        "recipes": recipes,
        "totals": {
            "tensors": len(last.outputs),
            "parameters": sum(output.spec.count for output in last.outputs),
            "bytes_read": sum(model["bytes_read"] for recipe in recipes for model in recipe["models"] if not model["result"]),
            "bytes_written": sum(output.spec.nbytes for output in last.outputs),
            "files": count_files(last.specs, stages[-1][2][last.lead].stems),
        },
    }


def _recipe(name: str | None, plan: Plan, sources: Sequence[Checkpoint], results: Sequence[str | None]) -> Document:
    read: list[dict[str, None]] = [{} for _ in sources]
    bases: dict[int, None] = {}
    for output in plan.outputs:
        for source, tensor in output.inputs:
            read[source][tensor] = None
        if output.base is not None:
            read[output.base.source][output.base.name] = None
            bases[output.base.source] = None
    return {
        "name": name,
        "method": plan.method,
        "seed": plan.seed,
        "dtypes": sorted({output.spec.dtype for output in plan.outputs}),
        "models": [
            {
                "model": source.name,
                "base": i in bases,
                "lead": i == plan.lead,
                "result": source.name in results,
                "tensors": len(source.specs),
                "parameters": sum(spec.count for spec in source.specs.values()),
                "bytes": sum(spec.nbytes for spec in source.specs.values()),
                "bytes_read": sum(source.specs[tensor].nbytes for tensor in read[i]),
            }
            for i, source in enumerate(sources)
        ],
        "tensors": _rows(plan.outputs),
        "layers": {head.rstrip("."): _runs(picks) for head, picks in plan.layers},
        "unread": [row for i, source in enumerate(sources) for row in _unread(i, source.specs, read[i])],
        "vocabulary": None if plan.wording is None else plan.wording.rows and list(plan.wording.rows),
        "notes": list(plan.notes),
    }


class _Key(NamedTuple):
    """What the tensors of a row have in common."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    how: str
    method: str
    form: str
    base: int | None
    models: tuple[int, ...]


def _rows(outputs: Iterable[Output]) -> list[Document]:
    """Tensors whose names differ in numbers alone, that are shaped alike and made of the same models by one method."""
    found: dict[tuple[Any, ...], list[tuple[Numbers, Call | None]]] = {}
    for name, spec, how, inputs, base, call in outputs:
        plain, numbers = template(name)
        models = tuple([source for source, _ in inputs])
        method, form = (call.method, call.form) if call else ("", "")
        key = (plain, spec.dtype, spec.shape, how, method, form, base and base.source, models)
        if key in found:
            found[key].append((numbers, call))
        else:
            found[key] = [(numbers, call)]
    return [_row(_Key(*key), members) for key, members in found.items()]


def _row(key: _Key, members: list[tuple[Numbers, Call | None]]) -> Document:
    calls = list({id(call): call for _, call in members}.values())
    if len(calls) > 1:  # in the order of their numbers, which isn't that of all files
        calls = [call for _, call in sorted(members, key=lambda member: member[0])]
    row = {
        "names": filled(key.name, [numbers for numbers, _ in members]),
        "count": len(members),
        "dtype": key.dtype,
        "shape": list(key.shape),
        "how": "copy" if key.method == "copy" else key.how,
        "base": key.base,
        "models": list(key.models),
    }
    if row["how"] == "merge":
        row |= {"method": key.method, "form": key.form} | _numbers([call for call in calls if call is not None])
    return row


def _numbers(calls: Sequence[Call]) -> Document:
    """Weights and options; what has a value a model is a list."""
    options: Document = {}
    for i, (name, value) in enumerate(calls[0].options):
        values = [call.options[i][1] for call in calls]
        each = isinstance(value, tuple)
        options[name.rstrip("_")] = list(map(_over, zip(*values, strict=True))) if each else _over(values)
    return {"weight": list(map(_over, zip(*(call.weights for call in calls), strict=True))), "options": options}


def _over(values: Sequence[Any]) -> Any:
    """The value of all tensors of a row, or `{"from_to": [...]}` with where it turns round on the way from first to last."""
    found = turns(values)
    return found[0] if len(found) == 1 else {"from_to": found}


def _runs(picks: Sequence[tuple[int, int]]) -> list[Document]:
    """A stack's layers, those joined that follow each other in one model. Ranges are as `layer_range`: the end is excluded."""
    found: list[Document] = []
    for i, (source, layer) in enumerate(picks):
        run = found[-1] if found else None
        if run and run["model"] == source and run["from"][1] == layer:
            run["layers"][1], run["from"][1] = i + 1, layer + 1
        else:
            found.append({"layers": [i, i + 1], "model": source, "from": [layer, layer + 1]})
    return found


def _unread(number: int, specs: Mapping[str, TensorSpec], read: Mapping[str, None]) -> list[Document]:
    """What of a model is in no output: dropped by the recipe, in no slice, tied to another, or of a base that isn't seen."""
    if len(read) == len(specs):
        return []
    found: dict[str, list[Numbers]] = {}
    for name in specs:
        if name not in read:
            plain, numbers = template(name)
            found.setdefault(plain, []).append(numbers)
    return [{"model": number, "names": filled(plain, all_), "count": len(all_)} for plain, all_ in found.items()]

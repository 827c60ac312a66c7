"""A plan as tables for a terminal, drawn from its outline alone: the models, the tensors with how they're made, the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from interfuse import units
from interfuse.report.outline import Document
from interfuse.report.rollup import spans

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

_HOW = {"copy": "copied", "same": "integers, which must agree", "largest": "the largest count"}
_UNREAD = 8  # lines of what isn't read


def tables(plan: Document, here: Document | None = None) -> Group:
    """All of an outline, and of what `estimate` says of this machine, for rich to print."""
    from rich.console import Group

    parts: list[RenderableType] = []
    for recipe in plan["recipes"]:
        parts += [_title(recipe, len(plan["recipes"]) > 1), "", _models(recipe["models"]), "", _tensors(recipe), ""]
        parts += [*_layers(recipe), *_unread(recipe), *_said(recipe)]
    return Group(*parts, *_totals(plan["totals"]), *([] if here is None else _here(plan["totals"], here)))


def text(plan: Document, here: Document | None = None, *, width: int = 200) -> str:
    """`tables` as plain text of lines that are at most `width` wide."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=width, color_system=None, markup=False, highlight=False, emoji=False).print(tables(plan, here))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _title(recipe: Document, several: bool) -> str:
    name = f"{recipe['name'] or 'output'}: " if several else ""
    shared = [words for words in _shared(recipe["tensors"]).values() if words]
    return ", ".join([f"{name}{recipe['method']}", *shared, f"seed {recipe['seed']}", f"as {' and '.join(recipe['dtypes'])}"])


def _models(models: Sequence[Document]) -> Table:
    table = _table("#", "Model", "Role", ">Tensors", ">Parameters", ">Size")
    for i, model in enumerate(models):
        words = {"base": "base", "lead": "gives config and tokenizer", "result": "result of that recipe"}
        role = ", ".join(word for key, word in words.items() if model[key])
        sizes = (f"{model['tensors']:,}", units.count(model["parameters"]), units.count(model["bytes"], "B"))
        table.add_row(str(i), model["model"], role, *sizes)
    return table


def _tensors(recipe: Document) -> Table:
    table = _table("Tensors", ">", "Shape", "Type", "How", "From")
    shared = {key for key, words in _shared(recipe["tensors"]).items() if words}
    for row in recipe["tensors"]:
        shape = f"[{', '.join(map(str, row['shape']))}]"
        how = _HOW.get(row["how"]) or ", ".join([_method(row), *(w for key, w in _words(row).items() if key not in shared)])
        models = spans(row["models"])
        source = models if row["base"] is None else f"base + {models}"
        table.add_row(row["names"], f"{row['count']} x", shape, row["dtype"], how, source)
    return table


def _method(row: Document) -> str:
    """The method; one for matrices takes the mean of all else."""
    from interfuse.registry import find

    whole = find(row["method"], "weights").form == "matrices" and row["form"] == "coefficients"
    return f"{row['method']}, as the mean" if whole else str(row["method"])


def _words(row: Document) -> dict[str, str]:
    """A row's numbers in words, by option."""
    return {key: f"{key} {_value(value)}" for key, value in {"weight": row["weight"], **row["options"]}.items()}


def _shared(rows: Sequence[Document]) -> dict[str, str]:
    """The numbers that are the same in all merged tensors, in words."""
    found = [_words(row) for row in rows if row["how"] == "merge"]
    return {key: words for key, words in (found[0] if found else {}).items() if all(own.get(key) == words for own in found)}


def _value(value: Any) -> str:
    """A value; those of several models, once where they are the same; or what it runs through."""
    if isinstance(value, list):
        shown = list(dict.fromkeys(map(_value, value)))
        return shown[0] if len(shown) == 1 else f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return " ... ".join(map(_value, value["from_to"]))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _layers(recipe: Document) -> list[RenderableType]:
    """Where each stack's layers come from, if not all of them from one model in their own order."""
    found: list[RenderableType] = []
    for stack, runs in recipe["layers"].items():
        if len(runs) > 1 or runs[0]["layers"] != runs[0]["from"]:
            table = _table(f"Layers of {stack or 'the top'}", "From layers", "Of")
            for run in runs:
                table.add_row(_range(run["layers"]), _range(run["from"]), f"{run['model']}")
            found += [table, ""]
    return found


def _range(ends: Sequence[int]) -> str:
    return spans(range(*ends))


def _unread(recipe: Document) -> list[RenderableType]:
    """What of the models is in no output."""
    rows = recipe["unread"]
    if not rows:
        return []
    table = _table("In no output", ">", "Of")
    for row in rows[:_UNREAD]:
        table.add_row(row["names"], f"{row['count']} x", str(row["model"]))
    if len(rows) > _UNREAD:
        table.add_row(f"... and {len(rows) - _UNREAD} more", f"{sum(row['count'] for row in rows[_UNREAD:])} x", "")
    return [table, ""]


def _said(recipe: Document) -> list[str]:
    rows = recipe["vocabulary"]
    lines = [f"vocabulary: {rows[0]:,} rows where config and tokenizer are from, {rows[1]:,} in the output"] if rows else []
    lines += [f"note: {note}" for note in recipe["notes"]]
    return [*lines, ""] if lines else []


def _totals(totals: Document) -> list[str]:
    files = f"{totals['files']} file{'s' if totals['files'] > 1 else ''}"
    return [
        f"{totals['tensors']:,} tensors, {units.count(totals['parameters'])} parameters",
        f"reads {units.count(totals['bytes_read'], 'B')}, writes {units.count(totals['bytes_written'], 'B')} in {files}",
    ]


def _here(totals: Document, here: Document) -> list[str]:
    work, disk = here["work"], here["disk"]
    rate = units.count((totals["bytes_read"] + totals["bytes_written"]) / work["seconds"], "B/s")
    fetch = here.get("fetch")
    return [
        *([f"{units.count(fetch['needs'], 'B')} in {fetch['files']} files are fetched first"] if fetch else []),
        f"about {units.seconds(work['seconds'])} on {work['threads']} threads, where disks keep up with {rate}; "
        f"about {units.count(work['memory'], 'B')} of own memory",
        f"{disk['out']}: {units.count(disk['needs'], 'B')} of the {units.count(disk['free'], 'B')} free at {disk['place']}",
    ]


def _table(*titles: str) -> Table:
    """An empty table; a title that begins with `>` is of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for title in titles:
        right = title.startswith(">")
        table.add_column(title.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table

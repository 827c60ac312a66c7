"""What became of every tensor of a network that was transplanted into: copied, adapted, skipped or left. It only counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from interfuse.units import count

if TYPE_CHECKING:
    from rich.table import Table

Action = Literal["copied", "adapted", "skipped", "left"]
ACTIONS: tuple[Action, ...] = ("copied", "adapted", "skipped", "left")


@dataclass(frozen=True)
class Row:
    """One tensor of the target. `source` is the name of what it was given, or would have been; `how` says how, or why not.

    `tied` names the tensor that it is one with in the target: its numbers are counted there. `asked` says that the caller
    left it out on purpose: `strict` doesn't mind.
    """

    name: str
    action: Action
    count: int
    source: str = ""
    how: str = ""
    tied: str = ""
    asked: bool = False


@dataclass(frozen=True)
class Report:
    """Every tensor of the target once, in its order, and what of the source has found no place (`unused`: name -> why)."""

    rows: tuple[Row, ...]
    unused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def names(self, action: Action) -> list[str]:
        """The target's tensors with which that was done."""
        return [row.name for row in self.rows if row.action == action]

    def parameters(self, action: Action) -> int:
        """How many numbers, buffers' included, those tensors hold; what is tied counts once."""
        return sum(row.count for row in self.rows if row.action == action and not row.tied)

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """What was done, tensors, numbers, names and how: a line for all that differ in nothing but a layer's number."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for action in ACTIONS:
            for row in self.rows:
                if row.action == action:
                    groups.setdefault((action, _pattern(row.name), row.how), []).append(row)
        found = [
            (action, f"{len(rows)}", count(sum(row.count for row in rows if not row.tied)), _named(rows, pattern), how)
            for (action, pattern, how), rows in groups.items()
        ]
        missing: dict[tuple[str, str], list[str]] = {}
        for name, why in self.unused.items():
            missing.setdefault((_pattern(name), why), []).append(name)
        return found + [
            ("not used", f"{len(names)}", "", names[0] if len(names) == 1 else pattern, why)
            for (pattern, why), names in missing.items()
        ]

    def summary(self) -> str:
        """The sums, in one line."""
        parts = [
            f"{action} {len(self.names(action))} tensors ({count(self.parameters(action))} numbers)"
            for action in ACTIONS
            if self.names(action)
        ]
        text = ", ".join(parts) or "the target has no tensors"
        return text + (f"; {len(self.unused)} of the source not used" if self.unused else "")

    def caption(self) -> str:
        """The sums, and the notes."""
        return "\n".join([self.summary(), *self.notes])

    def __str__(self) -> str:
        lines = [_HEAD, *self.lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        table = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, self.caption()])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self.caption(), caption_justify="left")
        for title in _HEAD:
            table.add_column(title, justify="right" if title in ("tensors", "numbers") else "left", overflow="fold")
        for line in self.lines():
            table.add_row(*map(Text, line))
        return table


_HEAD = ("", "tensors", "numbers", "name", "how, or why")


def _pattern(name: str) -> str:
    """A name with `*` for each part that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _named(rows: Sequence[Row], pattern: str) -> str:
    """The name of one, or the pattern of many; and the source's, where that is called otherwise."""
    name = rows[0].name if len(rows) == 1 else pattern
    theirs = dict.fromkeys(row.source if len(rows) == 1 else _pattern(row.source) for row in rows if row.source)
    other = [source for source in theirs if source != name]
    return f"{name} <- {', '.join(other)}" if other else name

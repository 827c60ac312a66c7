"""Many things in a few words: names that differ in a number, numbers that follow each other, values that run up and down.

`model.layers.{0-21}.mlp.up_proj.weight` stands for 22 names. Nothing here knows what a name means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Numbers = tuple[int, ...]


def template(name: str) -> tuple[str, Numbers]:
    """A name with `{}` for each part of it that is a number, and those numbers.

    >>> template("model.layers.3.mlp.experts.12.w1.weight")
    ('model.layers.{}.mlp.experts.{}.w1.weight', (3, 12))
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers or "{}" in name:
        return name, ()
    found = tuple([int(parts[i]) for i in numbers])
    for i in numbers:
        parts[i] = "{}"
    return ".".join(parts), found


def filled(name: str, numbers: Sequence[Numbers]) -> str:
    """A template with what its numbers run through: `{0-21}`, or a number that is the same in all.

    >>> filled("h.{}.w.{}", [(0, 2), (1, 2), (2, 2), (5, 2)])
    'h.{0-2,5}.w.2'
    """
    if not numbers[0]:
        return name
    text, *parts = name.split("{}")
    for column, part in zip(zip(*numbers, strict=True), parts, strict=True):
        shown = spans(column)
        text += (shown if shown.isdecimal() else f"{{{shown}}}") + part
    return text


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in words: what follow each other are joined.

    >>> spans([3, 0, 1, 2, 7, 9, 8])
    '0-3,7-9'
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def turns(values: Sequence[Any]) -> list[Any]:
    """The first of the values, those where numbers turn round, and the last; of other values each once.

    >>> turns([0.5, 0.5]), turns([0, 0.5, 1, 0.5, 0.5, 0])
    ([0.5], [0, 1, 0])
    """
    steps = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in steps):
        return list(dict.fromkeys(steps))
    inner = [b for a, b, c in zip(steps, steps[1:], steps[2:], strict=False) if (a < b) != (b < c)]
    return [steps[0], *inner, steps[-1]] if len(steps) > 1 else steps

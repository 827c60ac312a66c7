"""Which tensor of one network a tensor of another is given: by name, by a map of glob patterns, by a map of layers.

Names alone are looked at. Each name of the target gets at most one source; a source may go to several places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interfuse.checkpoints.layers import find_layers
from interfuse.checkpoints.names import match_names
from interfuse.errors import OptionError, Problem, nearest

Rules = Mapping[str, str | None]
#: Where a source's layer goes: source layer -> target's layer or layers, or a word.
Layers = str | Mapping[int, int | Sequence[int]]
Depth = str | Mapping[str, Layers]
WORDS = ("spread", "repeat")


@dataclass
class Matches:
    """`given`: target's name -> source's. `dropped` of the source by a rule, `left` of the target by a map of layers."""

    given: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match(source: Iterable[str], target: Iterable[str], rules: Rules | None, depth: Depth | None) -> Matches:
    """What every name of the target is given.

    `rules` maps patterns of the source's names to the target's: `*` stands for any text, and the n-th of the pattern is put
    for the n-th of the result; None leaves the tensors out. The first pattern that fits counts; a name that fits none keeps
    itself. Without rules a prefix that all names of one side have is passed over.

    `depth` maps a stack of the target, by what stands before its numbers, to source layer -> target's layer(s), to "spread"
    (each of the source's layers once, evenly: 6 into 12 are every second), or to "repeat" (every layer of the target is
    given one: 6 into 12 each twice). A word alone holds for all stacks. A deeper source gives evenly chosen layers.
    Raises `OptionError` with every rule that fits nothing or twice, and every layer that isn't there.
    """
    source, target = list(source), list(target)
    found = Matches()
    problems = [*_misshapen_rules(rules), *_misshapen_depth(depth)]
    if problems:
        raise OptionError(*problems)
    renamed = _renamed(source, target, rules, found, problems)
    maps = _maps(depth, renamed, target, problems)
    known = dict.fromkeys(target)
    for name, theirs in renamed:
        for place in _placed(name, maps):
            if place in found.given and place in known:
                wrong = f"is given both {found.given[place]!r} and {theirs!r}"
                problems.append(Problem(f"tensor {place!r}", wrong, "make the rules send one"))
            found.given.setdefault(place, theirs)
    found.left = [name for name in target if name not in found.given and any(name.startswith(head) for head in maps)]
    if problems:
        raise OptionError(*problems)
    return found


def _misshapen_rules(rules: Any) -> list[Problem]:
    """What isn't patterns and patterns or None."""
    allowed = "{'source.pattern.*': 'target.pattern.*'}, or None in place of the second"
    if not isinstance(rules, Mapping | None):
        return [Problem("rules", f"got a {type(rules).__name__}", allowed)]
    return [
        Problem(f"rules[{pattern!r}]", f"got {to!r}", allowed)
        for pattern, to in (rules or {}).items()
        if not isinstance(pattern, str) or not isinstance(to, str | None)
    ]


def _misshapen_depth(depth: Any) -> list[Problem]:
    """What isn't a word, or words and numbers of layers by stack."""
    allowed = "'spread', 'repeat', or {stack: {source layer: target's layer or layers}}"
    if isinstance(depth, str | None):
        return []
    if not isinstance(depth, Mapping):
        return [Problem("depth", f"got {depth!r}", allowed)]
    return [
        Problem(f"depth[{stack!r}]", f"got {layers!r}", allowed)
        for stack, layers in depth.items()
        if not isinstance(stack, str) or not (isinstance(layers, str) or _is_map(layers))
    ]


def _is_map(layers: Any) -> bool:
    places = [[to] if isinstance(to, int) else to for to in layers.values()] if isinstance(layers, Mapping) else [None]
    return all(isinstance(to, Sequence) and all(isinstance(n, int) for n in to) for to in places) and all(
        isinstance(n, int) for n in layers
    )


def _renamed(
    source: Sequence[str], target: Sequence[str], rules: Rules | None, found: Matches, problems: list[Problem]
) -> list[tuple[str, str]]:
    """(the name that a source's tensor has in the target, its own), without what is dropped."""
    if not rules:
        moved, note = match_names(dict.fromkeys(target), source)
        found.notes += [f"source: {note}"] if note else []
        return list(moved.items())
    patterns = {pattern: _compiled(pattern) for pattern in rules}
    problems += [
        Problem(f"rules[{pattern!r}]", f"has {pattern.count('*')} *, and {to!r} has {to.count('*')}", "as many on both sides")
        for pattern, to in rules.items()
        if to is not None and to.count("*") != pattern.count("*")
    ]
    used = dict.fromkeys(rules, 0)
    pairs = []
    for name in source:
        pattern, fit = next(((p, m) for p, regex in patterns.items() if (m := regex.fullmatch(name))), ("", None))
        if fit is None:
            pairs.append((name, name))
            continue
        used[pattern] += 1
        to = rules[pattern]
        if to is None:
            found.dropped.append(name)
        elif to.count("*") == pattern.count("*"):
            pairs.append((_filled(to, fit.groups()), name))
    problems += [
        Problem(f"rules[{pattern!r}]", "fits no tensor of the source", nearest(pattern, source))
        for pattern, times in used.items()
        if not times
    ]
    return pairs


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(map(re.escape, pattern.split("*"))))


def _filled(pattern: str, parts: Sequence[str]) -> str:
    first, *others = pattern.split("*")
    return first + "".join(part + text for part, text in zip(parts, others, strict=True))


def _maps(
    depth: Depth | None, renamed: Sequence[tuple[str, str]], target: Sequence[str], problems: list[Problem]
) -> dict[str, dict[int, list[int]]]:
    """For each stack, by its head with a dot: source layer -> the target's layers."""
    if depth is None:
        return {}
    theirs = [name for name, _ in renamed]
    if isinstance(depth, str):
        heads = [stack.head for stack in find_layers(target).stacks if stack.head.endswith(".")]
        wanted: dict[str, Layers] = {head: depth for head in heads if _numbers(theirs, head)}
        if not wanted:
            problems.append(Problem("depth", f"got {depth!r}, and no stack of layers is in both", "name the stacks"))
    else:
        wanted = {f"{stack.rstrip('.')}." if stack else "": layers for stack, layers in depth.items()}
    maps = {}
    for head, layers in wanted.items():
        path, ours, own = f"depth[{head.rstrip('.')!r}]", _numbers(target, head), _numbers(theirs, head)
        empty = [side for side, numbers in (("source (under its new name)", own), ("target", ours)) if not numbers]
        problems += [Problem(path, f"no layers of the {side} are numbered below it", "check the name") for side in empty]
        if not empty:
            maps[head] = _layers(path, layers, own, ours, problems)
    return maps


def _layers(path: str, layers: Layers, own: list[int], ours: list[int], problems: list[Problem]) -> dict[int, list[int]]:
    if isinstance(layers, str):
        if layers not in WORDS:
            problems.append(Problem(path, f"got {layers!r}", f"{nearest(layers, WORDS)}, or source layer -> target's layer"))
        return _by_word(layers, own, ours)
    found = {layer: [to] if isinstance(to, int) else list(to) for layer, to in layers.items()}
    problems += [Problem(path, f"the source has no layer {n}", f"it has {_shown(own)}") for n in found if n not in own]
    places = [place for to in found.values() for place in to]
    problems += [Problem(path, f"the target has no layer {n}", f"it has {_shown(ours)}") for n in places if n not in ours]
    twice = dict.fromkeys(place for place in places if places.count(place) > 1)
    problems += [Problem(path, f"layer {n} of the target is given twice", "give it one layer") for n in twice]
    return found


def _by_word(word: str, own: list[int], ours: list[int]) -> dict[int, list[int]]:
    s, t = len(own), len(ours)
    if s > t or word == "repeat":
        pairs = [(j * s // t, j) for j in range(t)]
    else:
        pairs = [(i, i * t // s) for i in range(s)]
    found: dict[int, list[int]] = {number: [] for number in own}
    for i, j in pairs:
        found[own[i]].append(ours[j])
    return found


def _placed(name: str, maps: Mapping[str, Mapping[int, Sequence[int]]]) -> list[str]:
    """Where a tensor goes: itself, or into the layers that its own goes to."""
    for head, layers in maps.items():
        number, _, tail = name.removeprefix(head).partition(".")
        if name.startswith(head) and number.isdecimal():
            return [f"{head}{place}.{tail}" if tail else f"{head}{place}" for place in layers.get(int(number), ())]
    return [name]


def _numbers(names: Iterable[str], head: str) -> list[int]:
    """The layers of a stack."""
    rests = (name.removeprefix(head).partition(".")[0] for name in names if name.startswith(head))
    return sorted({int(rest) for rest in rests if rest.isdecimal()})


def _shown(numbers: Sequence[int]) -> str:
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))

"""Tensors that meet: those of several models under one key, with account kept of what one lacks or has beyond the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from interfuse.checkpoints.layers import Layers, Stack
from interfuse.checkpoints.names import listed
from interfuse.errors import Problem
from interfuse.layout.slots import Group, Slot, copied
from interfuse.recipe.references import Reference
from interfuse.recipe.values import matcher

_ONE = "give models of one architecture, or name the tensors under `drop` or `keep`"


class Member(NamedTuple):
    """A model as the lead names its tensors: that name -> its name in the model; `layers` are of the lead's names."""

    reference: Reference
    names: dict[str, str]
    layers: Layers


class Seat(NamedTuple):
    """A model's part in a piece: its path in the recipe, the model, and which of its layers (None: all)."""

    path: str
    member: Member
    range: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.path} ({self.member.reference})"

    def stack(self, head: str) -> Stack | None:
        """The model's layers of that name."""
        return next((stack for stack in self.member.layers.stacks if stack.head == head), None)


class Patterns:
    """The patterns of `drop` or `keep`: calling it says whether a name matches one, and which did is remembered."""

    def __init__(self, key: str, patterns: Sequence[str] | None):
        self._key, self._patterns = key, list(patterns or ())
        self._tests = list(map(matcher, self._patterns))
        self._unused = dict.fromkeys(range(len(self._tests)))

    def __bool__(self) -> bool:
        return bool(self._tests)

    def __call__(self, name: str) -> bool:
        found = [i for i, test in enumerate(self._tests) if test(name)]
        for i in found:
            self._unused.pop(i, None)
        return bool(found)

    def problems(self) -> list[Problem]:
        """The patterns that matched nothing."""
        wrong = "matches no tensor"
        return [Problem(f"{self._key}[{i}]", f"{self._patterns[i]!r} {wrong}", "correct it or remove it") for i in self._unused]


class Cell:
    """The tensors of a group: `add` puts together those of its models that have the same key, and keeps account.

    `seats` are the group's sources, and behind them the base where it isn't one of them; `lead` is the base's, or the first.
    """

    def __init__(self, keep: Patterns, group: Group, seats: list[Seat]):
        self.keep, self.group, self.seats = keep, group, seats
        self.base_at = None if group.base is None else len(seats) - 1 if group.base_at is None else group.base_at
        self.lead = self.base_at or 0
        self.slots: list[Slot] = []
        self.wrong: list[Problem] = []
        self._missing: list[list[str]] = [[] for _ in seats]
        self._extra: list[list[str]] = [[] for _ in seats]
        self._deep: dict[int, None] = {}  # seats of another depth, of which what is missing needn't be said

    def refuse(self, seat: Seat, wrong: str, allowed: str) -> None:
        """Say what is wrong with a model as a whole; what it lacks or has beyond the others isn't said then."""
        self.wrong.append(Problem(str(seat), wrong, allowed))
        self._deep[self.seats.index(seat)] = None

    def add(self, maps: Sequence[Mapping[str, str]], place: Callable[[str], tuple[str, float]]) -> None:
        """Make slots of what the seats have: for each, key -> name as the lead has it. `place` gives output name and depth."""
        lead = maps[self.lead]
        uneven = [i for i, there in enumerate(maps) if there.keys() != lead.keys()]
        keys = list(lead)
        for i in uneven:
            keys += [key for key in maps[i] if key not in lead]
        if not uneven and not self.keep:
            self._put(keys, maps, place)
            return
        for key in dict.fromkeys(keys):
            if self._is_merged(key, maps, uneven, place):
                self._put([key], maps, place)

    def _put(self, keys: list[str], maps: Sequence[Mapping[str, str]], place: Callable[[str], tuple[str, float]]) -> None:
        """Slots of keys that every model has."""
        columns = [[seat.member.names[there[key]] for key in keys] for seat, there in zip(self.seats, maps, strict=True)]
        sources = zip(*columns[: len(self.group.sources)], strict=True)
        bases: Iterable[str | None] = [None] * len(keys) if self.base_at is None else columns[self.base_at]
        for key, names, base in zip(keys, sources, bases, strict=True):
            output, t = place(key)
            self.slots.append(Slot(output, self.group, names, base, t))

    def _is_merged(
        self, key: str, maps: Sequence[Mapping[str, str]], uneven: Sequence[int], place: Callable[[str], tuple[str, float]]
    ) -> bool:
        """Whether every model has the key and it isn't kept as it is, which is done here then."""
        name = next(there[key] for there in maps if key in there)
        if self.keep and self.keep(name):
            self._keep(key, maps, place)
            return False
        return self._even(key, name, maps, uneven)

    def _even(self, key: str, name: str, maps: Sequence[Mapping[str, str]], uneven: Sequence[int]) -> bool:
        """Whether every model has the key; what is missing, or there beyond the lead's, is noted."""
        if key not in maps[self.lead]:
            for i in uneven:
                if key in maps[i]:
                    self._extra[i].append(name)
            return False
        lacking = [i for i in uneven if key not in maps[i]]
        for i in lacking:
            self._missing[i].append(name)
        return not lacking

    def _keep(self, key: str, maps: Sequence[Mapping[str, str]], place: Callable[[str], tuple[str, float]]) -> None:
        order = [self.lead, *range(len(maps))]
        member, name = next((self.seats[i].member, maps[i][key]) for i in order if key in maps[i])
        output, t = place(key)
        self.slots.append(Slot(output, copied(member.reference), (member.names[name],), None, t))

    def problems(self) -> list[Problem]:
        """All that doesn't fit."""
        lead = self.seats[self.lead]
        found = list(self.wrong)
        for i, seat in enumerate(self.seats):
            if i not in self._deep:
                lines = listed(self._missing[i], "missing")
                found += [Problem(str(seat), wrong, f"unlike {lead}: {_ONE}") for wrong in lines]
                lines = listed(self._extra[i], "extra")
                found += [Problem(str(seat), wrong, f"{lead} has none: {_ONE}") for wrong in lines]
        return found

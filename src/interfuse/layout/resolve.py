"""Recipe and headers into a layout: pieces one after the other, layers numbered on, what is in no piece taken as it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from interfuse.checkpoints.layers import Side, Stack, find_layers
from interfuse.checkpoints.names import match_names
from interfuse.checkpoints.parts import Test, find_parts
from interfuse.checkpoints.ties import tie
from interfuse.errors import Problem
from interfuse.layout.cells import Cell, Member, Patterns, Seat
from interfuse.layout.slots import Group, Header, Layout, Slot, copied
from interfuse.recipe.pieces import Piece, pieces
from interfuse.recipe.references import Reference
from interfuse.recipe.schema import Recipe
from interfuse.recipe.values import Scopes, filters, matcher


def layout(recipe: Recipe, headers: Mapping[Reference, Header], *, compat: bool = False) -> Layout:
    """Resolve a merge's recipe against its models' headers: one for each of `recipe.pieces.references(recipe)`.

    With `compat`, tensors after the last layer have depth 0, as in mergekit. Nothing is raised for what the user can put
    right: that is in `problems`.
    """
    found = pieces(recipe)
    if not found:
        return Layout((), (Problem("models", "none given", "at least 1"),), (), {})
    work = _Work(recipe, headers, compat)
    lead = work.read(found)
    modules: dict[str | None, list[Piece]] = {}
    for piece in found:
        modules.setdefault(piece.module, []).append(piece)
    tests, wrong = find_parts([name for name in modules if name is not None], lead.names)
    work.problems += wrong
    for name, members in modules.items():
        work.merge(members, None if name is None else tests[name])
    if tests:
        work.copy(lead, [name for name in lead.names if not any(test(name) for test in tests.values())])
    work.check_patterns(found)
    return Layout(tuple(work.slots), tuple(dict.fromkeys(work.problems)), tuple(dict.fromkeys(work.notes)), work.layers)


class _Work:
    """Gathers slots, problems and notes while a recipe's pieces are gone through one after the other."""

    def __init__(self, recipe: Recipe, headers: Mapping[Reference, Header], compat: bool):
        self.headers, self.compat = headers, compat
        self.slots: list[Slot] = []
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.layers: dict[str, tuple[tuple[Reference, int], ...]] = {}
        self.members: dict[str, Member] = {}
        self.drop, self.keep = Patterns("drop", recipe.drop), Patterns("keep", recipe.keep)

    def check_patterns(self, found: Sequence[Piece]) -> None:
        """A pattern that matches nothing is a slip of the pen; a filter may also stand there for other models."""
        self.problems += [*self.drop.problems(), *self.keep.problems()]
        if self.drop and not any(member.names for member in self.members.values()):
            self.problems.append(Problem("drop", "leaves no tensor", "name fewer: what is dropped isn't in the result"))
        scopes = [(f"{source.path}.parameters", source.parameters) for piece in found for source in piece.sources]
        scopes += [level for piece in found for level in piece.levels]
        patterns = {p: said for path, scope in scopes for key in scope for p, said in filters(scope[key], f"{path}.{key}")}
        names = [slot.name for slot in self.slots]
        names += [name for member in self.members.values() for name in member.names.values()]
        unmet = {pattern for pattern in dict.fromkeys(patterns.values()) if not any(map(matcher(pattern), names))}
        self.notes += [f"{path}: {pattern!r} matches no tensor" for path, pattern in patterns.items() if pattern in unmet]

    def read(self, found: Sequence[Piece]) -> Member:
        """Put every model's names as the lead has them: the first base, else the first model."""
        models = [(source.path, source.model) for piece in found for source in piece.sources]
        models += [("base_model", piece.base) for piece in found if piece.base is not None]
        first = found[0].base or found[0].sources[0].model
        lead = self._member(next(path for path, model in models if model == first), first, None)
        for path, model in models:
            if model not in self.members:
                self._member(path, model, lead)
        return lead

    def _member(self, path: str, model: str, lead: Member | None) -> Member:
        reference = Reference.parse(model)
        header = self.headers[reference]
        names = {name: name for name in header.specs}
        if not names:
            self.problems.append(Problem(path, f"{model} holds no tensor", "give a checkpoint with weights"))
        if lead is not None and names.keys() != lead.names.keys():
            names, note = match_names(self.headers[lead.reference].specs, header.specs)
            wanted = {name: there for name, there in lead.names.items() if name in names or not self.keep(name)}
            names, notes = tie(names, header.specs, header.config, wanted)
            self.notes += [f"{path} ({model}): {said}" for said in (note, *notes) if said]
        names = {name: there for name, there in names.items() if not self.drop(name)} if self.drop else names
        same = lead is not None and names.keys() == lead.names.keys()
        layers = lead.layers if same and lead is not None else find_layers(names)
        self.members[model] = Member(reference, names, layers)
        return self.members[model]

    def copy(self, member: Member, names: Sequence[str]) -> None:
        """Tensors that no module has, taken as they are."""
        group = copied(member.reference)
        for name in names:
            self.slots.append(Slot(name, group, (member.names[name],), None, member.layers.places[name].depth()))
        self._count(member, dict.fromkeys(names))
        if names:
            self.notes.append(f"{len(names)} tensors are in none of the modules; they are taken from {member.reference}")

    def merge(self, found: Sequence[Piece], part: Test | None) -> None:
        """The slots of a network, or of that part of it."""
        for number, piece in enumerate(found):
            group, seats = self._seats(piece)
            cell = Cell(self.keep, group, seats)
            if seats[0].range is None:
                self._whole(cell, part)
            else:
                self._slice(cell, part, first=number == 0, last=number == len(found) - 1)
            self.slots += cell.slots
            self.problems += cell.problems()

    def _seats(self, piece: Piece) -> tuple[Group, list[Seat]]:
        """The group of a piece and its seats: the sources, and behind them the base where it isn't one of them."""
        seats = [Seat(s.path, self.members[s.model], s.layers) for s in piece.sources]
        levels = [level for _, level in piece.levels]
        scopes = tuple(Scopes(source.parameters, *levels) for source in piece.sources)
        sources = tuple(seat.member.reference for seat in seats)
        if piece.base is None:
            return Group(piece.path, sources, scopes, Scopes(*levels)), seats
        base = self.members[piece.base]
        at = sources.index(base.reference) if base.reference in sources else None
        if at is None:
            ranges = list(dict.fromkeys(seat.range for seat in seats))
            if len(ranges) > 1:
                wrong = f"the base isn't among the sources, which have the layers {' and '.join(map(_shown, ranges))}"
                self.problems.append(Problem(f"{piece.path}.sources", wrong, "give the base as a source with a layer_range"))
            seats.append(Seat("base_model", base, ranges[0]))
        return Group(piece.path, sources, scopes, Scopes(*levels), base.reference, at), seats

    def _whole(self, cell: Cell, part: Test | None) -> None:
        """All tensors of the models, or of that part of them."""
        lead = cell.seats[cell.lead]
        stacks = _stacks(lead.member, part)
        for seat in cell.seats:
            for stack in stacks:
                other = seat.stack(stack.head) or stack
                if other.count != stack.count:
                    wrong = f"has {other.count} layers in {stack}, and {lead} has {stack.count}"
                    cell.refuse(seat, wrong, "give models of one depth, or ranges of their layers as `slices`")
        chosen = [{name: name for name in seat.member.names if part is None or part(name)} for seat in cell.seats]
        places, compat = lead.member.layers.places, self.compat
        cell.add(chosen, lambda name: (name, places[name].depth(compat=compat) if name in places else 0.0))
        self._count(lead.member, chosen[cell.lead])

    def _count(self, member: Member, names: Mapping[str, Any]) -> None:
        """Note that the output has the layers of `member` that are in `names`."""
        for stack in member.layers.stacks:
            if next(iter(member.layers.tails[stack.head][0].values())) in names:
                self.layers[stack.head] = tuple((member.reference, i) for i in range(stack.count))

    def _slice(self, cell: Cell, part: Test | None, *, first: bool, last: bool) -> None:
        """Some layers, numbered on from those before; what stands before all layers, or after, with the first or last."""
        lead = cell.seats[cell.lead]
        stack = self._sliced(cell, part)
        if stack is None or not _check_ranges(cell, stack):
            return
        starts = [seat.range[0] if seat.range else 0 for seat in cell.seats]
        length = (lead.range or (0, 0))[1] - starts[cell.lead]
        if first:
            cell.add([_side(seat.member, "before", part) for seat in cell.seats], lambda name: (name, 0.0))
        done = self.layers.get(stack.head, ())
        for i in range(length):
            cell.add(
                [seat.member.layers.tails[stack.head][start + i] for seat, start in zip(cell.seats, starts, strict=True)],
                functools.partial(_layer, stack, len(done) + i, i / (length - 1) if length > 1 else 1.0),
            )
        self.layers[stack.head] = (*done, *((lead.member.reference, starts[cell.lead] + i) for i in range(length)))
        if last:
            depth = 0.0 if self.compat else 1.0
            cell.add([_side(seat.member, "after", part) for seat in cell.seats], lambda name: (name, depth))

    def _sliced(self, cell: Cell, part: Test | None) -> Stack | None:
        """The one stack that slices are cut from."""
        lead = cell.seats[cell.lead]
        stacks = _stacks(lead.member, part)
        if not stacks:
            cell.refuse(lead, "no layers are found in it", "give `models`")
        elif len(stacks) > 1:
            allowed = "give `modules`, with slices in each"
            cell.refuse(lead, f"has {len(stacks)} stacks of layers: {', '.join(map(str, stacks))}", allowed)
        elif not stacks[0].consecutive:
            cell.refuse(lead, f"its layers have the numbers {', '.join(map(str, stacks[0].numbers))}", "give `models`")
        else:
            return stacks[0]
        return None


def _check_ranges(cell: Cell, stack: Stack) -> bool:
    """Whether each range of layers is there, and all are equally long."""
    for seat in cell.seats:
        start, end = seat.range or (0, 0)
        there, path = seat.stack(stack.head), f"{seat.path}.layer_range"
        if there is None:
            cell.refuse(seat, f"has no layers named {stack}", "give models of one architecture")
        elif start >= end:
            cell.wrong.append(Problem(path, f"got [{start}, {end}]", "the first layer and the one after the last"))
        elif end > there.count:
            wrong = f"got [{start}, {end}], and {seat.member.reference} has {there.count} layers"
            cell.wrong.append(Problem(path, wrong, f"at most [0, {there.count}]"))
    lengths = [seat.range[1] - seat.range[0] for seat in cell.seats if seat.range and seat.range[0] < seat.range[1]]
    if len(dict.fromkeys(lengths)) > 1:
        cell.wrong.append(Problem(f"{cell.group.path}.sources", f"have {lengths} layers", "as many in each source of a slice"))
    return not cell.wrong


def _layer(stack: Stack, number: int, t: float, tail: str) -> tuple[str, float]:
    return stack.name(number, tail), t


def _shown(layers: tuple[int, int] | None) -> str:
    return str(list(layers or ()))


def _stacks(member: Member, part: Test | None) -> list[Stack]:
    """A model's stacks of layers, or those in that part of it."""
    first = {stack: next(iter(member.layers.tails[stack.head][0].values())) for stack in member.layers.stacks}
    return [stack for stack, name in first.items() if part is None or part(name)]


def _side(member: Member, side: Side, part: Test | None) -> dict[str, str]:
    """A model's tensors on one side of all layers, or those in that part of it."""
    places = member.layers.places
    return {name: name for name in member.names if places[name].side == side and (part is None or part(name))}

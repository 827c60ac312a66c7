"""`transplant`: parameters and buffers of one network put into another, by name, by a map, adapted where asked.

Everything is matched, computed and checked before the first value changes, and the report says what became of each tensor.
Nothing is averaged or trained; how tensors meet is `matching`'s part, how they are made to fit that of `adapt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interfuse.checkpoints.shards import ShardWriter
from interfuse.checkpoints.source import Checkpoint, open_checkpoint, spans
from interfuse.checkpoints.tensors import to_array, to_tensor
from interfuse.checkpoints.tokenizers.embedding import embedding_rows, vocabulary_tensors
from interfuse.checkpoints.tokenizers.tokenizer import read_tokenizer
from interfuse.checkpoints.writer import whole_folder
from interfuse.engine.output.folder import copy_side_files
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem
from interfuse.models import place, put
from interfuse.progress import track
from interfuse.transfer.adapt import Adapt, Adapter, Rows, adapter, check_ways, token_rows
from interfuse.transfer.matching import Depth, Matches, Rules, match
from interfuse.transfer.report import Action, Row
from interfuse.transfer.report import Report as Report

#: token -> row, or the folder of a tokenizer.
Tokens = Mapping[str, int] | str | Path


@dataclass
class _Plan:
    """What every tensor of the target is given, and why the others aren't."""

    given: dict[str, tuple[str, Adapter]] = field(default_factory=dict)
    skipped: dict[str, tuple[str, str]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def transplant(
    source: Any,
    target: Any,
    rules: Rules | None = None,
    *,
    depth: Depth | None = None,
    adapt: Adapt | None = None,
    vocabulary: tuple[Tokens, Tokens] | None = None,
    strict: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Report:
    """Put the parameters and buffers of `source` into `target`; the report, which is printed too unless `show` is off.

    source: a module, a mapping of tensors or arrays, or a checkpoint on disk.
    target: a module or mapping, which is changed in place: what is tied stays tied, devices and types stay. Or a checkpoint
        on disk, which is read alone: a new folder `out` (`overwrite` replaces one) has its tensors, config and small files
        with the source's values, written tensor by tensor.
    rules: patterns of the source's names -> the target's, `{"encoder.layer.*": "layers.*"}`; None leaves tensors out.
    depth: stack of the target -> `{source layer: target layer or layers}`, "spread" or "repeat"; a word alone is for all
        stacks (see `matching.match`).
    adapt: ways in which tensors of other shapes are made to fit, for all or by patterns of the target's names: "crop", "pad"
        (zeros behind), "kernels" (about their centre), "positions" (bicubic), "heads" (the first ones, of one width).
    vocabulary: (source's, target's) tokens, as token -> row or a tokenizer's folder: rows go by token.
    strict: skipped, left and unused tensors are errors, unless `rules` or `depth` left them out.

    Raises `OptionError`, `CheckpointError`, or `ModelError`, with every problem, and nothing is changed.
    """
    origin, goal = open_checkpoint(source), open_checkpoint(target)
    on_disk = isinstance(target, (str, Path))
    if on_disk != (out is not None):
        allowed = (
            "a checkpoint isn't changed: give out=FOLDER" if on_disk else "what is in memory is changed there: leave it out"
        )
        raise OptionError(Problem("out", f"got {out!r} for a {type(target).__name__}", allowed))
    state = {} if on_disk else _state(target)
    made = _made(origin, goal, rules, depth, adapt, vocabulary, state)
    _check(made.report, made.matches, strict, ModelError if isinstance(target, nn.Module) else CheckpointError)
    if out is not None:
        inputs = [item for item in (source, target) if isinstance(item, (str, Path))]
        with whole_folder(out, overwrite=overwrite, inputs=inputs, nbytes=made.nbytes) as folder:
            made.write(folder)
    else:
        _fill(target, _values(made.plan, origin, goal, state))
    if show:
        _show(made.report)
    return made.report


@dataclass(frozen=True)
class Prepared:
    """A transplant between two checkpoints, decided from their headers alone."""

    origin: Checkpoint
    goal: Checkpoint
    plan: _Plan
    matches: Matches
    report: Report

    @property
    def nbytes(self) -> int:
        """How many bytes of tensors `write` writes."""
        return sum(spec.nbytes for spec in self.goal.specs.values())

    def write(self, folder: Path) -> list[str]:
        """Write the target's tensors with the new values, and its small files; the names of those that were left behind."""
        return _write(folder, self.plan, self.origin, self.goal)


def prepare(
    source: Checkpoint,
    target: Checkpoint,
    *,
    rules: Rules | None = None,
    depth: Depth | None = None,
    adapt: Adapt | None = None,
    vocabulary: tuple[Tokens, Tokens] | None = None,
    strict: bool = False,
) -> Prepared:
    """A transplant of files as `transplant` would do it; it raises the same, and nothing is read but headers."""
    made = _made(source, target, rules, depth, adapt, vocabulary, {})
    _check(made.report, made.matches, strict, CheckpointError)
    return made


def _made(
    origin: Checkpoint,
    goal: Checkpoint,
    rules: Rules | None,
    depth: Depth | None,
    adapt: Adapt | None,
    vocabulary: tuple[Tokens, Tokens] | None,
    state: Mapping[str, Any],
) -> Prepared:
    problems = check_ways(adapt, list(goal.specs))
    try:
        matches = match(origin.specs, goal.specs, rules, depth)
    except OptionError as error:
        raise OptionError(*error.problems, *problems) from None
    if problems:
        raise OptionError(*problems)
    rows = None if vocabulary is None else _rows(vocabulary, origin, goal, matches)
    plan = _planned(origin, goal, matches, adapt, rows, state)
    return Prepared(origin, goal, plan, matches, _report(plan, matches, origin, goal))


def _state(target: Any) -> dict[str, Any]:
    """The target's own tensors, by name."""
    return target.state_dict(keep_vars=True) if isinstance(target, nn.Module) else dict(target)


def _rows(vocabulary: tuple[Tokens, Tokens], origin: Checkpoint, goal: Checkpoint, matches: Matches) -> Rows:
    """Which rows go where, in which of the target's tensors."""
    if not isinstance(vocabulary, tuple) or len(vocabulary) != 2:
        raise OptionError(Problem("vocabulary", f"is a {type(vocabulary).__name__}", "give (the source's, the target's)"))
    tokens, named, problems = [], [], []
    for side, given, checkpoint in zip(("source", "target"), vocabulary, (origin, goal), strict=True):
        own = _tokens(given, side)
        odd = [token for token, row in own.items() if isinstance(row, bool) or not isinstance(row, int)]
        if odd:
            found = f"{odd[0]!r} has row {own[odd[0]]!r}"
            raise OptionError(Problem(f"vocabulary: {side}", found, "a whole number for each token"))
        rows = embedding_rows(checkpoint.specs) or max(own.values(), default=-1) + 1
        wrong = [token for token, row in own.items() if not 0 <= row < rows]
        problems += [Problem(f"vocabulary: {side}", f"{t!r} has row {own[t]} of {rows}", "give its own") for t in wrong[:5]]
        tokens.append(own)
        named.append(vocabulary_tensors(checkpoint.specs, rows, side))
    if problems:
        raise OptionError(*problems)
    names = [name for name in named[1] if matches.given.get(name) in named[0]]
    if not names:
        raise OptionError(Problem("vocabulary", "no tensor with a row a token is in both", "check the names, or leave it out"))
    return token_rows(tokens[0], tokens[1], names, len(tokens[1]))


def _tokens(given: Tokens, side: str) -> Mapping[str, int]:
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str | Path):
        wrong = f"got a {type(given).__name__}"
        raise OptionError(Problem(f"vocabulary: {side}", wrong, "token -> row, or a folder with a tokenizer"))
    found = read_tokenizer(Path(given)) if Path(given).is_dir() else None
    if found is None:
        raise OptionError(Problem(f"vocabulary: {side}", f"no tokenizer in {str(given)!r}", "give a folder, or token -> row"))
    return found.tokens


def _planned(
    origin: Checkpoint, goal: Checkpoint, matches: Matches, adapt: Adapt | None, rows: Rows | None, state: Mapping[str, Any]
) -> _Plan:
    plan = _Plan()
    for name, spec in goal.specs.items():
        theirs = matches.given.get(name)
        if theirs is None:
            continue
        found = adapter(name, origin.specs[theirs], spec, adapt, rows)
        if isinstance(found, Adapter):
            plan.given[name] = theirs, found
        else:
            plan.skipped[name] = theirs, found
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and name in goal.specs:
            groups.setdefault(place(tensor), []).append(name)
    for names in groups.values():
        lead = next((name for name in names if name in plan.given), names[0])
        plan.ties.update({name: lead for name in names if name != lead})
    return plan


def _report(plan: _Plan, matches: Matches, origin: Checkpoint, goal: Checkpoint) -> Report:
    rows = []
    for name, spec in goal.specs.items():
        tied = plan.ties.get(name, "")
        action, source, how = _became(plan, tied if tied and name not in plan.given else name)
        if action in ("copied", "adapted") and origin.specs[source].dtype != spec.dtype:
            how = "; ".join(filter(None, [how, f"{origin.specs[source].dtype} as {spec.dtype}"]))
        if tied:
            how = f"tied to {tied}"
        rows.append(Row(name, action, spec.count, source, how, tied, asked=name in matches.left))
    used = {row.source for row in rows}
    placed = {theirs for ours, theirs in matches.given.items() if ours not in goal.specs}
    unused = dict.fromkeys(matches.dropped, "left out by a rule")
    for name in origin.specs:
        if name not in used and name not in unused:
            unused[name] = "no such tensor in the target" if name in placed else "its layer goes nowhere"
    return Report(tuple(rows), unused, tuple(matches.notes))


def _became(plan: _Plan, name: str) -> tuple[Action, str, str]:
    if name in plan.given:
        source, made = plan.given[name]
        return ("adapted" if made.how else "copied"), source, made.how
    if name in plan.skipped:
        return "skipped", *plan.skipped[name]
    return "left", "", ""


def _check(report: Report, matches: Matches, strict: bool, kind: Callable[..., Exception]) -> None:
    """Nothing that fits is an error, and with `strict` whatever doesn't."""
    problems = []
    if not report.names("copied") and not report.names("adapted"):
        firsts = [f"{row.source!r}: {row.how}" for row in report.rows if row.action == "skipped"][:3]
        wrong = f"nothing of it fits the target ({'; '.join(firsts) or 'no name is in both'})"
        problems.append(Problem("source", wrong, "give rules={'source.pattern.*': 'target.pattern.*'}, or adapt="))
    elif strict:
        for row in report.rows:
            if row.action in ("skipped", "left") and not row.asked:
                why = f"is skipped: {row.how}" if row.how else "is given nothing"
                problems.append(Problem(f"tensor {row.name!r} of the target", why, "map it, or leave strict off"))
        problems += [
            Problem(f"tensor {name!r} of the source", f"isn't used: {why}", "map it, or leave it out by a rule to None")
            for name, why in report.unused.items()
            if name not in matches.dropped
        ]
    if problems:
        raise kind(*problems)


def _values(plan: _Plan, origin: Checkpoint, goal: Checkpoint, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every new value, in the target's type; names that are tied must be given the same."""
    starts = {tensor.data_ptr() for tensor in state.values() if isinstance(tensor, Tensor)}
    values: dict[str, Tensor] = {}
    problems = [Problem(f"tensor {name!r} of the target", wrong, _OWN) for name in plan.given if (wrong := _fixed(state[name]))]
    if problems:
        raise ModelError(*problems)
    for name in plan.given:
        value = _value(plan, name, origin, goal)
        values[name] = value.clone() if value.data_ptr() in starts else value
        lead = plan.ties.get(name, name)
        if lead in values and lead != name and not torch.equal(values[lead], values[name]):
            wrong = f"is tied to {lead!r} in the target, and the source gives the two different values"
            problems.append(Problem(f"tensor {name!r}", wrong, "leave one out by a rule, or untie them"))
    if problems:
        raise ModelError(*problems)
    return values


_OWN = "a copy of it, which has a memory of its own"


def _fixed(tensor: Any) -> str:
    """Why nothing can be written into a tensor or array, if so."""
    if isinstance(tensor, Tensor):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            return "was made in inference mode, and can't be changed outside"
        shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        return "has one number in several places (it is expanded)" if shared else ""
    return "" if tensor.flags.writeable else "is read-only"


def _value(plan: _Plan, name: str, origin: Checkpoint, goal: Checkpoint) -> Tensor:
    """What a tensor of the target is given; a number that its type can't hold is a `CheckpointError`."""
    theirs, made = plan.given[name]
    value = made.make(_read(origin, theirs), _read(goal, name))
    new = value.to(_read(goal, name).dtype)
    if new.dtype != value.dtype and not bool(torch.isfinite(new).all()) and bool(torch.isfinite(value).all()):
        allowed = "convert the target to a type of larger range"
        raise CheckpointError(Problem(f"tensor {theirs!r}", f"has numbers too large for {goal.specs[name].dtype}", allowed))
    return new


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    array = checkpoint.read(name)
    return to_tensor(array if array.flags.writeable else array.copy(), checkpoint.specs[name].dtype)


def _fill(target: Any, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if isinstance(target, nn.Module):
            put(target, name, value)
        elif isinstance(target[name], Tensor):
            with torch.no_grad():
                target[name].copy_(value)
        else:
            np.copyto(target[name], to_array(value))


def _write(folder: Path, plan: _Plan, origin: Checkpoint, goal: Checkpoint) -> list[str]:
    """The target's tensors with the new values, one at a time, and its small files; which were left behind."""
    names, sizes = list(goal.specs), [spec.nbytes for spec in goal.specs.values()]
    with ShardWriter(folder, goal.specs, stems=goal.stems) as writer:
        for name in track(names, "transplanting", sizes=sizes):
            theirs, made = plan.given.get(name, (name, Adapter("", lambda value, old: value)))
            of = origin if name in plan.given else goal
            if made.how or of.specs[theirs].dtype != goal.specs[name].dtype:
                writer.write(name, 0, to_array(_value(plan, name, origin, goal)))
                continue
            for start, stop in spans(goal.specs[name].shape):
                writer.write(name, start, of.block(theirs, start, stop))
    for file in dict.fromkeys([*origin.files(), *goal.files()]):
        file.check()
    return copy_side_files(goal.folder, folder, list(goal.stems)) if goal.folder is not None else []


def _show(report: Report) -> None:
    """Print the table: as wide as the terminal, and off one as wide as it has to be."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 240).print(report)

"""Recipe and headers in, a frozen plan out: every output tensor with its inputs and their numbers.

Pure: it reads no data and writes nothing. All that can be wrong with the user's request, save what only the data shows, is
found here and raised at once; running a plan is `interfuse.engine`'s part. Which tensors meet is `layout`'s.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from interfuse.checkpoints.config import config_problems
from interfuse.checkpoints.numbers import FLOATS, STORED_FLOATS, float_named
from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.checkpoints.tokenizers.embedding import is_vocabulary
from interfuse.errors import CheckpointError, OptionError, Problem, UserError, nearest
from interfuse.layout import Group, Header, Slot, layout
from interfuse.layout.heads import apart, heads_note
from interfuse.methods.calls import COPY, make_call
from interfuse.methods.calls import Call as Call
from interfuse.recipe import Recipe
from interfuse.recipe.references import Reference
from interfuse.recipe.values import Scopes
from interfuse.registry import Method, find

_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_SHOWN = 5  # tensors that a message lists of many
_COUNTER = "num_batches_tracked"

#: How an output comes from its inputs: `merge` by its call; `same`, for integers, which must agree; `largest`, for
#: BatchNorm's count of batches.
How = Literal["merge", "same", "largest"]


class Input(NamedTuple):
    """A tensor that is read: which of the plan's sources, and its name there."""

    source: int
    name: str


class Output(NamedTuple):
    """A tensor that is written: `inputs` are the models', `base` is the base's where the method sees one."""

    name: str
    spec: TensorSpec
    how: How
    inputs: tuple[Input, ...]
    base: Input | None = None
    call: Call | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.spec} = {self.call or self.how} of {', '.join(f'{i.source}:{i.name}' for i in self.reads)}"

    @property
    def reads(self) -> tuple[Input, ...]:
        """All that is read, the base first."""
        return self.inputs if self.base is None else (self.base, *self.inputs)


class Wording(NamedTuple):
    """What a recipe's tokenizer and chat template make of the output: files beside its weights (None: of the lead's, one that
    goes), what its config files say instead, by file (None: nothing), the embedding's rows in the lead and in the output.

    `notes` say what becomes of each model's rows; `digest` names what determines all this; `origins` are where tokenizers of
    models that aren't merged are exactly, if that's elsewhere.
    """

    files: Mapping[str, bytes | None]
    digest: str
    changes: Mapping[str, Mapping[str, Any]] = {}
    rows: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A merge, decided. `str(plan)` is readable in full; `digest()` names it wherever the same models lie.

    `lead` is the source that config, tokenizer and other side files come from: the base, else the first model; `wording` is
    what a recipe's own tokenizer makes of these. `layers` has for each stack of the output where each layer comes from: a
    source and its layer there. `earlier` names the plans whose results are merged.
    """

    method: str
    sources: tuple[str, ...]
    lead: int
    outputs: tuple[Output, ...]
    layers: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    seed: int
    notes: tuple[str, ...]
    wording: Wording | None = None
    earlier: tuple[str, ...] = ()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The output's header."""
        return {output.name: output.spec for output in self.outputs}

    def digest(self) -> str:
        """The SHA-256 of all that determines the result, in canonical JSON: not the models' paths, not the notes."""
        calls = {id(output.call): output.call for output in self.outputs}
        number = {call: i for i, call in enumerate(calls)}
        reads = [read for output in self.outputs for read in output.inputs]
        bases = [output.base for output in self.outputs]
        content: dict[str, Any] = {  # in columns, which are written faster than rows
            "seed": self.seed,
            "calls": [call and [call.method, call.weights, call.options] for call in calls.values()],
            "names": [output.name for output in self.outputs],
            "dtypes": [output.spec.dtype for output in self.outputs],
            "shapes": [output.spec.shape for output in self.outputs],
            "how": [output.how for output in self.outputs],
            "call": [number[id(output.call)] for output in self.outputs],
            "inputs": [len(output.inputs) for output in self.outputs],
            "sources": [source for source, _ in reads],
            "tensors": [name for _, name in reads],
            "base_sources": [base and base.source for base in bases],
            "base_tensors": [base and base.name for base in bases],
        }
        content |= {"wording": self.wording.digest} if self.wording else {}
        content |= {"earlier": self.earlier} if self.earlier else {}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), check_circular=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"{self.method}, seed {self.seed}"]
        lines += [f"source {i}: {name}{' (lead)' if i == self.lead else ''}" for i, name in enumerate(self.sources)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *map(str, self.outputs)])


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python doesn't look for garbage meanwhile: of headers and plans all is kept, and looking takes a third of their time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def plan_merge(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint], *, compat: bool = False) -> Plan:
    """Resolve a merge against its checkpoints' headers: one for each of `recipe.pieces.references(recipe)`.

    Everything wrong comes at once: a `CheckpointError` if a checkpoint is at fault, else an `OptionError`. `compat` follows
    mergekit where it differs (docs/mergekit.md).
    """
    method = find(recipe.merge_method or "", "weights", "merge_method")
    recipe = apart(recipe, checkpoints)
    configs, faulty = _configs(list(checkpoints.values()))
    headers = {ref: Header(c.specs, config) for (ref, c), config in zip(checkpoints.items(), configs, strict=True)}
    found = layout(recipe, headers, compat=compat)
    planner = _Planner(method, checkpoints, recipe, compat)
    outputs = [output for slot in found.slots if (output := planner.output(slot))]
    wrong = list(dict.fromkeys(planner.refused()))
    misfits = [*faulty, *found.problems, *planner.mismatches()]
    if misfits:
        raise CheckpointError(*dict.fromkeys([*misfits, *wrong]))
    if wrong:
        raise OptionError(*wrong)
    order = {reference: i for i, reference in enumerate(checkpoints)}
    first = found.slots[0].group if found.slots else None
    lead = order[first.base or first.sources[0]] if first else 0
    layers = tuple((head, tuple((order[r], i) for r, i in picks)) for head, picks in found.layers.items())
    notes = [*found.notes, *planner.notes(outputs), *heads_note(recipe, checkpoints)]
    return Plan(
        method.name, tuple(c.name for c in checkpoints.values()), lead, tuple(outputs), layers, recipe.seed, tuple(notes)
    )


def _configs(checkpoints: Sequence[Checkpoint]) -> tuple[list[dict[str, Any] | None], list[Problem]]:
    """Every checkpoint's config, and what is wrong with any."""
    configs: list[dict[str, Any] | None] = []
    problems: list[Problem] = []
    for checkpoint in checkpoints:
        config = None
        try:
            config = config_of(checkpoint)
        except CheckpointError as error:
            problems += error.problems
        found = config_problems(config, f"{checkpoint.name}/config.json")
        problems += found
        configs.append(None if found else config)
    return configs, problems


def config_of(checkpoint: Checkpoint, inner: str = "") -> dict[str, Any] | None:
    """The checkpoint's config.json, or that in a sub-folder; None where there is none, an error for what isn't a mapping."""
    path = checkpoint.folder / f"{inner}config.json" if checkpoint.folder else None
    text = checkpoint.beside.get(f"{inner}config.json")
    try:
        if text is None:
            if path is None or not path.is_file():
                return None
            text = path.read_bytes()
        config = json.loads(text)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"can't be read: {error.strerror}")) from None
    except ValueError:
        raise CheckpointError(Problem(str(path), "isn't JSON", "get the file again")) from None
    if not isinstance(config, dict):
        raise CheckpointError(Problem(str(path), f"holds a {type(config).__name__}, not a mapping", "get the file again"))
    return config


class _Meeting(NamedTuple):
    """Whose tensors meet in a group.

    `models` are the models' places among its sources: all, but a base that the method sees apart. `numbers`, `checkpoints`
    and `scopes` are theirs, `filters` the scopes without those whose filters are another's too. `shared` are the parameters
    of options that the models share, `base` the base's number. Outputs follow the types and shapes of `lead`.
    """

    models: tuple[int, ...]
    numbers: tuple[int, ...]
    checkpoints: tuple[Checkpoint, ...]
    scopes: tuple[Scopes, ...]
    filters: tuple[Scopes, ...]
    shared: Scopes
    base: int
    lead: Checkpoint


class _Planner:
    """Makes outputs of slots, sharing calls; gathers what is wrong. A class, for what all slots have in common."""

    def __init__(self, method: Method, checkpoints: Mapping[Reference, Checkpoint], recipe: Recipe, compat: bool):
        self.method, self.checkpoints, self.compat = method, checkpoints, compat
        self.order = {reference: i for i, reference in enumerate(checkpoints)}
        self.wrong: list[Problem] = []
        self.dtype = self._dtype(recipe)
        self.depth = method.takes("depth")
        fields = method.options.model_fields
        self.fields = [(name, field.alias or name, name in method.each, field.default) for name, field in fields.items()]
        self._meetings: dict[Group, _Meeting] = {}
        self._settled: dict[Any, Call | tuple[Problem, ...]] = {}
        self._calls: dict[Any, Call | tuple[Problem, ...]] = {}
        self._differ: dict[str, list[Problem]] = {}
        self._refused: dict[Problem, list[str]] = {}

    def _dtype(self, recipe: Recipe) -> str | None:
        chosen = None
        for key in ("dtype", "out_dtype"):
            name = getattr(recipe, key)
            if name is not None:
                chosen = float_named(name)
                if chosen is None:
                    self.wrong.append(Problem(key, f"got {name!r}", nearest(name, FLOATS)))
        return chosen

    def output(self, slot: Slot) -> Output | None:
        """The slot's output, or None where something is wrong with it."""
        name, group, names, base, _ = slot
        meeting = self._meetings.get(group) or self._meet(group)
        followed = names[0] if base is None else base
        spec = meeting.lead.specs[followed]
        if not self._fits(slot, meeting, spec):
            return None
        inputs = tuple([Input(number, names[i]) for i, number in zip(meeting.models, meeting.numbers, strict=True)])
        read = None if base is None else Input(meeting.base, base)
        if spec.dtype in _INTEGERS:
            return Output(name, spec, "largest" if name.endswith(_COUNTER) else "same", inputs, read)
        call = COPY if group.copied else self._call(slot, meeting, whole=len(spec.shape) > 1)
        if not isinstance(call, Call):
            for problem in call:
                self._refused.setdefault(problem, []).append(name)
            return None
        dtype = self.dtype or meeting.lead.declared.get(followed, spec.dtype)
        written = spec if dtype == spec.dtype else TensorSpec(dtype, spec.shape)
        return Output(name, written, "merge", inputs, read if self.method.sees_base else None, call)

    def _meet(self, group: Group) -> _Meeting:
        apart = group.base_at if self.method.sees_base and not group.copied else None
        models = tuple(i for i in range(len(group.sources)) if i != apart)
        if "base" in self.method.needs and group.base is None and not group.copied:
            self.wrong.append(Problem("base_model", "missing", f"{self.method.name} needs {self.method.needs}"))
        sources = [group.sources[i] for i in models]
        scopes = tuple(group.scopes[i] for i in models)
        lead = group.base or group.sources[0]
        meeting = _Meeting(
            models,
            tuple(self.order[source] for source in sources),
            tuple(self.checkpoints[source] for source in sources),
            scopes,
            tuple({scope.tests: scope for scope in scopes}.values()),
            group.scopes[0] if len(group.scopes) == 1 else group.shared,
            self.order[lead],
            self.checkpoints[lead],
        )
        self._meetings[group] = meeting
        return meeting

    def _fits(self, slot: Slot, meeting: _Meeting, spec: TensorSpec) -> bool:
        """Whether all inputs have the reference's shape and kind of type; what differs is noted by model."""
        dtype, whose = spec.dtype, meeting.lead.name
        is_float = dtype in STORED_FLOATS
        if not is_float and dtype not in _INTEGERS:
            wrong = f"tensor {slot.name!r} is {spec}"
            self._differ.setdefault(whose, []).append(Problem(whose, wrong, f"convert it to one of {', '.join(FLOATS)}"))
            return False
        good, names = True, slot.names
        for i, checkpoint in zip(meeting.models, meeting.checkpoints, strict=True):
            found = checkpoint.specs[names[i]]
            if found is spec or (found.shape == spec.shape and found.dtype == dtype):
                continue
            if found.shape != spec.shape or not (is_float and found.dtype in STORED_FLOATS):
                allowed = f"{whose} has {spec}"
                if is_vocabulary(slot.name) and found.shape[1:] == spec.shape[1:] and found.shape != spec.shape:
                    allowed += ": other tokens; tokenizer_source: union gives all models the same"
                problem = Problem(checkpoint.name, f"tensor {slot.names[i]!r} is {found}", allowed)
                self._differ.setdefault(checkpoint.name, []).append(problem)
                good = False
        return good

    def refused(self) -> list[Problem]:
        """What the method has against numbers, with the tensors that have them where others have other numbers."""
        found = []
        for (path, wrong, allowed), names in self._refused.items():
            where = f" for {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            found.append(Problem(path, wrong + (where if len(self._calls) > 1 else ""), allowed))
        if len(found) > _SHOWN:
            found[_SHOWN:] = [Problem("parameters", f"{len(found) - _SHOWN} more such problems", "put the first right")]
        return self.wrong + found

    def mismatches(self) -> list[Problem]:
        """All tensors that don't fit, of many in one model the first few."""
        problems = []
        for name, found in self._differ.items():
            problems += found[:_SHOWN]
            if len(found) > _SHOWN:
                more = f"{len(found) - _SHOWN} more tensors differ in shape or type"
                problems.append(Problem(name, more, "give models of one architecture"))
        return problems

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        """What a user should know of the result."""
        if any(output.name.endswith("running_var") for output in outputs):
            return ["BatchNorm statistics are merged like weights; re-estimating them on data is usually better"]
        return []

    def _call(self, slot: Slot, meeting: _Meeting, *, whole: bool) -> Call | tuple[Problem, ...]:
        """The method with this tensor's numbers, or what it has against them; what the same entries give is looked up once."""
        name, group, there, _, t = slot
        names = [there[i] for i in meeting.models]
        alike = names.count(there[0]) == len(names)
        found = (
            [scopes.entries(there[0]) for scopes in meeting.filters]
            if alike
            else list(map(Scopes.entries, meeting.scopes, names))
        )
        key = (group, t, whole, meeting.shared.entries(name), *found)
        if key not in self._settled:
            self._settled[key] = self._make(name, names, t, meeting, whole)
        return self._settled[key]

    def _make(self, name: str, names: Sequence[str], t: float, meeting: _Meeting, whole: bool) -> Call | tuple[Problem, ...]:
        """The call of a tensor: those with the same numbers share it, wherever in the recipe the numbers are from."""
        scopes = meeting.scopes
        weights = tuple([scope.resolve("weight", own, t, 1.0) for scope, own in zip(scopes, names, strict=True)])
        options: dict[str, Any] = {}
        for option, alias, each, default in self.fields:
            if each:
                values = [_either(scope, alias, option, own, t, default) for scope, own in zip(scopes, names, strict=True)]
                options[option] = tuple(values)
            else:
                options[option] = _either(meeting.shared, alias, option, name, t, default)
        depth = t if self.depth else 0.0
        key = (weights, *options.values(), depth, whole and self.method.form == "matrices")
        if key not in self._calls:
            if self.compat and options.get("rescale") is True and self.method.name.startswith(("dare", "della")):
                options["rescale"] = "l1"
            try:
                self._calls[key] = make_call(self.method, weights, options, depth=depth, whole=whole)
            except UserError as error:
                self._calls[key] = error.problems
        return self._calls[key]


_entries = Scopes.entries


def _either(scopes: Scopes, alias: str, name: str, tensor: str, t: float, default: Any) -> Any:
    """An option by the name that recipes give it, or by its argument's."""
    value = scopes.resolve(alias, tensor, t, default)
    return scopes.resolve(name, tensor, t, default) if value is default and alias != name else value

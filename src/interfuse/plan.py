"""Recipe and headers in, a frozen plan out: every output tensor with its inputs and their numbers.

Pure: it reads no data and writes nothing. All that can be wrong with the user's request, save what only the data shows, is
found here and raised at once; running a plan is `interfuse.engine`'s part. Which tensors meet is `layout`'s.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from interfuse.checkpoints.numbers import FLOATS, STORED_FLOATS, float_named
from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.errors import CheckpointError, OptionError, Problem, UserError, nearest
from interfuse.layout import Group, Header, Slot, layout
from interfuse.methods.forms import Combination, Rule, normalized
from interfuse.recipe import Recipe
from interfuse.recipe.references import Reference
from interfuse.registry import Method, find

_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_SHOWN = 5  # tensors that a message lists of many
_COUNTER = "num_batches_tracked"
_TOO_LARGE = Problem("weights", "give coefficients too large to compute with", "use weights of ordinary size")
_COPY = Combination(0.0, (1.0,), 1.0)

#: How an output comes from its inputs: `merge` by its call; `same`, for integers, which must agree; `largest`, for
#: BatchNorm's count of batches.
How = Literal["merge", "same", "largest"]


class Input(NamedTuple):
    """A tensor that is read: which of the plan's sources, and its name there."""

    source: int
    name: str


@dataclass(frozen=True)
class Call:
    """A method with its numbers, shared by all tensors that have the same.

    `options` are by argument; one that has a value a model is a tuple. `made` is what the method gives without seeing a
    tensor: a `Combination` or a `Rule`; None says that the engine runs it for each tensor.
    """

    method: str
    form: str
    weights: tuple[float, ...]
    options: tuple[tuple[str, Any], ...]
    made: Combination | Rule | None

    def __str__(self) -> str:
        parts = [f"weight {_shown(self.weights)}"] if self.method != "copy" else []
        return ", ".join([self.method, *parts, *(f"{name.rstrip('_')} {_shown(value)}" for name, value in self.options)])


@dataclass(frozen=True)
class Output:
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


@dataclass(frozen=True)
class Plan:
    """A merge, decided. `str(plan)` is readable in full; `digest()` names it wherever the same models lie.

    `lead` is the source that config, tokenizer and other side files come from: the base, else the first model. `layers` has
    for each stack of the output where each layer comes from: a source and its layer there.
    """

    method: str
    sources: tuple[str, ...]
    lead: int
    outputs: tuple[Output, ...]
    layers: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    seed: int
    notes: tuple[str, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The output's header."""
        return {output.name: output.spec for output in self.outputs}

    def digest(self) -> str:
        """The SHA-256 of all that determines the result, in canonical JSON: not the models' paths, not the notes."""
        calls = list(dict.fromkeys(output.call for output in self.outputs))
        number = {call: i for i, call in enumerate(calls)}
        content = {
            "seed": self.seed,
            "calls": [call and [call.method, call.weights, call.options] for call in calls],
            "outputs": [[o.name, o.spec.dtype, o.spec.shape, o.how, number[o.call], o.base, o.inputs] for o in self.outputs],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"{self.method}, seed {self.seed}"]
        lines += [f"source {i}: {name}{' (lead)' if i == self.lead else ''}" for i, name in enumerate(self.sources)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *map(str, self.outputs)])


def plan_merge(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint], *, compat: bool = False) -> Plan:
    """Resolve a merge against its checkpoints' headers: one for each of `recipe.pieces.references(recipe)`.

    Everything wrong comes at once: a `CheckpointError` if a checkpoint is at fault, else an `OptionError`. `compat` follows
    mergekit where it differs (docs/mergekit.md).
    """
    method = find(recipe.merge_method or "", "weights", "merge_method")
    headers = {reference: Header(c.specs, config_of(c)) for reference, c in checkpoints.items()}
    found = layout(recipe, headers, compat=compat)
    planner = _Planner(method, checkpoints, recipe, compat)
    outputs = [output for slot in found.slots if (output := planner.output(slot))]
    wrong = list(dict.fromkeys(planner.wrong))
    if found.problems or planner.mismatches():
        raise CheckpointError(*found.problems, *planner.mismatches(), *wrong)
    if wrong:
        raise OptionError(*wrong)
    order = {reference: i for i, reference in enumerate(checkpoints)}
    first = found.slots[0].group if found.slots else None
    lead = order[first.base or first.sources[0]] if first else 0
    layers = tuple((head, tuple((order[r], i) for r, i in picks)) for head, picks in found.layers.items())
    notes = [*found.notes, *planner.notes(outputs)]
    return Plan(
        method.name, tuple(c.name for c in checkpoints.values()), lead, tuple(outputs), layers, recipe.seed, tuple(notes)
    )


def config_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The checkpoint's config.json, or None where there is none; one that isn't JSON is a `CheckpointError`."""
    path = checkpoint.folder / "config.json" if checkpoint.folder else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise CheckpointError(Problem(str(path), "isn't JSON", "get the file again")) from None
    return config if isinstance(config, dict) else None


def sees_base(method: Method) -> bool:
    """Whether the method works on differences from a base, or on a base and another; else a base is a model among others."""
    return "base" in method.needs or method.form != "coefficients" or (takes(method, "gram") and method.of == "deltas")


def takes(method: Method, what: str) -> bool:
    """Whether a method of coefficients asks for the `gram` matrix, or for a tensor's `depth`."""
    return what in inspect.signature(method.make).parameters


class _Planner:
    """Makes outputs of slots, sharing calls; gathers what is wrong. A class, for what all slots have in common."""

    def __init__(self, method: Method, checkpoints: Mapping[Reference, Checkpoint], recipe: Recipe, compat: bool):
        self.method, self.checkpoints, self.compat = method, checkpoints, compat
        self.order = {reference: i for i, reference in enumerate(checkpoints)}
        self.wrong: list[Problem] = []
        self.dtype = self._dtype(recipe)
        self.gram, self.depth = takes(method, "gram"), takes(method, "depth")
        self.based = sees_base(method)
        fields = method.options.model_fields
        self.fields = [(name, field.alias or name, name in method.each, field.default) for name, field in fields.items()]
        self._calls: dict[Any, Call | None] = {}
        self._models: dict[int, tuple[int, ...]] = {}
        self._differ: dict[str, list[Problem]] = {}

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
        group = slot.group
        reference = self._reference(slot)
        spec = reference[0]
        models = self._merged(group)
        inputs = tuple([Input(self.order[group.sources[i]], slot.names[i]) for i in models])
        base = (
            Input(self.order[group.base], slot.base) if group.base and slot.base and self.based and not group.copied else None
        )
        if not self._fits(slot, models, reference):
            return None
        if spec.dtype in _INTEGERS:
            how: How = "largest" if slot.name.endswith(_COUNTER) else "same"
            if base is None and group.base and slot.base and not group.copied:
                base = Input(self.order[group.base], slot.base)
            return Output(slot.name, spec, how, inputs, base)
        call = Call("copy", "coefficients", (1.0,), (), _COPY) if group.copied else self._call(slot, models, len(spec.shape))
        if call is None:
            return None
        return Output(slot.name, TensorSpec(self.dtype or reference[1], spec.shape), "merge", inputs, base, call)

    def _reference(self, slot: Slot) -> tuple[TensorSpec, str, str]:
        """The spec that an output follows, its declared type, and whose it is."""
        group = slot.group
        source = group.base if group.base and slot.base else group.sources[0]
        name = slot.base if group.base and slot.base else slot.names[0]
        checkpoint = self.checkpoints[source]
        spec = checkpoint.specs[name]
        return spec, checkpoint.declared.get(name, spec.dtype), checkpoint.name

    def _merged(self, group: Group) -> tuple[int, ...]:
        """Which of the sources are models: not the base, where the method sees it apart."""
        if id(group) not in self._models:
            apart = group.base_at if self.based and not group.copied else None
            self._models[id(group)] = tuple(i for i in range(len(group.sources)) if i != apart)
            if self.based and "base" in self.method.needs and group.base is None and not group.copied:
                self.wrong.append(Problem("base_model", "missing", f"{self.method.name} needs {self.method.needs}"))
        return self._models[id(group)]

    def _fits(self, slot: Slot, models: Sequence[int], reference: tuple[TensorSpec, str, str]) -> bool:
        """Whether all inputs have the reference's shape and kind of type; what differs is noted by model."""
        spec, _, whose = reference
        if spec.dtype not in STORED_FLOATS and spec.dtype not in _INTEGERS:
            wrong = f"tensor {slot.name!r} is {spec}"
            self._differ.setdefault(whose, []).append(Problem(whose, wrong, f"convert it to one of {', '.join(FLOATS)}"))
            return False
        good = True
        for i in models:
            checkpoint = self.checkpoints[slot.group.sources[i]]
            found = checkpoint.specs[slot.names[i]]
            if found is spec or found == spec:
                continue
            both = found.dtype in STORED_FLOATS and spec.dtype in STORED_FLOATS
            if found.shape != spec.shape or not both:
                problem = Problem(checkpoint.name, f"tensor {slot.names[i]!r} is {found}", f"{whose} has {spec}")
                self._differ.setdefault(checkpoint.name, []).append(problem)
                good = False
        return good

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

    def _call(self, slot: Slot, models: Sequence[int], axes: int) -> Call | None:
        """The method with this tensor's numbers; tensors with the same ones share it."""
        group, t = slot.group, slot.t
        scopes, names = group.scopes, slot.names
        weights = tuple([scopes[i].resolve("weight", names[i], t, 1.0) for i in models])
        shared = scopes[0] if len(scopes) == 1 else group.shared
        values: list[Any] = []
        for name, alias, each, default in self.fields:
            if each:
                values.append(tuple([_either(scopes[i], alias, name, names[i], t, default) for i in models]))
            else:
                values.append(_either(shared, alias, name, slot.name, t, default))
        depth = t if self.depth else 0.0
        whole = self.method.form == "matrices" and axes > 1
        key = (weights, *values, depth, whole)
        if key not in self._calls:
            options = {field[0]: value for field, value in zip(self.fields, values, strict=True)}
            self._calls[key] = self._make(weights, options, depth, whole)
        return self._calls[key]

    def _make(self, weights: tuple[float, ...], options: dict[str, Any], depth: float, whole: bool) -> Call | None:
        method = self.method
        if self.compat and options.get("rescale") is True:
            options = options | ({"rescale": "l1"} if method.name.startswith(("dare", "della")) else {})
        made: Combination | Rule | None = None
        try:
            if not weights:
                raise OptionError(Problem("models", "none besides the base", "give at least one model to merge into it"))
            if method.form == "rule":
                made = method.make(weights, **options)
            elif method.form == "matrices" and not whole:
                made = _mean(weights, options.get("lambda_", 1.0), based="base" in method.needs)
            elif method.form == "blocks":
                method.make(_Empty(len(weights)), weights, **options)
            elif method.form == "matrices":
                method.make(np.zeros((len(weights), 1, 1), np.float32), weights, **options)
            elif self.gram:
                method.make(weights, np.eye(len(weights) + (method.of == "models" and self.based)), **options)
            elif method.form == "coefficients":
                made = method.make(weights, *((depth,) if self.depth else ()), **options)
        except UserError as error:
            self.wrong += error.problems
            return None
        except OverflowError:
            self.wrong.append(_TOO_LARGE)
            return None
        if isinstance(made, Combination) and not all(map(_finite, (made.base, *made.models, made.total))):
            self.wrong.append(_TOO_LARGE)
        return Call(
            method.name, "coefficients" if isinstance(made, Combination) else method.form, weights, tuple(options.items()), made
        )


class _Empty(NamedTuple):
    """A tensor of no elements, by which a method of blocks shows what it has against weights and the number of models."""

    models: int
    shape: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _either(scopes: Any, alias: str, name: str, tensor: str, t: float, default: Any) -> Any:
    """An option by the name that recipes give it, or by its argument's."""
    value = scopes.resolve(alias, tensor, t, default)
    return scopes.resolve(name, tensor, t, default) if value is default and alias != name else value


def _mean(weights: Sequence[float], scale: float, *, based: bool) -> Combination:
    """What methods on matrices do with other tensors: the base plus the scaled mean delta."""
    shares = tuple(scale * share for share in normalized(weights)) if based else normalized(weights)
    return Combination(1.0 - math.fsum(shares) if based else 0.0, shares, 1.0)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

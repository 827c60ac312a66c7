"""Recipe and headers in, a frozen plan out: every output tensor with its inputs and their numbers.

Pure: it reads no data and writes nothing. All that can be wrong with the user's request, save what only the data shows, is
found here and raised at once; running a plan is `interfuse.engine`'s part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interfuse import registry
from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.errors import CheckpointError, OptionError, Problem, UserError, nearest
from interfuse.methods.forms import Combination

#: The types that are merged by arithmetic, by both of their names.
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
#: What data-parallel training, compilers and task heads put before the name of every tensor.
_WRAPPERS = ("module.", "model.", "_orig_mod.")
_SHOWN = 5  # names that a message lists of many
_COUNTER = "num_batches_tracked"
_TOO_LARGE = Problem("weights", "give coefficients too large to compute with", "use weights of ordinary size")

#: How an output comes from its inputs: `sum` by the method's coefficients; `same`, for integers, which must agree;
#: `largest`, for BatchNorm's count of batches.
Rule = Literal["sum", "same", "largest"]


@dataclass(frozen=True)
class Input:
    """A tensor that is read: `source` 0 is the base and 1, 2, ... are the models; `coefficient` is its share in a sum."""

    source: int
    name: str
    coefficient: float = 1.0

    def __str__(self) -> str:
        return f"{self.coefficient:.6g} {'base' if not self.source else f'models[{self.source - 1}]'}"


@dataclass(frozen=True)
class Output:
    """A tensor that is written. In a `sum`, `total` is what the coefficients sum to; inputs with none are left out."""

    name: str
    spec: TensorSpec
    rule: Rule
    inputs: tuple[Input, ...]
    total: float = 1.0

    def __str__(self) -> str:
        how = " + ".join(map(str, self.inputs)) or "0"
        return f"{self.name} {self.spec} = {how if self.rule == 'sum' else self.rule}"


@dataclass(frozen=True)
class Plan:
    """A merge, decided. `str(plan)` is readable in full; `digest()` names it wherever the same models lie."""

    method: str
    options: tuple[tuple[str, Any], ...]
    base: str | None
    models: tuple[str, ...]
    weights: tuple[float, ...]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The output's header."""
        return {output.name: output.spec for output in self.outputs}

    def digest(self) -> str:
        """The SHA-256 of all that determines the result, in canonical JSON: not the models' paths, not the notes."""
        outputs = [
            [o.name, o.spec.dtype, o.spec.shape, o.rule, o.total, [[i.source, i.name, i.coefficient] for i in o.inputs]]
            for o in self.outputs
        ]
        content = {"method": self.method, "options": self.options, "weights": self.weights, "outputs": outputs}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        lines = [f"{self.method}({options})", f"base: {self.base}"]
        lines += [
            f"models[{i}]: {name} weight={weight:.6g}"
            for i, (name, weight) in enumerate(zip(self.models, self.weights, strict=True))
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *map(str, self.outputs)])


def plan_merge(
    method: str,
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
) -> Plan:
    """Resolve a merge against its checkpoints' headers.

    `weights` has one finite number a model, 1 each where left out. `dtype` (`"bfloat16"`, ...) is the type of all
    floating-point outputs; left out, each has its type in the base, or else in the first model. Names, order and shapes
    are also that one's. A prefix (`module.`, `model.`, `_orig_mod.`) before all names of a checkpoint is resolved and
    noted. Integer and boolean tensors must agree, save BatchNorm's `num_batches_tracked`, of which the largest is taken.
    Everything wrong comes at once: a `CheckpointError` if a checkpoint is at fault, else an `OptionError`.
    """
    chosen: list[float] = [1.0] * len(checkpoints) if weights is None else list(weights)
    wrong = _check_weights(chosen, len(checkpoints))
    dtype, more = _dtype(dtype)
    wrong += more
    combination, checked, more = _combination(method, options or {}, chosen if not wrong else None, base)
    wrong += more

    sources = [base, *checkpoints]
    names, notes, faults = _match(sources)
    if wrong or faults or combination is None:
        raise (CheckpointError if faults else OptionError)(*wrong, *faults)
    reference = base or checkpoints[0]
    outputs = tuple(_output(name, spec, names, combination, dtype) for name, spec in reference.specs.items())
    return Plan(
        method,
        checked,
        base.name if base else None,
        tuple(checkpoint.name for checkpoint in checkpoints),
        tuple(map(float, chosen)),
        outputs,
        tuple(notes),
    )


def label(source: int, checkpoint: Checkpoint) -> str:
    """What to call a source in a message."""
    return f"base ({checkpoint.name})" if not source else f"models[{source - 1}] ({checkpoint.name})"


def _check_weights(weights: Sequence[Any], models: int) -> list[Problem]:
    if not models:
        return [Problem("models", "there are none", "give at least one")]
    if len(weights) != models:
        return [Problem("weights", f"{len(weights)} for {models} models", "give one a model")]
    return [
        Problem(f"weights[{i}]", f"got {weight!r}", "a finite number")
        for i, weight in enumerate(weights)
        if isinstance(weight, (bool, str)) or not _finite(weight)
    ]


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _dtype(dtype: str | None) -> tuple[str | None, list[Problem]]:
    if dtype is None:
        return None, []
    name = str(dtype).removeprefix("torch.")
    if name in FLOATS or name in FLOATS.values():
        return FLOATS.get(name, name), []
    return None, [Problem("dtype", f"got {name!r}", nearest(name, FLOATS))]


def _combination(
    name: str, options: Mapping[str, Any], weights: Sequence[float] | None, base: Checkpoint | None
) -> tuple[Combination | None, tuple[tuple[str, Any], ...], list[Problem]]:
    """The method's numbers, its options by the names a recipe gives them, and what is wrong."""
    try:
        method = registry.find(name, "weights")
    except UserError as error:
        return None, (), list(error.problems)
    wrong = []
    if "base" in method.needs and base is None:
        wrong.append(Problem("base", f"{name} needs one, and there is none", "give the models' common ancestor"))
    try:
        values = method.check(options)
        combination = method.make(tuple(map(float, weights)), **values) if weights is not None else None
    except UserError as error:
        return None, (), [*wrong, *error.problems]
    except OverflowError:
        return None, (), [*wrong, _TOO_LARGE]
    if combination and not all(map(_finite, (combination.base, *combination.models, combination.total))):
        wrong.append(_TOO_LARGE)
    fields = method.options.model_fields
    return combination, tuple((fields[key].alias or key, value) for key, value in values.items()), wrong


def _match(sources: Sequence[Checkpoint | None]) -> tuple[list[dict[str, str]], list[str], list[Problem]]:
    """For each source the name that each of the reference's tensors has there; notes; what doesn't fit."""
    present = [(source, checkpoint) for source, checkpoint in enumerate(sources) if checkpoint is not None]
    names: list[dict[str, str]] = [{} for _ in sources]
    if not present:
        return names, [], []
    first, reference = present[0]
    notes: list[str] = []
    problems: list[Problem] = []
    if not reference.specs:
        problems.append(Problem(label(first, reference), "holds no tensor", "give a checkpoint with weights"))
    for source, checkpoint in present:
        there, note = _names(reference, checkpoint)
        notes += [f"{label(source, checkpoint)}: {note}"] if note else []
        problems += _differences(reference, checkpoint, there, label(source, checkpoint), label(first, reference))
        names[source] = there
    for name, spec in reference.specs.items():
        if spec.dtype not in (*FLOATS.values(), *_INTEGERS):
            wrong = f"tensor {name!r} is {spec}"
            problems.append(Problem(label(first, reference), wrong, f"convert it to one of {', '.join(FLOATS)}"))
    if any(name.endswith("running_var") for name in reference.specs):
        notes.append("BatchNorm statistics are merged like weights; re-estimating them on data is usually better")
    return names, notes, problems


def _names(reference: Checkpoint, checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """The reference's name of each tensor -> its name in the checkpoint, once a constant prefix is resolved."""
    best, note = {name: name for name in checkpoint.specs}, ""
    if checkpoint.specs.keys() == reference.specs.keys():
        return {name: name for name in reference.specs}, ""
    for theirs, ours in _prefixes(reference.specs, checkpoint.specs):
        moved = {
            name if name in reference.specs else ours + name[len(theirs) :] if name.startswith(theirs) else name: name
            for name in checkpoint.specs
        }
        unique = len(moved) == len(checkpoint.specs)
        if unique and len(moved.keys() & reference.specs.keys()) > len(best.keys() & reference.specs.keys()):
            best, note = moved, _moved(theirs, ours)
    return best, note


def _moved(theirs: str, ours: str) -> str:
    if not ours:
        return f"the prefix {theirs!r} of its names is left out"
    if not theirs:
        return f"its names are read with the prefix {ours!r}"
    return f"the prefix {theirs!r} of its names is read as {ours!r}"


def _prefixes(reference: Mapping[str, TensorSpec], names: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """(theirs, ours) to try: wrappers round all names, then the prefix that most names have on one side alone."""
    votes: Counter[tuple[str, str]] = Counter()
    ours, theirs = _endings(reference), _endings(names)
    for name in names:
        votes.update(("", prefix) for prefix in ours.get(name, ()))
    for name in reference:
        votes.update((prefix, "") for prefix in theirs.get(name, ()))
    return [(_wrapper(names), _wrapper(reference)), *(pair for pair, _ in votes.most_common(1))]


def _endings(names: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """What names end in, from a dot on -> the prefixes before it."""
    found: dict[str, list[str]] = {}
    for name in names:
        for dot in (i for i, letter in enumerate(name) if letter == "."):
            found.setdefault(name[dot + 1 :], []).append(name[: dot + 1])
    return found


def _wrapper(names: Mapping[str, TensorSpec]) -> str:
    """The longest run of wrappers that every name begins with."""
    prefix = ""
    while True:
        for wrapper in _WRAPPERS:
            if names and all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            return prefix


def _differences(
    reference: Checkpoint, checkpoint: Checkpoint, names: Mapping[str, str], path: str, against: str
) -> list[Problem]:
    one = "give models of one architecture"
    problems = []
    for name, there in names.items():
        spec, found = reference.specs.get(name), checkpoint.specs[there]
        both_float = spec is not None and found.dtype in FLOATS.values() and spec.dtype in FLOATS.values()
        if spec is not None and (found.shape != spec.shape or (found.dtype != spec.dtype and not both_float)):
            problems.append(Problem(path, f"tensor {there!r} is {found}", f"{against} has {spec}"))
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [Problem(path, f"{len(problems) - _SHOWN} more tensors differ in shape or type", one)]
    missing = [name for name in reference.specs if name not in names]
    extra = [there for name, there in names.items() if name not in reference.specs]
    problems += [Problem(path, wrong, f"unlike {against}: {one}") for wrong in _listed(missing, "missing")]
    return problems + [Problem(path, wrong, f"{against} has none: {one}") for wrong in _listed(extra, "extra")]


def _listed(names: Sequence[str], what: str) -> list[str]:
    """One line a tensor, or one line for all of many."""
    if len(names) <= _SHOWN:
        return [f"tensor {name!r} is {what}" for name in names]
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return [f"{len(names)} tensors are {what}: {shown} and {len(names) - _SHOWN} more"]


def _output(
    name: str, spec: TensorSpec, names: Sequence[Mapping[str, str]], combination: Combination, dtype: str | None
) -> Output:
    if spec.dtype in _INTEGERS:
        rule: Rule = "largest" if name.endswith(_COUNTER) else "same"
        inputs = tuple(Input(source, there[name]) for source, there in enumerate(names) if there)
        return Output(name, spec, rule, inputs)
    inputs = tuple(
        Input(source, names[source][name], coefficient)
        for source, coefficient in enumerate((combination.base, *combination.models))
        if coefficient != 0
    )
    return Output(name, TensorSpec(dtype or spec.dtype, spec.shape), "sum", inputs, combination.total)

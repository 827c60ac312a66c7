"""What every way of merging weights promises: for a registered method of the level weights, yours too.

Each check merges small tensors through `interfuse.merge`, as a user does, and raises an `AssertionError` that says what
doesn't hold. What a method needs, has a chance in or takes as options is read off its registration; the rest is claimed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interfuse.checkpoints.tensors import to_array, to_tensor
from interfuse.engine.merge import merge
from interfuse.errors import UserError
from interfuse.methods.forms import Block, Rule
from interfuse.registry import Method, find

Tensors = dict[str, np.ndarray]

#: Form -> what a method of it is given, before its options.
GIVEN = {
    "coefficients": (["weights"], ["weights", "gram"], ["weights", "depth"]),
    "rule": (["weights"],),
    "blocks": (["tensor", "weights"],),
    "matrices": (["deltas", "weights"],),
}
#: Matrices, a vector, a convolution; some rows are longer than others are many.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.weight": (6, 5), "layers.0.bias": (6,), "layers.1.weight": (4, 9), "conv.weight": (4, 3, 2, 2),
}  # fmt: skip
#: A number, one element, one row, one column, nothing.
EDGES: dict[str, tuple[int, ...]] = {"zero": (), "one": (1,), "row": (1, 7), "column": (7, 1), "none": (0,), "no_rows": (0, 3)}


@dataclass(frozen=True)
class WeightClaims:
    """What a method's documentation says of it, where methods differ.

    options: with which it is run, one value for all models. equal: equal models give that model, by weights of 1 or by
    weights that sum to 1. symmetric: the order of the models doesn't matter. unit: if all weights are twice as large the
    result is, too; `in_unit` are the options that are doubled with them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    equal: bool = True
    symmetric: bool = True
    unit: bool = True
    in_unit: tuple[str, ...] = ()


WeightCheck = Callable[[str, WeightClaims], None]


def check_weight_method(name: str, claims: WeightClaims | None = None) -> None:
    """Run every check of `WEIGHT_CHECKS` on the method registered as `name` at the level weights."""
    for check in WEIGHT_CHECKS:
        check(name, claims or WeightClaims())


def some_tensors(
    models: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, seed: int = 1, dtype: Any = np.float32
) -> tuple[Tensors, list[Tensors]]:
    """A base and models of float tensors, small fractions that every type holds exactly; some deltas are equal or 0."""
    random = np.random.default_rng(seed)
    base = {name: np.array(random.integers(-64, 65, shape) / 64, dtype) for name, shape in shapes.items()}
    drawn = [{name: random.integers(-8, 9, shape) / 32 for name, shape in shapes.items()} for _ in range(models)]
    return base, [{name: np.array(base[name] + delta[name], dtype) for name in shapes} for delta in drawn]


def models_of(name: str, claims: WeightClaims) -> int:
    """With how many models the method is tried: 3, or the next fewer that it takes."""
    for count in (3, 2):
        base, models = some_tensors(count)
        try:
            merged(name, claims, models, base)
        except UserError:
            continue
        return count
    return 1


def merged(name: str, claims: WeightClaims, models: Sequence[Any], base: Any, **more: Any) -> dict[str, Any]:
    """The merge with the claimed options; `base` is left out where the method doesn't ask for one."""
    based = {"base": base} if "base" in find(name, "weights").needs else {}
    result: dict[str, Any] = merge(name, list(models), **based, **{**claims.options, **more})
    return result


def check_registration(name: str, claims: WeightClaims) -> None:
    """The function has the signature of its form, a docstring, a paper, and a description for each option."""
    method = find(name, "weights")
    assert method.form in GIVEN, f"the form is {method.form!r}, not one of {', '.join(GIVEN)}"
    parameters = inspect.signature(method.make).parameters.values()
    given = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert given in GIVEN[method.form], f"{method.form}: the function is given {given}, not one of {GIVEN[method.form]}"
    assert method.summary, "no docstring"
    assert method.paper.startswith("https://"), f"the paper is {method.paper!r}, not an address"
    silent = [key for key, about in _schema(method).items() if not about.get("description")]
    assert not silent, f"options without a description: {', '.join(silent)}"


def check_equal_models(name: str, claims: WeightClaims) -> None:
    """Equal models give that model, by weights of 1 or by weights that sum to 1; models equal to the base give the base."""
    count, based = models_of(name, claims), "base" in find(name, "weights").needs
    base, (model, *_) = some_tensors(count)
    same = merged(name, claims, [base] * count, base)
    if based:
        assert _bytes(same) == _bytes(base), "models that are the base don't give the base"
    if not claims.equal:
        return
    count = min(count, 2)
    tried = [merged(name, claims, [model] * count, base, weights=[w] * count) for w in (1.0, 1 / count)]
    far = [max(float(abs(got[key] - model[key]).max()) for key in model) for got in tried]
    assert min(far) < 1e-5, f"equal models give another: {far[0]:g} off by weights of 1, {far[1]:g} by weights of {1 / count:g}"


def check_order(name: str, claims: WeightClaims) -> None:
    """The order of models, with their weights, doesn't matter, where that is claimed and chance plays no part."""
    count = models_of(name, claims)
    if not claims.symmetric or count == 1 or _by_chance(name, claims):
        return
    base, models = some_tensors(count)
    weights = [0.5, 0.25, 0.75][:count]
    try:
        straight = merged(name, claims, models, base, weights=weights)
    except UserError:  # it takes equal weights alone
        weights = [1.0] * count
        straight = merged(name, claims, models, base, weights=weights)
    turned = merged(name, claims, models[::-1], base, weights=weights[::-1])
    _near(turned, straight, "the models in another order give another result", 1e-5)


def check_unit(name: str, claims: WeightClaims) -> None:
    """Weights that are 8 times as large give a result that is, where that is claimed; no absolute threshold."""
    if not claims.unit:
        return
    base, models = some_tensors(models_of(name, claims))
    once = merged(name, claims, models, base)
    larger = [{key: 8 * value for key, value in tensors.items()} for tensors in (base, *models)]
    scaled = {key: 8.0 * claims.options[key] for key in claims.in_unit}
    _near(
        merged(name, claims, larger[1:], larger[0], **scaled),
        {key: 8 * value for key, value in once.items()},
        "in another unit the result is another",
        1e-5,
    )


def check_types(name: str, claims: WeightClaims) -> None:
    """The result has the inputs' type; float64 is near float32; bfloat16 and float16 are float32's result, rounded once."""
    count = models_of(name, claims)
    base, models = some_tensors(count)
    plain = merged(name, claims, models, base)
    wide = merged(name, claims, *_as(np.float64, models, base))
    assert {value.dtype for value in wide.values()} == {np.dtype(np.float64)}, "float64 in, another type out"
    _near(wide, plain, "float64 and float32 give different results", 1e-5)
    for dtype, places, least in (("F16", 10, -24), ("BF16", 7, -133)):
        stored = [{key: _stored(value, dtype) for key, value in tensors.items()} for tensors in (base, *models)]
        for key, tensor in merged(name, claims, stored[1:], stored[0]).items():
            assert tensor.dtype == stored[0][key].dtype, f"{dtype} in, {tensor.dtype} out"
            got = np.asarray(tensor.double().numpy())
            step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(abs(got), 1e-300))) - places, least)
            wrong = abs(got - plain[key]) > 0.501 * step + abs(plain[key]) * 1e-6
            assert not wrong.any(), f"{dtype}: {int(wrong.sum())} entries of {key} aren't the nearest to float32's"


def check_threads(name: str, claims: WeightClaims) -> None:
    """The same bytes from 1, 2 and 3 threads, and from call to call."""
    base, models = some_tensors(models_of(name, claims))
    found = [_bytes(merged(name, claims, models, base, threads=threads)) for threads in (1, 2, 3, 1)]
    assert all(one == found[0] for one in found), "the bytes depend on the threads"


def check_blocks(name: str, claims: WeightClaims) -> None:
    """A method of blocks gives its blocks' type, and the same bytes however a tensor is cut; others' the engine cuts."""
    method = find(name, "weights")
    if method.form != "blocks":
        return
    count = models_of(name, claims)
    for kind in (np.float32, np.float64):
        base, models = some_tensors(count, {"a": (30, 20), "b": (600,), "c": (3, 4, 50)}, dtype=kind)
        for key, first in base.items():
            deltas = np.stack([model[key] - first for model in models])
            results = []
            for length in (1000, 256, 97, 20, 7, 1):
                tensor = InBlocks(first, deltas, length)
                run = method.make(tensor, (1.0,) * count, **_arguments(method, claims, count))
                results.append(np.concatenate([run(block) for block in tensor]))
                assert results[-1].dtype == kind, f"a block of {np.dtype(kind)} gives {results[-1].dtype}"
                assert results[-1].tobytes() == results[0].tobytes(), f"blocks of {length} give other bytes than whole tensors"


def check_edges(name: str, claims: WeightClaims) -> None:
    """Shapes at the edge keep their shape and are finite: no elements, one, one row, one column; zeros too."""
    count = models_of(name, claims)
    base, models = some_tensors(count, EDGES)
    nothing = {key: np.zeros_like(value) for key, value in base.items()}
    for what, given in (("", (base, models)), (" of zeros", (nothing, [nothing] * count)), (" and no base", (nothing, models))):
        for key, value in merged(name, claims, given[1], given[0]).items():
            assert value.shape == EDGES[key], f"{key!r}{what}: shape {EDGES[key]} in, {value.shape} out"
            assert np.isfinite(value).all(), f"{key!r}{what}: NaN or infinite"


def check_finite(name: str, claims: WeightClaims) -> None:
    """Finite inputs give finite results, though they are tiny, huge, or of zero norm in one model alone."""
    count = models_of(name, claims)
    base, models = some_tensors(count)
    for size in (1e-42, 1e-20, 1e15):
        small = [{key: (size * value).astype(np.float32) for key, value in tensors.items()} for tensors in (base, *models)]
        result = merged(name, claims, small[1:], small[0])
        wrong = [key for key, value in result.items() if not np.isfinite(value).all()]
        assert not wrong, f"weights of size {size:g}: NaN or infinite in {', '.join(wrong)}"
    first = {key: np.zeros_like(value) for key, value in base.items()}
    for alike in (base, first):
        result = merged(name, claims, [alike, *models[1:]], base)
        assert all(np.isfinite(value).all() for value in result.values()), "a model of zero norm gives NaN or infinity"


def check_inputs(name: str, claims: WeightClaims) -> None:
    """Inputs stay as they are, and integers and booleans that all models share come through."""
    base, models = some_tensors(models_of(name, claims))
    whole = {"steps": np.arange(3), "mask": np.array([True, False]), "num_batches_tracked": np.array(7)}
    given = [tensors | {key: value.copy() for key, value in whole.items()} for tensors in (base, *models)]
    before = [_bytes(tensors) for tensors in given]
    result = merged(name, claims, given[1:], given[0])
    assert [_bytes(tensors) for tensors in given] == before, "the inputs have changed"
    for key, value in whole.items():
        assert result[key].dtype == value.dtype, f"{key!r}: {value.dtype} in, {result[key].dtype} out"
        assert (result[key] == value).all(), f"{key!r}: {result[key].tolist()}, not {value.tolist()}"


def check_options(name: str, claims: WeightClaims) -> None:
    """A `UserError` names each option that is unknown, missing, of another type, out of range or NaN."""
    method = find(name, "weights")
    base, models = some_tensors(models_of(name, claims))
    _refused("no_such_option", lambda: merged(name, claims, models, base, no_such_option=1))
    required = [key for key, about in method.options.model_fields.items() if about.is_required()]
    for key in required:
        less = WeightClaims({k: v for k, v in claims.options.items() if k not in (key, key.rstrip("_"))})
        _refused(key.rstrip("_"), lambda less=less: merged(name, less, models, base))  # type: ignore[misc]
    for key, about in _schema(method).items():
        for value in _out_of_range(about):
            _refused(key, lambda option={key: value}: merged(name, claims, models, base, **option))  # type: ignore[misc]


def check_base(name: str, claims: WeightClaims) -> None:
    """A base that is needed and missing is a `UserError` that says so."""
    _, models = some_tensors(models_of(name, claims))
    if "base" in find(name, "weights").needs:
        _refused("base", lambda: merge(name, models, **claims.options))


def check_seeds(name: str, claims: WeightClaims) -> None:
    """The seed changes the result of a rule that trims by chance, may where the method has a seed, and else doesn't."""
    method = find(name, "weights")
    random, chance = _by_chance(name, claims), False
    if method.form == "rule":
        count = models_of(name, claims)
        rule = method.make((1.0,) * count, **_arguments(method, claims, count))
        assert isinstance(rule, Rule), f"a rule's function gives a {type(rule).__name__}"
        chance = rule.trim.how in ("random", "ranked") and any(0 < density < 1 for density in rule.trim.density)
    assert random or not chance, "a rule that trims by chance gives the same with every seed"
    assert chance or "seed" in method.options.model_fields or not random, "the seed changes a method that has no chance"


#: Every promise, in the order they are checked.
WEIGHT_CHECKS: tuple[WeightCheck, ...] = (
    check_registration,
    check_equal_models,
    check_order,
    check_unit,
    check_types,
    check_threads,
    check_blocks,
    check_edges,
    check_finite,
    check_inputs,
    check_options,
    check_base,
    check_seeds,
)


class InBlocks:
    """A tensor in memory as methods of blocks see one, at most `length` elements at a time: whole rows where a row fits.

    A block is valid until the next one, as in a merge: what is kept of it turns to NaN.
    """

    def __init__(self, base: np.ndarray, deltas: np.ndarray, length: int) -> None:
        self.shape, self.models = base.shape, len(deltas)
        row = max(base.shape[-1] if base.ndim else 1, 1)
        self._length = length // row * row if length >= row else length
        self._base, self._deltas = base.reshape(-1), deltas.reshape(len(deltas), -1)

    def __iter__(self) -> Iterator[Block]:
        """Every block in order."""
        for start in range(0, self._base.size, self._length):
            part = slice(start, start + self._length)
            base, deltas = self._base[part].copy(), self._deltas[:, part].copy()
            yield Block(start, base, deltas)
            base[:], deltas[:] = np.nan, np.nan


def _arguments(method: Method, claims: WeightClaims, count: int) -> dict[str, Any]:
    """The options as the method's function is given them: one value a model where it has one."""
    options = method.check(claims.options)
    return {key: (value,) * count if key in method.each else value for key, value in options.items()}


def _by_chance(name: str, claims: WeightClaims) -> bool:
    """Whether another seed gives another result."""
    base, models = some_tensors(models_of(name, claims))
    return len(dict.fromkeys(_bytes(merged(name, claims, models, base, seed=seed)) for seed in (0, 1, 2))) > 1


def _schema(method: Method) -> dict[str, Any]:
    """What the options allow, by the names that recipes give them, as JSON Schema."""
    properties: dict[str, Any] = method.options.model_json_schema().get("properties", {})
    return properties


def _out_of_range(about: Mapping[str, Any]) -> list[Any]:
    """Values that an option doesn't allow, by its schema: beside its bounds, of another type, not a number."""
    parts = about.get("anyOf", [about])
    numbers = [part for part in parts if part.get("type") in ("number", "integer")]
    values: list[Any] = ["no such value"]
    for part in numbers:
        whole = part["type"] == "integer"
        values += [] if whole else [math.nan]
        values += [part["minimum"] - 1] if "minimum" in part else []
        values += [part["maximum"] + 1] if "maximum" in part else []
        values += [part["exclusiveMinimum"]] if "exclusiveMinimum" in part else []
        values += [part["exclusiveMaximum"]] if "exclusiveMaximum" in part else []
    return values if numbers or not any(part.get("type") == "string" and "enum" not in part for part in parts) else []


def _stored(array: np.ndarray, dtype: str) -> Any:
    """The array as a torch tensor of another type."""
    tensor = to_tensor(array, "F32")
    return tensor.half() if dtype == "F16" else tensor.bfloat16()


def _as(dtype: Any, models: Sequence[Tensors], base: Tensors) -> tuple[list[Tensors], Tensors]:
    changed = [{key: value.astype(dtype) for key, value in tensors.items()} for tensors in (*models, base)]
    return changed[:-1], changed[-1]


def _bytes(tensors: Mapping[str, Any]) -> bytes:
    return b"".join(np.ascontiguousarray(v if isinstance(v, np.ndarray) else to_array(v)).tobytes() for v in tensors.values())


def _near(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], wrong: str, share: float) -> None:
    """Equal to a share of the largest value of each tensor."""
    for key, value in expected.items():
        far = float(abs(got[key].astype(np.float64) - value).max())
        assert far <= share * max(float(abs(value).max()), 1e-30), f"{wrong}: {key} is {far:g} off"


def _refused(named: str, run: Callable[[], Any]) -> None:
    said = "nothing"
    try:
        run()
    except UserError as error:
        said = str(error)
    assert named in said, f"the error says {said!r}, and doesn't name {named!r}"

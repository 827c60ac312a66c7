"""A model with a LoRA adapter, as a checkpoint: W + s B A is computed for the elements that are read, when they are read.

No merged model is written and no whole tensor formed; what that costs is a second read of the tensors that DoRA scales,
for their norms. Not a reader of adapters (`adapters`), nor a way to merge them with each other. Sources: LoRA 2106.09685;
DoRA 2402.09353, where the norm is that of each output's weights, in embeddings of each column, as in peft.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from interfuse.checkpoints.adapters.pairs import Adapter, Pair
from interfuse.checkpoints.adapters.pairs import open_adapter as open_adapter
from interfuse.checkpoints.names import align
from interfuse.checkpoints.numbers import STORED_FLOATS, widen
from interfuse.checkpoints.places import Place
from interfuse.checkpoints.source import BLOCK, Checkpoint, TensorSpec
from interfuse.checkpoints.tokenizers.embedding import is_vocabulary
from interfuse.errors import CheckpointError, Problem

#: Widened factors that are kept for the next block; a model has one pair for each of its tensors.
_KEPT = 8


def with_adapter(checkpoint: Checkpoint, adapter: Adapter, scale: float = 1.0) -> Checkpoint:
    """The model W + scale (W' - W), where W' is the model with the adapter: `scale` 0 is the model as it was.

    Changed tensors are F32 (F64 where the model's are), and the result's `declared` has the types that they had. Tensors
    that the adapter saves whole come as it stores them; embeddings and heads may have other rows there, if all have. What
    it saves for a head that is tied to the model's embedding is the embedding once more, and left out. Everything
    of the adapter that has no tensor in the model, or another shape, is a `CheckpointError`; names may differ in what stands
    before them.
    """
    fitted = _Fitted(checkpoint, adapter, scale)
    fitted.replace_whole()
    fitted.add_pairs()
    if fitted.problems:
        raise CheckpointError(*fitted.problems)
    changed = {name: checkpoint.declared.get(name, checkpoint.specs[name].dtype) for name in fitted.places}
    return replace(
        checkpoint,
        name=f"{checkpoint.name}+{adapter.name}",
        specs={name: fitted.specs.get(name, spec) for name, spec in checkpoint.specs.items()},
        places={**checkpoint.places, **fitted.places},
        declared={**checkpoint.declared, **changed},
        within=(checkpoint, adapter.weights),
    )


def orientations(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, bool], list[str]]:
    """Whether each two-dimensional weight is stored `[in, out]`, and the modules of which that can't be known.

    `shapes` has the models' shapes by module. One that isn't square shows it. A square one lies as the others of its
    kind (the last part of its name) do, else as all others do, else as the config says.
    """
    votes: dict[str, set[bool]] = {}
    result: dict[str, bool] = {}
    square = []
    for module, shape in shapes.items():
        pair = adapter.pairs[module]
        product = (adapter.weights.specs[pair.up].shape[0], adapter.weights.specs[pair.down].shape[1])
        if shape == product == product[::-1]:
            square.append(module)
        else:
            result[module] = shape != product
            for group in (module.rpartition(".")[2], ""):
                votes.setdefault(group, set()).add(result[module])
    unknown = []
    for module in square:
        seen = votes.get(module.rpartition(".")[2]) or votes.get("") or {bool(adapter.config.get("fan_in_fan_out"))}
        if len(seen) > 1:
            unknown.append(module)
        result[module] = min(seen)
    return result, unknown


class _Fitted:
    """A model's changed specs and places as they are found, with all that doesn't fit.

    A class, because both steps add to the same places and problems.
    """

    def __init__(self, model: Checkpoint, adapter: Adapter, scale: float):
        self.model, self.adapter, self.scale = model, adapter, scale
        self.specs: dict[str, TensorSpec] = {}
        self.places: dict[str, Place] = {}
        self.problems: list[Problem] = []
        weights = {f"{module}.weight" for module in adapter.pairs}
        biases = {f"{pair.module}.bias" for pair in adapter.pairs.values() if pair.bias}
        wanted = sorted({*weights, *biases, *adapter.whole})
        self.names = align(wanted, model.specs, adapter.name)

    def replace_whole(self) -> None:
        """Put the tensors that are saved whole in the model's places."""
        resized: dict[str, str] = {}
        for target, key in self.adapter.whole.items():
            stored = self.adapter.weights.specs[key]
            name = None if self._is_tied(target, key) else self._find(target, key)
            if name is None:
                continue
            spec = self.model.specs[name]
            if is_vocabulary(name) and self.scale == 1 and stored.shape[1:] == spec.shape[1:] and stored.shape != spec.shape:
                resized[name] = key
            elif stored.shape != spec.shape or (stored.dtype in STORED_FLOATS) != (spec.dtype in STORED_FLOATS):
                allowed = "give the adapter's own base" + (", resized to its vocabulary" if len(spec.shape) == 2 else "")
                self._wrong(f"{key!r} is {stored}, the model's {name!r} is {spec}", allowed)
                continue
            self.specs[name], self.places[name] = stored, self.adapter.weights.places[key]
            if self.scale != 1 and spec.dtype in STORED_FLOATS:
                self._blend(name)
            elif self.scale != 1 and stored != spec:
                self._wrong(f"{key!r} is {stored}, which can't be scaled by {self.scale}", "scale 1")
        self._check_resized(resized)

    def _check_resized(self, resized: dict[str, str]) -> None:
        """A vocabulary has as many rows in all tensors that it had as many in."""
        before = [self.model.specs[name].shape[:1] for name in resized]
        rows = {self.specs[name].shape[0]: name for name in resized}
        for name, spec in self.model.specs.items():
            if resized and is_vocabulary(name) and spec.shape[:1] in before and self._spec(name).shape[0] != max(rows):
                wrong = f"{resized[rows[max(rows)]]!r} has {max(rows)} rows, and {name!r} {self._spec(name).shape[0]}"
                self._wrong(wrong, "save all embeddings and heads in one size")

    def _is_tied(self, target: str, key: str) -> bool:
        """Whether what is saved for a head that the model hasn't is what is saved for its embedding."""
        if target in self.names or not is_vocabulary(target) or not target.endswith(".weight"):
            return False
        weights = self.adapter.weights
        others = [other for name, other in self.adapter.whole.items() if name in self.names and is_vocabulary(name)]
        alike = [other for other in others if weights.specs[other] == weights.specs[key]]
        return any(np.array_equal(weights.read(other).view(np.uint8), weights.read(key).view(np.uint8)) for other in alike)

    def add_pairs(self) -> None:
        """Put W + s B A in the place of each weight that has factors, and add to the biases that have something added."""
        named = {pair.module: self._find(f"{pair.module}.weight", pair.down) for pair in self.adapter.pairs.values()}
        flat = {
            module: self._spec(name).shape
            for module, name in named.items()
            if name is not None and self.adapter.pairs[module].kind == "matrix" and len(self._spec(name).shape) == 2
        }
        turned, unknown = orientations(self.adapter, flat)
        for module in unknown:
            allowed = "adapt weights that are stored one way"
            self._wrong(f"{module!r} is square, and others like it are stored both [in, out] and [out, in]", allowed)

        @functools.lru_cache(maxsize=_KEPT)
        def kept(key: str, turn: bool, kind: type) -> np.ndarray:
            return _factor(self.adapter, key, turn, kind)

        for module, name in named.items():
            if name is not None:
                self._add_pair(self.adapter.pairs[module], name, turned.get(module, False), kept)

    def _add_pair(self, pair: Pair, name: str, turned: bool, kept: Callable[[str, bool, type], np.ndarray]) -> None:
        weights, spec = self.adapter.weights.specs, self._spec(name)
        down, up = weights[pair.down].shape, weights[pair.up].shape
        product = (up[0], *down[1:])
        turned = turned or pair.kind == "embedding"
        if spec.shape != (product[::-1] if turned else product):
            self._wrong(
                f"{pair.up!r} {up} times {pair.down!r} {down} doesn't fit the model's {name!r}, {spec}", "give its base"
            )
            return
        if spec.dtype not in STORED_FLOATS:
            self._wrong(f"the model's {name!r} is {spec}", f"an adapter is added to {', '.join(STORED_FLOATS)}")
            return
        kind = np.float64 if spec.dtype == "F64" else np.float32
        alone = pair.magnitude is None and name not in self.places
        left, right = (pair.down, pair.up) if turned else (pair.up, pair.down)
        self.places[name] = _LowRank(
            below=self._place(name),
            dtype=self._spec(name).dtype,
            left=_Rows(self.adapter, left, turned, kind, pair.scale * (self.scale if alone else 1)),
            right=functools.partial(kept, right, turned, kind),
            kind=kind,
            shape=(spec.shape[0], spec.count // spec.shape[0]),
            magnitude=None if pair.magnitude is None else _flat(self.adapter, pair.magnitude),
            by_row=not turned,
        )
        self.specs[name] = TensorSpec("F64" if kind is np.float64 else "F32", spec.shape)
        if not alone and self.scale != 1:
            self._blend(name)
        if pair.bias is not None:
            self._add_bias(pair, pair.bias)

    def _add_bias(self, pair: Pair, key: str) -> None:
        name = self._find(f"{pair.module}.bias", key)
        if name is None:
            return
        spec = self.model.specs[name]
        if spec.dtype not in STORED_FLOATS or spec.shape != self.adapter.weights.specs[key].shape:
            self._wrong(f"{key!r} is {self.adapter.weights.specs[key]}, the model's {name!r} is {spec}", "give its base")
            return
        kind = np.float64 if spec.dtype == "F64" else np.float32
        added = (_flat(self.adapter, key) * (pair.scale * self.scale)).astype(kind)
        self.places[name] = _Sum(self._place(name), self._spec(name).dtype, added)
        self.specs[name] = TensorSpec("F64" if kind is np.float64 else "F32", spec.shape)

    def _find(self, target: str, key: str) -> str | None:
        if target not in self.names:
            self._wrong(f"{key!r} changes {target!r}, which the model doesn't have", "give the adapter's own base")
        return self.names.get(target)

    def _wrong(self, wrong: str, allowed: str) -> None:
        self.problems.append(Problem(f"{self.model.name}+{self.adapter.name}", wrong, allowed))

    def _spec(self, name: str) -> TensorSpec:
        return self.specs.get(name, self.model.specs[name])

    def _place(self, name: str) -> Place:
        return self.places.get(name, self.model.places[name])

    def _blend(self, name: str) -> None:
        """Go only `scale` of the way from the model's tensor to the one that is in its place."""
        before, after = self.model.specs[name].dtype, self.specs[name].dtype
        kind = np.float64 if "F64" in (before, after) else np.float32
        self.places[name] = _Blend(self.model.places[name], before, self.places[name], after, kind, self.scale)
        self.specs[name] = TensorSpec("F64" if kind is np.float64 else "F32", self.model.specs[name].shape)


def _widened(raw: np.ndarray, dtype: str, kind: type) -> np.ndarray:
    out: np.ndarray = np.empty(raw.shape, kind)
    widen(raw, dtype, out)
    return out


def _factor(adapter: Adapter, key: str, turned: bool, kind: type) -> np.ndarray:
    """A whole factor as a matrix: A `[r, inputs]` or B `[outputs, r]`, or transposed where the product is."""
    spec = adapter.weights.specs[key]
    matrix = _widened(adapter.weights.read(key), spec.dtype, kind).reshape(spec.shape[0], -1)
    return np.ascontiguousarray(matrix.T if turned else matrix)


def _flat(adapter: Adapter, key: str) -> np.ndarray:
    return _widened(adapter.weights.read(key).reshape(-1), adapter.weights.specs[key].dtype, np.float64)


@dataclass(frozen=True)
class _Rows:
    """Rows of a product's left factor, widened and scaled when they are asked for."""

    adapter: Adapter
    key: str
    turned: bool
    kind: Any
    scale: float

    def __call__(self, start: int, stop: int) -> np.ndarray:
        spec = self.adapter.weights.specs[self.key]
        raw = self.adapter.weights.read(self.key).reshape(spec.shape[0], -1)
        rows = np.ascontiguousarray(raw[:, start:stop].T if self.turned else raw[start:stop])
        return (_widened(rows, spec.dtype, np.float64) * self.scale).astype(self.kind)


@dataclass(frozen=True, eq=False)
class _LowRank:
    """W + B A, for W as `[rows, columns]`; with a magnitude, each row or column is given that norm."""

    below: Place
    dtype: str
    left: _Rows
    right: Callable[[], np.ndarray]
    kind: Any
    shape: tuple[int, int]
    magnitude: np.ndarray | None
    by_row: bool
    _norms: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def block(self, start: int, stop: int) -> np.ndarray:
        out = self._sum(start, stop)
        if self.magnitude is not None:
            at = np.arange(start, stop)
            out *= self._factors()[at // self.shape[1] if self.by_row else at % self.shape[1]]
        return out

    def _sum(self, start: int, stop: int) -> np.ndarray:
        from interfuse.checkpoints.adapters.lowrank import add_product  # Numba takes a third of a second to import

        out = _widened(self.below.block(start, stop), self.dtype, self.kind)
        first = start // self.shape[1]
        rows = self.left(first, -(-stop // self.shape[1]))
        add_product(out, start - first * self.shape[1], rows, self.right())
        return out

    def _factors(self) -> np.ndarray:
        """What each row or column is multiplied by; found once, in a pass of its own over the tensor."""
        with self._lock:
            if not self._norms:
                squares = np.zeros(self.shape[0] if self.by_row else self.shape[1])
                step = max(1, BLOCK // self.shape[1])
                for row in range(0, self.shape[0], step):
                    end = min(row + step, self.shape[0])
                    part = self._sum(row * self.shape[1], end * self.shape[1]).reshape(end - row, -1)
                    square = np.square(part, dtype=np.float64)
                    if self.by_row:
                        squares[row:end] = square.sum(1)
                    else:
                        squares += square.sum(0)
                with np.errstate(divide="ignore", invalid="ignore"):  # as in peft, a row of zeros isn't a number then
                    self._norms.append((self.magnitude / np.sqrt(squares)).astype(self.kind))
        return self._norms[0]


@dataclass(frozen=True, eq=False)
class _Sum:
    """A small tensor plus another."""

    below: Place
    dtype: str
    added: np.ndarray

    def block(self, start: int, stop: int) -> np.ndarray:
        return _widened(self.below.block(start, stop), self.dtype, self.added.dtype.type) + self.added[start:stop]


@dataclass(frozen=True, eq=False)
class _Blend:
    """before + scale (after - before)."""

    before: Place
    before_dtype: str
    after: Place
    after_dtype: str
    kind: Any
    scale: float

    def block(self, start: int, stop: int) -> np.ndarray:
        before = _widened(self.before.block(start, stop), self.before_dtype, self.kind)
        out = _widened(self.after.block(start, stop), self.after_dtype, self.kind)
        out -= before
        out *= self.kind(self.scale)
        out += before
        return out

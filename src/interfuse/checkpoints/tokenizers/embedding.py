"""A checkpoint seen through another vocabulary: rows of its embeddings and heads gathered, missing ones filled, as it's read.

Rows are copied as they are stored; only a mean of several models' rows is computed, in float32, and rounded once. Nothing
of a tensor's size is formed. Which rows those are is decided elsewhere (`vocabulary`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from interfuse.checkpoints.numbers import STORED_FLOATS, narrow, widen
from interfuse.checkpoints.source import BLOCK, Checkpoint, TensorSpec
from interfuse.errors import CheckpointError, Problem

_EMBEDDING = r"(embed_tokens\w*|word_embeddings?|wte|tok_embeddings|token_embeddings?|embed_in|shared)"
_READOUT = r"(lm_head|embed_out|output|proj_out|predictions|shared_head\.head|vocab_projector|generator_lm_head)"
_INPUT = re.compile(rf"(^|\.){_EMBEDDING}\.weight$")
_KNOWN = re.compile(rf"(^|\.)({_EMBEDDING}|{_READOUT}(\.decoder)?)\.(weight|bias)$|final_logits_bias$")
_OTHER = re.compile(r"position|token_type|segment|rotary|relative|patch|norm|wpe", re.IGNORECASE)
_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|word_embeddings)\.(weight|bias)$")


class Fill(NamedTuple):
    """Where missing rows come from: `Vocabulary.donors` and `.zero`, and the models they are read from, as they were opened.

    A donor must have the tensor under the same name as the model that is filled.
    """

    donors: Mapping[str, np.ndarray]
    zero: np.ndarray
    checkpoints: Mapping[str, Checkpoint]


def embedding_rows(specs: Mapping[str, TensorSpec]) -> int | None:
    """How many rows a model's token embedding has, or None where no tensor is named as one."""
    found = [spec.shape[0] for name, spec in specs.items() if _INPUT.search(name) and len(spec.shape) == 2]
    return found[0] if found else None


def vocabulary_tensors(specs: Mapping[str, TensorSpec], rows: int, name: str = "") -> tuple[str, ...]:
    """The tensors whose first axis (after axes of one) is the vocabulary, which has `rows` entries; in stored order.

    That is: the axis has that many, and the tensor is named as embeddings and heads are; or it is named like nothing else,
    lies outside the numbered layers, and no layer is that wide. An embedding or head with another number of rows is a
    `CheckpointError`, in which `name` is the model.
    """
    widths = {size for key, spec in specs.items() if _LAYER.search(key) for size in spec.shape}
    problems = [
        Problem(name, f"{key} has {spec.shape[0]} rows, the vocabulary {rows}", "leave the tokenizer as it is for this model")
        for key, spec in specs.items()
        if _HEAD.search(key) and spec.shape and spec.shape[0] != rows
    ]
    if problems:
        raise CheckpointError(*problems)
    found = []
    for key, spec in specs.items():
        axes = [size for size in spec.shape if size != 1] or [1]
        if axes[0] != rows or not spec.shape or _OTHER.search(key):
            continue
        if _KNOWN.search(key) or (not _LAYER.search(key) and rows not in widths):
            found.append(key)
    return tuple(found)


def with_vocabulary(checkpoint: Checkpoint, rows: np.ndarray, fill: Fill, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with the vocabulary axis of the tensors `names` replaced: output row `i` is its row `rows[i]`.

    Rows with -1 are filled by `fill`. The checkpoint is given back itself where that changes nothing. Missing tensors,
    donors of another width, and means of anything but floating-point numbers are a `CheckpointError`.
    """
    absent = [name for name in names if name not in checkpoint.specs]
    if absent:
        raise CheckpointError(*(Problem(checkpoint.name, f"has no tensor {name!r}") for name in absent))
    problems = [problem for name in names for problem in _unfit(checkpoint, name, rows, fill)]
    if problems:
        raise CheckpointError(*problems)
    changed = [name for name in names if not np.array_equal(rows, np.arange(_axis(checkpoint.specs[name])[1]))]
    if not changed:
        return checkpoint
    specs, places = dict(checkpoint.specs), dict(checkpoint.places)
    for name in changed:
        specs[name] = resized(checkpoint.specs[name], len(rows))
        places[name] = Remapped(checkpoint, name, rows, fill)
    return replace(checkpoint, specs=specs, places=places, within=(checkpoint, *fill.checkpoints.values()))


def resized(spec: TensorSpec, rows: int) -> TensorSpec:
    """The spec with so many rows on its vocabulary axis."""
    axis, _ = _axis(spec)
    return TensorSpec(spec.dtype, (*spec.shape[:axis], rows, *spec.shape[axis + 1 :]))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor is named as those are whose rows are tokens."""
    return _KNOWN.search(name) is not None


def _axis(spec: TensorSpec) -> tuple[int, int]:
    """Which axis is the vocabulary, and how long it is."""
    axis = next((axis for axis, size in enumerate(spec.shape) if size != 1), 0)
    return axis, spec.shape[axis]


def _width(spec: TensorSpec) -> int:
    return spec.count // max(1, _axis(spec)[1])


def _unfit(checkpoint: Checkpoint, name: str, rows: np.ndarray, fill: Fill) -> list[Problem]:
    """Why the rows of one tensor can't be gathered or filled."""
    spec = checkpoint.specs[name]
    if not spec.shape or not spec.count:
        return [Problem(checkpoint.name, f"tensor {name!r} is {spec}, without rows")]
    if rows.max(initial=-1) >= _axis(spec)[1]:
        return [Problem(checkpoint.name, f"tensor {name!r} has {_axis(spec)[1]} rows, not the {rows.max() + 1} asked for")]
    missing = rows < 0
    if missing.any() and spec.dtype not in STORED_FLOATS:
        return [Problem(checkpoint.name, f"tensor {name!r} is {spec.dtype}: missing rows can't be filled", "give it in float")]
    problems = []
    for key, donors in fill.donors.items():
        if not (donors[missing] >= 0).any():
            continue
        theirs = fill.checkpoints[key].specs.get(name)
        if theirs is None:
            problems.append(Problem(key, f"has no tensor {name!r}, whose rows {checkpoint.name} needs", "tie or untie both"))
        elif theirs.dtype not in STORED_FLOATS or _width(theirs) != _width(spec) or donors.max() >= _axis(theirs)[1]:
            problems.append(Problem(key, f"tensor {name!r} is {theirs}, that of {checkpoint.name} {spec}", "rows must fit"))
    return problems


@dataclass(frozen=True, eq=False)
class Remapped:
    """The place of a tensor whose vocabulary is another one. A class, because it keeps the mean row once it is needed."""

    source: Checkpoint
    name: str
    rows: np.ndarray
    fill: Fill
    _mean: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, from a few whole rows at a time."""
        width = _width(self.source.specs[self.name])
        first, last = start // width, -(-stop // width)
        spec = self.source.specs[self.name]
        out = np.empty((last - first, width), spec.storage)
        _copy_rows(self.source, self.name, self.rows[first:last], out)
        missing = np.flatnonzero(self.rows[first:last] < 0)
        if len(missing):
            values, blank = self._filled(first + missing)
            if blank.any():
                values[blank] = self._average()
            out[missing] = narrow(values.reshape(-1), spec.dtype).reshape(values.shape)
        return out.reshape(-1)[start - first * width : stop - first * width]

    def _filled(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The donors' means for missing output rows, and which have no donor."""
        spec = self.source.specs[self.name]
        kind: Any = np.float64 if spec.dtype == "F64" else np.float32
        total = np.full((len(places), _width(spec)), -0.0, kind)  # a negative zero changes no donor, not even its zeros
        count = np.zeros(len(places), np.int64)
        for key, donors in self.fill.donors.items():
            given = np.flatnonzero(donors[places] >= 0)
            if not len(given):
                continue
            theirs = self.fill.checkpoints[key]
            raw = np.empty((len(given), total.shape[1]), theirs.specs[self.name].storage)
            _copy_rows(theirs, self.name, donors[places[given]], raw)
            wide = np.empty(raw.shape, kind)
            widen(raw, theirs.specs[self.name].dtype, wide)
            total[given] += wide
            count[given] += 1
        total[count > 1] /= count[count > 1, None].astype(kind)
        total[self.fill.zero[places]] = 0
        return total, (count == 0) & ~self.fill.zero[places]

    def _average(self) -> np.ndarray:
        """The mean of all output rows that come from somewhere, summed in float64 in one pass; zeros where there are none."""
        with self._lock:
            if not self._mean:
                spec = self.source.specs[self.name]
                width, total, count = _width(spec), 0.0, 0
                step = max(1, BLOCK // width)
                for first in range(0, len(self.rows), step):
                    values, there = self._sourced(first, min(first + step, len(self.rows)))
                    total = total + values[there].sum(axis=0, dtype=np.float64)
                    count += int(there.sum())
                self._mean.append(np.zeros(width) + total / max(1, count))
        return self._mean[0]

    def _sourced(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Output rows as numbers, and which of them aren't to be the mean themselves."""
        spec, rows = self.source.specs[self.name], self.rows[first:last]
        raw = np.zeros((last - first, _width(spec)), spec.storage)
        _copy_rows(self.source, self.name, rows, raw)
        values = np.empty(raw.shape, np.float64 if spec.dtype == "F64" else np.float32)
        widen(raw, spec.dtype, values)
        there = rows >= 0
        missing = np.flatnonzero(~there)
        if len(missing):
            values[missing], blank = self._filled(first + missing)
            there[missing] = ~blank
        return values, there


def _copy_rows(checkpoint: Checkpoint, name: str, rows: np.ndarray, out: np.ndarray) -> None:
    """Copy the rows that aren't -1 into their places in `out`; rows that follow each other are read together."""
    wanted = np.flatnonzero(rows >= 0)
    if not len(wanted):
        return
    width = out.shape[1]
    if checkpoint.specs[name].count <= BLOCK:
        out[wanted] = checkpoint.read(name).reshape(-1, width)[rows[wanted]]
        return
    breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(rows[wanted]) != 1)) + 1
    for run in np.split(wanted, breaks):
        row = int(rows[run[0]])
        block = checkpoint.block(name, row * width, (row + len(run)) * width)
        out[run[0] : run[0] + len(run)] = block.reshape(-1, width)

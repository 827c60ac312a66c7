"""Methods that are functions of their own, in NumPy: of blocks of deltas, of whole matrices, of one axis at a time.

They run a tensor on one thread; other tensors run beside it. Results are written in blocks as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import narrow, nonfinite, widen
from interfuse.checkpoints.source import BLOCK, spans
from interfuse.engine.kernels import FEW
from interfuse.engine.merging import Merging, noted, reader_of
from interfuse.engine.reading import Reader
from interfuse.engine.rules import keys_of
from interfuse.engine.scheduler import Job, Phase, Scratch, Total
from interfuse.methods.forms import Block, Combination
from interfuse.plan import Call, Output
from interfuse.registry import Method, find


def job(output: Output, call: Call, merging: Merging) -> Job:
    """The job of an output whose method is a function of blocks or of matrices."""
    reader = reader_of(output, call, merging)
    method, options = find(call.method, "weights"), dict(call.options)
    if "seed" in options:
        drawn = int(keys_of(merging.seed, output.name, 1)[0, 0])
        options["seed"] = (options["seed"] + drawn) % 2**31
    run = _blocks if call.form == "blocks" else _matrix

    def task(start: int, stop: int, scratch: Scratch) -> None:
        run(output, method, call.weights, options, reader, merging)

    yield Phase(task, [(0, reader.count)] if reader.count else [])
    yield from noted(reader, merging)


class _Tensor:
    """A tensor's blocks as methods see them: see `interfuse.methods.forms.Blocks`."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self.shape, self.models = reader.shape, reader.models

    def __iter__(self) -> Iterator[Block]:
        """Every block in order."""
        for start, stop in _pieces(self._reader):
            values = values_of(self._reader, start, stop, self._reader.wide)
            if self._reader.based:
                values[1:] -= values[0]
                yield Block(start, values[0], values[1:])
            else:
                yield Block(start, None, values)


def _pieces(reader: Reader) -> list[tuple[int, int]]:
    """A tensor's blocks as methods are given them."""
    return reader.ranges if most_of(reader) == BLOCK else spans(reader.shape, most_of(reader))


def most_of(reader: Reader) -> int:
    """Elements of a piece: a block's for a few models, fewer for more, so that memory doesn't depend on their number."""
    return BLOCK if reader.models <= FEW else max(BLOCK * FEW // reader.models, 1)


def values_of(reader: Reader, start: int, stop: int, kind: Any) -> np.ndarray:
    """The inputs' elements `[reads, n]` as numbers, the base's first where there is one."""
    _, raws = reader.block(start, stop)
    reader.hash(start, raws)
    values: np.ndarray = np.empty((len(raws), stop - start), kind)
    for row, raw, spec in zip(values, raws, reader.specs, strict=True):
        widen(raw, spec.dtype, row)
    return values


def _put(output: Output, start: int, values: np.ndarray, reader: Reader, merging: Merging, *, said: bool = False) -> None:
    """Write a block of results; `said` where its inputs' NaN and infinity are noted already."""
    result = narrow(values, output.spec.dtype)
    bad = int(np.count_nonzero(nonfinite(result, output.spec.dtype)))
    if bad and not said:
        merging.look(output, reader, reader.block(start, start + result.size)[1], bad)
    merging.put(output, start, result)


def _blocks(
    output: Output, method: Method, weights: tuple[float, ...], options: dict[str, Any], reader: Reader, merging: Merging
) -> None:
    tensor = _Tensor(reader)
    merge = method.make(tensor, weights, **options)
    for block in tensor:
        said = not np.isfinite(block.deltas).all()  # a method may drop them: 0 where signs disagree, the largest, ...
        if said:
            merging.look(output, reader, reader.block(block.start, block.start + block.deltas.shape[1])[1], 0)
        delta = merge(block)
        _put(output, block.start, delta if block.base is None else block.base + delta, reader, merging, said=said)


def _matrix(
    output: Output, method: Method, weights: tuple[float, ...], options: dict[str, Any], reader: Reader, merging: Merging
) -> None:
    """A whole matrix, `[out, in]`; a convolution's is `[out, in * k * k]`."""
    rows = reader.shape[0]
    deltas: np.ndarray = np.empty((reader.models, reader.count), reader.wide)
    for start, stop in reader.ranges:
        values = values_of(reader, start, stop, reader.wide)
        deltas[:, start:stop] = values[1:] - values[0] if reader.based else values
    said = not np.isfinite(deltas).all()
    if said:  # no decomposition has an answer: said, and where allowed the mean stands in
        merging.look(output, reader, reader.block(0, reader.count)[1], 1)
        merged = deltas.mean(0)
    else:
        merged = np.asarray(method.make(deltas.reshape(reader.models, rows, -1), weights, **options)).reshape(-1)
    for start, stop in reader.ranges:
        values = merged[start:stop]
        if reader.based:
            values = values_of(reader, start, stop, reader.wide)[0] + values
        _put(output, start, values, reader, merging, said=said)


def by_axis(output: Output, call: Call, method: Method, axis: int, merging: Merging) -> Job:
    """Coefficients for each vector along an axis of a tensor: its last (rows), or its first (columns).

    Rows that fit a block are merged as they are read; other vectors take a pass for their inner products first.
    """
    reader, options = reader_of(output, call, merging), dict(call.options)
    width = max(math.prod(reader.shape[1:]) if axis == 0 else reader.shape[-1], 1)
    lines = "arc,brc->cab" if axis == 0 else "arc,brc->rab"

    def vectors(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        columns = min(width, stop - start)  # whole rows, or a part of one
        values = values_of(reader, start, stop, np.float64).reshape(-1, (stop - start) // columns, columns)
        return values, values[1:] - values[0] if reader.based else values

    for pieces in _strips(reader, width, axis):
        total = None
        if axis == 0 or pieces[0][1] - pieces[0][0] < width:
            count = min(width, pieces[0][1] - pieces[0][0]) if axis == 0 else 1
            total = Total((count, reader.models, reader.models))

            def gram(i: int, j: int, scratch: Scratch, pieces: Any = pieces, total: Any = total) -> None:
                _, found = vectors(*pieces[i])
                total.add(i, j, np.einsum(lines, found, found))

            yield Phase(gram, [(i, i + 1) for i in range(len(pieces))])

        def task(start: int, stop: int, scratch: Scratch, total: Any = total) -> None:
            values, found = vectors(start, stop)
            products = np.einsum(lines, found, found) if total is None else total.value
            combination = method.make(call.weights, products, **options)
            _put(output, start, _combine(combination, values, reader.based, rows=axis != 0), reader, merging)

        yield Phase(task, pieces)
    yield from noted(reader, merging)


def _strips(reader: Reader, width: int, axis: int) -> list[list[tuple[int, int]]]:
    """A tensor of rows of `width` in pieces, in order, those together that have parts of the same vectors."""
    strips: dict[int, list[tuple[int, int]]] = {}
    for start, stop in spans((reader.count // width, width), most_of(reader)):
        cut = stop - start < width
        strips.setdefault((start % width if axis == 0 else start // width) if cut else -1, []).append((start, stop))
    return list(strips.values())


def _combine(combination: Combination, values: np.ndarray, based: bool, *, rows: bool) -> np.ndarray:
    """base t0 + sum c_i t_i of `values` `[reads, rows, columns]`, with a coefficient a row or a column; flat float64."""
    parts = ([combination.base] if based else []) + list(combination.models)
    coefficients = np.stack([np.broadcast_to(part, values.shape[1] if rows else values.shape[2]) for part in parts])
    spread = coefficients[:, :, None] if rows else coefficients[:, None, :]
    return (spread * values).sum(0).reshape(-1)

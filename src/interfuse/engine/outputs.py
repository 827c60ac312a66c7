"""How each output tensor is made: one job a tensor, which reads, reduces and combines in phases.

A job asks for a pass of statistics where its method needs one, then for the pass that computes and writes. Arithmetic is in
float32, in float64 where an input or the output is float64; statistics are in float64; each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import narrow, nonfinite, widen
from interfuse.engine import kernels, rules, streamed
from interfuse.engine.kernels import FEW
from interfuse.engine.merging import Merging, noted
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Job, Phase, Scratch, Total
from interfuse.errors import Problem
from interfuse.methods.forms import Combination
from interfuse.methods.geodesic import AXIS
from interfuse.plan import Call, Input, Output
from interfuse.registry import Method, find


def job(output: Output, merging: Merging) -> Job:
    """The job that makes one output."""
    if output.how != "merge":
        return _integers(output, merging)
    call = output.call
    assert call is not None
    if call.form == "rule":
        return rules.job(output, call, merging)
    if call.form in ("blocks", "matrices"):
        return streamed.job(output, call, merging)
    return _combined(output, call, merging)


def _integers(output: Output, merging: Merging) -> Job:
    """The first input's integers, which must be all others' too, or the largest at each place."""
    reader = Reader(output, merging.sources, output.inputs, output.base)

    def task(start: int, stop: int, scratch: Scratch) -> list[int]:
        _, raws = reader.block(start, stop)
        reader.hash(start, raws)
        result = np.maximum.reduce(raws) if output.how == "largest" else raws[0]
        merging.put(output, start, result)
        return [0 if output.how == "largest" else int(np.count_nonzero(raw != raws[0])) for raw in raws]

    differing = yield Phase(task, reader.ranges)
    for number, count in enumerate(map(sum, zip(*differing, strict=True))):
        if count:
            checkpoint, name = reader.name_of(number)
            wrong = f"tensor {name!r} differs in {count} of {output.spec.count} values"
            first = reader.name_of(0)[0]
            allowed = f"integers can't be averaged: they must be those of {first}, or name the tensor under `keep`"
            merging.refused.append(Problem(checkpoint, wrong, allowed))
    yield from noted(reader, merging)


def _combined(output: Output, call: Call, merging: Merging) -> Job:
    """A linear combination: its coefficients are in the plan, or follow from the Gram matrix of a first pass."""
    combination = call.made
    if combination is None:
        method = find(call.method, "weights")
        axis = AXIS[call.method](dict(call.options)) if call.method in AXIS and len(output.spec.shape) > 1 else None
        if axis is not None:
            yield from streamed.by_axis(output, call, method, axis, merging)
            return
        gram = yield from _gram(output, method, merging)
        combination = method.make(call.weights, gram, **dict(call.options))
    assert isinstance(combination, Combination)
    yield from _sum(output, combination, merging)


def _gram(output: Output, method: Method, merging: Merging) -> Any:
    """The inner products of the models, or of their deltas, in float64; the same whatever the threads."""
    deltas = method.of == "deltas"
    inputs = output.inputs if deltas else output.reads
    reader = Reader(output, merging.sources, inputs, output.base if deltas else None)

    total = Total((reader.models, reader.models))

    def task(i: int, j: int, scratch: Scratch) -> None:
        parts: np.ndarray = np.zeros((j - i, reader.models, reader.models))
        reader.run(kernels.gram_blocks, i, j, scratch, parts, scratch.work(reader.wide, reader.models))
        total.add(i, j, parts.sum(0))

    yield Phase(task, reader.runs)
    yield from noted(reader, merging)
    return total.value


def _sum(output: Output, combination: Combination, merging: Merging) -> Job:
    shares: list[tuple[Input, Any]] = list(zip(output.inputs, combination.models, strict=True))
    if output.base is not None:
        shares.insert(0, (output.base, combination.base))
    # The anchor is the input with the largest share, so that a merge at or near one model is exact about that model.
    terms = sorted((term for term in shares if term[1] != 0), key=lambda term: -abs(term[1]))
    known = all((read.source, read.name) in merging.read for read, _ in terms)  # from a pass for sums
    reader = Reader(output, merging.sources, [read for read, _ in terms], None, hashed=known)
    coefficients = np.array([share for _, share in terms] or [0], reader.wide)
    given = tuple(coefficients) if len(coefficients) <= FEW else coefficients
    # Where there is no base it is 0, and its share is no part of the sum.
    total = reader.wide(combination.total - (0 if output.base is not None else combination.base))
    specs = [spec.dtype for spec in reader.specs]

    def repair(out: np.ndarray, raws: Sequence[np.ndarray]) -> int:
        return _directly(out, raws, specs, coefficients, reader.wide, output.spec.dtype)

    def task(i: int, j: int, scratch: Scratch) -> None:
        merging.compute(
            output, reader, (i, j), scratch, kernels.sum_blocks, given, total, repair=repair
        )  # fmt: skip

    yield Phase(task, reader.runs)
    yield from noted(reader, merging)


def _directly(
    out: np.ndarray, raws: Sequence[np.ndarray], stored: Sequence[str], coefficients: np.ndarray, kind: Any, dtype: str
) -> int:
    """sum c_i t_i where the result isn't finite, since a difference may overflow where the sum doesn't; how many stay so."""
    wrong = nonfinite(out, dtype)
    total: np.ndarray = np.zeros(int(np.count_nonzero(wrong)), kind)
    term: np.ndarray = np.empty_like(total)
    with np.errstate(over="ignore", invalid="ignore"):
        for raw, name, coefficient in zip(raws, stored, coefficients, strict=True):
            widen(raw[wrong], name, term)
            total += term * coefficient
        out[wrong] = narrow(total, dtype)
    return int(np.count_nonzero(nonfinite(out, dtype)))

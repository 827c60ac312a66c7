"""Runs a plan on this machine, block by block: memory depends on the block, not on the tensor or the model.

Arithmetic is in float32, in float64 where an input is float64; the result is rounded once. Nothing is decided here: the
plan says what is read, and with which numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from interfuse.checkpoints.source import BLOCK, Checkpoint
from interfuse.engine.numbers import narrow, nonfinite, widen
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import Input, Output, Plan, label

#: Takes a tensor's name and its next elements, in the storage type: `TensorWriter.append`, `MemoryWriter.append`.
Sink = Callable[[str, np.ndarray], None]


def check_data(plan: Plan, sources: Sequence[Checkpoint | None]) -> None:
    """What headers can't show, before anything is written: integer tensors that must agree, a `CheckpointError` if not."""
    problems = []
    for output in plan.outputs:
        if output.rule != "same":
            continue
        first = output.inputs[0]
        for other in output.inputs[1:]:
            count = sum(int(np.count_nonzero(a != b)) for a, b in zip(*_streams([first, other], sources), strict=True))
            if count:
                wrong = f"tensor {other.name!r} differs in {count} of {output.spec.count} values"
                allowed = f"integers can't be averaged: they must be those of {label(first.source, _at(first, sources))}"
                problems.append(Problem(label(other.source, _at(other, sources)), wrong, allowed))
    if problems:
        raise CheckpointError(*problems)


def execute(plan: Plan, sources: Sequence[Checkpoint | None], sink: Sink, *, allow_nonfinite: bool = False) -> None:
    """Give every output tensor to `sink`, in the plan's order and in blocks.

    `sources` are the base, or None, and then the models that the plan was made for, `check_data` having passed. NaN or
    infinity in the result is a `CheckpointError` that names all such tensors, unless `allow_nonfinite`.
    """
    problems = []
    buffers: dict[type, np.ndarray] = {}
    for output in plan.outputs:
        if output.rule == "sum":
            bad = _sum(output, sources, sink, buffers)
        else:
            bad = _integers(output, sources, sink)
        if bad:
            wrong = f"the result has {bad} NaN or infinite values of {output.spec.count}"
            problems.append(Problem(f"tensor {output.name!r}", wrong, "look at the models' values, or allow_nonfinite=True"))
    if problems and not allow_nonfinite:
        raise CheckpointError(*problems)


def _at(read: Input, sources: Sequence[Checkpoint | None]) -> Checkpoint:
    checkpoint = sources[read.source]
    assert checkpoint is not None, "a plan reads no source that wasn't there"
    return checkpoint


def _streams(inputs: Sequence[Input], sources: Sequence[Checkpoint | None]) -> list:
    return [_at(read, sources).blocks(read.name) for read in inputs]


def _integers(output: Output, sources: Sequence[Checkpoint | None], sink: Sink) -> int:
    """The first input's integers, or the largest at each place. They are never NaN: always 0."""
    inputs = output.inputs if output.rule == "largest" else output.inputs[:1]
    for blocks in zip(*_streams(inputs, sources), strict=True):
        largest = blocks[0]
        for block in blocks[1:]:
            largest = np.maximum(largest, block)
        sink(output.name, largest)
    return 0


def _sum(output: Output, sources: Sequence[Checkpoint | None], sink: Sink, buffers: dict[type, np.ndarray]) -> int:
    """Stream one sum; how many of its values aren't finite."""
    # The anchor is the input with the largest share, so that a merge at or near one model is exact about that model.
    inputs = sorted(output.inputs, key=lambda read: -abs(read.coefficient))
    if not inputs:
        return _zeros(output, sink)
    dtypes = [_at(read, sources).specs[read.name].dtype for read in inputs]
    kind = np.float64 if "F64" in (*dtypes, output.spec.dtype) else np.float32
    if kind not in buffers:
        buffers[kind] = np.empty((3, BLOCK), kind)
    coefficients = [read.coefficient for read in inputs]
    bad = 0
    for raws in zip(*_streams(inputs, sources), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            summed = _combine(raws, dtypes, coefficients, output.total, buffers[kind][:, : len(raws[0])])
            result = narrow(summed, output.spec.dtype)
            wrong = nonfinite(result, output.spec.dtype)
            if wrong.any():
                result[wrong] = _directly([raw[wrong] for raw in raws], dtypes, coefficients, kind, output.spec.dtype)
                bad += int(np.count_nonzero(nonfinite(result, output.spec.dtype)))
        sink(output.name, result)
    return bad


def _combine(
    raws: Sequence[np.ndarray], dtypes: Sequence[str], coefficients: Sequence[float], total: float, buffer: np.ndarray
) -> np.ndarray:
    """total t_a + sum c_i (t_i - t_a), with t_a the first: equal inputs cancel exactly, whatever the coefficients.

    The differences are taken so that they are +0 where inputs are equal, and subtracted: a -0 then keeps its sign.
    """
    out, anchor, other = buffer
    widen(raws[0], dtypes[0], anchor)
    np.multiply(anchor, out.dtype.type(total), out=out)
    for raw, dtype, coefficient in zip(raws[1:], dtypes[1:], coefficients[1:], strict=True):
        widen(raw, dtype, other)
        pair = (anchor, other) if coefficient > 0 else (other, anchor)
        np.subtract(*pair, out=other)
        np.multiply(other, out.dtype.type(abs(coefficient)), out=other)
        np.subtract(out, other, out=out)
    return out


def _directly(
    raws: Sequence[np.ndarray], dtypes: Sequence[str], coefficients: Sequence[float], kind: type, dtype: str
) -> np.ndarray:
    """sum c_i t_i, for the few values where a difference overflows or infinities cancel though the sum is defined."""
    total: np.ndarray = np.zeros(len(raws[0]), kind)
    term: np.ndarray = np.empty(len(raws[0]), kind)
    for raw, stored, coefficient in zip(raws, dtypes, coefficients, strict=True):
        widen(raw, stored, term)
        total += term * kind(coefficient)
    return narrow(total, dtype)


def _zeros(output: Output, sink: Sink) -> int:
    for start in range(0, output.spec.count, BLOCK):
        sink(output.name, np.zeros(min(BLOCK, output.spec.count - start), output.spec.storage))
    return 0

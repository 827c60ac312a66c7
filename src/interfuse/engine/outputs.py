"""How each output tensor is made: one job a tensor, which reads, reduces and combines in phases.

A job asks for a pass of statistics where its method needs one, then for the pass that computes and writes. Arithmetic is in
float32, in float64 where an input or the output is float64; statistics are in float64; each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from interfuse.checkpoints.source import Checkpoint, hash_block
from interfuse.engine import kernels
from interfuse.engine.kernels import KINDS, ZERO
from interfuse.engine.numbers import narrow, nonfinite, widen
from interfuse.engine.reading import Digests, Reader, ranges_of
from interfuse.engine.scheduler import Job, Phase, Scratch
from interfuse.errors import Problem
from interfuse.methods.forms import Combination
from interfuse.methods.geodesic import AXIS
from interfuse.plan import Call, Input, Output, sees_base
from interfuse.registry import Method, find

#: From this size on a type has only infinity: halfway from its largest number to the next there would be.
LIMITS = {"BF16": 2.0**128 - 2.0**119, "F16": 65520.0, "F32": 2.0**128 - 2.0**103, "F64": np.inf}
_ALLOW = "look at the models' values, or allow them (--allow-nonfinite, allow_nonfinite=True)"


def limit_of(dtype: str, wide: Any) -> Any:
    """The limit of a stored type, in the type of arithmetic; infinite where that has no larger numbers itself."""
    limit = LIMITS[dtype]
    return wide(limit) if limit < float(np.finfo(wide).max) else wide(np.inf)


class Sink(Protocol):
    """Takes the results: elements of a tensor from `start` on, in its storage type; any thread may give them."""

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Keep them; `array` may be overwritten afterwards."""


@dataclass
class Merging:
    """What the jobs of one merge share: sources, sink, seed; and what they note: hashes, and what is wrong."""

    sources: Sequence[Checkpoint]
    sink: Sink
    seed: int
    read: Digests = field(default_factory=dict)
    written: dict[str, dict[tuple[int, int], bytes]] = field(default_factory=dict)
    refused: list[Problem] = field(default_factory=list)
    nonfinite: dict[Problem, int] = field(default_factory=dict)

    def put(self, output: Output, start: int, result: np.ndarray) -> None:
        """Write a block, and note its hash."""
        self.sink.write(output.name, start, result)
        self.written.setdefault(output.name, {})[start, start + result.size] = hash_block(result)

    def look(self, output: Output, reader: Reader, raws: Sequence[np.ndarray], bad: int) -> None:
        """Note NaN and infinity: in the inputs where they are there, else that the result has `bad` such values."""
        found = reader.nonfinite(raws)
        for number, count in found:
            checkpoint, name = reader.name_of(number)
            problem = Problem(f"{checkpoint}: tensor {name!r}", "holds NaN or infinite values", _ALLOW)
            self.nonfinite[problem] = self.nonfinite.get(problem, 0) + count
        if not found and bad:
            problem = Problem(f"tensor {output.name!r}", "the result holds NaN or infinite values", _ALLOW)
            self.nonfinite[problem] = self.nonfinite.get(problem, 0) + bad


def job(output: Output, merging: Merging) -> Job:
    """The job that makes one output."""
    from interfuse.engine import rules, streamed

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
    reads = [(merging.sources[read.source], read.name, (read.source, read.name)) for read in output.reads]
    first = reads[0]

    def task(start: int, stop: int, scratch: Scratch) -> list[int]:
        raws = [checkpoint.block(name, start, stop) for checkpoint, name, _ in reads]
        for (_, _, key), raw in zip(reads, raws, strict=True):
            merging.read.setdefault(key, {})[start] = hash_block(raw)
        result = np.maximum.reduce(raws) if output.how == "largest" else raws[0]
        merging.put(output, start, result)
        return [0 if output.how == "largest" else int(np.count_nonzero(raw != raws[0])) for raw in raws]

    differing = yield Phase(task, ranges_of(output.spec.count))
    for (checkpoint, name, _), count in zip(reads, map(sum, zip(*differing, strict=True)), strict=True):
        if count:
            wrong = f"tensor {name!r} differs in {count} of {output.spec.count} values"
            allowed = f"integers can't be averaged: they must be those of {first[0].name}, or name the tensor under `keep`"
            merging.refused.append(Problem(checkpoint.name, wrong, allowed))


def _combined(output: Output, call: Call, merging: Merging) -> Job:
    """A linear combination: its coefficients are in the plan, or follow from the Gram matrix of a first pass."""
    combination = call.made
    hashed = False
    if combination is None:
        method = find(call.method, "weights")
        axis = AXIS[call.method](dict(call.options)) if call.method in AXIS and len(output.spec.shape) > 1 else None
        if axis is not None:
            from interfuse.engine import streamed

            yield from streamed.by_axis(output, call, method, axis, merging)
            return
        gram = yield from _gram(output, method, merging)
        combination = method.make(call.weights, gram, **dict(call.options))
        hashed = True
    assert isinstance(combination, Combination)
    yield from _sum(output, combination, merging, hashed)


def _gram(output: Output, method: Method, merging: Merging) -> Any:
    """The inner products of the models, or of their deltas, in float64; the same whatever the threads."""
    deltas = method.of == "deltas"
    inputs = output.inputs if deltas else output.reads
    reader = Reader(output, merging.sources, inputs, output.base if deltas else None)

    def task(start: int, stop: int, scratch: Scratch) -> np.ndarray:
        addresses, raws = reader.block(start, stop)
        reader.hash(start, raws, merging.read)
        part: np.ndarray = np.zeros((reader.models, reader.models))
        kernels.gram(addresses, reader.kinds, stop - start, part, scratch.work(reader.wide, reader.models))
        return part

    parts = yield Phase(task, reader.ranges)
    return sum(parts, np.zeros((reader.models, reader.models)))


def _sum(output: Output, combination: Combination, merging: Merging, hashed: bool) -> Job:
    shares: list[tuple[Input, Any]] = list(zip(output.inputs, combination.models, strict=True))
    if output.base is not None:
        shares.insert(0, (output.base, combination.base))
    # The anchor is the input with the largest share, so that a merge at or near one model is exact about that model.
    terms = sorted((term for term in shares if term[1] != 0), key=lambda term: -abs(term[1]))
    reader = Reader(output, merging.sources, [read for read, _ in terms], None)
    kinds = reader.kinds[1:] if terms else np.array([ZERO], np.uint8)
    coefficients = np.array([share for _, share in terms] or [0], reader.wide)
    # Where there is no base it is 0, and its share is no part of the sum.
    total = reader.wide(combination.total - (0 if output.base is not None else combination.base))
    limit = limit_of(output.spec.dtype, reader.wide)

    def task(start: int, stop: int, scratch: Scratch) -> None:
        addresses, raws = reader.block(start, stop)
        if not hashed:
            reader.hash(start, raws, merging.read)
        n, out = stop - start, scratch.buffer("out", output.spec.storage, stop - start)
        work = scratch.work(reader.wide, 0)
        wanted = addresses[1:] if terms else addresses
        target = np.uint64(out.__array_interface__["data"][0])
        if not kernels.weighted_sum(wanted, kinds, coefficients, total, n, target, KINDS[output.spec.dtype], limit, work):
            specs = [spec.dtype for spec in reader.specs]
            merging.look(output, reader, raws, _directly(out, raws, specs, coefficients, reader.wide, output.spec.dtype))
        merging.put(output, start, out)

    yield Phase(task, reader.ranges)


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


Task = Callable[[int, int, Scratch], None]


def reader_of(output: Output, call: Call, merging: Merging) -> Reader:
    """The reader of a method that sees deltas from the base."""
    base = output.base if sees_base(find(call.method, "weights")) else None
    return Reader(output, merging.sources, output.inputs, base)


def hashing(reader: Reader, merging: Merging) -> Phase:
    """A pass that only hashes the inputs, for methods whose blocks are others than those of hashes."""

    def task(start: int, stop: int, scratch: Scratch) -> None:
        _, raws = reader.block(start, stop)
        reader.hash(start, raws, merging.read)

    return Phase(task, reader.ranges)

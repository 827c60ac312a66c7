"""What the jobs of a merge have in common: where they read and write, what they note, what they begin with.

How an output is made is `outputs`' part, and that of `rules` and `streamed`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash

from interfuse.checkpoints.source import Checkpoint, hash_block, hash_blocks, spans
from interfuse.engine.kernels import KINDS, LANES, SHORT, Stream, Target, hash_stream
from interfuse.engine.reading import Reader, address_of, hashes_of
from interfuse.engine.scheduler import Job, Phase, Scratch
from interfuse.engine.selection import Cut
from interfuse.errors import Problem
from interfuse.plan import Call, Output
from interfuse.registry import find

#: From this size on a type has only infinity: halfway from its largest number to the next there would be.
LIMITS = {"BF16": 2.0**128 - 2.0**119, "F16": 65520.0, "F32": 2.0**128 - 2.0**103, "F64": np.inf}
_BACK = 32  # blocks that are read back in one call
_ALLOW = "look at the models' values, or allow them (--allow-nonfinite, allow_nonfinite=True)"


def limit_of(dtype: str, wide: Any) -> Any:
    """The limit of a stored type, in the type of arithmetic; infinite where that has no larger numbers itself."""
    limit = LIMITS[dtype]
    return wide(limit) if limit < float(np.finfo(wide).max) else wide(np.inf)


class Sink(Protocol):
    """Takes the results: elements of a tensor from `start` on, in its storage type; any thread may give them."""

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Keep them; `array` may be overwritten afterwards."""

    def place(self, name: str) -> tuple[int, int] | None:
        """The open file and the byte where a tensor begins, to read it back from; None where it can't have changed."""


@dataclass
class Merging:
    """What the jobs of one merge share: sources, sink, seed; and what they note: hashes, and what is wrong.

    `read` has the hashes of inputs, by the source's number and the tensor, `written` those of outputs.
    `cuts` has for each output that is trimmed over the whole model where each model's trim ends (`global_trim`).
    """

    sources: Sequence[Checkpoint]
    sink: Sink
    seed: int
    read: dict[tuple[int, str], bytes] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    refused: list[Problem] = field(default_factory=list)
    nonfinite: dict[Problem, int] = field(default_factory=dict)
    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    _pieces: dict[str, dict[tuple[int, int], bytes]] = field(default_factory=dict)

    def put(self, output: Output, start: int, result: np.ndarray) -> None:
        """Write elements from `start` on, and note their hash."""
        self.sink.write(output.name, start, result)
        self._pieces.setdefault(output.name, {})[start, start + result.size] = hash_block(result)

    def compute(
        self, output: Output, reader: Reader, run: tuple[int, int], scratch: Scratch, kernel: Callable[..., int], *given: Any,
        repair: Callable[[np.ndarray, Sequence[np.ndarray]], int] = lambda out, raws: 1,
    ) -> None:  # fmt: skip
        """Make a run of an output's blocks by a kernel, and write them; `given` is what this kernel takes more than others.

        A block with a result that isn't finite is given to `repair`, with its inputs, which says how many stay so.
        """
        (start, stop), blocks = reader.span(*run), run[1] - run[0]
        out = scratch.buffer("out", output.spec.storage, stop - start)
        hashes: np.ndarray = np.zeros((blocks, 2), np.uint64)
        target = Target(
            np.uint64(address_of(out)), np.uint8(KINDS[output.spec.dtype]), out.itemsize, np.ones(blocks, np.bool_), hashes,
            scratch.buffer("lanes", np.uint64, LANES),
        )  # fmt: skip
        limit, work = limit_of(output.spec.dtype, reader.wide), scratch.work(reader.wide, reader.models)
        reader.run(kernel, *run, scratch, *given, target, limit, work)
        ends = reader.ends[run[0] : run[1] + 1].tolist()
        pieces, made = self._pieces.setdefault(output.name, {}), hashes_of(hashes)
        for b, (first, end) in enumerate(itertools.pairwise(ends)):
            part = out[first - start : end - start]
            if not target.finite[b]:
                _, raws = reader.block(first, end)
                self.look(output, reader, raws, repair(part, raws))
            known = target.finite[b] and part.nbytes > SHORT
            pieces[first, end] = made[b] if known else hash_block(part)
        self.sink.write(output.name, start, out)

    def read_back(self, output: Output) -> Job:
        """Compare what is kept of an output with what was meant to be, and note its hash."""
        name, pieces, place = output.name, self._pieces.pop(output.name, {}), self.sink.place(output.name)
        parts, usual = sorted(pieces), spans(output.spec.shape)
        whole = sum(stop - start for start, stop in parts) == output.spec.count
        found = [pieces[part] for part in parts]
        if place is not None and whole:
            found = yield from _stored(output, place, parts)
        if not whole or found != [pieces[part] for part in parts]:
            self.refused.append(Problem(f"tensor {name!r}", "reads back otherwise than it was written", "check the disk"))
        elif parts != usual:
            found = (yield from _stored(output, place, usual)) if place is not None else found
        self.written[name] = hash_blocks(found)

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


def reader_of(output: Output, call: Call, merging: Merging) -> Reader:
    """The reader of a method that sees deltas from the base."""
    base = output.base if find(call.method, "weights").sees_base else None
    return Reader(output, merging.sources, output.inputs, base)


def _stored(
    output: Output, place: tuple[int, int], parts: Sequence[tuple[int, int]]
) -> Generator[Phase, list[Any], list[bytes]]:
    """The hashes of these parts of an output, read from its file; of one that can't be read b""."""
    size = output.spec.storage.itemsize
    largest = max((stop - start for start, stop in parts), default=0)

    def task(i: int, j: int, scratch: Scratch) -> list[bytes]:
        room = scratch.buffer("read 0", np.uint8, largest * size)
        stream = Stream(
            np.array(place[:1], np.int32), np.array(place[1:], np.int64), np.array([size]),
            np.array([address_of(room)], np.uint64), np.zeros(1, np.uint8), scratch.buffer("stream", np.uint64, 1 + LANES),
        )  # fmt: skip
        hashes: np.ndarray = np.zeros((j - i, 1, 2), np.uint64)
        ends: np.ndarray = np.array([start for start, _ in parts[i:j]] + [parts[j - 1][1]], np.int64)
        if hash_stream(stream, ends, hashes, True):
            return [b""] * (j - i)
        found = hashes_of(hashes)
        for b, (start, stop) in enumerate(parts[i:j]):
            if (stop - start) * size <= SHORT:
                found[b] = xxhash.xxh3_128_digest(os.pread(place[0], (stop - start) * size, place[1] + start * size))
        return found

    runs = [(i, min(i + _BACK, len(parts))) for i in range(0, len(parts), _BACK)]
    return [one for found in (yield Phase(task, runs)) for one in found]


def noted(reader: Reader, merging: Merging) -> Job:
    """The end of a job: the hashes of its inputs, after a pass over the blocks that no other pass has hashed."""
    yield Phase(lambda i, j, scratch: reader.run(hash_stream, i, j, scratch), reader.unhashed)
    merging.read.update(reader.hashes())

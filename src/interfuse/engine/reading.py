"""One output's inputs, block by block, as kernels and functions want them, with the hashes of what passes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import nonfinite
from interfuse.checkpoints.places import Stored
from interfuse.checkpoints.source import BLOCK, Checkpoint, TensorSpec, hash_block, hash_blocks, spans
from interfuse.engine.kernels import IN_MEMORY, KINDS, LANES, NOTHING, SHORT, ZERO, Stream
from interfuse.engine.scheduler import Scratch
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import Input, Output

#: Blocks that a kernel goes through in one call.
RUN = 8


class Reader:
    """The base (or nothing) and the models' tensors that one output is made of.

    `wide` is the type of its arithmetic, `kinds` the stored types, the base's first, `ranges` its blocks, and `runs` which
    of them a kernel goes through in one call. Inputs that are `hashed` already aren't once more. A class, for blocks are
    asked for by many tasks, and their hashes kept.
    """

    def __init__(
        self,
        output: Output,
        sources: Sequence[Checkpoint],
        inputs: Sequence[Input],
        base: Input | None,
        *,
        hashed: bool = False,
    ):
        self.models = len(inputs)
        self._reads = [(sources[read.source], read.name) for read in ([base] if base else []) + list(inputs)]
        self._keys = [(read.source, read.name) for read in ([base] if base else []) + list(inputs)]
        self.specs: list[TensorSpec] = [checkpoint.specs[name] for checkpoint, name in self._reads]
        self.based = base is not None
        self.count = output.spec.count
        self.shape = output.spec.shape
        self.wide: Any = np.float64 if any(spec.dtype == "F64" for spec in (*self.specs, output.spec)) else np.float32
        stored = [KINDS.get(spec.dtype, ZERO) for spec in self.specs]  # integers are no kernel's
        self.kinds: np.ndarray = np.array(stored if base else [ZERO, *stored], np.uint8)
        self.ranges = spans(self.shape)
        self.runs = [(i, min(i + RUN, len(self.ranges))) for i in range(0, len(self.ranges), RUN)]
        self._starts = {start: i for i, (start, _) in enumerate(self.ranges)}
        self.ends: np.ndarray = np.array([*self._starts, self.count], np.int64)
        self._hashes: np.ndarray = np.zeros((len(self.ranges), len(self.kinds), 2), np.uint64)
        self._hashed: np.ndarray = np.full(len(self.ranges), hashed)
        self._known = hashed
        self._streams: dict[int, Stream] = {}

    def block(self, start: int, stop: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The addresses of the inputs' elements, the base's first (0 without one), and the elements, which keep them valid."""
        raws = [checkpoint.block(name, start, stop) for checkpoint, name in self._reads]
        found = [address_of(raw) for raw in raws]
        return np.array(found if self.based else [0, *found], np.uint64), raws

    def stream(self, start: int, stop: int, scratch: Scratch) -> tuple[Stream, list[np.ndarray]]:
        """The inputs from `start` to `stop` as kernels take them, and what must be kept meanwhile."""
        known = self._streams.get(id(scratch))
        if known is not None:
            return known, []
        rows = [] if self.based else [(NOTHING, 0, 0, 0)]
        kept = []
        for i, ((checkpoint, name), spec) in enumerate(zip(self._reads, self.specs, strict=True)):
            place, size = checkpoint.places[name], spec.storage.itemsize
            if isinstance(place, Stored):
                room = scratch.buffer(f"read {i}", np.uint8, min(BLOCK, self.count) * size)
                rows.append((place.file.handle(), place.offset, size, address_of(room)))
            else:
                kept.append(np.ascontiguousarray(checkpoint.block(name, start, stop)))
                rows.append((IN_MEMORY, 0, size, address_of(kept[-1])))
        handles, offsets, sizes, addresses = zip(*rows, strict=True)
        room = scratch.buffer("stream", np.uint64, len(rows) + LANES)
        stream = Stream(
            np.array(handles, np.int32), np.array(offsets, np.int64), np.array(sizes, np.int64),
            np.array(addresses, np.uint64), self.kinds, room,
        )  # fmt: skip
        if not kept:
            self._streams[id(scratch)] = stream
        return stream, kept

    def run(self, kernel: Callable[..., int], i: int, j: int, scratch: Scratch, *rest: Any) -> None:
        """Run a kernel through blocks `i` to `j`."""
        stream, _kept = self.stream(*self.span(i, j), scratch)
        hashing = not self._hashed[i:j].all()
        self.refuse(kernel(stream, self.ends[i : j + 1], self._hashes[i:j], hashing, *rest))
        self._hashed[i:j] = True

    def span(self, i: int, j: int) -> tuple[int, int]:
        """Where blocks `i` to `j` begin and end."""
        return int(self.ends[i]), int(self.ends[j])

    def refuse(self, failed: int) -> None:
        """A `CheckpointError` if a kernel couldn't read an input: 1 is the first of `kinds`."""
        if failed:
            checkpoint, name = self._reads[failed - 1 if self.based else failed - 2]
            place = checkpoint.places[name]
            assert isinstance(place, Stored)
            place.file.check()
            raise CheckpointError(Problem(str(place.file.path), f"tensor {name!r} can't be read", "check the disk"))

    def hash(self, start: int, raws: Sequence[np.ndarray]) -> None:
        """Note the hashes of the elements that begin at `start`, if they are a block of `ranges`."""
        i = self._starts.get(start)
        if i is not None and not self._hashed[i] and raws and self.ends[i + 1] == start + raws[0].size:
            for k, raw in enumerate(raws):
                self._hashes[i, k + (not self.based)] = words_of(hash_block(raw))
            self._hashed[i] = True

    @property
    def unhashed(self) -> list[tuple[int, int]]:
        """The blocks whose hashes aren't noted, each as a run."""
        return [(int(i), int(i) + 1) for i in np.flatnonzero(~self._hashed)] if self._reads else []

    def hashes(self) -> dict[tuple[int, str], bytes]:
        """The inputs' hashes, by source and tensor, once those of all blocks are noted; none if they were known."""
        found: dict[tuple[int, str], bytes] = {}
        if self._known:
            return found
        for k, (key, (checkpoint, name), spec) in enumerate(zip(self._keys, self._reads, self.specs, strict=True)):
            mine = self._hashes[:, k + (not self.based)]
            for i in np.flatnonzero(np.diff(self.ends) * spec.storage.itemsize <= SHORT):
                mine[i] = words_of(hash_block(checkpoint.block(name, *self.ranges[i])))
            found[key] = hash_blocks(hashes_of(mine))
        return found

    def nonfinite(self, raws: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        """Of which input, by its number among those read, how many values of a block are NaN or infinite."""
        found = [int(np.count_nonzero(nonfinite(raw, spec.dtype))) for raw, spec in zip(raws, self.specs, strict=True)]
        return [(i, bad) for i, bad in enumerate(found) if bad]

    def name_of(self, number: int) -> tuple[str, str]:
        """What to call an input: its checkpoint's name, and the tensor's there."""
        checkpoint, name = self._reads[number]
        return checkpoint.name, name


def words_of(found: bytes) -> np.ndarray:
    """A hash as kernels give it: its upper word and its lower one."""
    return np.frombuffer(found, ">u8")


def hashes_of(words: np.ndarray) -> list[bytes]:
    """Hashes from their words, `[n, 2]` or `[n, 1, 2]`."""
    joined = words.astype(">u8").tobytes()
    return [joined[at : at + 16] for at in range(0, len(joined), 16)]


def address_of(array: np.ndarray) -> int:
    """Where an array's elements are in memory."""
    return int(array.__array_interface__["data"][0])

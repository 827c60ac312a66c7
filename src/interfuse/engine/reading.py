"""One output's inputs, block by block, as kernels want them: addresses and stored types. It hashes what passes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import nonfinite
from interfuse.checkpoints.source import Checkpoint, TensorSpec, hash_block, hash_blocks, spans
from interfuse.engine.kernels import KINDS, ZERO
from interfuse.engine.scheduler import Scratch
from interfuse.plan import Input, Output


class Reader:
    """The base (or nothing) and the models' tensors that one output is made of.

    `wide` is the type of its arithmetic, `kinds` the stored types, the base's first, `ranges` its blocks. A class, for
    blocks are asked for by many tasks, and their hashes kept.
    """

    def __init__(self, output: Output, sources: Sequence[Checkpoint], inputs: Sequence[Input], base: Input | None):
        self.models = len(inputs)
        self._reads = [(sources[read.source], read.name) for read in ([base] if base else []) + list(inputs)]
        self._keys = [(read.source, read.name) for read in ([base] if base else []) + list(inputs)]
        specs = [checkpoint.specs[name] for checkpoint, name in self._reads]
        self.based = base is not None
        self.specs: list[TensorSpec] = specs
        self.count = output.spec.count
        self.shape = output.spec.shape
        self.wide: Any = np.float64 if any(spec.dtype == "F64" for spec in (*specs, output.spec)) else np.float32
        stored = [KINDS.get(spec.dtype, ZERO) for spec in specs]  # integers are no kernel's
        self.kinds: np.ndarray = np.array(stored if base else [ZERO, *stored], np.uint8)
        self.ranges = spans(self.shape)
        self._ends = dict(self.ranges)
        self._hashes: list[dict[int, bytes]] = [{} for _ in specs]

    def block(self, start: int, stop: int, scratch: Scratch | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """The addresses of the inputs' blocks, the base's first (0 without one), and the blocks, which keep them valid.

        With `scratch` they may be in it, and are valid until the next block is read with that one.
        """
        n = stop - start
        raws = [
            checkpoint.block(name, start, stop, None if scratch is None else scratch.buffer(f"read {i}", spec.storage, n))
            for i, ((checkpoint, name), spec) in enumerate(zip(self._reads, self.specs, strict=True))
        ]
        found = [raw.__array_interface__["data"][0] for raw in raws]
        return np.array(found if self.based else [0, *found], np.uint64), raws

    def hash(self, start: int, raws: Sequence[np.ndarray]) -> None:
        """Note the hashes of the blocks that begin at `start`, once, if they are blocks of `ranges`."""
        if raws and self._ends.get(start) == start + raws[0].size and start not in self._hashes[0]:
            for hashes, raw in zip(self._hashes, raws, strict=True):
                hashes[start] = hash_block(raw)

    @property
    def unhashed(self) -> list[tuple[int, int]]:
        """The blocks whose hashes aren't noted."""
        return [span for span in self.ranges if span[0] not in self._hashes[0]] if self._hashes else []

    def hashes(self) -> dict[tuple[int, str], bytes]:
        """The inputs' hashes, by source and tensor, once those of all blocks are noted."""
        parts = [[hashes[start] for start, _ in self.ranges] for hashes in self._hashes]
        return dict(zip(self._keys, map(hash_blocks, parts), strict=True))

    def nonfinite(self, raws: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        """Of which input, by its number among those read, how many values of a block are NaN or infinite."""
        found = [
            int(np.count_nonzero(nonfinite(raw, spec.dtype))) for raw, spec in zip(raws, self.specs, strict=True)
        ]  # fmt: skip
        return [(i, bad) for i, bad in enumerate(found) if bad]

    def name_of(self, number: int) -> tuple[str, str]:
        """What to call an input: its checkpoint's name, and the tensor's there."""
        checkpoint, name = self._reads[number]
        return checkpoint.name, name

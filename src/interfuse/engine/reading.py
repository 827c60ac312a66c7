"""One output's inputs, block by block, as kernels want them: addresses and stored types. It hashes what passes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import nonfinite
from interfuse.checkpoints.source import BLOCK, Checkpoint, TensorSpec, hash_block
from interfuse.engine.kernels import KINDS, ZERO
from interfuse.plan import Input, Output

#: source -> tensor -> block -> its hash.
Digests = dict[tuple[int, str], dict[int, bytes]]


def ranges_of(count: int, size: int = BLOCK) -> list[tuple[int, int]]:
    """The blocks of a tensor of `count` elements."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


class Reader:
    """The base (or nothing) and the models' tensors that one output is made of.

    `wide` is the type of its arithmetic, `kinds` the stored types, the base's first. A class, for blocks are asked for by
    many tasks.
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
        stored = [KINDS[spec.dtype] for spec in specs]
        self.kinds: np.ndarray = np.array(stored if base else [ZERO, *stored], np.uint8)
        self.ranges = ranges_of(self.count)

    def block(self, start: int, stop: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The addresses of the inputs' blocks, the base's first (0 without one), and the blocks, which keep them valid."""
        raws = [checkpoint.block(name, start, stop) for checkpoint, name in self._reads]
        found = [raw.__array_interface__["data"][0] for raw in raws]
        return np.array(found if self.based else [0, *found], np.uint64), raws

    def hash(self, start: int, raws: Sequence[np.ndarray], digests: Digests) -> None:
        """Note the hashes of the blocks that begin at `start`."""
        for key, raw in zip(self._keys, raws, strict=True):
            digests.setdefault(key, {})[start] = hash_block(raw)

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

"""A model with normal noise on some of its tensors, computed as they are read: the same numbers for any block and thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import xxhash

from interfuse.checkpoints.numbers import widen
from interfuse.checkpoints.source import BLOCK, Checkpoint, TensorSpec


def with_noise(checkpoint: Checkpoint, names: Sequence[str], scale: float, seed: int, which: int) -> Checkpoint:
    """The model with noise of deviation `scale` added to these tensors, which become float32.

    The numbers depend on `seed`, on `which` model of the recipe it is, and on the tensor's name.
    """
    present = [name for name in names if name in checkpoint.specs]
    specs = {name: TensorSpec("F32", checkpoint.specs[name].shape) for name in present}
    places = {
        name: _Noisy(checkpoint, name, scale, xxhash.xxh3_64_intdigest(f"{seed} {which} {name}".encode())) for name in present
    }
    declared = {name: checkpoint.declared.get(name, checkpoint.specs[name].dtype) for name in present}
    return replace(
        checkpoint,
        specs={**checkpoint.specs, **specs},
        places={**checkpoint.places, **places},
        declared={**checkpoint.declared, **declared},
    )


class _Noisy(NamedTuple):
    """A tensor with noise, drawn anew for each block of `BLOCK` elements."""

    checkpoint: Checkpoint
    name: str
    scale: float
    key: int

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` in float32."""
        out: np.ndarray = np.empty(stop - start, np.float32)
        widen(self.checkpoint.block(self.name, start, stop), self.checkpoint.specs[self.name].dtype, out)
        count = self.checkpoint.specs[self.name].count
        for first in range(start - start % BLOCK, stop, BLOCK):
            length = min(BLOCK, count - first)
            random = np.random.Generator(np.random.Philox(key=[self.key, first // BLOCK]))
            noise = random.standard_normal(length, np.float32)
            begin, end = max(start, first), min(stop, first + length)
            out[begin - start : end - start] += np.float32(self.scale) * noise[begin - first : end - first]
        return out

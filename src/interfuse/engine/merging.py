"""What the jobs of a merge have in common: where they read and write, what they note, what they begin with.

How an output is made is `outputs`' part, and that of `rules` and `streamed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from interfuse.checkpoints.source import Checkpoint, hash_block
from interfuse.engine.reading import Digests, Reader
from interfuse.engine.scheduler import Phase, Scratch
from interfuse.errors import Problem
from interfuse.plan import Call, Output
from interfuse.registry import find

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


def reader_of(output: Output, call: Call, merging: Merging) -> Reader:
    """The reader of a method that sees deltas from the base."""
    base = output.base if find(call.method, "weights").sees_base else None
    return Reader(output, merging.sources, output.inputs, base)


def hashing(reader: Reader, merging: Merging) -> Phase:
    """A pass that only hashes the inputs, for methods whose blocks are others than those of hashes."""

    def task(start: int, stop: int, scratch: Scratch) -> None:
        _, raws = reader.block(start, stop)
        reader.hash(start, raws, merging.read)

    return Phase(task, reader.ranges)

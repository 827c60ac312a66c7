"""What the jobs of a merge have in common: where they read and write, what they note, what they begin with.

How an output is made is `outputs`' part, and that of `rules` and `streamed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from interfuse.checkpoints.source import Checkpoint, hash_block, hash_blocks, spans
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Job, Phase, Scratch
from interfuse.engine.selection import Cut
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

    def back(self, name: str, start: int, room: np.ndarray) -> np.ndarray | None:
        """As many elements from `start` on as `room` has, as they are kept; None where they can't have changed."""


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
        """Write a block, and note its hash."""
        self.sink.write(output.name, start, result)
        self._pieces.setdefault(output.name, {})[start, start + result.size] = hash_block(result)

    def read_back(self, output: Output) -> Job:
        """Compare what is kept of an output with what was meant to be; its hash."""
        name, pieces, storage = output.name, self._pieces.pop(output.name, {}), output.spec.storage
        parts = sorted(pieces)
        whole = sum(stop - start for start, stop in parts) == output.spec.count

        def task(start: int, stop: int, scratch: Scratch) -> bytes:
            found = self.sink.back(name, start, scratch.buffer("read 0", storage, stop - start))
            return pieces[start, stop] if found is None else hash_block(found)

        found = yield Phase(task, parts)
        if not whole or found != [pieces[part] for part in parts]:
            self.refused.append(Problem(f"tensor {name!r}", "reads back otherwise than it was written", "check the disk"))
        usual = spans(output.spec.shape)
        if parts != usual and whole:
            found = yield Phase(task, usual)
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


def noted(reader: Reader, merging: Merging) -> Job:
    """The end of a job: the hashes of its inputs, after a pass over the blocks that no other pass has hashed."""

    def task(start: int, stop: int, scratch: Scratch) -> None:
        _, raws = reader.block(start, stop, scratch)
        reader.hash(start, raws)

    yield Phase(task, reader.unhashed)
    merging.read.update(reader.hashes())

"""One trunk for several tasks: the best image parent's, or MiniLM's, fine-tunes on two sets, with the first blocks merged.

The depth is chosen by both sets' validation parts (`itf.trunk_curve`), and each set has a row of its own: parameters and
operations are those of the whole network, which gives both answers in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.levels.bench import Bench, Row


def trunks(bench: Bench) -> Iterator[Row]:
    """None yet."""
    yield from ()

"""What a merge will take of the machine, said before it runs: own memory, time, room on the disk. No promise.

Memory follows from the buffers that threads hold. Time is elements by rates, which were measured with the models in the page
cache (benchmarks/merge_speed, AMD EPYC): another processor is faster or slower, and a disk may be slower than both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from interfuse.checkpoints.source import BLOCK
from interfuse.engine.chain import HELD, LARGE, Planned
from interfuse.engine.kernels import FEW
from interfuse.engine.reading import RUN
from interfuse.methods.forms import Combination, Rule
from interfuse.methods.geodesic import AXIS
from interfuse.plan import Output, Plan

#: CPU nanoseconds for each element that is read or written, by how an output is made.
_RATES = {"copied": 0.4, "sum": 0.55, "gram": 1.0, "axis": 5.0, "blocks": 5.0}
#: The same for rules, by how they trim.
_TRIMS = {"all": 0.7, "random": 0.8, "ranked": 1.8, "largest": 1.3, "variance": 1.9}
#: The same for methods of blocks that are far from the others.
_SLOW = {"pcb": 60.0, "arcee_fusion": 30.0}
#: CPU nanoseconds of a decomposition, for each element times the shorter side; and the methods that do one, not one a model.
_DECOMPOSED = 0.4
_ONCE = ("iso_c", "subspace_boost", "wudi", "ace", "knots")
_START = 0.5  # seconds in which a process starts
_EACH = 300_000  # CPU nanoseconds of a tensor, however small
_PROCESS = 45 * 10**6  # bytes of a process that merges, and what it knows of one tensor of one model
_NAMED = 400
_BESIDE = 1000  # bytes a tensor has in headers, index and journal


class Estimate(NamedTuple):
    """Bytes of own (anonymous) memory, seconds, and bytes on the disk of the output, on that many threads."""

    threads: int
    memory: int
    seconds: float
    nbytes: int


def estimate(stages: Sequence[Planned], threads: int | None = None) -> Estimate:
    """What the recipes of one run, the output's last, will take on `threads` threads (left out: as many as may be used)."""
    count = threads or len(os.sched_getaffinity(0))
    plans = [plan for _, plan, _ in stages]
    names = sum(len(source.specs) for _, _, sources in stages for source in sources) + sum(len(p.outputs) for p in plans)
    memory, seconds = _PROCESS + _NAMED * names, _START
    for plan in plans:
        alike, own = _alike(plan), count if plan is plans[-1] else 1  # earlier recipes' results are made by one thread
        memory += own * max((_buffers(output) for output, _ in alike), default=0)
        seconds += sum(number * (_EACH + _nanoseconds(output)) for output, number in alike) / own / 1e9
    return Estimate(count, memory + sum(map(_kept, plans[:-1])), seconds, room_for(stages))


def room_for(stages: Sequence[Planned]) -> int:
    """The bytes that the output of a run takes on its disk, large tensors of earlier recipes among them while it runs.

    0 where there are no plans: what a run of networks writes isn't known before it.
    """
    written = sum(output.spec.nbytes + _BESIDE for output in stages[-1].plan.outputs) if stages else 0
    scratch = 0
    for _, plan, _ in stages[:-1]:
        scratch += sum(sorted(output.spec.nbytes for output in plan.outputs if output.spec.nbytes >= LARGE)[-HELD:])
    return written + scratch


def _kept(plan: Plan) -> int:
    """What is remembered of an earlier recipe's result in memory."""
    return sum(sorted(output.spec.nbytes for output in plan.outputs if output.spec.nbytes < LARGE)[-HELD:])


def _alike(plan: Plan) -> list[tuple[Output, int]]:
    """Outputs that take the same, by one of them and their number."""
    found: dict[tuple[int, tuple[int, ...], str, int], list[Output]] = {}
    for output in plan.outputs:
        found.setdefault((id(output.call), output.spec.shape, output.how, len(output.inputs)), []).append(output)
    return [(outputs[0], len(outputs)) for outputs in found.values()]


def _buffers(output: Output) -> int:
    models, count = len(output.reads), output.spec.count
    kind, block = _kind(output), 4 * min(BLOCK, count)
    if kind == "matrices":
        return (4 * models + 4) * 4 * count
    return (3 * min(models, FEW) + 2) * block if kind in ("axis", "blocks") else (models + RUN) * block // 2


def _nanoseconds(output: Output) -> float:
    count, call, kind = output.spec.count, output.call, _kind(output)
    if call is not None and kind == "matrices":
        shorter = min(output.spec.shape[0], count // max(output.spec.shape[0], 1))
        return _DECOMPOSED * (1 if call.method in _ONCE else len(call.weights)) * count * shorter
    if call is not None and isinstance(call.made, Rule):
        rate = _TRIMS[call.made.trim.how]
    else:
        rate = _SLOW.get(call.method if call else "", _RATES.get(kind, 0))
    return rate * count * (len(output.reads) + 1)


def _kind(output: Output) -> str:
    """How an output is made, by the names of `_RATES`; else its method's form."""
    call = output.call
    if call is None or call.method == "copy":
        return "copied"
    if isinstance(call.made, Combination):
        return "sum"
    if call.form != "coefficients":
        return call.form
    axis = AXIS[call.method](dict(call.options)) if call.method in AXIS and len(output.spec.shape) > 1 else None
    return "gram" if axis is None else "axis"

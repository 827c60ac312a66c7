"""The k largest magnitudes of a model's deltas over many tensors, exactly: where each cut lies in each tensor.

A small sample brackets a cut; one pass over all tensors counts by the magnitudes' bits what is within the bracket. A
bracket that is too wide, or that misses, takes a further pass. Of entries at the cut the ones in earlier tensors count as
larger, and within a tensor those of lower index; to find the last of them takes a pass that only compares. Memory depends
on neither models nor tensors. The paper that trims over a whole model is TIES, https://arxiv.org/abs/2306.01708.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from interfuse.checkpoints.source import Checkpoint
from interfuse.engine import kernels
from interfuse.engine.reading import Reader
from interfuse.engine.rules import kept
from interfuse.engine.scheduler import Job, Phase, Scratch, run_jobs
from interfuse.engine.selection import Cut
from interfuse.methods.forms import Rule
from interfuse.plan import Output

_BITS, _TOGETHER = 18, 21  # of a span of bits' parts, at most: of a group's, and of all groups' together
_RUN = 16  # neighbours that are sampled together


class _Part(NamedTuple):
    """A tensor of those that are trimmed together: its reader, and each model's group."""

    name: str
    reader: Reader
    groups: np.ndarray  # int64 [M]


class _Groups(NamedTuple):
    """What is counted together: a model's tensors that have one density. `total` entries each, of which `keep` are kept."""

    total: list[int]
    keep: list[int]
    wide: Any  # the magnitudes' type

    @property
    def bits(self) -> Any:
        """The type of the magnitudes' bits."""
        return np.uint32 if self.wide is np.float32 else np.uint64

    @property
    def end(self) -> int:
        """Above every magnitude's bits."""
        return int(np.array(np.inf, self.wide).view(self.bits)) + 1

    @property
    def buckets(self) -> int:
        """Into how many parts a span of bits is parted."""
        return 1 << max(min(_BITS, _TOGETHER - (len(self.total) - 1).bit_length()), 8)

    @property
    def open(self) -> list[bool]:
        """Of which groups some entries are kept, and not all."""
        return [0 < keep < n for keep, n in zip(self.keep, self.total, strict=True)]


class _Found(NamedTuple):
    """A group's cut: the magnitude, and how many entries at it are kept, None for all."""

    value: float
    left: int | None


def global_cuts(outputs: Sequence[Output], sources: Sequence[Checkpoint], threads: int) -> dict[str, list[Cut]]:
    """Output -> each model's cut, for all whose rule trims over the whole model; empty where none does.

    A cut is found over all tensors that take one model at one density, in the order of `outputs`; floor(density n) of their
    n entries are kept, at least one unless the density is 0. The cuts depend on the numbers alone, not on threads.
    """
    parts, groups = _gathered(outputs, sources)
    if not parts:
        return {}
    return _ends(parts, _narrowed(parts, groups, _brackets(parts, groups, threads), threads), threads)


def _gathered(outputs: Sequence[Output], sources: Sequence[Checkpoint]) -> tuple[list[_Part], _Groups]:
    """The tensors that are trimmed together, with the groups that their models are in."""
    found: dict[tuple[int, int, float], int] = {}
    total: list[int] = []
    parts = []
    for output in outputs:
        rule = output.call.made if output.call is not None else None
        if not isinstance(rule, Rule) or rule.trim.scope != "global" or all(density >= 1 for density in rule.trim.density):
            continue
        reader = Reader(output, sources, output.inputs, output.base)
        mine: Counter[int] = Counter()
        numbers = []
        for read, density in zip(output.inputs, rule.trim.density, strict=True):
            key = (read.source, mine[read.source], density)  # a model that is given twice is two
            mine[read.source] += 1
            number = found.setdefault(key, len(found))
            total += [0] * (number == len(total))
            total[number] += reader.count
            numbers.append(number)
        parts.append(_Part(output.name, reader, np.array(numbers, np.int64)))
    keep = [kept(density, n) for (_, _, density), n in zip(found, total, strict=True)]
    wide = np.float64 if any(part.reader.wide is np.float64 for part in parts) else np.float32
    return parts, _Groups(total, keep, wide)


def _brackets(parts: Sequence[_Part], groups: _Groups, threads: int) -> list[tuple[int, int]]:
    """Bits below and above each group's cut, by a sample of its magnitudes; for few entries all bits that there are."""
    least = max(2**22 // len(groups.total), 2**12)
    size = [min(n // 8, 2**20, least) // _RUN if some else 0 for n, some in zip(groups.total, groups.open, strict=True)]
    drawn: list[dict[Any, np.ndarray]] = [{} for _ in size]
    passed = [0] * len(size)  # elements of each group before a tensor
    jobs: list[Job] = []
    for number, part in enumerate(parts):
        if any(size[group] for group in part.groups):
            jobs.append(_sampling(part, number, list(passed), size, groups, drawn))
        for group in part.groups:
            passed[group] += part.reader.count
    run_jobs(jobs, threads)
    found = []
    for group, runs in enumerate(drawn):
        scores = np.sort(np.concatenate([np.zeros(0, groups.wide), *runs.values()]))
        few = len(scores) < 1024
        found.append((0, groups.end) if few else _bracket(scores, groups.keep[group] / groups.total[group], groups))
    return found


def _sampling(
    part: _Part, number: int, passed: list[int], size: list[int], groups: _Groups, drawn: list[dict[Any, np.ndarray]]
) -> Job:
    """Runs of neighbours, as many of each block as it has of its group's entries."""
    reader = part.reader

    def task(start: int, stop: int, scratch: Scratch) -> None:
        ends = [(passed[g] + start, passed[g] + stop, size[g], groups.total[g]) for g in part.groups]
        runs = [b * of // total - a * of // total for a, b, of, total in ends]
        most = min(max(runs), (stop - start) // _RUN)
        if not most:
            return
        scores: np.ndarray = np.empty((reader.models, most * _RUN), reader.wide)
        addresses, _raws = reader.block(start, stop)
        stride = (stop - start) // most
        kernels.sample(addresses, reader.kinds, False, stride, scores, scratch.work(reader.wide, reader.models))
        for model, group in enumerate(part.groups):
            drawn[group][number, model, start] = scores[model, : min(runs[model], most) * _RUN].astype(groups.wide)

    yield Phase(task, reader.ranges)


def _bracket(scores: np.ndarray, share: float, groups: _Groups) -> tuple[int, int]:
    """Bits of sorted magnitudes below and above the one that `share` of the entries is above, wide enough to miss seldom."""
    size = len(scores)
    margin = 6 * math.sqrt(size * share * (1 - share)) + 4 * _RUN
    place = size * (1 - share)
    bits = scores.view(groups.bits)
    low = int(bits[int(place - margin)]) if place - margin >= 0 else 0
    high = int(bits[math.ceil(place + margin)]) + 1 if place + margin <= size - 1 else groups.end
    return min(low, groups.end - 1), min(high, groups.end)


def _narrowed(parts: Sequence[_Part], groups: _Groups, spans: list[tuple[int, int]], threads: int) -> list[_Found]:
    """The cut of each group: spans of bits become smaller until they hold one magnitude."""
    spans = list(spans)
    found = [_Found(math.inf if keep <= 0 else -1.0, None) for keep in groups.keep]
    waiting = [group for group, some in enumerate(groups.open) if some]
    while waiting:
        shifts = {group: ((spans[group][1] - spans[group][0] - 1) // groups.buckets).bit_length() for group in waiting}
        counts = _tallied(parts, groups, spans, shifts, threads)
        for group in list(waiting):
            keep, (low, high), shift = groups.keep[group], spans[group], shifts[group]
            over = counts[group, -1]
            above = over + np.cumsum(counts[group, :-1][::-1])[::-1]
            if not over < keep <= above[0]:  # the sample was unlucky
                spans[group] = (0, groups.end)
                continue
            bucket = int(np.flatnonzero(above >= keep)[-1])
            spans[group] = (low + (bucket << shift), min(low + ((bucket + 1) << shift), high))
            if shift == 0:
                waiting.remove(group)
                value = float(np.array(spans[group][0], groups.bits).view(groups.wide))
                left = keep - int(above[bucket] - counts[group, bucket])
                found[group] = _Found(value, left if left < counts[group, bucket] else None)
    return found


def _tallied(
    parts: Sequence[_Part], groups: _Groups, spans: list[tuple[int, int]], shifts: dict[int, int], threads: int
) -> np.ndarray:
    """How many entries of each group lie in each bucket of its span, and, last, above it."""
    mine, all_counts = threading.local(), []  # a thread counts for itself, and sums of whole numbers have no order

    def pass_of(part: _Part) -> Job:
        reader = part.reader
        models: np.ndarray = np.array([k for k, group in enumerate(part.groups) if group in shifts], np.int64)
        of = part.groups[models]
        low, high = (np.array([spans[group][end] for group in of], np.uint64) for end in (0, 1))
        shift = np.array([shifts[group] for group in of], np.uint64)

        def task(start: int, stop: int, scratch: Scratch) -> None:
            if not hasattr(mine, "counts"):
                mine.counts = np.zeros((len(spans), groups.buckets + 1), np.int64)
                all_counts.append(mine.counts)
            addresses, _raws = reader.block(start, stop)
            work, wide = scratch.work(reader.wide, reader.models), groups.wide is np.float64
            kernels.tally(addresses, reader.kinds, stop - start, models, of, low, high, shift, wide, mine.counts, work)

        yield Phase(task, reader.ranges if len(models) else [])

    run_jobs(map(pass_of, parts), threads)
    return sum(all_counts, np.zeros((len(spans), groups.buckets + 1), np.int64))


def _ends(parts: Sequence[_Part], found: Sequence[_Found], threads: int) -> dict[str, list[Cut]]:
    """The cuts of each tensor: of the entries at a group's value the first ones are kept, in the order of the tensors."""
    sought = [[_at(found[group], part.reader.wide) for group in part.groups] for part in parts]
    equal = _equal(parts, sought, threads) if any(one.left is not None for one in found) else []
    rest = [one.left for one in found]
    cuts: dict[str, list[Cut]] = {}
    split: list[tuple[_Part, int, int, list[int]]] = []
    for number, part in enumerate(parts):
        cuts[part.name] = mine = []
        for model, group in enumerate(part.groups):
            value, exact = sought[number][model]
            left = rest[group]
            if left is None or not exact:
                mine.append(Cut(value, part.reader.count))
                continue
            each = [int(counts[model]) for counts in equal[number]]
            mine.append(Cut(value, part.reader.count if left >= sum(each) else 0))
            if 0 < left < sum(each):
                split.append((part, model, left, each))
            rest[group] = max(left - sum(each), 0)

    def locate(part: _Part, model: int, keep: int, each: list[int]) -> Job:
        reader, value, block = part.reader, part.reader.wide(cuts[part.name][model].value), 0
        while each[block] <= keep:
            keep -= each[block]
            block += 1

        def task(start: int, stop: int, scratch: Scratch) -> int:
            addresses, _raws = reader.block(start, stop)
            work = scratch.work(reader.wide, reader.models)
            return start + kernels.locate(addresses, reader.kinds, stop - start, False, model, value, keep, work)

        [end] = yield Phase(task, [reader.ranges[block]])
        cuts[part.name][model] = Cut(float(value), end)

    run_jobs((locate(*one) for one in split), threads)
    return cuts


def _at(found: _Found, wide: Any) -> tuple[float, bool]:
    """The cut in a tensor's own type of arithmetic, and whether it is that: else the next number above, which is kept."""
    value = wide(found.value)
    if float(value) == found.value:
        return found.value, True
    return float(value if float(value) > found.value else np.nextafter(value, wide(np.inf))), False


def _equal(parts: Sequence[_Part], sought: list[list[tuple[float, bool]]], threads: int) -> list[list[np.ndarray]]:
    """Tensor -> block -> how many entries of each model's delta are just at its cut, int64 [M]."""
    found: list[list[np.ndarray]] = [[] for _ in parts]

    def pass_of(number: int, part: _Part) -> Job:
        reader = part.reader
        values = np.array([value for value, _ in sought[number]], reader.wide)

        def task(start: int, stop: int, scratch: Scratch) -> np.ndarray:
            addresses, _raws = reader.block(start, stop)
            counts: np.ndarray = np.zeros(reader.models, np.int64)
            kernels.count_at(addresses, reader.kinds, stop - start, values, counts, scratch.work(reader.wide, reader.models))
            return counts

        found[number] = yield Phase(task, reader.ranges)

    run_jobs((pass_of(number, part) for number, part in enumerate(parts)), threads)
    return found

"""The k largest magnitudes of a tensor, exactly, without a sort: where each cut lies, and how many at the cut are kept.

A small sample brackets the cut; one pass counts what is above the bracket and keeps the few magnitudes within it, which are
then put in order. Where a bracket misses, or a tensor is so large that even those few are many, histograms of the
magnitudes' bits find the cut in as many passes as they need. Of entries at the cut, those of lowest index count as larger.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from interfuse.engine import kernels
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Phase, Scratch, Total

_NEIGHBOURS = 32  # elements that are sampled together
_ROOM = 2**15  # magnitudes within a bracket that a run of blocks keeps
_SMALL = 2**14  # elements of a tensor whose magnitudes are all kept
_MOST = 2**24  # magnitudes that are kept of one tensor: 64 MiB, or 128 of float64
_SAMPLED = 2**18  # places that are sampled, of all models' deltas together
_WIDTH = 16  # bits that a histogram looks at


class Cut(NamedTuple):
    """The k largest: all above `value`, and those at it whose index is below `end`."""

    value: float
    end: int


_NONE, _ALL = Cut(math.inf, 0), Cut(-1.0, 0)

Search = Generator[Phase, list[Any], list[Cut]]


def largest(reader: Reader, model: Sequence[int], keep: Sequence[int]) -> Search:
    """For each channel c where the `keep[c]` largest entries of the delta of model `model[c]` end."""
    count = reader.count
    cuts: list[Cut | None] = [_NONE if k <= 0 else _ALL if k >= count else None for k in keep]
    open_ = [c for c, cut in enumerate(cuts) if cut is None]
    if open_:
        wanted = [keep[c] for c in open_]
        models = np.array([model[c] for c in open_])
        found = yield from _by_bracket(reader, models, wanted)
        missed = [i for i, cut in enumerate(found) if cut is None]
        if missed:
            rest = yield from _by_histogram(reader, models[missed], [wanted[i] for i in missed], shared=False)
            for i, cut in zip(missed, rest, strict=True):
                found[i] = cut
        for c, place in zip(open_, found, strict=True):
            cuts[c] = place
    return [cut for cut in cuts if cut is not None]


def most_varying(reader: Reader, density: float) -> Generator[Phase, list[Any], Cut]:
    """Where the largest variances over the models end, of which a share is kept of all that aren't 0.

    How many aren't is counted in the same pass: a second channel, whose bracket is 0.
    """
    channel, bracket = np.zeros(1, np.int64), np.array([-1, np.inf], reader.wide)
    if reader.count > _SMALL:
        runs = _runs(reader.count, 1)
        [scores] = yield Phase(lambda start, stop, scratch: _sample(reader, runs, True, scratch), [(0, reader.count)])
        some = (scores[0] > 0).mean(1)
        bracket = _bracket(scores[0], density * some.mean(), reader.wide, density * float(some.std()))
    both = np.stack([bracket, np.zeros(2, reader.wide)])
    found, inside = yield from _count(reader, np.zeros(2, np.int64), both, shared=True)
    keep = math.floor(density * int(found[:, 1, 0].sum()))
    if not 0 < keep < reader.count:
        return _ALL if keep else _NONE
    cut = yield from _cut(reader, 0, keep, bracket, found[:, 0], None if inside is None else inside[0], shared=True)
    return cut or (yield from _by_histogram(reader, channel, [keep], shared=True))[0]


def _runs(count: int, models: int) -> int:
    """How many places of a tensor are sampled."""
    return min(max(count // 2**14, 2**10), 2**15, max(_SAMPLED // models, 2**8))


def _by_bracket(reader: Reader, models: np.ndarray, keep: Sequence[int]) -> Generator[Phase, list[Any], list[Cut | None]]:
    count, runs = reader.count, _runs(reader.count, reader.models)
    brackets = np.tile(np.array([-1, np.inf], reader.wide), (len(models), 1))
    if count > _SMALL:
        within = 6 / math.sqrt(runs * _NEIGHBOURS)  # of all entries, in a bracket
        if within * count * len(models) > _MOST:
            return [None] * len(models)
        [scores] = yield Phase(lambda start, stop, scratch: _sample(reader, runs, False, scratch), [(0, count)])
        brackets = np.stack([_bracket(scores[m], k / count, reader.wide) for m, k in zip(models, keep, strict=True)])
    found, inside = yield from _count(reader, models, brackets, shared=False)
    cuts: list[Cut | None] = []
    for c, k in enumerate(keep):
        kept = None if inside is None else inside[c]
        cuts.append((yield from _cut(reader, models[c], k, brackets[c], found[:, c], kept, shared=False)))
    return cuts


def _sample(reader: Reader, runs: int, shared: bool, scratch: Scratch) -> np.ndarray:
    """Runs of neighbouring magnitudes, evenly spread: [M, runs, neighbours]."""
    stream, _kept = reader.stream(0, reader.count, scratch)
    scores: np.ndarray = np.empty((1 if shared else reader.models, runs, _NEIGHBOURS), reader.wide)
    unused: np.ndarray = np.zeros((len(reader.kinds), 2), np.uint64)
    work = scratch.work(reader.wide, reader.models)
    reader.refuse(kernels.sample_runs(stream, reader.count, shared, unused, scores, work))
    return scores


def _bracket(scores: np.ndarray, share: float, wide: Any, spread: float = 0.0) -> np.ndarray:
    """Magnitudes below and above the one that `share` of a sample `[runs, neighbours]` is above, seldom missing it.

    Neighbours are alike where rows differ in scale, so the sample's error is told from how its runs differ; `spread` is by
    how much the share itself differs from run to run.
    """
    ordered = np.sort(scores, axis=None)
    size = len(ordered)
    place = size * (1 - share)
    above = (scores > ordered[min(int(place), size - 1)]).mean(1)
    error = size * (float(above.std()) + spread) / math.sqrt(len(scores))
    margin = 6 * max(math.sqrt(size * share * (1 - share)), error) + _NEIGHBOURS
    low = ordered[int(place - margin)] if place - margin >= 0 else -1
    high = ordered[math.ceil(place + margin)] if place + margin <= size - 1 else np.inf
    return np.array([low, high], wide)


#: Of each channel the magnitudes that were kept, in parts; None where they were too many.
_Inside = list[list[np.ndarray]] | None


def _count(
    reader: Reader, models: np.ndarray, brackets: np.ndarray, shared: bool
) -> Generator[Phase, list[Any], tuple[np.ndarray, _Inside]]:
    """The counts `[blocks, C, 4]` of `kernels.count_blocks`, and the magnitudes within brackets, in the order of the blocks."""
    channels = len(models)
    found: np.ndarray = np.zeros((len(reader.ranges), channels, 4), np.int64)
    room = [_MOST]  # for all blocks together, give or take what threads count at once

    def task(i: int, j: int, scratch: Scratch) -> list[np.ndarray] | None:
        inside = scratch.buffer("inside", reader.wide, _ROOM, channels)
        work, held = scratch.work(reader.wide, reader.models), np.zeros(channels, np.int64)
        reader.run(kernels.count_blocks, i, j, scratch, shared, models, brackets, inside, held, found[i:j], work)
        room[0] -= int(held.sum())
        if room[0] < 0 or (held >= _ROOM).any():
            room[0] = -1
            return None
        return [inside[c, : held[c]].copy() for c in range(channels)]

    runs = yield Phase(task, reader.runs)
    return found, None if room[0] < 0 else [[run[c] for run in runs if len(run[c])] for c in range(channels)]


def _cut(
    reader: Reader, model: int, k: int, bracket: np.ndarray, found: np.ndarray, inside: list[np.ndarray] | None, shared: bool
) -> Generator[Phase, list[Any], Cut | None]:
    """The cut from what a pass found, `[blocks, 4]`, or None where it isn't within the bracket."""
    above, top, bottom, between = found.sum(0).tolist()
    k -= above
    if k == 0:
        return Cut(float(bracket[1]), 0)
    if 0 < k <= top:
        value, each = float(bracket[1]), found[:, 1]
    elif top < k <= top + between and inside is not None:
        together = np.concatenate(inside)
        value = float(np.partition(together, between - (k - top))[between - (k - top)])
        k -= top + int(np.count_nonzero(~(together <= value)))  # NaN is above all
        blocks = np.searchsorted(found[:, 3].cumsum(), np.flatnonzero(together == value), side="right")
        each = np.bincount(blocks, minlength=len(found))
    elif top + between < k <= top + between + bottom:
        value, each = float(bracket[0]), found[:, 2]
        k -= top + between
    else:
        return None
    return (yield from _end(reader, model, value, k, each.tolist(), shared))


def _end(
    reader: Reader, model: int, value: float, keep: int, each: Sequence[int], shared: bool
) -> Generator[Phase, list[Any], Cut]:
    """The cut at `value` of which `keep` entries are kept, `each` being how many there are in each block."""
    if keep == sum(each):
        return Cut(value, reader.count)
    block, before = 0, 0
    while before + each[block] <= keep:
        before += each[block]
        block += 1

    def task(start: int, stop: int, scratch: Scratch) -> int:
        addresses, _raws = reader.block(start, stop)
        work, sought = scratch.work(reader.wide, reader.models), reader.wide(value)
        return start + kernels.locate(addresses, reader.kinds, stop - start, shared, model, sought, keep - before, work)

    [end] = yield Phase(task, [reader.ranges[block]])
    return Cut(value, end)


def _by_histogram(reader: Reader, models: np.ndarray, keep: Sequence[int], shared: bool) -> Search:
    """Cuts from histograms of the magnitudes' bits, the upper ones first: memory depends on the channels alone."""
    bits = 8 * np.dtype(reader.wide).itemsize
    prefixes: np.ndarray = np.zeros(len(models), np.uint64)
    left = list(keep)
    for shift in range(bits - _WIDTH, -1, -_WIDTH):
        total = Total((len(models), 1 << _WIDTH), np.int64)

        def task(i: int, j: int, scratch: Scratch, shift: int = shift, total: Total = total) -> None:
            counts: np.ndarray = np.zeros((len(models), 1 << _WIDTH), np.int64)
            work = scratch.work(reader.wide, reader.models)
            for start, stop in reader.ranges[i:j]:
                addresses, _raws = reader.block(start, stop)
                n = stop - start
                kernels.histogram(addresses, reader.kinds, n, shared, models, prefixes, shift, _WIDTH, counts, work)
            total.add(i, j, counts)

        yield Phase(task, reader.runs)
        counts = total.value
        for c in range(len(models)):
            above = np.cumsum(counts[c][::-1])[::-1]  # at this bucket or above
            bucket = int(np.flatnonzero(above >= left[c])[-1])
            left[c] -= int(above[bucket] - counts[c][bucket])
            prefixes[c] = (prefixes[c] << np.uint64(_WIDTH)) | np.uint64(bucket)
    kind = np.uint32 if bits == 32 else np.uint64
    values = prefixes.astype(kind).view(reader.wide)
    found, _ = yield from _count(reader, models, np.stack([values, values], 1), shared)
    cuts = []
    for c, value in enumerate(values):
        cuts.append((yield from _end(reader, models[c], float(value), left[c], found[:, c, 1].tolist(), shared)))
    return cuts

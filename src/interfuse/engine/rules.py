"""Trim -> elect -> scale as jobs: find the cuts, the norms where a rule needs them, then one pass that merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import xxhash

from interfuse.checkpoints.source import BLOCK
from interfuse.engine import kernels, selection
from interfuse.engine.kernels import (
    ALL,
    BAND,
    BUCKETS,
    CHUNK,
    FEW,
    RANDOM,
    ROW_BUCKETS,
    SHARED,
    TABLES,
    Ranking,
    Trimming,
    Voting,
)
from interfuse.engine.merging import Merging, noted, reader_of
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Job, Phase, Scratch, Total
from interfuse.methods.forms import Rule, Trim
from interfuse.plan import Call, Output

_TOGETHER = 32  # blocks of long rows that are ranked together
_HOW = {"all": ALL, "largest": BAND, "random": RANDOM, "variance": SHARED}


def job(output: Output, call: Call, merging: Merging) -> Job:
    """The job of an output whose method is a rule."""
    rule = call.made
    assert isinstance(rule, Rule)
    reader = reader_of(output, call, merging)
    keys = keys_of(merging.seed, output.name, reader.models)
    if rule.trim.how == "ranked":
        yield from _ranked(output, rule, reader, keys, merging)
        return
    trimming_ = yield from _trimming(rule.trim, reader, keys, merging.cuts.get(output.name))
    norms = None
    if rule.energy or rule.trim.rescale == "l1":
        norms = yield from _norms(reader, trimming_, sizes=not rule.energy)
    voting = _voting(rule, reader, norms)

    def task(i: int, j: int, scratch: Scratch) -> None:
        merging.compute(output, reader, (i, j), scratch, kernels.merge_blocks, trimming_, voting)

    yield Phase(task, reader.runs)
    yield from noted(reader, merging)


def keys_of(seed: int, name: str, models: int) -> np.ndarray:
    """What chance is drawn by: two numbers for each model, of the seed, the tensor's name and the model's number."""
    hashes = [xxhash.xxh3_128_intdigest(f"{seed}/{model}/{name}".encode()) for model in range(models)]
    return np.array([[h & 0xFFFFFFFF, (h >> 32) & 0xFFFFFFFF] for h in hashes], np.uint32)


def kept(density: float, count: int) -> int:
    """How many of `count` entries a density keeps: at least one, unless it's 0."""
    return min(count, max(1, math.floor(density * count))) if density > 0 else 0


def _trimming(
    trim: Trim, reader: Reader, keys: np.ndarray, known: Sequence[selection.Cut] | None
) -> Generator[Phase, list[Any], Trimming]:
    """How the kernels trim; `known` are cuts that are over more than this tensor."""
    models, count, wide = reader.models, reader.count, reader.wide
    how = _HOW[trim.how]
    lows = highs = [selection.Cut(-1.0, 0)] * models
    highs = [selection.Cut(math.inf, 0)] * models
    if known is not None:
        lows = list(known)
    elif trim.how == "largest" and not all(density >= 1 for density in trim.density):
        targets = [kept(density, count) if density < 1 else count for density in trim.density]
        tops = trim.skip or (0.0,) * models
        skips = [min(math.floor(top * count), count - target) for top, target in zip(tops, targets, strict=True)]
        keep = [*(skip + target for skip, target in zip(skips, targets, strict=True)), *(skip for skip in skips if skip)]
        channels = [*range(models), *(k for k, skip in enumerate(skips) if skip)]
        cuts = yield from selection.largest(reader, channels, keep)
        lows = cuts[:models]
        for k, cut in zip(channels[models:], cuts[models:], strict=True):
            highs[k] = cut
    elif trim.how == "largest":
        how = ALL
    elif trim.how == "variance":
        cut = yield from selection.most_varying(reader, trim.density[0])
        lows = [cut] * models
    cuts_array = np.array([[low.value, high.value] for low, high in zip(lows, highs, strict=True)], wide)
    ends = np.array([[low.end, high.end] for low, high in zip(lows, highs, strict=True)], np.int64)
    chances = np.array(trim.density if trim.how == "random" else [1.0] * models, np.float32)
    return Trimming(how, cuts_array, ends, keys, chances)


def _norms(reader: Reader, trimming_: Trimming, *, sizes: bool) -> Generator[Phase, list[Any], np.ndarray]:
    total = Total((reader.models, 3))

    def task(i: int, j: int, scratch: Scratch) -> None:
        parts: np.ndarray = np.zeros((j - i, reader.models, 3))
        reader.run(kernels.norms_blocks, i, j, scratch, trimming_, sizes, parts, scratch.work(reader.wide, reader.models))
        total.add(i, j, parts.sum(0))

    yield Phase(task, reader.runs)
    return total.value


def _voting(rule: Rule, reader: Reader, norms: np.ndarray | None) -> Voting:
    weights = np.array(rule.weights, np.float64)
    factors = np.ones(reader.models)
    if rule.trim.rescale == "l1" and norms is not None:
        factors = np.divide(norms[:, 0], norms[:, 1], out=np.ones(reader.models), where=norms[:, 1] > 0)
    elif rule.trim.rescale == "density" and rule.trim.how == "random":
        density = np.array(rule.trim.density)
        factors = np.divide(1.0, density, out=np.ones(reader.models), where=density > 0)
    votes = weights * factors
    if rule.energy and norms is not None:
        whole = norms[:, 2].sum()
        shares = norms[:, 2] / whole if whole > 0 else np.full(reader.models, 1 / reader.models)
        votes, weights = np.ones(reader.models), weights * shares
        factors = np.ones(reader.models)
    wide = reader.wide

    def given(numbers: np.ndarray) -> Any:
        numbers = numbers.astype(wide)
        return tuple(numbers) if reader.models <= FEW else numbers

    return Voting(rule.elect, rule.mean, given(votes), given(weights * factors), given(weights), wide(rule.scale))


class _Ranks:
    """How a tensor is gone through by ranks: in blocks of whole rows, or by some rows where a row is longer than one.

    A class, for what both passes of a rule have in common: the numbers of its trim, and the long rows' tables of chances.
    """

    def __init__(self, rule: Rule, reader: Reader, keys: np.ndarray):
        self.reader, self.keys = reader, keys
        self.width = max(reader.shape[-1], 1) if reader.shape else 1
        self.long = self.width > BLOCK
        self.densities = np.array(rule.trim.density, np.float32)
        self.spreads = np.array(rule.trim.spread, np.float32)
        self.divide = rule.trim.rescale == "density"
        self._each = -(-self.width // BLOCK)  # blocks of a long row
        self._tables: dict[int, np.ndarray] = {}  # row -> float32 [M, buckets]

    def phases(self, task: Callable[[int, int, Scratch], None]) -> Generator[Phase, list[Any], None]:
        """Run the task for every run of blocks, once the ranks in its rows are known."""
        if not self.long:
            yield Phase(task, self.reader.runs)
            return
        blocks = len(self.reader.ranges)
        step = self._each * max(1, min(_TOGETHER // self._each, 2 * _TOGETHER // self.reader.models))
        for first in range(0, blocks, step):
            runs = [(i, i + 1) for i in range(first, min(first + step, blocks))]
            yield from self._count(runs)
            yield Phase(task, runs)

    def ranking(self, i: int, scratch: Scratch) -> Ranking:
        """How the kernels rank the blocks from the i-th on."""
        models, wide = self.reader.models, self.reader.wide
        table = self._tables[i // self._each] if self.long else None
        buckets, held = BUCKETS if self.long else ROW_BUCKETS, min(self.width, BLOCK)
        return Ranking(
            self.width, self.long, self.divide, self.densities, self.spreads, self.keys,
            scratch.buffer("counts", np.int32, TABLES * buckets, models).reshape(models, TABLES, -1),
            scratch.buffer("table", np.float32, buckets, models) if table is None else table,
            np.zeros(models, np.int32),
            scratch.buffer("values", wide, held, models), scratch.buffer("places", np.uint16, held, models),
        )  # fmt: skip

    def _count(self, runs: Sequence[tuple[int, int]]) -> Generator[Phase, list[Any], None]:
        """Make the tables of the rows that these blocks are, in place of those of earlier rows."""
        reader = self.reader
        rows = {i // self._each: Total((reader.models, BUCKETS), np.int64) for i, _ in runs}

        def task(i: int, j: int, scratch: Scratch) -> None:
            start, stop = reader.span(i, j)
            addresses, _raws = reader.block(start, stop)
            counts: np.ndarray = np.zeros((reader.models, TABLES, BUCKETS), np.int32)
            places = scratch.buffer("places counted", np.uint16, CHUNK, reader.models)
            kernels.count_ranks(
                addresses, reader.kinds, stop - start, counts, places, scratch.work(reader.wide, reader.models)
            )  # fmt: skip
            row = i // self._each
            rows[row].add(i, j, counts.sum(1), first=row * self._each)

        yield Phase(task, runs)
        self._tables = {row: self._chances(total.value) for row, total in rows.items()}

    def _chances(self, counts: np.ndarray) -> np.ndarray:
        """`counts` `[M, buckets]` of a long row to the chances of being kept; equal magnitudes have their mean rank."""
        twice = 2 * counts.cumsum(1) - counts - 1
        slopes = (2 * self.spreads.astype(np.float64) / (self.width - 1)).astype(np.float32)
        least = self.densities - self.spreads
        found: np.ndarray = least[:, None] + slopes[:, None] * np.float32(0.5) * twice.astype(np.float32)
        return found


def _ranked(output: Output, rule: Rule, reader: Reader, keys: np.ndarray, merging: Merging) -> Job:
    """DELLA: rows that fit a block are ranked as they are merged; of a longer row the ranks are counted first."""
    ranks = _Ranks(rule, reader, keys)
    norms = None
    if rule.trim.rescale == "l1":
        total = Total((reader.models, 3))

        def measure(i: int, j: int, scratch: Scratch) -> None:
            parts: np.ndarray = np.zeros((j - i, reader.models, 3))
            work = scratch.work(reader.wide, reader.models)
            reader.run(kernels.norms_ranked, i, j, scratch, ranks.ranking(i, scratch), parts, work)
            total.add(i, j, parts.sum(0))

        yield from ranks.phases(measure)
        norms = total.value
    voting = _voting(rule, reader, norms)

    def task(i: int, j: int, scratch: Scratch) -> None:
        merging.compute(output, reader, (i, j), scratch, kernels.merge_ranked, ranks.ranking(i, scratch), voting)

    yield from ranks.phases(task)
    yield from noted(reader, merging)

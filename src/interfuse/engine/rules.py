"""Trim -> elect -> scale as jobs: find the cuts, the norms where a rule needs them, then one pass that merges."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
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
from interfuse.engine.scheduler import Job, Phase, Scratch
from interfuse.methods.forms import Rule, Trim
from interfuse.plan import Call, Output

_HOW = {"all": ALL, "largest": BAND, "random": RANDOM, "variance": SHARED}


def job(output: Output, call: Call, merging: Merging) -> Job:
    """The job of an output whose method is a rule."""
    rule = call.made
    assert isinstance(rule, Rule)
    again = rule.energy or rule.trim.rescale == "l1" or rule.trim.how in ("largest", "variance")
    reader = reader_of(output, call, merging, again=again)
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
    parts: np.ndarray = np.zeros((len(reader.ranges), reader.models, 3))

    def task(i: int, j: int, scratch: Scratch) -> None:
        reader.run(kernels.norms_blocks, i, j, scratch, trimming_, sizes, parts[i:j], scratch.work(reader.wide, reader.models))

    yield Phase(task, reader.runs)
    return parts.sum(0)


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
    """How a tensor is gone through by ranks: in blocks of whole rows, or row by row where a row is longer than a block.

    A class, for what both passes of a rule have in common: the numbers of its trim, and a long row's table of chances.
    """

    def __init__(self, rule: Rule, reader: Reader, keys: np.ndarray):
        self.reader, self.keys = reader, keys
        self.width = max(reader.shape[-1], 1) if reader.shape else 1
        self.long = self.width > BLOCK
        self.densities = np.array(rule.trim.density, np.float32)
        self.spreads = np.array(rule.trim.spread, np.float32)
        self.divide = rule.trim.rescale == "density"
        #: The runs of blocks, with the table of the row that each is in, if that is long.
        self.tables: dict[tuple[int, int], np.ndarray | None] = dict.fromkeys(reader.runs)

    def prepare(self) -> Generator[Phase, list[Any], None]:
        """Count the ranks of rows that are longer than a block."""
        if not self.long:
            return
        self.tables = {}
        each = len(self.reader.ranges) * self.width // self.reader.count
        for first in range(0, len(self.reader.ranges), each):
            row = [(i, i + 1) for i in range(first, first + each)]
            self.tables.update(dict.fromkeys(row, (yield from self._table(row))))

    def ranking(self, run: tuple[int, int], scratch: Scratch) -> Ranking:
        """How the kernels rank a run of blocks."""
        models, table, wide = self.reader.models, self.tables[run], self.reader.wide
        buckets, held = BUCKETS if self.long else ROW_BUCKETS, min(self.width, BLOCK)
        return Ranking(
            self.width, self.long, self.divide, self.densities, self.spreads, self.keys,
            scratch.buffer("counts", np.int32, TABLES * buckets, models).reshape(models, TABLES, -1),
            scratch.buffer("table", np.float32, buckets, models) if table is None else table,
            np.zeros(models, np.int32),
            scratch.buffer("values", wide, held, models), scratch.buffer("places", np.uint16, held, models),
        )  # fmt: skip

    def _table(self, row: Sequence[tuple[int, int]]) -> Generator[Phase, list[Any], np.ndarray]:
        """The chances of a row's magnitudes, of which these blocks are the parts."""
        reader = self.reader

        def task(i: int, j: int, scratch: Scratch) -> np.ndarray:
            start, stop = reader.span(i, j)
            addresses, _raws = reader.block(start, stop)
            counts: np.ndarray = np.zeros((reader.models, TABLES, BUCKETS), np.int32)
            places: np.ndarray = np.zeros((reader.models, CHUNK), np.uint16)
            work = scratch.work(reader.wide, reader.models)
            kernels.count_ranks(addresses, reader.kinds, stop - start, counts, places, work)
            return counts

        counts = sum((yield Phase(task, row)), np.zeros((reader.models, TABLES, BUCKETS), np.int32))
        table: np.ndarray = np.empty((reader.models, BUCKETS), np.float32)
        kernels.chances_of(counts, self.densities, self.spreads, self.width, table)
        return table


def _ranked(output: Output, rule: Rule, reader: Reader, keys: np.ndarray, merging: Merging) -> Job:
    """DELLA: rows that fit a block are ranked as they are merged; of a longer row the ranks are counted first."""
    ranks = _Ranks(rule, reader, keys)
    yield from ranks.prepare()
    norms = None
    if rule.trim.rescale == "l1":
        parts: np.ndarray = np.zeros((len(reader.ranges), reader.models, 3))

        def measure(i: int, j: int, scratch: Scratch) -> None:
            work = scratch.work(reader.wide, reader.models)
            reader.run(kernels.norms_ranked, i, j, scratch, ranks.ranking((i, j), scratch), parts[i:j], work)

        yield Phase(measure, list(ranks.tables))
        norms = parts.sum(0)
    voting = _voting(rule, reader, norms)

    def task(i: int, j: int, scratch: Scratch) -> None:
        given = ranks.ranking((i, j), scratch)
        merging.compute(output, reader, (i, j), scratch, kernels.merge_ranked, given, voting)

    yield Phase(task, list(ranks.tables))
    yield from noted(reader, merging)

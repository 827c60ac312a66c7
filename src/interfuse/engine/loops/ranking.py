"""The block loops of DELLA, compiled by Numba: each entry is kept with a probability that rises with its rank in its row.

Magnitudes are ranked by their upper 16 bits, the exponent and 7 more binary places, and equal ones share their mean rank:
a difference of two bfloat16 numbers seldom has more places, and a finer order of others moves a probability by next to
nothing. So ranks come from counting, not from sorting. In a row, what is 16 octaves below the largest counts as one
magnitude; a row that is longer than a block is counted without that floor. Source: https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

import numpy as np

from interfuse.engine.kernels import CHUNK, ROW_BUCKETS
from interfuse.engine.loops.decorators import compiled
from interfuse.engine.loops.numbers import as_bits, below, store
from interfuse.engine.loops.streams import hash_result, place_of, take
from interfuse.engine.loops.trimming import before_wrap, deltas_of, drawn_by, mix, size_of, squares_of, vote_of

_0 = np.float32(0)


@compiled
def _ranked(values, chances, key, other, first, divide, n):  # type: ignore[no-untyped-def]
    """Keep each entry with its own probability; kept ones over it, if `divide`."""
    by, low = drawn_by(key, other, first), np.uint32(first)
    for i in range(n):
        drawn = mix(np.uint32(np.uint32(low + np.uint32(i)) ^ by))
        kept = np.float32(np.int32(drawn >> np.uint32(8))) * np.float32(2**-24) < chances[i]
        values[i] = values[i] if kept else _0
    if divide:
        for i in range(n):
            values[i] /= chances[i]


@compiled
def _look_up(values, table, lowest, chances, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        chances[i] = table[_bucket(values[i], lowest)]


@compiled
def _bucket(value, lowest):  # type: ignore[no-untyped-def]
    size = np.int32(as_bits(np.float32(abs(value))) >> np.uint32(16))
    return np.uint32(size - lowest) if size > lowest else np.uint32(0)  # unsigned: Numba needs no check for a negative


@compiled
def _tally(values, lowest, counts, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        counts[_bucket(values[i], lowest)] += np.int32(1)


@compiled
def _top(values, n):  # type: ignore[no-untyped-def]
    """The bucket of the largest magnitude."""
    top = np.int32(0)
    for i in range(n):
        size = np.int32(as_bits(np.float32(abs(values[i]))) >> np.uint32(16))
        top = max(top, size)
    return top


@compiled
def count_ranks(addresses, kinds, start, n, lowest, counts, work):  # type: ignore[no-untyped-def]
    """Add each delta's magnitudes to `counts` `[M, buckets]`; `lowest` is the bucket that its first counter is."""
    models = len(kinds) - 1
    for at in range(start, start + n, CHUNK):
        m = min(CHUNK, start + n - at)
        deltas_of(addresses, kinds, at, m, work)
        for k in range(models):
            _tally(work[k], lowest[k], counts[k], m)


@compiled
def _tops(addresses, kinds, start, n, lowest, work):  # type: ignore[no-untyped-def]
    """The lowest bucket that a row's counters need, from its largest magnitude."""
    models = len(kinds) - 1
    lowest[:] = 0
    for at in range(start, start + n, CHUNK):
        m = min(CHUNK, start + n - at)
        deltas_of(addresses, kinds, at, m, work)
        for k in range(models):
            lowest[k] = max(lowest[k], _top(work[k], m))
    for k in range(models):
        lowest[k] = max(lowest[k] - (ROW_BUCKETS - 1), 0)


@compiled
def chances_of(counts, densities, spreads, n, table):  # type: ignore[no-untyped-def]
    """`counts` `[M, buckets]` of a row of `n` to the chances `[M, buckets]`, and the counters back to 0."""
    for k in range(counts.shape[0]):
        slope = np.float32(2 * spreads[k] / max(n - 1, 1))
        least = np.float32(densities[k] - spreads[k] if n > 1 else densities[k])
        _to_chances(counts[k], least, slope, table[k])


@compiled
def _to_chances(counts, least, slope, table):  # type: ignore[no-untyped-def]
    twice = np.int32(-1)  # the mean rank of a bucket, doubled
    for b in range(len(counts)):
        twice += counts[b]
        table[b] = least + slope * np.float32(0.5) * np.float32(twice)
        twice += counts[b]
        counts[b] = 0


@compiled
def _prepare(addresses, kinds, start, width, ranking, work):  # type: ignore[no-untyped-def]
    """The chances of a row's magnitudes, unless they're known: the row is longer than a block, and this a part of it."""
    if not ranking.known:
        _tops(addresses, kinds, start, width, ranking.lowest, work)
        count_ranks(addresses, kinds, start, width, ranking.lowest, ranking.counts, work)
        chances_of(ranking.counts, ranking.densities, ranking.spreads, width, ranking.table)


@compiled
def _kept(addresses, kinds, start, n, first, ranking, work):  # type: ignore[no-untyped-def]
    models = len(kinds) - 1
    finite = deltas_of(addresses, kinds, start, n, work)
    for k in range(models):
        _look_up(work[k], ranking.table[k], ranking.lowest[k], work[models + 1], n)
        cut = before_wrap(first + start, n)
        chances = work[models + 1]
        _ranked(work[k], chances, ranking.keys[k, 0], ranking.keys[k, 1], first + start, ranking.divide, cut)
        if cut < n:
            after = first + start + cut
            _ranked(work[k, cut:], chances[cut:], ranking.keys[k, 0], ranking.keys[k, 1], after, ranking.divide, n - cut)
    return finite


@compiled
def merge_ranked(stream, ends, hashes, hashing, ranking, voting, target, limit, work):  # type: ignore[no-untyped-def]
    """Trim, elect and scale blocks, which end where the next begins. 0, or what `take` couldn't read."""
    models = len(stream.kinds) - 1
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        place, finite = place_of(target, ends[b] - ends[0]), True
        for row in range(0, n, min(ranking.width, n)):
            length = min(ranking.width, n)
            _prepare(stream.room, stream.kinds, row, length, ranking, work)
            for start in range(row, row + length, CHUNK):
                m = min(CHUNK, row + length - start)
                finite &= _kept(stream.room, stream.kinds, start, m, ends[b], ranking, work)
                vote_of(voting, models, m, work)
                finite &= below(work[models + 1], limit, m)
                store(work[models + 1], place, target.kind, start, m)
        target.finite[b] = finite
        hash_result(target, b, place, n)
    return 0


@compiled
def norms_ranked(stream, ends, hashes, hashing, ranking, out, work):  # type: ignore[no-untyped-def]
    """Into `out`, float64 `[blocks, M, 3]`, each delta's L1 norm, and its L1 norm and sum of squares once trimmed."""
    models = len(stream.kinds) - 1
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        out[b] = 0
        for row in range(0, n, min(ranking.width, n)):
            length = min(ranking.width, n)
            _prepare(stream.room, stream.kinds, row, length, ranking, work)
            for start in range(row, row + length, CHUNK):
                m = min(CHUNK, row + length - start)
                deltas_of(stream.room, stream.kinds, start, m, work)
                for k in range(models):
                    out[b, k, 0] += size_of(work[k], m)
                _kept(stream.room, stream.kinds, start, m, ends[b], ranking, work)
                for k in range(models):
                    out[b, k, 1] += size_of(work[k], m)
                    out[b, k, 2] += squares_of(work[k], m)
    return 0

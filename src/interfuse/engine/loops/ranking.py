"""The block loops of DELLA, compiled by Numba: each entry is kept with a probability that rises with its rank in its row.

Magnitudes are ranked by their upper 16 bits, the exponent and 7 more binary places, and equal ones share their mean rank:
a difference of two bfloat16 numbers seldom has more places, and a finer order of others moves a probability by next to
nothing. So ranks come from counting, not from sorting. In a row, what is 16 octaves below the largest counts as one
magnitude; a row that is longer than a block is counted without that floor. Source: https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

import numpy as np

from interfuse.engine.kernels import CHUNK, ROW_BUCKETS, TABLES
from interfuse.engine.loops.decorators import compiled
from interfuse.engine.loops.numbers import as_bits, below, load, store
from interfuse.engine.loops.streams import hash_result, place_of, take
from interfuse.engine.loops.trimming import before_wrap, deltas_of, drawn_by, mix, size_of, vote_of

_0 = np.float32(0)


_GROUP = 16  # counters that are looked at together

#: What a chance of 0, which keeps nothing, is divided by.
_LEAST = np.float32(2.0**-100)


@compiled
def _ranked(out, values, chances, key, other, first, divide, n):  # type: ignore[no-untyped-def]
    """Keep each entry with its own probability; kept ones over it, if `divide`."""
    by, low = drawn_by(key, other, first), np.uint32(first)
    for i in range(n):
        drawn = mix(np.uint32(np.uint32(low + np.uint32(i)) ^ by))
        kept = np.float32(np.int32(drawn >> np.uint32(8))) * np.float32(2**-24) < chances[i]
        out[i] = values[i] if kept else _0
    if divide:
        for i in range(n):
            out[i] /= max(chances[i], _LEAST)


@compiled
def _look_up(places, table, lowest, chances, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        chances[i] = table[np.uint32(max(np.int32(places[i]) - lowest, np.int32(0)))]


@compiled
def _placed(values, out, places, n):  # type: ignore[no-untyped-def]
    """A chunk copied, with the upper 16 bits of its magnitudes; the largest of those."""
    top = np.int32(0)
    for i in range(n):
        out[i] = values[i]
        place = np.int32(as_bits(np.float32(abs(values[i]))) >> np.uint32(16))
        places[i] = np.uint16(place)
        top = max(top, place)
    return top


@compiled
def _tally(places, lowest, counts, n):  # type: ignore[no-untyped-def]
    """Count a row's places, in `counts` `[tables, buckets]`."""
    whole = n // TABLES * TABLES
    for i in range(0, whole, TABLES):
        for t in range(TABLES):
            counts[t, np.uint32(max(np.int32(places[i + t]) - lowest, np.int32(0)))] += np.int32(1)
    for i in range(whole, n):
        counts[0, np.uint32(max(np.int32(places[i]) - lowest, np.int32(0)))] += np.int32(1)


@compiled
def count_ranks(addresses, kinds, n, counts, places, work):  # type: ignore[no-untyped-def]
    """Add each delta's magnitudes to `counts` `[M, tables, buckets]`, of a part of a long row; `places` is room for them."""
    models = len(kinds) - 1
    for at in range(0, n, CHUNK):
        m = min(CHUNK, n - at)
        deltas_of(addresses, kinds, at, m, work)
        for k in range(models):
            _placed(work[k], work[k], places[k], m)
            _tally(places[k], np.int32(0), counts[k], m)
    return 0


@compiled
def chances_of(counts, densities, spreads, n, table):  # type: ignore[no-untyped-def]
    """`counts` `[M, tables, buckets]` of a row of `n` to the chances `[M, buckets]` of those that occur; counters back to 0."""
    for k in range(counts.shape[0]):
        slope = np.float32(2 * spreads[k] / max(n - 1, 1))
        least = np.float32(densities[k] - spreads[k] if n > 1 else densities[k])
        _to_chances(counts[k], least, slope, table[k])
    return 0


@compiled
def _to_chances(counts, least, slope, table):  # type: ignore[no-untyped-def]
    twice = np.int32(-1)  # the mean rank of a bucket, doubled
    for start in range(0, counts.shape[1], _GROUP):
        some = np.int32(0)
        for b in range(start, start + _GROUP):
            some |= counts[0, b] | counts[1, b]
        if some:
            for b in range(start, start + _GROUP):
                count = np.int32(counts[0, b] + counts[1, b])
                twice = np.int32(twice + count)
                table[b] = least + slope * np.float32(0.5) * np.float32(twice)
                twice = np.int32(twice + count)
            for t in range(TABLES):
                for b in range(start, start + _GROUP):
                    counts[t, b] = 0


@compiled
def _prepare(addresses, kinds, start, n, ranking, work):  # type: ignore[no-untyped-def]
    """A row's deltas and places, and the chances of these, unless they're known; whether all deltas are finite."""
    models = len(kinds) - 1
    finite = True
    ranking.lowest[:] = 0
    for at in range(0, n, CHUNK):
        m = min(CHUNK, n - at)
        finite &= deltas_of(addresses, kinds, start + at, m, work)
        for k in range(models):
            top = _placed(work[k], ranking.values[k, at:], ranking.places[k, at:], m)
            ranking.lowest[k] = max(ranking.lowest[k], top)
    for k in range(models):
        ranking.lowest[k] = np.int32(0) if ranking.known else max(ranking.lowest[k] - np.int32(ROW_BUCKETS - 1), np.int32(0))
        if not ranking.known:
            _tally(ranking.places[k], ranking.lowest[k], ranking.counts[k], n)
    if not ranking.known:
        chances_of(ranking.counts, ranking.densities, ranking.spreads, n, ranking.table)
    return finite


@compiled
def _keep(at, first, n, ranking, models, work):  # type: ignore[no-untyped-def]
    """The row's entries from `at` on, whose first has the index `first` in its tensor, trimmed into `work[:M]`."""
    cut = before_wrap(first, n)
    for k in range(models):
        chances, values = work[models + 1], ranking.values[k, at:]
        _look_up(ranking.places[k, at:], ranking.table[k], ranking.lowest[k], chances, n)
        key, other = ranking.keys[k, 0], ranking.keys[k, 1]
        _ranked(work[k], values, chances, key, other, first, ranking.divide, cut)
        if cut < n:
            _ranked(work[k, cut:], values[cut:], chances[cut:], key, other, first + cut, ranking.divide, n - cut)


@compiled
def merge_ranked(stream, ends, hashes, hashing, ranking, voting, target, limit, work):  # type: ignore[no-untyped-def]
    """Trim, elect and scale blocks, which end where the next begins. 0, or what `take` couldn't read."""
    models = len(stream.kinds) - 1
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        place, finite, length = place_of(target, ends[b] - ends[0]), True, min(ranking.width, n)
        for row in range(0, n, length):
            finite &= _prepare(stream.room, stream.kinds, row, length, ranking, work)
            for at in range(0, length, CHUNK):
                m = min(CHUNK, length - at)
                _keep(at, ends[b] + row + at, m, ranking, models, work)
                load(work[models], stream.room[0], stream.kinds[0], row + at, m)
                vote_of(voting, models, m, work)
                finite &= below(work[models + 1], limit, m)
                store(work[models + 1], place, target.kind, row + at, m)
        target.finite[b] = finite
        hash_result(target, b, place, n)
    return 0


@compiled
def norms_ranked(stream, ends, hashes, hashing, ranking, out, work):  # type: ignore[no-untyped-def]
    """Into `out`, float64 `[blocks, M, 3]`, each delta's L1 norm before and after it is trimmed; the last is unused."""
    models = len(stream.kinds) - 1
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        out[b], length = 0, min(ranking.width, n)
        for row in range(0, n, length):
            _prepare(stream.room, stream.kinds, row, length, ranking, work)
            for at in range(0, length, CHUNK):
                m = min(CHUNK, length - at)
                _keep(at, ends[b] + row + at, m, ranking, models, work)
                for k in range(models):
                    out[b, k, 0] += size_of(ranking.values[k, at:], m)
                    out[b, k, 1] += size_of(work[k], m)
    return 0

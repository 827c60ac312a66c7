"""Counting magnitudes: above, at and within a bracket, by their bits, and where one that is sought comes."""

from __future__ import annotations

import numpy as np
from numba import carray

from interfuse.engine.kernels import CHUNK
from interfuse.engine.loops.decorators import compiled
from interfuse.engine.loops.numbers import bits_of, pointer
from interfuse.engine.loops.streams import take
from interfuse.engine.loops.trimming import deltas_of, variance_of

_SCAN = 32  # entries that are looked at together, for few of them are sought


@compiled
def _scores(addresses, kinds, shared, start, n, work):  # type: ignore[no-untyped-def]
    """What entries are chosen by, into `work[:M]`: the deltas, or into `work[0]` alone their variance."""
    models = len(kinds) - 1
    deltas_of(addresses, kinds, start, n, work)
    if shared:
        variance_of(work, models, work[models + 2], work[models + 1], n)
        for i in range(n):
            work[0, i] = work[models + 1, i]


@compiled
def sample(addresses, kinds, shared, stride, out, work):  # type: ignore[no-untyped-def]
    """Runs of 16 scores each `stride` elements, into `out` `[channels, S]`, as magnitudes."""
    channels = out.shape[0]
    for run in range(out.shape[1] // 16):
        _scores(addresses, kinds, shared, run * stride, 16, work)
        for c in range(channels):
            for i in range(16):
                out[c, 16 * run + i] = abs(work[c, i])


@compiled
def sample_runs(stream, count, shared, hashes, out, work):  # type: ignore[no-untyped-def]
    """Runs of neighbouring scores, evenly spread over `count` elements, into `out` `[channels, runs, length]`."""
    channels, runs, length = out.shape
    stride = count // runs
    for run in range(runs):
        failed = take(stream, 0, run * stride, length, hashes, False)
        if failed:
            return failed
        _scores(stream.room, stream.kinds, shared, 0, length, work)
        for c in range(channels):
            for i in range(length):
                out[c, run, i] = abs(work[c, i])
    return 0


@compiled
def count_blocks(stream, ends, hashes, hashing, shared, model, brackets, inside, held, found, work):  # type: ignore[no-untyped-def]
    """How the magnitudes of blocks stand to a bracket each: `model[c]` says whose, `brackets[c]` is low and high.

    `found` `[blocks, C, 4]` becomes how many are above high, at high, at low, and between: the last are put into `inside[c]`
    one block after the other, as far as they fit and a place stays free; `held` counts them, from 0. A bracket with
    low = high has all its entries at high.
    """
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        found[b] = 0
        for start in range(0, n, CHUNK):
            m = min(CHUNK, n - start)
            _scores(stream.room, stream.kinds, shared, start, m, work)
            for c in range(len(model)):
                scores, low, high = work[model[c]], brackets[c, 0], brackets[c, 1]
                above, top, bottom, between = _compare(scores, low, high, m)
                found[b, c, 0] += above
                found[b, c, 1] += top
                found[b, c, 2] += bottom
                found[b, c, 3] += between
                if between and held[c] + between < inside.shape[1]:
                    _collect(scores, low, high, m, inside[c, held[c] :], work[len(stream.kinds) + 2])
                held[c] += between
    return 0


@compiled
def _compare(scores, low, high, n):  # type: ignore[no-untyped-def]
    """How many are above, at high, at low, between. Counted in 32 bits: so many lanes does a vector have."""
    above, top, bottom, under = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    if low == high:
        for i in range(n):
            above = np.uint32(above + np.uint32(abs(scores[i]) > high))
            top = np.uint32(top + np.uint32(abs(scores[i]) == high))
        return np.int64(above), np.int64(top), np.int64(0), np.int64(0)
    for i in range(n):
        score = abs(scores[i])
        above = np.uint32(above + np.uint32(score > high))
        top = np.uint32(top + np.uint32(score == high))
        bottom = np.uint32(bottom + np.uint32(score == low))
        under = np.uint32(under + np.uint32(score < low))
    between = n - np.int64(above) - np.int64(top) - np.int64(bottom) - np.int64(under)
    return np.int64(above), np.int64(top), np.int64(bottom), between


@compiled
def _collect(scores, low, high, n, out, flags):  # type: ignore[no-untyped-def]
    """The magnitudes that are between the two, in order; `flags` is a chunk to note in which they are."""
    place = np.uint64(flags.ctypes.data)
    marks, words = carray(pointer(place), CHUNK, np.uint8), carray(pointer(place), CHUNK // 8, np.uint64)
    for i in range(n):
        marks[i] = np.uint8((not abs(scores[i]) <= low) & (not abs(scores[i]) >= high))  # NaN is counted, and kept, too
    for i in range(n, (n + 7) // 8 * 8):
        marks[i] = np.uint8(0)
    at = np.int64(0)
    for w in range((n + 7) // 8):
        if words[w]:
            for i in range(8 * w, min(8 * w + 8, n)):
                out[at] = abs(scores[i])  # without a branch: the next one overwrites it where it isn't between
                at += np.int64(marks[i])


@compiled
def histogram(addresses, kinds, n, shared, model, prefixes, shift, width, counts, work):  # type: ignore[no-untyped-def]
    """Add to `counts` `[C, 2^width]` the magnitudes by the `width` bits of theirs from `shift` up, below a prefix each.

    Magnitudes are seen as their bits, which are ordered as they are. Only those count whose higher bits are the prefix.
    """
    mask = np.uint64((1 << width) - 1)
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        _scores(addresses, kinds, shared, start, m, work)
        for c in range(len(model)):
            scores = work[model[c]]  # no new array: code that is kept has nothing to allocate one with
            for i in range(m):
                bits = bits_of(abs(scores[i])) >> np.uint64(shift)
                if bits >> np.uint64(width) == prefixes[c]:
                    counts[c, bits & mask] += 1


@compiled
def locate(addresses, kinds, n, shared, model, value, nth, work):  # type: ignore[no-untyped-def]
    """The index in a block of the entry that comes after the first `nth` whose magnitude is just `value`."""
    seen = 0
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        _scores(addresses, kinds, shared, start, m, work)
        for i in range(m):
            if abs(work[model, i]) == value:
                if seen == nth:
                    return start + i
                seen += 1
    return n


@compiled
def tally(addresses, kinds, n, models, of, low, high, shift, wide, counts, work):  # type: ignore[no-untyped-def]
    """Add to `counts` `[groups, buckets + 1]` a block's magnitudes: those in a span by their bits, and, last, those above."""
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        deltas_of(addresses, kinds, start, m, work)
        for c in range(len(models)):
            _count_bits(work[models[c]], low[c], high[c], shift[c], wide, m, counts[of[c]])


@compiled
def _count_bits(values, low, high, shift, wide, n, counts):  # type: ignore[no-untyped-def]
    for start in range(0, n, _SCAN):
        stop = min(start + _SCAN, n)
        above, some = 0, 0
        for i in range(start, stop):
            bits = _bits(values[i], wide)
            above += bits >= high
            some += (bits >= low) & (bits < high)
        counts[len(counts) - 1] += above
        if some:
            for i in range(start, stop):
                bits = _bits(values[i], wide)
                if low <= bits < high:
                    counts[(bits - low) >> shift] += 1


@compiled
def _bits(value, wide):  # type: ignore[no-untyped-def]
    """A magnitude's bits, as a float64's if `wide`; NaN counts as 0."""
    bits = bits_of(np.float64(abs(value))) if wide else bits_of(abs(value))
    return bits if value == value else np.uint64(0)


@compiled
def count_at(addresses, kinds, n, sought, counts, work):  # type: ignore[no-untyped-def]
    """Add to `counts` `[M]` how many entries of each delta have just that magnitude."""
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        deltas_of(addresses, kinds, start, m, work)
        for k in range(len(sought)):
            for i in range(m):
                counts[k] += abs(work[k, i]) == sought[k]

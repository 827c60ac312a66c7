"""Trim -> elect -> scale: deltas are trimmed, vote on signs, and are added up.

Which entries are kept is exact: a cut is a magnitude and the index up to which entries of just that magnitude are kept.
Chance is counter-based: whether an entry is kept depends on the tensor's and model's key and on the entry's index alone.
Sources: TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099, SCE https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from interfuse.engine.kernels import BAND, CHUNK, RANDOM, SHARED
from interfuse.engine.loops.decorators import compiled, compiled_sum
from interfuse.engine.loops.numbers import after, below, load, load_less, store
from interfuse.engine.loops.streams import hash_result, place_of, take

_0, _1 = np.float32(0), np.float32(1)  # a plain 0 would make the arithmetic float64


@compiled
def mix(x):  # type: ignore[no-untyped-def]
    """A bijection of 32 bits in which each bit of the input reaches every bit of the output."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0xD35A2D97))
    return np.uint32(x ^ (x >> np.uint32(15)))


@compiled
def drawn_by(key, other, first):  # type: ignore[no-untyped-def]
    """What an index is mixed with, for the draws of a model's tensor from element `first` on."""
    return mix(np.uint32(mix(np.uint32(np.uint32(np.uint64(first) >> np.uint64(32)) + key)) + other))


@compiled
def before_wrap(first, n):  # type: ignore[no-untyped-def]
    """How many of `n` entries from `first` on have the same upper half of their index, which is drawn by."""
    return min(n, 2**32 - (first & (2**32 - 1)))


@compiled
def _random(values, key, other, first, chance, n):  # type: ignore[no-untyped-def]
    """Keep each entry with probability `chance`, a multiple of 2^-24: by a number that its index is mixed to."""
    by, low = drawn_by(key, other, first), np.uint32(first)
    limit = np.uint32(np.ceil(chance * np.float32(2**24)))
    for i in range(n):
        drawn = mix(np.uint32(np.uint32(low + np.uint32(i)) ^ by))
        values[i] = values[i] if np.uint32(drawn >> np.uint32(8)) < limit else _0


@compiled
def _from_on(cut, end, first, n):  # type: ignore[no-untyped-def]
    """The least magnitude that is kept in a chunk; NaN where of those at the cut only some are."""
    if end >= first + n:
        return cut
    return after(cut) if end <= first else cut * np.float32(np.nan)


@compiled
def _band(values, cuts, ends, first, n):  # type: ignore[no-untyped-def]
    """Keep the entries whose magnitude is from the low cut on to below the high one."""
    low, high = _from_on(cuts[0], ends[0], first, n), _from_on(cuts[1], ends[1], first, n)
    if low == low and high == high:
        for i in range(n):
            score = abs(values[i])
            values[i] = values[i] if (score >= low) & (score < high) else _0
    else:
        _split(values, cuts, ends, first, n)


@compiled
def _split(values, cuts, ends, first, n):  # type: ignore[no-untyped-def]
    """`_band` of a chunk in which a cut ends."""
    low, high = cuts[0], cuts[1]
    until = np.int32(min(max(ends[0] - first, 0), n))
    since = np.int32(min(max(ends[1] - first, 0), n))
    for i in range(n):
        score, place = abs(values[i]), np.int32(i)
        above = (score > low) | ((score == low) & (place < until))
        inside = (score < high) | ((score == high) & (place >= since))
        values[i] = values[i] if above & inside else _0


@compiled
def _shared(values, scores, cuts, ends, first, n):  # type: ignore[no-untyped-def]
    """Keep the entries whose score, in another chunk, is from the low cut on."""
    low, until = cuts[0], np.int32(min(max(ends[0] - first, 0), n))
    for i in range(n):
        kept = (scores[i] > low) | ((scores[i] == low) & (np.int32(i) < until))
        values[i] = values[i] if kept else _0


@compiled
def variance_of(deltas, models, mean, out, n):  # type: ignore[no-untyped-def]
    """The variance over the models at each place."""
    for i in range(n):
        mean[i] = 0
        out[i] = 0
    for k in range(models):
        _add(deltas[k], _1, mean, n)
    for i in range(n):
        mean[i] /= np.float32(models)
    for k in range(models):
        _add_square(deltas[k], mean, out, n)


@compiled
def _add_square(values, mean, out, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        out[i] += (values[i] - mean[i]) * (values[i] - mean[i])


@compiled
def deltas_of(addresses, kinds, start, n, work):  # type: ignore[no-untyped-def]
    """The base into `work[M]`, and the models' differences from it into `work[:M]`; whether these are finite."""
    models = len(kinds) - 1
    finite = True
    load(work[models], addresses[0], kinds[0], start, n)
    for k in range(models):
        finite &= load_less(work[k], work[models], addresses[k + 1], kinds[k + 1], start, n)
    return finite


@compiled
def _trim(how, cuts, ends, keys, chances, models, first, n, work):  # type: ignore[no-untyped-def]
    """Set to 0 the entries of `work[:M]` that aren't kept."""
    if how == BAND:
        for k in range(models):
            _band(work[k], cuts[k], ends[k], first, n)
    elif how == RANDOM:
        cut = before_wrap(first, n)
        for k in range(models):
            _random(work[k], keys[k, 0], keys[k, 1], first, chances[k], cut)
            if cut < n:
                _random(work[k, cut:], keys[k, 0], keys[k, 1], first + cut, chances[k], n - cut)
    elif how == SHARED:
        variance_of(work, models, work[models + 2], work[models + 1], n)
        for k in range(models):
            _shared(work[k], work[models + 1], cuts[k], ends[k], first, n)


def vote_of(voting, models, n, work):  # type: ignore[no-untyped-def]
    """The base plus the elected, scaled sum of `work[:M]`, into `work[M + 1]`."""


@overload(vote_of)
def _vote_of(voting, models, n, work):  # type: ignore[no-untyped-def]
    few = isinstance(voting.types[2], types.BaseTuple)  # of tuples the length is known: loops over models are unrolled
    vote = _vote_few if few else _vote_many
    return lambda voting, models, n, work: vote(voting, models, n, work)


@compiled
def _vote_few(voting, models, n, work):  # type: ignore[no-untyped-def]
    base, result = work[models], work[models + 1]
    if voting.elect and voting.mean:
        _mean_elected(work, voting.votes, voting.scales, voting.weights, voting.factor, base, result, n)
    elif voting.elect:
        _sum_elected(work, voting.votes, voting.scales, voting.factor, base, result, n)
    else:
        _sum_all(work, voting.scales, voting.factor, base, result, n)


@compiled
def _mean_elected(work, votes, scales, weights, factor, base, result, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        total, divisor, summed = _0 * base[i], _0 * base[i], _0 * base[i]
        for k in range(len(votes)):
            total += votes[k] * work[k, i]
        sign = _1 if total >= 0 else -_1
        for k in range(len(votes)):
            agrees = work[k, i] * sign * sign_of(votes[k]) > 0
            summed += scales[k] * work[k, i] if agrees else _0
            divisor += weights[k] if agrees else _0
        result[i] = base[i] + factor * (summed / (divisor if divisor != 0 else _1))


@compiled
def _sum_elected(work, votes, scales, factor, base, result, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        total, summed = _0 * base[i], _0 * base[i]
        for k in range(len(votes)):
            total += votes[k] * work[k, i]
        sign = _1 if total >= 0 else -_1
        for k in range(len(votes)):
            summed += scales[k] * work[k, i] if work[k, i] * sign * sign_of(votes[k]) > 0 else _0
        result[i] = base[i] + factor * summed


@compiled
def _sum_all(work, scales, factor, base, result, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        summed = _0 * base[i]
        for k in range(len(scales)):
            summed += scales[k] * work[k, i]
        result[i] = base[i] + factor * summed


@compiled
def sign_of(value):  # type: ignore[no-untyped-def]
    """1, -1 or 0."""
    return _1 if value > 0 else -_1 if value < 0 else _0


@compiled
def _vote_many(voting, models, n, work):  # type: ignore[no-untyped-def]
    base, result, sign, divisor = work[models], work[models + 1], work[models + 2], work[models + 3]
    for i in range(n):
        result[i] = 0
        sign[i] = 0
        divisor[i] = 0
    if voting.elect:
        for k in range(models):
            _add(work[k], voting.votes[k], sign, n)
        _signs(sign, n)
        for k in range(models):
            vote, scale, weight = voting.votes[k], voting.scales[k], voting.weights[k]
            _add_agreeing(work[k], sign, vote, scale, weight, result, divisor, n)
        if voting.mean:
            _divide(result, divisor, n)
    else:
        for k in range(models):
            _add(work[k], voting.scales[k], result, n)
    _onto(result, base, voting.factor, n)


@compiled
def _add(values, scale, result, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] += scale * values[i]


@compiled
def _signs(sums, n):  # type: ignore[no-untyped-def]
    """1 where a weighted sum is 0 or more, else -1."""
    for i in range(n):
        sums[i] = _1 if sums[i] >= 0 else -_1


@compiled
def _add_agreeing(values, sign, vote, scale, weight, result, divisor, n):  # type: ignore[no-untyped-def]
    """Add what has the elected sign, and its weight."""
    one = sign_of(vote)
    for i in range(n):
        agrees = values[i] * sign[i] * one > 0
        result[i] += scale * values[i] if agrees else _0
        divisor[i] += weight if agrees else _0


@compiled
def _divide(result, divisor, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] /= divisor[i] if divisor[i] != 0 else _1


@compiled
def _onto(result, base, factor, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] = base[i] + factor * result[i]


@compiled
def merge_blocks(stream, ends, hashes, hashing, trimming, voting, target, limit, work):  # type: ignore[no-untyped-def]
    """Trim, elect and scale blocks, which end where the next begins. 0, or what `take` couldn't read."""
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        place = place_of(target, ends[b] - ends[0])
        target.finite[b] = _merge(stream.room, stream.kinds, ends[b], n, trimming, voting, place, target.kind, limit, work)
        hash_result(target, b, place, n)
    return 0


@compiled
def _merge(addresses, kinds, first, n, trimming, voting, out, out_kind, limit, work):  # type: ignore[no-untyped-def]
    """A block whose first element has the index `first`; whether all results are finite."""
    models = len(kinds) - 1
    finite = True
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        finite &= deltas_of(addresses, kinds, start, m, work)  # a trim might drop what isn't
        _trim(trimming.how, trimming.cuts, trimming.ends, trimming.keys, trimming.chances, models, first + start, m, work)
        vote_of(voting, models, m, work)
        finite &= below(work[models + 1], limit, m)
        store(work[models + 1], out, out_kind, start, m)
    return finite


@compiled
def norms_blocks(stream, ends, hashes, hashing, trimming, sizes, out, work):  # type: ignore[no-untyped-def]
    """Into `out`, float64 `[blocks, M, 3]`, each delta's sum of squares once trimmed, or its L1 norm before and after."""
    models = len(stream.kinds) - 1
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        out[b] = 0
        for start in range(0, n, CHUNK):
            m, at = min(CHUNK, n - start), ends[b] + start
            deltas_of(stream.room, stream.kinds, start, m, work)
            if sizes:
                for k in range(models):
                    out[b, k, 0] += size_of(work[k], m)
            _trim(trimming.how, trimming.cuts, trimming.ends, trimming.keys, trimming.chances, models, at, m, work)
            for k in range(models):
                if sizes:
                    out[b, k, 1] += size_of(work[k], m)
                else:
                    out[b, k, 2] += squares_of(work[k], m)
    return 0


@compiled_sum
def size_of(values, n):  # type: ignore[no-untyped-def]
    """The L1 norm of a chunk."""
    total = 0.0
    for i in range(n):
        total += np.float64(abs(values[i]))
    return total


@compiled_sum
def squares_of(values, n):  # type: ignore[no-untyped-def]
    """The sum of squares of a chunk."""
    total = 0.0
    for i in range(n):
        total += np.float64(values[i]) * np.float64(values[i])
    return total

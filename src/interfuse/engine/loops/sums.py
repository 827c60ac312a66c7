"""Weighted sums and inner products of a tensor's inputs. Results don't depend on how blocks are gathered in runs."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from interfuse.engine.kernels import CHUNK
from interfuse.engine.loops.decorators import compiled, compiled_sum
from interfuse.engine.loops.numbers import below, load, load_less, store
from interfuse.engine.loops.streams import hash_result, place_of, take


def _combined(result, inputs, coefficients, total, n):  # type: ignore[no-untyped-def]
    """total t_0 + sum c_i (t_i - t_0) of the chunks `inputs` `[M]`; whether all is below the limit."""


@overload(_combined)
def _combined_of(result, inputs, coefficients, total, n):  # type: ignore[no-untyped-def]
    few = isinstance(coefficients, types.BaseTuple)  # of a tuple the length is known: the loop over inputs is unrolled
    combine = _combine_few if few else _combine_many
    return lambda result, inputs, coefficients, total, n: combine(result, inputs, coefficients, total, n)


@compiled
def _combine_few(result, inputs, coefficients, total, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        anchor = inputs[0, i]
        summed = total * anchor
        for k in range(1, len(coefficients)):
            less = anchor - inputs[k, i] if coefficients[k] > 0 else inputs[k, i] - anchor
            summed -= abs(coefficients[k]) * less
        result[i] = summed


@compiled
def _combine_many(result, inputs, coefficients, total, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] = total * inputs[0, i]
    for k in range(1, len(coefficients)):
        if coefficients[k] > 0:
            _less(result, abs(coefficients[k]), inputs[0], inputs[k], n)
        else:
            _less(result, abs(coefficients[k]), inputs[k], inputs[0], n)


@compiled
def _less(result, size, anchor, other, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] -= size * (anchor[i] - other[i])


@compiled
def _sum(addresses, kinds, coefficients, total, n, out, out_kind, limit, work):  # type: ignore[no-untyped-def]
    """Of one block; whether all is finite. The base that is 0 comes first, and is all there is if there are no inputs."""
    inputs = max(len(kinds) - 1, 1)
    first = len(kinds) - inputs
    result, finite = work[inputs], True
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        for k in range(inputs):
            load(work[k], addresses[first + k], kinds[first + k], start, m)
        _combined(result, work, coefficients, total, m)
        finite &= below(result, limit, m)
        store(result, out, out_kind, start, m)
    return finite


@compiled
def sum_blocks(  # type: ignore[no-untyped-def]
    stream, ends, hashes, hashing, coefficients, total, target, limit, work
):
    """total t_0 + sum c_i (t_i - t_0): equal inputs cancel exactly, whatever the coefficients.

    The differences are taken so that they are +0 where inputs are equal, and subtracted: a -0 then keeps its sign. The
    blocks end where the next begins. 0, or what `take` couldn't read.
    """
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        place = place_of(target, ends[b] - ends[0])
        target.finite[b] = _sum(stream.room, stream.kinds, coefficients, total, n, place, target.kind, limit, work)
        hash_result(target, b, place, n)
    return 0


@compiled
def gram_blocks(stream, ends, hashes, hashing, out, work):  # type: ignore[no-untyped-def]
    """Into `out`, float64 `[blocks, M, M]`, the inner products of the M inputs after the first, each less the first."""
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], hashing)
        if failed:
            return failed
        out[b] = 0
        _gram(stream.room, stream.kinds, n, out[b], work)
    return 0


@compiled
def _gram(addresses, kinds, n, out, work):  # type: ignore[no-untyped-def]
    models = len(kinds) - 1
    base = work[models]
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        load(base, addresses[0], kinds[0], start, m)
        for k in range(models):
            load_less(work[k], base, addresses[k + 1], kinds[k + 1], start, m)
        if models == 2:
            _two(work[0], work[1], m, out)
        elif models == 3:
            _three(work[0], work[1], work[2], m, out)
        else:
            for k in range(models):
                for j in range(k + 1):
                    out[k, j] += _inner(work[k], work[j], m)
    for k in range(models):
        for j in range(k):
            out[j, k] = out[k, j]


@compiled_sum
def _inner(a, b, n):  # type: ignore[no-untyped-def]
    """The inner product of two chunks, in float64."""
    total = 0.0
    for i in range(n):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled_sum
def _two(a, b, n, out):  # type: ignore[no-untyped-def]
    """All three inner products of two chunks, each element converted once."""
    aa, ab, bb = 0.0, 0.0, 0.0
    for i in range(n):
        x, y = np.float64(a[i]), np.float64(b[i])
        aa += x * x
        ab += x * y
        bb += y * y
    out[0, 0] += aa
    out[1, 0] += ab
    out[1, 1] += bb


@compiled_sum
def _three(a, b, c, n, out):  # type: ignore[no-untyped-def]
    """The same of three: the common cases, at twice the speed."""
    aa, ab, ac, bb, bc, cc = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        x, y, z = np.float64(a[i]), np.float64(b[i]), np.float64(c[i])
        aa += x * x
        ab += x * y
        ac += x * z
        bb += y * y
        bc += y * z
        cc += z * z
    out[0, 0] += aa
    out[1, 0] += ab
    out[2, 0] += ac
    out[1, 1] += bb
    out[2, 1] += bc
    out[2, 2] += cc

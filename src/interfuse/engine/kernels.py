"""The block loops that a CPU spends its time in, compiled by Numba: load, sum, store. No decision is made here.

A block is given by its address and stored type, so that one compiled kernel serves every mix of types, and is worked
through in chunks that stay in the first-level cache: each step is a plain loop over a chunk, which LLVM turns into vector
instructions. `work` is scratch made once a thread, float32, or float64 where an input is float64: its type is that of all
arithmetic. Formats: IEEE 754-2019; bfloat16 as in https://arxiv.org/abs/1905.12322. Kernels hold no lock, and their
results don't depend on how a tensor is cut into runs of blocks; sums are per block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from interfuse.engine.compiling import compiled, compiled_sum
from interfuse.engine.streams import SHORT, take, xxh3

CHUNK = 512  # elements
#: The stored types that are merged by arithmetic, by the numbers that kernels know them by; ZERO stands for no base.
KINDS = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
ZERO = 255


class Target(NamedTuple):
    """Where a run's results go, with one entry a block in the arrays."""

    address: Any  # uint64
    kind: Any  # uint8
    size: Any  # int64: bytes of an element
    finite: np.ndarray  # bool: whether all of a block's results are
    hashes: np.ndarray  # uint64 [blocks, 2]
    lanes: np.ndarray  # uint64 [LANES], to hash in


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uint64), build


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def as_bits(context: Any, value: Any) -> Any:
    """A float32's bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def after(context: Any, value: Any) -> Any:
    """The next number above a positive one; infinity is its own."""
    width = 32 if value == types.float32 else 64

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, kind = arguments[0], arguments[0].type
        bits = builder.add(builder.bitcast(number, ir.IntType(width)), ir.Constant(ir.IntType(width), 1))
        last = builder.fcmp_ordered("==", number, ir.Constant(kind, float("inf")))
        return builder.select(last, number, builder.bitcast(bits, kind))

    return value(value), build


@intrinsic
def bits_of(context: Any, value: Any) -> Any:
    """A number's bits as a uint64; those of numbers from 0 up are ordered as the numbers are."""
    width = 32 if value == types.float32 else 64

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(width))
        return builder.zext(bits, ir.IntType(64)) if width == 32 else bits

    return types.uint64(value), build


@compiled
def load(out, address, kind, start, n):  # type: ignore[no-untyped-def]
    """Elements `start`.. of the block at `address` into `out`."""
    if kind == 0:
        bf16 = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            out[i] = as_float(np.uint32(np.uint32(bf16[i]) << np.uint32(16)))
    elif kind == 1:
        f16 = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            half = np.uint32(f16[i])
            rest = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
            bits = as_bits(as_float(rest) * as_float(np.uint32(0x77800000)))  # times 2^112: other exponents' bias
            bits = np.uint32(bits | np.uint32(0x7F800000)) if rest >= np.uint32(0x0F800000) else bits
            out[i] = as_float(np.uint32(bits | ((half & np.uint32(0x8000)) << np.uint32(16))))
    elif kind == 2:
        f32 = carray(_pointer(np.uint64(address + np.uint64(4 * start))), CHUNK, np.float32)
        for i in range(n):
            out[i] = f32[i]
    elif kind == 3:
        f64 = carray(_pointer(np.uint64(address + np.uint64(8 * start))), CHUNK, np.float64)
        for i in range(n):
            out[i] = f64[i]
    else:
        for i in range(n):
            out[i] = 0


@compiled
def _odd(value):  # type: ignore[no-untyped-def]
    """float64 to float32's bits such that a second rounding gives what one would: inexact results get an odd last place."""
    near = np.float32(value)
    bits = as_bits(near)
    inexact = np.isfinite(near) and np.float64(near) != value
    above = abs(np.float64(near)) > abs(np.float64(value))
    bits = np.uint32(bits - np.uint32(inexact and above))
    return np.uint32(bits | np.uint32(inexact))


def _rounded(value):  # type: ignore[no-untyped-def]
    """The bits that a number of the arithmetic is rounded from: a float32's own."""


@overload(_rounded)
def _rounded_of(value):  # type: ignore[no-untyped-def]
    return (lambda value: as_bits(value)) if value == types.float32 else (lambda value: _odd(value))


@compiled
def store(values, address, kind, start, n):  # type: ignore[no-untyped-def]
    """A chunk of results, each rounded once to the nearest, ties to even."""
    if kind == 0:
        bf16 = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            bits = _rounded(values[i])
            # Just under half of the last place kept, and the rest of the half where that place is odd.
            up = np.uint32(np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            bf16[i] = np.uint16(np.uint32(bits + up) >> np.uint32(16))
    elif kind == 1:
        f16 = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            f16[i] = _half(_rounded(values[i]))
    elif kind == 2:
        f32 = carray(_pointer(np.uint64(address + np.uint64(4 * start))), CHUNK, np.float32)
        for i in range(n):
            f32[i] = values[i]
    else:
        f64 = carray(_pointer(np.uint64(address + np.uint64(8 * start))), CHUNK, np.float64)
        for i in range(n):
            f64[i] = values[i]


@compiled
def _half(bits):  # type: ignore[no-untyped-def]
    """A float32's bits rounded to float16's."""
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    # Below 2^-14: adding 0.5 lets the hardware round to multiples of 2^-24, which are the bits wanted.
    small = np.uint32(as_bits(as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000))
    odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
    usual = np.uint32(np.uint32(size + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))  # the bias from 127 to 15
    result = small if size < np.uint32(0x38800000) else usual
    result = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else result
    return np.uint16(result | sign)


@compiled
def below(values, limit, n):  # type: ignore[no-untyped-def]
    """Whether all of a chunk is below `limit` in size, from which on the output's type has only infinity."""
    wrong = np.uint32(0)
    for i in range(n):
        wrong = np.uint32(wrong | np.uint32(not abs(values[i]) < limit))
    return wrong == 0


@compiled
def _anchored(result, anchor, total, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] = total * anchor[i]


@compiled
def _less(result, size, anchor, other, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        result[i] -= size * (anchor[i] - other[i])


@compiled
def _less_bf16(result, size, anchor, address, start, n):  # type: ignore[no-untyped-def]
    """`_less` of what is loaded on the way: the common case, with a pass over the chunk less."""
    other = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
    for i in range(n):
        result[i] -= size * (anchor[i] - as_float(np.uint32(np.uint32(other[i]) << np.uint32(16))))


@compiled
def _more_bf16(result, size, anchor, address, start, n):  # type: ignore[no-untyped-def]
    other = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
    for i in range(n):
        result[i] -= size * (as_float(np.uint32(np.uint32(other[i]) << np.uint32(16))) - anchor[i])


@compiled
def _sum(addresses, kinds, coefficients, total, n, out, out_kind, limit, work):  # type: ignore[no-untyped-def]
    result, anchor, other = work[0], work[1], work[2]
    finite, some = True, len(kinds) > 1
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        load(anchor, addresses[int(some)], kinds[int(some)], start, m)  # without any, the base that is 0
        _anchored(result, anchor, total, m)
        for k in range(2, len(kinds)):
            size = abs(coefficients[k])
            if kinds[k] == 0 and coefficients[k] > 0:
                _less_bf16(result, size, anchor, addresses[k], start, m)
            elif kinds[k] == 0:
                _more_bf16(result, size, anchor, addresses[k], start, m)
            else:
                load(other, addresses[k], kinds[k], start, m)
                if coefficients[k] > 0:
                    _less(result, size, anchor, other, m)
                else:
                    _less(result, size, other, anchor, m)
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
def place_of(target, start):  # type: ignore[no-untyped-def]
    """The address of the run's element `start` in the target."""
    return np.uint64(target.address + np.uint64(start * target.size))


@compiled
def hash_result(target, b, place, n):  # type: ignore[no-untyped-def]
    """Note the hash of a block's result."""
    if n * target.size > SHORT:
        xxh3(place, n * target.size, target.hashes[b], target.lanes)


@compiled
def gram_blocks(stream, ends, hashes, out, work):  # type: ignore[no-untyped-def]
    """Into `out`, float64 `[blocks, M, M]`, the inner products of the M inputs after the first, each less the first."""
    for b in range(len(ends) - 1):
        n = ends[b + 1] - ends[b]
        failed = take(stream, ends[0], ends[b], n, hashes[b], True)
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
        if models == 3:
            _three(work[0], work[1], work[2], m, out)
        else:
            for k in range(models):
                for j in range(k + 1):
                    out[k, j] += _inner(work[k], work[j], m)
    for k in range(models):
        for j in range(k):
            out[j, k] = out[k, j]


@compiled
def load_less(out, base, address, kind, start, n):  # type: ignore[no-untyped-def]
    """Elements `start`.. of the block at `address`, less the base's."""
    if kind == 0:
        bf16 = carray(_pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            out[i] = as_float(np.uint32(np.uint32(bf16[i]) << np.uint32(16))) - base[i]
    else:
        load(out, address, kind, start, n)
        for i in range(n):
            out[i] -= base[i]


@compiled_sum
def _inner(a, b, n):  # type: ignore[no-untyped-def]
    """The inner product of two chunks, in float64."""
    total = 0.0
    for i in range(n):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled_sum
def _three(a, b, c, n, out):  # type: ignore[no-untyped-def]
    """All six inner products of three chunks, each element converted once: the common case at twice the speed."""
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

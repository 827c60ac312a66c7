"""Numbers in and out of chunks: loaded from any stored type, checked, rounded once to another.

A block is given by its address and stored type, so that one compiled kernel serves every mix of types, and is worked
through in chunks that stay in the first-level cache: each step is a plain loop over a chunk, which LLVM turns into vector
instructions. `work` is scratch made once a thread, float32, or float64 where an input is float64: its type is that of all
arithmetic. Formats: IEEE 754-2019; bfloat16 as in https://arxiv.org/abs/1905.12322.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from interfuse.engine.kernels import CHUNK
from interfuse.engine.loops.decorators import compiled

#: A plain infinity would make the comparison float64.
INFINITE = np.float32(np.inf)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

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
        bf16 = carray(pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            out[i] = as_float(np.uint32(np.uint32(bf16[i]) << np.uint32(16)))
    elif kind == 1:
        f16 = carray(pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            half = np.uint32(f16[i])
            rest = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
            bits = as_bits(as_float(rest) * as_float(np.uint32(0x77800000)))  # times 2^112: other exponents' bias
            bits = np.uint32(bits | np.uint32(0x7F800000)) if rest >= np.uint32(0x0F800000) else bits
            out[i] = as_float(np.uint32(bits | ((half & np.uint32(0x8000)) << np.uint32(16))))
    elif kind == 2:
        f32 = carray(pointer(np.uint64(address + np.uint64(4 * start))), CHUNK, np.float32)
        for i in range(n):
            out[i] = f32[i]
    elif kind == 3:
        f64 = carray(pointer(np.uint64(address + np.uint64(8 * start))), CHUNK, np.float64)
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
        bf16 = carray(pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            bits = _rounded(values[i])
            # Just under half of the last place kept, and the rest of the half where that place is odd.
            up = np.uint32(np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            bf16[i] = np.uint16(np.uint32(bits + up) >> np.uint32(16))
    elif kind == 1:
        f16 = carray(pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            f16[i] = _half(_rounded(values[i]))
    elif kind == 2:
        f32 = carray(pointer(np.uint64(address + np.uint64(4 * start))), CHUNK, np.float32)
        for i in range(n):
            f32[i] = values[i]
    else:
        f64 = carray(pointer(np.uint64(address + np.uint64(8 * start))), CHUNK, np.float64)
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
def load_less(out, base, address, kind, start, n):  # type: ignore[no-untyped-def]
    """Elements `start`.. of the block at `address`, less the base's; whether all of these are finite."""
    wrong = np.uint32(0)
    if kind == 0:
        bf16 = carray(pointer(np.uint64(address + np.uint64(2 * start))), CHUNK, np.uint16)
        for i in range(n):
            out[i] = as_float(np.uint32(np.uint32(bf16[i]) << np.uint32(16))) - base[i]
            wrong = np.uint32(wrong | np.uint32(not abs(out[i]) < INFINITE))
    else:
        load(out, address, kind, start, n)
        for i in range(n):
            out[i] -= base[i]
            wrong = np.uint32(wrong | np.uint32(not abs(out[i]) < INFINITE))
    return wrong == 0

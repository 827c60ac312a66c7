"""Inputs as compiled loops see them: taken block by block, from open files or from memory, and hashed on the way.

A run of blocks is worked through in one call, without a lock and without a step of Python between its blocks: what is read
into a block's room is still in the core's cache when it is hashed and summed. The hash is XXH3 of 128 bits, for blocks of
more than 240 bytes (the format has other ways for shorter ones, which Python takes); it's tested against the xxhash library.
Source: the specification of XXH3, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from interfuse.engine.kernels import NOTHING, SHORT
from interfuse.engine.loops.decorators import compiled

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def _words(start: int) -> list[int]:
    """Eight words of the secret, from a byte on."""
    return [int.from_bytes(_SECRET[at : at + 8], "little") for at in range(start, start + 64, 8)]


_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = np.array([_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0]], np.uint64)
_FOR_LOW, _FOR_HIGH = np.array(_words(11), np.uint64), np.array(_words(192 - 64 - 11), np.uint64)
_LOW_32, _32, _37 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(37)
_MIX = np.uint64(0x165667919E3779F9)


pread = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))


def _stripe(builder: Any, lanes: Any, data: Any, key: Any) -> Any:
    """The eight lanes after 64 bytes of data."""
    word = ir.VectorType(ir.IntType(64), 8)
    mixed = builder.xor(data, key)
    low = builder.and_(mixed, ir.Constant(word, [0xFFFFFFFF] * 8))
    product = builder.mul(low, builder.lshr(mixed, ir.Constant(word, [32] * 8)))
    swapped = builder.shuffle_vector(data, data, ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6]))
    return builder.add(lanes, builder.add(product, swapped))


def _loaded(builder: Any, address: Any, offset: int) -> Any:
    word = ir.IntType(64)
    place = builder.inttoptr(builder.add(address, ir.Constant(word, offset)), ir.VectorType(word, 8).as_pointer())
    return builder.load(place, align=1)


@intrinsic
def _accumulate(context: Any, lanes: Any, data: Any) -> Any:
    """Sixteen stripes and a scramble, in the lanes at one address, of the data at another."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.VectorType(ir.IntType(64), 8)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        total = builder.load(place, align=1)
        for n in range(16):
            total = _stripe(builder, total, _loaded(builder, arguments[1], 64 * n), ir.Constant(word, _words(8 * n)))
        total = builder.xor(total, builder.lshr(total, ir.Constant(word, [47] * 8)))
        total = builder.xor(total, ir.Constant(word, _words(192 - 64)))
        builder.store(builder.mul(total, ir.Constant(word, [_PRIME32[0]] * 8)), place, align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), build


@intrinsic
def _accumulate_one(context: Any, lanes: Any, data: Any, at: Any) -> Any:
    """One stripe, with the secret's words from byte `at` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.VectorType(ir.IntType(64), 8)
        secret = cgutils.global_constant(
            builder, "xxh3_secret", ir.Constant(ir.ArrayType(ir.IntType(8), 192), bytearray(_SECRET))
        )
        key = _loaded(builder, builder.add(builder.ptrtoint(secret, ir.IntType(64)), arguments[2]), 0)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        total = _stripe(builder, builder.load(place, align=1), _loaded(builder, arguments[1], 0), key)
        builder.store(total, place, align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), build


@compiled
def _fold(a, b):  # type: ignore[no-untyped-def]
    """The two halves of a product of 128 bits, in one."""
    low, high = (a & _LOW_32) * (b & _LOW_32), (a >> _32) * (b >> _32)
    one, other = (a >> _32) * (b & _LOW_32), (a & _LOW_32) * (b >> _32)
    cross = (low >> _32) + (one & _LOW_32) + other
    return ((one >> _32) + (cross >> _32) + high) ^ ((cross << _32) | (low & _LOW_32))


@compiled
def _merged(lanes, keys, start):  # type: ignore[no-untyped-def]
    total = start
    for i in range(4):
        total += _fold(lanes[2 * i] ^ keys[2 * i], lanes[2 * i + 1] ^ keys[2 * i + 1])
    total = (total ^ (total >> _37)) * _MIX
    return total ^ (total >> _32)


@compiled
def xxh3(address, nbytes, out, lanes):  # type: ignore[no-untyped-def]
    """The 128-bit XXH3 of more than 240 bytes at an address, into `out`: its upper and its lower word."""
    for i in range(8):
        lanes[i] = _START[i]
    place, data = np.uint64(lanes.ctypes.data), np.uint64(address)
    rounds = (nbytes - 1) // 1024
    for _ in range(rounds):
        _accumulate(place, data)
        data = np.uint64(data + np.uint64(1024))
    for n in range((nbytes - 1 - 1024 * rounds) // 64):
        _accumulate_one(place, np.uint64(data + np.uint64(64 * n)), np.uint64(8 * n))
    _accumulate_one(place, np.uint64(np.uint64(address) + np.uint64(nbytes - 64)), np.uint64(192 - 64 - 7))
    length = np.uint64(nbytes)
    out[0] = _merged(lanes, _FOR_HIGH, ~np.uint64(length * np.uint64(_PRIME64[1])))
    out[1] = _merged(lanes, _FOR_LOW, np.uint64(length * np.uint64(_PRIME64[0])))


@compiled
def take(stream, begin, start, n, hashes, hashing):  # type: ignore[no-untyped-def]
    """Read a block of `n` elements from `start` on, in a run that begins at `begin`: where they are is in `stream.room`.

    `hashes` `[inputs, 2]` gets the hashes if `hashing`, which is when the block is read first. 0, or one more
    than the number of the first input that can't be read.
    """
    inputs = len(stream.handles)
    for k in range(inputs):
        handle, size, address = stream.handles[k], stream.sizes[k], stream.addresses[k]
        if handle == NOTHING:
            stream.room[k] = 0
            continue
        if handle >= 0:
            if pread(handle, address, np.uint64(n * size), stream.offsets[k] + start * size) != n * size:
                return k + 1
        else:
            address = np.uint64(address + np.uint64((start - begin) * size))
        stream.room[k] = address
        if hashing and n * size > SHORT:
            xxh3(address, n * size, hashes[k], stream.room[inputs:])
    return 0


@compiled
def hash_stream(stream, ends, hashes, hashing):  # type: ignore[no-untyped-def]
    """The hashes `[blocks, inputs, 2]` of the blocks that end where the next begins; 0, or what couldn't be read."""
    for b in range(len(ends) - 1):
        failed = take(stream, ends[0], ends[b], ends[b + 1] - ends[b], hashes[b], hashing)
        if failed:
            return failed
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

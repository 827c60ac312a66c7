"""What the compiled loops are called by, and with: their names, and the named tuples and constants that they share.

The loops themselves are in `loops`, which needs Numba; this module doesn't, nor does a process whose kernels have been
compiled before (`native`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from interfuse.engine.native import Kernel

CHUNK = 1024  # elements that a loop takes at a time, in buffers that stay in the first-level cache
#: The stored types that are merged by arithmetic, by the numbers that loops know them by; ZERO stands for no base.
KINDS = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
ZERO = 255
#: In place of an open file: elements lie in memory, or there are none (a base that is 0).
IN_MEMORY, NOTHING = -1, -2
#: Bytes up to which a block's hash is Python's affair.
SHORT = 240
#: Words that hashing needs.
LANES = 8
#: How entries are trimmed.
ALL, BAND, RANDOM, SHARED = range(4)
#: Magnitudes that are told apart when they are ranked: of all, and of those of a row.
BUCKETS, ROW_BUCKETS = 2**15, 2**11
#: Models up to which their numbers are given in tuples: loops over them are unrolled then.
FEW = 8
#: Into which a row's magnitudes are counted by turns, for equal ones in a row needn't wait for each other then.
TABLES = 2


class Stream(NamedTuple):
    """Where a tensor's inputs are, for a run of its blocks: arrays with one entry an input, the base's first."""

    handles: np.ndarray  # int32: an open file, IN_MEMORY or NOTHING
    offsets: np.ndarray  # int64: the byte of the file where the tensor begins
    sizes: np.ndarray  # int64: bytes of an element
    addresses: np.ndarray  # uint64: of room for a block; of what is in memory, where the run begins
    kinds: np.ndarray  # uint8: the stored type, of KINDS or ZERO
    room: np.ndarray  # uint64 [inputs + LANES]: where the block's elements are, and what the hash works in


class Target(NamedTuple):
    """Where a run's results go, with one entry a block in the arrays."""

    address: Any  # uint64
    kind: Any  # uint8
    size: Any  # int64: bytes of an element
    finite: np.ndarray  # bool: whether all of a block's results are
    hashes: np.ndarray  # uint64 [blocks, 2]
    lanes: np.ndarray  # uint64 [LANES], to hash in


class Trimming(NamedTuple):
    """How entries are trimmed: arrays with one entry a model. An entry is kept from the low cut on to below the high cut."""

    how: int
    cuts: np.ndarray  # [M, 2], low and high, in the type of `work`
    ends: np.ndarray  # int64 [M, 2]: entries at the low cut are kept below this index, at the high cut from this on
    keys: np.ndarray  # uint32 [M, 2]
    chances: np.ndarray  # float32 [M]: of being kept


class Voting(NamedTuple):
    """How trimmed deltas become one: for each model a number in the type of `work`, in arrays, or in tuples if they're few."""

    elect: bool
    mean: bool
    votes: Any  # what a delta is multiplied by when signs are elected
    scales: Any  # and when it is summed
    weights: Any  # what a mean divides by
    factor: Any  # a number of that type


class Ranking(NamedTuple):
    """How rows are ranked: arrays with one entry a model, and what counts in. With `known`, `table` is a whole row's."""

    width: int  # elements of a row
    known: bool
    divide: bool  # by the chance of being kept
    densities: np.ndarray  # float32
    spreads: np.ndarray  # float32
    keys: np.ndarray  # uint32 [M, 2]
    counts: np.ndarray  # int32 [M, TABLES, buckets], all 0
    table: np.ndarray  # float32 [M, buckets]: the chances
    lowest: np.ndarray  # int32: the bucket that the first counter is
    values: np.ndarray  # [M, elements of a row or block], in the type of `work`: room for its deltas
    places: np.ndarray  # uint16, the same: for the buckets of their magnitudes


hash_stream = Kernel("streams", "hash_stream")
sum_blocks = Kernel("sums", "sum_blocks")
gram_blocks = Kernel("sums", "gram_blocks")
merge_blocks = Kernel("trimming", "merge_blocks")
norms_blocks = Kernel("trimming", "norms_blocks")
sample = Kernel("selection", "sample")
sample_runs = Kernel("selection", "sample_runs")
count_blocks = Kernel("selection", "count_blocks")
histogram = Kernel("selection", "histogram")
locate = Kernel("selection", "locate")
tally = Kernel("selection", "tally")
count_at = Kernel("selection", "count_at")
merge_ranked = Kernel("ranking", "merge_ranked")
norms_ranked = Kernel("ranking", "norms_ranked")
count_ranks = Kernel("ranking", "count_ranks")

"""The header of a .safetensors file: names, types, shapes and byte ranges, read with suspicion and written exactly.

Not a reader of tensors: nothing here touches the data. A file comes from anyone, so each claim of its header is checked
against the others and against the file's size before it is used. Source: the safetensors format description,
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interfuse.errors import CheckpointError, Problem

#: safetensors type -> NumPy's type of the same bytes. NumPy has no bfloat16 or float8: their bits travel as integers.
STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LONGEST = 100_000_000  # bytes of header that the format allows
_MOST_DIMENSIONS = 64  # that NumPy and torch allow
_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}
_WHOLE = {int}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor: its type by safetensors' name (`"F32"`, `"BF16"`, `"I64"`, ...) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @functools.cached_property
    def count(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.count * self.storage.itemsize

    @property
    def storage(self) -> np.dtype[Any]:
        """NumPy's type of the stored elements; bfloat16 is `uint16`."""
        return STORAGE[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Entry(NamedTuple):
    """A tensor's spec and the byte in the file where its data begins."""

    spec: TensorSpec
    offset: int


def encode_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file that holds these tensors, and where each one's data belongs in it.

    Data is laid out by falling element size, so that every tensor is aligned; the names keep their order. A name that
    the format can't hold is a `CheckpointError`.
    """
    bad = [name for name in specs if name == _METADATA or not _is_text(name)]
    if bad:
        raise CheckpointError(*(Problem("", f"a tensor can't be named {name!r}", "rename it") for name in bad))
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].storage.itemsize):
        starts[name] = end
        end += specs[name].nbytes
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, spec in specs.items():
        offsets = [starts[name], starts[name] + spec.nbytes]
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: Entry(spec, len(head) + starts[name]) for name, spec in specs.items()}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a .safetensors file in the order of its header, or a `CheckpointError` with all that is wrong."""
    try:
        with path.open("rb") as file:
            return header_of(str(path), path.stat().st_size, lambda start, stop: os.pread(file.fileno(), stop - start, start))
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"can't be read: {error.strerror}")) from None


def header_of(file: str, size: int, read: Callable[[int, int], bytes], first: int = 8) -> dict[str, Entry]:
    """`read_header` of a file of `size` bytes that `read(start, stop)` gives bytes of, `first` of them in the first call."""
    head = read(0, min(first, size))
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > min(size - 8, _LONGEST):
        wrong = f"the header should be {length} bytes, the file has {size}" if size >= 8 else f"{size} bytes long"
        raise CheckpointError(_damaged(file, wrong))
    if len(head) < 8 + length:
        head += read(len(head), 8 + length)
    found, problems = _parsed(head[8 : 8 + length], size)
    if problems:
        raise CheckpointError(*(_damaged(file, wrong) for wrong in problems))
    return dict(found)


@functools.lru_cache(maxsize=64)  # fine-tunes of one model have the same header, to the byte
def _parsed(text: bytes, end: int) -> tuple[dict[str, Entry], list[str]]:
    """The entries in a header of a file of `end` bytes, and what is wrong with them."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(items)
        if len(seen) < len(items):
            repeated.extend(name for name, times in Counter(name for name, _ in items).items() if times > 1)
        return seen

    try:
        entries = json.loads(text.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        return {}, [f"the header isn't JSON ({type(error).__name__})"]
    if repeated:
        return {}, [f"{name!r} is there more than once" for name in repeated]
    if not isinstance(entries, dict):
        return {}, [f"the header is a {type(entries).__name__}, not an object"]
    entries.pop(_METADATA, None)
    return _entries(entries, 8 + len(text), end)


def _entries(entries: dict[str, Any], start: int, end: int) -> tuple[dict[str, Entry], list[str]]:
    found: dict[str, Entry] = {}
    wrong = []
    for name, entry in entries.items():
        spec = _spec(entry, end - start)
        if isinstance(spec, str):
            wrong.append(f"tensor {name!r}: {spec}")
        else:
            found[name] = Entry(spec, start + entry["data_offsets"][0])
    return found, wrong or _gaps(found, start, end)


def _spec(entry: Any, size: int) -> TensorSpec | str:
    """The spec that one tensor's entry gives, or what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return "its entry must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        return f"unknown dtype {dtype!r}"
    spec = _sized(dtype, tuple(shape)) if _is_whole(shape) else None
    if spec is None:
        return f"bad shape {shape!r}"
    if not _is_whole(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        return f"bad data_offsets {offsets!r}"
    if offsets[1] > size:
        return f"its data ends at byte {offsets[1]}, the file has {size} bytes of data"
    if spec.nbytes != offsets[1] - offsets[0]:
        return f"{spec} takes {spec.nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
    return spec


def _is_whole(values: Any) -> bool:
    """Whether this is a list of whole numbers: no booleans, which count as such in Python."""
    return isinstance(values, list) and not {*map(type, values)} - _WHOLE


@functools.lru_cache(maxsize=2**14)
def _sized(dtype: str, shape: tuple[int, ...]) -> TensorSpec | None:
    """The spec, one object for all that are equal; None where no tensor has this shape."""
    good = len(shape) <= _MOST_DIMENSIONS and all(0 <= size < 2**63 for size in shape)
    return TensorSpec(dtype, shape) if good else None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a pair: JSON can say it, UTF-8 can't
        return False
    return True


def _gaps(found: Mapping[str, Entry], start: int, end: int) -> list[str]:
    """Where tensors overlap, and where bytes belong to none."""
    wrong, at, last = [], start, ""
    for name, (spec, offset) in sorted(found.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
        if offset < at:
            wrong.append(f"tensor {name!r} overlaps {last!r}")
        elif offset > at:
            wrong.append(f"{offset - at} bytes before tensor {name!r} belong to no tensor")
        at, last = max(at, offset + spec.nbytes), name
    if at < end:
        wrong.append(f"the last {end - at} bytes belong to no tensor")
    return wrong


def _damaged(file: str, wrong: str) -> Problem:
    return Problem(file, f"damaged: {wrong}", "get the file again")

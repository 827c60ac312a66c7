"""Where a tensor's elements are: in a file, in memory, or computed when asked for. Not what they mean.

A place gives any run of its tensor's elements, to several threads at once; a model that is patched while it is read (an
adapter, another vocabulary) is a checkpoint with other places.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from interfuse.checkpoints.header import TensorSpec
from interfuse.errors import CheckpointError, Problem


class Place(Protocol):
    """The elements of one tensor, in row-major order and in the storage type of its spec."""

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, flat: a view or a fresh array, never to be written to. Any thread may ask."""


class File(Protocol):
    """A file that tensors lie in: `LocalFile`, or one that is fetched first."""

    @property
    def path(self) -> Path:
        """Where it is on this machine, or will be."""

    def state(self) -> tuple[str, int, int]:
        """What tells this file from another or a later one: path, size, and when it was last written."""

    def check(self) -> None:
        """Nothing, or a `CheckpointError` if the file isn't the one that was opened."""

    def read(self, offset: int, room: np.ndarray) -> None:
        """Fill an array with the file's bytes from `offset` on."""

    def handle(self) -> int:
        """The file, open for reading."""


class LocalFile:
    """A file that is opened when it is first read, and that notices when it has been changed since it was first seen.

    It's read, never mapped: of a mapped file that somebody cuts short, the process would end. A class, because many tensors
    share one file. A change is a `CheckpointError`; so is a file that can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known = _state(path)
        self._handle = -1
        self._lock = threading.Lock()

    def state(self) -> tuple[str, int, int]:
        """What tells this file from another or a later one: path, size, and when it was last written."""
        return str(self.path.resolve()), *self._known[:2]

    def check(self) -> None:
        """Nothing, or a `CheckpointError` if the file isn't the one that was opened."""
        if _state(self.path) != self._known:
            wrong = "changed since it was opened"
            raise CheckpointError(Problem(str(self.path), wrong, "run again when nothing else writes to it"))

    def read(self, offset: int, room: np.ndarray) -> None:
        """Fill an array with the file's bytes from `offset` on."""
        self.check()
        handle, wanted, done = self.handle(), room.view(np.uint8), 0
        try:
            while done < len(wanted) and (got := os.preadv(handle, [wanted[done:].data], offset + done)):
                done += got
        except OSError as error:
            raise CheckpointError(Problem(str(self.path), f"can't be read: {error.strerror}", "check the disk")) from None
        if done < len(wanted):
            self.check()
            raise CheckpointError(Problem(str(self.path), f"ends at byte {offset + done}", "get the file again"))

    def handle(self) -> int:
        """The file, open for reading until this object goes."""
        if self._handle < 0:
            with self._lock:
                if self._handle < 0:
                    self._handle = self._open()
        return self._handle

    def _open(self) -> int:
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(Problem(str(self.path), f"can't be read: {error.strerror}")) from None
        weakref.finalize(self, os.close, handle)
        self.check()
        return handle


class Stored(NamedTuple):
    """A tensor in a file: its bytes begin at `offset`."""

    file: File
    offset: int
    spec: TensorSpec

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, in a fresh array."""
        found: np.ndarray = np.empty(stop - start, self.spec.storage)
        self.file.read(self.offset + start * found.itemsize, found)
        return found


class Strided:
    """A tensor in a file whose elements lie there in another order, as a transposed one's do; `strides` count elements.

    A class, because it's read whole when it's first asked for, and kept from then on. `place` is where all of it lies.
    """

    def __init__(self, place: Stored, spec: TensorSpec, strides: tuple[int, ...]):
        self.place, self.spec, self.strides = place, spec, strides
        self._lock = threading.Lock()
        self._found: np.ndarray | None = None

    @property
    def file(self) -> File:
        """The file that it lies in."""
        return self.place.file

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`: a view."""
        with self._lock:
            if self._found is None:
                there = self.place.block(0, self.place.spec.count)
                steps = [step * there.itemsize for step in self.strides]
                self._found = np.ascontiguousarray(as_strided(there, self.spec.shape, steps)).reshape(-1)
        return self._found[start:stop]


class Resident(NamedTuple):
    """A tensor in memory, contiguous; `get` gives it, so that what must be copied is copied only when it is read.

    `file` is what it was loaded from, if from one.
    """

    get: Callable[[], np.ndarray]
    file: File | None = None

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of the array that `get` gives."""
        return self.get().reshape(-1)[start:stop]


def _state(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"can't be read: {error.strerror}")) from None
    return found.st_size, found.st_mtime_ns, found.st_ino

"""Where a tensor's elements are: in a file, in memory, or computed when asked for. Not what they mean.

A place gives any run of its tensor's elements, to several threads at once; a model that is patched while it is read (an
adapter, another vocabulary) is a checkpoint with other places.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from interfuse.checkpoints.header import TensorSpec
from interfuse.errors import CheckpointError, Problem


class Place(Protocol):
    """The elements of one tensor, in row-major order and in the storage type of its spec."""

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, flat: a view or a fresh array, never to be written to. Any thread may ask."""


class File(Protocol):
    """A file that tensors lie in: `MappedFile`, or one that is fetched first."""

    @property
    def path(self) -> Path:
        """Where it is on this machine, or will be."""

    def state(self) -> tuple[str, int, int]:
        """What tells this file from another or a later one: path, size, and when it was last written."""

    def check(self) -> None:
        """Nothing, or a `CheckpointError` if the file isn't the one that was opened."""

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` of the file from `offset` on, as bytes that are mapped, not copied."""

    def handle(self) -> int:
        """The file, open for reading."""


class MappedFile:
    """A file that is opened when it is first read, and that notices when it has been changed since then.

    It is mapped for who wants a view; to read from its handle costs no page faults, and survives a file that is cut short
    meanwhile. A class, because many tensors share one file. A change is a `CheckpointError`; so is a file that can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known = _state(path)
        self._bytes: np.ndarray | None = None
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

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` of the file from `offset` on, as bytes that are mapped, not copied."""
        self.check()  # for each block: what is read past the end of a file that was cut is lost (`cut`)
        if self._bytes is None:
            with self._lock:
                if self._bytes is None:
                    mapped = _map(self.path)
                    self.check()  # that it's as long as it should be
                    self._bytes = mapped
        return self._bytes[offset : offset + nbytes]

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
        """Elements `start` to `stop`, mapped; copied only where the file has them at an odd address."""
        size = self.spec.storage.itemsize
        raw = self.file.view(self.offset + start * size, (stop - start) * size).view(self.spec.storage)
        return raw if raw.flags.aligned else raw.copy()


class Resident(NamedTuple):
    """A tensor in memory, contiguous; `get` gives it, so that what must be copied is copied only when it is read.

    `file` is what it was loaded from, as torch's own files are: their pages are mapped, so it must not change either.
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


def _map(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"can't be mapped: {error}")) from None

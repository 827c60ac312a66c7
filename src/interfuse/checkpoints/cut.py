"""Files that are cut short while they are mapped: an error at the end of the work, not the end of the process.

A page that its file no longer has can't be read: the system ends the process that tries (SIGBUS), with no word on which file.
Within `unbroken` such pages read as zeros, and an error that names the file comes when the block ends: nothing that was made
from the zeros may be kept. Linux alone tells what this needs; elsewhere nothing is guarded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.places import File
from interfuse.errors import CheckpointError, Problem

_WITH_ADDRESS = 4  # SA_SIGINFO: the handler is told which address couldn't be read
_FIXED = 0x10  # MAP_FIXED: in place of what is mapped there
_ADDRESS_AT = 16  # bytes into siginfo_t
_FAILED = ctypes.c_void_p(-1).value


class _Action(ctypes.Structure):
    """The C library's `struct sigaction`."""

    _fields_ = (
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_uint64 * 16), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
    )  # fmt: skip


_lock = threading.Lock()
_guards: dict[object, tuple[set[str], set[str]]] = {}  # the files of each block that runs, and those of them that were cut
_before = _Action()  # what is done with the signal outside


@contextlib.contextmanager
def unbroken(files: Sequence[File]) -> Iterator[None]:
    """Read these files, mapped or not; at the end a `CheckpointError` if one was cut short or couldn't be read meanwhile.

    It holds for every thread. A file of somebody else's that is cut ends the process as ever.
    """
    if sys.platform != "linux":
        yield
        return
    guard, cut = object(), set[str]()
    with _lock:
        if not _guards:
            _library().sigaction(signal.SIGBUS, ctypes.byref(_action()), ctypes.byref(_before))
        _guards[guard] = ({str(file.path.resolve()) for file in files}, cut)
    try:
        yield
    except OSError as error:
        if error.errno != errno.EFAULT:  # a call of the system's couldn't read what is mapped
            raise
        for file in files:
            file.check()
        raise
    finally:
        with _lock:
            del _guards[guard]
            if not _guards:
                _library().sigaction(signal.SIGBUS, ctypes.byref(_before), None)
    if cut:
        wrong, allowed = "was cut short or can't be read any more", "run again when nothing else writes to it"
        raise CheckpointError(*(Problem(path, wrong, allowed) for path in sorted(cut)))


def _handle(number: int, about: int, context: int) -> None:
    """Put zeros where a page of a guarded file is gone, and all behind it; else do as before, which the next try meets."""
    try:
        address = ctypes.c_uint64.from_address(about + _ADDRESS_AT).value
        end, path = _mapped(address)
        page = address & -mmap.PAGESIZE
        concerned = [cut for files, cut in list(_guards.values()) if path in files]
        for cut in concerned:
            cut.add(path)
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        done = bool(concerned) and _library().mmap(page, end - page, mmap.PROT_READ, kind, -1, 0) != _FAILED
    except Exception:  # whatever it is, to come back here for ever would be worse
        done = False
    if not done:
        _library().sigaction(number, ctypes.byref(_before), None)


def _mapped(address: int) -> tuple[int, str]:
    """Where the mapping ends that this address is in, and the file that it is of."""
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            parts = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in parts[0].split("-"))
            if start <= address < end:
                return end, parts[5].removesuffix(" (deleted)") if len(parts) > 5 else ""
    return 0, ""


@functools.cache
def _action() -> Any:
    """What is done with the signal inside."""
    return _Action(ctypes.cast(_handler, ctypes.c_void_p), flags=_WITH_ADDRESS)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_handle)


@functools.cache
def _library() -> Any:
    """The C library."""
    found = ctypes.CDLL(None)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    return found

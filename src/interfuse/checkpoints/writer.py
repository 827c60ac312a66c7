"""Files that appear whole or not at all: one .safetensors block by block, and a folder put in place by a rename.

Not a store: what is written here is read by `source`, by safetensors and by whatever loads the model.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from interfuse import units
from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.errors import CheckpointError, Problem


class TensorWriter:
    """One .safetensors file whose tensors are known before their data; a context manager.

    A class, because it holds an open file between calls. The file takes its name when the block ends without an
    exception and every byte has come; until then it has a temporary name beside it.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self._specs = dict(specs)
        self._head, self._entries = encode_header(specs, metadata)
        self._done = dict.fromkeys(specs, 0)
        self._part = self.path.with_name(f".interfuse-{secrets.token_hex(8)}.part")
        self._file: Any = None

    def __enter__(self) -> TensorWriter:
        self._file = self._part.open("xb", buffering=0)
        try:
            write_at(self._file.fileno(), self._head, 0)
            self._file.truncate(len(self._head) + sum(spec.nbytes for spec in self._specs.values()))
        except BaseException:
            self._discard()
            raise
        return self

    def append(self, name: str, array: np.ndarray) -> None:
        """Write the next elements of tensor `name`, in row-major order; blocks may have any length and shape.

        `array` has the storage type: `uint16` for BF16. A wrong name or type, or too many elements, is a
        `CheckpointError`.
        """
        spec = _next(self._specs, self._done, name, array, self.path)
        data = np.ascontiguousarray(array, dtype=spec.storage).reshape(-1).view(np.uint8)
        write_at(self._file.fileno(), data.data, self._entries[name].offset + self._done[name] * spec.storage.itemsize)
        self._done[name] += array.size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                _complete(self._specs, self._done, self.path)
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._part, self.path)
                _sync(self.path.parent)
        finally:
            self._discard()

    def _discard(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


class MemoryWriter:
    """`TensorWriter`'s twin in memory: `tensors` holds each one as it comes, in its storage type."""

    def __init__(self, specs: Mapping[str, TensorSpec]):
        self._specs = dict(specs)
        self._done = dict.fromkeys(specs, 0)
        self.tensors = {name: np.empty(spec.shape, spec.storage) for name, spec in specs.items()}

    def append(self, name: str, array: np.ndarray) -> None:
        """Keep the next elements of tensor `name`; the same rules as `TensorWriter.append`."""
        _next(self._specs, self._done, name, array, Path("memory"))
        self.write(name, self._done[name], array)
        self._done[name] += array.size

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Keep elements of tensor `name` from element `start` on; any thread may."""
        self.tensors[name].reshape(-1)[start : start + array.size] = array.reshape(-1)

    def place(self, name: str) -> None:
        """Nothing: what is in memory needs no second look."""


#: Where a merge notes what is done, beside its files until they are whole.
JOURNAL = "journal.jsonl"
#: What a run that was interrupted goes on with: the journal of a merge, finished stages.
_GOES_ON = (JOURNAL, ".stages")


@contextlib.contextmanager
def whole_folder(
    path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = (), resume: bool = False, nbytes: int = 0
) -> Iterator[Path]:
    """Give a folder beside `path`, empty, which becomes `path` when the block ends without an exception.

    With `resume` it isn't empty where a run of the same `path` was ended from outside: it's what that run left. Without,
    such a rest is removed. Two runs at once of one `path` are a `CheckpointError`.

    A non-empty `path` needs `overwrite`; then it is replaced, and removed once the new one is in place. Refused in any
    case: a `path` that is a file, the current folder, or one of `inputs`, holds one of them, or lies in one; and `nbytes` that
    the disk has no room for. A link is followed. All these are a `CheckpointError`, raised at entry.
    """
    check_output(path, overwrite=overwrite, inputs=inputs, nbytes=nbytes)
    target = Path(path).resolve()
    part = _part(target)
    with _alone(target, part, str(path)):
        if _settled(part, target):
            check_output(path, overwrite=overwrite, inputs=inputs, nbytes=nbytes)
        try:
            if part.exists() and not resume:
                shutil.rmtree(part)
            part.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(Problem(str(path), f"can't be made: {error.strerror}", "choose another folder")) from None
        keep = False
        try:
            yield part
            for folder, _, files in os.walk(part):
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _put(part, target)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            keep = True
            wrong = f"can't be written: {error.strerror}"
            allowed = "free some space and run again with --resume, or choose another folder"
            raise CheckpointError(Problem(str(path), wrong, allowed)) from None
        except KeyboardInterrupt:
            keep = True
            raise
        finally:
            if not (keep and any(any(part.glob(name)) for name in _GOES_ON)):
                shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _alone(target: Path, part: Path, shown: str) -> Iterator[None]:
    """Hold a lock on the output: it ends with the process, however that ends."""
    lock = part.with_name(part.name + ".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(Problem(shown, f"can't be made: {error.strerror}", "choose another folder")) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(lock)):  # a run that has just ended has taken it away
                raise BlockingIOError
        except OSError:
            wrong = "is being written by another run"
            raise CheckpointError(Problem(shown, wrong, "wait for it, or choose another folder")) from None
        yield
        lock.unlink(missing_ok=True)
    except BaseException:
        if not part.exists():
            lock.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def check_output(path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = (), nbytes: int = 0) -> None:
    """What `whole_folder` refuses, as a `CheckpointError` with all of it; nothing is made."""
    target, here = Path(path).resolve(), Path.cwd().resolve()
    elsewhere = "choose another folder"
    found: list[tuple[str, str]] = []
    if target == here or target in here.parents:
        found.append(("the current folder, or one that holds it, can't be the output", elsewhere))
    for item in dict.fromkeys(Path(item).resolve() for item in inputs):
        if target == item or target in item.parents:
            found.append((f"the output would replace the input {item}", elsewhere))
        elif item in target.parents and item.is_dir():
            found.append((f"the output would lie in the input {item}", elsewhere))
    if target.exists() and not target.is_dir():
        found.append(("is a file, and the output is a folder", elsewhere))
    elif not found and target.is_dir() and any(target.iterdir()) and not overwrite:
        found.append(("is there already", f"{elsewhere}, or give --overwrite (overwrite=True)"))
    free, place = room(path)
    if nbytes > free:
        wrong = f"needs {units.count(nbytes, 'B')}, and {units.count(free, 'B')} are free at {place}"
        found.append((wrong, "free some space, or choose a folder on another disk"))
    if found:
        raise CheckpointError(*(Problem(str(path), wrong, allowed) for wrong, allowed in found))


def settle(path: str | Path) -> None:
    """Remove what a run that was ended right after it put the folder `path` in place has left beside it."""
    target = Path(path).resolve()
    part = _part(target)
    with _alone(target, part, str(path)):
        _settled(part, target)


def room(path: str | Path) -> tuple[int, Path]:
    """How many bytes a new folder at `path` may have, and the folder above it that is there.

    What is at `path` already takes its room until the new folder is in place; what a run that was killed has left doesn't.
    """
    target = Path(path).resolve()
    place = next((folder for folder in target.parents if folder.is_dir()), target)
    left = [Path(folder, name).stat().st_blocks * 512 for folder, _, files in os.walk(_part(target)) for name in files]
    return shutil.disk_usage(place).free + sum(left), place


def _part(target: Path) -> Path:
    """Where a folder is until it is whole."""
    return target.parent / f".{target.name}.interfuse-part"


def _old(part: Path) -> Path:
    """Where the folder that is replaced is meanwhile."""
    return part.with_name(f"{part.name}.old")


def _settled(part: Path, target: Path) -> bool:
    """Put back an older folder, or remove it, where a run was ended while it replaced that; whether there was one."""
    old = _old(part)
    if not old.is_dir():
        return False
    if target.is_dir():
        shutil.rmtree(old)
    else:
        os.rename(old, target)
    return True


def _put(part: Path, target: Path) -> None:
    """Rename `part` to `target`; an older folder stands aside until the new one is in place."""
    old = _old(part)
    aside = target.is_dir()
    if aside:
        os.rename(target, old)
    try:
        os.rename(part, target)
    except BaseException:
        if aside:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if aside:
        shutil.rmtree(old)


def _next(specs: Mapping[str, TensorSpec], done: Mapping[str, int], name: str, array: np.ndarray, path: Path) -> TensorSpec:
    """The spec of the tensor that `array` continues, once it's sure that it does."""
    if name not in specs:
        raise CheckpointError(Problem(str(path), f"tensor {name!r} wasn't announced"))
    spec = specs[name]
    if array.dtype != spec.storage:
        raise CheckpointError(Problem(str(path), f"tensor {name!r} got {array.dtype}", f"{spec} takes {spec.storage}"))
    if done[name] + array.size > spec.count:
        got = done[name] + array.size
        raise CheckpointError(Problem(str(path), f"tensor {name!r} got {got} elements", f"{spec} takes {spec.count}"))
    return spec


def _complete(specs: Mapping[str, TensorSpec], done: Mapping[str, int], path: Path) -> None:
    problems = [
        Problem(str(path), f"tensor {name!r} got {done[name]} elements", f"{spec} takes {spec.count}")
        for name, spec in specs.items()
        if done[name] != spec.count
    ]
    if problems:
        raise CheckpointError(*problems)


def emptied(folder: Path, *kept: str) -> None:
    """Remove what another run has left in a folder, but for what is kept to go on with."""
    for item in folder.iterdir():
        if item.name in kept:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` into an open file, from byte `offset` on."""
    view = memoryview(data)
    while view:  # a call may write less than it was given
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

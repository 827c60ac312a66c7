"""A model's folder that is elsewhere, on a hub or behind a URL: what it has, parts of its files, and how to fetch them.

Where it is, is for `hub` and `urls` to know; what its files mean for `remote`. A file that has been fetched is read as any
other on this machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from interfuse.checkpoints.places import LocalFile
from interfuse.errors import CheckpointError, Problem


@dataclass(frozen=True, eq=False)
class Store:
    """A folder elsewhere. `name` is what the user calls it, `origin` what it is exactly, now and later.

    `sizes` has the bytes of each file (None: not known), `folder` where they are put on this machine. `read(file, start,
    stop)` gives bytes of a file that isn't fetched, fewer at its end; `get(files, shown)` fetches files, with progress where
    `shown`. Whatever goes wrong there is a `CheckpointError` that names the model.
    """

    name: str
    origin: str
    folder: Path
    sizes: Mapping[str, int | None]
    read: Callable[[str, int, int], bytes]
    get: Callable[[Sequence[str], bool], None]
    files: dict[str, RemoteFile] = field(default_factory=dict)

    def file(self, name: str) -> RemoteFile:
        """The file of that name, one and the same each time."""
        return self.files.setdefault(name, RemoteFile(self, name))

    def text(self, name: str) -> str:
        """The content of a small file, which is fetched."""
        self.get([name], False)
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(Problem(f"{self.name}/{name}", f"can't be read as text ({error})")) from None


class RemoteFile:
    """A file elsewhere that is fetched whole when it is first read, if not before; then it is a `LocalFile`.

    A class, because many tensors share one file.
    """

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.path = store.folder / name
        self._here: LocalFile | None = None
        self._lock = threading.Lock()

    def state(self) -> tuple[str, int, int]:
        """What tells this file from another or a later one: the origin says which version it is."""
        return f"{self.store.origin}/{self.name}", self.store.sizes[self.name] or 0, 0

    def check(self) -> None:
        """Nothing, or a `CheckpointError` if the fetched file has been changed since."""
        if self._here is not None:
            self._here.check()

    def read(self, offset: int, room: np.ndarray) -> None:
        """Fill an array with the file's bytes from `offset` on."""
        self._fetched().read(offset, room)

    def handle(self) -> int:
        """The file, open for reading."""
        return self._fetched().handle()

    def _fetched(self) -> LocalFile:
        if self._here is None:
            with self._lock:
                if self._here is None:
                    self._here = self._fetch()
        return self._here

    def _fetch(self) -> LocalFile:
        self.store.get([self.name], False)
        file = LocalFile(self.path)
        size = self.store.sizes[self.name]
        if size is not None and file.state()[1] != size:
            wrong = f"has {file.state()[1]} bytes, and had {size} when its header was read"
            raise CheckpointError(Problem(f"{self.store.name}/{self.name}", wrong, f"remove {self.path} and run again"))
        return file


def fetch(files: Sequence[RemoteFile], *, shown: bool = True) -> None:
    """Fetch files that aren't here yet; what can't be is one `CheckpointError`."""
    problems: list[Problem] = []
    for store in dict.fromkeys(file.store for file in files):
        try:
            store.get([file.name for file in files if file.store is store], shown)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)

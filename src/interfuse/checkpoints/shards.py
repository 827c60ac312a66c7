"""A checkpoint's files in a folder: model.safetensors, or shards with their index, written at any place by any thread.

What is written where is known before the first tensor, so a run that was killed goes on in the same files. Whether a file
is whole is for whoever put the folder there to say: it's meant for a folder that appears by rename (`writer.whole_folder`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from interfuse.checkpoints.folders import INDEX, SAFE, split
from interfuse.checkpoints.header import Entry, TensorSpec, encode_header
from interfuse.checkpoints.writer import write_at

#: Bytes of tensors in a file, at most, as hubs like them.
SHARD = 5 * 10**9


class ShardWriter:
    """The files of a checkpoint with these tensors; a context manager. A class, because it holds open files.

    Files that are there are written into, not emptied, if they have the same header; `write` is given elements of a tensor
    from an index on, in its storage type. `stems` as a `Checkpoint` has them: what files are called, by sub-folder.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], shard: int = SHARD, *, stems: Mapping[str, str] | None = None
    ):
        self.folder = folder
        self.names: list[str] = []
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._places: dict[str, tuple[int, Entry]] = {}
        self._indexes: dict[str, str] = {}
        for inner, stem, names in split(list(specs), stems or {"": "model"}):
            own = {name.removeprefix(inner): specs[name] for name in names}
            groups = _groups(own, shard)
            files = [f"{stem}{SAFE}"]
            if len(groups) > 1:
                files = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}{SAFE}" for i in range(len(groups))]
                self._indexes[f"{stem}{SAFE}{INDEX}"] = _index([f.removeprefix(inner) for f in files], groups, own)
            for file, group in zip(files, groups, strict=True):
                self._add(file, inner, {name: own[name] for name in group})
        self._files: list[int] = []

    def _add(self, file: str, inner: str, part: Mapping[str, TensorSpec]) -> None:
        head, entries = encode_header(part, {"format": "pt"})
        self._places.update({inner + name: (len(self.names), entry) for name, entry in entries.items()})
        self.names.append(file)
        self._heads.append(head)
        self._sizes.append(len(head) + sum(spec.nbytes for spec in part.values()))

    def __enter__(self) -> ShardWriter:
        try:
            for name, head, size in zip(self.names, self._heads, self._sizes, strict=True):
                (self.folder / name).parent.mkdir(exist_ok=True)
                handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._files.append(handle)
                if os.fstat(handle).st_size != size or os.pread(handle, len(head), 0) != head:
                    os.ftruncate(handle, 0)
                    write_at(handle, head, 0)
                    os.ftruncate(handle, size)
            for name, text in self._indexes.items():
                (self.folder / name).write_text(text, encoding="utf-8")
        except BaseException:
            self._close()
            raise
        return self

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Put elements of tensor `name` in their place, from element `start` on. Any thread may."""
        file, entry = self._places[name]
        data = np.ascontiguousarray(array, entry.spec.storage).reshape(-1).view(np.uint8)
        write_at(self._files[file], data.data, entry.offset + start * entry.spec.storage.itemsize)

    def place(self, name: str) -> tuple[int, int]:
        """The open file that tensor `name` is in, and the byte where it begins."""
        file, entry = self._places[name]
        return self._files[file], entry.offset

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                for handle in self._files:
                    os.fsync(handle)
        finally:
            self._close()

    def _close(self) -> None:
        for handle in self._files:
            os.close(handle)
        self._files.clear()


def count_files(specs: Mapping[str, TensorSpec], stems: Mapping[str, str] | None = None, shard: int = SHARD) -> int:
    """How many files of weights a `ShardWriter` writes."""
    parts = split(list(specs), stems or {"": "model"})
    return sum(len(_groups({name: specs[name] for name in names}, shard)) for _, _, names in parts)


def _groups(specs: Mapping[str, TensorSpec], shard: int) -> list[list[str]]:
    """The tensors of each file, in order; one that is larger than a shard is alone."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if groups[-1] and held + spec.nbytes > shard:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += spec.nbytes
    return groups


def _index(names: list[str], groups: list[list[str]], specs: Mapping[str, TensorSpec]) -> str:
    where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    content = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": where}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

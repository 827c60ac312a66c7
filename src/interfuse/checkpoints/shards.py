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

from interfuse.checkpoints.header import Entry, TensorSpec, encode_header
from interfuse.checkpoints.writer import write_at

#: Bytes of tensors in a file, at most, as hubs like them.
SHARD = 5 * 10**9


class ShardWriter:
    """The files of a checkpoint with these tensors; a context manager. A class, because it holds open files.

    Files that are there are written into, not emptied, if they have the same header; `write` is given elements of a tensor
    from an index on, in its storage type.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], shard: int = SHARD):
        self.folder = folder
        groups = _groups(specs, shard)
        digits = f"{len(groups):05d}"
        single = len(groups) == 1
        self.names = [
            "model.safetensors" if single else f"model-{i + 1:05d}-of-{digits}.safetensors" for i in range(len(groups))
        ]
        self._heads: list[bytes] = []
        self._sizes: list[int] = []
        self._places: dict[str, tuple[int, Entry]] = {}
        for i, names in enumerate(groups):
            part = {name: specs[name] for name in names}
            head, entries = encode_header(part, {"format": "pt"})
            self._heads.append(head)
            self._sizes.append(len(head) + sum(spec.nbytes for spec in part.values()))
            self._places.update({name: (i, entry) for name, entry in entries.items()})
        self._index = None if single else _index(self.names, groups, specs)
        self._files: list[int] = []

    def __enter__(self) -> ShardWriter:
        try:
            for name, head, size in zip(self.names, self._heads, self._sizes, strict=True):
                handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._files.append(handle)
                if os.fstat(handle).st_size != size or os.pread(handle, len(head), 0) != head:
                    os.ftruncate(handle, 0)
                    write_at(handle, head, 0)
                    os.ftruncate(handle, size)
            if self._index is not None:
                (self.folder / "model.safetensors.index.json").write_text(self._index, encoding="utf-8")
        except BaseException:
            self._close()
            raise
        return self

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        """Put elements of tensor `name` in their place, from element `start` on. Any thread may."""
        file, entry = self._places[name]
        data = np.ascontiguousarray(array, entry.spec.storage).reshape(-1).view(np.uint8)
        write_at(self._files[file], data.data, entry.offset + start * entry.spec.storage.itemsize)

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

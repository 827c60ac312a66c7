"""What of a merge is done, on disk beside its files, so that a run that was killed goes on where it was.

One line a tensor, added when its last block is written: the hashes of what was read and written. A line isn't believed: a
tensor counts as done when the blocks in the file still have the hashes that the line says. A journal of another plan, or of
inputs that have changed since, is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.source import Checkpoint, hash_block, open_folder
from interfuse.engine.merging import Merging
from interfuse.errors import UserError
from interfuse.plan import Output, Plan

NAME = "journal.jsonl"


class Journal:
    """The journal of one merge in `folder`. A class, because it holds an open file and what it has read."""

    def __init__(self, folder: Path, plan: Plan, sources: Sequence[Checkpoint], stems: Mapping[str, str], *, resume: bool):
        self._path = folder / NAME
        self._first = json.dumps({"plan": plan.digest(), "files": [f.state() for s in sources for f in s.files()]})
        self.done: dict[str, dict[str, Any]] = self._read(folder, plan, stems) if resume else {}
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._add(self._first)
        for name, line in self.done.items():
            self._add(json.dumps({"tensor": name, **line}))

    def note(self, output: Output, merging: Merging) -> None:
        """Write down that a tensor is done; one with something wrong isn't."""
        if merging.nonfinite or merging.refused:
            return
        written = [[start, stop, block.hex()] for (start, stop), block in merging.written.get(output.name, {}).items()]
        keys = [(read.source, read.name) for read in output.reads]
        read = [[*key, [[at, block.hex()] for at, block in merging.read.get(key, {}).items()]] for key in keys]
        self._add(json.dumps({"tensor": output.name, "written": written, "read": read}))

    def restore(self, merging: Merging) -> None:
        """Put the hashes of what is done already with those of this run."""
        for name, line in self.done.items():
            merging.written[name] = {(start, stop): bytes.fromhex(block) for start, stop, block in line["written"]}
            for source, tensor, blocks in line["read"]:
                merging.read.setdefault((source, tensor), {}).update({at: bytes.fromhex(block) for at, block in blocks})

    def close(self) -> None:
        """Close the file, and remove it: what is whole needs no journal."""
        os.close(self._file)
        self._path.unlink()

    def _add(self, line: str) -> None:
        os.write(self._file, (line + "\n").encode())

    def _read(self, folder: Path, plan: Plan, stems: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The tensors that are done, by what the journal says and the files hold."""
        try:
            first, *lines = self._path.read_text(encoding="utf-8").split("\n")
            there = open_folder(folder, stems=stems) if first == self._first else None
        except (OSError, ValueError, UserError):
            return {}
        if there is None or there.specs != plan.specs:
            return {}
        found = {}
        for text in lines:
            try:
                line = json.loads(text)
                name, written = line.pop("tensor"), line["written"]
                whole = all(hash_block(there.block(name, start, stop)).hex() == block for start, stop, block in written)
            except (ValueError, KeyError, TypeError):
                continue  # the line that the end cut short
            if whole:
                found[name] = line
        return found

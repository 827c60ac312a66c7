"""What of a merge is done, on disk beside its files, so that a run that was killed goes on where it was.

One line a tensor, added when its last block is written: the hashes of what was read and written. A line isn't believed: a
tensor counts as done when the blocks in the file still have the hashes that the line says. A journal of another plan, or of
inputs that have changed since, is none, and all that lies beside it goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interfuse.checkpoints.source import Checkpoint, hash_block, hash_blocks, open_folder
from interfuse.checkpoints.writer import JOURNAL, emptied
from interfuse.engine.merging import Merging
from interfuse.errors import UserError
from interfuse.plan import Output, Plan


class Journal:
    """The journal of one merge in `folder`. A class, because it holds an open file and what it has read."""

    def __init__(self, folder: Path, plan: Plan, sources: Sequence[Checkpoint], stems: Mapping[str, str], *, resume: bool):
        self._path = folder / JOURNAL
        self._first = json.dumps({"plan": plan.digest(), "files": [f.state() for s in sources for f in s.files()]})
        lines = self._lines() if resume else []
        if resume and not lines:
            emptied(folder)
        self.done: dict[str, dict[str, Any]] = self._read(lines, folder, plan, stems) if lines else {}
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._add(self._first)
        for name, line in self.done.items():
            self._add(json.dumps({"tensor": name, **line}))

    def note(self, output: Output, merging: Merging) -> None:
        """Write down that a tensor is done; one with something wrong isn't."""
        if merging.nonfinite or merging.refused:
            return
        keys = [(read.source, read.name) for read in output.reads]
        read = [[*key, merging.read[key].hex()] for key in keys if key in merging.read]
        self._add(json.dumps({"tensor": output.name, "written": merging.written[output.name].hex(), "read": read}))

    def restore(self, merging: Merging) -> None:
        """Put the hashes of what is done already with those of this run."""
        for name, line in self.done.items():
            merging.written[name] = bytes.fromhex(line["written"])
            merging.read.update({(source, tensor): bytes.fromhex(found) for source, tensor, found in line["read"]})

    def close(self) -> None:
        """Close the file, and remove it: what is whole needs no journal."""
        os.close(self._file)
        self._path.unlink()

    def _add(self, line: str) -> None:
        os.write(self._file, (line + "\n").encode())

    def _lines(self) -> list[str]:
        """What a run of this plan has noted, none where it wasn't this plan."""
        try:
            first, *lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return []
        return lines if first == self._first else []

    def _read(self, lines: Sequence[str], folder: Path, plan: Plan, stems: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The tensors that are done, by what the journal says and the files hold."""
        try:
            there = open_folder(folder, stems=stems)
        except (OSError, UserError):
            return {}
        if there.specs != plan.specs:
            return {}
        found = {}
        for text in lines:
            try:
                line = json.loads(text)
                name, written = line.pop("tensor"), line["written"]
                whole = hash_blocks(map(hash_block, there.blocks(name))).hex() == written
            except (ValueError, KeyError, TypeError):
                continue  # the line that the end cut short
            if whole:
                found[name] = line
        return found

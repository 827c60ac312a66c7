"""Writes a LoRA adapter as peft reads it: factors one by one as they are found, then adapter_model.safetensors and config.

Not a merge, and no factor is computed here. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from interfuse.checkpoints.adapters.pairs import CONFIG, PREFIX, WEIGHTS
from interfuse.checkpoints.hashes import hash_file, lines_of
from interfuse.checkpoints.numbers import narrow
from interfuse.checkpoints.source import BLOCK, TensorSpec, open_checkpoint
from interfuse.checkpoints.writer import JOURNAL, TensorWriter, emptied, write_at


class AdapterWriter:
    """An adapter in a folder that exists, complete when the block ends; a context manager.

    A class, because it holds open files between calls: ranks may be known only once factors are, and the header of a
    .safetensors file comes first, so that factors wait in a file beside it, not in memory. With a `key`, which names all that
    determines the adapter, a journal says what has come; with `resume` the folder may be one that a run with that key has left
    when it was killed: what has come whole is `done`, modules and other tensors' names, and everything else there goes.
    """

    def __init__(self, folder: Path, key: str | None = None, *, resume: bool = False):
        self.folder = folder
        self.ranks: dict[str, int] = {}
        self.done: dict[str, None] = {}
        self._key, self._resume = key, resume
        self._waiting, self._journal = folder / ".factors", folder / JOURNAL
        self._specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._end = 0
        self._open: list[int] = []

    def __enter__(self) -> AdapterWriter:
        left = list(self._left()) if self._resume else []
        if self._resume:
            emptied(self.folder, self._waiting.name)
        new = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._open.append(os.open(self._waiting, new, 0o666))
        if self._key is not None:
            self._open.append(os.open(self._journal, new | os.O_TRUNC | os.O_APPEND, 0o666))
            self._note({"key": self._key})
        for line in left:
            self._take(line)
            self._note(line)
        os.ftruncate(self._open[0], self._end)
        return self

    def pair(self, module: str, up: np.ndarray, down: np.ndarray, dtype: str, *, embedding: bool = False) -> None:
        """Add a module's B `[out, r, ...]` and A `[r, in, ...]`, rounded to the floating-point type `dtype`."""
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        factors = {f"{module}.{first}": down, f"{module}.{second}": up}
        rounded = {name: narrow(np.ascontiguousarray(factor), dtype) for name, factor in factors.items()}
        self._add(module, rounded, dtype, rank=len(down))

    def tensor(self, name: str, values: np.ndarray, dtype: str) -> None:
        """Add a tensor of the model's, under the name it has in the adapter; floating-point `dtype`."""
        self.stored(name, narrow(np.ascontiguousarray(values), dtype), dtype)

    def stored(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Add a tensor that is in the storage type of `dtype` already."""
        self._add(name, {name: array}, dtype)

    def _add(self, what: str, arrays: Mapping[str, np.ndarray], dtype: str, rank: int | None = None) -> None:
        """Write tensors that count only together, then note that they have come."""
        digest, at = xxhash.xxh3_128(), self._end
        for array in arrays.values():
            flat = array.reshape(-1)
            for start in range(0, flat.size, BLOCK):
                raw = np.ascontiguousarray(flat[start : start + BLOCK]).view(np.uint8).data
                write_at(self._open[0], raw, at)
                digest.update(raw)
                at += len(raw)
        tensors = [[f"{PREFIX}{name}", dtype, list(array.shape)] for name, array in arrays.items()]
        line = {"done": what, "rank": rank, "tensors": tensors, "xxh3": digest.hexdigest()}
        self._take(line)
        self._note(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        """Count what a line of the journal says as come."""
        for name, dtype, shape in line["tensors"]:
            self._specs[name], self._offsets[name] = TensorSpec(dtype, tuple(shape)), self._end
            self._end += self._specs[name].nbytes
        self.done[line["done"]] = None
        if line["rank"] is not None:
            self.ranks[line["done"]] = line["rank"]

    def _note(self, line: Mapping[str, Any]) -> None:
        if self._key is not None:
            os.write(self._open[1], (json.dumps(line) + "\n").encode())

    def _left(self) -> Iterator[dict[str, Any]]:
        """The lines of a journal with this key, in order, as long as the factors that wait have the hashes they say."""
        try:
            first, *lines = self._journal.read_text(encoding="utf-8").split("\n")
            if json.loads(first) != {"key": self._key}:
                return
            with self._waiting.open("rb") as file:
                for line in map(json.loads, lines):
                    specs = [TensorSpec(dtype, tuple(shape)) for _, dtype, shape in line["tensors"]]
                    if not _reads(file, sum(spec.nbytes for spec in specs), line["xxh3"]):
                        return
                    yield {"done": line["done"], "rank": line["rank"], "tensors": line["tensors"], "xxh3": line["xxh3"]}
        except (OSError, ValueError, LookupError, TypeError):  # a line that the end cut short
            return

    def finish(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write the adapter's three files: its weights, its `config`, and `interfuse.json`, which says how it was made.

        To the record are added what each tensor is, with its hash, and the config's hash.
        """
        with TensorWriter(self.folder / WEIGHTS, self._specs, {"format": "pt"}) as writer:
            for name, spec in self._specs.items():
                if spec.count:
                    flat = np.memmap(self._waiting, spec.storage, "r", self._offsets[name], (spec.count,))
                    for start in range(0, spec.count, BLOCK):
                        writer.append(name, flat[start : start + BLOCK])
        self._json(CONFIG, config)
        written = open_checkpoint(self.folder / WEIGHTS)
        hashes = {"files": {CONFIG: hash_file(self.folder / CONFIG)}, "tensors": lines_of(written)}
        self._json("interfuse.json", {**record, "output": written.hash(), **hashes})

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self.folder / name).write_text(text, encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._open:
            os.close(handle)
        if kind is None or self._key is None:
            self._journal.unlink(missing_ok=True)
            self._waiting.unlink()


def _reads(file: BinaryIO, nbytes: int, wanted: str) -> bool:
    """Whether the next bytes of a file have that hash."""
    digest = xxhash.xxh3_128()
    while nbytes and (block := file.read(min(nbytes, 2**20))):
        digest.update(block)
        nbytes -= len(block)
    return not nbytes and digest.hexdigest() == wanted


def lora_config(
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    targets: Sequence[str],
    saved: Sequence[str] = (),
    bias: str = "none",
    lora_bias: bool = False,
    base: str | None = None,
    task: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """peft's config for factors of these ranks by module, whose product times alpha / rank is the change.

    `alpha` None is each module's rank: the product is the change itself.
    """
    rank = max(Counter(ranks.values()).most_common(), key=lambda item: item[1])[0] if ranks else 1
    patterns = {f"^{re.escape(module)}": found for module, found in ranks.items() if found != rank}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "rank_pattern": patterns,
        "alpha_pattern": patterns if alpha is None else {},
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "bias": bias,
        "lora_bias": lora_bias,
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }

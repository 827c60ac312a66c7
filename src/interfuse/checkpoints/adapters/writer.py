"""Writes a LoRA adapter as peft reads it: factors one by one as they are found, then adapter_model.safetensors and config.

Not a merge, and no factor is computed here. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from interfuse.checkpoints.adapters.pairs import CONFIG, PREFIX, WEIGHTS
from interfuse.checkpoints.hashes import hash_file, lines_of
from interfuse.checkpoints.numbers import narrow
from interfuse.checkpoints.source import BLOCK, TensorSpec, open_checkpoint
from interfuse.checkpoints.writer import TensorWriter


class AdapterWriter:
    """An adapter in a folder that exists, complete when the block ends; a context manager.

    A class, because it holds an open file between calls: ranks may be known only once factors are, and the header of a
    .safetensors file comes first, so that factors wait in a file beside it, not in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ranks: dict[str, int] = {}
        self._waiting = folder / ".factors"
        self._specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._file: Any = None

    def __enter__(self) -> AdapterWriter:
        self._file = self._waiting.open("xb")
        return self

    def pair(self, module: str, up: np.ndarray, down: np.ndarray, dtype: str, *, embedding: bool = False) -> None:
        """Add a module's B `[out, r, ...]` and A `[r, in, ...]`, rounded to the floating-point type `dtype`."""
        self.ranks[module] = down.shape[0]
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        self.tensor(f"{module}.{first}", down, dtype)
        self.tensor(f"{module}.{second}", up, dtype)

    def tensor(self, name: str, values: np.ndarray, dtype: str) -> None:
        """Add a tensor of the model's, under the name it has in the adapter; floating-point `dtype`."""
        self.stored(name, narrow(np.ascontiguousarray(values), dtype), dtype)

    def stored(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Add a tensor that is in the storage type of `dtype` already."""
        key = f"{PREFIX}{name}"
        self._specs[key], self._offsets[key] = TensorSpec(dtype, array.shape), self._file.tell()
        flat = array.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            self._file.write(np.ascontiguousarray(flat[start : start + BLOCK]).view(np.uint8).data)

    def finish(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write the adapter's three files: its weights, its `config`, and `interfuse.json`, which says how it was made.

        To the record are added what each tensor is, with its hash, and the config's hash.
        """
        self._file.flush()
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
        self._file.close()
        self._waiting.unlink()


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

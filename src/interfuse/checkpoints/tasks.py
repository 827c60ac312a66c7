"""Several tasks' models in one folder: a trunk that is a model as any other, and for each task a bit an element and a number,

    OUT/model.safetensors              the trunk
    OUT/tasks/tasks.json               version 1: the base, each task's scale, each masked tensor's name and hash in the base
    OUT/tasks/NAME/mask.safetensors    U8 [ceil(n / 8)] for each masked tensor: elements in row-major order, lowest bit first

or, of models with different heads, each task's own head, and the config of its model if it has one:

    OUT/tasks/tasks.json               version 2: the names of the trunk's tensors that all tasks have, and of each one's head
    OUT/tasks/NAME/head.safetensors    the tensors of that head, as they were
    OUT/tasks/NAME/config.json

With masks, a task's tensor is base + scale (trunk - base) where its bit is 1, and the base elsewhere; one without a mask is
the trunk's. The base isn't copied: it's opened where it lies, and must be the one that it was. `OUT#NAME` names a task's
model wherever a checkpoint is named. Sources: EMR-Merging, https://arxiv.org/abs/2405.17461; TALL masks,
https://arxiv.org/abs/2405.07813.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import narrow, widen
from interfuse.checkpoints.remote.headers import open_anywhere
from interfuse.checkpoints.source import Checkpoint, TensorSpec, hash_block, hash_blocks, open_checkpoint
from interfuse.errors import CheckpointError, Problem, nearest

FOLDER, TABLE, MASK, HEAD = "tasks", "tasks.json", "mask.safetensors", "head.safetensors"
MASKS, HEADS = 1, 2  # versions


def split_task(ref: str | Path) -> tuple[Path, str] | None:
    """The folder and the task that `OUT#NAME` means; None for what is no such reference."""
    folder, sign, task = str(ref).rpartition("#")
    here = Path(folder).expanduser()
    try:
        plausible = bool(sign and folder and task) and not Path(ref).exists()
        found = plausible and ((here / FOLDER / TABLE).is_file() or holds_networks(here))
    except (OSError, ValueError):  # too long, or a null character: not a path here
        return None
    return (here, task) if found else None


def holds_networks(folder: Path) -> bool:
    """Whether a run has put networks of several tasks there that share layers: those are built again, not opened."""
    try:
        about = json.loads((folder / "interfuse.json").read_text(encoding="utf-8"))
        return bool(about["made"]["by"] in ("share_trunk", "tie"))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def on_disk(ref: str | Path) -> Path | None:
    """The file or folder on this machine that a reference means, a task's folder for `OUT#NAME`; None where there is none."""
    found = split_task(ref)
    path = Path(ref).expanduser() if found is None else found[0]
    try:
        return path if path.exists() else None
    except (OSError, ValueError):
        return None


def open_model(ref: str | Path, revision: str | None = None) -> Checkpoint:
    """A checkpoint by path, hub id or URL, or a task's model, `OUT#NAME`."""
    found = split_task(ref)
    return open_anywhere(str(ref), revision) if found is None else open_task(*found)


def open_task(folder: str | Path, task: str, base: str | Path | Checkpoint | None = None) -> Checkpoint:
    """The model of one task, computed as it is read; `base` where it has moved since. No tensor is read here.

    Anything missing or damaged is a `CheckpointError`; so is, when it's read, a tensor of the base that has changed.
    """
    about = read_tasks(folder)
    if task not in about["tasks"]:
        raise CheckpointError(Problem(str(folder), f"has no task {task!r}", nearest(task, about["tasks"])))
    if about["version"] == HEADS:
        return _with_head(folder, task, about)
    trunk, masks = open_checkpoint(folder), open_checkpoint(Path(folder) / FOLDER / task / MASK)
    root = _base(folder, about["base"], base)
    wrong = [
        Problem(str(folder), f"tensor {name!r} of task {task!r} doesn't fit its trunk, base or mask", "make the folder again")
        for name, (in_base, _) in about["tensors"].items()
        if not _fit(trunk.specs.get(name), root.specs.get(in_base), masks.specs.get(name))
    ]
    if wrong:
        raise CheckpointError(*wrong)
    scale = float(about["tasks"][task]["scale"])
    places = {
        name: Masked(trunk, root, masks, name, in_base, scale, bytes.fromhex(known))
        for name, (in_base, known) in about["tensors"].items()
    }
    name = f"{folder}#{task}"
    return replace(trunk, name=name, places={**trunk.places, **places}, within=(trunk, root, masks))


def _with_head(folder: str | Path, task: str, about: Mapping[str, Any]) -> Checkpoint:
    """The trunk with one task's head."""
    own = Path(folder) / FOLDER / task
    trunk, head = open_checkpoint(folder), open_checkpoint(own / HEAD)
    try:
        names, expected = list(about["trunk"]), list(about["tasks"][task]["head"])
    except (KeyError, TypeError):
        table = str(Path(folder) / FOLDER / TABLE)
        raise CheckpointError(Problem(table, "isn't a list of tasks with heads", "make the folder again")) from None
    wrong = [name for name in names if name not in trunk.specs] + [name for name in expected if name not in head.specs]
    if wrong:
        said = [f"tensor {name!r} of task {task!r} is missing" for name in wrong]
        raise CheckpointError(*(Problem(str(folder), line, "make the folder again") for line in said))
    specs = {name: trunk.specs[name] for name in names} | {name: head.specs[name] for name in expected}
    places = {name: (head if name in head.specs else trunk).places[name] for name in specs}
    config = own / "config.json"
    beside = {**trunk.beside, "config.json": config.read_bytes()} if config.is_file() else trunk.beside
    return replace(trunk, name=f"{folder}#{task}", specs=specs, places=places, within=(trunk, head), beside=beside)


def config_folder(folder: str | Path, task: str) -> Path | None:
    """Where a task's own config is, for tasks with heads; None where the trunk's holds for all."""
    found = Path(folder) / FOLDER / task
    return found if (found / HEAD).is_file() and (found / "config.json").is_file() else None


def read_tasks(folder: str | Path) -> dict[str, Any]:
    """What a folder's `tasks.json` says; one that is missing, damaged or of another version is a `CheckpointError`."""
    path = Path(folder) / FOLDER / TABLE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["version"]
    except FileNotFoundError:
        allowed = "merge with heads: separate, or with output: per_task, which emr and consensus have"
        raise CheckpointError(Problem(str(folder), "holds no tasks", allowed)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(Problem(str(path), "isn't a list of tasks", "make the folder again")) from None
    if version not in (MASKS, HEADS):
        raise CheckpointError(Problem(str(path), f"is of version {version!r}", f"this interfuse reads {MASKS} and {HEADS}"))
    found: dict[str, Any] = about
    return found


def task_table(
    method: str,
    base: tuple[str, str | None],
    scales: Mapping[str, float],
    tensors: Mapping[str, tuple[str, bytes]],
) -> str:
    """The content of `tasks.json`: a base's path or id and revision, task -> scale, tensor -> its name and hash in the base."""
    about = {
        "version": MASKS,
        "method": method,
        "base": {"model": base[0], "revision": base[1]},
        "tasks": {task: {"scale": scale} for task, scale in scales.items()},
        "tensors": {name: [in_base, known.hex()] for name, (in_base, known) in tensors.items()},
    }
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


def heads_table(method: str, trunk: Sequence[str], heads: Mapping[str, Sequence[str]]) -> str:
    """The content of `tasks.json` for tasks with heads: what all have of the trunk, and task -> the names of its head."""
    tasks = {task: {"head": list(names)} for task, names in heads.items()}
    about = {"version": HEADS, "method": method, "trunk": list(trunk), "tasks": tasks}
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


def packed(spec: TensorSpec) -> TensorSpec:
    """The spec of a tensor's mask."""
    return TensorSpec("U8", ((spec.count + 7) // 8,))


def pack(masks: np.ndarray) -> np.ndarray:
    """Rows of booleans `[M, n]`, from a multiple of 8 on, as bits: uint8 `[M, ceil(n / 8)]`."""
    return np.packbits(masks, axis=1, bitorder="little")


@dataclass
class Masked:
    """A place whose elements are a task's. A class, for it knows whether the base's tensor has been looked at."""

    trunk: Checkpoint
    base: Checkpoint
    masks: Checkpoint
    name: str
    in_base: str
    scale: float
    known: bytes
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: bool = False

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of base + scale (trunk - base), or of the base where the mask is 0."""
        self._look()
        stored = self.trunk.specs[self.name].dtype, self.base.specs[self.in_base].dtype
        kind: Any = np.float64 if "F64" in stored else np.float32
        trunk, base = np.empty(stop - start, kind), np.empty(stop - start, kind)
        widen(self.trunk.block(self.name, start, stop), stored[0], trunk)
        widen(self.base.block(self.in_base, start, stop), stored[1], base)
        bits = np.unpackbits(self.masks.block(self.name, start // 8, (stop + 7) // 8), bitorder="little")
        kept = bits[start % 8 : start % 8 + stop - start].view(bool)
        # A scale of 1 gives the trunk to the bit.
        values = trunk if self.scale == 1 else base + kind(self.scale) * (trunk - base)
        return narrow(np.where(kept, values, base), stored[0])

    def _look(self) -> None:
        """That the base's tensor is the one that the masks were made with: read once, before its first block."""
        with self._lock:
            if not self._seen and hash_blocks(map(hash_block, self.base.blocks(self.in_base))) != self.known:
                wrong = f"tensor {self.in_base!r} isn't the one that the tasks of {self.trunk.name} were made with"
                raise CheckpointError(Problem(self.base.name, wrong, "give the base as it was"))
            self._seen = True


def _base(folder: str | Path, about: Mapping[str, Any], given: str | Path | Checkpoint | None) -> Checkpoint:
    if isinstance(given, Checkpoint):
        return given
    try:
        return open_anywhere(str(given or about["model"]), None if given else about["revision"])
    except CheckpointError as error:
        if given:
            raise
        allowed = f"put it back, or say in {Path(folder) / FOLDER / TABLE} where it is"
        raise CheckpointError(*(Problem(f"the base of {folder}: {p.path}", p.wrong, allowed) for p in error.problems)) from None


def _fit(trunk: TensorSpec | None, base: TensorSpec | None, mask: TensorSpec | None) -> bool:
    if trunk is None or base is None:
        return False
    return base.shape == trunk.shape and mask == packed(trunk)

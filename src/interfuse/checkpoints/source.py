"""Named tensors wherever they are: `open_checkpoint(folder | file | module | mapping)` reads headers now and data late.

safetensors needs no torch. Torch's own files are opened with `weights_only` and `mmap`: a pickle that asks for anything
but tensors is refused, and there is no switch to allow it. Not a loader of models (`interfuse.models` builds those), and
nothing here looks at what a tensor means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from interfuse.checkpoints.header import STORAGE, read_header
from interfuse.checkpoints.header import TensorSpec as TensorSpec
from interfuse.checkpoints.places import MappedFile, Place, Resident, Stored
from interfuse.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

#: Elements a block has: the unit in which everything is streamed.
BLOCK = 2**20

_TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Named tensors that can be read in any order, whole or in part. Made by `open_checkpoint`.

    `name` is what to call it in messages, `specs` each tensor's type and shape in stored order, `folder` the folder that
    was opened, with its side files (None for a single file and in memory). `declared` has the types of tensors that are
    computed in another one than the model has them in.
    """

    name: str
    specs: dict[str, TensorSpec]
    folder: Path | None
    places: Mapping[str, Place]
    declared: Mapping[str, str] = field(default_factory=dict)

    def block(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` in row-major order, flat, in the storage type; don't write to it. Thread-safe."""
        if start >= stop:
            return np.empty(0, self.specs[name].storage)
        return self.places[name].block(start, stop)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor in its storage type (BF16 as `uint16`), mapped or shared where possible; don't write to it."""
        spec = self.specs[name]
        return self.block(name, 0, spec.count).reshape(spec.shape)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[np.ndarray]:
        """The tensor's elements in row-major order, `size` at a time."""
        count = self.specs[name].count
        for start in range(0, count, size):
            yield self.block(name, start, min(start + size, count))

    def position(self, name: str) -> tuple[str, int]:
        """The file and the byte where a tensor begins: what is read in this order is read as the disk has it."""
        place = self.places[name]
        return (str(place.file.path), place.offset) if isinstance(place, Stored) else ("", 0)

    def files(self) -> list[MappedFile]:
        """The files that tensors lie in, in order."""
        return list(dict.fromkeys(place.file for place in self.places.values() if isinstance(place, Stored)))

    def hash(self) -> str:
        """The XXH3 of all names, types, shapes and bytes: equal tensors, equal hash, however they are stored."""
        return hash_of({name: (spec, map(hash_block, self.blocks(name))) for name, spec in self.specs.items()})


def hash_block(block: np.ndarray) -> bytes:
    """The 128-bit XXH3 of a block's bytes; a tensor is hashed in blocks of `BLOCK` elements."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(block).view(np.uint8).data)


def hash_of(tensors: Mapping[str, tuple[TensorSpec, Iterable[bytes]]]) -> str:
    """The hash of a checkpoint from its tensors' specs and the hashes of their blocks: 32 hexadecimal digits.

    It tells changed or damaged files; it isn't made to withstand someone who forges them.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        spec, blocks = tensors[name]
        digest.update(json.dumps([name, spec.dtype, spec.shape]).encode())
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def open_checkpoint(ref: str | Path | torch.nn.Module | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """Open a checkpoint: a folder, a file, an `nn.Module`, or a mapping of tensors or arrays.

    In a folder that is `model.safetensors`, else its index of shards, else `pytorch_model.bin` or its index, else the only
    file of weights. Anything missing, damaged or ambiguous is a `CheckpointError`.
    """
    if isinstance(ref, Checkpoint):
        return ref
    if isinstance(ref, Mapping):
        return _in_memory("mapping", ref)
    if not isinstance(ref, (str, Path)):
        return _module(ref)
    path = Path(ref)
    if not path.exists():
        raise CheckpointError(Problem(str(ref), "no such file or folder", "give a folder or file of weights on this machine"))
    if path.is_dir():
        return replace(_from_file(str(ref), _weights_file(path)), folder=path)
    return _from_file(str(ref), path)


def _weights_file(folder: Path) -> Path:
    """The file that says where a folder's weights are."""
    names = sorted(item.name for item in folder.iterdir() if item.is_file() and not item.name.startswith("."))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_TORCH_FILES) and not name.startswith(_NOT_WEIGHTS)]
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if name in names:
            return folder / name
    if len(indexes) == 1:
        return folder / indexes[0]
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if name in names:
            return folder / name
    candidates = weights or pickles
    if "adapter_config.json" in names and candidates:
        raise CheckpointError(Problem(str(folder), "holds a LoRA adapter, not a model", "merge it into its model first"))
    if len(candidates) == 1 and not indexes:
        return folder / candidates[0]
    found = ", ".join(indexes + candidates)
    wrong = f"{len(indexes + candidates)} files of weights, none named model: {found}" if found else "no file of weights"
    raise CheckpointError(Problem(str(folder), wrong, "name the file itself, e.g. FOLDER/model.safetensors"))


def _from_file(name: str, path: Path) -> Checkpoint:
    if path.name.endswith(".index.json"):
        return _from_index(name, path)
    if path.suffix == ".safetensors":
        file = MappedFile(path)
        entries = read_header(path)
        return Checkpoint(
            name,
            {key: entry.spec for key, entry in entries.items()},
            None,
            {key: Stored(file, entry.offset, entry.spec) for key, entry in entries.items()},
        )
    if path.suffix in _TORCH_FILES:
        from interfuse.checkpoints.tensors import load_file

        return _in_memory(name, load_file(path))
    raise CheckpointError(
        Problem(name, f"{path.name!r} isn't a file of weights", "allowed: .safetensors, .bin, .pt, .pth, .ckpt")
    )


def _from_index(name: str, path: Path) -> Checkpoint:
    """A sharded checkpoint: the index says which file beside it holds which tensor."""
    where = _weight_map(path)
    names = list(dict.fromkeys(where.values()))
    absent = [shard for shard in names if not (path.parent / shard).is_file()]
    if absent:
        raise CheckpointError(*(Problem(str(path), f"{shard!r} isn't there", "get that file too") for shard in absent))
    shards = {shard: _from_file(str(path.parent / shard), path.parent / shard) for shard in names}
    missing = [key for key, shard in where.items() if key not in shards[shard].specs]
    unlisted = [key for shard in shards.values() for key in shard.specs if key not in where]
    problems = [Problem(str(path), f"tensor {key!r} isn't in {where[key]!r}", "get the files again") for key in missing]
    problems += [Problem(str(path), f"tensor {key!r} is in a shard but not in the index") for key in unlisted]
    if problems:
        raise CheckpointError(*problems)
    specs = {key: shards[shard].specs[key] for key, shard in where.items()}
    return Checkpoint(name, specs, None, {key: shards[shard].places[key] for key, shard in where.items()})


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of an index, each file a plain name in the index's own folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        where = index["weight_map"]
        good = isinstance(where, dict) and all(isinstance(shard, str) for shard in where.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        good = False
    if not good:
        raise CheckpointError(Problem(str(path), "isn't an index with a weight_map", "get the file again"))
    problems = [
        Problem(str(path), f"tensor {key!r} lies in {shard!r}", "a shard is a plain file name beside the index")
        for key, shard in where.items()
        if PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard or shard == ".."
    ]
    problems += [
        Problem(str(path), f"tensor {key!r} lies in {shard!r}", "a shard is a .safetensors or .bin file")
        for key, shard in where.items()
        if not shard.endswith((".safetensors", *_TORCH_FILES)) and not problems
    ]
    if problems:
        raise CheckpointError(*problems)
    return where


def _module(module: Any) -> Checkpoint:
    import torch

    name = type(module).__name__
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(Problem("", f"can't read weights from a {name}", "give a folder, file, module or mapping"))
    # A module's extra state isn't a tensor that could be merged: whoever copies the module keeps it.
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}
    return _in_memory(name, state)


def _in_memory(name: str, tensors: Mapping[str, Any]) -> Checkpoint:
    specs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    problems = []
    for key, value in tensors.items():
        try:
            specs[key], places[key] = _array(value) if isinstance(value, np.ndarray) else _tensor(value)
        except CheckpointError as error:
            problems += [Problem(name, f"tensor {key!r} {problem.wrong}", problem.allowed) for problem in error.problems]
    if problems:
        raise CheckpointError(*problems)
    return Checkpoint(name, specs, None, places)


def _array(array: np.ndarray) -> tuple[TensorSpec, Place]:
    for dtype, storage in STORAGE.items():
        if array.dtype == storage and not dtype.startswith(("BF", "F8")):
            return TensorSpec(dtype, array.shape), Resident(lambda: np.ascontiguousarray(array).reshape(array.shape))
    raise CheckpointError(Problem("", f"has dtype {array.dtype}", "use a little-endian number type, or a torch tensor"))


def _tensor(value: Any) -> tuple[TensorSpec, Place]:
    from interfuse.checkpoints.tensors import spec_of, to_array

    return spec_of(value), Resident(lambda: to_array(value))

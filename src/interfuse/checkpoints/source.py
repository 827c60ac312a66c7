"""Named tensors wherever they are: `open_checkpoint(folder | file | module | mapping)` reads headers now and data late.

safetensors needs no torch. Torch's own files are opened with `weights_only`: a pickle that asks for anything but tensors is
refused, and there is no switch to allow it. Which files of a folder these are is for `folders` to say, and
what isn't on this machine for `remote` to open. Not a loader of models (`interfuse.models` builds those), and nothing here
looks at what a tensor means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from interfuse.checkpoints.folders import INDEX, MODULES, PIPELINE, SAFE, TORCH, Weights, find_weights, indexed, is_weights
from interfuse.checkpoints.header import STORAGE, Entry, read_header
from interfuse.checkpoints.header import TensorSpec as TensorSpec
from interfuse.checkpoints.names import listed
from interfuse.checkpoints.places import File, LocalFile, Place, Resident, Stored, Strided
from interfuse.checkpoints.remote.store import Store
from interfuse.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

#: Elements a block has at most: the unit in which everything is streamed, so small that a few stay in a core's cache.
BLOCK = 2**17


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Named tensors that can be read in any order, whole or in part. Made by `open_checkpoint`.

    `name` is what to call it in messages, `specs` each tensor's type and shape in stored order, `folder` the folder that
    was opened, with its side files (None for a single file and in memory). `declared` has the types of tensors that are
    computed in another one than the model has them in, and `within` the checkpoints that such tensors are computed from.
    `stems` says what an output's file is called, for each sub-folder that is merged with the rest (`unet/`). A model that
    isn't on this machine has a `store`. `beside` are small files that it has otherwise than its folder (None: hasn't).
    """

    name: str
    specs: dict[str, TensorSpec]
    folder: Path | None
    places: Mapping[str, Place]
    declared: Mapping[str, str] = field(default_factory=dict)
    within: tuple[Checkpoint, ...] = ()
    stems: Mapping[str, str] = field(default_factory=lambda: {"": "model"})
    store: Store | None = None
    beside: Mapping[str, bytes | None] = field(default_factory=dict)

    def block(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` in row-major order, flat, in the storage type; don't write to it. Thread-safe."""
        if start >= stop:
            return np.empty(0, self.specs[name].storage)
        return self.places[name].block(start, stop)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor in its storage type (BF16 as `uint16`), shared where it is in memory; don't write to it."""
        spec = self.specs[name]
        return self.block(name, 0, spec.count).reshape(spec.shape)

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[np.ndarray]:
        """The tensor's elements in row-major order, in its `spans`."""
        for start, stop in spans(self.specs[name].shape, size):
            yield self.block(name, start, stop)

    def position(self, name: str) -> tuple[str, int]:
        """The file and the byte where a tensor begins: what is read in this order is read as the disk has it."""
        place = self.places[name]
        return (str(place.file.path), place.offset) if isinstance(place, Stored) else ("", 0)

    def files(self, names: Iterable[str] | None = None) -> list[File]:
        """The files that tensors lie in, or these, in order; of tensors that are computed, all that they may be from."""
        places = list(self.places.values()) if names is None else [self.places[name] for name in names]
        found = [place.file for place in places if isinstance(place, (Stored, Strided, Resident)) and place.file is not None]
        if len(found) < len(places):
            found += [file for checkpoint in self.within for file in checkpoint.files()]
        return list(dict.fromkeys(found))

    def stores(self) -> list[Store]:
        """Where it comes from that isn't on this machine."""
        own = [] if self.store is None else [self.store]
        return list(dict.fromkeys([*own, *(store for checkpoint in self.within for store in checkpoint.stores())]))

    def origins(self) -> dict[str, list[str]]:
        """For a record: where it is exactly, its commit included, if it isn't on this machine."""
        found = [store.origin for store in self.stores()]
        return {"origins": found} if found else {}

    def hash(self) -> str:
        """The XXH3 of all names, types, shapes and bytes: equal tensors, equal hash, however they are stored."""
        return hash_of({name: (spec, hash_blocks(map(hash_block, self.blocks(name)))) for name, spec in self.specs.items()})


def spans(shape: Sequence[int], size: int = BLOCK) -> list[tuple[int, int]]:
    """Where the blocks of a tensor begin and end, which it is streamed and hashed in.

    Each has as many whole slices along the first axis as fit, else along the next, and so on; a row that is longer than a
    block is cut in pieces of its own.
    """
    count, row = math.prod(shape), shape[-1] if shape else 1
    if row > size:
        ends = [(at, at + row) for at in range(0, count, row)]
        return [(start, min(start + size, end)) for at, end in ends for start in range(at, end, size)]
    width = 1
    for length in reversed(shape):
        if width * length > size:
            break
        width *= max(length, 1)
    step = size // width * width
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def hash_block(block: np.ndarray) -> bytes:
    """The 128-bit XXH3 of a block's bytes."""
    return xxhash.xxh3_128_digest(block.data if block.flags.c_contiguous else np.ascontiguousarray(block).data)


def hash_blocks(blocks: Iterable[bytes]) -> bytes:
    """The hash of a tensor from those of its blocks, in order, which are its `spans`."""
    return xxhash.xxh3_128_digest(b"".join(blocks))


def hash_of(tensors: Mapping[str, tuple[TensorSpec, bytes]]) -> str:
    """The hash of a checkpoint from its tensors' specs and hashes: 32 hexadecimal digits.

    It tells changed or damaged files; it isn't made to withstand someone who forges them.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        spec, own = tensors[name]
        digest.update(json.dumps([name, spec.dtype, spec.shape]).encode())
        digest.update(own)
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
        return open_folder(path, str(ref))
    if path.name.endswith(INDEX):
        names = [item.name for item in path.parent.iterdir()]
        weights = indexed(str(path.parent), "", path.name, names, lambda name: _text(path.parent / name))
        return assembled(str(ref), [weights], lambda name: _from_file(str(path.parent / name), path.parent / name))
    return _from_file(str(ref), path)


def open_folder(folder: Path, name: str = "", stems: Mapping[str, str] | None = None) -> Checkpoint:
    """`open_checkpoint` of a folder; with `stems`, of one that was written with them and may lack its side files."""
    names = [item.name for item in folder.iterdir() if not item.name.startswith(".")]
    if stems is not None or {PIPELINE, MODULES} & set(names) or not any(map(is_weights, names)):
        names += [f"{sub}/{item.name}" for sub in names if (folder / sub).is_dir() for item in (folder / sub).iterdir()]
    text = lambda name: _text(folder / name)
    if stems is None:
        found = find_weights(str(folder), names, text)
    else:
        found = [_written(str(folder), inner, stem, names, text) for inner, stem in stems.items()]
    whole = assembled(name or str(folder), found, lambda file: _from_file(str(folder / file), folder / file))
    return replace(whole, folder=folder)


def _written(folder: str, inner: str, stem: str, names: Sequence[str], text: Callable[[str], str]) -> Weights:
    """The weights that lie in files of that stem."""
    single, index = f"{stem}{SAFE}", f"{stem}{SAFE}{INDEX}".removeprefix(inner)
    if single in names:
        return Weights(inner, stem, (single,))
    return indexed(folder, inner, index, [name.removeprefix(inner) for name in names], text)


def assembled(name: str, found: Sequence[Weights], open_file: Callable[[str], Checkpoint]) -> Checkpoint:
    """One checkpoint of all these weights: `open_file` opens each file, by its path in the folder."""
    specs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    for weights in found:
        files = {file: open_file(file) for file in weights.files}
        if len(files) == 1 and weights.where is None and not weights.inner:  # all of it, as it is
            (only,) = files.values()
            specs |= only.specs
            places |= only.places
            continue
        for tensor, file in _where(weights, files).items():
            specs[weights.inner + tensor] = files[file].specs[tensor]
            places[weights.inner + tensor] = files[file].places[tensor]
    return Checkpoint(name, specs, None, places, stems={weights.inner: weights.stem for weights in found})


def _where(weights: Weights, files: Mapping[str, Checkpoint]) -> Mapping[str, str]:
    """Tensor -> file, as the index says, with which the files must agree; without one, each tensor is in one file."""
    if weights.where is not None:
        where = weights.where
        short = {file: file.removeprefix(weights.inner) for file in files}
        missing: dict[str, list[str]] = {}
        for key, file in where.items():
            if key not in files[file].specs:
                missing.setdefault(file, []).append(key)
        unlisted = [key for file in files.values() for key in file.specs if key not in where]
        lines = [line for file, keys in missing.items() for line in listed(keys, f"not in {short[file]!r}")]
        problems = [Problem(weights.told_by, line, "get the files again") for line in lines]
        problems += [Problem(weights.told_by, line) for line in listed(unlisted, "in a shard but not in the index")]
    else:
        pairs = [(key, file) for file, checkpoint in files.items() for key in checkpoint.specs]
        where = dict(pairs)
        allowed = "shards that split each tensor, and models beside each other, can't be read: name one file"
        wrong = [(files[file].name, key) for key, file in pairs if where[key] != file]
        problems = [Problem(name, f"tensor {key!r} is in {where[key]!r} too", allowed) for name, key in wrong[:1]]
    if problems:
        raise CheckpointError(*problems)
    return where


def stored(name: str, file: File, entries: Mapping[str, Entry]) -> Checkpoint:
    """The checkpoint of one .safetensors file with these entries."""
    places = {key: Stored(file, entry.offset, entry.spec) for key, entry in entries.items()}
    return Checkpoint(name, {key: entry.spec for key, entry in entries.items()}, None, places)


def _from_file(name: str, path: Path) -> Checkpoint:
    if path.suffix == SAFE:
        return stored(name, LocalFile(path), read_header(path))
    if path.suffix in TORCH:
        from interfuse.checkpoints.tensors import load_file

        file = LocalFile(path)  # as it is before it's loaded
        return _in_memory(name, load_file(file), file)
    allowed = f"allowed: {', '.join((SAFE, *TORCH))}"
    raise CheckpointError(Problem(name, f"{path.name!r} isn't a file of weights", allowed))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"can't be read as text ({error})", "get the file again")) from None


def _module(module: Any) -> Checkpoint:
    import torch

    name = type(module).__name__
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(Problem("", f"can't read weights from a {name}", "give a folder, file, module or mapping"))
    # A module's extra state isn't a tensor that could be merged: whoever copies the module keeps it.
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}
    return _in_memory(name, state)


def _in_memory(name: str, tensors: Mapping[str, Any], file: File | None = None) -> Checkpoint:
    """The checkpoint of these tensors, which were loaded from `file`, if from one; some may still lie in it."""
    specs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    problems = []
    for key, value in tensors.items():
        if not isinstance(key, str):
            problems.append(Problem(name, f"tensor {key!r} has a name of type {type(key).__name__}", "name tensors by texts"))
            continue
        try:
            if isinstance(value, (Stored, Strided)):
                specs[key], places[key] = value.spec, value
                continue
            specs[key], get = _array(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else _tensor(value)
            places[key] = Resident(get, file)
        except CheckpointError as error:
            problems += [Problem(name, f"tensor {key!r} {problem.wrong}", problem.allowed) for problem in error.problems]
    if problems:
        raise CheckpointError(*problems)
    return Checkpoint(name, specs, None, places)


def _array(array: np.ndarray) -> tuple[TensorSpec, Callable[[], np.ndarray]]:
    for dtype, storage in STORAGE.items():
        if array.dtype == storage and not dtype.startswith(("BF", "F8")):
            return TensorSpec(dtype, array.shape), lambda: np.ascontiguousarray(array).reshape(array.shape)
    raise CheckpointError(Problem("", f"has dtype {array.dtype}", "use a little-endian number type, or a torch tensor"))


def _tensor(value: Any) -> tuple[TensorSpec, Callable[[], np.ndarray]]:
    from interfuse.checkpoints.tensors import spec_of, to_array

    return spec_of(value), lambda: to_array(value)

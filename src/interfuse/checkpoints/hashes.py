"""What a written folder says of its contents: each tensor's type, shape and hash, and each other file's hash.

They tell what was changed or damaged, and where; they aren't made to withstand someone who forges them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import xxhash

from interfuse.checkpoints.source import Checkpoint, TensorSpec, hash_block, hash_blocks, hash_of

#: Files that speak of the folder, or are written when it is whole.
_OF_THE_FOLDER = ("README.md", "interfuse.json", "recipe.yaml")


def tensor_lines(tensors: Mapping[str, tuple[TensorSpec, bytes]]) -> dict[str, str]:
    """`F32[2, 3] 0f..`: each tensor's type and shape, and its XXH3, from its spec and the hash of its elements."""
    return {name: f"{spec} {hash_of({name: (spec, own)})}" for name, (spec, own) in tensors.items()}


def line_of(checkpoint: Checkpoint, name: str) -> str:
    """The line of one tensor, read for it."""
    own = hash_blocks(map(hash_block, checkpoint.blocks(name)))
    return tensor_lines({name: (checkpoint.specs[name], own)})[name]


def lines_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The line of every tensor of a checkpoint."""
    return {name: line_of(checkpoint, name) for name in checkpoint.specs}


def file_hashes(folder: Path, weights: Collection[Path]) -> dict[str, str]:
    """The XXH3 of every file in a folder by its path there: not of these weights, and not of what speaks of the folder."""
    there = sorted(item for item in folder.rglob("*") if item.is_file() and item not in weights)
    names = {path.relative_to(folder).as_posix(): path for path in there}
    return {name: hash_file(path) for name, path in names.items() if name not in _OF_THE_FOLDER}


def hash_file(path: Path) -> str:
    """The 128-bit XXH3 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

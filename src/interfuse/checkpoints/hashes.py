"""What a written folder says of its contents: each tensor's type, shape and hash, and each other file's hash.

They tell what was changed or damaged, and where; they aren't made to withstand someone who forges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

from interfuse.checkpoints.source import Checkpoint, TensorSpec, hash_block, hash_blocks, hash_of

#: Files that speak of the folder, or are written when it is whole.
_OF_THE_FOLDER = ("README.md", "interfuse.json", "recipe.yaml", "journal.jsonl")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def tensor_lines(tensors: Mapping[str, tuple[TensorSpec, bytes]]) -> dict[str, str]:
    """`F32[2, 3] 0f..`: each tensor's type and shape, and its XXH3."""
    return {name: f"{spec} {hash_of({name: (spec, found)})}" for name, (spec, found) in tensors.items()}


def line_of(checkpoint: Checkpoint, name: str) -> str:
    """The line of one tensor, read for it."""
    spec = checkpoint.specs[name]
    return tensor_lines({name: (spec, hash_blocks(map(hash_block, checkpoint.blocks(name))))})[name]


def lines_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The line of every tensor of a checkpoint."""
    return {name: line_of(checkpoint, name) for name in checkpoint.specs}


def file_hashes(folder: Path) -> dict[str, str]:
    """The XXH3 of every file in a folder by its path there: not of weights at the top, and not of what speaks of the folder."""
    found = {}
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in _OF_THE_FOLDER and not (path.parent == folder and name.endswith(_WEIGHTS)):
            found[name] = hash_file(path)
    return found


def hash_file(path: Path) -> str:
    """The 128-bit XXH3 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

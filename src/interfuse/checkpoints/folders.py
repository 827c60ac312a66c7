"""Which files of a folder hold a model's weights, told from their names: alone, in shards, in sub-folders.

Names in, names out: the folder may be on this machine or elsewhere, and no tensor is read. A pipeline (diffusers'
`model_index.json`) or a stack of modules (sentence-transformers' `modules.json`) is one model, whose tensors are named
`unet/conv_in.weight` after the sub-folder that they lie in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from interfuse.errors import CheckpointError, Problem

SAFE = ".safetensors"
TORCH = (".bin", ".pt", ".pth", ".ckpt")
INDEX = ".index.json"
#: Lists of a model's sub-folders.
PIPELINE, MODULES = "model_index.json", "modules.json"

_SHOWN = 3  # tensors of an index that a message lists of many
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
#: What says where the weights are, the first that is there.
_USUAL = tuple(f"{stem}{end}" for stem in ("model", "diffusion_pytorch_model") for end in (SAFE, SAFE + INDEX))
_USUAL_TORCH = tuple(f"{stem}.bin{end}" for stem in ("pytorch_model", "diffusion_pytorch_model") for end in ("", INDEX))
#: A shard's name: what all have in common, its number, of how many.
_SHARD = re.compile(r"(?P<stem>.+?)[-._](?P<number>\d{2,5})(?:-of-(?P<total>\d{2,5}))?(?P<end>\.[a-z]+)")


class Weights(NamedTuple):
    """The files that hold one model, or one of a pipeline's; all paths are in the folder.

    `inner` is the sub-folder with its slash, or nothing; `stem` what an output's file is called, without its ending;
    `where` says in which file each tensor is, as the index has it that `told_by` names (None without one).
    """

    inner: str
    stem: str
    files: tuple[str, ...]
    where: Mapping[str, str] | None = None
    told_by: str = ""


def find_weights(folder: str, names: Sequence[str], text: Callable[[str], str]) -> list[Weights]:
    """The weights in a folder with the files `names`, sub-folders' among them (`unet/config.json`).

    `text` gives a small file's content. Anything missing or ambiguous is a `CheckpointError`.
    """
    names = sorted(names)
    inner, alone = _listed(folder, names, text)
    found = [_weights(folder, name, names, text) for name in inner]
    return found if alone else [_weights(folder, "", names, text), *found]


def is_weights(name: str) -> bool:
    """Whether a file, by its name, holds weights or is their index."""
    base = name.rpartition("/")[2]
    return base.endswith((SAFE, INDEX)) or (base.endswith(TORCH) and not base.startswith(_NOT_WEIGHTS))


def weight_map(path: str, text: str) -> dict[str, str]:
    """Tensor -> file of an index, each file a plain name in the index's own folder; `path` names it in messages."""
    try:
        where = json.loads(text)["weight_map"]
        good = isinstance(where, dict) and all(isinstance(shard, str) for shard in where.values())
    except (ValueError, RecursionError, KeyError, TypeError):
        good = False
    if not good:
        raise CheckpointError(Problem(path, "isn't an index with a weight_map", "get the file again"))
    for allowed, test in (("a plain file name beside the index", _is_plain), ("a .safetensors or .bin file", _is_shard)):
        wrong = [f"{key!r} lies in {shard!r}" for key, shard in where.items() if not test(shard)]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more such tensors" if len(wrong) > _SHOWN else ""
            raise CheckpointError(Problem(path, f"tensor {', '.join(wrong[:_SHOWN])}{more}", f"a shard is {allowed}"))
    return where


def _is_plain(shard: str) -> bool:
    return PurePosixPath(shard).name == shard and PureWindowsPath(shard).name == shard and shard != ".."


def _is_shard(shard: str) -> bool:
    return shard.endswith((SAFE, *TORCH))


def indexed(folder: str, inner: str, name: str, names: Sequence[str], text: Callable[[str], str]) -> Weights:
    """The weights that the index `name` in a folder (and there in `inner`) tells of."""
    place = f"{folder}/{inner}{name}"
    where = weight_map(place, text(inner + name))
    shards = list(dict.fromkeys(where.values()))
    absent = [shard for shard in shards if shard not in names]
    if absent:
        raise CheckpointError(*(Problem(place, f"{shard!r} isn't there", "get that file too") for shard in absent))
    files = tuple(inner + shard for shard in shards)
    return Weights(inner, _stem(inner, name), files, {key: inner + shard for key, shard in where.items()}, place)


def _listed(folder: str, names: Sequence[str], text: Callable[[str], str]) -> tuple[list[str], bool]:
    """The sub-folders with weights that a folder's list names, and whether they are the whole model."""
    paths: list[Any] = []
    if PIPELINE in names:
        parts = _read(folder, PIPELINE, text, dict).items()
        paths = [key for key, value in parts if isinstance(value, list) and value and value[0] is not None]
    elif MODULES in names:
        listed = _read(folder, MODULES, text, list)
        paths = [module.get("path") for module in listed if isinstance(module, dict)]
    inner = [f"{path}/" for path in paths if path and isinstance(path, str)]
    inner = [path for path in dict.fromkeys(inner) if any(map(is_weights, _within(names, path)))]
    return inner, bool(inner) and "" not in paths


def _within(names: Sequence[str], inner: str) -> list[str]:
    """The names directly in a sub-folder, without it."""
    found = [name.removeprefix(inner) for name in names if name.startswith(inner)]
    return [name for name in found if "/" not in name and not name.startswith(".")]


def _read(folder: str, name: str, text: Callable[[str], str], kind: type) -> Any:
    try:
        content = json.loads(text(name))
    except ValueError:
        content = None
    if not isinstance(content, kind):
        raise CheckpointError(Problem(f"{folder}/{name}", "isn't a list of a model's parts", "get the file again"))
    return content


def _weights(folder: str, inner: str, below: Sequence[str], text: Callable[[str], str]) -> Weights:
    """The weights directly in a folder, or in a sub-folder of it; `below` are all names in the folder."""
    names = _within(below, inner)
    indexes = [name for name in names if name.endswith(SAFE + INDEX)]
    safe = [name for name in names if name.endswith(SAFE)]
    pickles = [name for name in names if name.endswith(TORCH) and not name.startswith(_NOT_WEIGHTS)]
    usual = next((name for name in _USUAL if name in names), indexes[0] if len(indexes) == 1 else None)
    usual = usual or next((name for name in _USUAL_TORCH if name in names), None)
    candidates = safe or pickles
    if usual is None and "adapter_config.json" in names and candidates:
        raise CheckpointError(Problem(folder, "holds a LoRA adapter, not a model", "name its model before it: MODEL+ADAPTER"))
    if usual is not None and usual.endswith(INDEX):
        return indexed(folder, inner, usual, names, text)
    if usual is not None:
        return Weights(inner, _stem(inner, usual), (inner + usual,))
    place = f"{folder}/{inner}".rstrip("/")
    chosen = [] if indexes else _shards(place, candidates) or (candidates if len(candidates) == 1 else [])
    if not chosen:
        raise CheckpointError(_unclear(place, indexes + candidates, below))
    return Weights(inner, _stem(inner, chosen[0]), tuple(inner + name for name in chosen))


def _unclear(folder: str, found: list[str], below: Sequence[str]) -> Problem:
    wrong = f"{len(found)} files of weights, none named model: {', '.join(found)}" if found else "no file of weights"
    subs = list(dict.fromkeys(name.partition("/")[0] for name in below if "/" in name and is_weights(name)))
    if not found and subs:
        return Problem(folder, wrong, f"name the file itself, or the sub-folder: {', '.join(subs[:10])}")
    return Problem(folder, wrong, "name the file itself, e.g. FOLDER/model.safetensors")


def _shards(folder: str, names: list[str]) -> list[str]:
    """The names if they are one model's shards, numbered without a gap; else none. Shards that they count must be there."""
    found = [match for match in map(_SHARD.fullmatch, names) if match]
    kinds = {(match["stem"], match["end"], match["total"]) for match in found}
    if len(found) < len(names) or len(kinds) != 1:
        return []
    numbers = sorted(int(match["number"]) for match in found)
    total = next(iter(kinds))[2]
    if total is not None and len(numbers) != int(total):
        raise CheckpointError(Problem(folder, f"has {len(numbers)} of {int(total)} shards", "get the others too"))
    return names if numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] <= 1 else []


def _stem(inner: str, name: str) -> str:
    """What the output's file is called, by that of an input: as its library looks for it."""
    stem = name.removesuffix(INDEX).rpartition(".")[0]
    match = _SHARD.fullmatch(f"{stem}.x")
    stem = (match["stem"] if match else stem).removeprefix("pytorch_")
    return inner + stem if inner or stem.startswith("diffusion_pytorch_model") else "model"


def inner_of(name: str, stems: Mapping[str, str]) -> str:
    """The sub-folder that a tensor is in, of those that `stems` has."""
    head = name[: name.find("/") + 1] if "/" in name else ""
    if head in stems:
        return head
    return next((inner for inner in stems if inner and name.startswith(inner)), "")


def split(names: Sequence[str], stems: Mapping[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """For each sub-folder of `stems`: it, the stem of its file, and its tensors."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(inner_of(name, stems), []).append(name)
    for inner, found in groups.items():
        yield inner, stems.get(inner, "model"), found

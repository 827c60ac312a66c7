"""A model that isn't on this machine, opened from its headers: a few kilobytes of each file, whatever its size.

Its tensors are read from files that are fetched whole when they are first needed (`store.fetch` does it beforehand). Torch's
own files have no header that could be read apart: they are fetched when they are opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from interfuse.checkpoints.folders import INDEX, SAFE, Weights, find_weights, indexed, is_weights
from interfuse.checkpoints.header import Entry, header_of
from interfuse.checkpoints.remote.hub import hub_store, is_hub_id
from interfuse.checkpoints.remote.store import Store
from interfuse.checkpoints.remote.urls import is_url, url_store
from interfuse.checkpoints.source import Checkpoint, assembled, open_checkpoint, stored
from interfuse.errors import CheckpointError, Problem

#: What planning reads whole.
_LISTS = ("config.json", "model_index.json", "modules.json", "adapter_config.json", "README.md")
#: Bytes of a file that are asked for first: most headers fit.
_FIRST = 2**16
_AT_ONCE = 8
_LARGEST_SIDE_FILE = 64 * 2**20
OTHER_FORMS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz")


def place_of(path: str, revision: str | None) -> tuple[Path | Store, str | None]:
    """Where a model is: a path on this machine, or a store; and the file in the store, if one is named."""
    here = Path(path).expanduser()
    if is_url(path):
        return url_store(path)
    if not here.exists() and is_hub_id(path, revision):
        return hub_store(path, revision), None
    return here, None


def open_anywhere(path: str, revision: str | None = None) -> Checkpoint:
    """`open_checkpoint` of a path, a hub id or a URL."""
    where, file = place_of(path, revision)
    if isinstance(where, Store):
        return open_store(where, file)
    if is_url(path) or where == Path(path).expanduser():
        return open_checkpoint(where)
    name = path if revision is None else f"{path}@{revision}"
    try:
        return replace(open_checkpoint(where), name=name)
    except CheckpointError as error:
        wrong = "the hub can't be reached, and its cache hasn't the whole model"
        raise CheckpointError(Problem(name, wrong, "run again with a network"), *error.problems) from None


def open_store(store: Store, file: str | None = None) -> Checkpoint:
    """The checkpoint in a store, or in one file of it, from its headers."""
    names = list(store.sizes)
    if file is not None and file.endswith(INDEX):
        found = [indexed(store.name, "", file, names, store.text)]
    elif file is not None:
        found = [Weights("", "model", (file,))]
    else:
        found = find_weights(store.name, names, store.text)
        lists = [name for name in names if name in _LISTS]
        lists += [f"{w.inner}config.json" for w in found if w.inner and f"{w.inner}config.json" in names]
        store.get(lists, False)
    files = [name for weights in found for name in weights.files]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        opened = dict(zip(files, pool.map(lambda name: _file(store, name), files), strict=True))
    problems = [problem for result in opened.values() if isinstance(result, CheckpointError) for problem in result.problems]
    if problems:
        raise CheckpointError(*problems)
    good = {name: result for name, result in opened.items() if isinstance(result, Checkpoint)}
    whole = assembled(store.name, found, lambda name: good[name])
    return replace(whole, folder=store.folder if file is None else None, store=store)


def side_files(store: Store) -> list[str]:
    """What comes along with a model's weights: config, tokenizer, code, and the like."""
    return [
        name
        for name, size in store.sizes.items()
        if not is_weights(name)
        and not name.endswith(OTHER_FORMS)
        and (size or 0) <= _LARGEST_SIDE_FILE
        and not any(part.startswith((".", "checkpoint-")) for part in name.split("/"))
    ]


def _file(store: Store, name: str) -> Checkpoint | CheckpointError:
    """One file of weights, or what is wrong with it."""
    try:
        if not name.partition("?")[0].endswith(SAFE):
            store.get([name], True)
            return open_checkpoint(store.folder / name)
        return stored(f"{store.name}/{name}", store.file(name), _header(store, name))
    except CheckpointError as error:
        return error


def _header(store: Store, name: str) -> dict[str, Entry]:
    size = store.sizes[name]
    if size is None:
        wrong = "its server doesn't say how long the file is"
        raise CheckpointError(Problem(f"{store.name}/{name}", wrong, "download it, and give its path"))
    return header_of(f"{store.name}/{name}", size, lambda start, stop: store.read(name, start, stop), first=_FIRST)


def free_space_problems(stores: Sequence[tuple[Store, Sequence[str]]]) -> list[Problem]:
    """What doesn't fit on the disk of what is still to be fetched."""
    import shutil

    problems = []
    for store, names in stores:
        wanted = sum(store.sizes[name] or 0 for name in names if not (store.folder / name).is_file())
        there = next(folder for folder in (store.folder, *store.folder.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if wanted > free:
            wrong = f"{wanted / 1e9:.1f} GB are to be fetched into {there}, which has {free / 1e9:.1f} GB free"
            problems.append(Problem(store.name, wrong, "free some space, or move the cache (HF_HOME, XDG_CACHE_HOME)"))
    return problems

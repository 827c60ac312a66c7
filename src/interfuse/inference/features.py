"""The features of frozen networks, computed once and kept on disk, so that training and evaluation run on the cache.

One safetensors file a network, named by a hash of all that its content depends on: the network's structure and weights,
the tap, and the inputs in their order. So several fusions of the same networks share the files. Inputs that differ each
time they are read (augmentation) can't be cached, and are found out. This isn't a cache of predictions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.tensors import spec_of, to_array
from interfuse.checkpoints.writer import TensorWriter
from interfuse.inference.batches import first, in_order, is_indexed, length
from interfuse.modules.fused import ModelFusion, Reading
from interfuse.modules.inputs import batch_size, move, split_batch
from interfuse.modules.taps import quiet
from interfuse.progress import track

#: The cache in the user's cache folder is kept below this many bytes; what was used longest ago goes first.
LIMIT = 10 * 2**30
A_DAY = 24 * 3600.0  # seconds


def default_folder() -> Path:
    """Where features are kept unless a folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interfuse" / "features"


class Readings(Dataset[Any]):
    """What every network of a fusion reads from a data set, row by row: batches of (readings, targets)."""

    def __init__(self, networks: Sequence[dict[str, Tensor]], targets: Tensor | None) -> None:
        self.networks, self.targets = networks, targets

    def __len__(self) -> int:
        return len(self.networks[0]["features"])

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])

    def __getitems__(self, rows: Sequence[int]) -> tuple[list[Reading], Tensor | None]:
        index = torch.as_tensor(rows)
        readings = [
            Reading(*(n[key].index_select(0, index) if key in n else None for key in Reading._fields)) for n in self.networks
        ]
        return readings, None if self.targets is None else self.targets.index_select(0, index)


class _Batches:
    """The rows in order, in batches of these sizes: what an iterable without an order of its own gave."""

    def __init__(self, rows: Readings, sizes: Sequence[int]) -> None:
        self.rows, self.sizes = rows, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for size in self.sizes:
            yield self.rows.__getitems__(range(start, start + size))
            start += size


class _Uncachable(Exception):
    """Why the features can't be cached, found on the way."""


_DIFFERENT = "the data differ each time they are read (random augmentation?)"


def why_not(model: nn.Module, data: Iterable[Any]) -> str:
    """Why the features of `model` over `data` can't be cached, as far as one batch shows it; empty where they can."""
    if not isinstance(model, ModelFusion):
        return "the model isn't a fusion"
    if not all(model.freeze) or any(p.requires_grad for p in model.backbones.parameters()):
        return "some networks are trained"
    once, again = (split_batch(first(data, seed=seed))[0] for seed in (0, 1))
    return "" if _content(once) == _content(again) else _DIFFERENT


def cached(model: nn.Module, data: Iterable[Any], folder: Path, *, progress: bool = True) -> Iterable[Any] | str:
    """Batches of (readings, targets) for `model.fuse`, in the order and sizes of those of `data`; or why they can't be had.

    Features that the folder doesn't hold yet are computed, on the device of the model, and written there.
    """
    reason = why_not(model, data)
    if reason:
        return reason
    assert isinstance(model, ModelFusion)
    try:
        with torch.random.fork_rng(devices=[]):  # a loader draws from them each time it's gone through
            return _cached(model, data, folder, progress)
    except _Uncachable as found:
        return str(found)
    except OSError as error:
        return f"the cache can't be used: {error.strerror or error}: {error.filename or folder}"


def _cached(model: ModelFusion, data: Iterable[Any], folder: Path, progress: bool) -> Iterable[Any]:
    example = first(data)
    model.build(split_batch(example)[0])
    hashes, sizes, targets = _survey(model, data, progress)
    folder.mkdir(parents=True, exist_ok=True)
    stored = []
    for k, digest in enumerate(hashes):
        path = folder / f"{_key(model, k, digest)}.safetensors"
        now = _read(model, k, example)
        tensors = _load(path, now, sum(sizes))
        if tensors is None:
            _write(model, k, path, data, now, sizes, digest, progress)
            tensors = _load(path, now, sum(sizes))
        if tensors is None:
            raise _Uncachable(f"{model.names[k]} gives something else each time (dropout that is always on? NaN?)")
        stored.append(tensors)
    if folder == default_folder():
        _prune(folder)
    rows = Readings(stored, targets)
    if not is_indexed(data):
        return _Batches(rows, sizes)
    assert isinstance(data, DataLoader)
    sampler, options = data.batch_sampler, {"collate_fn": _as_it_is, "generator": data.generator}
    if type(sampler) is BatchSampler:  # Lightning shares out the rows among processes where it is a plain one
        return DataLoader(rows, sampler.batch_size, sampler=sampler.sampler, drop_last=sampler.drop_last, **options)
    return DataLoader(rows, batch_sampler=sampler, **options)


def _as_it_is(batch: Any) -> Any:
    return batch


def _survey(model: ModelFusion, data: Iterable[Any], progress: bool) -> tuple[list[str], list[int], Tensor | None]:
    """One pass over the data: a hash of each network's inputs, the batches' sizes, and all targets."""
    digests = [hashlib.sha256() for _ in model.names]
    sizes, targets = [], []
    for batch in track(in_order(data), "reading the data", length(data), shown=progress):
        inputs, target = split_batch(batch)
        sizes.append(batch_size(inputs))
        if target is not None:
            targets.append(target)
        previous: tuple[Any, bytes] | None = None
        for name, digest, own in zip(model.names, digests, model.own_inputs(inputs), strict=True):
            if own is None:
                raise _Uncachable(f"some inputs of {name} are missing")
            if previous is None or previous[0] is not own:  # networks mostly read the same inputs: hash them once
                previous = own, _content(own)
            digest.update(previous[1])
    if sum(map(len, targets)) not in (0, sum(sizes)):
        raise _Uncachable("there isn't one target an example")
    return [d.hexdigest() for d in digests], sizes, torch.cat(targets) if targets else None


def _content(inputs: Any) -> bytes:
    """A hash of all that one batch's inputs hold."""
    digest = hashlib.sha256()
    _add(digest, inputs)
    return digest.digest()


def _add(digest: Any, inputs: Any) -> None:
    if isinstance(inputs, Tensor):
        digest.update(f"{inputs.dtype} {tuple(inputs.shape)}".encode())
        digest.update(to_array(inputs).reshape(-1).view("uint8").data)
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            digest.update(repr(key).encode())
            _add(digest, value)
    elif isinstance(inputs, tuple | list):
        digest.update(f"{len(inputs)} of".encode())
        for value in inputs:
            _add(digest, value)
    else:
        digest.update(repr(inputs).encode())


def _key(model: ModelFusion, k: int, data: str) -> str:
    """A hash of all that network k's features depend on. What a forward does beyond its modules is checked on loading."""
    network = model.backbones[k]
    digest = hashlib.sha256(f"{data} {model.taps[k]!r} {model.pool} {model.parents[k]} {network!r}".encode())
    _add(digest, network.state_dict())
    return digest.hexdigest()[:32]


def _read(model: ModelFusion, k: int, batch: Any) -> dict[str, Tensor]:
    """Network k's reading of one batch, what there is of it, on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = model.own_inputs(split_batch(batch)[0])[k]
    with quiet(model):
        reading = model.read(k, move(inputs, device))
    if reading.features is None:
        raise _Uncachable(f"some inputs of {model.names[k]} are missing")
    return {key: value.cpu() for key, value in reading._asdict().items() if value is not None}


def _load(path: Path, now: Mapping[str, Tensor], rows: int) -> dict[str, Tensor] | None:
    """The stored features; None where there are none, or where they aren't what the network gives for the first batch."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    for key, value in now.items():
        kept = tensors.get(key)
        if kept is None or kept.shape != (rows, *value.shape[1:]) or not _close(kept[: len(value)], value):
            return None
    os.utime(path)
    return tensors


def _close(kept: Tensor, value: Tensor) -> bool:
    """Equal but for rounding, which differs between batch sizes, threads and devices."""
    share = 2e-2 if value.dtype in (torch.float16, torch.bfloat16) else 2e-3
    scale = value.float().abs().max().item() if value.numel() else 0.0
    return bool((kept.float() - value.float()).abs().le(share * scale + 1e-6).all())


def _write(
    model: ModelFusion,
    k: int,
    path: Path,
    data: Iterable[Any],
    example: Mapping[str, Tensor],
    sizes: Sequence[int],
    expected: str,
    progress: bool,
) -> None:
    """Compute and store network k's features; `expected` is the hash of its inputs, which mustn't have changed."""
    specs = {key: TensorSpec(spec_of(v).dtype, (sum(sizes), *v.shape[1:])) for key, v in example.items()}
    digest, done = hashlib.sha256(), 0
    with TensorWriter(path, specs) as writer:
        for batch in track(in_order(data), f"features of {model.names[k]}", len(sizes), shown=progress):
            digest.update(_content(model.own_inputs(split_batch(batch)[0])[k]))
            reading = _read(model, k, batch)
            if {key: v.shape[1:] for key, v in reading.items()} != {key: v.shape[1:] for key, v in example.items()}:
                raise _Uncachable("the number of tokens differs between batches")
            done += batch_size(reading)
            if done > sum(sizes):
                raise _Uncachable(_DIFFERENT)
            for key, value in reading.items():
                writer.append(key, to_array(value))
        if digest.hexdigest() != expected:
            raise _Uncachable(_DIFFERENT)


def _prune(folder: Path) -> None:
    """Remove what was used longest ago, until the folder is below its limit, and what killed processes left half-written."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may be pruning, too
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
    total = 0
    for used, size, path in sorted(found, reverse=True):
        left = path.suffix == ".part" and time.time() - used > A_DAY
        total += size if path.suffix == ".safetensors" else 0
        if left or (path.suffix == ".safetensors" and total > LIMIT):
            path.unlink(missing_ok=True)

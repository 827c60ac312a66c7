"""The features of frozen networks, computed once and kept on disk, so that training and evaluation run on the cache.

One safetensors file a network, named by a hash of all that its content depends on: the network's structure and weights,
the tap, and the inputs in their order. So several fusions of the same networks share the files. Inputs that differ each
time they are read (augmentation) can't be cached, and are found out. This isn't a cache of predictions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.tensors import spec_of, to_array
from interfuse.checkpoints.writer import TensorWriter
from interfuse.inference.batches import first, in_order, is_indexed
from interfuse.modules.fused import ModelFusion, Reading
from interfuse.modules.inputs import batch_size, inputs_by_model, move, split_batch, tensors_of
from interfuse.modules.taps import quiet
from interfuse.progress import track

#: The cache in the user's cache folder is kept below this many bytes; what was used longest ago goes first.
LIMIT = 10 * 2**30


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


class _Same:
    """A batch sampler that gives the same rows each time: what an iterable without an order of its own gave once."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


def why_not(model: nn.Module, data: Iterable[Any]) -> str:
    """Why the features of `model` over `data` can't be cached; empty where they can."""
    if not isinstance(model, ModelFusion):
        return "the model isn't a fusion"
    if not all(model.freeze) or any(p.requires_grad for p in model.backbones.parameters()):
        return "some networks are trained"
    once, again = (tensors_of(split_batch(first(data))[0]) for _ in range(2))
    if [path for path, _ in once] != [path for path, _ in again] or any(
        a.shape != b.shape or not torch.equal(a, b) for (_, a), (_, b) in zip(once, again, strict=True)
    ):
        return "the data differ each time they are read (random augmentation?)"
    if any(x is None for x in inputs_by_model(model.names, split_batch(first(data))[0])):
        return "some inputs are missing"
    return ""


def cached(model: ModelFusion, data: Iterable[Any], folder: Path, *, progress: bool = True) -> DataLoader[Any] | None:
    """A loader of (readings, targets) for `model.fuse`, in the order and batches of `data`; None where tokens' counts vary.

    Features that the folder doesn't hold yet are computed, on the device of the model, and written there.
    """
    model.build(split_batch(first(data))[0])
    hashes, sizes, targets = _survey(model, data, progress)
    stored = []
    for k, digest in enumerate(hashes):
        path = folder / f"{_key(model, k, digest)}.safetensors"
        tensors = _load(model, k, path, data)
        if tensors is None:
            if not _write(model, k, path, data, sizes, progress):
                return None
            tensors = _load(model, k, path, data)
            assert tensors is not None, path
        stored.append(tensors)
    if folder == default_folder():
        _prune(folder)
    rows = Readings(stored, targets)
    if is_indexed(data):
        assert isinstance(data, DataLoader)
        sampler, generator = data.batch_sampler, data.generator
    else:
        sampler, generator = _Same(sizes), None
    return DataLoader(rows, batch_sampler=sampler, collate_fn=_as_it_is, generator=generator)


def _as_it_is(batch: Any) -> Any:
    return batch


def _survey(model: ModelFusion, data: Iterable[Any], progress: bool) -> tuple[list[str], list[int], Tensor | None]:
    """One pass over the data: a hash of each network's inputs, the batches' sizes, and all targets."""
    digests = [hashlib.sha256() for _ in model.names]
    sizes, targets = [], []
    for batch in track(in_order(data), "reading the data", shown=progress):
        inputs, target = split_batch(batch)
        sizes.append(batch_size(inputs))
        if target is not None:
            targets.append(target)
        previous: tuple[Any, bytes] | None = None
        for digest, own in zip(digests, inputs_by_model(model.names, inputs), strict=True):
            if previous is None or previous[0] is not own:  # networks mostly read the same inputs: hash them once
                previous = own, _content(own)
            digest.update(previous[1])
    return [d.hexdigest() for d in digests], sizes, torch.cat(targets) if targets else None


def _content(inputs: Any) -> bytes:
    digest = hashlib.sha256()
    for path, tensor in tensors_of(inputs):
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(to_array(tensor).reshape(-1).view("uint8").data)
    return digest.digest()


def _key(model: ModelFusion, k: int, data: str) -> str:
    """A hash of all that network k's features depend on. What a forward does beyond its modules is checked on loading."""
    network = model.backbones[k]
    digest = hashlib.sha256(f"{data} {model.taps[k]!r} {model.pool} {model.parents[k]} {network!r}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(to_array(tensor).reshape(-1).view("uint8").data)
    return digest.hexdigest()[:32]


def _read(model: ModelFusion, k: int, batch: Any) -> dict[str, Tensor]:
    """Network k's reading of one batch, what there is of it, on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = inputs_by_model(model.names, split_batch(batch)[0])[k]
    with quiet(model):
        reading = model.read(k, move(inputs, device))
    return {key: value.cpu() for key, value in reading._asdict().items() if value is not None}


def _load(model: ModelFusion, k: int, path: Path, data: Iterable[Any]) -> dict[str, Tensor] | None:
    """The stored features, or None where there are none, or where they aren't what the network gives for the first batch."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    now = _read(model, k, first(data))
    for key, value in now.items():
        kept = tensors.get(key)
        if kept is None or kept.shape[1:] != value.shape[1:] or not _close(kept[: len(value)], value):
            return None
    os.utime(path)
    return tensors


def _close(kept: Tensor, value: Tensor) -> bool:
    scale = value.float().abs().max().item() if value.numel() else 0.0
    return bool((kept.float() - value.float()).abs().le(1e-2 * scale + 1e-6).all())


def _write(model: ModelFusion, k: int, path: Path, data: Iterable[Any], sizes: Sequence[int], progress: bool) -> bool:
    """Compute and store network k's features; False where rows of different batches differ in shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sum(sizes)
    example = _read(model, k, first(data))
    specs = {key: TensorSpec(spec_of(v).dtype, (rows, *v.shape[1:])) for key, v in example.items()}
    try:
        with TensorWriter(path, specs) as writer:
            for batch in track(in_order(data), f"features of {model.names[k]}", len(sizes), shown=progress):
                reading = _read(model, k, batch)
                if any(v.shape[1:] != specs[key].shape[1:] for key, v in reading.items()):
                    raise _Ragged
                for key, value in reading.items():
                    writer.append(key, to_array(value))
    except _Ragged:
        return False
    return True


class _Ragged(Exception):
    """Rows differ in shape."""


def _prune(folder: Path) -> None:
    """Remove what was used longest ago, until the folder is below its limit."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink(missing_ok=True)

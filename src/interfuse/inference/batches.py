"""Batches from whatever the user has: a `DataLoader`, a data set, tensors, or any iterable of batches.

A batch is what `modules.inputs.split_batch` reads. Making data sets from files is `data`'s; this only goes through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from interfuse.data import Data
from interfuse.data.dataset import order_of
from interfuse.errors import DataError, OptionError, Problem


def batches(data: Any, batch_size: int = 64, *, shuffle: bool = False, seed: int = 0, name: str = "data") -> Iterable[Any]:
    """`data` as an iterable of batches that can be gone through again and again.

    A `DataLoader` or a list of batches is taken as it is, with its own order and batch size. A data set, or a pair of
    tensors (inputs, targets), of which the inputs may be a mapping of tensors (a tokenizer's), is read in batches of
    `batch_size`, shuffled if asked. An iterator, which can be gone through once only, is kept in memory. Raises `DataError`
    for anything else, or nothing at all, `OptionError` for a batch size.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(Problem("batch_size", f"got {batch_size!r}", "a whole number from 1 up"))
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Data):
        return data.loader(batch_size, shuffle, seed)
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(part, Tensor) for part in data):
        lengths = [len(part) for part in data]
        if len(set(lengths)) > 1:
            raise DataError(Problem(name, f"tensors of different lengths {lengths}", "one target an example"))
        data = TensorDataset(*data)
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Mapping) and isinstance(data[1], Tensor):
        data = _Rows(*data, name)
    if isinstance(data, Dataset):
        return _loader(data, batch_size, shuffle, seed)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict | Tensor):
        allowed = "a DataLoader, a data set, (inputs, targets), or an iterable of batches"
        raise DataError(Problem(name, f"got {type(data).__name__}", allowed))
    kept = list(data) if isinstance(data, Iterator) else data
    if isinstance(kept, Sequence) and not kept:
        raise DataError(Problem(name, "no batches", "an iterator that wasn't used up, or a list of batches"))
    return kept


class _Rows(Dataset[Any]):
    """Examples ({name: tensor}, target) of a mapping of tensors and as many targets."""

    def __init__(self, inputs: Mapping[str, Tensor], targets: Tensor, name: str) -> None:
        kinds = {key: type(value).__name__ for key, value in inputs.items() if not isinstance(value, Tensor)}
        lengths = [len(part) for part in (*inputs.values(), targets) if isinstance(part, Tensor)]
        if kinds or len(set(lengths)) > 1:
            wrong = f"inputs that aren't tensors: {kinds}" if kinds else f"tensors of different lengths {lengths}"
            raise DataError(Problem(name, wrong, "tensors, one target an example"))
        self.inputs, self.targets = dict(inputs), targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, at: int) -> Any:
        return {key: value[at] for key, value in self.inputs.items()}, self.targets[at]


def _loader(data: Dataset[Any], batch_size: int, shuffle: bool, seed: int) -> DataLoader[Any]:
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size)
    return DataLoader(data, batch_size, sampler=order_of(data, shuffle, seed))


def first(data: Iterable[Any], name: str = "data", *, seed: int | None = None) -> Any:
    """The first batch, or a `DataError` where there is none; the state of the random numbers is left as it was.

    seed: draw with these random numbers, where the batch depends on any.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        batch = next(iter(in_order(data)), None)
    if batch is None:
        raise DataError(Problem(name, "no batches", "give at least one"))
    return batch


def length(data: Iterable[Any]) -> int | None:
    """How many batches there are, where `data` knows."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def in_order(data: Iterable[Any]) -> Iterable[Any]:
    """The same batches in the data set's own order, where `data` is a loader over a data set with an order."""
    if not is_indexed(data):
        return data
    assert isinstance(data, DataLoader)
    size = data.batch_sampler.batch_size if isinstance(data.batch_sampler, BatchSampler) else data.batch_size
    return DataLoader(
        data.dataset,
        size or 1,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        worker_init_fn=data.worker_init_fn,
    )


def is_indexed(data: Iterable[Any]) -> bool:
    """Whether `data` draws whole batches by index from a data set that has a length."""
    return (
        isinstance(data, DataLoader)
        and type(data).__iter__ is DataLoader.__iter__
        and not isinstance(data.dataset, IterableDataset)
        and data.batch_sampler is not None
    )

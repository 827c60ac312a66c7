"""`Data`: one data set in memory, labelled or not, from which whole batches are read at once.

It is a map-style PyTorch data set, so that anything that takes one takes it; its own `loader` is the fast way through.
Targets are class numbers (int64, with the classes' names), numbers to predict (float32), or none: batches are then inputs
alone. Reading files is `sources`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from interfuse.data.columns import Column, Look, Named, Texts, Tokenizer, column_of
from interfuse.errors import DataError, OptionError, Problem, nearest

_SHOWN = 5  # faulty rows that an error lists


class Batch(Sequence[Any]):
    """A batch that also reads as the sequence of its samples, so that any collate function can take it."""

    def __init__(self, inputs: Any, targets: Tensor | None, size: int) -> None:
        self.inputs, self.targets, self.size = inputs, targets, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        one = _one(self.inputs, i)
        return (one,) if self.targets is None else (one, self.targets[i])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def _one(inputs: Any, i: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _one(value, i) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_one(value, i) for value in inputs)
    return inputs[i]


def _whole(batch: Any) -> Any:
    return batch.inputs if batch.targets is None else (batch.inputs, batch.targets)


class Shuffled(Sampler[int]):
    """All rows in a new order each pass, which depends on nothing but the seed and the number of the pass."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch += 1
        yield from torch.randperm(self.rows, generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go on from this pass, from 0 on."""
        self.epoch = epoch


def order_of(data: Any, shuffle: bool, seed: int) -> Sampler[int]:
    """The rows of `data` in its own order, or shuffled anew in each pass."""
    return Shuffled(len(data), seed) if shuffle else SequentialSampler(data)


class Data(Dataset[Any]):
    """A data set: `inputs` are an array, a tensor, texts, or a mapping of these (one for each model).

    Images as uint8 [n, height, width(, channels)] come as float32 [n, channels, height, width] in [0, 1], resized to
    `image_size` and normalised by `mean` and `std`. `targets` [n] are class numbers, names, or floats to predict; names
    become numbers in the order of `classes` (left out: sorted). None: there are no labels.

    In a mapping, an input is missing from a sample whose text is blank or None, whose numbers are all NaN, or where
    `present`, {name: booleans [n]}, is False; batches then have these marks as "present". Raises `DataError`.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        *,
        classes: Sequence[str] | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        present: Mapping[str, Any] | None = None,
        path: str = "data",
    ) -> None:
        self._path = path
        self._column = _marked(column_of(inputs, Look(image_size, mean, std), path), present or {}, path)
        self.labelled = targets is not None
        values = targets if self.labelled else np.zeros(len(self._column), np.int64)
        self._targets, self.classes = _read_targets(values, classes, path)
        self.classes = self.classes if self.labelled else None
        if len(self._column) != len(self._targets) or len(self._targets) == 0:
            wrong = f"{len(self._column)} inputs for {len(self._targets)} targets"
            raise DataError(Problem(path, wrong, "one target a sample, and at least one sample"))
        self._rows = np.arange(len(self._targets))

    @property
    def targets(self) -> Tensor:
        """All targets, [n]; a `DataError` where there are none."""
        if not self.labelled:
            raise DataError(Problem(self._path, "has no labels", "data with labels"))
        return torch.from_numpy(self._targets[self._rows])

    @property
    def has_texts(self) -> bool:
        """Whether some input is text, which models read through a tokenizer."""
        columns = self._column.columns.values() if isinstance(self._column, Named) else [self._column]
        return any(isinstance(column, Texts) for column in columns)

    @property
    def missing(self) -> dict[str, int]:
        """In how many samples each input is missing, for those inputs in which some are."""
        marks = self._column.present if isinstance(self._column, Named) else {}
        counts = {name: int((~there[self._rows]).sum()) for name, there in marks.items()}
        return {name: count for name, count in counts.items() if count}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        """One sample, (input, target), or (input,) where there are no labels."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        targets = torch.from_numpy(self._targets[rows]) if self.labelled else None
        return Batch(self._column.take(rows), targets, len(rows))

    def loader(self, batch_size: int = 64, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
        """Batches (inputs, targets) or of inputs alone, the last maybe smaller; shuffled anew in each pass, by the seed."""
        return DataLoader(self, batch_size, sampler=order_of(self, shuffle, seed), collate_fn=_whole)

    def split(self, share: float, seed: int = 0) -> tuple[Data, Data]:
        """(the rest, a part with `share` of the samples), every class in its proportion; the same for one seed.

        `share` is in (0, 1). Raises `DataError` where one side would be empty.
        """
        if not 0 < share < 1:
            raise OptionError(Problem("share", f"got {share}", "a share between 0 and 1 (both excluded)"))
        total = round(share * len(self))
        if not 0 < total < len(self):
            wrong = f"a share of {share} of {len(self)} samples leaves one side empty"
            raise DataError(Problem(self._path, wrong, "choose another share, or give more data"))
        order = np.random.default_rng(seed).permutation(len(self))
        if self.classes is not None and self._targets.ndim == 1:
            order = _interleaved(order, self._targets[self._rows][order])
        return self._view(np.sort(order[total:])), self._view(np.sort(order[:total]))

    def tokenize(self, tokenizers: Mapping[str, Tokenizer] | Tokenizer) -> Data:
        """The same data with texts tokenised at batch time: {model name: keyword inputs}, or one tokenizer's keywords.

        Where `inputs` is a mapping already, the tokenizer of that name reads its texts. Columns that aren't text stay.
        """
        view = self._view(np.arange(len(self)))
        view._column = _tokenized(self._column, tokenizers, self._path)
        return view

    def named(self, classes: Sequence[str]) -> Data:
        """The same data with class numbers in the order of `classes`, which hold every class that occurs, by name.

        Where no class of the data has a name of its own (they are called by their numbers) and none is among `classes`,
        numbers count these. Raises `DataError` with the classes that aren't among them, and where they are first seen.
        """
        if self.classes is None:
            return self
        view = self._view(np.arange(len(self)))
        view._targets, view.classes = _renumbered(self._targets, self.classes, tuple(classes), self._path), tuple(classes)
        return view

    def _view(self, rows: np.ndarray) -> Data:
        view = object.__new__(Data)
        view.__dict__.update(self.__dict__)
        view._rows = self._rows[rows]
        return view


def _tokenized(column: Column, tokenizers: Mapping[str, Tokenizer] | Tokenizer, path: str) -> Column:
    if isinstance(column, Texts):
        return Texts(column.texts, tokenizers)
    if not isinstance(column, Named):
        return column
    if not isinstance(tokenizers, Mapping):
        raise DataError(Problem(path, "has inputs by name, but one tokenizer is given", "give {model name: tokenizer}"))
    missing = [name for name, part in column.columns.items() if isinstance(part, Texts) and name not in tokenizers]
    if missing:
        raise DataError(*(Problem(f"{path}.{name}", "is text without a tokenizer", "give one") for name in missing))
    parts = {
        name: Texts(part.texts, tokenizers[name]) if isinstance(part, Texts) else part for name, part in column.columns.items()
    }
    return Named(parts, column.present)


def _marked(column: Column, present: Mapping[str, Any], path: str) -> Column:
    """A column with these marks, beside those that were found in it; every sample must have some input."""
    if not isinstance(column, Named):
        if present:
            raise DataError(Problem(f"{path}.present", "there is one input, without a name", "give inputs by name"))
        return column
    problems = []
    marks = {name: np.asarray(there) for name, there in present.items()}
    for name, there in marks.items():
        if name not in column.columns:
            problems.append(Problem(f"{path}.present.{name}", "no input has this name", nearest(name, column.columns)))
        elif there.dtype != bool or there.shape != (len(column),):
            wrong, allowed = f"got {there.dtype} of shape {there.shape}", f"booleans ({len(column)},), one a sample"
            problems.append(Problem(f"{path}.present.{name}", wrong, allowed))
    if problems:
        raise DataError(*problems)
    for name, there in column.present.items():
        marks[name] = there & marks[name] if name in marks else there
    marks = {name: there for name, there in marks.items() if not there.all()}
    if marks.keys() == column.columns.keys():
        empty = np.flatnonzero(~np.any(list(marks.values()), axis=0))[:_SHOWN]
        if len(empty):
            raise DataError(*(Problem(path, f"row {row + 1}: every input is missing", "at least one") for row in empty))
    return Named(column.columns, marks)


def _interleaved(order: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`order` with its classes mixed evenly, so that any first part of it holds every class in proportion."""
    place = np.empty(len(order))
    for number in np.unique(targets):
        where = np.flatnonzero(targets == number)
        place[where] = (np.arange(len(where)) + 0.5) / len(where)
    return order[np.argsort(place, kind="stable")]


def _read_targets(targets: Any, classes: Sequence[str] | None, path: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Class numbers (int64) with their names, or floats (float32) and None."""
    values = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind == "U":
        return _numbered(values, classes, path)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))[0]) + 1
            raise DataError(Problem(path, f"row {row}: the target isn't finite", "remove the row, or give a number"))
        return values.astype(np.float32), None
    if values.dtype.kind not in "iub" or values.ndim == 0:
        raise DataError(Problem(path, f"targets are {values.dtype} {values.shape}", "class numbers, names, or floats"))
    numbers = values.astype(np.int64)
    names = tuple(classes) if classes is not None else tuple(map(str, range(int(numbers.max(initial=-1)) + 1)))
    flat = numbers.reshape(len(numbers), -1) if len(numbers) else numbers.reshape(0, 1)
    wrong = np.flatnonzero(((flat < 0) | (flat >= len(names))).any(1))
    if len(wrong):
        allowed = f"class numbers from 0 to {len(names) - 1}; values to predict are floats (13.0)"
        raise DataError(*(Problem(path, f"row {row + 1}: label {values[row]}", allowed) for row in wrong[:_SHOWN]))
    return numbers, names


def _renumbered(numbers: np.ndarray, own: Sequence[str], classes: tuple[str, ...], path: str) -> np.ndarray:
    """Class numbers by `own` names as those by `classes`."""
    occur = [own[number] for number in np.unique(numbers).tolist()]
    unnamed = own == tuple(map(str, range(len(own)))) and not any(name in classes for name in occur)
    names = list(classes) if unnamed else list(own)
    known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    problems = []
    for number in np.unique(numbers).tolist():
        name = names[number] if number < len(names) else str(number)
        if name not in classes:
            row = int(np.flatnonzero((numbers == number).reshape(len(numbers), -1).any(1))[0]) + 1
            problems.append(Problem(path, f"row {row}: no model knows the class {name!r}", f"known: {known}"))
    if problems:
        raise DataError(*problems[:_SHOWN])
    places = np.array([classes.index(name) if name in classes else -1 for name in names], dtype=np.int64)
    return places[numbers]


def _numbered(labels: np.ndarray, classes: Sequence[str] | None, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    found, numbers = np.unique(labels, return_inverse=True)
    names = tuple(classes) if classes is not None else tuple(found.tolist())
    place = {name: i for i, name in enumerate(names)}
    unknown = [name not in place for name in found.tolist()]
    if any(unknown):
        rows = np.flatnonzero(np.asarray(unknown)[numbers])[:_SHOWN]
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise DataError(*(Problem(path, f"row {r + 1}: unknown label {str(labels[r])!r}", f"known: {known}") for r in rows))
    return np.asarray([place[name] for name in found.tolist()], dtype=np.int64)[numbers], names

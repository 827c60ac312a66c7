"""Several data sets as one, one after the other: the tasks of several teachers for one student. Nothing is read or shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from interfuse.data.columns import Column, ImageFiles, Items, Named, Numbers, Pixels, Texts
from interfuse.data.dataset import Data
from interfuse.errors import DataError, Problem

_ALLOWED = "data of one kind and shape, read in one way"


def joined(parts: Sequence[Data], path: str = "data") -> Data:
    """The rows of all parts in their order; a `DataError` where they are no data of one kind.

    All parts have labels, or none has, and the same classes in the same order.
    """
    if len(parts) == 1:
        return parts[0]
    if len(dict.fromkeys(part.labelled for part in parts)) > 1:
        raise DataError(Problem(path, "some have labels, and some haven't", "labels in all, or data.labels: false"))
    if len(dict.fromkeys(part.classes for part in parts)) > 1:
        found = "; ".join("numbers" if part.classes is None else ", ".join(part.classes[:10]) for part in parts)
        raise DataError(Problem(path, f"their classes differ: {found}", "the same classes in all, or the models' `classes`"))
    whole = parts[0]._view(np.arange(len(parts[0])))
    whole._column = _column([part._column for part in parts], path)
    starts = np.cumsum([0, *(len(part._column) for part in parts[:-1])])
    whole._targets = np.concatenate([part._targets for part in parts])
    whole._rows = np.concatenate([part._rows + start for part, start in zip(parts, starts, strict=True)])
    return whole


def _column(columns: Sequence[Any], path: str) -> Column:
    first = columns[0]
    if len(dict.fromkeys(type(column) for column in columns)) > 1:
        kinds = ", ".join(type(column).__name__.lower() for column in columns)
        raise DataError(Problem(path, f"their inputs are of different kinds: {kinds}", _ALLOWED))
    if isinstance(first, Texts):
        return Texts([text for column in columns for text in column.texts], first.tokenizers)
    if isinstance(first, Items):
        return Items(ConcatDataset([column.dataset for column in columns]))
    if isinstance(first, Named):
        return _named(columns, path)
    if isinstance(first, ImageFiles) and _alike(columns, ("mode", "look"), path):
        return ImageFiles([file for column in columns for file in column.files], first.mode, first.look)
    shapes = [column.array.shape[1:] for column in columns]
    if len(dict.fromkeys(shapes)) > 1:
        raise DataError(Problem(path, f"their inputs have the shapes {', '.join(map(str, shapes))}", _ALLOWED))
    array = np.concatenate([column.array for column in columns])
    if isinstance(first, Pixels) and _alike(columns, ("look",), path):
        return Pixels(array, first.look)
    return Numbers(array)


def _named(columns: Sequence[Named], path: str) -> Named:
    names = list(columns[0].columns)
    if any(list(column.columns) != names for column in columns):
        found = "; ".join(", ".join(column.columns) for column in columns)
        raise DataError(Problem(path, f"their inputs are {found}", "inputs of the same names"))
    parts: dict[str, Column] = {name: _column([column.columns[name] for column in columns], f"{path}.{name}") for name in names}
    marked = dict.fromkeys(name for column in columns for name in column.present)
    marks = {
        name: np.concatenate([column.present.get(name, np.ones(len(column), bool)) for column in columns]) for name in marked
    }
    return Named(parts, marks)


def _alike(columns: Sequence[Any], keys: Sequence[str], path: str) -> bool:
    for key in keys:
        found = [getattr(column, key) for column in columns]
        if any(value != found[0] for value in found):
            raise DataError(Problem(path, f"they are read with {key} {', '.join(map(str, found))}", _ALLOWED))
    return True

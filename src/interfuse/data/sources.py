"""Reading data sets: npz, csv, a folder of images by class, a `datasets` folder or hub id, and the user's own function.

Nothing is unpickled, and code runs only when the caller trusts it. Every error names the source, what was found there and
what is allowed. Batches are made by `dataset`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from interfuse.data.columns import Items, Look, read_image
from interfuse.data.dataset import Data
from interfuse.data.images import SUFFIXES, images_of
from interfuse.data.tables import Input, chosen, columns_of, read_csv, side_by_side, unwrapped
from interfuse.errors import DataError, Problem, nearest
from interfuse.extras import require
from interfuse.models import CODE, call_reference

_ALLOWED = "an .npz or .csv(.gz) file, a folder of images by class, a folder or hub id of `datasets`, or python:module:function"
#: Inputs, targets, the names of the classes, and the marks of what is missing, each as far as the source has them.
_Read = tuple[Any, Any, Sequence[str] | None, Mapping[str, Any] | None]
#: What an npz calls the marks of an array that some rows lack.
_MARKS = "_present"
_SHOWN = 5  # faulty rows that an error lists


def load_data(
    source: Any,
    *,
    trust_code: bool = False,
    classes: Sequence[str] | None = None,
    input: Input = None,
    target: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: bool = True,
    path: str | None = None,
) -> Data:
    """The data set that `source` names.

    source: an npz or csv(.gz) file, a folder with one folder of images a class, a folder or hub id of `datasets`
        (`id:split`), `python:package.module:function` (needs `trust_code`), or what such a function returns: a `Data`, a
        map-style data set, or (inputs, targets).
    classes: the classes' names in order, such as `train.classes` for the test data.
    input, target: the array or column to read (npz: x and y; csv: text, or all columns of numbers, and label, or the last
        column); `input` may be a list of columns of numbers, or map models' names to one column or list each. Then what is
        empty in a row is missing from it (None, NaN, a blank cell; in an npz also where the booleans NAME_present say so).
    labels: False where there are none, or none are read: a folder then holds the images themselves.
    image_size, mean, std: see `Data`. path: what errors call the source, such as `data.train`.

    Raises `DataError`.
    """
    where = path or (str(source) if isinstance(source, str | Path) else "data")
    look = Look(image_size, mean, std)
    if isinstance(source, str) and source.startswith(CODE):
        source = call_reference(source, trust_code=trust_code)
    if not isinstance(source, str | Path):
        return _given(source, classes, look, where, labels)
    if Path(source).is_dir() and not _is_datasets(Path(source)):
        return _images(Path(source), classes, look, where, labels)
    read = _reader(str(source), where)
    inputs, targets, named, present = read(str(source), input, target, look, where, labels)
    shown: dict[str, Any] = {"image_size": image_size, "mean": mean, "std": std}
    return Data(inputs, targets, classes=classes or named, present=present, path=where, **shown)


def _reader(source: str, where: str) -> Callable[..., _Read]:
    """The function that reads `source`, which is no folder of images."""
    place = Path(source)
    if place.is_file() and source.endswith(".npz"):
        return _npz
    if place.is_file() and source.endswith((".csv", ".csv.gz")):
        return read_csv
    if place.is_file():
        raise DataError(Problem(where, f"{source} isn't a kind of file that is read", _ALLOWED))
    path_like = source.startswith(("/", ".", "~")) or source.endswith((".npz", ".csv", ".gz"))
    if path_like and not _is_datasets(place) and not _is_datasets(Path(source.rpartition(":")[0])):
        raise DataError(Problem(where, f"{source} doesn't exist", _ALLOWED))
    return _datasets


def _given(made: Any, classes: Sequence[str] | None, look: Look, where: str, labels: bool) -> Data:
    """What the user's function gave (or the caller passed) as `Data`."""
    if isinstance(made, Data):
        return made
    if not labels:
        return Data(_bare(made), None, image_size=look.size, mean=look.mean, std=look.std, path=where)
    if isinstance(made, TensorDataset) and len(made.tensors) == 2:
        made = tuple(made.tensors)
    if isinstance(made, tuple) and len(made) == 2:
        inputs, targets = made
    elif isinstance(made, Dataset):
        inputs = Items(made)
        try:
            parts = [inputs.both(range(i, min(i + 256, len(inputs))))[1] for i in range(0, len(inputs), 256)]
        except TypeError as error:
            raise DataError(Problem(where, str(error), "a map-style data set of (input, target), with a length")) from None
        if not parts or any(part is None for part in parts):
            raise DataError(Problem(where, "its samples have no target", "samples (input, target), at least one"))
        targets = torch.cat([part for part in parts if part is not None])
    else:
        found = type(made).__name__
        raise DataError(Problem(where, f"got {found}", "a Data, a map-style data set, or (inputs, targets)"))
    return Data(
        inputs, targets, classes=classes, image_size=look.size, mean=look.mean, std=look.std, path=where
    )  # fmt: skip


def _bare(made: Any) -> Any:
    """Inputs without labels: of a data set, what its samples hold beside a target."""
    return Items(made) if isinstance(made, Dataset) else made


# --- npz ---


def _npz(source: str, input: Input, target: str | None, look: Look, where: str, labels: bool) -> _Read:
    try:
        # opened here, because numpy leaves the file open where it turns out to be damaged
        with open(source, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(Problem(where, f"{source} holds one bare array", "an npz with inputs x and targets y"))
            names = archive.files
            label = str(chosen(names, target or "y", lambda: "y", where)[""]) if labels else None
            wanted = chosen(names, input, lambda: "x", where)
            marks = {key: f"{value}{_MARKS}" for key, value in wanted.items() if key and f"{value}{_MARKS}" in names}
            read = dict.fromkeys([*([label] if label is not None else []), *columns_of(wanted), *marks.values()])
            arrays = {name: _array(archive, name, where) for name in read}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(Problem(where, f"{source} can't be read ({error})", "an npz written by numpy.savez")) from None
    targets = None if label is None else arrays[label]
    present = {key: arrays[name] for key, name in marks.items()}
    return _together(wanted, arrays, where), targets, None, present


def _together(wanted: Mapping[str, str | list[str]], columns: Mapping[str, Any], where: str) -> Any:
    """The inputs by name, or the one without a name."""
    made = {k: columns[v] if isinstance(v, str) else side_by_side(columns, v, where) for k, v in wanted.items()}
    return unwrapped(made)


def _array(archive: Any, name: str, where: str) -> np.ndarray:
    try:
        array: np.ndarray = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        wrong = f"the array {name!r} holds Python objects, which only unpickling could read"
        raise DataError(Problem(where, wrong, "store numbers or texts")) from None
    return array


# --- images by class ---


def _images(folder: Path, classes: Sequence[str] | None, look: Look, where: str, labelled: bool) -> Data:
    """One folder a class, without labels the folder itself; hidden files and those without an image's suffix don't count."""
    parts = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")] if labelled else [folder]
    found = {
        part.name: sorted(f for f in part.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        for part in parts
    }
    if not found or not any(found.values()):
        inside = sorted(part.name for part in folder.iterdir())[:5]
        wanted = "folders with images" if labelled else "images"
        raise DataError(Problem(where, f"{folder} holds {inside}, no {wanted}", _ALLOWED))
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(*(Problem(where, f"{folder / name} holds no images", f"files ending in {SUFFIXES}") for name in empty))
    files = [file for part in found.values() for file in part]
    labels = np.array([name for name, part in found.items() for _ in part]) if labelled else None
    column = images_of(files, look, where)
    return Data(column, labels, classes=classes, path=where)


# --- datasets ---


def _is_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _datasets(source: str, input: Input, target: str | None, look: Look, where: str, labels: bool) -> _Read:
    table = _opened(source, where)
    names = table.column_names
    default = next((name for name in ("label", "labels") if name in names), names[-1])
    label = str(chosen(names, target or default, lambda: "", where)[""]) if labels else None
    others = [name for name in names if name not in (label, target or "label")]

    def first() -> str:
        known = [name for name in ("text", "image", "x") if name in others]
        if not known and len(others) != 1:
            raise DataError(Problem(where, f"{source} has the columns {others}", "say which is read: `input`"))
        return (known or others)[0]

    wanted = chosen(names, input, first, where)
    found = {name: _values(table, name, look, where) for name in columns_of(wanted)}
    alone = wanted.get("")
    there = found[alone][1] if isinstance(alone, str) else None
    if there is not None:
        rows = np.flatnonzero(~there)[:_SHOWN]
        raise DataError(*(Problem(where, f"row {row + 1}: {alone} is empty", "a value in every row") for row in rows))
    present = {k: found[v][1] for k, v in wanted.items() if isinstance(v, str) and found[v][1] is not None}
    inputs = _together(wanted, {name: values for name, (values, _) in found.items()}, where)
    if label is None:
        return inputs, None, None, present
    return inputs, np.asarray(list(table[label])), getattr(table.features[label], "names", None), present


def _opened(source: str, where: str) -> Any:
    """The one table that `source` names: a folder, a hub id, either with `:split`."""
    datasets = require("datasets")
    place, split = (source, "") if Path(source).exists() else (source.rpartition(":")[0] or source, source.partition(":")[2])
    try:
        if Path(place).is_dir():
            table = datasets.load_from_disk(place)
        else:
            table = datasets.load_dataset(place, split=split or None)
            split = "" if split else split
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(Problem(where, f"{source} can't be loaded ({first})", f"{_ALLOWED} (is the hub reachable?)")) from None
    if isinstance(table, Mapping):
        if not split and len(table) > 1:
            raise DataError(Problem(where, f"{source} has the splits {list(table)}", f"say which: {place}:{next(iter(table))}"))
        if split and split not in table:
            raise DataError(Problem(where, f"{place} has no split {split!r}", nearest(split, table)))
        table = table[split or next(iter(table))]
    elif split:
        raise DataError(Problem(where, f"{place} is one table without splits", f"leave out :{split}"))
    return table


def _values(table: Any, name: str, look: Look, where: str) -> tuple[Any, np.ndarray | None]:
    """A column, and which of its rows hold something where not all do; what stands in the others doesn't count."""
    values = list(table[name])
    there = np.array([value is not None for value in values])
    marks = None if there.all() else there
    some = next((value for value in values if value is not None), None)
    if some is None:
        raise DataError(Problem(where, f"the column {name} is empty", "another one, or leave its model out"))
    if isinstance(some, str):
        return ["" if value is None else value for value in values], marks
    if type(table.features[name]).__name__ != "Image":
        blank = np.full_like(np.asarray(some), np.nan, dtype=np.float32) if marks is not None else None
        return np.asarray([blank if value is None else value for value in values]), marks
    shown = [value for value in values if value is not None]
    mode = "L" if all(image.mode in ("L", "1") for image in shown) else "RGB"
    images = [read_image(image, mode, look.size) for image in shown]
    shapes = list(dict.fromkeys(image.shape for image in images))
    if len(shapes) > 1:
        wrong = f"image sizes differ: {shapes[0][1]}x{shapes[0][0]} and {shapes[1][1]}x{shapes[1][0]}"
        raise DataError(Problem(where, wrong, "set image_size, and all are resized to it"))
    whole = np.zeros((len(values), *shapes[0]), np.uint8)
    whole[there] = np.stack(images)
    return whole, marks

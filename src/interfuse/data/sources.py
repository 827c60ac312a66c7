"""Reading data sets: npz, csv, a folder of images by class, a `datasets` folder or hub id, and the user's own function.

Nothing is unpickled, and code runs only when the caller trusts it. Every error names the source, what was found there and
what is allowed. Batches are made by `dataset`.
"""

from __future__ import annotations

import csv
import gzip
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from interfuse.data.columns import ImageFiles, Items, Look, Pixels, read_image
from interfuse.data.dataset import Data
from interfuse.errors import DataError, Problem, nearest
from interfuse.extras import require
from interfuse.models import CODE, call_reference

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_KEPT = 2**30  # bytes of decoded images up to which they are kept in memory
_ALLOWED = "an .npz or .csv(.gz) file, a folder of images by class, a folder or hub id of `datasets`, or python:module:function"

Input = str | Mapping[str, str] | None


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
        column); `input` may map models' names to arrays or columns.
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
    inputs, targets, named = read(str(source), input, target, look, where, labels)
    return Data(inputs, targets, classes=classes or named, image_size=image_size, mean=mean, std=std, path=where)


def _reader(source: str, where: str) -> Callable[..., tuple[Any, Any, Sequence[str] | None]]:
    """The function that reads `source`, which is no folder of images."""
    place = Path(source)
    if place.is_file() and source.endswith(".npz"):
        return _npz
    if place.is_file() and source.endswith((".csv", ".csv.gz")):
        return _csv
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


def _chosen(names: Sequence[str], input: Input, default: Callable[[], str], where: str) -> dict[str, str]:
    """{what a batch calls it: column}; one entry under "" where the batch is that column itself."""
    wanted = dict(input) if isinstance(input, Mapping) else {"": input if input is not None else default()}
    problems = [
        Problem(f"{where}", f"nothing is named {name!r} among {list(names)}", nearest(name, names))
        for name in dict.fromkeys(wanted.values())
        if name not in names
    ]
    if problems:
        raise DataError(*problems)
    return wanted


def _unwrapped(columns: dict[str, Any]) -> Any:
    return columns[""] if list(columns) == [""] else columns


# --- npz ---


def _npz(
    source: str, input: Input, target: str | None, look: Look, where: str, labels: bool
) -> tuple[Any, Any, None]:  # fmt: skip
    try:
        # opened here, because numpy leaves the file open where it turns out to be damaged
        with open(source, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(Problem(where, f"{source} holds one bare array", "an npz with inputs x and targets y"))
            names = archive.files
            label = _chosen(names, target or "y", lambda: "y", where)[""] if labels else None
            wanted = _chosen(names, input, lambda: "x", where)
            read = dict.fromkeys([*([label] if label is not None else []), *wanted.values()])
            arrays = {name: _array(archive, name, where) for name in read}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(Problem(where, f"{source} can't be read ({error})", "an npz written by numpy.savez")) from None
    targets = None if label is None else arrays[label]
    return _unwrapped({key: arrays[name] for key, name in wanted.items()}), targets, None


def _array(archive: Any, name: str, where: str) -> np.ndarray:
    try:
        array: np.ndarray = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        wrong = f"the array {name!r} holds Python objects, which only unpickling could read"
        raise DataError(Problem(where, wrong, "store numbers or texts")) from None
    return array


# --- csv ---


def _csv(
    source: str, input: Input, target: str | None, look: Look, where: str, labels: bool
) -> tuple[Any, Any, None]:  # fmt: skip
    columns = _table(source, where, 2 if labels else 1)
    names = list(columns)
    label = _chosen(names, target or ("label" if "label" in names else names[-1]), lambda: "", where)[""] if labels else None
    features = [name for name in names if name not in (label, target or "label")]
    if input is not None:
        wanted = _chosen(names, input, lambda: "", where)
        inputs = _unwrapped({key: _numbers_or_texts(columns[name]) for key, name in wanted.items()})
    else:
        inputs = _default_input({name: _numbers_or_texts(columns[name]) for name in features}, where)
    return inputs, None if label is None else _labels(columns[label], label, where), None


def _table(source: str, where: str, least: int) -> dict[str, list[str]]:
    """The file's columns as text, under the names of its first row."""
    opened: Any = gzip.open if source.endswith(".gz") else open
    try:
        with opened(source, "rt", newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            Problem(where, f"{source} can't be read ({error})", "a csv file in UTF-8, its first row the names")
        ) from None
    rows = [row for row in rows if row]  # csv gives blank lines as empty rows
    if not rows or len(dict.fromkeys(header)) < len(header) or len(header) < least:
        wrong = f"{source} has {len(rows)} rows under the names {header}"
        raise DataError(Problem(where, wrong, f"a first row of at least {least} different names, and then rows"))
    ragged = [i for i, row in enumerate(rows) if len(row) != len(header)][:5]
    if ragged:
        raise DataError(
            *(Problem(where, f"row {i + 1} has {len(rows[i])} values", f"{len(header)}, as the first row") for i in ragged)
        )
    return {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


def _numbers_or_texts(column: list[str]) -> Any:
    """float32 [n, 1] where every value is a number, else the texts."""
    try:
        return np.array(column).astype(np.float32)[:, None]
    except ValueError:
        return column


def _default_input(columns: dict[str, Any], where: str) -> Any:
    texts = [name for name, column in columns.items() if isinstance(column, list)]
    if "text" in texts:
        return columns["text"]
    if not texts:
        numbers = np.concatenate(list(columns.values()), axis=1)
        if not np.isfinite(numbers).all():
            row, place = np.argwhere(~np.isfinite(numbers))[0]
            wrong = f"row {row + 1}: {list(columns)[place]} is {numbers[row, place]}"
            raise DataError(Problem(where, wrong, "a finite number in every row"))
        return numbers
    if len(columns) == 1:
        return columns[texts[0]]
    numeric = [name for name in columns if name not in texts]
    wrong = f"the columns {texts} aren't all numbers" + (f", beside the numbers {numeric}" if numeric else "")
    raise DataError(Problem(where, wrong, "say which column is the text (`input`), or leave only numbers"))


def _labels(column: list[str], name: str, where: str) -> np.ndarray:
    """int64, else float32, else names."""
    empty = [i for i, value in enumerate(column) if not value.strip()][:5]
    if empty:
        raise DataError(*(Problem(where, f"row {i + 1}: {name} is empty", "a label in every row") for i in empty))
    values = np.array(column)
    for kind in (np.int64, np.float64):
        try:
            return values.astype(kind)
        except (ValueError, OverflowError):
            continue
    return values


# --- images by class ---


def _images(folder: Path, classes: Sequence[str] | None, look: Look, where: str, labelled: bool) -> Data:
    """One folder a class, without labels the folder itself; hidden files and those without an image's suffix don't count."""
    parts = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")] if labelled else [folder]
    found = {
        part.name: sorted(f for f in part.iterdir() if f.suffix.lower() in _IMAGES and not f.name.startswith("."))
        for part in parts
    }
    if not found or not any(found.values()):
        inside = sorted(part.name for part in folder.iterdir())[:5]
        wanted = "folders with images" if labelled else "images"
        raise DataError(Problem(where, f"{folder} holds {inside}, no {wanted}", _ALLOWED))
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(*(Problem(where, f"{folder / name} holds no images", f"files ending in {_IMAGES}") for name in empty))
    files = [file for part in found.values() for file in part]
    labels = np.array([name for name, part in found.items() for _ in part]) if labelled else None
    mode, size = _look_through(files, look, where)
    column: Any = ImageFiles(files, mode, look)
    look.check(1 if mode == "L" else 3, where)
    if len(files) * size[0] * size[1] * (1 if mode == "L" else 3) <= _KEPT:
        column = Pixels(column.read(np.arange(len(files))), look)
    return Data(column, labels, classes=classes, path=where)


def _look_through(files: Sequence[Path], look: Look, where: str) -> tuple[str, tuple[int, int]]:
    """The mode that all images are read in, and their size; only the files' headers are read."""
    opener = require("PIL.Image").open
    modes: dict[str, Path] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            with opener(file) as image:
                modes.setdefault(image.mode, file)
                sizes.setdefault(image.size, file)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                Problem(where, f"{file} isn't an image that can be read ({error})", "replace or remove it")
            ) from None
    deep = [f"{file} (mode {mode})" for mode, file in modes.items() if mode.startswith(("I", "F"))]
    if deep:
        raise DataError(Problem(where, f"more than 8 bits a channel: {', '.join(deep)}", "8 bits, or an npz of floats"))
    if look.size is None and len(sizes) > 1:
        (a, file_a), (b, file_b) = list(sizes.items())[:2]
        wrong = f"image sizes differ: {file_a} is {a[0]}x{a[1]}, {file_b} is {b[0]}x{b[1]}"
        raise DataError(Problem(where, wrong, "set image_size, and all are resized to it"))
    size = (look.size, look.size) if look.size is not None else next(iter(sizes))
    return ("L" if all(mode in ("L", "1") for mode in modes) else "RGB"), size


# --- datasets ---


def _is_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _datasets(
    source: str, input: Input, target: str | None, look: Look, where: str, labels: bool
) -> tuple[Any, Any, Sequence[str] | None]:
    table = _opened(source, where)
    names = table.column_names
    default = next((name for name in ("label", "labels") if name in names), names[-1])
    label = _chosen(names, target or default, lambda: "", where)[""] if labels else None
    others = [name for name in names if name not in (label, target or "label")]

    def first() -> str:
        known = [name for name in ("text", "image", "x") if name in others]
        if not known and len(others) != 1:
            raise DataError(Problem(where, f"{source} has the columns {others}", "say which is read: `input`"))
        return (known or others)[0]

    wanted = _chosen(names, input, first, where)
    inputs = _unwrapped({key: _values(table, name, look, where) for key, name in wanted.items()})
    if label is None:
        return inputs, None, None
    classes = getattr(table.features[label], "names", None)
    return inputs, np.asarray(list(table[label])), classes


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


def _values(table: Any, name: str, look: Look, where: str) -> Any:
    values = list(table[name])
    if type(table.features[name]).__name__ != "Image":
        return values if isinstance(values[0], str) else np.asarray(values)
    mode = "L" if all(image.mode in ("L", "1") for image in values) else "RGB"
    images = [read_image(image, mode, look.size) for image in values]
    shapes = list(dict.fromkeys(image.shape for image in images))
    if len(shapes) > 1:
        wrong = f"image sizes differ: {shapes[0][1]}x{shapes[0][0]} and {shapes[1][1]}x{shapes[1][0]}"
        raise DataError(Problem(where, wrong, "set image_size, and all are resized to it"))
    return np.stack(images)

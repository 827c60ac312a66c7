"""Tables: which columns are read under which names, and csv files, whose cells are numbers, texts, or the files of images.

A cell that is empty holds nothing: where inputs have names, that input is missing from the row. Sources other than csv are
`sources`'; images by class are too.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interfuse.data.columns import Look, present_in
from interfuse.data.images import SUFFIXES, images_of
from interfuse.errors import DataError, Problem, nearest

#: What is read: one column, several side by side, or one of these for each model by name.
Input = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None
_SHOWN = 5  # faulty rows that an error lists


def chosen(names: Sequence[str], input: Input, default: Callable[[], str], where: str) -> dict[str, str | list[str]]:
    """{what a batch calls it: its column, or columns}; one entry under "" where the batch is that column itself."""
    given: Mapping[str, Any] = input if isinstance(input, Mapping) else {"": input if input is not None else default()}
    wanted = {key: value if isinstance(value, str) else list(value) for key, value in given.items()}
    problems = [
        Problem(f"{where}", f"nothing is named {name!r} among {list(names)}", nearest(name, names))
        for name in columns_of(wanted)
        if name not in names
    ]
    if problems:
        raise DataError(*problems)
    return wanted


def columns_of(wanted: Mapping[str, str | list[str]]) -> list[str]:
    """Every column that is read, once."""
    return list(dict.fromkeys(name for value in wanted.values() for name in ([value] if isinstance(value, str) else value)))


def unwrapped(columns: dict[str, Any]) -> Any:
    """The one column without a name, or all by name."""
    return columns[""] if list(columns) == [""] else columns


def side_by_side(columns: Mapping[str, Any], names: Sequence[str], where: str) -> np.ndarray:
    """Columns of numbers as one input, [n, width]; a row of which some but not all are missing is an error."""
    arrays = {name: np.asarray(columns[name]) for name in names}
    wrong = [name for name, array in arrays.items() if array.dtype.kind not in "fiub" or array.ndim > 2]
    if wrong:
        raise DataError(
            *(Problem(where, f"{name} isn't a column of numbers", "columns of numbers, or one by itself") for name in wrong)
        )
    parts = [array.reshape(len(array), -1).astype(np.float32) for array in arrays.values()]
    numbers = np.concatenate(parts, axis=1)
    gone = np.isnan(numbers)
    torn = np.flatnonzero(gone.any(axis=1) & ~gone.all(axis=1))[:_SHOWN]
    if len(torn):
        owner = [name for name, part in zip(names, parts, strict=True) for _ in range(part.shape[1])]
        first = {int(row): owner[int(gone[row].argmax())] for row in torn}
        allowed = "all of its numbers, or none of them"
        raise DataError(*(Problem(where, f"row {row + 1}: {name} is empty", allowed) for row, name in first.items()))
    return numbers


def read_csv(
    source: str, input: Input, target: str | None, look: Look, where: str, labels: bool
) -> tuple[Any, Any, None, None]:
    """The inputs and labels of a csv file; images' files are named from its folder."""
    columns = _table(source, where, 2 if labels else 1)
    names = list(columns)
    last = "label" if "label" in names else names[-1]
    label = str(chosen(names, target or last, lambda: "", where)[""]) if labels else None
    features = [name for name in names if name not in (label, target or "label")]
    if input is not None:
        inputs = _asked(columns, chosen(names, input, lambda: "", where), Path(source).parent, look, where)
    else:
        inputs = _default_input({name: _numbers_or_texts(columns[name]) for name in features}, where)
    return inputs, None if label is None else _labels(columns[label], label, where), None, None


def _asked(
    columns: Mapping[str, list[str]], wanted: Mapping[str, str | list[str]], folder: Path, look: Look, where: str
) -> Any:  # fmt: skip
    """The columns that are asked for; every one that can't be read is named."""
    read: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in wanted.items():
        try:
            for name in [value] if isinstance(value, str) else value:
                read[name] = read[name] if name in read else _cells(columns[name], name, folder, look, where)
            inputs[key] = read[value] if isinstance(value, str) else side_by_side(read, value, where)
        except DataError as error:
            problems += error.problems
    if isinstance(alone := wanted.get(""), (str, list)) and not problems:
        problems += _gaps(inputs[""], alone, where)
    if problems:
        raise DataError(*dict.fromkeys(problems))
    return unwrapped(inputs)


def _gaps(values: Any, names: str | list[str], where: str) -> list[Problem]:
    """The rows without the only input there is; a text may be empty."""
    there = None if isinstance(values, list) else present_in(values)
    rows = [] if there is None else np.flatnonzero(~there)[:_SHOWN].tolist()
    name = names if isinstance(names, str) else ", ".join(names)
    return [Problem(where, f"row {row + 1}: {name} is empty", "a value in every row") for row in rows]


def _cells(cells: list[str], name: str, folder: Path, look: Look, where: str) -> Any:
    """A column by what stands in its cells that aren't empty: float32 [n, 1] of numbers, images by their files, or texts."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    if not filled:
        raise DataError(Problem(where, f"the column {name} is empty", "another one, or leave its model out"))
    try:
        return np.array([cell.strip() or "nan" for cell in cells]).astype(np.float32)[:, None]
    except ValueError:
        if not all(cell.lower().endswith(SUFFIXES) for cell in filled):
            return cells
    files = [folder / cell.strip() if cell.strip() else None for cell in cells]
    absent = [i for i, file in enumerate(files) if file is not None and not file.is_file()][:_SHOWN]
    if absent:
        raise DataError(*(Problem(where, f"row {i + 1}: {files[i]} doesn't exist", "an image's file") for i in absent))
    return images_of(files, look, where)


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

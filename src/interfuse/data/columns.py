"""Columns: what a data set keeps in memory, and how rows of it become a batch, all at once.

A column has a length and `take(rows)`, which gives the batch of those rows; there is no base class. What is stored stays
as small as it came (images as bytes, texts as text) and becomes floats or tokens at batch time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from interfuse.errors import DataError, Problem
from interfuse.extras import require
from interfuse.modules.inputs import PRESENT, split_batch


class Column(Protocol):
    """A length, and the batch of some rows."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Any:
        """The batch of `rows` (int64, any order, repeats allowed)."""


@dataclass(frozen=True)
class Numbers:
    """An array [n, ...]: floats and bytes come as float32, other integers (token numbers) as int64, booleans as they are."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: np.ndarray) -> Tensor:
        """A tensor [rows, ...]."""
        part = self.array[rows]
        if part.dtype.kind == "f" or part.dtype == np.uint8:
            return torch.from_numpy(part.astype(np.float32, copy=False))
        return torch.from_numpy(part if part.dtype.kind == "b" else part.astype(np.int64, copy=False))


@dataclass(frozen=True)
class Look:
    """How images are given: resized to `size` pixels a side, then (x - mean) / std, a value a channel, on [0, 1]."""

    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def apply(self, images: np.ndarray) -> Tensor:
        """uint8 [n, height, width, channels] -> float32 [n, channels, height, width]."""
        # NumPy: one pass in this thread, where torch would wake all threads for each small batch
        first = np.ascontiguousarray(np.moveaxis(images, 3, 1))
        x = torch.from_numpy(np.divide(first, np.float32(255), dtype=np.float32))
        if self.size is not None and tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.mean is not None:
            x -= torch.tensor(self.mean).view(-1, 1, 1)
        if self.std is not None:
            x /= torch.tensor(self.std).view(-1, 1, 1)
        return x

    def check(self, channels: int, path: str) -> None:
        """Raise `DataError` where mean or std don't have one value, or one a channel."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise DataError(Problem(path, f"{name} has {len(values)} values", f"1 or {channels}, one a channel"))


@dataclass(frozen=True)
class Pixels:
    """Images as bytes, uint8 [n, height, width, channels]; `there` says which rows hold one, where not all do."""

    array: np.ndarray
    look: Look
    there: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: np.ndarray) -> Tensor:
        """float32 [rows, channels, height, width] in [0, 1], then as `look` says."""
        return self.look.apply(self.array[rows])


@dataclass(frozen=True)
class ImageFiles:
    """Images that are decoded when a batch asks for them; `mode` is PIL's (`L` or `RGB`).

    A row without a file is black, of `size` (width, height).
    """

    files: Sequence[Path | None]
    mode: str
    look: Look
    size: tuple[int, int] = (1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [rows, height, width, channels]."""
        return np.stack([self._read(self.files[row]) for row in rows])

    def _read(self, file: Path | None) -> np.ndarray:
        if file is not None:
            return read_image(file, self.mode, self.look.size)
        return np.zeros((self.size[1], self.size[0], 1 if self.mode == "L" else 3), np.uint8)

    def take(self, rows: np.ndarray) -> Tensor:
        """float32 [rows, channels, height, width] in [0, 1], then as `look` says."""
        return self.look.apply(self.read(rows))


def read_image(source: Any, mode: str, size: int | None) -> np.ndarray:
    """One image (a file, or PIL's own) as uint8 [height, width, channels]."""
    image_module = require("PIL.Image")
    try:
        image = image_module.open(source) if isinstance(source, Path) else source
        image = image.convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(Problem(str(source), f"isn't an image that can be read ({error})", "replace or remove it")) from None
    if size is not None:
        image = image.resize((size, size), image_module.Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)


#: A tokenizer as transformers makes them: texts in, a mapping of tensors out.
Tokenizer = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Texts:
    """Texts, tokenised for each model when a batch asks for them; without a tokenizer they are given as they are."""

    texts: Sequence[str]
    tokenizers: Mapping[str, Tokenizer] | Tokenizer | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Any:
        """A list of texts, one tokenizer's batch, or {model name: that model's batch}."""
        texts = [self.texts[row] for row in rows]
        if self.tokenizers is None:
            return texts
        if isinstance(self.tokenizers, Mapping):
            return {name: _tokens(tokenizer, texts) for name, tokenizer in self.tokenizers.items()}
        return _tokens(self.tokenizers, texts)


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


@dataclass(frozen=True)
class Named:
    """Several columns under names: a batch is a mapping, such as {model name: its inputs}.

    `present` has booleans [n] for those columns in which some rows hold nothing.
    """

    columns: Mapping[str, Column]
    present: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """{name: that column's batch}, and the marks of what is missing under "present", where something is."""
        batch = {name: column.take(rows) for name, column in self.columns.items()}
        marks = {name: torch.from_numpy(there[rows]) for name, there in self.present.items()}
        return batch | ({PRESENT: marks} if marks else {})


@dataclass(frozen=True)
class Items:
    """Any map-style data set of (input, target) or of mappings with labels, collated as PyTorch does."""

    dataset: Dataset[Any]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def both(self, rows: Sequence[int] | np.ndarray) -> tuple[Any, Tensor | None]:
        """The batch's inputs and its targets."""
        return split_batch(default_collate([self.dataset[int(row)] for row in rows]))

    def take(self, rows: np.ndarray) -> Any:
        """The batch's inputs."""
        return self.both(rows)[0]


def column_of(values: Any, look: Look, path: str) -> Column:
    """The column for an array, a tensor, a sequence of texts, or a mapping of these; `DataError` for anything else.

    uint8 with 3 axes, or 4 of which the last (or else the second) has 1, 3 or 4 entries, are images.
    """
    if isinstance(values, Numbers | Pixels | ImageFiles | Texts | Named | Items):
        return values
    if isinstance(values, Mapping) and values:
        return _named(values, look, path)
    if isinstance(values, list | tuple) and values and all(isinstance(text, str) for text in values):
        return Texts(list(values))
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind == "U" and array.ndim == 1:
        return Texts(array.tolist())
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        wrong = f"{array.dtype} values of shape {array.shape}"
        raise DataError(Problem(path, wrong, "numbers [n, ...], images as uint8 [n, height, width, channels], or texts"))
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        return Pixels(_channels_last(array, path, look), look)
    return Numbers(array)


def _named(values: Mapping[str, Any], look: Look, path: str) -> Named:
    """Columns under names; what is missing in them is found."""
    named = {str(name): column_of(_without_none(part), look, f"{path}.{name}") for name, part in values.items()}
    sizes = {name: len(column) for name, column in named.items()}
    if len(dict.fromkeys(sizes.values())) > 1:
        raise DataError(Problem(path, f"its parts have different lengths: {sizes}", "one row of each for every sample"))
    found = {str(name): present_in(part) for name, part in values.items()}
    return Named(named, {name: there for name, there in found.items() if there is not None and not there.all()})


def _without_none(part: Any) -> Any:
    """Texts with "" in place of None; anything else as it is."""
    if isinstance(part, list | tuple) and any(isinstance(text, str) for text in part):
        return ["" if text is None else text for text in part]
    return part


def present_in(part: Any) -> np.ndarray | None:
    """Which rows [n] of one input hold something, where that can be seen: a text that isn't blank, a number that isn't NaN,
    an image's file. None where all do by their kind."""
    if isinstance(part, Pixels):
        return part.there
    if isinstance(part, ImageFiles):
        return np.array([file is not None for file in part.files])
    if isinstance(part, Texts):
        part = list(part.texts)
    if isinstance(part, list | tuple) and any(isinstance(text, str) for text in part):
        return np.array([bool(text and text.strip()) for text in part])
    if isinstance(part, Numbers):
        part = part.array
    if isinstance(part, Named | Items | Mapping):
        return None
    array = part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
    if array.dtype.kind == "U" and array.ndim == 1:
        return np.array([bool(text.strip()) for text in array.tolist()])
    if array.dtype.kind != "f" or array.size == 0:
        return None
    found: np.ndarray = ~np.isnan(array.reshape(len(array), -1)).all(axis=1)
    return found


def _channels_last(array: np.ndarray, path: str, look: Look) -> np.ndarray:
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[3] not in (1, 3, 4):
        array = np.moveaxis(array, 1, 3)
    if array.shape[3] not in (1, 3, 4):
        wrong = f"bytes of shape {tuple(array.shape)} are neither (n, height, width, channels) nor channels first"
        raise DataError(Problem(path, wrong, "1, 3 or 4 channels; store anything but images as float32"))
    look.check(array.shape[3], path)
    return array

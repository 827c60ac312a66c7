"""The sets as this benchmark reads them: a part of train to train on, another to choose by, the test part as it is.

Images are small bytes, which the networks enlarge themselves; texts lie sorted by length, so that a batch holds texts of
about one length. Which examples are taken depends on nothing but the seed 0.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from interfuse.data import Data
from interfuse.modules.inputs import split_batch

BATCH, TOKENS = 32, 32
VALIDATION, TEST = 400, 1000
#: The sets: what they hold, and how many examples are trained on.
SETS = {"notmnist": ("image", 1600), "trec6": ("text", 600), "gtsrb": ("image", 1600), "banking77": ("text", 1200)}


class NearLengths(BatchSampler):
    """Batches of rows that lie near each other, in a new order each pass: for data that are sorted by length."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(range(rows), size, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        rows = len(self.sampler)  # type: ignore[arg-type]
        order = (torch.arange(rows) + 8 * self.batch_size * torch.rand(rows)).argsort()
        batches = order.split(self.batch_size)
        for i in torch.randperm(len(batches)).tolist():
            yield batches[i].tolist()


@dataclass(frozen=True)
class Task:
    """One set. `pool` is `train` and as many examples more, as far as there are so many; `more` are those alone."""

    name: str
    kind: str
    classes: int
    train: Data
    validation: Data
    pool: Data
    more: Data
    test: Data

    @property
    def spec(self) -> dict[str, Any]:
        """What the data are, for the cache's keys."""
        sizes = [len(part) for part in (self.train, self.validation, self.pool, self.test)]
        return {"set": self.name, "sizes": sizes, "batch": BATCH} | ({"norms": "trained"} if self.kind == "image" else {})

    def loader(self, data: Data, seed: int = 0) -> DataLoader[Any]:
        """Batches to train on."""
        plain = data.loader(BATCH, shuffle=True, seed=seed)
        if self.kind == "image":
            return plain
        return DataLoader(data, batch_sampler=NearLengths(len(data), BATCH), collate_fn=plain.collate_fn)

    def example(self, count: int = BATCH) -> Any:
        """Inputs from all over the training part."""
        return split_batch(next(iter(part(self.train, count).loader(count))))[0]


def load(name: str, folder: Path, tokenizer: Callable[..., Any] | None, train: int) -> Task:
    """A set from the folder of all sets; texts through the tokenizer."""
    if not (folder / name).is_dir():
        sys.exit(f"no data set at {folder / name}; give --data")
    labels = json.loads((folder / name / "meta.json").read_text(encoding="utf-8"))["labels"]
    kind = SETS[name][0]
    read = _images if kind == "image" else _texts
    parts = {which: read(folder / name, which, labels) for which in ("train", "test")}
    if tokenizer is not None:
        cut = partial(tokenizer, max_length=TOKENS)
        parts = {which: part.tokenize(cut) for which, part in parts.items()}
    whole, test = parts["train"], parts["test"]
    rest, validation = whole.split(VALIDATION / len(whole), seed=0)
    pool = part(rest, 2 * train)
    more, taken = pool.split(train / len(pool), seed=0)
    return Task(name, kind, len(labels), taken, validation, pool, more, part(test, TEST))


def part(data: Data, count: int) -> Data:
    """So many examples, every class in its proportion; all where there are no more."""
    return data.split(count / len(data), seed=0)[1] if count < len(data) else data


def _images(folder: Path, which: str, labels: list[str]) -> Data:
    from PIL import Image

    with np.load(folder / f"{which}.npz") as file:
        arrays = dict(file)
    if "jpeg" in arrays:
        ends, content = arrays["offset"], arrays["jpeg"].tobytes()
        files = [io.BytesIO(content[start:end]) for start, end in itertools.pairwise(ends)]
        arrays["x"] = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return Data(arrays["x"], arrays["y"], classes=labels)


def _texts(folder: Path, which: str, labels: list[str]) -> Data:
    with gzip.open(folder / f"{which}.csv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: len(row["text"]))
    return Data([row["text"] for row in rows], np.array([int(row["label"]) for row in rows]), classes=labels)

"""The eight sets of texts as tokens, in batches of texts of like length. Read from where they lie; nothing is kept."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

TASKS = ("banking77", "clickbait", "goemotions_ekman", "hwu64", "scicite", "sms_spam", "snips", "trec6")
LENGTH, BATCH = 48, 32  # tokens at most, texts
POOL = 64  # batches that are sorted together


class Texts(Dataset[Any]):
    """Token numbers and a label each."""

    def __init__(self, tokens: Sequence[Sequence[int]], labels: Sequence[Any]) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[Sequence[int], Any]:
        return self.tokens[i], self.labels[i]


class ByLength(Sampler[list[int]]):
    """Rows in batches of like length; with `shuffle` the rows of a batch and the batches' order are new each time."""

    def __init__(self, texts: Texts, size: int, *, shuffle: bool) -> None:
        self.lengths, self.size, self.shuffle = [len(row) for row in texts.tokens], size, shuffle

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.lengths)
        if not self.shuffle:
            rows = sorted(range(count), key=self.lengths.__getitem__)
            yield from (rows[i : i + self.size] for i in range(0, count, self.size))
            return
        rows = torch.randperm(count).tolist()
        pools = [rows[i : i + POOL * self.size] for i in range(0, count, POOL * self.size)]
        found = [sorted(pool, key=self.lengths.__getitem__) for pool in pools]
        cut = [pool[i : i + self.size] for pool in found for i in range(0, len(pool), self.size)]
        yield from (cut[i] for i in torch.randperm(len(cut)).tolist())


@dataclass(frozen=True)
class Task:
    """A task's texts, and how many classes it has."""

    classes: int
    parts: Mapping[str, Texts]

    def loader(self, part: str, *, shuffle: bool = False, labels: Sequence[Any] | None = None) -> DataLoader[Any]:
        """A part in batches of (inputs, labels); other `labels` take the place of the set's, in its order of rows."""
        texts = self.parts[part] if labels is None else Texts(self.parts[part].tokens, labels)
        return DataLoader(texts, batch_sampler=ByLength(texts, BATCH, shuffle=shuffle), collate_fn=padded)


def padded(rows: Sequence[tuple[Sequence[int], Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Texts side by side, (batch, tokens), zeros behind the short ones, and their labels."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
    labels = [label for _, label in rows]
    targets = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return {"input_ids": ids, "attention_mask": mask}, targets


def read(data: Path, name: str, tokenizer: Any, texts: int, tested: int) -> Task:
    """A task's parts, drawn with seed 0: `texts` of its file `train`, a fifth for validation; `tested` of its file `test`."""
    train, test = _rows(data / name / "train.csv.gz"), _rows(data / name / "test.csv.gz")
    drawn = _drawn(train, texts)
    held = len(drawn) // 5
    parts = {"train": drawn[held:], "validation": drawn[:held], "test": _drawn(test, tested)}
    labels = json.loads((data / name / "meta.json").read_text(encoding="utf-8"))["labels"]
    return Task(len(labels), {part: _encoded(rows, tokenizer) for part, rows in parts.items()})


def _rows(path: Path) -> list[tuple[str, int]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(stream)]


def _drawn(rows: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[int(i)] for i in order[:count]]


def _encoded(rows: Sequence[tuple[str, int]], tokenizer: Any) -> Texts:
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTH)["input_ids"]
    return Texts(tokens, [label for _, label in rows])

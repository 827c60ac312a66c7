"""The benchmark of text experts works on a tiny network, goes on where it stopped, and chooses by validation."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
HERE = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The benchmark's modules, on two tasks of few texts and a tiny BERT."""
    from transformers import BertConfig, BertModel

    monkeypatch.syspath_prepend(str(HERE))
    names = ("texts", "experts", "sharing", "table", "__main__")
    found: dict[str, Any] = {name: importlib.import_module(f"benchmarks.text_experts.{name}") for name in names}
    config = BertConfig(vocab_size=25, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "minilm")
    (tmp_path / "minilm" / "vocab.txt").write_text("\n".join(WORDS))
    monkeypatch.setattr(found["experts"], "home", lambda: tmp_path / "minilm")
    main = found["__main__"]
    monkeypatch.setattr(main, "TASKS", ("snips", "trec6"))
    monkeypatch.setattr(main, "TESTED", 16)
    monkeypatch.setattr(main, "TUNED", ((6, "own"), (3, "distilled")))
    for module in (main, found["sharing"], found["table"]):
        monkeypatch.setattr(module, "METHODS", {"linear": {}, "iso_c": {}, "tsv_m": {}})
        monkeypatch.setattr(module, "DEPTHS", (found["sharing"].EMBEDDINGS, 3, 6))
    return found


def write_texts(data: Path) -> None:
    """Two sets in which a word tells the class."""
    chance = random.Random(0)
    for name, classes in (("snips", 3), ("trec6", 2)):
        (data / name).mkdir(parents=True)
        (data / name / "meta.json").write_text(json.dumps({"labels": [str(i) for i in range(classes)]}))
        for part, count in (("train", 70), ("test", 20)):
            with gzip.open(data / name / f"{part}.csv.gz", "wt", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["text", "label"])
                for i in range(count):
                    words = [f"w{chance.randrange(5, 20)}" for _ in range(chance.randrange(2, 9))]
                    writer.writerow([" ".join([f"w{i % classes}", *words]), i % classes])


def test_the_whole_of_it(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = parts["__main__"]
    write_texts(tmp_path / "data")
    places = [text for name in ("data", "cache", "out") for text in (f"--{name}", str(tmp_path / name))]
    monkeypatch.setattr("sys.argv", ["text_experts", *places, "--texts", "60"])
    main.main()
    table = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "| embeddings |",
        "| **mean** |",
        "| nothing |",
        "chosen, test",
        "each task's own layers trained",
        "experts' probabilities",
    ):
        assert text in table
    assert "<svg" in (tmp_path / "out" / "text-sharing.svg").read_text()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "60" / "results").iterdir()}
    assert {"6-iso_c-merged.json", "embeddings-linear-merged.json"} <= set(kept)
    monkeypatch.setattr(parts["experts"], "_train", None)
    monkeypatch.setattr(parts["sharing"], "_tune", None)
    main.main()
    assert (tmp_path / "out" / "README.md").read_text() == table
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache" / "60" / "results").iterdir()} == kept


def test_the_smallest_within_a_point_is_chosen_by_validation(parts: dict[str, Any]) -> None:
    table, result = parts["table"], parts["sharing"].Result
    records = {"a": {"expert": {"validation": 0.9, "test": 0.0}}, "b": {"expert": {"validation": 0.7, "test": 1.0}}}
    prices = {"3": {"parameters": 30.0}, "6": {"parameters": 10.0}}
    near = result(3, "linear", "merged", {"a": 0.86, "b": 0.725}, {"a": 0.0, "b": 0.0}, 0.0)
    better = result(3, "linear", "own", {"a": 0.9, "b": 0.7}, {}, 0.0)
    small = result(6, "linear", "all", {"a": 0.88, "b": 0.69}, {"a": 1.0, "b": 1.0}, 0.0)
    assert table.chosen([near, better, small], prices, records) is better
    assert table.chosen([near, small], prices, records) is near
    close = result(6, "linear", "all", {"a": 0.88, "b": 0.7001}, {}, 0.0)
    assert table.chosen([near, better, close], prices, records) is close


def test_batches_hold_every_row_once_and_texts_of_like_length(parts: dict[str, Any]) -> None:
    texts = parts["texts"].Texts([[1] * (i * 7 % 40 + 1) for i in range(70)], list(range(70)))
    for shuffle in (False, True):
        rows = list(parts["texts"].ByLength(texts, 8, shuffle=shuffle))
        assert sorted(row for batch in rows for row in batch) == list(range(70))
        assert max(len({len(texts.tokens[row]) for row in batch}) for batch in rows) <= 7
    task = parts["texts"].Task(70, {"train": texts})
    inputs, labels = next(iter(task.loader("train")))
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert inputs["input_ids"].shape == (32, max(lengths))
    assert [len(texts.tokens[int(i)]) for i in labels] == lengths

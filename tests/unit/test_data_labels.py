"""Data without labels, and class numbers in the order of other names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from interfuse.data import Data, load_data
from interfuse.data.joining import joined
from interfuse.errors import DataError


def test_without_labels_batches_are_inputs_alone(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    data = load_data(str(tmp_path / "x.npz"), labels=False)
    assert (data.labelled, data.classes, len(data)) == (False, None, 7)
    batches = list(data.loader(3))
    assert torch.equal(torch.cat(batches), torch.from_numpy(x))
    assert torch.equal(torch.cat([batch[0] for batch in DataLoader(data, 3)]), torch.from_numpy(x))
    rest, part = data.split(0.3)
    assert (len(rest), len(part), part.labelled) == (5, 2, False)
    with pytest.raises(DataError, match="has no labels"):
        _ = data.targets
    with pytest.raises(DataError, match="nothing is named 'y'"):
        load_data(str(tmp_path / "x.npz"))


def test_a_column_of_labels_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("p,q,label\n1,2,x\n3,4,y\n")
    (tmp_path / "b.csv").write_text("text\ngood film\ndull\n")
    (tmp_path / "c.csv").write_text("p,kind\n1,2\n3,4\n")
    assert next(iter(load_data(str(tmp_path / "a.csv"), labels=False).loader(2))).tolist() == [[1, 2], [3, 4]]
    assert next(iter(load_data(str(tmp_path / "b.csv"), labels=False).loader(2))) == ["good film", "dull"]
    assert next(iter(load_data(str(tmp_path / "c.csv"), target="kind", labels=False).loader(2))).tolist() == [[1], [3]]


def test_a_folder_without_labels_holds_the_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    assert next(iter(load_data(str(tmp_path), labels=False).loader(2))).shape == (2, 1, 4, 4)
    with pytest.raises(DataError, match="no folders with images"):
        load_data(str(tmp_path))


def test_classes_are_renumbered_by_name() -> None:
    x = np.zeros((4, 2), np.float32)
    data = Data(x, np.array(["dog", "cat", "dog", "owl"]))
    other = data.named(["owl", "bee", "dog", "cat"])
    assert other.targets.tolist() == [2, 3, 2, 0]
    assert other.classes == ("owl", "bee", "dog", "cat")
    assert data.targets.tolist() == [1, 0, 1, 2]  # unchanged
    with pytest.raises(DataError, match=r"row 1: no model knows the class 'dog'.*known: owl, cat"):
        data.named(["owl", "cat"])


def test_numbers_without_names_count_the_classes() -> None:
    data = Data(np.zeros((3, 2), np.float32), np.array([0, 2, 1]))
    assert data.named(["a", "b", "c"]).targets.tolist() == [0, 2, 1]
    assert data.named(["2", "1", "0"]).targets.tolist() == [2, 0, 1]  # numbers that are names
    with pytest.raises(DataError, match="row 2: no model knows the class '2'"):
        data.named(["a", "b"])
    named = Data(np.zeros((3, 2), np.float32), np.array([0, 2, 1]), classes=["z", "b", "a"])
    assert named.named(["a", "b", "z"]).targets.tolist() == [2, 0, 1]


def test_data_sets_are_joined_row_by_row() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(5, 3)).astype(np.float32), np.array([0, 1, 1, 0, 1])
    whole = joined([Data(x, y), Data(2 * x, 1 - y)])
    inputs, targets = next(iter(whole.loader(10)))
    assert torch.equal(inputs, torch.from_numpy(np.concatenate([x, 2 * x])))
    assert torch.equal(targets, torch.from_numpy(np.concatenate([y, 1 - y])))
    rest, part = Data(x, y).split(0.4)
    back = joined([part, rest])  # of views, whose rows are some of a column's
    assert torch.equal(back.targets, torch.cat([part.targets, rest.targets]))
    texts = joined([Data(["a", "b"], None), Data(["c"], None)])
    assert next(iter(texts.loader(3))) == ["a", "b", "c"]
    named = joined([Data({"p": x, "q": x}, y), Data({"p": 2 * x, "q": x}, y)])
    assert next(iter(named.loader(10)))[0]["p"].shape == (10, 3)
    for parts, said in (
        ([Data(x, y), Data(x, None)], "some have labels"),
        ([Data(x, y), Data(x, y, classes=["0", "1", "2"])], "their classes differ: 0, 1; 0, 1, 2"),
        ([Data(x, y), Data(x[:, :2], y)], r"shapes \(3,\), \(2,\)"),
        ([Data(x, y), Data(list("abcde"), y)], "different kinds: numbers, texts"),
        ([Data({"p": x}, y), Data({"q": x}, y)], "their inputs are p; q"),
    ):
        with pytest.raises(DataError, match=said):
            joined(parts)

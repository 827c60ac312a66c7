"""Data of several inputs: a csv's texts, numbers and images beside each other, columns side by side, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interfuse.data import Data, load_data
from interfuse.errors import DataError

ROWS = """picture,review,age,income,label
a.png,good,30,1.5,yes
,so so,,,no
sub/b.png, ,41,2.5,yes
a.png,bad,52,3.5,no
"""
INPUT = {"look": "picture", "read": "review", "row": ["age", "income"]}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "sub").mkdir()
    image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "a.png")
    image.fromarray(np.full((4, 4), 51, np.uint8)).save(tmp_path / "sub" / "b.png")
    (tmp_path / "train.csv").write_text(ROWS)
    return tmp_path / "train.csv"


def words(texts: list[str], **_: Any) -> Mapping[str, Any]:
    return {"input_ids": torch.tensor([[len(text)] for text in texts])}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_csv_of_texts_numbers_and_images(table: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    if not in_memory:
        monkeypatch.setattr("interfuse.data.images._KEPT", 0)
    data = load_data(table, input=INPUT).tokenize({"read": words})
    inputs, targets = next(iter(data.loader(4)))
    assert targets.tolist() == [1, 0, 1, 0]
    assert inputs["look"].shape == (4, 1, 4, 4)
    assert inputs["look"][:, 0, 0, 0].tolist() == pytest.approx([1, 0, 0.2, 1])
    assert inputs["read"]["input_ids"].flatten().tolist() == [4, 5, 1, 3]
    assert inputs["row"][[0, 2, 3]].tolist() == [[30, 1.5], [41, 2.5], [52, 3.5]]
    assert {name: there.tolist() for name, there in inputs["present"].items()} == {
        "look": [True, False, True, True],
        "read": [True, True, False, True],
        "row": [True, False, True, True],
    }
    _, part = data.split(0.5)  # marks follow the rows
    marked = next(iter(part.loader(2)))[0]["present"]["look"].tolist()
    assert marked == [inputs["present"]["look"][row].item() for row in part._rows]
    sample = data[1]
    assert sample[0]["present"]["look"].item() is False


def test_columns_of_one_input(table: Path) -> None:
    numbers = table.with_name("n.csv")
    numbers.write_text("a,b,c,label\n1,2,x,0\n3,4,y,1\n")
    assert next(iter(load_data(numbers, input=["b", "a"]).loader(2)))[0].tolist() == [[2, 1], [4, 3]]
    images = table.with_name("i.csv")
    images.write_text("file,label\na.png,0\nsub/b.png,1\n")
    assert next(iter(load_data(images, input="file").loader(2)))[0].shape == (2, 1, 4, 4)
    with pytest.raises(DataError, match="c isn't a column of numbers; columns of numbers, or one by itself"):
        load_data(numbers, input=["a", "c"])


def test_everything_wrong_in_a_csv_is_said_at_once(table: Path) -> None:
    table.write_text("picture,review,age,income,gone,label\nc.png,good,,1,,0\na.png,bad,2,,,1\n")
    with pytest.raises(DataError) as caught:
        load_data(table, input={**INPUT, "none": "gone"}, path="data.train")
    assert [str(problem) for problem in caught.value.problems] == [
        f"data.train: row 1: {table.parent / 'c.png'} doesn't exist; an image's file",
        "data.train: row 1: age is empty; all of its numbers, or none of them",
        "data.train: row 2: income is empty; all of its numbers, or none of them",
        "data.train: the column gone is empty; another one, or leave its model out",
    ]
    table.write_text("picture,age,label\na.png,1,0\n,,1\n")
    for name in ("picture", "age"):
        with pytest.raises(DataError, match=f"row 2: {name} is empty; a value in every row"):
            load_data(table, input=name)
    with pytest.raises(DataError, match="row 2: every input is missing; at least one"):
        load_data(table, input={"a": "picture", "b": "age"})


def test_an_npz_marks_what_is_missing(tmp_path: Path) -> None:
    there = np.array([True, False, True])
    numbers = np.array([[1, 2], [3, 4], [np.nan, np.nan]], np.float32)
    arrays: dict[str, Any] = {"image": np.zeros((3, 4, 4), np.uint8), "image_present": there}
    arrays |= {"caption": np.array(["a", "b", ""]), "table": numbers, "table_present": np.array([False, True, True])}
    np.savez(tmp_path / "d.npz", y=np.array([0, 1, 0]), **arrays)
    data = load_data(tmp_path / "d.npz", input={"look": "image", "read": "caption", "row": "table"})
    marks = next(iter(data.loader(3)))[0]["present"]
    found = {name: there.tolist() for name, there in marks.items()}
    assert found == {"look": [True, False, True], "read": [True, True, False], "row": [False, True, False]}


def test_a_data_sets_columns_may_hold_nothing(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"text": ["a", None, "c"], "x": [[1.0, 2.0], [3.0, 4.0], None], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d", input={"read": "text", "row": "x"})
    inputs, _ = next(iter(data.loader(3)))
    assert inputs["read"] == ["a", "", "c"]
    assert {name: there.tolist() for name, there in inputs["present"].items()} == {
        "read": [True, False, True],
        "row": [True, True, False],
    }
    with pytest.raises(DataError, match="row 2: text is empty; a value in every row"):
        load_data(tmp_path / "d")


def test_marks_in_python() -> None:
    texts, numbers = ["a", None, "c"], np.array([1.0, 2.0, np.nan])
    marks = next(iter(Data({"t": texts, "n": numbers}, [0, 1, 0]).loader(3)))[0]["present"]
    assert {name: there.tolist() for name, there in marks.items()} == {"t": [True, False, True], "n": [True, True, False]}
    whole = Data({"t": ["a", "b"], "n": np.array([1.0, 2.0])}, [0, 1])
    assert "present" not in next(iter(whole.loader(2)))[0]
    given = Data({"t": ["a", "b"], "n": np.array([1.0, 2.0])}, [0, 1], present={"n": [True, False]})
    assert next(iter(given.loader(2)))[0]["present"]["n"].tolist() == [True, False]
    with pytest.raises(DataError) as caught:
        Data({"t": ["a", "b"]}, [0, 1], present={"T": [True, False], "t": [1, 0]})
    assert [str(problem) for problem in caught.value.problems] == [
        "data.present.T: no input has this name; allowed: t",
        "data.present.t: got int64 of shape (2,); booleans (2,), one a sample",
    ]
    with pytest.raises(DataError, match="there is one input, without a name; give inputs by name"):
        Data(["a", "b"], [0, 1], present={"t": [True, False]})

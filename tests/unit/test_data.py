"""Data sets: every source, batches against the arrays they came from, splits, and what is refused."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from interfuse.data import Data, load_data
from interfuse.errors import DataError, ModelError, OptionError, UserError


def whole(data: Data, batch_size: int = 64, **options: Any) -> tuple[Any, torch.Tensor]:
    """All batches, joined."""
    inputs, targets = zip(*data.loader(batch_size, **options), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- npz ---


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 5, 1), (6, 4, 5, 3), (6, 3, 4, 5)])
def test_bytes_become_images_in_0_to_1_channels_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = load_data(saved(tmp_path / "d.npz", x=x, y=np.arange(6) % 3))
    inputs, targets = whole(data, 4)
    images = x if shape[1] == 3 else np.moveaxis(x.reshape(6, 4, 5, -1), 3, 1)
    torch.testing.assert_close(inputs, torch.from_numpy(images / 255).float())
    assert inputs.is_contiguous()
    assert targets.dtype == torch.int64
    assert data.classes == ("0", "1", "2")


def test_images_are_resized_and_normalised(tmp_path: Path) -> None:
    x = np.full((2, 8, 8, 3), 255, dtype=np.uint8)
    path = saved(tmp_path / "d.npz", x=x, y=[0, 1])
    inputs, _ = whole(load_data(path, image_size=4, mean=[0.5, 0.0, 1.0], std=[0.5]))
    assert inputs.shape == (2, 3, 4, 4)
    torch.testing.assert_close(inputs[0, :, 0, 0], torch.tensor([1.0, 2.0, 0.0]))
    with pytest.raises(DataError, match="mean has 2 values; 1 or 3, one a channel"):
        load_data(path, mean=[0.1, 0.2])


def test_floats_stay_and_integers_become_int64(tmp_path: Path) -> None:
    x, ids = np.random.default_rng(0).normal(size=(5, 3)) * 300, np.arange(10, dtype=np.int16).reshape(5, 2)
    path = saved(tmp_path / "d.npz", x=x, ids=ids, y=np.linspace(0, 1, 5))
    data = load_data(path)
    inputs, targets = whole(data)
    torch.testing.assert_close(inputs, torch.from_numpy(x).float())
    assert (targets.dtype, data.classes) == (torch.float32, None)
    assert whole(load_data(path, input="ids"))[0].dtype == torch.int64


def test_one_input_for_each_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz", a=np.ones((4, 2), "f"), b=np.zeros((4, 3, 3), np.uint8), y=[0, 1, 0, 1])
    inputs, _ = next(iter(load_data(path, input={"cnn": "b", "mlp": "a"}).loader(3)))
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {"cnn": (3, 1, 3, 3), "mlp": (3, 2)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.ones((3, 2)), "y": [0, 1]}, "3 inputs for 2 targets"),
        ({"x": np.ones((2, 2)), "yy": [0, 1]}, r"nothing is named 'y' among \['x', 'yy'\]"),
        ({"x": np.ones((2, 2)), "y": [0, -1]}, "row 2: label -1"),
        ({"x": np.ones((2, 2)), "y": [0.0, np.nan]}, "row 2: the target isn't finite"),
        ({"x": np.array([{}, {}]), "y": [0, 1]}, "'x' holds Python objects, which only unpickling could read"),
        ({"x": np.ones((2, 2), complex), "y": [0, 1]}, r"complex128 values of shape \(2, 2\)"),
        ({"x": np.ones((2, 5, 5, 5), np.uint8), "y": [0, 1]}, "neither"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "0 inputs for 0 targets"),
    ],
)
def test_an_npz_that_cannot_be_read_says_why(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(saved(tmp_path / "d.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"nonsense"])
def test_a_damaged_npz_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"^data\.train: .*d\.npz can't be read"):
        load_data(tmp_path / "d.npz", path="data.train")


def test_a_bare_array_under_the_name_npz_is_said(tmp_path: Path) -> None:
    with open(tmp_path / "d.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match="one bare array"):
        load_data(tmp_path / "d.npz")


# --- csv ---


def test_csv_of_numbers_and_names(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", "a,b,label\n1,2.5,dog\n3,-4e1,cat\n\n5,6,dog\n")
    data = load_data(path)
    inputs, targets = whole(data)
    assert inputs.tolist() == [[1.0, 2.5], [3.0, -40.0], [5.0, 6.0]]
    assert (targets.tolist(), data.classes) == ([1, 0, 1], ("cat", "dog"))
    packed = tmp_path / "d.csv.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert torch.equal(whole(load_data(packed))[0], inputs)
    assert whole(load_data(path, target="a", input="b"))[0].tolist() == [[2.5], [-40.0], [6.0]]


def test_csv_labels_by_kind(tmp_path: Path) -> None:
    assert load_data(written(tmp_path / "i.csv", "a,y\n1,0\n1,2\n")).classes == ("0", "1", "2")
    data = load_data(written(tmp_path / "f.csv", "a,y\n1,0.5\n1,2\n"))
    assert (data.classes, data.targets.tolist()) == (None, [0.5, 2.0])


def test_test_labels_are_read_with_the_training_classes(tmp_path: Path) -> None:
    train = load_data(written(tmp_path / "a.csv", "x,label\n1,b\n1,a\n1,c\n"))
    test = load_data(written(tmp_path / "b.csv", "x,label\n1,c\n"), classes=train.classes)
    assert test.targets.tolist() == [2]
    with pytest.raises(DataError, match=r"row 2: unknown label 'z'; known: a, b, c\n.*row 3: unknown label 'y'"):
        load_data(written(tmp_path / "c.csv", "x,label\n1,c\n1,z\n1,y\n"), classes=train.classes)
    with pytest.raises(DataError, match="row 1: label 3; class numbers from 0 to 2"):
        load_data(saved(tmp_path / "c.npz", x=np.ones((1, 1)), y=[3]), classes=train.classes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", "has 0 rows under the names"),
        ("", "has 0 rows"),
        ("a,a\n1,2\n", r"under the names \['a', 'a'\]"),
        ("a,b\n1,2\n1\n1,2,3\n", "row 2 has 1 values; 2, as the first row\n.*row 3 has 3 values"),
        ("a,b,label\n1,x,0\n", r"the columns \['b'\] aren't all numbers, beside the numbers \['a'\]"),
        ("a,b,label\n1,nan,0\n", "row 1: b is nan"),
        ("a,label\n1,\n", "row 1: label is empty"),
        ("a,label\n1,-1\n", "row 1: label -1"),
    ],
)
def test_a_csv_that_cannot_be_read_says_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(written(tmp_path / "d.csv", text))


def test_a_csv_that_is_not_utf8_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"a,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="can't be read"):
        load_data(tmp_path / "d.csv")


# --- texts ---


def tokenizer(offset: int) -> Any:
    """A tokenizer's twin: a word is its length plus `offset`, padded with 0."""

    def tokenize(texts: list[str], *, padding: bool, truncation: bool, return_tensors: str) -> dict[str, torch.Tensor]:
        assert padding
        assert truncation
        assert return_tensors == "pt"
        rows = [[len(word) + offset for word in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    return tokenize


def test_texts_are_tokenised_for_each_model_at_batch_time(tmp_path: Path) -> None:
    data = load_data(written(tmp_path / "d.csv", 'n,text,label\n1,"one two, three",a\n2,four,b\n3,x y,a\n'))
    assert data.has_texts
    assert next(iter(data.loader(2)))[0] == ["one two, three", "four"]
    inputs, targets = next(iter(data.tokenize({"p": tokenizer(0), "q": tokenizer(10)}).loader(2)))
    assert inputs["p"]["input_ids"].tolist() == [[3, 4, 5], [4, 0, 0]]
    assert inputs["q"]["input_ids"].tolist() == [[13, 14, 15], [14, 0, 0]]
    assert targets.tolist() == [0, 1]
    alone, _ = next(iter(data.tokenize(tokenizer(0)).loader(2)))
    assert list(alone) == ["input_ids", "attention_mask"]
    assert next(iter(data.loader(2)))[0] == ["one two, three", "four"]


def test_texts_beside_numbers_by_model(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", "n,text,label\n1,one two,a\n2,four,b\n")
    data = load_data(path, input={"bert": "text", "mlp": "n"})
    inputs, _ = next(iter(data.tokenize({"bert": tokenizer(0)}).loader(2)))
    assert inputs["bert"]["input_ids"].tolist() == [[3, 3], [4, 0]]
    assert inputs["mlp"].tolist() == [[1.0], [2.0]]
    with pytest.raises(DataError, match="bert: is text without a tokenizer"):
        data.tokenize({"mlp": tokenizer(0)})


# --- images by class ---


def image(path: Path, size: tuple[int, int], colour: Any, mode: str = "RGB") -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    image(tmp_path / "dog" / "2.png", (4, 3), (255, 0, 51))
    image(tmp_path / "cat" / "1.png", (4, 3), (0, 0, 0))
    image(tmp_path / "cat" / "0.jpg", (4, 3), (255, 255, 255))
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    data = load_data(tmp_path)
    inputs, targets = whole(data)
    assert (data.classes, targets.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert inputs.shape == (3, 3, 3, 4)
    torch.testing.assert_close(inputs[2, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert load_data(tmp_path, classes=("bird", "dog", "cat")).targets.tolist() == [2, 2, 1]


def test_images_decoded_at_batch_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        image(tmp_path / "a" / f"{i}.png", (5 + i, 5), 80 * i, "L")
    kept = whole(load_data(tmp_path, image_size=4))[0]
    monkeypatch.setattr("interfuse.data.images._KEPT", 0)
    assert torch.equal(whole(load_data(tmp_path, image_size=4))[0], kept)
    assert kept.shape == (3, 1, 4, 4)


def test_image_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    image(tmp_path / "a" / "0.png", (4, 4), (0, 0, 0))
    image(tmp_path / "b" / "1.png", (4, 5), (0, 0, 0))
    with pytest.raises(DataError, match=r"image sizes differ: .*0\.png is 4x4, .*1\.png is 4x5; set image_size"):
        load_data(tmp_path)
    with pytest.raises(DataError, match="unknown label 'b'; known: a"):
        load_data(tmp_path, classes=("a",), image_size=4)
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png isn't an image"):
        load_data(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(DataError, match="b holds no images"):
        load_data(tmp_path)
    with pytest.raises(DataError, match=r"holds \['0.png'\], no folders with images"):
        load_data(tmp_path / "a")


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "a" / "0.png", (4, 4), 40000, "I;16")
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        load_data(tmp_path)


# --- datasets ---


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets")


def test_a_folder_of_datasets(tmp_path: Path, datasets: Any) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a b", "c"], "label": [1, 0]}, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    data = load_data(tmp_path / "one")
    assert (data.classes, data.targets.tolist(), data.has_texts) == (("no", "yes"), [1, 0], True)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert len(load_data(f"{tmp_path}/two:test")) == 1
    with pytest.raises(DataError, match=r"has the splits \['train', 'test'\]; say which: .*two:train"):
        load_data(tmp_path / "two")
    with pytest.raises(DataError, match="has no split 'tset'; did you mean 'test'"):
        load_data(f"{tmp_path}/two:tset")
    with pytest.raises(DataError, match="is one table without splits"):
        load_data(f"{tmp_path}/one:test")


def test_datasets_of_numbers_and_images(tmp_path: Path, datasets: Any) -> None:
    from PIL import Image

    rows = {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [1, 2], "label": ["x", "y"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "n"))
    with pytest.raises(DataError, match=r"has the columns \['a', 'b'\]; say which is read"):
        load_data(tmp_path / "n")
    data = load_data(tmp_path / "n", input="a")
    assert (whole(data)[0].tolist(), data.classes) == ([[1.0, 2.0], [3.0, 4.0]], ("x", "y"))
    pictures = [Image.new("RGB", (3, 2), (255, 0, 0)), Image.new("RGB", (3, 2))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features).save_to_disk(str(tmp_path / "i"))
    inputs, _ = whole(load_data(tmp_path / "i"))
    assert inputs.shape == (2, 3, 2, 3)
    assert inputs[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


# --- the user's function, and what it may give ---


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([i * i, i]).float(), i % 2


def test_a_python_reference_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datamod_a.py").write_text("import numpy as np\n\ndef make():\n    return np.ones((4, 2)), [0, 1, 0, 1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="trust"):
        load_data("python:datamod_a:make")
    assert len(load_data("python:datamod_a:make", trust_code=True)) == 4


def test_data_sets_pairs_and_data_are_taken() -> None:
    data = load_data(Squares())
    inputs, targets = whole(data, 2)
    assert inputs[:, 0].tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert targets.tolist() == [0, 1, 0, 1, 0]
    assert load_data(data) is data
    assert len(load_data(TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 0])))) == 3
    with pytest.raises(DataError, match="got int; a Data, a map-style data set, or"):
        load_data(3)
    with pytest.raises(DataError, match="its samples have no target"):
        load_data(TensorDataset(torch.ones(3, 2)))


@pytest.mark.parametrize(
    ("source", "said"),
    [("./none.npz", "doesn't exist"), ("none.csv", "doesn't exist"), ("/no/where", "doesn't exist")],
)
def test_a_source_that_is_missing_is_said(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_data(source)


def test_a_file_of_another_kind_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"isn't a kind of file that is read; an \.npz or \.csv"):
        load_data(written(tmp_path / "d.parquet", ""))


# --- Data itself ---


def numbered(n: int, classes: int = 3) -> Data:
    return Data(torch.arange(n).float()[:, None], torch.arange(n) % classes)


def test_shuffling_is_seeded_and_changes_from_pass_to_pass() -> None:
    loader, again = numbered(50).loader(8, shuffle=True, seed=3), numbered(50).loader(8, shuffle=True, seed=3)
    first, second = ([t for x, _ in one for t in x[:, 0].tolist()] for one in (loader, loader))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))
    assert [t for x, _ in again for t in x[:, 0].tolist()] == first
    assert [len(y) for _, y in numbered(10).loader(4)] == [4, 4, 2]


def test_any_other_loader_and_subset_gives_the_same_batches() -> None:
    data = numbered(10)
    ours, theirs = list(data.loader(4)), list(DataLoader(data, batch_size=4))
    for (x, y), (a, b) in zip(ours, theirs, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    part = torch.utils.data.Subset(data, [3, 1])
    assert next(iter(DataLoader(part, batch_size=2)))[0][:, 0].tolist() == [3.0, 1.0]
    named = Data({"a": torch.ones(4, 2), "b": torch.zeros(4, 1)}, [0, 1, 0, 1])
    assert next(iter(DataLoader(named, batch_size=2)))[0]["a"].shape == (2, 2)


def test_items_by_index() -> None:
    data = numbered(4)
    x, y = data[-1]
    assert (x.tolist(), int(y)) == ([3.0], 0)
    with pytest.raises(IndexError):
        data[4]
    assert [int(data[i][1]) for i in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_split_keeps_classes_in_proportion_and_loses_nothing(share: float) -> None:
    data = Data(torch.arange(200).float()[:, None], [0] * 120 + [1] * 60 + [2] * 20)
    rest, part = data.split(share, seed=1)
    assert len(part) == round(share * 200)
    seen = [*whole(rest)[0][:, 0].tolist(), *whole(part)[0][:, 0].tolist()]
    assert sorted(seen) == list(range(200))
    counts = Counter(part.targets.tolist())
    assert all(abs(counts[c] - share * n) <= 1 for c, n in ((0, 120), (1, 60), (2, 20)))
    assert torch.equal(part.targets, data.split(share, seed=1)[1].targets)
    assert whole(part)[0].tolist() != whole(data.split(share, seed=2)[1])[0].tolist()


def test_a_split_of_a_split_and_of_numbers_to_predict() -> None:
    rest, part = Data(torch.arange(20).float()[:, None], torch.linspace(0, 1, 20)).split(0.5)
    again, _ = rest.split(0.5)
    assert not set(whole(again)[0][:, 0].tolist()) & set(whole(part)[0][:, 0].tolist())
    with pytest.raises(DataError, match=r"a share of 0\.01 of 20 samples leaves one side empty"):
        Data(torch.ones(20, 1), torch.ones(20)).split(0.01)
    with pytest.raises(OptionError, match=r"got 1\.5"):
        rest.split(1.5)


def test_a_split_is_the_same_in_another_process() -> None:
    code = (
        "import torch\nfrom interfuse.data import Data\n"
        "data = Data(torch.arange(40).float()[:, None], [['c', 'a', 'b'][i % 3] for i in range(40)])\n"
        "print([x[:, 0].tolist() for x, _ in data.split(0.3, seed=5)[1].loader(40, shuffle=True, seed=1)])\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] != ""


def test_parts_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="its parts have different lengths"):
        Data({"a": torch.ones(3, 1), "b": torch.ones(2, 1)}, [0, 1, 0])

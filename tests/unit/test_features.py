"""The features of frozen networks on disk: what they're computed from and how often, what is noticed, what is survived."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from interfuse.inference import features
from interfuse.inference.batches import batches
from interfuse.inference.features import cached, default_folder, why_not
from interfuse.modules.fused import ModelFusion
from interfuse.training.fit import FitRecord, fit


class Counting(nn.Module):
    """A network that counts the examples it has seen; `gain` is nowhere in its description."""

    def __init__(self, seed: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gain, self.seen = gain, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.head(torch.tanh(self.gain * self.layer(x)))


class Tokens(nn.Module):
    """Words as tokens, (batch, tokens) -> (batch, tokens, 5), with a mask of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(20, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.embed(input_ids) * attention_mask.unsqueeze(-1)}


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


def fusion(*seeds: int, **options: Any) -> ModelFusion:
    return ModelFusion([Counting(seed) for seed in seeds or (1, 2)], head=3, **options)


def seen(model: ModelFusion) -> list[int]:
    counts = [backbone.seen for backbone in model.backbones]
    for backbone in model.backbones:
        backbone.seen = 0  # type: ignore[assignment]
    return counts  # type: ignore[return-value]


def tapped(model: ModelFusion, inputs: Any) -> Tensor:
    found = model.read(0, inputs).features
    assert found is not None
    return found


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def read(model: ModelFusion, source: Any, folder: Path) -> Any:
    found = cached(model, source, folder, progress=False)
    assert not isinstance(found, str), found
    return found


def losses(model: ModelFusion, train: Any, cache: Path | bool, **options: Any) -> tuple[list[float], FitRecord]:
    common: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 0.02, "accelerator": "cpu", "progress": False}
    record = fit(model, train, data(20, 1), cache=cache, **{**common, **options})
    keys = ("train_loss", "validation_loss")
    return [row[key] for row in record.history for key in keys if key in row], record


class Backwards(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        yield from (list(range(i, i - 8, -1)) for i in range(39, 0, -8))

    def __len__(self) -> int:
        return 5


SOURCES: dict[str, Any] = {
    "tensors": data,
    "loader": lambda: DataLoader(TensorDataset(*data()), 8, shuffle=True),
    "dropped": lambda: DataLoader(TensorDataset(*data(43)), 8, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(TensorDataset(*data()), 8, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "sampler": lambda: DataLoader(TensorDataset(*data()), batch_sampler=BatchSampler(RandomSampler(range(20)), 7, False)),
    "own sampler": lambda: DataLoader(TensorDataset(*data()), batch_sampler=Backwards()),
    "list": lambda: list(zip(*(part.split([5, 20, 15]) for part in data()), strict=True)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_loss_is_that_of_the_plain_loop(source: str, tmp_path: Path) -> None:
    plain, record = losses(fusion(), SOURCES[source](), False)
    assert (record.cached, record.why_not) == (False, "caching is off")
    stored, record = losses(fusion(), SOURCES[source](), tmp_path)
    assert (record.cached, record.why_not) == (True, "")
    assert len(plain) == 7
    assert stored == pytest.approx(plain, rel=1e-5)


def test_networks_run_once_an_example_and_never_again(tmp_path: Path) -> None:
    model, peeks = fusion(), 8 * 8  # the first batch is looked at: to build, and to compare what is stored with what is given
    losses(model, data(200), tmp_path)
    assert all(220 <= count <= 220 + peeks for count in seen(model))
    losses(model, data(200), tmp_path)
    assert all(count <= peeks for count in seen(model))
    assert len(files(tmp_path)) == 4


def test_fusions_share_the_features_of_the_networks_they_share(tmp_path: Path) -> None:
    for model in (fusion(1, 2), fusion(2, 3), fusion(3, 1, fusion="concat")):
        read(model, [data()], tmp_path)
    assert len(files(tmp_path)) == 3


def test_the_key_holds_all_that_features_depend_on(tmp_path: Path) -> None:
    x, y = data()
    base: dict[str, Any] = {"models": [Counting(1)], "head": 3}
    variants: list[tuple[dict[str, Any], Tensor]] = [
        (base, x),
        ({**base, "models": [Counting(2)]}, x),
        ({**base, "taps": ["layer"]}, x),
        ({**base, "pool": "none"}, x),
        ({**base, "residual": False}, x),
        (base, x + 1e-6),
        (base, x.flip(0)),
        (base, x[:39]),
    ]
    for i, (options, inputs) in enumerate(variants, start=1):
        read(ModelFusion(**options), [(inputs, y[: len(inputs)])], tmp_path)
        assert len(files(tmp_path)) == i
    read(ModelFusion(**base), [(x, y.flip(0))], tmp_path)  # targets aren't features
    assert len(files(tmp_path)) == len(variants)


def test_what_is_not_a_tensor_counts_too() -> None:
    one, two = ({"x": torch.zeros(2), "text": [word, "b"]} for word in ("a", "c"))
    assert features._content(one) != features._content(two)
    assert features._content([torch.zeros(2, 3)]) != features._content([torch.zeros(3, 2)])
    assert features._content((torch.zeros(2),)) != features._content(torch.zeros(2))


def test_another_forward_with_the_same_weights_is_found_out(tmp_path: Path) -> None:
    x, y = data()
    old, new = (ModelFusion([Counting(1, gain)], head=3) for gain in (1.0, 1.05))
    read(old, [(x, y)], tmp_path)
    before = files(tmp_path)
    found = next(iter(read(new, [(x, y)], tmp_path)))[0][0].features
    assert torch.allclose(found, tapped(new, x), atol=1e-6)
    assert not torch.allclose(found, tapped(old, x), atol=1e-3)
    assert files(tmp_path) == before  # recomputed in place


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "rows", "other"])
def test_a_damaged_file_is_computed_anew(damage: str, tmp_path: Path) -> None:
    model = fusion(1)
    x, y = data()
    read(model, [(x, y)], tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    whole = path.read_bytes()
    stored = {key: value.clone() for key, value in load_file(path).items()}  # not the file's own memory
    if damage == "rows":
        save_file({key: value[:-1].clone() for key, value in stored.items()}, path)
    elif damage == "other":
        save_file({key: value + 1 for key, value in stored.items()}, path)
    else:
        path.write_bytes({"truncated": whole[:-8], "garbage": b"\xff" * 100, "empty": b""}[damage])
    assert torch.equal(next(iter(read(model, [(x, y)], tmp_path)))[0][0].features, stored["features"])
    assert path.read_bytes() == whole


class Noisy(Dataset[Any]):
    """Random changes of the inputs from row `start` on, by torch's random numbers or Python's."""

    def __init__(self, start: int, source: str = "torch") -> None:
        self.start, self.source = start, source

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(4) if self.source == "torch" else torch.tensor([random.gauss(0, 1) for _ in range(4)])
        return data()[0][i] + (noise if i >= self.start else 0), data()[1][i]


@pytest.mark.parametrize("source", ["torch", "python"])
@pytest.mark.parametrize("start", [0, 30])
def test_random_changes_of_the_data_are_found_out(start: int, source: str, tmp_path: Path) -> None:
    model = fusion()
    record = fit(
        model, DataLoader(Noisy(start, source), 8), epochs=1, cache=tmp_path, accelerator="cpu", devices=1, progress=False
    )
    assert not record.cached
    assert record.why_not == "the data differ each time they are read (random augmentation?)"
    assert list(tmp_path.iterdir()) == []
    assert (why_not(model, DataLoader(Noisy(start, source), 8)) != "") is (start == 0)  # before anything is computed


def test_a_network_that_is_never_the_same_is_found_out(tmp_path: Path) -> None:
    class Restless(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    found = cached(ModelFusion({"r": Restless()}, head=3), [data()], tmp_path, progress=False)
    assert isinstance(found, str)
    assert found.startswith("r gives something else each time")


def test_what_can_not_be_cached_says_why(tmp_path: Path) -> None:
    x, y = data()
    assert why_not(Counting(), [(x, y)]) == "the model isn't a fusion"
    assert why_not(fusion(freeze=[True, False]), [(x, y)]) == "some networks are trained"
    thawed = fusion()
    thawed.backbones[0].requires_grad_(True)
    assert why_not(thawed, [(x, y)]) == "some networks are trained"
    model = ModelFusion({"a": Counting(1), "b": Counting(2)}, head=3)
    some = [({"a": x, "b": x}, y), ({"a": x, "b": None}, y)]
    assert cached(model, some, tmp_path, progress=False) == "some inputs of b are missing"
    assert losses(model, some, tmp_path, epochs=1, patience=None)[1].why_not == "some inputs of b are missing"


def test_a_folder_that_can_not_be_written_is_survived(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    stored, record = losses(fusion(), data(), tmp_path / "file" / "features")
    assert not record.cached
    assert record.why_not.startswith("the cache can't be used: Not a directory")
    assert stored == losses(fusion(), data(), False)[0]


def test_a_full_disk_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interfuse.checkpoints.writer.write_at", full)
    assert losses(fusion(), data(), tmp_path, epochs=1)[1].why_not.startswith(
        "the cache can't be used: No space left on device"
    )
    assert list(tmp_path.iterdir()) == []


def test_iterables_keep_the_sizes_of_their_batches(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(*data(10), strict=True)

    for source, sizes in (
        (list(zip(*(part.split([5, 20, 15]) for part in data()), strict=True)), [5, 20, 15]),
        (DataLoader(Stream(), 4), [4, 4, 2]),
        (batches(iter([data(3), data(2)])), [3, 2]),
    ):
        loader = read(fusion(), source, tmp_path)
        assert [len(readings[0].features) for readings, _ in loader] == sizes
        assert [len(targets) for _, targets in loader] == sizes
        assert len(loader) == 3 if len(sizes) == 3 else 2


def test_data_without_targets(tmp_path: Path) -> None:
    readings, targets = next(iter(read(fusion(), [data()[0]], tmp_path)))
    assert targets is None
    assert len(readings) == 2


def words(*lengths: int) -> dict[str, Tensor]:
    """A tokenizer's batch, padded to the longest."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, count in enumerate(lengths):
        ids[row, :count] = torch.arange(1, count + 1) + row
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_texts_of_other_lengths_are_cached_once_averaged(tmp_path: Path) -> None:
    source = [({**words(2, 5)}, torch.tensor([0, 1])), ({**words(3, 1, 4)}, torch.tensor([1, 0, 1]))]
    model = ModelFusion([Tokens()], head=2)
    loader = read(model, source, tmp_path)
    for (readings, _), (inputs, _) in zip(loader, source, strict=True):
        assert torch.allclose(readings[0].features, tapped(model, inputs))
    whole = ModelFusion([Tokens()], head=2, pool="none")
    assert cached(whole, source, tmp_path, progress=False) == "the number of tokens differs between batches"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("lengths", [((3, 1), (2, 3)), ((3, 1), (2, 4))])
def test_tokens_are_cached_with_their_masks_where_their_counts_agree(lengths: Any, tmp_path: Path) -> None:
    source = [{**words(*row), "labels": torch.tensor([0, 1])} for row in lengths]
    plain, _ = losses_of_tokens(source, False)
    stored, record = losses_of_tokens(source, tmp_path)
    assert record.cached is (lengths[1] == (2, 3))
    assert stored == pytest.approx(plain, rel=1e-5)


def losses_of_tokens(source: Any, cache: Path | bool) -> tuple[list[float], FitRecord]:
    model = ModelFusion([Tokens()], head=2, pool="none", dim=8)
    record = fit(model, source, epochs=2, cache=cache, accelerator="cpu", progress=False)
    return [row["train_loss"] for row in record.history], record


def test_each_model_has_its_own_inputs(tmp_path: Path) -> None:
    x, y = data(4)
    source = [({"numbers": x, "words": words(2, 4, 1, 3)}, y)]
    model = ModelFusion({"numbers": Counting(), "words": Tokens()}, head=3)
    readings, _ = next(iter(read(model, source, tmp_path)))
    assert [tuple(r.features.shape) for r in readings] == [(4, 6), (4, 5)]
    before = files(tmp_path)
    read(model, [({"numbers": x + 1, "words": words(2, 4, 1, 3)}, y)], tmp_path)
    assert len(files(tmp_path)) == len(before) + 1  # the words are as they were


def test_the_default_folder_is_kept_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_folder()
    assert folder == tmp_path / "interfuse" / "features"
    now = time.time()
    for i, seed in enumerate((1, 2, 3)):
        before = files(folder)
        read(fusion(seed), [data()], folder)
        for name in files(folder) - before:
            os.utime(folder / name, (now - 100 + i, now - 100 + i))
    size = next(folder.glob("*.safetensors")).stat().st_size
    (folder / ".interfuse-old.part").write_bytes(b"left by a process that was killed")
    os.utime(folder / ".interfuse-old.part", (now - 2 * features.A_DAY,) * 2)
    (folder / ".interfuse-new.part").write_bytes(b"being written")
    monkeypatch.setattr(features, "LIMIT", int(2.5 * size))
    kept = files(folder)
    read(fusion(1), [data()], folder)  # used now, so the second is the oldest
    left = files(folder)
    assert len(left) == 2
    assert left < kept
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= features.LIMIT
    assert {path.name for path in folder.glob("*.part")} == {".interfuse-new.part"}
    before = left
    read(fusion(1), [data()], folder)
    read(fusion(3), [data()], folder)
    assert files(folder) == before  # the first and the third are there


def test_a_folder_of_the_users_own_is_never_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LIMIT", 0)
    read(fusion(1, 2), [data()], tmp_path)
    assert len(files(tmp_path)) == 2


WRITER = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from interfuse.modules.fused import ModelFusion
from interfuse.inference import features

folder, slow = Path(sys.argv[1]), float(sys.argv[2])
read = features._read
def slowly(*args):
    time.sleep(slow)
    return read(*args)
features._read = slowly
torch.manual_seed(0)
model = ModelFusion([nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))], head=3)
x = torch.randn(40, 4)
print("ready", flush=True)
found = features.cached(model, [(x[i : i + 4], torch.zeros(4)) for i in range(0, 40, 4)], folder, progress=False)
print("done" if not isinstance(found, str) else found, flush=True)
"""


def writer(folder: Path, slow: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", WRITER, str(folder), str(slow)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_may_write_the_same_features(tmp_path: Path) -> None:
    both = [writer(tmp_path, 0.05) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "ready\ndone\n"), err
    assert len(files(tmp_path)) == 1
    assert load_file(next(tmp_path.glob("*.safetensors")))["features"].shape == (40, 6)


def test_a_killed_process_leaves_no_broken_file(tmp_path: Path) -> None:
    process = writer(tmp_path, 0.3)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert files(tmp_path) == set()
    again = writer(tmp_path, 0.0)
    assert again.communicate(timeout=60)[0] == "ready\ndone\n"
    assert len(files(tmp_path)) == 1

"""`batches`: what may be given as data, and that going through it again and again gives it all each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from interfuse.data import Data
from interfuse.errors import DataError, OptionError
from interfuse.inference.batches import batches, first, in_order, is_indexed, length


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(5)


def numbers(data: Any) -> list[list[int]]:
    return [(batch[0] if isinstance(batch, tuple | list) else batch).flatten().tolist() for batch in data]


def pair(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.arange(n, dtype=torch.float)[:, None], torch.arange(n)


def test_tensors_and_data_sets_are_read_in_their_order() -> None:
    x, y = pair()
    for data in ((x, y), (x, x, y), TensorDataset(x, y), Data(x, y)):
        read = batches(data, 2)
        assert numbers(read) == numbers(read) == [[0, 1], [2, 3], [4]]
        assert length(read) == 3


def test_inputs_of_several_tensors_by_name() -> None:
    inputs = {"ids": torch.arange(10).reshape(5, 2), "mask": torch.ones(5, 2)}
    (first, labels), *others = batches((inputs, torch.arange(5)), 3)
    assert first["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert labels.tolist() == [0, 1, 2]
    assert len(others) == 1
    with pytest.raises(DataError, match=r"data: tensors of different lengths \[5, 5, 4\]"):
        batches((inputs, torch.arange(4)))


@pytest.mark.parametrize("kind", ["tensors", "Data"])
def test_shuffling_depends_on_the_seed_and_the_pass_alone(kind: str) -> None:
    def made(seed: int) -> Any:
        return batches(Data(*pair(20)) if kind == "Data" else pair(20), 20, shuffle=True, seed=seed)

    torch.manual_seed(5)
    one = made(1)
    passes = [numbers(one)[0] for _ in range(3)]
    torch.manual_seed(6)
    again = made(1)
    assert [numbers(again)[0] for _ in range(3)] == passes
    assert numbers(made(2))[0] != passes[0]
    assert len({tuple(order) for order in passes}) == 3
    assert all(sorted(order) == list(range(20)) for order in passes)


def test_a_batch_holds_something() -> None:
    for size in (0, 2.5):
        with pytest.raises(OptionError, match=f"batch_size: got {size}; a whole number from 1 up"):
            batches(pair(), size)  # type: ignore[arg-type]


def test_loaders_and_lists_stay_as_they_are() -> None:
    loader = DataLoader(TensorDataset(*pair()), 4)
    listed = [pair()]
    assert batches(loader, 2) is loader
    assert batches(listed, 2) is listed


def test_an_iterator_is_kept() -> None:
    read = batches(iter([pair(2), pair(3)]))
    assert numbers(read) == numbers(read) == [[0, 1], [0, 1, 2]]


def test_a_stream_has_no_length() -> None:
    read = batches(Stream(), 2)
    assert numbers(read) == [[0, 1], [2, 3], [4]]
    assert length(read) is None
    assert not is_indexed(read)
    assert in_order(read) is read


@pytest.mark.parametrize("data", [3, "text", b"bytes", torch.zeros(3), {"x": torch.zeros(3)}, None])
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(DataError, match=f"test: got {type(data).__name__}; a DataLoader, a data set"):
        batches(data, name="test")


def test_nothing_is_an_error() -> None:
    nothing: list[Any] = [[], iter([]), ()]
    for empty in nothing:
        with pytest.raises(DataError, match="data: no batches"):
            batches(empty)
    with pytest.raises(DataError, match="test: no batches; give at least one"):
        first(DataLoader(TensorDataset(*pair(0))), "test")
    with pytest.raises(DataError, match=r"data: tensors of different lengths \[5, 4\]"):
        batches((pair()[0], pair()[1][:4]))


def test_the_first_batch_is_that_of_the_data_sets_order_and_costs_no_random_numbers() -> None:
    before = torch.get_rng_state()
    for loader in (
        DataLoader(TensorDataset(*pair(40)), 3, shuffle=True),
        DataLoader(TensorDataset(*pair(40)), batch_sampler=BatchSampler(RandomSampler(range(40)), 3, drop_last=True)),
    ):
        assert first(loader)[1].tolist() == [0, 1, 2]
        assert torch.equal(torch.get_rng_state(), before)
        assert numbers(in_order(loader))[-1] == [39]
        torch.set_rng_state(before)


def test_a_loader_with_a_way_of_its_own_is_not_read_by_index() -> None:
    class Doubled(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([2 * batch[0] for batch in super().__iter__()])

    loader = Doubled(TensorDataset(*pair()), 5)
    assert not is_indexed(loader)
    assert first(loader).flatten().tolist() == [0, 2, 4, 6, 8]

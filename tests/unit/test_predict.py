"""`predict`: all outputs in the data's order, from any data, with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from interfuse.data import Data
from interfuse.ensemble.network import Ensemble
from interfuse.errors import DataError
from interfuse.inference.predict import predict
from interfuse.modules.fused import ModelFusion


def data(n: int = 30) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*data(), strict=True)


def sources() -> dict[str, Any]:
    x, y = data()
    parts = list(zip(x.split(7), y.split(7), strict=True))
    return {
        "tensors": (x, y),
        "data set": TensorDataset(x, y),
        "Data": Data(x, y),
        "loader": DataLoader(TensorDataset(x, y), 7),
        "stream": DataLoader(Stream(), 7),
        "list": parts,
        "iterator": iter(parts),
        "mappings": [{"input": a, "labels": b} for a, b in parts],
    }


@pytest.mark.parametrize("source", sources())
def test_outputs_and_targets_come_whole_and_in_order(source: str) -> None:
    x, y = data()
    model = network()
    found = predict(model, sources()[source], batch_size=8, progress=False)
    assert torch.allclose(found.outputs, model.eval()(x), atol=1e-6)
    assert not found.outputs.requires_grad
    assert found.targets is not None
    assert torch.equal(found.targets, y)
    assert found.weights is None


def test_the_modes_of_modules_stay() -> None:
    model = network().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    predict(model, data(), progress=False)
    assert [module.training for module in model.modules()] == before


def test_targets_may_be_missing() -> None:
    x, _ = data()
    assert predict(network(), [x], progress=False).targets is None
    assert predict(Ensemble([network(), network(1)]), [x], progress=False).outputs.shape == (30, 3)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_fusion_gives_its_weights_and_the_same_from_the_cache(shuffle: bool, tmp_path: Path) -> None:
    x, y = data()
    model = ModelFusion([network(0), network(1)], head=3, example=x)

    def read(**options: Any) -> Any:
        torch.manual_seed(0)
        return predict(model, DataLoader(TensorDataset(x, y), 7, shuffle=shuffle), progress=False, **options)

    plain, first, again = read(), read(cache=tmp_path), read(cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for cached in (first, again):
        assert torch.allclose(cached.outputs, plain.outputs, atol=1e-6)
        assert torch.equal(cached.targets, plain.targets)
        assert torch.allclose(cached.weights, plain.weights, atol=1e-6)
        assert cached.weights.shape == (30, 2)


def test_a_device_can_be_named() -> None:
    model = network()
    assert predict(model, data(), device="cpu", progress=False).outputs.device.type == "cpu"


def test_no_batches() -> None:
    x, y = data()
    with pytest.raises(DataError, match="data: no batches; give at least one"):
        predict(network(), TensorDataset(x[:0], y[:0]), progress=False)

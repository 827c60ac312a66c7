"""Costs of networks whose costs are known; and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse.errors import OptionError
from interfuse.evaluation.cost import cost


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_linear_layer() -> None:
    layer = nn.Linear(10, 20)
    found = cost(layer, torch.zeros(4, 10), repeats=3)
    assert (found.parameters, found.trainable, found.bytes) == (220, 220, 880)
    assert found.flops == 2 * 10 * 20
    assert found.batch == 4
    assert found.memory == 880 + 4 * 20 * 4
    assert 0 < found.latency < 1


def test_tied_parameters_are_counted_once() -> None:
    found = cost(Tied(), torch.zeros(1, 8))
    assert (found.parameters, found.bytes, found.flops) == (64, 256, 2 * 2 * 64)


def test_frozen_parameters_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4))
    found = cost(model, torch.zeros(3, 4))
    assert (found.parameters, found.trainable) == (20 + 8, 8)
    assert found.bytes == 4 * (20 + 8 + 8) + 8  # running statistics, and the counter of batches in int64


def test_peak_memory_is_that_of_what_is_alive_at_once() -> None:
    layers = [nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)]
    weights = 4 * sum(p.numel() for layer in layers for p in layer.parameters())
    assert cost(nn.Sequential(*layers), torch.zeros(8, 100)).memory == weights + 4 * 8 * 2000
    layers[1] = nn.ReLU(inplace=True)
    assert cost(nn.Sequential(*layers), torch.zeros(8, 100)).memory == weights + 4 * 8 * 1010


def test_views_take_no_memory() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).reshape(-1, 2).T[:1].unsqueeze(0)

    assert cost(Views(), torch.zeros(6, 2)).memory == 6 * 2 * 4


def test_flops_of_fused_kernels_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    projections, attention, feedforward = 4 * 16 * 16, 2 * 5 * 16, 2 * 16 * 32
    assert cost(layer, torch.zeros(4, 5, 16)).flops == 2 * 5 * (projections + attention + feedforward)
    recurrent = nn.LSTM(8, 16, batch_first=True)
    assert cost(recurrent, torch.zeros(3, 5, 8)).flops == 2 * 5 * 4 * 16 * (8 + 16)
    convolution = nn.Conv2d(3, 8, 3)
    assert cost(convolution, torch.zeros(2, 3, 10, 10)).flops == 2 * 8 * 64 * 27


@pytest.mark.parametrize("inputs", [{"x": torch.zeros(2, 8)}, (torch.zeros(2, 8),)])
def test_inputs_by_keyword_or_position(inputs: Any) -> None:
    found = cost(Tied(), inputs)
    assert (found.batch, found.memory) == (2, 256 + 2 * 2 * 8 * 4)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    model[0].weight.grad = torch.ones(4, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random, fused = torch.random.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    cost(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == modes == [True, True, False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes"):
        cost(model, torch.zeros(2, 5))
    assert model.training
    assert torch.is_grad_enabled()


def test_a_model_without_parameters() -> None:
    found = cost(nn.ReLU(), torch.zeros(2, 3))
    assert (found.parameters, found.bytes, found.flops, found.memory) == (0, 0, 0, 24)


def test_counts_of_runs_out_of_range() -> None:
    with pytest.raises(OptionError, match=r"repeats: got 0; at least 1\nwarmup: got -1; at least 0"):
        cost(nn.ReLU(), torch.zeros(1), repeats=0, warmup=-1)

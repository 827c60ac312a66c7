"""Cross-stitch units: with no share of others each network is its parent, the mix is its formula, gradients are those of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import ModelError, OptionError
from interfuse.modules.cross_stitch import CrossStitch


def mlp(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    return nn.Sequential(nn.Flatten(), *layers).eval()


def cnn(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(
        *first, nn.Conv2d(width, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    ).eval()


class Residual(nn.Module):
    """Blocks with a way round each, that give tuples."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.mix, self.drop = nn.Linear(dim, dim), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x + self.drop(torch.tanh(self.mix(x))), None

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.shift = nn.Linear(4, dim), nn.Parameter(torch.randn(16, dim))
        self.blocks, self.head = nn.ModuleList(self.Block(dim) for _ in range(3)), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.reshape(-1, 16, 4)) + self.shift
        for block in self.blocks:
            h = block(h)[0]
        return self.head(h.mean(dim=1))


X = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[list[nn.Module], Any]] = {
    "equal widths": ([mlp(6, 0), mlp(6, 1)], ["2", "4"]),
    "three, different widths": ([mlp(6, 0), mlp(4, 1), mlp(9, 2)], ["2", "4"]),
    "maps": ([cnn(4, 0), cnn(6, 1)], ["2", "4"]),
    "tuples": ([Residual(6, 0).eval(), Residual(4, 1).eval()], ["blocks.0", "blocks.1", "blocks.2"]),
    "families": ([cnn(4, 0), mlp(7, 1), Residual(6, 2).eval()], [["2", "4"], ["2", "4"], ["blocks.0", "blocks.2"]]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per", ["unit", "channel"])
def test_alone_each_network_is_its_parent_and_at_nine_tenths_near(case: str, per: str) -> None:
    models, at = CASES[case]
    with torch.no_grad():
        alone = CrossStitch(models, at, X, own=1.0, per=per)
        near, far = CrossStitch(models, at, X, per=per), CrossStitch(models, at, X, own=0.2, per=per)
        for inputs in (X, X[:7]):
            parents = [model(inputs) for model in models]
            for found, parent in zip(alone.each(inputs), parents, strict=True):
                assert torch.equal(found, parent)
            torch.testing.assert_close(alone(inputs), torch.stack(parents).mean(dim=0))
            for close, away, parent in zip(near.each(inputs), far.each(inputs), parents, strict=True):
                spread = (parent - parent.mean(dim=0)).norm()
                assert 0 < (close - parent).norm() < 0.5 * spread
                assert (away - parent).norm() > (close - parent).norm()


def test_weights_begin_at_nine_tenths_and_equal_networks_stay_as_they_are() -> None:
    model = CrossStitch([mlp(6, 0), mlp(6, 0), mlp(6, 0)], ["2", "4"], X)
    first: Any = model.units[0]
    torch.testing.assert_close(first.alphas[1].detach(), torch.tensor([0.05, 0.9, 0.05]))
    torch.testing.assert_close(model(X), mlp(6, 0)(X), rtol=0, atol=1e-4)


def by_hand(model: CrossStitch, x: Tensor) -> Tensor:
    """Two of `mlp` with units after modules 2 and 4, written out."""
    nets: Any = model.backbones
    h = [net[:3](x) for net in nets]
    for unit, after in zip(model.units, (slice(3, 5), slice(5, None)), strict=True):
        u: Any = unit
        one = u.alphas[0][0] * h[0] + u.alphas[0][1] * (h[1] @ u.maps[0][1].weight.T + u.maps[0][1].bias)
        two = u.alphas[1][0] * (h[0] @ u.maps[1][0].weight.T + u.maps[1][0].bias) + u.alphas[1][1] * h[1]
        h = [nets[0][after](one), nets[1][after](two)]
    return (h[0] + h[1]) / 2


def test_the_mix_and_its_gradients_are_those_of_the_formula() -> None:
    model = CrossStitch([mlp(6, 0), mlp(4, 1)], ["2", "4"], X, freeze=False).double()
    x = X.double()
    torch.testing.assert_close(model(x), by_hand(model, x))
    wanted = torch.autograd.grad(by_hand(model, x).square().sum(), list(model.parameters()))
    for _ in range(2):
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_every_module_runs_once_so_that_statistics_and_dropout_are_right() -> None:
    model = CrossStitch([cnn(4, 0), Residual(5, 1)], [["2", "4"], ["blocks.0", "blocks.2"]], X, freeze=False).train()
    counts: dict[str, int] = {}
    model(X)
    for name, module in model.backbones.named_modules():
        if not list(module.children()):
            forward = module.forward

            def counted(*args: Any, name: str = name, forward: Any = forward) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return forward(*args)

            module.forward = counted
    before = copy.deepcopy(model.state_dict())["backbones.0.1.num_batches_tracked"]
    model(X)
    assert set(counts.values()) == {1}
    assert len(counts) == 16
    assert model.state_dict()["backbones.0.1.num_batches_tracked"] == before + 1


def test_fit_trains_what_joins_them_and_save_keeps_it(tmp_path: Path) -> None:
    models = [mlp(6, 0), mlp(4, 1)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    model = CrossStitch(models, ["2", "4"], X)
    assert all(name.startswith("units.") for name, p in model.named_parameters() if p.requires_grad)
    targets = X.flatten(1).sum(dim=1).gt(0).long()
    record = itf.fit(model, (X, targets), (X, targets), epochs=3, learning_rate=1e-2, progress=False)
    assert record.best["validation_loss"] < record.history[0]["validation_loss"]
    for network, original, state in zip(model.backbones, models, before, strict=True):
        for holder in (network, original):
            assert all(torch.equal(holder.state_dict()[key], value) for key, value in state.items())
    itf.save(model, tmp_path / "out")
    again = itf.load(tmp_path / "out", [mlp(6, 2), mlp(4, 3)])
    assert torch.equal(again(X), model(X))


def test_wrong_places_are_said_all_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        CrossStitch({"a": mlp(6, 0), "b": mlp(6, 1)}, ["2", "9"], X)
    assert len(caught.value.problems) == 2
    with pytest.raises(ModelError, match="'4' isn't wholly before '2'"):
        CrossStitch([mlp(6, 0), mlp(6, 1)], ["4", "2"], X)
    with pytest.raises(OptionError) as wrong:
        CrossStitch([mlp(6, 0), mlp(6, 1)], [["2"], ["2", "4"]], X, own=2, per="chanel")
    assert [p.path for p in wrong.value.problems] == ["own", "per", "at"]

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.second, self.head = nn.Linear(64, 6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.first(x.flatten(1)))
            return self.head(self.second(h) + h)

    with pytest.raises(ModelError, match="'drop' is used after 'second' too"):
        CrossStitch([Round(), Round()], ["second"], X)


@pytest.mark.parametrize("case", CASES)
def test_one_head_for_all_begins_as_the_mean_of_theirs(case: str) -> None:
    models, at = CASES[case]
    own, shared = CrossStitch(models, at, X), CrossStitch(models, at, X, head=5)
    with torch.no_grad():
        torch.testing.assert_close(shared(X), own(X), atol=1e-5, rtol=1e-5)
        assert all(map(torch.equal, shared.each(X), own.each(X)))
    assert shared.head is not None
    assert {name for name, p in shared.named_parameters() if p.requires_grad} >= {"head.weight", "head.bias"}


def test_one_head_joins_networks_of_other_classes_and_is_trained_alone(tmp_path: Path) -> None:
    other = mlp(4, 1)
    other[5] = nn.Linear(4, 2)
    models = {"a": mlp(6, 0), "b": other}
    with pytest.raises(ModelError, match="predictions of different shapes"):
        CrossStitch(models, ["2"], X)(X)
    model = CrossStitch(models, ["2"], X, head=3, freeze=False)
    heads = [module.state_dict()["5.weight"].clone() for module in model.backbones]
    first = model.backbones[0].state_dict()["1.weight"].clone()
    targets = X.flatten(1)[:, :3].argmax(1)
    record = itf.fit(model, (X, targets), (X, targets), epochs=3, learning_rate=1e-2, progress=False)
    assert record.best["validation_loss"] < record.history[0]["validation_loss"]
    assert all(torch.equal(n.state_dict()["5.weight"], head) for n, head in zip(model.backbones, heads, strict=True))
    assert not torch.equal(model.backbones[0].state_dict()["1.weight"], first)
    itf.save(model, tmp_path / "out")
    fresh = mlp(4, 7)
    fresh[5] = nn.Linear(4, 2)
    again = itf.load(tmp_path / "out", [mlp(6, 9), fresh])  # no example is needed
    assert isinstance(again, CrossStitch)
    assert torch.equal(again(X), model.eval()(X))
    with pytest.raises(OptionError, match="head: got 0"):
        CrossStitch([mlp(6, 0), mlp(6, 1)], ["2"], X, head=0)

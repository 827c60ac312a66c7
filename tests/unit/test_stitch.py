"""Stitching: the map is least squares, a network stitched to itself is itself, and what comes before the cut isn't run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import DataError, ModelError, OptionError
from interfuse.modules.least_squares import Moments
from interfuse.modules.places import join
from interfuse.modules.stitched import passed_over


def cnn(width: int, seed: int = 0, stride: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=stride),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    ).eval()


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))


class Block(nn.Module):
    """A transformer's block that gives a tuple, as many do."""

    def __init__(self, dim: int, extra: bool) -> None:
        super().__init__()
        self.mix, self.extra = nn.Linear(dim, dim), extra

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        h = x + torch.tanh(self.mix(x))
        return (h, h.mean()) if self.extra else (h, None)


class Tokens(nn.Module):
    """(batch, 1, 8, 8) -> tokens (batch, side^2 + 1, dim) -> classes."""

    def __init__(self, dim: int, *, extra: bool = False, cut: int = 4) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(1, dim, cut, cut), nn.Parameter(torch.randn(1, 1, dim))
        self.blocks, self.head = nn.ModuleList(Block(dim, extra) for _ in range(3)), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1)
        for block in self.blocks:
            h = block(h)[0]
        return self.head(h[:, 0])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def stitch(a: nn.Module, b: nn.Module, at: tuple[str, str], data: Any, **options: Any) -> Any:
    return itf.stitch(a, b, at, data, progress=False, **options)


@pytest.mark.parametrize("size", [7, 64, 120])
def test_the_map_is_numpys_least_squares_however_the_samples_are_cut(images: Tensor, size: int) -> None:
    a, b = mlp(6), mlp(9, seed=1)
    stitched = stitch(a, b, ("2", "4"), images, ridge=0, batch_size=size)
    with torch.no_grad():
        x, y = a[:3](images).double().numpy(), b[:5](images).double().numpy()
    wanted, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)
    np.testing.assert_allclose(stitched.map.weight.detach(), wanted[:-1].T, atol=1e-5)
    np.testing.assert_allclose(stitched.map.bias.detach(), wanted[-1], atol=1e-5)
    residual = y - np.hstack([x, np.ones((len(x), 1))]) @ wanted
    assert stitched.record.error == pytest.approx((residual**2).sum() / ((y - y.mean(axis=0)) ** 2).sum(), rel=1e-6)
    held = np.arange(len(x)) % 5 == 4
    rows = np.hstack([x, np.ones((len(x), 1))])
    part, *_ = np.linalg.lstsq(rows[~held], y[~held], rcond=None)
    beside = ((y - rows @ part)[held] ** 2).sum() / ((y[held] - y[held].mean(axis=0)) ** 2).sum()
    assert stitched.record.held_out == pytest.approx(beside, rel=1e-6)
    assert (stitched.record.examples, stitched.record.rows) == (120, 120)


def test_sums_solve_what_lstsq_solves_in_float64_with_a_ridge_far_from_zero_and_without_rank() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 4)) + 1e4
    x = np.hstack([x, x[:, :1], np.full((50, 1), 3.0)])  # one column twice, and one that never changes
    y = random.normal(size=(50, 3)) - 1e3
    moments = Moments()
    for part in range(0, 50, 7):
        moments.add(torch.from_numpy(x[part : part + 7]), torch.from_numpy(y[part : part + 7]))
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    smallest, *_ = np.linalg.lstsq(xc, yc, rcond=1e-10)
    weight, bias = moments.solve()
    np.testing.assert_allclose(weight, smallest.T, atol=1e-7)
    np.testing.assert_allclose(bias, y.mean(axis=0) - smallest.T @ x.mean(axis=0), rtol=1e-6)
    ridge = 0.3 * np.trace(xc.T @ xc) / 6
    np.testing.assert_allclose(moments.solve(0.3)[0], np.linalg.solve(xc.T @ xc + ridge * np.eye(6), xc.T @ yc).T, atol=1e-9)


@pytest.mark.parametrize(
    ("network", "place"),
    [(cnn(4), "3"), (cnn(4), "1"), (mlp(6), "2"), (Tokens(6), "blocks.1"), (Tokens(6, extra=True), "blocks.1")],
)
def test_a_network_stitched_to_itself_is_itself(network: nn.Module, place: str, images: Tensor) -> None:
    stitched = stitch(network, network, (place, place), images)
    width = stitched.map.in_features
    torch.testing.assert_close(stitched.map.weight, torch.eye(width), rtol=0, atol=1e-4)
    torch.testing.assert_close(stitched.map.bias, torch.zeros(width), rtol=0, atol=1e-4)
    assert stitched.record.error < 1e-8
    for _ in range(2):  # the second pass stands in for what the first has run
        torch.testing.assert_close(stitched(images[:9]), network(images[:9]), rtol=0, atol=1e-4)


def test_map_and_head_are_those_of_the_formula(images: Tensor) -> None:
    a, b = cnn(4), cnn(3, seed=1)
    stitched = stitch(a, b, ("2", "2"), images)
    with torch.no_grad():
        moved = nn.functional.conv2d(a[:3](images), stitched.map.weight[:, :, None, None], stitched.map.bias)
        expected = b[3:](moved)  # a 1 x 1 convolution
    for _ in range(2):
        torch.testing.assert_close(stitched(images), expected)


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [
        (cnn(4), cnn(6, stride=1), ("3", "3")),
        (cnn(4), Tokens(6), ("2", "blocks.0")),
        (Tokens(6), cnn(4), ("blocks.0", "3")),
        (Tokens(6), Tokens(5, cut=2), ("blocks.2", "blocks.1")),
        (mlp(7), cnn(4), ("4", "3")),
        (cnn(4), mlp(7), ("3", "2")),
        (mlp(7), Tokens(6), ("2", "blocks.1")),
    ],
)
def test_families_widths_and_sizes_may_differ(a: nn.Module, b: nn.Module, at: tuple[str, str], images: Tensor) -> None:
    stitched = stitch(a, b, at, images)
    again = stitched(images[:11])
    assert again.shape == (11, 5)
    assert again.isfinite().all()
    assert torch.equal(stitched(images[:11]), again)
    assert 0 < stitched.record.error <= 1.001
    assert stitched.record.held_out is not None


def test_joining_places_keeps_what_is_constant_and_the_class_token() -> None:
    ones = torch.ones(2, 5, 5, 3)
    for places in ((), (4,), (5,), (3, 7), (25,), (26,)):
        torch.testing.assert_close(join(ones, places), torch.ones(2, *places, 3))
    tokens = torch.randn(2, 10, 3)
    moved = join(tokens, (17,))
    assert torch.equal(moved[:, 0], tokens[:, 0])
    torch.testing.assert_close(join(tokens, (3, 3)), tokens[:, 1:].unflatten(1, (3, 3)))
    torch.testing.assert_close(join(torch.randn(2, 3), (4,)).std(dim=1), torch.zeros(2, 3))
    words = torch.arange(6.0).reshape(1, 6, 1)
    assert join(words, (3,)).flatten().diff().gt(0).all()
    with pytest.raises(ModelError, match=r"places \(6,\) can't be joined to \(4, 4\)"):
        join(words, (4, 4))


def counting(network: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}

    def counted(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return forward(*args, **kwargs)

        return run

    for name, module in network.named_modules():
        if name and not list(module.children()):
            module.forward = counted(name, module.forward)
    return counts


def test_what_comes_after_in_a_and_before_in_b_is_not_run(images: Tensor) -> None:
    stitched = stitch(cnn(4), cnn(6), ("2", "3"), images)
    a, b = (counting(network) for network in stitched.backbones)
    stitched(images)
    assert sorted(a) == ["0", "1", "2"]
    a.clear()
    b.clear()
    stitched(images)
    assert sorted(b) == ["4", "5", "6", "7"]
    stitched(images[:3])  # another shape: once in full
    stitched(images[:3])
    assert (b["0"], b["4"]) == (1, 3)


def test_a_way_round_the_cut_is_found_and_kept(images: Tensor) -> None:
    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.end = (
                nn.Linear(64, 64),
                nn.Linear(64, 64),
                nn.Linear(64, 64),
                nn.Linear(64, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            early = self.one(x.flatten(1))
            return self.end(self.three(self.two(early).relu()) + early)

    torch.manual_seed(0)
    network = Round()
    assert passed_over(network, "three", images) == ("two",)
    stitched = stitch(network, network, ("three", "three"), images)
    for _ in range(2):
        torch.testing.assert_close(stitched(images), network(images), rtol=0, atol=1e-3)


def test_only_the_map_learns_and_the_networks_stay_as_they_are(images: Tensor) -> None:
    a, b = cnn(4).train(), cnn(6, seed=2).train()
    before = copy.deepcopy((a.state_dict(), b.state_dict()))
    stitched = stitch(a, b, ("2", "3"), images)
    assert [name for name, p in stitched.named_parameters() if p.requires_grad] == ["map.weight", "map.bias"]
    assert all(p.requires_grad for p in (*a.parameters(), *b.parameters()))
    assert a.training
    assert a[1].training
    targets = images.flatten(1).sum(dim=1).gt(0).long()
    inside = copy.deepcopy(stitched.backbones.state_dict())
    record = itf.fit(stitched, (images, targets), (images, targets), epochs=3, learning_rate=1e-2, progress=False)
    assert record.best["validation_loss"] < record.history[0]["validation_loss"]
    assert all(torch.equal(inside[key], value) for key, value in stitched.backbones.state_dict().items())
    for network, state in zip((a, b), before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        assert not any(m._forward_hooks or "forward" in vars(m) for m in network.modules())


def test_gradients_reach_the_map_and_networks_that_are_set_free(images: Tensor) -> None:
    stitched = stitch(cnn(4), cnn(6), ("2", "2"), images)
    stitched.backbones.requires_grad_(True)
    for _ in range(2):
        stitched.zero_grad()
        stitched(images[:5]).sum().backward()
    used = {name for name, p in stitched.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"map.weight", "backbones.0.0.weight", "backbones.1.3.weight", "backbones.1.7.bias"} <= used
    assert not {"backbones.1.0.weight", "backbones.0.3.weight"} & used


def test_the_record_says_how_much_survives(images: Tensor) -> None:
    a, b = mlp(30), mlp(12, seed=3)
    with torch.no_grad():
        test = (images, b(images).argmax(dim=1))
    record = stitch(a, b, ("2", "2"), images[:60], test=test).record
    assert record.quality["b"] == 1.0
    assert record.survives == record.quality["stitched"]
    assert record.quality["a"] < record.quality["stitched"] < 1
    assert "accuracy: a 0." in str(record)
    assert "on 60 examples" in str(record)
    assert stitch(a, b, ("2", "2"), images).record.survives is None
    lower = stitch(b, b, ("2", "2"), images, test=(images, b(images).detach() + 1), metric="mse").record
    assert lower.survives == pytest.approx(1, rel=1e-3)


def test_a_network_of_other_classes_is_not_measured(images: Tensor) -> None:
    a, b = nn.Sequential(*list(mlp(30))[:3], nn.Linear(30, 2)), mlp(12, seed=3)
    with torch.no_grad():
        test = (images, b(images).argmax(dim=1))
    record = stitch(a, b, ("2", "2"), images, test=test).record
    assert set(record.quality) == {"b", "stitched"}
    assert record.survives == record.quality["stitched"] > 0
    with pytest.raises(DataError, match="b: targets"):
        stitch(b, a, ("2", "2"), images, test=test)


def test_padding_does_not_count(images: Tensor) -> None:
    class Words(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(9, width), nn.Linear(width, width), nn.Linear(width, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.block(self.embed(input_ids)).mean(dim=1))

    torch.manual_seed(0)
    a, b = Words(4), Words(6)
    ids, mask = torch.randint(1, 9, (30, 7)), torch.ones(30, 7, dtype=torch.long)
    mask[:, 5:] = 0
    junk = ids.clone()
    junk[:, 5:] = 0
    one, two = (stitch(a, b, ("embed", "block"), [{"input_ids": i, "attention_mask": mask}], ridge=0) for i in (ids, junk))
    assert one.record.rows == 150
    assert torch.equal(one.map.weight, two.map.weight)
    assert one({"input_ids": ids[:, :3], "attention_mask": mask[:, :3]}).shape == (30, 2)  # as many tokens as there are


def test_samples_end_the_reading(images: Tensor) -> None:
    assert stitch(mlp(4), mlp(4), ("2", "2"), images, samples=50, batch_size=20).record.examples == 60


def test_wrong_input_is_said_all_at_once(images: Tensor) -> None:
    a, b = cnn(4), cnn(6)
    with pytest.raises(ModelError) as caught:
        stitch(a, b, ("9", "layer"), images)
    assert [p.path for p in caught.value.problems] == ["at[0]", "at[1]"]
    assert "no module at '9'" in str(caught.value)
    with pytest.raises(OptionError) as wrong:
        stitch(a, b, ("2", ""), images, ridge=-1, samples=0, metric="acuracy")
    assert [p.path for p in wrong.value.problems] == ["at[1]", "ridge", "samples", "metric"]
    twice = nn.Sequential(nn.Flatten(), layer := nn.Linear(64, 64), layer, nn.Linear(64, 5))
    with pytest.raises(ModelError, match=r"at\[1\]: '1' runs 2 times"):
        stitch(a, twice, ("2", "1"), images)
    with pytest.raises(DataError, match="NaN or infinity"):
        stitch(a, b, ("2", "2"), images * torch.nan)
    with pytest.raises(DataError, match="test: it has no targets"):
        stitch(a, b, ("2", "2"), images, test=[images])
    with pytest.raises(ModelError, match="needs both"):
        stitch(a, b, ("2", "2"), images)({"a": images, "b": None})


def test_networks_may_have_inputs_of_their_own(images: Tensor) -> None:
    stitched = stitch(mlp(4), mlp(5), ("2", "2"), [{"a": images, "b": images}])
    torch.testing.assert_close(stitched({"a": images, "b": images * 0}), stitched(images))


def test_a_stitch_is_saved_and_loaded_into_one_made_anew(images: Tensor, tmp_path: Path) -> None:
    stitched = stitch(cnn(4), mlp(7), ("2", "2"), images)
    itf.save(stitched, tmp_path / "out")
    again = itf.load(tmp_path / "out", stitch(cnn(4, seed=5), mlp(7, seed=6), ("2", "2"), images))
    assert torch.equal(again(images), stitched(images))

"""Similarity: CKA is its formula, knows equal networks, rotations and scale; stitching says what is linear in what."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import DataError, ModelError, OptionError


def mlp(width: int = 8, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(), nn.Linear(width, 4), nn.ReLU(inplace=True))


def cnn(width: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, width, 2, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(12 * width, 4))


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def similar(a: nn.Module, b: nn.Module, data: Any, **options: Any) -> Any:
    return itf.similarity(a, b, data, progress=False, **options)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate as a mean over all ordered quadruples of different examples (Song et al. 2012)."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    values = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return float(np.mean(values))


def test_cka_is_its_formula_over_all_quadruples_of_each_batch(rows: Tensor) -> None:
    a, b = mlp().eval(), mlp(5, seed=1).eval()
    found = similar(a, b, rows[:18], layers_a=["1"], layers_b=["3"], batch_size=9)
    parts = [(a[:2](x).double().detach().numpy(), b[:4](x).double().detach().numpy()) for x in (rows[:9], rows[9:18])]
    across, first, second = (sum(hsic(p[i], p[j]) for p in parts) for i, j in ((0, 1), (0, 0), (1, 1)))
    assert found.matrix[0][0] == pytest.approx(across / np.sqrt(first * second), rel=1e-6)
    assert found.examples == 18


def test_one_batch_is_the_formula_of_whole_matrices(rows: Tensor) -> None:
    a, b = mlp().eval(), mlp(5, seed=1).eval()
    x, y = a[:1](rows).double().detach().numpy(), b[:4](rows).double().detach().numpy()

    def whole(x: np.ndarray, y: np.ndarray) -> float:
        n = len(x)
        k, l = x @ x.T, y @ y.T  # noqa: E741
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        one = np.ones(n)
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return float((np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3)))

    expected = whole(x, y) / np.sqrt(whole(x, x) * whole(y, y))
    assert similar(a, b, rows, layers_a=["0"], layers_b=["3"]).matrix[0][0] == pytest.approx(expected, rel=1e-6)


def test_equal_networks_have_a_diagonal_of_one_and_a_symmetric_map(rows: Tensor) -> None:
    found = similar(mlp(), mlp(), rows, batch_size=20)
    assert found.layers_a == found.layers_b == ("0", "1", "3", "4")
    matrix = np.array(found.matrix)
    np.testing.assert_allclose(matrix.diagonal(), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert matrix[0, 3] < 0.95
    assert found.best()["3"] == ("3", pytest.approx(1))


def test_rotations_scale_and_shifts_do_not_matter_and_other_maps_do(rows: Tensor) -> None:
    a, b, c = mlp(), mlp(), mlp()
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    with torch.no_grad():
        b[0].weight.copy_(3 * torch.from_numpy(turned).float() @ a[0].weight)
        b[0].bias.add_(5)
        c[0].weight.mul_(torch.linspace(0.1, 3, 8)[:, None])
    same, other = (similar(a, net, rows, layers_a=["0"], layers_b=["0"]).matrix[0][0] for net in (b, c))
    assert same == pytest.approx(1, abs=1e-5)
    assert other < 0.97


def test_unrelated_features_are_near_zero_and_unbiased(rows: Tensor) -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(6, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(torch.randn_like(x))

    torch.manual_seed(0)
    values = [similar(nn.Sequential(Noise()), nn.Sequential(Noise()), rows[:20]).matrix[0][0] for _ in range(40)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(40)


def test_what_a_later_layer_changes_in_place_is_read_before(rows: Tensor) -> None:
    inplace, plain = mlp(), mlp()
    plain[4].inplace = False
    assert similar(inplace, plain, rows).matrix == similar(plain, plain, rows).matrix
    assert similar(inplace, plain, rows, measure="stitching").matrix == similar(plain, plain, rows, measure="stitching").matrix


def test_stitching_is_one_where_one_is_linear_in_the_other(rows: Tensor) -> None:
    found = similar(mlp(), mlp(), rows, measure="stitching", batch_size=13)
    matrix = np.array(found.matrix)
    np.testing.assert_allclose(matrix.diagonal(), 1, atol=1e-6)
    assert matrix[1, 2] == pytest.approx(1, abs=1e-6)  # a linear layer after it
    assert matrix[2, 1] < 0.99  # and not the other way round
    as_one = similar(mlp(), mlp(), rows, measure="stitching", batch_size=60).matrix
    np.testing.assert_allclose(matrix, as_one, atol=1e-9)


def test_any_two_networks_and_own_inputs(rows: Tensor) -> None:
    a, b = cnn(3).train(), mlp()
    state = copy.deepcopy(a.state_dict())
    for measure in ("cka", "stitching"):
        found = similar(a, b, [{"a": rows[:30], "b": rows[:30] * 2}, {"a": rows[30:], "b": rows[30:] * 2}], measure=measure)
        assert found.layers_a == ("0.0", "0.1", "0.2", "0.3", "1", "2")
        assert np.isfinite(found.matrix).all()
        assert np.max(found.matrix) <= 1 + 1e-9
    assert a.training
    assert all(torch.equal(state[key], value) for key, value in a.state_dict().items())
    assert not any(m._forward_hooks for m in a.modules())


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(9, width), nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.block(self.embed(input_ids).tanh()).mean(dim=1)


@pytest.mark.parametrize("measure", ["cka", "stitching"])
def test_padding_does_not_count(measure: str) -> None:
    torch.manual_seed(0)
    a, b = Words(4), Words(6)
    ids, mask = torch.randint(1, 9, (30, 7)), torch.ones(30, 7, dtype=torch.long)
    mask[:10, 3:] = 0
    found = []
    for other in (ids, ids * mask, torch.cat([ids * mask, ids], dim=1)):
        more = torch.zeros(30, other.shape[1] - 7, dtype=torch.long)
        batch = {"input_ids": other, "attention_mask": torch.cat([mask, more], dim=1)}
        found.append(np.array(similar(a, b, [batch], layers_a=["embed"], layers_b=["block"], measure=measure).matrix))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)
    if measure == "stitching":
        held = itf.stitch(a, b, ("embed", "block"), [batch], progress=False).record
        assert held is not None
        assert 1 - found[2] == pytest.approx(held.held_out, rel=1e-4)


def test_blocks_of_a_list_are_layers_and_what_is_in_them_is_not() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    network = nn.ModuleDict({"embed": nn.Embedding(5, 8), "encoder": encoder, "head": nn.Linear(8, 3)})

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner["head"](self.inner["encoder"](self.inner["embed"](ids))[:, 0])

    ids = torch.randint(0, 5, (12, 4), generator=torch.Generator().manual_seed(0))
    found = similar(Words(), Words(), ids)
    assert found.layers_a == ("inner.embed", "inner.encoder.layers.0", "inner.encoder.layers.1", "inner.head")


def test_the_map_is_drawn(rows: Tensor, tmp_path: Path) -> None:
    found = similar(mlp(), cnn(2), rows)
    text = found.save_figure(tmp_path / "map.svg", a="<small>", b="$net_1$").read_text()
    assert "&lt;small&gt;" in text
    assert "$net_1$" in text
    assert "linear CKA, 60 examples" in text
    assert found.save_figure(tmp_path / "map.svg", a="<small>", b="$net_1$").read_text() == text
    assert found.save_figure(tmp_path / "map.png").stat().st_size > 1000


def test_wrong_input_is_said_all_at_once(rows: Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        similar(mlp(), mlp(), rows, layers_a=["0", "9"], layers_b=["x"])
    assert [p.path for p in caught.value.problems] == ["layers_a", "layers_b"]
    with pytest.raises(OptionError, match="did you mean 'cka'"):
        similar(mlp(), mlp(), rows, measure="ckaa")
    with pytest.raises(DataError, match="no batch has 4 examples"):
        similar(mlp(), mlp(), rows[:3])
    with pytest.raises(DataError, match="3 examples; at least 5"):
        similar(mlp(), mlp(), rows[:3], measure="stitching")
    network = mlp()
    twice = nn.Sequential(network[0], network[1], network[3], nn.Linear(4, 6), network[0])
    with pytest.raises(ModelError, match="'0' runs 2 times"):
        similar(twice, network, rows, layers_a=["0"])
    with pytest.raises(ModelError, match="no layers with features"):
        similar(nn.Linear(6, 3), network, rows)

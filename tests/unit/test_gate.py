"""The gate as a router: who counts, the load-balance loss by its formula, and that it reaches `fit`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import OptionError
from interfuse.modules.gate import Gate, imbalance, most
from interfuse.testing.fusions import FUSION_CHECKS, Check, Claims


@pytest.mark.parametrize("check", FUSION_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("count", [1, 2])
def test_a_gate_that_routes_keeps_the_contract(check: Check, count: int) -> None:
    check("gate", Claims(shares=False, options={"top_k": count}))


def gates(count: int | None, balance: float = 0.0) -> tuple[Gate, list[Tensor]]:
    torch.manual_seed(0)
    gate = Gate([3, 4, 5], 8, top_k=count, balance=balance)
    return gate, [torch.randn(20, width) for width in (3, 4, 5)]


def test_the_most_open_gates_count_and_no_others() -> None:
    gate, features = gates(2)
    every, _ = gates(None)
    (fused, weights), (_, open_weights) = gate(features), every(features)
    open_weights = open_weights.detach()
    for row in range(20):
        kept = sorted(range(3), key=lambda k: -float(open_weights[row, k]))[:2]
        assert weights[row].nonzero().flatten().tolist() == sorted(kept)
        torch.testing.assert_close(weights[row, kept], open_weights[row, kept])
    all_three, _ = gates(3)
    torch.testing.assert_close(all_three(features)[0], every(features)[0])
    assert not torch.allclose(fused, every(features)[0])


def test_the_loss_is_its_formula() -> None:
    torch.manual_seed(1)
    weights, mask = torch.rand(12, 4, dtype=torch.float64), torch.rand(12, 4) > 0.3
    mask[:, 0] = True
    mask[3] = False  # nothing there: the row doesn't count
    weights = weights * mask
    chosen = most(weights, mask, 2)
    taken, share, rows = [0.0] * 4, [0.0] * 4, 0
    for row in range(12):
        there = [k for k in range(4) if mask[row, k]]
        rows += bool(there)
        for k in sorted(there, key=lambda k: -float(weights[row, k]))[:2]:
            taken[k] += 1
        for k in there:
            share[k] += float(weights[row, k]) / sum(float(weights[row, j]) for j in there)
    expected = 4 * sum(t / sum(taken) * s / rows for t, s in zip(taken, share, strict=True))
    assert float(imbalance(weights, chosen)) == pytest.approx(expected, rel=1e-12)
    even = torch.full((4, 4), 0.5)
    assert float(imbalance(even, torch.eye(4).bool())) == pytest.approx(1)
    one = torch.zeros(4, 4).index_fill(1, torch.tensor([2]), 0.7)
    assert float(imbalance(one, one > 0)) == pytest.approx(4)


def test_the_loss_is_left_in_training_alone_and_does_not_hinder_copies() -> None:
    gate, features = gates(1, 0.5)
    gate.eval()(features)
    assert gate.auxiliary_loss is None
    gate.train()(features)
    assert gate.auxiliary_loss is not None
    assert gate.auxiliary_loss.requires_grad
    assert copy.deepcopy(gate).auxiliary_loss is None
    still, _ = gates(1)
    still.train()(features)
    assert still.auxiliary_loss is None


def test_balance_without_top_k_is_refused() -> None:
    with pytest.raises(OptionError, match=r"balance: got 0.1 without top_k"):
        gates(None, 0.1)
    with pytest.raises(OptionError, match="top_k"):
        itf.ModelFusion([nn.Linear(6, 3)], "gate", top_k=0)


@pytest.mark.parametrize("cache", [True, False])
def test_fit_adds_it_so_that_more_models_are_used(cache: bool, tmp_path: object) -> None:
    """Two networks equally good, of which the router prefers one at the start."""

    def used(balance: float) -> float:
        torch.manual_seed(0)
        networks = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
        x = torch.randn(200, 6)
        data = (x, x[:, 0].gt(0).long())
        fusion = itf.ModelFusion(networks, "gate", 8, 2, example=x[:2], residual=False, top_k=1, balance=balance)
        gate = fusion.fusion
        assert isinstance(gate, Gate)
        with torch.no_grad():
            dict(gate.named_parameters())["branches.0.project.bias"].fill_(1.0)
            gate.own.weight.add_(0.1)
        itf.fit(fusion, data, epochs=10, learning_rate=1e-2, cache=str(tmp_path) if cache else False, progress=False)
        assert gate.auxiliary_loss is None
        weights = fusion(x, return_weights=True)[1]
        return float((weights[:, 1] > 0).float().mean())

    assert used(0.0) < 0.1
    assert used(1.0) > 0.25

"""Weights by validation: the rule against a slow one, a network that is worse loses weight, and the optimiser stays out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.training.schedule import WeightSchedule

Data = tuple[Tensor, Tensor]


def networks() -> dict[str, nn.Module]:
    """One that sees the inputs, and one that sees nothing of them."""
    torch.manual_seed(0)
    blind = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for p in blind.parameters():
        p.data.zero_()
    return {"seeing": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "blind": blind}


def data(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 6, generator=generator)
    return x, x[:, :3].argmax(-1)


def test_the_rule_is_the_slow_one() -> None:
    losses, weights = [0.3, 1.1, 2.0], [0.5, 0.25, 0.25]
    shares = [math.exp(-loss / 0.5) for loss in losses]
    expected = [0.25 * w + 0.75 * s / sum(shares) for w, s in zip(weights, shares, strict=True)]
    found = WeightSchedule(0.5, 0.25).next_weights(weights, losses)
    assert found == pytest.approx(expected, rel=1e-12)
    assert sum(found) == pytest.approx(1)
    assert WeightSchedule().next_weights([0.5, 0.5], [1.0, math.nan]) == [0.75, 0.25]
    assert WeightSchedule().next_weights([0.6, 0.4], [math.nan, math.inf]) == [0.6, 0.4]


@pytest.mark.parametrize("cache", [False, True])
def test_weights_follow_validation_and_are_in_the_record(cache: bool, tmp_path: Path) -> None:
    fusion = itf.ModelFusion(networks(), "weighted", head=3, dim=8, example=data(1)[0], residual=False)
    schedule = WeightSchedule(temperature=0.3)
    given: dict[str, Any] = {
        "cache": tmp_path / "cache" if cache else False,
        "epochs": 5,
        "learning_rate": 0.02,
        "patience": None,
    }
    record = itf.fit(fusion, data(1), data(2), callbacks=[schedule.callback()], **given)
    assert record.cached == cache
    seeing = [row["seeing"] for row in schedule.history]
    assert seeing[0] == pytest.approx(0.5)
    assert seeing == sorted(seeing)
    assert seeing[-1] > 0.6
    assert [row["weight_seeing"] for row in record.history[1:]] == pytest.approx(seeing)
    _, weights = fusion(data(2)[0], return_weights=True)
    assert weights[0].tolist() == pytest.approx([seeing[record.best_epoch - 1], 1 - seeing[record.best_epoch - 1]], rel=1e-5)
    assert "<svg" in schedule.save_figure(tmp_path / "weights.svg").read_text()


def test_the_losses_are_those_of_each_model_alone() -> None:
    fusion = itf.ModelFusion(networks(), "weighted", head=3, dim=8, example=data(1)[0], residual=False)
    schedule = WeightSchedule()
    itf.fit(fusion, data(1), data(2), epochs=1, callbacks=[schedule.callback()], batch_size=50)
    x, y = data(2)
    alone = [fusion({"seeing": x, "blind": None}), fusion({"seeing": None, "blind": x})]
    assert schedule.losses == pytest.approx([float(nn.functional.cross_entropy(o, y).detach()) for o in alone], rel=1e-5)


def test_what_cannot_be_scheduled_is_said() -> None:
    with pytest.raises(itf.OptionError, match=r"temperature: got 0(.|\n)*smoothing: got 1"):
        WeightSchedule(0, 1)
    fusion = itf.ModelFusion(networks(), "gate", head=3, dim=8)
    with pytest.raises(itf.OptionError, match=r"a schedule of weights for 'gate'; a fusion of the kind 'weighted'"):
        itf.fit(fusion, data(1), data(2), epochs=1, callbacks=[WeightSchedule().callback()])
    fusion = itf.ModelFusion(networks(), "weighted", head=3, dim=8)
    with pytest.raises(itf.OptionError, match=r"validation: missing"):
        itf.fit(fusion, data(1), epochs=1, callbacks=[WeightSchedule().callback()])

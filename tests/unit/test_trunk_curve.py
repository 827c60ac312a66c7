"""The curve of shared trunks: its ends, the choice against a plain search, by validation alone, and the picture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.evaluation.metrics import score
from interfuse.inference.predict import predict
from interfuse.transfer.curve import TrunkCurve, trunk_curve
from interfuse.transfer.sharing import SharedTrunk

Data = tuple[Tensor, Tensor]


def net() -> nn.Module:
    body = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*body), nn.Linear(8, 3))


def given(seed: int = 0, far: float = 0.6) -> tuple[dict[str, nn.Module], dict[str, Data], dict[str, Data]]:
    """Two networks near one start, and data whose targets are each one's own answers, a tenth of them changed."""
    torch.manual_seed(seed)
    base = net()
    experts: dict[str, nn.Module] = {}
    data: list[dict[str, Data]] = [{}, {}]
    for task in ("a", "b"):
        expert = copy.deepcopy(base)
        for p in expert.parameters():
            p.data += far * torch.randn_like(p) / p.shape[-1] ** 0.5
        experts[task] = expert.eval()
        for part in data:
            x = torch.randn(150, 6)
            y = expert(x).argmax(-1)
            part[task] = (x, torch.where(torch.rand(150) < 0.1, (y + 1) % 3, y).detach())
    return experts, data[0], data[1]


def test_the_ends_are_the_experts_and_one_body() -> None:
    experts, validation, test = given()
    curve = trunk_curve(experts, validation, test)
    assert [point.depth for point in curve.points] == [0, 1, 2, 3]
    sizes = [point.cost.parameters for point in curve.points]
    one = sum(p.numel() for p in experts["a"].parameters())
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (2 * one, one + 27)  # 27: the second head
    for which, data in (("validation", validation), ("test", test)):
        alone = {task: score("accuracy", *predict(expert, data[task])[:2]) for task, expert in experts.items()}  # type: ignore[arg-type]
        assert getattr(curve.points[0], which) == alone
    merged = itf.merge("linear", list(experts.values()))
    merged.load_state_dict({k: v for k, v in experts["a"].state_dict().items() if k.startswith("2.")}, strict=False)
    assert curve.points[-1].validation["a"] == score("accuracy", *predict(merged, validation["a"])[:2])  # type: ignore[arg-type]


def slow_choice(curve: TrunkCurve, tolerance: float) -> int:
    best = 0
    for point in curve.points:
        if all(point.validation[t] >= (1 - tolerance) * curve.points[0].validation[t] - 1e-12 for t in "ab"):
            best = max(best, int(point.depth))
    return best


def test_the_smallest_network_that_is_good_enough_is_chosen() -> None:
    chosen = set()
    for seed in range(3):
        experts, validation, _ = given(seed, far=0.15)
        for tolerance in (0.0, 0.01, 0.05, 0.99):
            curve = trunk_curve(experts, validation, tolerance=tolerance)
            assert curve.chosen.depth == slow_choice(curve, tolerance)
            chosen.add(curve.chosen.depth)
    assert {0, 3} <= chosen


def test_test_data_have_no_say_in_the_choice() -> None:
    experts, validation, test = given()
    plain = trunk_curve(experts, validation)
    spoilt = {task: (x, (y + 1) % 3) for task, (x, y) in test.items()}
    for other in (test, spoilt):
        assert trunk_curve(experts, validation, other).chosen.depth == plain.chosen.depth


def test_a_measure_of_which_less_is_better() -> None:
    experts, validation, _ = given()
    error = ("error", lambda o, t: float((o.argmax(-1) != t).float().mean()), False)
    curve = trunk_curve(experts, validation, metric=error, tolerance=0.5)
    fine = [p.depth for p in curve.points if all(v <= 1.5 * curve.points[0].validation[t] for t, v in p.validation.items())]
    assert curve.chosen.depth == max(fine)


def test_it_is_shown_and_the_chosen_network_made(tmp_path: Path) -> None:
    experts, validation, test = given()
    curve = trunk_curve(experts, validation, test, depths=[1, 3], tolerance=0.9)
    text = curve.markdown()
    assert text.count("\n|") == 4
    assert f"| **{curve.chosen.depth}** |" in text
    assert "a, test" in text
    picture = curve.save_figure(tmp_path / "curve.svg").read_text()
    assert "<svg" in picture
    x = validation["a"][0]
    outputs = curve.network(experts)(x)
    assert torch.equal(outputs["a"], itf.share_trunk(experts, curve.chosen.depth)(x)["a"])


def test_what_is_wrong_is_said_at_once() -> None:
    experts, validation, _ = given()
    with pytest.raises(itf.OptionError, match=r"validation: has the tasks \['a'\](.|\n)*depths: got 9(.|\n)*tolerance: got 1"):
        trunk_curve(experts, {"a": validation["a"]}, depths=[9], tolerance=1)
    with pytest.raises(itf.OptionError, match=r"test\['a'\]: is the validation data"):
        trunk_curve(experts, validation, validation)


def test_the_mean_may_hold_where_a_task_does_not() -> None:
    differ = set()
    for seed in range(4):
        experts, validation, _ = given(seed, far=0.15)
        for tolerance in (0.01, 0.05):
            curve = trunk_curve(experts, validation, tolerance=tolerance, within="mean")
            means = [sum(p.validation.values()) / 2 for p in curve.points]
            fine = [p.depth for p, mean in zip(curve.points, means, strict=True) if mean >= (1 - tolerance) * means[0]]
            assert curve.chosen.depth == max(fine)
            differ.add(curve.chosen.depth != slow_choice(curve, tolerance))
    assert "the mean of the tasks" in curve.caption()
    assert True in differ


def test_what_is_left_is_trained_before_it_is_measured() -> None:
    experts, validation, test = given()
    train = {task: (x := torch.randn(200, 6), expert(x).argmax(-1).detach()) for task, expert in experts.items()}
    seen: list[int] = []

    def tune(shared: SharedTrunk) -> None:
        seen.append(shared.depth)
        itf.fit_tasks(shared, train, epochs=8, learning_rate=1e-2, train_only="experts.*", progress=False)

    plain = trunk_curve(experts, validation, test, depths=[2], tolerance=0.99)
    curve = trunk_curve(experts, validation, test, depths=[2], tolerance=0.99, tune=tune)
    assert seen == [2]
    assert curve.points[0].validation == plain.points[0].validation
    assert sum(curve.points[1].validation.values()) > sum(plain.points[1].validation.values())
    network = curve.network(experts)
    for task, (x, y) in validation.items():
        assert score("accuracy", network(x)[task], y) == curve.chosen.validation[task]
    merged = itf.share_trunk(experts, 2)
    assert all(torch.equal(a, b) for a, b in zip(network.trunk.parameters(), merged.trunk.parameters(), strict=True))


def test_a_path_is_a_depth() -> None:
    experts, validation, _ = given()
    curve = trunk_curve(experts, validation, depths=[1, "0"], tolerance=0.99)
    assert [point.depth for point in curve.points] == [0, "0", 1]
    first, second, third = (point.cost.parameters for point in curve.points)
    assert (first - second, second - third) == (6 * 8 + 8, 8 * 8 + 8)
    with pytest.raises(itf.OptionError, match="depth: no shared block at 'stem'"):
        trunk_curve(experts, validation, depths=["stem"])

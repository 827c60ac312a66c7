"""Metrics against torchmetrics and hand-made cases; intervals against the normal approximation; every refusal."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics.functional as reference
from torch import Tensor

from interfuse.errors import DataError, OptionError
from interfuse.evaluation.metrics import (
    bootstrap,
    find_metric,
    interval,
    metric_names,
    paired_difference,
    resampled,
    score,
)


def made(n: int = 400, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), targets] += 1.5
    return logits, targets


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("accuracy", lambda o, t: reference.accuracy(o, t, "multiclass", num_classes=5)),
        ("balanced_accuracy", lambda o, t: reference.accuracy(o, t, "multiclass", num_classes=5, average="macro")),
        ("f1", lambda o, t: reference.f1_score(o, t, "multiclass", num_classes=5, average="macro")),
        ("auroc", lambda o, t: reference.auroc(o, t, "multiclass", num_classes=5)),
        ("ece", lambda o, t: reference.calibration_error(o, t, "multiclass", num_classes=5)),
        ("log_loss", torch.nn.functional.cross_entropy),
        ("nll", torch.nn.functional.cross_entropy),
    ],
)
def test_classification_agrees_with_torchmetrics(name: str, other: object) -> None:
    outputs, targets = made()
    assert score(name, outputs, targets) == pytest.approx(float(other(outputs, targets)), abs=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mse", reference.mean_squared_error),
        ("mae", reference.mean_absolute_error),
        ("r2", reference.r2_score),
    ],
)
@pytest.mark.parametrize("shape", [(60,), (60, 3)])
def test_regression_agrees_with_torchmetrics(name: str, other: object, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(shape, generator=generator) + 3
    outputs = targets + 0.3 * torch.randn(shape, generator=generator)
    assert score(name, outputs, targets) == pytest.approx(float(other(outputs, targets)), abs=1e-5)  # type: ignore[operator]


def test_one_logit_two_logits_and_probabilities_say_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(2, (80,), generator=generator)
    logit = torch.randn(80, generator=generator) + targets
    two = torch.stack([torch.zeros(80), logit], 1)
    for name in ("accuracy", "balanced_accuracy", "f1", "auroc", "log_loss", "ece"):
        wanted = score(name, two, targets)
        assert score(name, logit, targets) == pytest.approx(wanted)
        assert score(name, logit[:, None], targets.float()) == pytest.approx(wanted)
        assert score(name, two.softmax(1), targets) == pytest.approx(wanted, abs=1e-6)
        assert score(name, two.log_softmax(1), targets) == pytest.approx(wanted, abs=1e-6)
    assert score("auroc", logit, targets) == pytest.approx(float(reference.auroc(logit, targets, "binary")), abs=1e-6)


def test_ties_count_half_and_absent_classes_are_left_out() -> None:
    assert score("auroc", torch.zeros(4), torch.tensor([0, 1, 1, 0])) == 0.5
    outputs, targets = torch.eye(3)[[0, 1, 1, 2]] * 9, torch.tensor([0, 1, 0, 0])  # predicts 0 1 1 2
    assert score("balanced_accuracy", outputs, targets) == pytest.approx((1 / 3 + 1) / 2)
    assert score("f1", outputs, targets) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


def test_a_probability_of_zero_gives_a_large_but_finite_loss() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert 300 < score("log_loss", certain, torch.tensor([0, 0])) < 400


def test_the_interval_of_a_share_is_the_normal_approximation() -> None:
    n, right = 2000, 1500
    targets = torch.zeros(n, dtype=torch.long)
    targets[right:] = 1
    low, high = bootstrap("accuracy", torch.tensor([[1.0, 0.0]]).repeat(n, 1), targets, resamples=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / n)
    assert low == pytest.approx(0.75 - half, abs=0.002)
    assert high == pytest.approx(0.75 + half, abs=0.002)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(3)
    held = 0
    for trial in range(200):
        drawn = torch.randn(100, generator=generator) + 1
        low, high = bootstrap("mae", drawn, torch.full((100,), -9.0), resamples=200, seed=trial)
        held += low <= 10 <= high  # |drawn + 9| has mean 10
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1", "auroc", "log_loss", "ece"])
def test_the_vectorised_resamples_are_those_of_recomputing(name: str) -> None:
    outputs, targets = made(60)
    value, fast = resampled(name, outputs, targets, resamples=20, seed=5)
    own, slow = resampled(("own", lambda o, t: score(name, o, t), True), outputs, targets, resamples=20, seed=5)
    assert value == pytest.approx(own)
    torch.testing.assert_close(fast, slow)
    assert fast.std() > 0


def test_r2_resamples_are_those_of_recomputing() -> None:
    targets = torch.arange(30.0)
    outputs = targets + torch.sin(targets)
    _, fast = resampled("r2", outputs, targets, resamples=10)
    _, slow = resampled(("own", lambda o, t: score("r2", o, t), True), outputs, targets, resamples=10)
    torch.testing.assert_close(fast, slow)


def test_the_seed_decides_the_resamples() -> None:
    outputs, targets = made(100)
    assert bootstrap("accuracy", outputs, targets, seed=1) == bootstrap("accuracy", outputs, targets, seed=1)
    assert bootstrap("log_loss", outputs, targets, seed=1) != bootstrap("log_loss", outputs, targets, seed=2)


def test_a_paired_difference_is_zero_for_equal_models_and_narrower_than_unpaired() -> None:
    outputs, targets = made()
    assert paired_difference("f1", outputs, outputs.clone(), targets) == (0, 0, 0)
    worse = outputs.clone()
    worse[:40] = worse[:40].flip(1)  # the same model but for a tenth of the examples
    difference, low, high = paired_difference("accuracy", outputs, worse, targets)
    assert difference == pytest.approx(score("accuracy", outputs, targets) - score("accuracy", worse, targets))
    assert low < difference < high
    alone = bootstrap("accuracy", outputs, targets)
    assert high - low < alone[1] - alone[0]


def test_a_torchmetrics_function_is_a_metric() -> None:
    outputs, targets = made(50)
    own = ("kappa", lambda o, t: reference.cohen_kappa(o, t, "multiclass", num_classes=5), True)
    low, high = bootstrap(own, outputs, targets, resamples=30)
    assert low < score(own, outputs, targets) < high
    assert find_metric(own).name == "kappa"


def test_directions() -> None:
    assert {name for name in metric_names() if find_metric(name).higher} == {
        "accuracy", "balanced_accuracy", "f1", "auroc", "r2",
    }  # fmt: skip
    assert find_metric("mse").better(1.0, 2.0)
    assert find_metric("accuracy").better(0.9, 0.8)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("acuracy", "'acuracy'; did you mean 'accuracy'"),
        (("name", 3, True), r"got \('name', 3, True\)"),
        (("name", max, True, 1), "higher_is_better"),
    ],
)
def test_a_metric_that_is_none_is_refused(metric: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_metric(metric)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "message"),
    [
        ("accuracy", torch.zeros(2, 3), torch.tensor([0.5, 1.0]), "accuracy got torch.float32 targets.*use mse"),
        ("accuracy", torch.zeros(2, 3), torch.tensor([0, 3]), "class 3, but the outputs are of 3 classes; 0 to 2"),
        ("f1", torch.zeros(2), torch.tensor([0, -1]), "class -1"),
        ("accuracy", torch.zeros(2, 3, 4), torch.tensor([0, 1]), r"outputs \(2, 3, 4\)"),
        ("accuracy", torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), r"targets \(2, 3\)"),
        ("mse", torch.zeros(2, 3), torch.zeros(2), r"outputs \(2, 3\) for targets \(2,\).*use accuracy"),
        ("mse", torch.zeros(3), torch.zeros(2), r"\(3,\) outputs for \(2,\) targets"),
        ("mse", torch.zeros(0), torch.zeros(0), "at least one example"),
        ("mse", torch.tensor([0.0, math.nan]), torch.zeros(2), "1 of 2 are NaN"),
        ("auroc", torch.zeros(3), torch.ones(3, dtype=torch.long), "auroc isn't defined on these 3 targets"),
        ("r2", torch.zeros(3), torch.full((3,), 0.1), "r2 isn't defined"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(metric: str, outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(metric, outputs, targets)


def test_shares_and_counts_out_of_range() -> None:
    with pytest.raises(OptionError, match=r"confidence: got 95"):
        interval(torch.ones(3), 95)
    with pytest.raises(OptionError, match="resamples: got 0"):
        bootstrap("mse", torch.zeros(2), torch.zeros(2), resamples=0)

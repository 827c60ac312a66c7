"""The kinds of ensembles: each against a slow float64 reference from its paper, and what each promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from interfuse import Ensemble, calibrate
from interfuse.ensemble.combine import COMBINE, LEARNS, combined
from interfuse.ensemble.learning import DRAWS, folds_of, learn, temperature_of
from interfuse.errors import DataError, ModelError, OptionError
from interfuse.evaluation.metrics import score

LEARNED = [kind for kind in COMBINE if LEARNS[kind]]


def votes(members: int = 3, n: int = 300, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities (members, n, classes) in float64 of members of different skill and confidence, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=generator)
    truth = nn.functional.one_hot(targets, classes).double()
    noise = torch.randn(members + 1, n, classes, generator=generator, dtype=torch.float64)
    noise = (noise[:-1] + noise[-1]) / 2**0.5  # what is hard for one is hard for all
    skill = torch.linspace(0.3, 1.5, members, dtype=torch.float64).view(-1, 1, 1)
    return log_softmax(5 * (skill * truth + noise), -1), targets


def log_loss(logs: Tensor, targets: Tensor) -> float:
    return float(-logs.detach().double()[torch.arange(len(targets)), targets].mean())


def reference(kind: str, logs: np.ndarray, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Probabilities (n, classes), example by example as the papers write them."""
    members, n, classes = logs.shape
    result = np.zeros((n, classes))
    for i in range(n):
        p = [np.exp(logs[k, i]) for k in range(members)]
        if kind == "probabilities":
            result[i] = sum(p) / members
        elif kind == "log_probabilities":
            product = np.prod(p, axis=0) ** (1 / members)
            result[i] = product / product.sum()
        elif kind == "vote":
            for k in range(members):
                result[i][int(np.argmax(p[k]))] += 1 / (members + 1)
            result[i] += sum(p) / members / (members + 1)
        elif kind in ("weighted", "greedy"):
            result[i] = sum(numbers["weight"][k] * p[k] for k in range(members))
        elif kind == "temperature":
            sharpened = [p[k] ** (1 / numbers["temperatures"][k]) for k in range(members)]
            result[i] = sum(s / s.sum() for s in sharpened) / members
        else:
            z = numbers["bias"] + sum(numbers["matrix"][k] @ logs[k, i] for k in range(members))
            result[i] = np.exp(z) / np.exp(z).sum()
    return result


@pytest.mark.parametrize("kind", [kind for kind in COMBINE if kind != "logits"])
def test_each_kind_is_its_formula(kind: str) -> None:
    logs, targets = votes(n=40)
    numbers = learn(kind, logs, targets)
    expected = reference(kind, logs.numpy(), {name: value.numpy() for name, value in numbers.items()})
    found = combined(kind, logs, numbers)
    torch.testing.assert_close(found.exp(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(40, dtype=torch.float64))


def test_a_vote_goes_to_the_majority_and_a_tie_to_the_surer() -> None:
    p = torch.tensor([[[0.6, 0.4, 0.0]], [[0.55, 0.45, 0.0]], [[0.01, 0.98, 0.01]]]).clamp(min=1e-6)
    assert combined("vote", p.log(), {}).argmax() == 0
    assert combined("probabilities", p.log(), {}).argmax() == 1
    assert combined("vote", p[1:].log(), {}).argmax() == 1


def test_weights_reach_the_least_log_loss() -> None:
    logs, targets = votes(4)
    own = logs.exp()[:, torch.arange(300), targets].numpy()

    def loss(w: np.ndarray) -> float:
        return float(-np.log(w @ own).mean())

    start = np.full(4, 0.25)
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = minimize(loss, start, bounds=[(0, 1)] * 4, constraints=simplex, tol=1e-12)
    weight = learn("weighted", logs, targets)["weight"]
    assert weight.min() >= 0
    assert weight.sum() == pytest.approx(1)
    assert loss(weight.numpy()) <= best.fun + 2e-6
    assert loss(weight.numpy()) < loss(start) - 1e-3


def test_a_temperature_is_the_best_there_is() -> None:
    logs, targets = votes(1)

    def loss(logarithm: float) -> float:
        return log_loss(log_softmax(logs[0] / math.exp(logarithm), -1), targets)

    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    assert temperature_of(logs[0], targets) == pytest.approx(math.exp(best.x), rel=1e-4)
    assert math.exp(best.x) > 1.5  # the data are overconfident


def test_a_temperature_undoes_a_temperature() -> None:
    """Classes drawn from softmax(z): the temperature of 3 z is 3, but for the draw."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    assert temperature_of(log_softmax(3 * z, 1), targets) == pytest.approx(3, rel=0.05)
    assert temperature_of(log_softmax(z, 1), z.argmax(1)) == pytest.approx(0.01)  # all right: as sure as it may be
    assert temperature_of(log_softmax(z, 1), z.argmin(1)) == pytest.approx(100)


def test_temperatures_are_the_best_together() -> None:
    logs, targets = votes(3)
    logs = logs[1:]

    def loss(logarithms: np.ndarray) -> float:
        p = sum(torch.softmax(logs[k] / math.exp(logarithms[k]), -1) for k in range(2))
        return log_loss((torch.as_tensor(p) / 2).log(), targets)

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    found = learn("temperature", logs, targets)["temperatures"]
    assert loss(found.log().numpy()) == pytest.approx(best.fun, abs=1e-7)
    assert found.log().abs().max() > 0.1


def test_greedy_draws_what_lowers_the_loss_most() -> None:
    logs, targets = votes(4)
    own = logs.exp()[:, torch.arange(300), targets].numpy()
    drawn: list[int] = []
    while len(drawn) < DRAWS:
        losses = [-np.log(own[[*drawn, k]].mean(0)).mean() for k in range(4)]
        if drawn and min(losses) >= -np.log(own[drawn].mean(0)).mean():
            break
        drawn.append(int(np.argmin(losses)))
    expected = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(learn("greedy", logs, targets)["weight"].numpy(), expected)
    assert len(drawn) > 1


def test_stacking_is_logistic_regression_held_to_the_mean() -> None:
    logs, targets = votes(2, 60, 3)
    members, n, classes = logs.shape
    read = logs.permute(1, 0, 2).reshape(n, -1).numpy()
    start = np.concatenate([np.eye(classes) / members] * members, axis=1)
    truth = targets.numpy()

    def loss(flat: np.ndarray) -> float:
        v, b = flat[: start.size].reshape(start.shape), flat[start.size :]
        z = read @ v.T + b
        z = z - z.max(1, keepdims=True)
        return float(
            (np.log(np.exp(z).sum(1)) - z[np.arange(n), truth]).sum() + ((v - start) ** 2).sum() / 2 + (b**2).sum() / 2
        )

    best = minimize(loss, np.concatenate([start.ravel(), np.zeros(classes)]), tol=1e-10)
    found = learn("stacking", logs, targets)
    ours = np.concatenate([found["matrix"].permute(1, 0, 2).reshape(-1).numpy(), found["bias"].numpy()])
    assert loss(ours) <= best.fun + 1e-6
    np.testing.assert_allclose(ours, best.x, atol=1e-3)


@pytest.mark.parametrize("kind", LEARNED)
def test_what_is_learned_lowers_the_log_loss_on_its_data(kind: str) -> None:
    logs, targets = votes(4)
    after = log_loss(combined(kind, logs, learn(kind, logs, targets)), targets)
    assert after < log_loss(combined("probabilities", logs, {}), targets)


def test_folds_spread_every_class_and_repeat() -> None:
    targets = torch.tensor([0] * 50 + [1] * 10)
    folds = folds_of(targets, 5, 0)
    assert [int(((folds == f) & (targets == 1)).sum()) for f in range(5)] == [2] * 5
    assert torch.equal(folds, folds_of(targets, 5, 0))
    assert not torch.equal(folds, folds_of(targets, 5, 1))


class Table(nn.Module):
    """Gives row x of a table of logits, so that a member's predictions can be written down."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(logits.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x]


def tables(**given: Any) -> tuple[list[Table], Tensor, Tensor]:
    logs, targets = votes(**given)
    return [Table(rows) for rows in logs], torch.arange(len(targets)), targets


@pytest.mark.parametrize("kind", COMBINE)
def test_calibrate_reports_what_the_other_folds_taught(kind: Any) -> None:
    models, x, targets = tables()
    ensemble = Ensemble(models, combine=kind)
    record = ensemble.calibrate((x, targets), progress=False)
    assert record.after["log_loss"] < record.before["log_loss"]
    assert record.after["ece"] < record.before["ece"]
    inside = log_loss(ensemble(x).log_softmax(-1), targets)
    assert inside < record.after["log_loss"]  # of examples that taught what they are measured by
    assert (record.examples, record.folds, record.model) == (300, 5, ensemble)
    if not LEARNS[kind]:
        assert record.after["accuracy"] == record.before["accuracy"]
        assert record.learned == {"scale": pytest.approx(float(ensemble.numbers["scale"]))}


def test_any_classifier_is_calibrated_by_one_temperature() -> None:
    models, x, targets = tables(members=1)
    record = calibrate(models[0], (x, targets), progress=False)
    assert record.after["accuracy"] == record.before["accuracy"] == score("accuracy", models[0](x), targets)
    assert (
        record.after["log_loss"] < record.before["log_loss"] == pytest.approx(log_loss(models[0](x).log_softmax(-1), targets))
    )
    found = record.model(x).softmax(-1)
    torch.testing.assert_close(found, (models[0](x) / record.learned["scale"]).softmax(-1))
    own, reference = score("ece", found, targets), multiclass_calibration_error(found.detach(), targets, 4, 15, "l1")
    assert own == pytest.approx(float(reference), abs=1e-6)
    assert record.after["ece"] < record.before["ece"]
    ensemble = Ensemble(models)
    assert calibrate(ensemble, (x, targets), progress=False).model is ensemble


def test_what_doesn_t_classify_isn_t_calibrated() -> None:
    numbers = nn.Linear(4, 1)
    with pytest.raises(ModelError, match=r"'probabilities' for predictions \(8, 1\)"):
        calibrate(numbers, (torch.randn(8, 4), torch.randn(8)), progress=False)


def test_a_vote_s_calibration_leaves_the_classes_alone() -> None:
    models, x, targets = tables(members=4)
    ensemble = Ensemble(models, combine="vote")
    before = ensemble(x).argmax(1)
    ensemble.calibrate((x, targets), progress=False)
    assert torch.equal(ensemble(x).argmax(1), before)


def test_the_values_before_don_t_change_when_it_is_done_again() -> None:
    models, x, targets = tables()
    for kind in ("probabilities", "stacking"):
        ensemble = Ensemble(models, combine=kind)
        first = ensemble.calibrate((x, targets), progress=False)
        assert ensemble.calibrate((x, targets), progress=False) == first


@pytest.mark.parametrize("kind", LEARNED)
def test_what_is_learned_must_be(kind: Any) -> None:
    models, x, _ = tables()
    with pytest.raises(ModelError, match=rf"combine: '{kind}' hasn't been learned yet; call calibrate\(validation\)"):
        Ensemble(models, combine=kind)(x)


def test_greedy_runs_only_what_was_drawn() -> None:
    good, bad = torch.eye(3) * 4, torch.ones(3, 3)
    ensemble = Ensemble([Table(good), Table(bad)], combine="greedy")
    x = torch.arange(3).repeat(10)
    ensemble.calibrate((x, x), progress=False)
    assert ensemble.numbers["weight"].tolist() == [1.0, 0.0]
    calls: list[int] = []
    for k, model in enumerate(ensemble.backbones):
        model.register_forward_hook(lambda *_, k=k: calls.append(k))
    torch.testing.assert_close(ensemble(x), Table(good)(x).log_softmax(-1))
    assert calls == [0]
    ensemble({"Table": None, "Table_2": x})
    assert calls == [0, 1]


def test_members_that_are_missing_leave_their_share_to_the_others() -> None:
    models, x, targets = tables()
    ensemble = Ensemble(dict(zip("abc", models, strict=True)), combine="weighted")
    ensemble.calibrate((x, targets), progress=False)
    weight = ensemble.numbers["weight"][1:] / ensemble.numbers["weight"][1:].sum()
    expected = weight[0] * models[1](x).softmax(-1) + weight[1] * models[2](x).softmax(-1)
    torch.testing.assert_close(ensemble({"a": None, "b": x, "c": x}).exp(), expected)
    stack = Ensemble(dict(zip("abc", models, strict=True)), combine="stacking")
    stack.calibrate((x, targets), progress=False)
    with pytest.raises(ModelError, match=r"inputs: None for \['a'\]; stacking needs every"):
        stack({"a": None, "b": x, "c": x})


def test_data_that_teach_nothing_are_refused() -> None:
    models, x, targets = tables()
    ensemble = Ensemble(models, combine="weighted")
    with pytest.raises(DataError, match="validation: no targets"):
        ensemble.calibrate([x], progress=False)
    with pytest.raises(DataError, match="validation: 3 examples for 5 folds"):
        ensemble.calibrate((x[:3], targets[:3]), progress=False)
    with pytest.raises(OptionError, match="folds: got 1; a whole number from 2 up"):
        ensemble.calibrate((x, targets), folds=1, progress=False)
    with pytest.raises(OptionError, match="folds: got 0; a whole number from 2 up\nseed: got 'x'; a whole number from 0 up"):
        ensemble.calibrate((x, targets), folds=0, seed="x", progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"float32 targets; class numbers"):
        ensemble.calibrate((x, targets.float()), progress=False)
    with pytest.raises(DataError, match="class 9, but the outputs are of 4"):
        ensemble.calibrate((x, targets + 6), progress=False)
    assert ensemble.numbers == {}


def test_label_spaces_are_joined_by_name() -> None:
    one, two = torch.randn(5, 2), torch.randn(5, 3)
    names = {"one": ["cat", "dog"], "two": ["dog", "owl", "cat"]}
    ensemble = Ensemble({"one": Table(one), "two": Table(two)}, classes=names)
    assert ensemble.classes == ("cat", "dog", "owl")
    p, q = one.softmax(-1), two.softmax(-1)
    expected = torch.stack([p[:, 0] + q[:, 2], p[:, 1] + q[:, 0], q[:, 1]], 1) / 2
    torch.testing.assert_close(ensemble(torch.arange(5)).exp(), expected)


@pytest.mark.parametrize("kind", [kind for kind in COMBINE if kind not in ("logits", "log_probabilities")])
def test_every_kind_but_products_joins_label_spaces(kind: Any) -> None:
    logs, targets = votes()
    models = [Table(logs[0]), Table(logs[1][:, [2, 0]]), Table(logs[2][:, [3, 1, 0]])]
    ensemble = Ensemble(models, combine=kind, classes=[list("abcd"), list("ca"), list("dba")])
    x = torch.arange(len(targets))
    record = ensemble.calibrate((x, targets), progress=False)
    assert record.after["log_loss"] < record.before["log_loss"] < math.inf
    torch.testing.assert_close(ensemble(x).exp().sum(1), torch.ones(len(x)))


def test_the_same_classes_in_another_order_fit_products_too() -> None:
    z = torch.randn(5, 3)
    ensemble = Ensemble([Table(z), Table(z[:, [2, 0, 1]])], combine="logits", classes=[list("abc"), list("cab")])
    assert torch.equal(ensemble(torch.arange(5)), z)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"combine": "logits", "classes": [["a", "b"], ["a", "c"]]}, OptionError, "'logits' for networks with different"),
        ({"classes": [["a", "b"]]}, OptionError, "classes: 1 lists for 2 networks"),
        ({"classes": [None, ["a", "b"]]}, OptionError, r"classes\['x'\]: got None; a list of names"),
        ({"classes": [["a", "a"], "ab"]}, OptionError, r"\['x'\]: a name occurs twice.*\n.*\['y'\]: got 'ab'; a list of"),
        ({"classes": {"x": ["a"], "z": ["b"]}}, OptionError, r"\['y'\]: missing.*\n.*\['z'\]: no model has this name"),
        ({"classes": [["a", "b"], ["a"]]}, ModelError, r"classes\['y'\]: 1 names for predictions \(2, 2\); one each"),
    ],
)
def test_class_names_that_don_t_fit_are_refused(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        Ensemble({"x": Table(torch.eye(2)), "y": Table(torch.eye(2))}, **options)(torch.arange(2))


def test_greedy_draws_networks_for_every_class_however_many_that_takes() -> None:
    spaces = ["ab", "cd", "ef"]
    targets = torch.arange(60) % 6
    logs = torch.full((3, 60, 6), -math.inf)
    for k in range(3):
        logs[k, :, 2 * k : 2 * k + 2] = torch.randn(60, 2).log_softmax(1)
    assert (learn("greedy", logs, targets)["weight"] > 0).all()
    models = [Table(logs[k, :, 2 * k : 2 * k + 2]) for k in range(3)]
    record = Ensemble(models, combine="greedy", classes=[list(s) for s in spaces]).calibrate(
        (torch.arange(60), targets), progress=False
    )
    assert record.after["log_loss"] < 5


def test_networks_that_end_in_a_softmax_are_refused() -> None:
    models, x, targets = tables()
    soft = [nn.Sequential(models[0], nn.Softmax(1)), models[1], nn.Sequential(models[2], nn.Softmax(1))]
    ensemble = Ensemble(dict(zip("abc", soft, strict=True)))
    said = r"models\['a'\]: gives probabilities, not logits; the network without.*\nmodels\['c'\]: gives"
    with pytest.raises(ModelError, match=said):
        ensemble.calibrate((x, targets), progress=False)
    assert ensemble.numbers == {}

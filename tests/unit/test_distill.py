"""Distillation: the loss against slow float64 references from the papers, what is kept, and what comes of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interfuse import Ensemble, ModelFusion, distill, fit
from interfuse.ensemble.combine import Labels
from interfuse.errors import DataError, ModelError, OptionError
from interfuse.training.teaching import Lesson, target

QUIET: dict[str, Any] = {"progress": False, "weight_decay": 0.0}


def network(seed: int = 0, width: int = 8, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, classes))


def data(n: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


X, Y = data()


def kl(z: Tensor, p: Tensor, temperature: float) -> float:
    """T^2 times the mean over examples of sum_c p_c log(p_c / q_c), by loops."""
    total = 0.0
    for row, wanted in zip(z.detach().double(), p.double(), strict=True):
        q = torch.softmax(row / temperature, 0)
        total += sum(float(w * (w / s).log()) for w, s in zip(wanted, q, strict=True) if w > 0)
    return temperature**2 * total / len(z)


def value_at_start(teachers: Any, student: nn.Module, train: Any, **options: Any) -> float:
    record = distill(teachers, student, train, train, epochs=0, **{**QUIET, **options})
    return record.history[0]["validation_loss"]


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.0, 0.5), (5.0, 0.3), (2.0, 1.0)])
def test_the_loss_is_hinton_s(temperature: float, alpha: float) -> None:
    teacher, student = network(1), network(2)
    z = student(X).detach()
    task = float(nn.functional.cross_entropy(z, Y))
    expected = alpha * task + (1 - alpha) * kl(z, (teacher(X).detach() / temperature).softmax(1), temperature)
    found = value_at_start(teacher, student, (X, Y), temperature=temperature, alpha=alpha)
    assert found == pytest.approx(expected, rel=1e-5)
    bare = value_at_start(teacher, student, X, temperature=temperature, alpha=alpha)
    assert bare == pytest.approx(kl(z, (teacher(X).detach() / temperature).softmax(1), temperature), rel=1e-5)


def by_hand(outputs: list[np.ndarray], labels: np.ndarray, temperature: float) -> np.ndarray:
    """The confidence-weighted target of 2201.00007, example by example."""
    result = np.zeros_like(outputs[0])
    for i, label in enumerate(labels):
        p = [np.exp(z[i]) / np.exp(z[i]).sum() for z in outputs]
        losses = [-np.log(q[label]) for q in p]
        for k, z in enumerate(outputs):
            weight = (1 - np.exp(losses[k]) / np.exp(losses).sum()) / (len(outputs) - 1)
            soft = np.exp(z[i] / temperature)
            result[i] += weight * soft / soft.sum()
    return result


def test_several_teachers_are_weighted_as_in_the_paper() -> None:
    outputs = [network(k)(X).detach().double() * 3 for k in range(3)]
    lesson = Lesson(outputs, labels=Y)
    expected = by_hand([z.numpy() for z in outputs], Y.numpy(), 2.0)
    torch.testing.assert_close(target(lesson, "confidence", 2.0, Labels()), torch.from_numpy(expected))
    mean = sum((z / 2).softmax(1) for z in outputs) / 3
    torch.testing.assert_close(target(lesson, "mean", 2.0, Labels()), mean)
    sure = [torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)]
    unlabelled = target(Lesson(sure), "confidence", 1.0, Labels())
    assert unlabelled[0, 0] > target(Lesson(sure), "mean", 1.0, Labels())[0, 0]


def test_teachers_of_tasks_teach_what_they_know() -> None:
    spaces = Labels.join([["a", "b"], ["c", "b"]])
    outputs = [torch.randn(3, 2), torch.randn(3, 2)]
    found = target(Lesson(outputs, labels=torch.tensor([0, 1, 2])), "per_task", 1.0, spaces)
    p, q = (z.softmax(1) for z in outputs)
    zero = torch.zeros(())
    expected = torch.stack(
        [
            torch.stack([p[0, 0], p[0, 1], zero]),
            torch.stack([p[1, 0], p[1, 1] + q[1, 1], q[1, 0]]) / torch.tensor(2.0),
            torch.stack([zero, q[2, 1], q[2, 0]]),
        ]
    )
    torch.testing.assert_close(found, expected)
    uncertain = target(Lesson(outputs, labels=torch.tensor([0, 1, 2])), "confidence", 1.0, spaces)
    torch.testing.assert_close(uncertain[0], expected[0])  # who doesn't know the label has no weight


def test_teachers_with_classes_of_their_own_teach_one_student() -> None:
    teachers, student = [network(1, classes=2), network(3, classes=2)], network(2)
    names = [["low", "middle"], ["middle", "high"]]
    outputs = [teacher(X).detach() for teacher in teachers]
    for combine in ("mean", "confidence", "per_task"):
        wanted = target(Lesson(outputs, labels=Y), combine, 2.0, Labels.join(names))
        torch.testing.assert_close(wanted.sum(1), torch.ones(len(X)))
        found = value_at_start(teachers, student, (X, Y), alpha=0.0, combine=combine, classes=names)
        assert found == pytest.approx(kl(student(X), wanted, 2.0), rel=1e-5)


def test_an_alpha_of_one_is_plain_training() -> None:
    one, two = network(2), network(2)
    distill(network(1), one, (X, Y), alpha=1.0, epochs=2, **QUIET)
    fit(two, (X, Y), epochs=2, **QUIET)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["tensor", "pair", "batches", "keywords"])
def test_a_student_comes_to_agree_with_its_teacher(form: str) -> None:
    """Rows and what is taught for them stay together, however the data come: else nothing could be learned."""

    class Keywords(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    teacher, student = network(1), network(2, 16)
    with torch.no_grad():
        list(teacher.parameters())[2].mul_(8)
    forms: dict[str, Any] = {
        "tensor": X,
        "pair": (X, Y),
        "batches": [(X[:30], Y[:30]), (X[30:], Y[30:])],
        "keywords": [{"x": X[:30]}, {"x": X[30:]}],
    }
    models = [Keywords(m) for m in (teacher, student)] if form == "keywords" else [teacher, student]
    before = copy.deepcopy(teacher.state_dict())
    record = distill(models[0], models[1], forms[form], alpha=0.0, epochs=15, learning_rate=0.1, **QUIET)
    assert record.agreement > 0.9
    assert (record.agreement_on, record.labelled) == ("train", form in ("pair", "batches"))
    assert not student.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_teachers_run_once_over_each_data_set() -> None:
    teacher = Ensemble([network(1), network(3)])
    seen: list[int] = []
    teacher.register_forward_hook(lambda _m, args, _r: seen.append(len(args[0])))
    record = distill(teacher, network(2), (X, Y), data(40, seed=1), epochs=3, **QUIET)
    assert sum(seen) == 96 + 40
    assert record.metric == "accuracy"
    assert record.agreement_on == "validation"
    assert len(record.history) == 4


def test_a_student_may_be_a_teacher() -> None:
    model = network(1)
    outputs = model(X).detach()
    record = distill(model, model, X, epochs=2, **QUIET)
    assert record.agreement == 1.0
    torch.testing.assert_close(model(X), outputs, atol=0.05, rtol=0.05)


def test_a_fusion_s_frozen_networks_are_still_computed_once(tmp_path: Any) -> None:
    fusion = ModelFusion([network(2), network(3)], head=3, example=X)
    record = distill(network(1), fusion, (X, Y), data(40, seed=1), epochs=2, cache=tmp_path, **QUIET)
    assert record.cached, record.why_not
    assert record.start in ("Sequential", "Sequential_2", "mean")


def test_hints_bring_the_student_s_features_near() -> None:
    teacher, student = network(1), network(2, 6)
    keys = list(student.state_dict())
    h = teacher[:2](X).detach()

    def unexplained() -> float:
        """The share of the teacher's features that no linear map of the student's gives."""
        own = torch.cat([student[:2](X).detach(), torch.ones(len(X), 1)], 1).double()
        rest = h.double() - own @ torch.linalg.lstsq(own, h.double()).solution
        return float(rest.square().sum() / (h - h.mean(0)).double().square().sum())

    before = unexplained()
    options: dict[str, Any] = {"epochs": 20, "learning_rate": 0.03, "hint_weight": 10.0}
    record = distill(teacher, student, X, hints={"1": "1"}, **options, **QUIET)
    assert unexplained() < 0.8 * before
    assert list(student.state_dict()) == keys
    assert record.metric == "agreement"
    both = distill({"a": teacher, "b": network(3)}, network(4), X, hints={"b": {"0": "0"}}, epochs=1, **QUIET)
    assert both.history[0]["train_loss"] > 0


def test_numbers_are_taught_by_the_mean_of_the_teachers() -> None:
    teachers, student = [network(1, classes=1), network(3, classes=1)], network(2, classes=1)
    wanted = ((teachers[0](X) + teachers[1](X)) / 2).detach()
    labels = X.sum(1)
    expected = 0.5 * (student(X).detach() - wanted).square().mean() + 0.5 * (student(X).detach()[:, 0] - labels).square().mean()
    assert value_at_start(teachers, student, (X, labels)) == pytest.approx(float(expected), rel=1e-5)
    record = distill(teachers, student, X, alpha=0.0, epochs=15, learning_rate=0.05, **QUIET)
    assert record.agreement == pytest.approx(float((student(X).detach() - wanted).square().mean()), rel=1e-4)
    assert record.agreement < 0.2 * float(wanted.var())


def test_data_that_change_are_refused() -> None:
    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> Any:
            return torch.randn(4), 0

    with pytest.raises(DataError, match=r"train: differ each time they are read .*random"):
        distill(network(1), network(2), Noisy(), **QUIET)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"temperature": 0, "alpha": 2}, OptionError, r"temperature: got 0; a number above 0\nalpha: got 2"),
        ({"combine": "median"}, OptionError, "combine: got 'median'; did you mean 'mean'|combine: got 'median'; allowed"),
        ({"combine": "per_task"}, OptionError, "classes: missing; combine='per_task' needs"),
        ({"classes": [["a"]]}, OptionError, "classes: 1 lists for 2 networks"),
        (
            {"classes": {"Sequential": ["a", "a", "b"]}},
            OptionError,
            r"\['Sequential_2'\]: missing.*\n.*'\]: a name occurs twice",
        ),
        ({"hints": ["0"]}, OptionError, r"hints: got \['0'\]; \{teacher's module"),
        ({"hints": {"Sequential": "0"}}, OptionError, r"hints\['Sequential'\]: got '0'; \{teacher's module"),
        ({"alpha": 2, "epochs": -1, "loss": "ce"}, OptionError, r"(?s)alpha: got 2.*\nepochs: got -1.*\nloss: got 'ce'"),
        ({"train": (X, Y[:, None])}, DataError, r"train: labels of shape \(\d+, 1\); class numbers \(n,\)"),
        ({"hints": {"Sequential": {"9": "0"}}}, OptionError, "hints: Sequential has no module at '9'"),
        ({"hints": {"x": {"0": "0"}}}, OptionError, r"hints\['x'\]: no teacher has this name"),
        ({"hints": {"Sequential": {"0": "0"}}, "lora": 2}, OptionError, "lora: beside hints"),
        ({"student": network(2, classes=4)}, ModelError, r"student: its outputs are \(64, 4\), the teachers' target is"),
        ({"teachers": [network(1), network(1, classes=2)]}, DataError, r"teachers: they give \[3, 2\] classes"),
        (
            {"teachers": [network(1), nn.Sequential(network(2), nn.Softmax(1))]},
            ModelError,
            r"teachers\['Sequential_2'\]: gives probabilities, not logits; the network without its softmax",
        ),
        ({"batch_size": 0}, OptionError, "batch_size: got 0; a whole number from 1 up"),
        ({"train": (X, Y + 5)}, DataError, "train: labels from 5 to 7; 0 to 2"),
        ({"train": X, "metric": "accuracy"}, DataError, "train: has no labels to measure a metric by"),
        ({"epoch": 3}, OptionError, "epoch: unknown option; did you mean 'epochs'"),
    ],
)
def test_what_doesn_t_fit_is_refused(options: Any, error: Any, match: str) -> None:
    given = {"teachers": [network(1), network(3)], "student": network(2), "train": (X, Y), **QUIET, **options}
    before = copy.deepcopy(given["student"].state_dict())
    with pytest.raises(error, match=match):
        distill(**given)
    assert all(torch.equal(before[key], value) for key, value in given["student"].state_dict().items())

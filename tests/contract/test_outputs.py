"""Every way of combining predictions, and of teaching them to a student, keeps the same promises.

A kind of ensemble: it is a distribution over the classes, example by example; it is one network where there is one, and where
all are equal; networks' order and classes' order don't matter; what it learns is refused before it is learned, lowers the loss
that it is learned by, is the same each time, and is saved; no network is changed. A distillation: teachers aren't changed, a
student that is its own teacher has nothing to learn, alpha's ends are what they say, and it is the same each time.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.ensemble.combine import COMBINE
from interfuse.errors import DataError, ModelError, OptionError
from interfuse.registry import methods
from interfuse.training.teaching import COMBINE as TEACHING

CLASSES = 4


class Claims(NamedTuple):
    """What a kind promises beyond what all do.

    alone: one network, or equal ones, give that network's probabilities. keeps: a single network's predicted class is kept.
    bound: the kind whose log loss on the data that it learned from it doesn't exceed. without: whether an ensemble without
    a network is the ensemble of the others.
    """

    alone: bool = True
    keeps: bool = True
    bound: str = ""
    without: bool = True


CLAIMS = {
    "probabilities": Claims(),
    "logits": Claims(),
    "log_probabilities": Claims(),
    "vote": Claims(alone=False),
    "weighted": Claims(bound="probabilities", without=False),
    "greedy": Claims(without=False),
    "temperature": Claims(alone=False, bound="probabilities", without=False),
    "stacking": Claims(alone=False, keeps=False, bound="log_probabilities", without=False),
}
LEARNED = [kind for kind in COMBINE if itf.Ensemble.learns(kind)]
PLAIN = [kind for kind in COMBINE if kind not in LEARNED]


def network(seed: int, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, classes)).eval()


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    noise = 0.5 * torch.randn(count, CLASSES, generator=generator)
    return x, (x[:, :CLASSES] + noise).argmax(1)


def trained(seed: int) -> nn.Module:
    """A network that knows something: the classes are told by single inputs."""
    made = network(seed)
    x, y = examples(60, 100 + seed)
    optimizer = torch.optim.Adam(made.parameters(), 0.03)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(x), y).backward()
        optimizer.step()
    return made.requires_grad_(True)


NETWORKS = [trained(seed) for seed in range(3)]
X, Y = examples(40, 0)
VALIDATION = examples(100, 1)


@functools.cache
def of_all(kind: str) -> itf.Ensemble:
    """That of all networks, made once."""
    return ensemble(kind, NETWORKS)


def ensemble(kind: str, networks: Any = None, **options: Any) -> itf.Ensemble:
    """One of that kind, which has learned what it learns."""
    if networks is None:
        return copy.deepcopy(of_all(kind))
    made = itf.Ensemble(networks, combine=kind, **options)  # type: ignore[arg-type]
    if itf.Ensemble.learns(kind):
        made.calibrate(VALIDATION, folds=2, progress=False)
    return made.eval()


def probabilities(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x).softmax(1)
    return found


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(VALIDATION[0]).double(), VALIDATION[1]))


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def test_every_method_and_kind_is_here() -> None:
    assert [method.name for method in methods("outputs")] == ["ensemble", "distill"]
    assert set(CLAIMS) == set(COMBINE)


# --- ensembles ---


@pytest.mark.parametrize("kind", COMBINE)
def test_the_result_is_a_distribution_for_each_example_by_itself(kind: str) -> None:
    model = ensemble(kind)
    with torch.no_grad():
        whole = model(X)
        single = torch.cat([model(X[i : i + 1]) for i in range(len(X))])
    assert whole.shape == (len(X), CLASSES)
    assert whole.isfinite().all()
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=1e-5)
    if kind != "logits":
        torch.testing.assert_close(whole.logsumexp(1), torch.zeros(len(X)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", COMBINE)
def test_one_network_and_equal_networks_are_that_network(kind: str) -> None:
    for count in (1, 3):
        made = probabilities(ensemble(kind, [NETWORKS[0]] * count))
        alone = probabilities(NETWORKS[0])
        if CLAIMS[kind].alone:
            torch.testing.assert_close(made, alone, atol=1e-5, rtol=1e-4)
        if CLAIMS[kind].keeps:
            assert torch.equal(made.argmax(1), alone.argmax(1))


@pytest.mark.parametrize("kind", COMBINE)
def test_the_order_of_networks_does_not_matter(kind: str) -> None:
    turned = ensemble(kind, NETWORKS[::-1])
    torch.testing.assert_close(probabilities(turned), probabilities(ensemble(kind)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", COMBINE)
def test_the_order_of_a_network_s_classes_does_not_matter(kind: str) -> None:
    names, order = ["p", "q", "r", "s"], [2, 0, 3, 1]
    turned: Any = copy.deepcopy(NETWORKS[1])
    turned[2].weight.data, turned[2].bias.data = turned[2].weight.data[order], turned[2].bias.data[order]
    joined = ensemble(kind, [NETWORKS[0], turned, NETWORKS[2]], classes=[names, [names[i] for i in order], names])
    assert joined.classes == tuple(names)
    torch.testing.assert_close(probabilities(joined), probabilities(ensemble(kind)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in COMBINE if kind not in ("logits", "log_probabilities")])
def test_a_class_that_a_network_does_not_know_has_nothing_from_it(kind: str) -> None:
    fewer: Any = copy.deepcopy(NETWORKS[1])
    fewer[2] = nn.Linear(10, 2)
    spaces = [["p", "q", "r", "s"], ["s", "q"]]
    made = ensemble(kind, [NETWORKS[0], fewer], classes=spaces)
    assert probabilities(made).isfinite().all()
    if kind == "probabilities":
        known = probabilities(NETWORKS[0]) / 2
        torch.testing.assert_close(probabilities(made)[:, [0, 2]], known[:, [0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", COMBINE)
def test_no_network_is_changed(kind: str) -> None:
    before = [bits(network) for network in NETWORKS]
    model = ensemble(kind)
    model.calibrate(VALIDATION, folds=2, progress=False)
    model.train()
    assert all(all(map(torch.equal, old, bits(network))) for old, network in zip(before, NETWORKS, strict=True))
    assert all(parameter.requires_grad for network in NETWORKS for parameter in network.parameters())
    assert not any(network.training for network in NETWORKS)


@pytest.mark.parametrize("kind", LEARNED)
def test_what_is_learned_is_refused_before_and_lowers_its_loss(kind: str) -> None:
    with pytest.raises(ModelError, match=f"'{kind}' hasn't been learned yet"):
        itf.Ensemble(NETWORKS, combine=kind)(X)  # type: ignore[arg-type]
    made = loss(ensemble(kind))
    if CLAIMS[kind].bound:
        assert made <= loss(ensemble(CLAIMS[kind].bound)) + 1e-6
    if kind in ("weighted", "greedy"):
        assert made <= min(map(loss, NETWORKS)) + 1e-6


@pytest.mark.parametrize("kind", PLAIN)
def test_one_temperature_lowers_the_loss_and_keeps_every_class(kind: str) -> None:
    plain, calibrated = ensemble(kind), ensemble(kind)
    record = calibrated.calibrate(VALIDATION, folds=2, progress=False)
    assert loss(calibrated) <= loss(plain) + 1e-6
    assert torch.equal(probabilities(calibrated).argmax(1), probabilities(plain).argmax(1))
    assert record.examples == len(VALIDATION[1])


@pytest.mark.parametrize("kind", COMBINE)
def test_it_is_the_same_each_time_and_saved_with_what_it_learned(kind: str, tmp_path: Path) -> None:
    first, second = ensemble(kind), ensemble(kind, NETWORKS)
    for model in (first, second):
        model.calibrate(VALIDATION, folds=2, progress=False)
    assert set(first.numbers) == set(second.numbers)
    assert all(torch.equal(value, second.numbers[name]) for name, value in first.numbers.items())
    itf.save(first, tmp_path / "out")
    again = itf.load(tmp_path / "out", [network(9 + k) for k in range(3)])
    assert torch.equal(again(X), first(X))


@pytest.mark.parametrize("kind", COMBINE)
def test_a_network_without_its_input_leaves_its_share_to_the_others(kind: str) -> None:
    named = dict(zip("abc", NETWORKS, strict=True))
    model = ensemble(kind, named)
    given = {"a": X, "b": None, "c": X}
    if kind == "stacking":
        with pytest.raises(ModelError, match=r"None for \['b'\]"):
            model(given)
        return
    with torch.no_grad():
        made = model(given).softmax(1)
    torch.testing.assert_close(made.sum(1), torch.ones(len(X)), atol=1e-5, rtol=0)
    if CLAIMS[kind].without:
        torch.testing.assert_close(made, probabilities(ensemble(kind, {"a": named["a"], "c": named["c"]})))


# --- students ---

QUIET: dict[str, Any] = {"progress": False, "epochs": 2, "learning_rate": 0.01, "batch_size": 16}
SPACES = [["p", "q", "r", "s"]] * 3


def options_of(combine: str) -> dict[str, Any]:
    return {"combine": combine, **({"classes": SPACES} if combine == "per_task" else {})}


def student(combine: str, **options: Any) -> tuple[nn.Module, Any]:
    """A student that has been taught by all networks, and the record."""
    made = network(20)
    teachers, train = options.pop("teachers", NETWORKS), options.pop("train", (X, Y))
    record = itf.distill(teachers, made, train, **{**QUIET, **options_of(combine), **options})
    return made, record


@pytest.mark.parametrize("combine", TEACHING)
def test_a_student_is_changed_and_no_teacher_is(combine: str) -> None:
    before = [bits(teacher) for teacher in NETWORKS]
    made, record = student(combine)
    assert not all(map(torch.equal, bits(made), bits(network(20))))
    assert all(all(map(torch.equal, old, bits(teacher))) for old, teacher in zip(before, NETWORKS, strict=True))
    assert not any(teacher.training for teacher in NETWORKS)
    assert 0 <= record.agreement <= 1


@pytest.mark.parametrize("combine", TEACHING)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(combine: str) -> None:
    made = copy.deepcopy(NETWORKS[0])
    options = {**QUIET, **options_of(combine), "epochs": 0, "alpha": 0.0}
    if combine == "per_task":
        options["classes"] = SPACES[:1]
    record = itf.distill(NETWORKS[0], made, (X, Y), (X, Y), **options)
    assert record.history[0]["validation_loss"] == pytest.approx(0, abs=1e-6)
    assert record.agreement == 1


@pytest.mark.parametrize("combine", TEACHING)
def test_equal_teachers_are_one_and_their_order_does_not_matter(combine: str) -> None:
    options = {"classes": SPACES[:1]} if combine == "per_task" else {}
    alone, _ = student(combine, teachers=NETWORKS[:1], **options)
    equal, _ = student(combine, teachers=[NETWORKS[0]] * 3)
    turned, straight = student(combine, teachers=NETWORKS[::-1])[0], student(combine)[0]
    for one, other in ((alone, equal), (turned, straight)):
        torch.testing.assert_close(probabilities(one), probabilities(other), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("combine", TEACHING)
def test_alpha_1_is_plain_training(combine: str) -> None:
    made, _ = student(combine, alpha=1.0)
    plain = network(20)
    itf.fit(plain, (X, Y), **QUIET)
    torch.testing.assert_close(probabilities(made), probabilities(plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combine", ["mean", "confidence"])
def test_alpha_0_needs_no_labels(combine: str) -> None:
    made, record = student(combine, train=X, alpha=0.0)
    assert not record.labelled
    other, _ = student(combine, train=X, alpha=1.0)  # there is no task loss to weigh
    assert all(map(torch.equal, bits(made), bits(other)))
    if combine == "mean":
        labelled, _ = student(combine, alpha=0.0)
        assert all(map(torch.equal, bits(made), bits(labelled)))


def test_teachers_of_tasks_need_labels_and_classes() -> None:
    with pytest.raises(DataError, match="no labels"):
        student("per_task", train=X)
    with pytest.raises(OptionError, match="classes"):
        student("per_task", classes=None)


@pytest.mark.parametrize("combine", TEACHING)
def test_a_student_is_the_same_each_time_and_another_with_another_seed(combine: str) -> None:
    first, second, other = (student(combine, seed=seed)[0] for seed in (0, 0, 1))
    assert all(map(torch.equal, bits(first), bits(second)))
    assert not all(map(torch.equal, bits(first), bits(other)))

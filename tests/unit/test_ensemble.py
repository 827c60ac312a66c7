"""Ensembles: the mean of probabilities or of outputs, and what can't be averaged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse import Ensemble, registry
from interfuse.errors import ModelError, OptionError
from interfuse.modules.members import unique_names

X = torch.linspace(-2, 2, 12).view(3, 4)


class Gives(nn.Module):
    """Whatever shape its head gives, reshaped; `wrap` puts it into an output."""

    def __init__(self, *shape: int, wrap: Any = lambda x: x) -> None:
        super().__init__()
        self.shape, self.wrap = shape, wrap
        self.head = nn.Linear(4, int(torch.tensor(shape).prod()))

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(x).view(len(x), *self.shape))


def test_probabilities_are_averaged() -> None:
    models = [Gives(3), Gives(3, wrap=lambda x: {"logits": x}), Gives(3, wrap=lambda x: (x, None))]
    expected = torch.stack([m.head(X).softmax(-1) for m in models]).mean(0)
    result = Ensemble(models)(X)
    torch.testing.assert_close(result.softmax(-1), expected)
    torch.testing.assert_close(result.exp(), expected)  # log-probabilities


def test_certain_members_stay_finite() -> None:
    certain = Gives(3, wrap=lambda x: torch.tensor([[1e4, 0.0, -1e4]] * 3))
    result = Ensemble([certain, Gives(3)])(X)
    assert result.isfinite().all()
    models = [Gives(3), Gives(3)]
    low = Ensemble(models).half()(X.half())
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), Ensemble(models)(X), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("shape", [(3,), (1,), (), (3, 2)])
def test_outputs_are_averaged_as_they_are_for_logits(shape: tuple[int, ...]) -> None:
    models = [Gives(*shape), Gives(*shape)]
    torch.testing.assert_close(Ensemble(models, combine="logits")(X), (models[0](X) + models[1](X)) / 2)


@pytest.mark.parametrize("shape", [(1,), (), (3, 2)])
def test_probabilities_need_classes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"combine: got 'probabilities' for predictions \(3.*combine='logits'"):
        Ensemble([Gives(*shape), Gives(*shape)])(X)


def test_members_must_agree_on_the_classes() -> None:
    with pytest.raises(ModelError, match=r"predictions of different shapes: a \(3, 3\), b \(3, 2\)"):
        Ensemble({"a": Gives(3), "b": Gives(2)})(X)


def test_a_member_without_inputs_is_left_out() -> None:
    models = {"a": Gives(3), "b": Gives(3), "c": Gives(3)}
    result = Ensemble(models)({"a": X, "b": None, "c": X + 1})
    expected = (models["a"](X).softmax(-1) + models["c"](X + 1).softmax(-1)) / 2
    torch.testing.assert_close(result.exp(), expected)
    with pytest.raises(ModelError, match=r"inputs\['c'\]: missing"):
        Ensemble(models)({"a": X, "b": X})


def test_one_member_is_that_member() -> None:
    model = Gives(3)
    torch.testing.assert_close(Ensemble([model])(X), model(X).log_softmax(-1))
    assert torch.equal(Ensemble([model], combine="logits")(X), model(X))


def test_an_unknown_way_of_combining_is_refused() -> None:
    with pytest.raises(OptionError, match=r"combine: got 'logit'; did you mean 'logits'\?"):
        Ensemble([Gives(3)], combine="logit")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="combine: got 'votes'; did you mean 'vote'"):
        registry.find("ensemble", "outputs").make([Gives(3)], combine="votes")
    with pytest.raises(OptionError, match="got 'votes'"):
        registry.find("ensemble", "outputs").check({"combine": "votes"})


def test_members_are_copies_unless_asked_otherwise() -> None:
    model = Gives(3)
    ensemble = Ensemble([model])
    with torch.no_grad():
        ensemble.backbones[0].head.weight.zero_()  # type: ignore[union-attr, operator]
    assert model.head.weight.abs().sum() > 0
    assert Ensemble([model], copy=False).backbones[0] is model


def test_an_ensemble_of_ensembles_and_its_copies() -> None:
    models = [Gives(3), Gives(3), Gives(3)]
    nested = Ensemble([Ensemble(models[:2]), models[2]])
    inner = (models[0](X).softmax(-1) + models[1](X).softmax(-1)) / 2
    torch.testing.assert_close(nested(X).exp(), (inner + models[2](X).softmax(-1)) / 2)
    assert torch.equal(copy.deepcopy(nested)(X), nested(X))
    assert nested.names == ("Ensemble", "Gives")


def test_gradients_reach_every_member() -> None:
    ensemble = Ensemble([Gives(3), Gives(3)])
    nn.functional.cross_entropy(ensemble(X), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ensemble.parameters())


@pytest.mark.parametrize(
    ("models", "match"),
    [
        ([], "models: none given; give at least one network"),
        ({}, "models: none given"),
        ("resnet", "models: got str; a list or a dict of networks"),
        (nn.Linear(1, 1), "models: got Linear"),
        ([nn.Linear(1, 1), 3], r"models\[1\]: got int"),
        ({"a": None, "b": 1.5}, r"models\['a'\]: got NoneType.*\n.*models\['b'\]: got float"),
    ],
)
def test_what_is_no_list_of_networks_is_refused(models: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        Ensemble(models)


def test_a_network_that_cannot_be_copied_says_the_way_out() -> None:
    model = nn.Linear(4, 3)
    model.cached = model.weight * 2
    with pytest.raises(ModelError, match=r"models\[0\]: Linear can't be copied .*copy=False"):
        Ensemble([model])
    assert Ensemble([model], copy=False)(X).shape == (3, 3)


def test_names_of_a_list_are_unique() -> None:
    class Linear_2(nn.Linear):
        pass

    line, other = nn.Linear(1, 1), Linear_2(1, 1)
    assert unique_names([line, nn.ReLU(), line, line]) == ("Linear", "ReLU", "Linear_2", "Linear_3")
    assert unique_names([other, line, line]) == ("Linear_2", "Linear", "Linear_3")
    assert len(set(unique_names([line, line, other, other]))) == 4

"""Inputs: how networks are called, what they give back, and what a batch is made of."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from interfuse.errors import DataError, ModelError
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import Composite, batch_size, call, inputs_by_model, move, prediction, split_batch, tensors_of

X, Y = torch.arange(6.0).view(3, 2), torch.ones(3, 2)


class Two(nn.Module):
    def forward(self, image: Tensor, *, text: Tensor, scale: float = 1.0) -> Tensor:
        return image + text * scale


class Anything(nn.Module):
    def forward(self, **given: Tensor) -> list[str]:
        return list(given)


class Whole(Composite):
    def forward(self, inputs: Any) -> Any:
        return inputs


def test_networks_are_called_with_a_tensor_arguments_or_keywords() -> None:
    assert torch.equal(call(nn.Identity(), X), X)
    layer = nn.Bilinear(2, 2, 1)
    assert torch.equal(call(layer, (X, Y)), layer(X, Y))
    assert torch.equal(call(layer, [X, Y]), layer(X, Y))
    assert torch.equal(call(Two(), {"image": X, "text": Y}), X + Y)
    assert torch.equal(call(Two(), {"image": X, "text": Y, "scale": 2.0}), X + 2 * Y)


def test_keywords_that_a_network_does_not_know_are_left_out() -> None:
    assert torch.equal(call(Two(), {"image": X, "labels": Y, "text": Y}), X + Y)
    assert call(Anything(), {"a": X, "b": Y}) == ["a", "b"]
    assert torch.equal(call(Two(), UserDict({"image": X, "text": Y})), X + Y)


def test_keywords_that_a_network_needs_and_lacks_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"b: needs the inputs \['text'\], but the batch holds \['image', 'mask'\]"):
        call(Two(), {"image": X, "mask": Y}, "b")
    with pytest.raises(ModelError, match=r"needs the inputs \['image', 'text'\], but the batch holds \[\]"):
        call(Two(), {})


def test_a_composite_gets_its_inputs_as_one() -> None:
    for inputs in (X, (X, Y), {"a": X}):
        assert call(Whole(), inputs) is inputs


def test_every_model_gets_the_inputs_or_its_own() -> None:
    assert inputs_by_model(["a", "b"], X) == [X, X]
    keywords = {"input_ids": X}
    assert inputs_by_model(["a", "b"], keywords) == [keywords, keywords]
    assert inputs_by_model(["a", "b"], {"b": Y, "a": X}) == [X, Y]
    assert inputs_by_model(["a", "b"], {"a": None, "b": Y}) == [None, Y]


def test_inputs_by_name_must_name_every_model_and_no_other() -> None:
    with pytest.raises(ModelError) as caught:
        inputs_by_model(["image", "text"], {"image": X, "txt": Y})
    assert [problem.path for problem in caught.value.problems] == ["inputs['text']", "inputs['txt']"]
    assert "did you mean 'text'?" in str(caught.value)
    with pytest.raises(ModelError, match="every model's input is None"):
        inputs_by_model(["a", "b"], {"a": None, "b": None})


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    "output",
    [
        X,
        (X, Y),
        [X, Y],
        Named(X, Y),
        {"hidden": Y, "logits": X},
        {"hidden": Y, "out": X, "other": Y},
        {"only": X},
        {"loss": None, "only": X},
        SimpleNamespace(logits=X, hidden=Y),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "logits", "out", "single", "single tensor", "object"],
)
def test_the_prediction_is_found_in_what_a_network_gives(output: Any) -> None:
    assert prediction(output) is X


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ({"a": X, "b": Y}, r"m: its output \['a', 'b'\] holds no prediction"),
        ((), "its output tuple holds no prediction"),
        (("text", X), "its output tuple"),
        (None, "its output NoneType"),
        (SimpleNamespace(logits=3), "its output SimpleNamespace"),
    ],
)
def test_an_output_without_a_prediction_is_refused(output: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        prediction(output, "m")


def test_batches_are_split_into_inputs_and_targets() -> None:
    target = torch.tensor([0, 1, 2])
    for pair in ((X, target), [X, target], (X, [0, 1, 2])):
        inputs, found = split_batch(pair)
        assert inputs is X
        assert found is not None
        assert torch.equal(found, target)
    inputs, found = split_batch((X, Y, target))
    assert inputs == (X, Y)
    assert found is target
    assert split_batch(X) == (X, None)
    assert split_batch((X,)) == (X, None)
    assert split_batch((X, None)) == (X, None)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_targets_are_taken_out_of_a_mapping(key: str) -> None:
    batch = {"input_ids": X, key: [1, 2, 3]}
    inputs, target = split_batch(batch)
    assert list(inputs) == ["input_ids"]
    assert target is not None
    assert target.tolist() == [1, 2, 3]
    assert key in batch  # the batch itself stays as it was
    assert split_batch({"input_ids": X, key: None}) == ({"input_ids": X}, None)
    assert split_batch({"input_ids": X}) == ({"input_ids": X}, None)


def test_everything_in_a_batch_is_moved_and_nothing_else_changes() -> None:
    batch = {"a": (X, [Y, "text"]), "b": Named(X, Y), "c": None, "d": 3}
    moved = move(batch, "meta")
    assert [(path, t.device.type) for path, t in tensors_of(moved)] == [
        (path, "meta") for path in (".a[0]", ".a[1][0]", ".b[0]", ".b[1]")
    ]
    assert isinstance(moved["b"], Named)
    assert (moved["a"][1][1], moved["c"], moved["d"]) == ("text", None, 3)
    assert type(moved["a"]) is tuple
    assert move(UserDict(batch), "meta").keys() == batch.keys()
    assert X.device.type == "cpu"


def test_the_size_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert batch_size(X) == batch_size((X, torch.zeros(9))) == batch_size({"a": None, "b": {"c": X}}) == 3
    assert batch_size((torch.zeros(()), X)) == 3
    with pytest.raises(DataError, match="no tensor with a batch dimension in dict"):
        batch_size({"a": torch.zeros(())})


class Pair(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if left.dtype != torch.float32:
            raise TypeError("of the network's own")
        return left + right


def test_inputs_that_a_network_lacks_by_position_are_named() -> None:
    with pytest.raises(ModelError, match=r"two: takes the inputs \['left', 'right'\], but gets 1 by position"):
        call(Pair(), torch.ones(2), "two")
    with pytest.raises(ModelError, match="but gets 3 by position"):
        call(Pair(), (torch.ones(2),) * 3, "two")
    with pytest.raises(TypeError, match="of the network's own"):
        call(Pair(), (torch.ones(2, dtype=torch.double),) * 2, "two")


def test_every_model_that_lacks_inputs_is_named() -> None:
    with pytest.raises(ModelError) as raised:
        ModelFusion({"a": Pair(), "b": nn.Linear(2, 2), "c": Pair()}, example=torch.ones(3, 2))
    assert [problem.path for problem in raised.value.problems] == ["a", "c"]

"""Stages on small networks: what each copies, grows and trains, and that a killed run ends as one that wasn't."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError
from interfuse.transfer.stages import Stage, Stages, unfreezing

QUICK: dict[str, Any] = {"accelerator": "cpu", "progress": False}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "cache": False}


def data(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    return torch.eye(3, 4)[targets] + 0.3 * torch.randn(n, 4, generator=generator), targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Layers between an embedding and a classifier."""

    def __init__(self, seed: int, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def deeper(net: nn.Module) -> nn.Module:
    """One more layer, which changes nothing yet."""
    grown = copy.deepcopy(net)
    assert isinstance(grown, Net)
    torch.manual_seed(7)
    block = Block()
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    grown.layers.append(block)
    return grown


LIST = [
    Stage("copy", copied={"a": ["layers.0.*", "embed.*"], "b": ["layers.1.*"]}, train="head", options=SHORT),
    Stage("grow", grow=deeper, train=["layers.2.*", "classifier.*"], options=SHORT),
    Stage("all", options=SHORT | {"layer_decay": 0.5}),
]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_stage_copies_grows_and_trains_what_it_names() -> None:
    a, b, target = Net(1), Net(2), Net(3)
    first = Stages(LIST[:1]).run(target, {"a": a, "b": b}, data(), **QUICK)
    assert first.model is target
    assert torch.equal(target.layers[0].up.weight, a.layers[0].up.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(target.layers[1].up.weight, b.layers[1].up.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(target.classifier.weight, Net(3).classifier.weight)
    before = values(target)
    second = Stages(LIST[1:2]).run(target, {}, data(), **QUICK)
    assert second.model is not target
    after = values(second.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"classifier.weight", "classifier.bias"}
    assert "layers.2.up.weight" in after
    record = Stages(LIST).run(Net(3), {"a": a, "b": b}, data(), data(30, 1), **QUICK)
    assert [stage.name for stage in record.stages] == ["copy", "grow", "all"]
    assert "copy: from a: " in str(record)
    assert "validation accuracy" in str(record)


def test_a_stage_may_only_copy() -> None:
    a, target = Net(1), Net(3)
    record = Stages([Stage(copied={"a": {}}, train=[])]).run(target, {"a": a})
    assert record.stages[0].training is None
    assert all(torch.equal(value, a.state_dict()[name]) for name, value in target.state_dict().items())


class Killed(BaseException):
    pass


class Kill(lightning.Callback):
    """Ends the process's run at the end of the given epoch, counted over all stages."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("epoch", range(6))
def test_a_killed_run_ends_as_one_that_was_not(epoch: int, tmp_path: Path) -> None:
    a, b = Net(1), Net(2)
    whole = Stages(LIST).run(Net(3), {"a": a, "b": b}, data(), data(30, 1), **QUICK).model
    with pytest.raises(Killed):
        Stages(LIST).run(Net(3), {"a": a, "b": b}, data(), data(30, 1), folder=tmp_path, callbacks=[Kill(epoch)], **QUICK)
    record = Stages(LIST).run(Net(3), {"a": a, "b": b}, data(), data(30, 1), folder=tmp_path, resume=True, **QUICK)
    assert len(record.resumed) == epoch // 2
    for name, value in whole.state_dict().items():
        assert torch.allclose(record.model.state_dict()[name], value, atol=1e-6), name


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    models = {"a": Net(1), "b": Net(2)}
    first = Stages(LIST).run(Net(3), models, data(), folder=tmp_path, **QUICK)
    again = Stages(LIST).run(Net(3), models, data(), folder=tmp_path, resume=True, **QUICK)
    assert again.resumed == ("copy", "grow", "all")
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in first.model.state_dict().items())
    with pytest.raises(OptionError, match="holds stages already"):
        Stages(LIST).run(Net(3), models, data(), folder=tmp_path, **QUICK)
    with pytest.raises(OptionError, match="holds other stages"):
        Stages(LIST[:2]).run(Net(3), models, data(), folder=tmp_path, resume=True, **QUICK)


def test_layers_are_unfrozen_from_the_top() -> None:
    net = Net(1)
    opened = unfreezing(net, epochs=1, batch_size=16)
    assert [stage.train for stage in opened] == [("head",), ("head", "layers.1.*"), ("head", "layers.1.*", "layers.0.*"), None]
    start = values(net)
    Stages(opened[:2]).run(net, {}, data(), **QUICK)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {n for n in start if n.startswith(("classifier.", "layers.1."))}
    with pytest.raises(ModelError, match="show no layers"):
        unfreezing(nn.Linear(4, 3))


def test_problems_come_before_anything_is_done() -> None:
    with pytest.raises(OptionError) as raised:
        Stages([Stage("x", options={"epoch": 1}), Stage("x", copied={"a": {"rule": {}}}, options={"learningrate": 1})])
    assert len(raised.value.problems) == 4
    assert "rules" in str(raised.value)
    assert "epochs" in str(raised.value)
    with pytest.raises(OptionError, match="one or more"):
        Stages([])
    target = Net(3)
    before = values(target)
    with pytest.raises(ModelError) as missing:
        Stages(LIST).run(target, {"a": Net(1)}, **QUICK)
    assert len(missing.value.problems) == 4  # b isn't there, and three stages have no data
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_what_a_later_stage_asks_for_is_tried_before_the_first_one_trains() -> None:
    target = Net(3)
    before = values(target)
    wrong = [
        Stage("first", options=SHORT),
        Stage("copy", copied={"a": ["layer.0.*"]}, train=["lyers.*"], options=SHORT),
        Stage("more", copied={"a": {"depth": {"layers": {0: 7}}}}, train=[]),
    ]
    with pytest.raises(OptionError) as raised:
        Stages(wrong).run(target, {"a": Net(1)}, data(), **QUICK)
    assert [p.path for p in raised.value.problems] == [
        "stages[1].copied['a']: rules['layer.0.*']",
        "stages[1].train",
        "stages[2].copied['a']: depth['layers']",
    ]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_options_of_every_stage_are_looked_at_when_they_are_listed() -> None:
    shapes: Any = {"grow": ["0"], "data": data()}
    with pytest.raises(OptionError) as raised:
        Stages([Stage(options={"epochs": -1, "precision": "fp4"}), Stage(**shapes), Stage(train=[1], options={"loss": "x"})])  # type: ignore[list-item]
    assert [p.path for p in raised.value.problems] == [
        "stages[0].options.epochs",
        "stages[0].options.precision",
        "stages[1].grow",
        "stages[1].data",
        "stages[2].train",
        "stages[2].options.loss",
    ]
    with pytest.raises(OptionError, match="a Stage"):
        Stages([{"name": "a"}])  # type: ignore[list-item]
    with pytest.raises(ModelError, match="returns a network"):
        Stages([Stage(grow=lambda net: None, train=[])]).run(Net(1), **QUICK)  # type: ignore[arg-type,return-value]


def test_a_stage_takes_lightnings_options_and_one_pattern_alone() -> None:
    target, a = Net(3), Net(1)
    how = {"epochs": 1, "batch_size": 16, "cache": False, "precision": "bf16-mixed"}
    Stages([Stage(copied={"a": "embed.*"}, train="classifier.*", options=how)]).run(target, {"a": a}, data(), **QUICK)
    assert torch.equal(target.embed.weight, a.embed.weight)


def test_functions_among_options_are_known_again_in_another_process() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    assert "0x" not in str(Stage(options={"loss": loss, "callbacks": [Kill(1)]}).written())


def test_layers_whose_numbers_skip_are_unfrozen_too() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    stages = unfreezing(net, epochs=0)
    assert [stage.train for stage in stages][1:3] == [("head", "4.*"), ("head", "4.*", "2.*")]
    Stages(stages).run(net, train=data(), **QUICK)

"""Tied layers: one parameter in several networks, through copies, training and files; and tasks trained together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.transfer.together import _Joined, fit_tasks
from interfuse.transfer.tying import tie

Data = tuple[Tensor, Tensor]


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "a": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        "b": nn.ModuleDict({"x": nn.Linear(2, 2)}),
        "c": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 1)),
    }


def pair() -> dict[str, nn.Module]:
    return {name: net for name, net in networks().items() if name != "b"}


LAYERS = [{"a": "2", "c": "2.0"}]


def data(seed: int = 1) -> dict[str, Data]:
    torch.manual_seed(seed)
    x, z = torch.randn(90, 4), torch.randn(60, 6)
    return {"a": (x, (x.sum(-1) > 0).long() + (x[:, 0] > 1).long()), "c": (z, z[:, :1] * z[:, 1:2])}


@pytest.mark.parametrize("start", ["mean", "first"])
def test_tied_layers_are_one_and_begin_where_they_should(start: Any) -> None:
    given = pair()
    before = copy.deepcopy(given)
    tied = tie(given, LAYERS, start=start)
    a, c = (tied.network(name).get_parameter(f"{LAYERS[0][name]}.weight") for name in "ac")
    assert a is c
    first, second = (given[name].get_parameter(f"{LAYERS[0][name]}.weight") for name in "ac")
    assert torch.allclose(a, (first + second) / 2 if start == "mean" else first)
    alone = sum(p.numel() for net in given.values() for p in net.parameters())
    assert sum(p.numel() for p in tied.parameters()) == alone - 72
    for name, net in given.items():
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before[name].parameters(), strict=True))
    assert tie(given, LAYERS, copy=False).network("a") is given["a"]


def test_a_parameter_that_stands_twice_in_one_network_stays_one() -> None:
    nets = pair()
    twice = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    twice[2].weight = twice[1].weight
    tied = tie({"a": nets["a"], "t": twice}, [{"a": "2", "t": "1"}])
    assert tied.network("t").get_parameter("2.weight") is tied.network("a").get_parameter("2.weight")


def test_the_gradient_of_a_tied_layer_is_the_sum() -> None:
    tied = tie(pair(), LAYERS)
    given = data()
    inputs = {name: x for name, (x, _) in given.items()}
    weight = tied.network("a").get_parameter("2.weight")
    (whole,) = torch.autograd.grad(sum(o.square().mean() for o in tied(inputs).values()), weight)
    parts = [torch.autograd.grad(tied(x, name).square().mean(), weight)[0] for name, x in inputs.items()]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_tied_networks_train_together_and_stay_tied() -> None:
    tied = tie(pair(), LAYERS)
    record = fit_tasks(
        tied, data(), data(2), epochs=5, learning_rate=0.02, batch_size=16, loss={"a": "cross_entropy", "c": "mse"}
    )
    values = [row["validation_loss"] for row in record.history]
    assert values[record.best_epoch] == min(values) < values[0]
    assert tied.network("a").get_parameter("2.weight") is tied.network("c").get_parameter("2.0.weight")
    assert not tied.training


def test_a_shared_trunk_trains_together_too() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    shared = itf.share_trunk({"a": start, "c": copy.deepcopy(start)}, 2)
    x = torch.randn(64, 4)
    given = {"a": (x, (x[:, 0] > 0).long()), "c": (x, (x[:, 1] > 0).long())}
    record = fit_tasks(shared, given, given, epochs=6, learning_rate=0.05)
    assert record.best["validation_loss"] < 0.7 * record.history[0]["validation_loss"]


def test_what_the_tasks_have_of_their_own_is_trained_alone_or_distilled() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    experts: dict[str, nn.Module] = {"a": start, "c": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))}
    shared = itf.share_trunk(experts, 1)
    before = copy.deepcopy(shared.state_dict())
    x = torch.randn(96, 4)
    soft = {task: (x, expert(x).softmax(-1).detach()) for task, expert in experts.items()}
    record = fit_tasks(shared, soft, soft, epochs=5, learning_rate=0.05, loss="cross_entropy", train_only="experts.*")
    after = shared.state_dict()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"experts"}
    assert record.best["validation_loss"] < record.history[0]["validation_loss"]
    assert all(p.requires_grad for p in shared.parameters())
    with pytest.raises(itf.OptionError, match=r"'expert.\*' matches no parameter.*allowed: trunk"):
        fit_tasks(shared, soft, epochs=1, train_only=["expert.*"])
    with pytest.raises(itf.OptionError, match=r"metric: got 'accuracy'(.|\n)*layer_decay: got 0.5"):
        fit_tasks(shared, soft, epochs=1, metric="accuracy", layer_decay=0.5)


def test_a_weight_of_zero_leaves_a_task_s_own_layers() -> None:
    tied = tie(pair(), LAYERS)
    before = copy.deepcopy(tied.state_dict())
    fit_tasks(tied, data(), epochs=1, weights={"c": 0.0}, weight_decay=0.0)
    moved = {name for name, value in tied.state_dict().items() if not torch.equal(value, before[name])}
    assert "networks.1.3.weight" not in moved
    assert {"networks.1.2.0.weight", "networks.0.4.weight"} <= moved


def test_tied_networks_are_stored_once_and_loaded(tmp_path: Path) -> None:
    tied = tie(pair(), LAYERS).eval()
    folder = itf.save(tied, tmp_path / "tied")
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in tied.parameters()) + 2000
    again = itf.load(folder, tie({name: copy.deepcopy(net) for name, net in pair().items()}, LAYERS))
    x = data()["a"][0]
    assert torch.equal(again(x, "a"), tied(x, "a"))


def test_every_task_s_data_are_gone_through() -> None:
    loaders = {"a": [1, 2, 3, 4], "b": [5, 6]}
    assert [tuple(batch.items()) for batch in _Joined(loaders, True)] == [
        (("a", a), ("b", b)) for a, b in zip([1, 2, 3, 4], [5, 6, 5, 6], strict=True)
    ]
    assert list(_Joined(loaders, False)) == [{"a": 1, "b": 5}, {"a": 2, "b": 6}, {"a": 3}, {"a": 4}]
    assert len(_Joined(loaders, True)) == 4


def test_what_does_not_fit_is_said_at_once() -> None:
    nets = networks()
    with pytest.raises(itf.ModelError) as caught:
        tie(nets, ["2", {"a": "2", "d": "0"}, {"a": "2"}, {"a": "0", "c": "0"}, {"a": "1", "c": "1"}])
    text = str(caught.value)
    assert [problem.path for problem in caught.value.problems] == [
        "layers[0]",
        "layers[1]",
        "layers[2]",
        "layers[3]",
        "layers[4]",
    ]
    for part in ("b has no module at '2'", "no model has the name 'd'", "at least two", "(8, 6)", "has no parameters"):
        assert part in text
    with pytest.raises(itf.OptionError, match=r"start: got 'middle'(.|\n)*layers: got '2'"):
        tie(pair(), "2", start="middle")  # type: ignore[arg-type]
    with pytest.raises(itf.OptionError, match=r"train: got \['a'\](.|\n)*weights\['d'\]: no such task"):
        fit_tasks(tie(pair(), LAYERS), {"a": data()["a"]}, weights={"d": 1.0})
    with pytest.raises(itf.ModelError, match=r"layers\[0\]: got 3(.|\n)*layers\[1\](.|\n)* float16"):
        tie({"a": nets["a"], "c": copy.deepcopy(nets["a"]).half()}, [3, "2"])  # type: ignore[list-item]


def test_losses_weights_and_globs_that_do_not_fit_are_said_at_once_and_a_loss_by_its_task() -> None:
    tied = tie(pair(), LAYERS)
    expected = r"weights\['a'\]: got -1(.|\n)*loss: got 'mes'; did you mean 'mse'(.|\n)*train_only: 'network\.\*' matches no"
    with pytest.raises(itf.OptionError, match=expected):
        fit_tasks(tied, data(), loss="mes", weights={"a": -1}, train_only=["networks.0.*", "network.*"])
    wrong = {"a": (data()["a"][0], data()["a"][1] + 3), "c": data()["c"]}
    with pytest.raises(itf.ModelError, match=r"^a: head: 3 classes, but the targets go from 3"):
        fit_tasks(tied, wrong, epochs=1, progress=False)


def test_layers_that_are_tied_in_a_chain_begin_at_the_mean_of_all() -> None:
    torch.manual_seed(0)
    nets = {name: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for name in "abc"}
    tied = tie(nets, [{"b": "1", "c": "2"}, {"a": "0"} | {"b": "0"}, {"a": "0", "b": "1"}])
    one = [tied.network(name).get_parameter(path) for name, path in (("a", "0.weight"), ("b", "0.weight"), ("c", "2.weight"))]
    assert one[0] is one[1] is one[2]
    before = [nets[name].get_parameter(path) for name, path in (("a", "0.weight"), ("b", "0.weight"), ("b", "1.weight"))]
    assert torch.allclose(one[0], torch.stack([*before, nets["c"].get_parameter("2.weight")]).mean(0))

"""Learned merge coefficients: gradients against ones derived by hand, the recipe against the merge, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import interfuse as itf
from interfuse.training.coefficients import Coefficients, _groups, _Mixture, learn_coefficients


class Net(nn.Module):
    """A stem, two layers with statistics, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def nets(heads: tuple[int, int] = (3, 3)) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Any]]:
    torch.manual_seed(0)
    base = Net().eval()
    experts: dict[str, nn.Module] = {}
    data: dict[str, Any] = {}
    for task, classes in zip("ab", heads, strict=True):
        expert = copy.deepcopy(base)
        if classes != 3:
            expert.head = nn.Linear(5, classes)
        for tensor in (*expert.parameters(), *expert.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.5 * torch.rand_like(tensor)
        experts[task] = expert.eval()
        x = torch.randn(64, 4)
        data[task] = (x, expert(x).argmax(-1))
    return base, experts, data


def test_the_gradient_is_the_one_derived_by_hand() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    experts: dict[str, nn.Module] = {task: copy.deepcopy(base) for task in "ab"}
    for expert in experts.values():
        for p in expert.parameters():
            p.data += torch.randn_like(p)
    groups = {"0": ("0.weight", "0.bias"), "1": ("1.weight", "1.bias")}
    mixture = _Mixture(base, experts, groups, 0.3)
    order = [name for names in groups.values() for name in names]
    count = sum(base.state_dict()[name].numel() for name in order)
    matrices = {task: torch.randn(count, count, dtype=torch.float64) for task in "ab"}

    def flat(values: Any) -> Tensor:
        return torch.cat([values[name].flatten() for name in order])

    def loss(task: str, merged: Any, batch: Any) -> Tensor:
        return (matrices[task] @ flat(merged) - batch).square().sum() / 2

    targets = {task: torch.randn(count, dtype=torch.float64) for task in "ab"}
    losses = mixture.backward(loss, targets)  # type: ignore[arg-type]
    t0 = flat(base.state_dict())
    deltas = {task: flat(expert.state_dict()) - t0 for task, expert in experts.items()}
    t = t0 + 0.3 * deltas["a"] + 0.3 * deltas["b"]
    residuals = {task: matrices[task] @ t - targets[task] for task in "ab"}
    gradient = sum(matrices[task].T @ residuals[task] for task in "ab")
    assert isinstance(gradient, Tensor)
    ends = 3 * 2 + 2
    expected = [[deltas[k][part] @ gradient[part] for part in (slice(0, ends), slice(ends, None))] for k in "ab"]
    assert mixture.coefficients.grad is not None
    torch.testing.assert_close(mixture.coefficients.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert losses == pytest.approx({task: float(r @ r / 2) for task, r in residuals.items()})


@pytest.mark.parametrize("objective", ["entropy", "teacher", "cross_entropy"])
def test_the_losses_are_those_of_the_merged_network(objective: Any) -> None:
    base, experts, data = nets((3, 4))
    learned = learn_coefficients(base, experts, data, objective=objective, steps=1, batch_size=64, learning_rate=1e-9)
    for task, expert in experts.items():
        merged = learned.merge(task)
        p, q = (merged(data[task][0]).double().softmax(-1), expert(data[task][0]).double().softmax(-1))
        loss = {
            "entropy": -(p * p.log()).sum(-1).mean(),
            "teacher": (q * (q / p).log()).sum(-1).mean(),
            "cross_entropy": -p[torch.arange(64), data[task][1]].log().mean(),
        }[objective]
        assert learned.history[0][task] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("per", ["task", "layer"])
def test_entropy_falls_and_networks_stay_as_they_are(per: Any) -> None:
    base, experts, data = nets()
    before = [copy.deepcopy(net.state_dict()) for net in (base, *experts.values())]
    learned = learn_coefficients(base, experts, data, per=per, steps=40, learning_rate=0.02, batch_size=64)
    losses = [row["loss"] for row in learned.history]
    assert len(losses) == 40
    assert losses[-1] < 0.95 * losses[0]
    assert list(learned.values["a"]) == (["all"] if per == "task" else ["before", "layers.0", "layers.1", "after"])
    for net, state in zip((base, *experts.values()), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not net.training


def test_the_teacher_finds_back_an_expert() -> None:
    base, experts, data = nets()
    options: dict[str, Any] = {"objective": "teacher", "per": "task", "steps": 150, "learning_rate": 0.05, "batch_size": 64}
    learned = learn_coefficients(base, {"a": experts["a"]}, {"a": data["a"]}, **options)
    assert learned.values["a"]["all"] == pytest.approx(1.0, abs=0.05)


def slow(base: nn.Module, experts: dict[str, nn.Module], learned: Coefficients, name: str) -> Tensor:
    group = next(group for group, names in learned.groups.items() if name in names)
    start = base.state_dict()[name].double()
    deltas = [values[group] * (experts[task].state_dict()[name].double() - start) for task, values in learned.values.items()]
    return torch.stack([start, *deltas]).sum(0)


@pytest.mark.parametrize(("per", "heads"), [("task", (3, 3)), ("layer", (3, 3)), ("layer", (2, 4))])
def test_the_engine_running_the_recipe_gives_the_same_tensors(per: Any, heads: tuple[int, int], tmp_path: Path) -> None:
    base, experts, data = nets(heads)
    learned = learn_coefficients(base, experts, data, per=per, steps=5, learning_rate=0.1)
    assert len({value for values in learned.values.values() for value in values.values()}) > 1
    for name, net in (("base", base), *experts.items()):
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    recipe = learned.recipe("base.safetensors", {task: f"{task}.safetensors" for task in experts})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    itf.run(tmp_path / "recipe.yaml", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    merged = learned.merge().state_dict()
    assert learned.own == (() if heads == (3, 3) else ("head.weight", "head.bias"))
    for name, value in found.items():
        assert torch.equal(value, merged[name])
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), slow(base, experts, learned, name), rtol=3e-7, atol=3e-7)
    assert set(found) == set(merged) - set(learned.own)
    mine = learned.merge("b").state_dict()
    assert all(torch.equal(mine[name], experts["b"].state_dict()[name]) for name in learned.own)
    assert all(torch.equal(mine[name], merged[name]) for names in learned.groups.values() for name in names)


def test_heads_of_one_shape_can_be_kept_apart() -> None:
    base, experts, data = nets()
    learned = learn_coefficients(base, experts, data, steps=2, own=["head.*"])
    assert learned.own == ("head.weight", "head.bias")
    assert torch.equal(learned.merge("a").get_parameter("head.weight"), experts["a"].get_parameter("head.weight"))
    assert torch.equal(learned.merge().get_parameter("head.weight"), base.get_parameter("head.weight"))


def test_what_is_tied_has_one_coefficient() -> None:
    net = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 3), "layers": nn.ModuleList([nn.Linear(3, 3)] * 1)})
    net["lm_head"] = nn.Linear(3, 4, bias=False)
    net["lm_head"].weight = net["embed_tokens"].weight
    groups = _groups(net, list(net.state_dict()), "layer")
    assert groups["before"] == ("embed_tokens.weight", "lm_head.weight")


def test_the_split_is_recorded_and_what_is_reported_is_refused() -> None:
    base, experts, data = nets()
    other = {task: (x + 1, y) for task, (x, y) in data.items()}
    assert learn_coefficients(base, experts, data, steps=1, reported=other, split="train").split == "train"
    twin = {task: [(x.clone(), y)] for task, (x, y) in data.items()}
    for reported in (data, twin, {"b": data["b"]}):
        with pytest.raises(itf.OptionError, match=r"data\['b'\]: is what is reported on; .* split='reported'"):
            learn_coefficients(base, experts, data, steps=1, reported=reported)
        assert learn_coefficients(base, experts, data, steps=1, reported=reported, split="reported").split == "reported"


def test_everything_wrong_is_said_at_once() -> None:
    base, experts, data = nets()
    wrong: dict[str, Any] = {"objective": "entrpy", "per": "block", "steps": 0, "learning_rate": 0, "start": 1e400}
    with pytest.raises(itf.OptionError) as caught:
        learn_coefficients(base, experts, {"a": data["a"]}, **wrong)
    assert [problem.path for problem in caught.value.problems] == ["data", *wrong]
    assert "did you mean 'entropy'" in str(caught.value)
    with pytest.raises(itf.OptionError, match=r"own: 'haed.\*' fits no tensor"):
        learn_coefficients(base, experts, data, own=["haed.*"])
    with pytest.raises(itf.DataError, match=r"the loss was nan in step 1"):
        learn_coefficients(base, experts, {"a": (torch.full((4, 4), torch.nan),) * 2, "b": data["b"]}, steps=2)
    with pytest.raises(itf.DataError, match="it has no targets"):
        learn_coefficients(base, experts, {"a": [data["a"][0]], "b": data["b"]}, objective="cross_entropy", steps=1)


def test_the_same_seed_gives_the_same_coefficients() -> None:
    base, experts, data = nets()
    found = [learn_coefficients(base, experts, data, steps=4, seed=seed).values for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("objective", ["entropy", "teacher"])
def test_one_output_is_no_distribution(objective: Any) -> None:
    base = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(itf.ModelError, match=rf"experts\['a'\]: predictions \(6, 1\), whose {objective} says nothing"):
        itf.learn_coefficients(base, {"a": base}, {"a": [torch.randn(6, 4)]}, objective=objective, steps=1, progress=False)

"""Shared trunks: ends of the range, the trunk computed once, networks that change what they get, and parameters held once."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import interfuse as itf
from interfuse.evaluation.cost import cost
from interfuse.transfer.sharing import SharedTrunk, share_trunk


class Block(nn.Module):
    """Gives a tuple, and needs a keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.line = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, float]:
        return x + scale * self.norm(self.line(x)).relu(), scale


class Net(nn.Module):
    """A token of its own, a stem, blocks, a norm and a head; `inplace` changes what the blocks gave."""

    def __init__(self, classes: int, depth: int = 3, width: int = 6, inplace: bool = False) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(width))
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.class_token
        for block in self.blocks:
            x, _ = block(x, scale=0.5)
            if self.inplace:
                x.mul_(1.5)
        return self.head(self.norm(x))


def experts(**options: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = Net(3, **options)
    found: dict[str, nn.Module] = {}
    for number, name in enumerate(("a", "b", "c")):
        net = copy.deepcopy(base)
        net.head = nn.Linear(6, 2 + number)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        found[name] = net.eval()
    return found


def same_trunk(given: dict[str, nn.Module], depth: int) -> dict[str, nn.Module]:
    """Experts whose first blocks, and what comes before them, are the first one's."""
    first = next(iter(given.values())).state_dict()
    shared = ("class_token", "stem.", *(f"blocks.{i}." for i in range(depth)))
    for net in given.values():
        net.load_state_dict({name: value for name, value in first.items() if name.startswith(shared)}, strict=False)
    return given


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_experts_with_one_trunk_keep_their_outputs_to_the_bit(depth: int, inplace: bool) -> None:
    nets = same_trunk(experts(inplace=inplace), depth)
    x = torch.randn(5, 4)
    shared = share_trunk(nets, depth)
    for outputs in (shared(x), {name: shared(x, name) for name in nets}, {n: shared.network(n)(x) for n in nets}):
        assert list(outputs) == list(nets)
        assert all(torch.equal(outputs[name], nets[name](x)) for name in nets)
    with torch.inference_mode():
        assert all(torch.equal(output, nets[name](x)) for name, output in shared(x).items())


def test_the_trunk_is_the_merge_and_the_rest_each_expert_s() -> None:
    nets, base = experts(), Net(3)
    shared = share_trunk(nets, 2, base=base, method="task_arithmetic", weights={"a": 0.5, "b": 0.25, "c": 0.0})
    expected = copy.deepcopy(nets)
    start = base.state_dict()
    for net in expected.values():
        state = net.state_dict()
        for name in state:
            if name.startswith(("class_token", "stem.", "blocks.0.", "blocks.1.")) and state[name].is_floating_point():
                a, b = (nets[k].state_dict()[name].double() for k in "ab")
                state[name] = (start[name].double() + 0.5 * (a - start[name]) + 0.25 * (b - start[name])).float()
        net.load_state_dict(state)
    x = torch.randn(5, 4)
    for name, output in shared(x).items():
        assert torch.allclose(output, expected[name](x), atol=1e-5)
        assert not torch.allclose(output, nets[name](x), atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), start.values(), strict=True))


def test_the_trunk_is_computed_once() -> None:
    nets = experts()
    shared = share_trunk(nets, 2)
    calls = [0] * len(shared.trunk)
    for number, module in enumerate(shared.trunk):
        module.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    shared(torch.randn(5, 4))
    assert calls == [1, 1, 1]
    shared({name: torch.randn(5, 4) for name in nets})
    assert calls == [4, 4, 4]


def test_cost_falls_with_depth_by_just_what_is_shared() -> None:
    nets = experts()
    x = torch.randn(8, 4)
    found = [cost(share_trunk(nets, depth), x, repeats=1) for depth in range(4)]
    alone = [cost(net, x, repeats=1) for net in nets.values()]
    assert found[0].parameters == sum(c.parameters for c in alone)
    assert found[0].flops == sum(c.flops for c in alone)
    block, before = 6 * 6 + 6 + 12, 4 * 6 + 6 + 6
    assert [a.parameters - b.parameters for a, b in pairwise(found)] == [
        2 * (block + before),
        2 * block,
        2 * block,
    ]
    assert [a.flops - b.flops for a, b in pairwise(found)] == [4 * (36 + 24), 4 * 36, 4 * 36]


def test_every_tensor_is_held_and_stored_once(tmp_path: Path) -> None:
    nets = experts()
    shared = share_trunk(nets, 2)
    state = shared.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    folder = itf.save(shared, tmp_path / "shared")
    with safe_open(str(folder / "model.safetensors"), "pt") as stored:
        assert sum(stored.get_tensor(key).numel() for key in stored.keys()) == sum(t.numel() for t in state.values())  # noqa: SIM118
    torch.manual_seed(1)
    fresh = share_trunk({name: Net(2 + i) for i, name in enumerate(nets)}, 2)
    x = torch.randn(5, 4)
    again = itf.load(folder, fresh)
    assert all(torch.equal(again(x)[name], output) for name, output in shared.eval()(x).items())


def test_copies_and_training_stay_whole() -> None:
    shared = share_trunk(experts(), 2)
    twin = copy.deepcopy(shared)
    x = torch.randn(5, 4)
    sum(output.square().mean() for output in twin(x).values()).backward()
    assert all(p.grad is not None for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(shared(x).values(), twin(x).values(), strict=True))
    assert next(iter(twin.double()(x.double()).values())).dtype == torch.float64


def test_a_gradient_through_the_shared_trunk_is_the_sum_of_the_tasks() -> None:
    shared = share_trunk(experts(), 3).eval()
    x = torch.randn(5, 4)
    weight = shared.trunk[0].weight
    assert isinstance(weight, Tensor)
    (whole,) = torch.autograd.grad(sum(o.square().mean() for o in shared(x).values()), weight)
    parts = [torch.autograd.grad(shared(x, name).square().mean(), weight)[0] for name in shared.names]
    assert torch.allclose(whole, torch.stack(parts).sum(0), atol=1e-6)


def test_bert_with_masks_and_heads_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    nets: dict[str, nn.Module] = {}
    for number, name in enumerate(("x", "y")):
        torch.manual_seed(number)
        config = transformers.BertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=12, num_labels=2 + number)
        nets[name] = transformers.BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.randint(0, 40, (3, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
    }
    apart = share_trunk(nets, 0)(batch)
    assert all(torch.equal(apart[name].logits, net(**batch).logits) for name, net in nets.items())
    body = {k: v for k, v in nets["x"].state_dict().items() if k.startswith(("bert.embeddings.", "bert.encoder."))}
    nets["y"].load_state_dict(body, strict=False)
    shared = share_trunk(nets, "bert.encoder.layer.2")
    assert (shared.depth, len(shared.trunk)) == (3, 4)
    assert share_trunk(nets, 3).blocks == shared.blocks
    assert all(torch.equal(shared(batch)[name].logits, net(**batch).logits) for name, net in nets.items())
    count = sum(p.numel() for p in shared.parameters())
    own = sum(p.numel() for net in nets.values() for k, p in net.named_parameters() if k not in body)
    assert count == own + sum(p.numel() for k, p in nets["x"].named_parameters() if k in body)


def test_named_children_are_blocks_too() -> None:
    nets = {}
    for name in "ab":
        nets[name] = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3)
        )
    nets["b"].load_state_dict(nets["a"].state_dict())
    x = torch.randn(2, 1, 8, 8)
    for depth in range(5):
        shared = share_trunk(nets, depth)
        assert all(torch.equal(output, nets["a"](x)) for output in shared(x).values())
    assert share_trunk(nets, 4).blocks.names == ("0", "1", "2", "3")  # the last is the head


class Late(Net):
    """A stem that is registered behind the blocks, of which a part is used without a call."""

    def __init__(self) -> None:
        super().__init__(3)
        self.table = self.stem
        del self.stem

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) + self.table.bias
        for block in self.blocks:
            x, _ = block(x, scale=0.5)
        return self.head(self.norm(x))


def test_what_is_registered_behind_the_blocks_is_named() -> None:
    torch.manual_seed(0)
    nets: dict[str, nn.Module] = {name: Late().eval() for name in "ab"}
    x = torch.randn(5, 4)
    shared = share_trunk(nets, 2, also=["table"])
    assert all(torch.equal(shared(x)[name], shared(x, name)) for name in nets)
    assert len(shared.trunk) == 3
    apart = share_trunk(nets, 2)
    with pytest.warns(UserWarning, match=r"^blocks\.0 is given something else by each task(.|\n)*`also`"):
        together = apart(x)
    assert all(torch.equal(output, apart(x, name)) for name, output in together.items())
    assert not torch.equal(together["b"], shared(x)["b"])
    with torch.inference_mode():
        assert torch.equal(apart(x)["b"], together["b"])  # said once
    with pytest.raises(itf.OptionError, match=r"also: a has no 'tabel'; did you mean 'table'(.|\n)*also: b has no"):
        share_trunk(nets, 2, also=["tabel"])


class Walked(nn.Module):
    """Goes through its list, or chain, of blocks by itself."""

    def __init__(self, kind: type[nn.ModuleList] | type[nn.Sequential]) -> None:
        super().__init__()
        parts = [nn.Linear(6, 6) for _ in range(3)]
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(parts) if kind is nn.ModuleList else nn.Sequential(*parts)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu()
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_list_or_chain_as_the_last_block(kind: Any) -> None:
    torch.manual_seed(0)
    nets: dict[str, nn.Module] = {name: Walked(kind).eval() for name in "ab"}
    x = torch.randn(5, 4)
    whole, all_blocks = share_trunk(nets, "blocks"), share_trunk(nets, 3)
    assert all(torch.equal(output, all_blocks(x)[name]) for name, output in whole(x).items())
    assert cost(whole, x).parameters == cost(all_blocks, x).parameters


def test_batch_statistics_can_be_estimated_anew() -> None:
    shared = share_trunk(experts(), 2)
    assert itf.reset_statistics(shared, [torch.randn(16, 4)]) == 3 * 1 + 2


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (dict, {"depth": 4}, r"depth: got 4; .* from 0 to 3"),
        (dict, {"depth": True}, r"depth: got True"),
        (dict, {"depth": "blocks.9"}, r"no shared block at 'blocks.9'; did you mean 'blocks\.\d'"),
        (dict, {"depth": 1, "blocks": "block"}, r"blocks: no module with children at 'block'; did you mean 'blocks'"),
        (dict, {"depth": 1, "method": "linaer"}, r"linaer"),
        (lambda given: {"a": given["a"]}, {"depth": 1}, r"at least two tasks"),
        (lambda given: {**given, "b": 3, "c": 4}, {"depth": 1}, r"experts\['b'\].*\n.*experts\['c'\]"),
        (lambda given: {**given, "b": nn.Linear(2, 2)}, {"depth": 1}, r"no ModuleList or Sequential is alike"),
        (lambda given: {**given, "b": Net(2, width=5)}, {"depth": 1}, r"no ModuleList or Sequential is alike"),
    ],
)
def test_what_cannot_be_shared_is_said(change: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(itf.UserError, match=match):
        share_trunk(change(experts()), **options)


def test_a_task_that_there_is_not() -> None:
    shared: SharedTrunk = share_trunk(experts(), 1)
    with pytest.raises(itf.OptionError, match="got 'd'"):
        shared(torch.randn(1, 4), "d")

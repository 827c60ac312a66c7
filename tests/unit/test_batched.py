"""Ensembles of one architecture in one pass: the same outputs, only where it may be and is faster, never stale."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse.ensemble import batched
from interfuse.ensemble.network import Ensemble, one_by_one
from interfuse.errors import ModelError, OptionError
from interfuse.evaluation.cost import cost
from interfuse.registry import find
from interfuse.saving import load, save
from interfuse.training.distill import distill

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def mlp(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, 3))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.Flatten(), nn.Linear(36, 3))


class Reads(nn.Module):
    """Keywords, a tied matrix, attention, an output in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.out(self.layer(self.words(ids)).mean(1))}


NETWORKS: list[tuple[Callable[[], nn.Module], Any]] = [
    (mlp, X),
    (Convolutions, X),
    (Reads, {"ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "unread": torch.zeros(2)}),
]


def several(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = make().eval()
        for buffer in network.buffers():
            if buffer.ndim and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
        found.append(network)
    return found


def ensemble(count: int = 3, **options: Any) -> Ensemble:
    return Ensemble([mlp(seed) for seed in range(count)], **options).eval()


def expected(model: Ensemble, x: Any = X) -> Tensor:
    """One by one, and written out."""
    return torch.stack([network(x).softmax(-1) for network in model.backbones]).mean(0).log()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass of several networks."""
    found: list[int] = []
    plain = batched.Batched._pass

    def counted(self: Any, networks: Any, inputs: Any) -> Any:
        found.append(len(networks))
        return plain(self, networks, inputs)

    monkeypatch.setattr(batched.Batched, "_pass", counted)
    return found


@pytest.fixture(params=[True, False], ids=["faster", "slower"])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """One pass is faster, or it isn't: the clock says so."""
    clock(monkeypatch, request.param)
    return bool(request.param)


def clock(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    times = iter([2.0, 1.0] * 3000 if faster else [1.0, 1.0] * 3000)
    monkeypatch.setattr(batched, "_seconds", lambda what, device: (what(), next(times))[1])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, True)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("make", "inputs"), NETWORKS, ids=["mlp", "convolutions", "keywords"])
@pytest.mark.parametrize("combine", ["probabilities", "logits", "vote"])
def test_one_pass_gives_what_one_by_one_does(make: Any, inputs: Any, combine: Any, passes: list[int]) -> None:
    networks = several(make)
    one = Ensemble(networks, combine=combine, batched=False).eval()(inputs)
    assert passes == []
    together = Ensemble(networks, combine=combine, batched=True).eval()
    torch.testing.assert_close(together(inputs), one, atol=1e-5, rtol=1e-5)
    assert passes in ([3], [3, 3])  # again, where attention has to go in parts
    assert together.held == sum({id(t): t.nbytes for n in networks for t in (*n.parameters(), *n.buffers())}.values())


def test_transformers_networks_run_in_one_pass(passes: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}

    def bert() -> nn.Module:
        network = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
        network.config._name_or_path = f"./{torch.initial_seed()}"
        return network

    networks = several(bert)
    words = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    one, together = (Ensemble(networks, batched=how).eval()(words) for how in (False, True))
    torch.testing.assert_close(together, one, atol=1e-5, rtol=1e-5)
    assert len(passes) > 0


def test_what_is_faster_is_measured_when_a_shape_comes_again(faster: bool, passes: list[int]) -> None:
    model = ensemble()
    wanted = expected(model)
    found = [model(X)]
    assert passes == []  # a shape that comes once isn't worth the measurement
    found.append(model(X))
    measured = len(passes)
    assert measured == 1 + 5 + faster
    found.append(model(X))
    assert len(passes) == measured + faster
    assert list(model.one_pass.choices.values()) == [faster]
    assert (model.held > 0) is faster  # the stack is dropped where it doesn't pay
    for output in found:
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    before = len(passes)
    model(X[:5])  # as large as 6, to the next power of two
    assert len(passes) == before + faster
    model(X[:2])
    assert len(passes) == before + faster
    assert len(model.one_pass.choices) == 2


def test_the_real_clock_decides_too() -> None:
    model = ensemble(8)
    for _ in range(3):
        torch.testing.assert_close(model(X), expected(model), atol=1e-5, rtol=1e-5)
    assert list(model.one_pass.choices.values()) in ([True], [False])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", ["in place", "state", "data", "type", "new", "module"])
def test_weights_that_change_are_noticed(how: str, passes: list[int]) -> None:
    model = ensemble()
    for _ in range(3):
        before = model(X)
    assert model.held
    third: Any = model.backbones[2]
    last = third[4]
    if how == "in place":
        last.bias[0] += 3
    elif how == "state":
        third.load_state_dict(mlp(9).state_dict())
    elif how == "data":
        last.bias.data = last.bias + torch.tensor([3.0, 0.0, 0.0])
    elif how == "type":
        model.double()
        assert model.held == 0
    elif how == "new":
        last.bias = nn.Parameter(torch.tensor([3.0, 0.0, 0.0]))
    else:
        third[4] = nn.Linear(8, 3).eval()
    x = X.double() if how == "type" else X
    count = len(passes)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected(model, x), atol=1e-5, rtol=1e-5)
    assert len(passes) > count
    if how != "type":
        assert not torch.allclose(model(x), before, atol=1e-3)


class Counts(nn.Linear):
    """A buffer that changes when it runs, in place or for a new one."""

    count: Tensor

    def __init__(self, new: bool = False) -> None:
        super().__init__(4, 3)
        self.register_buffer("count", torch.zeros(()))
        self.new = new

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1 if self.new else self.count.add_(1)
        return super().forward(x)


class Noisy(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Branches(nn.Linear):
    """A way through its code that its values choose."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.sum()) > 0 else -y


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Counts, "a buffer changes when they run"),
        (lambda: Counts(new=True), "a buffer changes when they run"),
        (Noisy, r"one pass fails \(RuntimeError: vmap: called random operation"),
        (Branches, "one pass fails"),
    ],
    ids=["counts", "counts anew", "random", "branches"],
)
def test_networks_that_can_t_run_in_one_pass_run_one_by_one(make: Any, why: str) -> None:
    model = Ensemble(several(make)).eval()
    for _ in range(4):
        model(X)
    if "buffer" in why:
        assert model.one_pass.reason in (why, "")  # each change of a buffer begins anew
        assert not any(model.one_pass.choices.values())
        assert {network.count.item() for network in model.backbones} <= {4.0, 5.0, 6.0, 7.0}  # type: ignore[operator]
    else:
        assert re.match(why, model.one_pass.reason)
    assert model.held == 0


def other_settings(k: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1 * k))


@pytest.mark.parametrize(
    ("networks", "why"),
    [
        ([mlp(0), mlp(1, 9)], "their tensors differ in name, shape, type, device or ties"),
        ([mlp(0), mlp(1).double()], "their tensors differ"),
        ([nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 3), nn.Tanh())], "their modules differ"),
        ([other_settings(1), other_settings(2)], "settings of their 1 differ"),
        ([Ensemble([mlp(0)]), Ensemble([mlp(1)])], "some are made of networks themselves"),
    ],
    ids=["widths", "types", "modules", "settings", "nested"],
)
def test_networks_that_differ_are_told_apart(networks: list[nn.Module], why: str) -> None:
    model = Ensemble(networks).eval()
    with pytest.raises(ModelError, match=f"batched: True, but {why}.*; leave it out, or give False"):
        Ensemble(networks, batched=True)
    if why != "their tensors differ":
        for _ in range(3):
            model(X)
        assert why in model.one_pass.reason
        assert model.held == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("forced", [None, True])
@pytest.mark.parametrize("case", ["training", "gradients", "hooks", "missing", "own inputs", "transformed"])
def test_calls_that_must_run_one_by_one_do(case: str, forced: bool | None, passes: list[int]) -> None:
    model = ensemble(batched=forced)
    if case == "training":
        model.train()
    if case == "gradients":
        with torch.enable_grad():
            for _ in range(3):
                loss = model(X).sum()
            loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    elif case == "hooks":
        seen: list[Any] = []
        model.backbones[1][0].register_forward_hook(lambda *found: seen.append(found))  # type: ignore[index]
        for _ in range(3):
            model(X)
        assert len(seen) == 3
    elif case in ("missing", "own inputs"):
        a, b, c = model.names
        for _ in range(3):
            model({a: X, b: X.clone(), c: None if case == "missing" else X})
    elif case == "transformed":
        for _ in range(3):
            torch.vmap(model)(X[None])
    else:
        for _ in range(3):
            model(X)
    assert passes == []


def test_gradients_of_inputs_go_through_one_pass(passes: list[int]) -> None:
    model = ensemble(batched=True).requires_grad_(False)
    grads = []
    for how in (True, False):
        model.batched = how
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            model(x).square().sum().backward()
        grads.append(x.grad)
    assert passes == [3]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("error", "kept"), [(1e-7, True), (1e-4, False)])
def test_one_pass_that_gives_other_outputs_is_not_used(error: float, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, True)
    plain = batched.Batched._pass
    monkeypatch.setattr(batched.Batched, "_pass", lambda *given: [output + error for output in plain(*given)])
    model = ensemble()
    for _ in range(3):
        torch.testing.assert_close(model(X), expected(model), atol=1e-6, rtol=0)
    assert model.one_pass.reason == ("" if kept else "one pass gives other outputs")
    assert (model.held > 0) is kept


def test_one_pass_that_was_asked_for_gives_the_same_or_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self, function: str) -> None:
            super().__init__()
            self.function, self.linear = function, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = getattr(torch, self.function)(self.linear(x))
            return result

    model = Ensemble([Named("relu"), Named("tanh")], batched=True).eval()  # told apart by text alone
    for _ in range(2):
        with pytest.raises(ModelError, match="batched: True, but one pass gives other outputs; leave it out, or give False"):
            model(torch.randn(4, 6))
    assert model.held == 0


def test_the_stack_is_made_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, True)
    monkeypatch.setattr(batched, "_free", lambda device: 100)
    model = ensemble()
    for _ in range(3):
        torch.testing.assert_close(model(X), expected(model), atol=1e-5, rtol=1e-5)
    assert "a stack of" in model.one_pass.reason
    assert "100 B are free" in model.one_pass.reason
    assert model.held == 0
    with pytest.raises(ModelError, match=r"batched: True, but one pass fails \(MemoryError: a stack of"):
        ensemble(batched=True)(X)


def test_the_free_memory_is_told() -> None:
    free = batched._free(torch.device("cpu"))
    assert free is None or free > 2**20


def test_options_are_checked_and_kept(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="batched: got 'yes'; True, False, or None") as caught:
        Ensemble([mlp()], combine="sum", batched="yes")  # type: ignore[arg-type]
    assert [problem.path for problem in caught.value.problems] == ["combine", "batched"]
    assert find("ensemble", "outputs").check({"batched": False}, "parameters")["batched"] is False
    for how in (None, True, False):
        model = ensemble(batched=how)
        save(model, tmp_path / str(how))
        back = load(tmp_path / str(how), [mlp(7), mlp(8), mlp(9)])
        assert isinstance(back, Ensemble)
        assert back.batched is how
        torch.testing.assert_close(back(X), expected(model), atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_begin_anew() -> None:
    model = ensemble(batched=True)
    wanted = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.held == 0
        assert torch.equal(twin(X), wanted)
        twin.backbones[0].get_parameter("4.bias").zero_()
        assert not torch.allclose(twin(X), wanted)
    assert torch.equal(model(X), wanted)


def test_what_is_learned_comes_from_one_by_one(passes: list[int]) -> None:
    """So that it has the same bits in every run."""
    model = ensemble(combine="weighted", batched=True)
    data = (X, torch.arange(6) % 3)
    model.calibrate(data, progress=False)
    with torch.enable_grad():
        distill(model, mlp(5), data, epochs=1, accelerator="cpu", progress=False)
    assert passes == []
    assert model.batched is True
    with one_by_one(nn.Sequential(model)):
        model(X)
    assert passes == []
    model(X)
    assert passes == [3]


def test_networks_that_greedy_selection_left_out_do_not_run(passes: list[int]) -> None:
    model = ensemble(combine="greedy", batched=True)
    model.learned({"weight": torch.tensor([0.5, 0.0, 0.5])})
    model(X)
    assert passes == []
    model.learned({"weight": torch.tensor([0.5, 0.25, 0.25])})
    model(X)
    assert passes == [3]


def test_costs_count_the_stack(passes: list[int]) -> None:
    networks = [nn.Linear(64, 64) for _ in range(4)]
    one, together = (cost(Ensemble(networks, batched=how), torch.randn(1, 64)) for how in (False, True))
    assert len(passes) > 0
    weights = 4 * sum(p.nbytes for p in networks[0].parameters())
    assert weights <= together.memory - one.memory < 3 * weights  # and what the pass itself takes
    assert (one.parameters, one.bytes, one.flops) == (together.parameters, together.bytes, together.flops)


def test_inference_mode_s_calls_leave_weights_that_train() -> None:
    model = ensemble(batched=True)
    with torch.inference_mode():
        first = model(X)
    assert torch.equal(model(X), first)
    with torch.enable_grad():
        model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

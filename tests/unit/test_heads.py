"""Experts with different heads: one merged trunk and every head, in memory, in folders and in recipes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import CheckpointError, ModelError, OptionError, RecipeError
from interfuse.layout.heads import find_heads
from interfuse.pipeline import check
from interfuse.transfer.sharing import SharedTrunk

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

NETS = """
import torch
from torch import nn

def seeded(seed, classes):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes))

def three():
    return seeded(0, 3)

def five():
    return seeded(1, 5)
"""


class Net(nn.Module):
    """A token of its own, a stack of layers with a norm, and a head; `ran` counts the passes through the trunk."""

    def __init__(self, classes: int, head: str = "classifier") -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.add_module(head, nn.Linear(8, classes))
        self.at = head

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.token
        for layer in self.layers:
            h = h + layer(h)
        return self.get_submodule(self.at)(self.norm(h))


def net(classes: int, seed: int, head: str = "classifier") -> Net:
    torch.manual_seed(7)
    made = Net(classes, head)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*made.parameters(), made.norm.running_mean):
            assert tensor is not None
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return made.eval()


def expected(expert: nn.Module, experts: list[nn.Module], head: str, weights: list[float]) -> nn.Module:
    """The expert with the weighted mean of all trunks, in float64 by hand."""
    result, states = copy.deepcopy(expert), [e.state_dict() for e in experts]
    for name, tensor in result.state_dict().items():
        if not name.startswith(head) and tensor.is_floating_point():
            total = sum(w * s[name].double() for w, s in zip(weights, states, strict=True)) / sum(weights)
            tensor.copy_(total)
    return result


# --- in memory ---


@pytest.mark.parametrize("classes", [(3, 5), (3, 3)])
def test_networks_give_every_task_from_one_pass(classes: tuple[int, int]) -> None:
    experts: dict[str, nn.Module] = {"a": net(classes[0], 0), "b": net(classes[1], 1)}
    shared = itf.merge("linear", experts, weights={"a": 1, "b": 3}, heads="separate")
    assert isinstance(shared, SharedTrunk)
    ran: list[str] = []
    for module in shared.trunk:
        module.register_forward_hook(lambda *_: ran.append("trunk"))
    found = shared.eval()(X)
    assert len(ran) == len(shared.trunk) == 4
    assert len(shared.free) == 1  # the token
    for name, expert in experts.items():
        want = expected(expert, list(experts.values()), "classifier", [1, 3])
        torch.testing.assert_close(found[name], want(X))
        torch.testing.assert_close(shared(X, name), want(X))
    count = sum(p.numel() for p in shared.parameters())
    assert count == sum(p.numel() for p in experts["a"].parameters()) + 9 * classes[1]


def test_a_head_may_have_another_name_and_is_found_or_named() -> None:
    experts: dict[str, nn.Module] = {"a": net(3, 0), "b": net(3, 1, "answers")}
    shared = itf.merge("linear", experts, heads="separate").eval()
    torch.testing.assert_close(shared(X)["b"], expected(experts["b"], list(experts.values()), "answers", [1, 1])(X))
    named = itf.merge("linear", experts, heads=["classifier", "answers.*"]).eval()
    assert torch.equal(named(X)["b"], shared(X)["b"])


def test_methods_with_a_base_merge_the_trunk(tmp_path: Path) -> None:
    base = net(2, 5)
    experts = {"a": net(3, 0), "b": net(5, 1)}
    shared = itf.merge("ties", experts, base=base, density=0.5, heads="separate").eval()
    trunks = [{k: v for k, v in e.state_dict().items() if not k.startswith("classifier")} for e in (base, *experts.values())]
    want = itf.merge("ties", trunks[1:], base=trunks[0], density=0.5)
    network = copy.deepcopy(experts["b"])
    network.load_state_dict({**network.state_dict(), **want})
    torch.testing.assert_close(shared(X)["b"], network(X))
    itf.save(shared, tmp_path / "out")
    again = itf.load(tmp_path / "out", {"a": net(3, 8), "b": net(5, 9)})
    assert torch.equal(again(X)["a"], shared(X)["a"])


def test_mappings_give_a_mapping_a_task() -> None:
    states = {"a": net(3, 0).state_dict(), "b": net(5, 1).state_dict()}
    found = itf.merge("linear", states, weights={"b": 3}, heads="separate")
    assert list(found) == ["a", "b"]
    assert found["a"]["embed.weight"] is found["b"]["embed.weight"]
    for task, state in states.items():
        assert found[task]["classifier.weight"] is state["classifier.weight"]
        assert found[task].keys() == state.keys()
    want = (states["a"]["embed.weight"].double() + 3 * states["b"]["embed.weight"].double()) / 4
    torch.testing.assert_close(found["a"]["embed.weight"].double(), want, rtol=0, atol=1e-7)
    listed = itf.merge("linear", list(states.values()), weights=[1, 3], heads="separate")
    assert torch.equal(listed[1]["embed.weight"], found["b"]["embed.weight"])


def test_what_does_not_fit_in_memory_is_said_at_once() -> None:
    wide, narrow = net(3, 0), net(3, 1)
    narrow.embed = nn.Linear(7, 8)
    narrow.layers[0] = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8))
    with pytest.raises(ModelError) as caught:
        itf.merge("linear", {"a": wide, "b": narrow}, heads="separate")
    said = [problem.wrong for problem in caught.value.problems]
    assert said[0] == "the trunks differ: embed.weight is [8, 6] in a, [8, 7] in b"
    assert any("layers.0.0.weight is [8, 8] in a, [9, 8] in b" in line for line in said)
    with pytest.raises(OptionError) as option:
        itf.merge("linear", {"a": wide, "b": wide}, heads="seperate", out="x", drop=["a"], base={"x": X})
    assert [problem.path for problem in option.value.problems] == ["out", "drop", "heads", "base"]
    with pytest.raises(OptionError, match=r"heads\[0\]: 'nothing' matches no tensor"):
        itf.merge("linear", {"a": wide, "b": net(3, 2)}, heads=["nothing"])
    with pytest.raises(OptionError, match="no head is found"):
        itf.merge("linear", [{"encoder.weight": X}, {"encoder.weight": X}], heads="separate")


SHAPE = [2, 2]


@pytest.mark.parametrize(
    ("models", "heads"),
    [
        ([{"x": SHAPE, "classifier.weight": [3, 2], "classifier.bias": [3]}, {"x": SHAPE, "qa_outputs.weight": SHAPE}],
         {"classifier.weight", "classifier.bias", "qa_outputs.weight"}),
        ([{"x": SHAPE, "head.weight": [3, 2], "head.scale": [1]}, {"x": SHAPE, "head.weight": [4, 2], "head.scale": [1]}],
         {"head.weight", "head.scale"}),
        ([{"h.0.w": SHAPE, "h.1.w": SHAPE, "pooler.w": SHAPE, "score.weight": SHAPE}] * 2, {"score.weight"}),
        ([{"0.weight": SHAPE, "2.weight": SHAPE}] * 2, {"2.weight"}),
        ([{"net.0.weight": SHAPE, "net.2.weight": [3, 2]}, {"net.0.weight": SHAPE, "net.2.weight": [5, 2]}], {"net.2.weight"}),
    ],
)  # fmt: skip
def test_heads_are_found_by_names_and_shapes(models: list[dict[str, list[int]]], heads: set[str]) -> None:
    found = find_heads({str(i): model for i, model in enumerate(models)}, "separate")
    assert found.problems == ()
    assert found.names == heads


# --- folders ---


def bert(folder: Path, labels: int, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
    config = transformers.BertConfig(**size, num_labels=labels, hidden_dropout_prob=0.0)
    torch.manual_seed(3)
    model = transformers.BertForSequenceClassification(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two fine-tunes of one BERT, for 2 and for 5 classes; it is the current folder."""
    bert(tmp_path / "two", 2, 0)
    bert(tmp_path / "five", 5, 1)
    (tmp_path / "headnets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("headnets", None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_has_the_trunk_once_and_a_head_a_task(folders: Path) -> None:
    itf.merge("linear", {"small": "two", "large": "five"}, heads="separate", out="out", weights={"large": 3})
    a, b = (load_file(folders / name / "model.safetensors") for name in ("two", "five"))
    whole = load_file(folders / "out" / "model.safetensors")
    key = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(whole[key], (a[key] + 3 * b[key]) / 4)
    assert torch.equal(whole["classifier.weight"], a["classifier.weight"])  # the first model's: the folder loads as any
    for task, state in (("small", a), ("large", b)):
        head = load_file(folders / "out" / "tasks" / task / "head.safetensors")
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(head[name], state[name]) for name in head)
    about = json.loads((folders / "out" / "tasks" / "tasks.json").read_text())
    assert (about["version"], list(about["tasks"])) == (2, ["small", "large"])
    assert itf.verify("out").good
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole_network = itf.load_model("out")
    for task, labels in (("small", 2), ("large", 5)):
        network = itf.load_model(f"out#{task}")
        logits = network(ids).logits
        assert logits.shape == (2, labels)
        itf.task_model("out", task, out=task)
        assert torch.equal(itf.load_model(task)(ids).logits, logits)  # a folder of its own, which Transformers loads
        tensors = itf.task_model("out", task)
        assert isinstance(tensors, dict)
        assert torch.equal(tensors[key], whole[key])
    assert torch.equal(whole_network(ids).logits, itf.load_model("small")(ids).logits)
    itf.merge("linear", ["out#small", "two"], out="again")  # the task's model wherever a model is named
    assert torch.equal(load_file(folders / "again" / "model.safetensors")["classifier.weight"], a["classifier.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recipes_of_folders(folders: Path) -> None:
    bert(folders / "base", 3, 9)
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "two", "name": "small"}, {"model": "five", "name": "large"}],
        "heads": "separate",
    }
    said = "each of 2 tasks keeps its own head, which isn't merged: classifier.bias, classifier.weight"
    assert said in itf.run(recipe, "out", dry_run=True).notes
    record = itf.run(recipe, "out", progress=False)
    assert record.method == "task_arithmetic"
    assert said in record.notes
    head = load_file(folders / "base" / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_file(folders / "out" / "model.safetensors")["classifier.weight"], head)
    assert itf.load_model("out#large").get_parameter("classifier.bias").shape == (5,)
    assert itf.verify("out", again=True).good
    before = (folders / "out" / "tasks" / "large" / "head.safetensors").read_bytes()
    assert "finished by an earlier run" in itf.run(recipe, "out", resume=True, progress=False).text()
    bert(folders / "five", 5, 4)  # another head
    itf.run(recipe, "out", overwrite=True, progress=False)
    assert (folders / "out" / "tasks" / "large" / "head.safetensors").read_bytes() != before
    (folders / "out" / "tasks" / "large" / "head.safetensors").write_bytes(before)
    assert not itf.verify("out").good


def test_a_finished_run_is_not_taken_for_that_of_another_head(folders: Path) -> None:
    itf.merge("linear", {"small": "two", "large": "five"}, heads="separate", out="out")
    file = folders / "five" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"classifier.bias": state["classifier.bias"] + 1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="out"):
        itf.merge("linear", {"small": "two", "large": "five"}, heads="separate", out="out", resume=True)


def test_recipes_of_networks_that_code_builds(folders: Path) -> None:
    models = [{"model": "python:headnets:three", "name": "a"}, {"model": "python:headnets:five", "name": "b"}]
    recipe = {"merge_method": "linear", "models": models, "heads": "separate"}
    itf.run(recipe, "out", trust_code=True, progress=False)
    shared = itf.load_run("out", trust_code=True)
    assert {task: output.shape[1] for task, output in shared(X).items()} == {"a": 3, "b": 5}
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    a, b = namespace["three"](), namespace["five"]()
    torch.testing.assert_close(shared(X)["b"], expected(b, [a, b], "2.", [1, 1])(X))


def test_trunks_that_differ_are_said_before_anything_is_written(folders: Path) -> None:
    state = load_file(folders / "five" / "model.safetensors")
    key = "bert.encoder.layer.0.intermediate.dense.weight"
    save_file(state | {key: torch.zeros(9, 8)}, folders / "five" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the trunks differ: {key} is \[8, 8\] in two, \[9, 8\] in five"):
        itf.merge("linear", ["two", "five"], heads="separate", out="out")
    assert not (folders / "out").exists()


def test_what_heads_do_not_go_with_is_said_at_once(folders: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": ["two"],
        "heads": "seperate",
        "tokenizer_source": "union",
        "data": {"test": "t.csv"},
    }

    def problems(given: dict[str, Any]) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            check(given)
        return [str(problem) for problem in caught.value.problems]

    assert problems(recipe)[0] == "heads: got 'seperate'; should be separate, or a list of patterns"
    said = problems({**recipe, "heads": "separate"})
    assert "tokenizer_source: stands beside heads; give whole models, each with a head of its own" in said
    assert "data.test: one data set can't score several tasks; remove it, and compare FOLDER#NAME" in said
    alone = {"merge_method": "linear", "models": ["two"], "heads": ["/[/"]}
    assert problems(alone)[1] == "models: fewer than two with a head of their own; at least two"
    assert problems(alone)[0].startswith("heads[0]: got '/[/'")
    fusion = {"fusion": "ensemble", "models": ["two", "five"], "heads": "separate", "data": {"test": "t.csv"}}
    assert "heads: means something only in a merge; remove the key, or give merge_method" in problems(fusion)


def test_a_damaged_folder_of_heads_is_said(folders: Path) -> None:
    itf.merge("linear", {"small": "two", "large": "five"}, heads="separate", out="out")
    table = folders / "out" / "tasks" / "tasks.json"
    about = json.loads(table.read_text())
    with pytest.raises(CheckpointError, match="has no task 'smal'; did you mean 'small'"):
        itf.task_model("out", "smal")
    about["trunk"].append("gone")
    table.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="tensor 'gone' of task 'small' is missing; make the folder again"):
        itf.task_model("out", "small")
    table.write_text(json.dumps({"version": 2, "tasks": {"small": {}}}))
    with pytest.raises(CheckpointError, match="isn't a list of tasks with heads"):
        itf.task_model("out", "small")

"""Merge coefficients by gradient, one a task or one a task and layer; the result is a plain recipe, which the engine runs.

    t(c) = t0 + sum_k c[k, l] (t_k - t0)   for a tensor of layer l,   c by Adam on the sum of the tasks' losses of t(c)

Losses: the entropy of the predictions on unlabelled data (AdaMerging, Yang et al. 2024, https://arxiv.org/abs/2310.02575),
KL(expert || merged) (the teacher of SyMerge, https://arxiv.org/abs/2412.19098), or cross-entropy. Each task has its own head
where heads differ, and heads aren't merged. Coefficients aren't kept in [0, 1] here. Memory: one merged network and the deltas.
Layers are those of `checkpoints.layers`. Buffers (BatchNorm's statistics) are merged too, and give no gradient. Nothing is
selected: the last step's coefficients are the result.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interfuse.checkpoints.layers import find_layers
from interfuse.engine.merge import merge
from interfuse.errors import DataError, ModelError, OptionError, Problem, nearest
from interfuse.evaluation.cost import device_of
from interfuse.inference.batches import batches, first
from interfuse.modules.inputs import Called, move, split_batch, tensors_of
from interfuse.progress import track
from interfuse.training.losses import cross_entropy

OBJECTIVES = ("entropy", "teacher", "cross_entropy")
PER = ("task", "layer")
#: The name by which adapting on what is also reported is asked for.
REPORTED = "reported"


@dataclass(frozen=True)
class Coefficients:
    """What was learned. `values` has for each task group -> coefficient, `groups` for each group its tensors' names.

    own: names of tensors that aren't merged (heads); history: step, the sum of the losses, and each task's; split: what the
    data that it was learned on are called.
    """

    values: dict[str, dict[str, float]]
    groups: dict[str, tuple[str, ...]]
    own: tuple[str, ...]
    history: list[dict[str, float]]
    objective: str
    per: str
    split: str
    base: nn.Module = field(repr=False)
    experts: Mapping[str, nn.Module] = field(repr=False)

    def recipe(self, base_path: str, expert_paths: Mapping[str, str]) -> dict[str, Any]:
        """The same merge as a recipe of `task_arithmetic`, for checkpoints at these paths (task -> path).

        Layers are filters by name. Tensors that aren't merged are dropped.
        """
        wrong = [Problem(f"expert_paths[{t!r}]", "missing", "a path a task") for t in self.values if t not in expert_paths]
        if wrong:
            raise OptionError(*wrong)
        models = [{"model": str(expert_paths[task]), "parameters": {"weight": self.setting(task)}} for task in self.values]
        found: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(base_path), "models": models}
        return found | ({"drop": [_exactly(self.own)]} if self.own else {})

    def setting(self, task: str) -> float | list[dict[str, Any]]:
        """A task's weight as recipes have it: a number, or a filter and a value a layer."""
        values = self.values[task]
        if self.per == "task":
            return next(iter(values.values()))
        return [{"filter": _exactly(self.groups[group]), "value": value} for group, value in values.items()]

    def merge(self, task: str | None = None) -> nn.Module:
        """The merged network: a copy of the base, or of a task's expert, whose own head it then has."""
        settings = {name: self.setting(name) for name in self.values}
        given = dict(self.experts)
        drop = [_exactly(self.own)] if self.own else None
        merged: nn.Module = merge("task_arithmetic", given, base=self.base, weight=settings, drop=drop)
        if task is None:
            return merged
        if task not in self.values:
            raise OptionError(Problem("task", f"got {task!r}", nearest(str(task), self.values)))
        result = copy.deepcopy(self.experts[task])
        state = {name: value for name, value in merged.state_dict().items() if name not in self.own}
        result.load_state_dict(state, strict=False)
        return result


def learn_coefficients(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Any],
    *,
    objective: Literal["entropy", "teacher", "cross_entropy"] = "entropy",
    per: Literal["task", "layer"] = "layer",
    steps: int = 500,
    learning_rate: float = 1e-3,
    start: float = 0.3,
    batch_size: int = 16,
    own: Sequence[str] = (),
    split: str = "validation",
    reported: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Coefficients:
    """Learn how much of each expert goes into the merge, by gradient through the merged network.

    base, experts (task -> network): of one architecture, unchanged. Tensors that not all have in one shape, and those whose
        names `own` fits (globs), stay each expert's own: heads.
    data: task -> data as `predict` takes it; labels are used by "cross_entropy" alone. A step takes one batch of each task.
    objective: what is made small, summed over the tasks: the predictions' "entropy", KL(expert || merged) as "teacher", or
        "cross_entropy".
    per: one coefficient a "task", or one a task and "layer". start: all coefficients' first value.
    split: what the data are called, for the record. reported: the data that results are reported on, task -> data; where
        those are the same as `data`, this is refused, unless split="reported" says that it's meant (as published numbers of
        AdaMerging are).

    Raises `OptionError`, `ModelError` and `DataError` before anything is learned, and `DataError` for a loss that isn't finite.
    """
    _check(base, experts, data, objective=objective, per=per, steps=steps, learning_rate=learning_rate, start=start,
           batch_size=batch_size)  # fmt: skip
    _check_split(data, reported, split, batch_size)
    names, kept = _merged_names(base, experts, own)
    groups = _groups(base, names, per)
    task_loss = _Loss(base, experts, names, objective)
    loaders = {
        task: batches(data[task], batch_size, shuffle=True, seed=seed + k, name=f"data[{task!r}]")
        for k, task in enumerate(experts)
    }
    streams = {task: _forever(loader, task) for task, loader in loaders.items()}
    mixture = _Mixture(base, experts, groups, start)
    optimizer = torch.optim.Adam([mixture.coefficients], learning_rate)
    history: list[dict[str, float]] = []
    with _evaluating([base, *experts.values()]), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in track(range(steps), "learning coefficients", steps, shown=progress):
            optimizer.zero_grad()
            losses = mixture.backward(task_loss, {task: next(stream) for task, stream in streams.items()})
            total = sum(losses.values())
            if not math.isfinite(total):
                allowed = "a lower learning_rate, or data without NaN or infinity"
                raise DataError(Problem("training", f"the loss was {total} in step {step + 1}", allowed))
            history.append({"step": step + 1, "loss": total, **losses})
            optimizer.step()
    learned = mixture.coefficients.detach().tolist()
    values = {task: dict(zip(groups, row, strict=True)) for task, row in zip(experts, learned, strict=True)}
    return Coefficients(values, groups, kept, history, objective, per, split, base, dict(experts))


class _Mixture:
    """The merged tensors as a function of coefficients (tasks, groups), and its gradient."""

    def __init__(
        self, base: nn.Module, experts: Mapping[str, nn.Module], groups: Mapping[str, Sequence[str]], start: float
    ) -> None:
        states = [expert.state_dict() for expert in experts.values()]
        self.trained = {name for name, _ in base.named_parameters()}
        self.group = {name: number for number, names in enumerate(groups.values()) for name in names}
        self.base = {name: value.detach() for name, value in base.state_dict().items() if name in self.group}
        self.deltas = {
            name: torch.stack([state[name].to(value) - value for state in states]) for name, value in self.base.items()
        }
        shape = (len(states), len(groups))
        kind = torch.float64 if any(value.dtype == torch.float64 for value in self.base.values()) else torch.float32
        self.coefficients = torch.full(shape, float(start), dtype=kind, device=device_of(base), requires_grad=True)

    def tensors(self) -> dict[str, Tensor]:
        """t(c), by name."""
        return {
            name: value + torch.tensordot(self.coefficients[:, self.group[name]].to(value), self.deltas[name], 1)
            for name, value in self.base.items()
        }

    def backward(self, loss: _Loss, inputs: Mapping[str, Any]) -> dict[str, float]:
        """Each task's loss, and the gradient of their sum; one task's activations are held at a time."""
        merged = self.tensors()
        leaves = {name: value.detach().requires_grad_(name in self.trained) for name, value in merged.items()}
        losses = {}
        for task, batch in inputs.items():
            value = loss(task, leaves, batch)
            value.backward()
            losses[task] = float(value.detach())
        used = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([merged[name] for name in used], [leaves[name].grad for name in used])
        return losses


class _Loss:
    """The loss of one task's batch, of merged tensors in the task's network."""

    def __init__(self, base: nn.Module, experts: Mapping[str, nn.Module], names: Sequence[str], objective: str) -> None:
        self.networks = {task: Called(expert) for task, expert in experts.items()}
        self.merged, self.objective, self.device = set(names), objective, device_of(base)
        self.states = {
            task: {f"network.{name}": value.detach() for name, value in _distinct(expert).items()}
            for task, expert in experts.items()
        }

    def __call__(self, task: str, merged: Mapping[str, Tensor], batch: Any) -> Tensor:
        inputs, targets = split_batch(batch)
        inputs, network = move(inputs, self.device), self.networks[task]
        own = self.states[task]
        state = own | {key: merged[name] for key in own if (name := key.removeprefix("network.")) in merged}
        outputs = functional_call(network, state, (inputs,))
        if self.objective == "cross_entropy":
            if targets is None:
                raise DataError(Problem(f"data[{task!r}]", "it has no targets", "give (inputs, targets)"))
            return cross_entropy(outputs, targets.to(self.device))
        if outputs.ndim < 2 or outputs.shape[-1] < 2:
            wrong = f"predictions {tuple(outputs.shape)}, whose {self.objective} says nothing"
            raise ModelError(Problem(f"experts[{task!r}]", wrong, "one output a class"))
        logs = outputs.log_softmax(-1)
        if self.objective == "entropy":
            return -(logs.exp() * logs).sum(-1).mean()
        with torch.no_grad():
            taught = network(inputs).log_softmax(-1)
        return (taught.exp() * (taught - logs)).sum(-1).mean()


def _distinct(network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters and buffers, one that is tied under its first name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _merged_names(
    base: nn.Module, experts: Mapping[str, nn.Module], own: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the tensors that are merged, and of those that aren't; numbers that count (integers) are neither."""
    states = {"base": base.state_dict(), **{f"experts[{task!r}]": expert.state_dict() for task, expert in experts.items()}}
    known = list(dict.fromkeys(name for state in states.values() for name in state))
    unfit = [pattern for pattern in own if not fnmatch.filter(known, pattern)]
    if unfit:
        raise OptionError(*(Problem("own", f"{pattern!r} fits no tensor", nearest(pattern, known)) for pattern in unfit))
    kept = {name for pattern in own for name in fnmatch.filter(known, pattern)}
    shapes = {name: {tuple(s[name].shape) if name in s else None for s in states.values()} for name in known}
    kept |= {name for name, found in shapes.items() if len(found) > 1}
    names = [name for name in known if name not in kept and states["base"][name].is_floating_point()]
    if not names:
        raise ModelError(Problem("experts", "no tensor is in all networks in one shape", "fine-tunes of the base"))
    return tuple(names), tuple(name for name in known if name in kept)


def _groups(base: nn.Module, names: Sequence[str], per: str) -> dict[str, tuple[str, ...]]:
    """Group -> names: all, or those of each layer, before all layers and after all. What is tied is in its first's group."""
    if per == "task":
        return {"all": tuple(names)}
    places, state = find_layers(names).places, base.state_dict(keep_vars=True)
    one: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        place = places[one.setdefault(id(state[name]), name)]
        group = place.side or "before" if place.stack is None else place.stack.name(place.layer, "")
        found.setdefault(group, []).append(name)
    return {group: tuple(members) for group, members in found.items()}


def _exactly(names: Iterable[str]) -> str:
    """A recipe's filter that fits these names, also behind a prefix."""
    return f"/(^|\\.)({'|'.join(re.escape(name) for name in names)})$/"


def _forever(loader: Iterable[Any], task: str) -> Iterator[Any]:
    """Batches without end."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise DataError(Problem(f"data[{task!r}]", "no batches", "give at least one"))


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """All networks in evaluation mode, and every module's mode put back."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check(base: Any, experts: Any, data: Any, **given: Any) -> None:
    if not isinstance(experts, Mapping) or not experts:
        raise OptionError(Problem("experts", f"got {type(experts).__name__}", "task -> network, for at least one task"))
    networks = {"base": base, **{f"experts[{task!r}]": expert for task, expert in experts.items()}}
    problems = [
        Problem(path, f"got {type(network).__name__}", "a torch.nn.Module")
        for path, network in networks.items()
        if not isinstance(network, nn.Module)
    ]
    if not isinstance(data, Mapping) or set(data) != set(experts):
        got = list(data) if isinstance(data, Mapping) else type(data).__name__
        problems.append(Problem("data", f"got {got}", f"task -> data, for {list(experts)}"))
    for name, allowed in (("objective", OBJECTIVES), ("per", PER)):
        if given[name] not in allowed:
            problems.append(Problem(name, f"got {given[name]!r}", nearest(str(given[name]), allowed)))
    for name in ("steps", "batch_size"):
        if not isinstance(given[name], int) or given[name] < 1:
            problems.append(Problem(name, f"got {given[name]!r}", "a whole number from 1 up"))
    if not (isinstance(given["learning_rate"], int | float) and 0 < given["learning_rate"] < math.inf):
        problems.append(Problem("learning_rate", f"got {given['learning_rate']!r}", "a number above 0"))
    if not (isinstance(given["start"], int | float) and math.isfinite(given["start"])):
        problems.append(Problem("start", f"got {given['start']!r}", "a finite number"))
    if problems:
        raise OptionError(*problems)


def _check_split(data: Mapping[str, Any], reported: Mapping[str, Any] | None, split: str, batch_size: int) -> None:
    """Refuse to learn on what is reported; the same data are one object, or begin with the same batch."""
    if reported is None or split == REPORTED:
        return
    allowed = f"other data, or split={REPORTED!r} to say that results are of data that were adapted to"
    same = [task for task in data if task in reported and _same(data[task], reported[task], batch_size)]
    if same:
        raise OptionError(*(Problem(f"data[{task!r}]", "is what is reported on", allowed) for task in same))


def _same(one: Any, other: Any, batch_size: int) -> bool:
    if one is other:
        return True
    pairs = [tensors_of(split_batch(first(batches(data, batch_size)))[0]) for data in (one, other)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(torch.equal(a[: len(b)], b[: len(a)]) for (_, a), (_, b) in zip(*pairs, strict=True))

"""`share_trunk`: the first k blocks of several fine-tunes become one, and the rest stays each one's own.

    y_a = R_a(T(x)),   T = merge(T_1 .. T_M),   T_i the first k blocks of expert i with what comes before them

At k = 0 these are M separate networks, at k = all one merged body with M heads; in between, the more a network has of its
own, the better it knows its task and the more it costs (the layers that tasks share, as in hard parameter sharing, Caruana
1997). One pass computes the trunk once. Nothing is trained here: `fit` or `reset_statistics` may follow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from interfuse.checkpoints.merged import MERGED
from interfuse.engine.merge import merge
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem, nearest
from interfuse.modules.inputs import Composite, call, inputs_by_model
from interfuse.transfer.trunk import Blocks, Trunk, find_blocks, trunk_of


def share_trunk(
    experts: Mapping[str, nn.Module],
    depth: int | str,
    *,
    base: nn.Module | None = None,
    method: str = "linear",
    blocks: str | None = None,
    also: Sequence[str] = (),
    **options: Any,
) -> SharedTrunk:
    """Networks of one architecture, fine-tuned to several tasks, as one network with a shared trunk.

    experts: task -> network; they are unchanged. Their heads may differ.
    depth: how many blocks are shared, from 0 to all, or the path of the last one (`encoder.layer.5`, `layer2`). What comes
        before the first block (embeddings, a stem) is shared with it.
    blocks: the path of the module whose children are the blocks; left out, the longest list of blocks that all have.
    also: paths of modules that are used in the trunk and registered behind it (DeBERTa's `rel_embeddings`).
    base, method, options: how the trunk's parameters and buffers are merged, as for `interfuse.merge`; depth is counted
        within the trunk there.

    Raises `OptionError` and `ModelError` with every problem, before anything is merged.
    """
    _check(experts, base)
    found, number = place(experts, depth, blocks)
    _check_also(experts, also)
    trunk = trunk_of(next(iter(experts.values())), found, number, also)
    values = merged_trunk(experts, trunk, base, method, options)
    return SharedTrunk(experts, trunk, values, depth=number, blocks=found)


class SharedTrunk(Composite):
    """Networks with one trunk: `forward(inputs)` gives {task: its network's output} and computes the trunk once.

    `forward(inputs, task)` gives one task's output, and a mapping from every task to its own inputs is computed task by
    task. Each parameter is held once: the trunk's as `trunk` and `free`, and what is a task's own under `experts`, in the
    order of `names`. `depth` of `blocks` are shared. A part of the trunk whose output a network changes in place, or to which
    (in evaluation) it gives something else than the first, is computed again for that network. `references` are the paths or
    hub ids that give the experts' code again, if there are any.
    """

    references: tuple[str | None, ...] = ()
    _told = False

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        trunk: Trunk,
        values: Mapping[str, Tensor],
        *,
        depth: int,
        blocks: Blocks,
    ) -> None:
        super().__init__()
        self.names, self.depth, self.blocks, self.shared = tuple(experts), depth, blocks, trunk
        first = next(iter(experts.values()))
        self.trunk = nn.ModuleList(copy.deepcopy(first.get_submodule(path)) for path in trunk.modules)
        self.free = nn.ParameterList(copy.deepcopy(first.get_parameter(path)) for path in trunk.parameters)
        with torch.no_grad():
            for path, module in zip(trunk.modules, self.trunk, strict=True):
                state = {name: values[f"{path}.{name}"] for name in module.state_dict()}
                module.load_state_dict(state)
            for path, parameter in zip(trunk.parameters, self.free, strict=True):
                parameter.copy_(values[path])
        self.trunk.__dict__[MERGED] = True
        self._tape = _Tape(len(trunk.modules))
        self.experts = nn.ModuleList(self._without_trunk(expert, trunk) for expert in experts.values())

    def _without_trunk(self, expert: nn.Module, trunk: Trunk) -> nn.Module:
        """A copy of an expert that goes to the trunk for what is shared; it copies nothing of that."""
        memo: dict[int, Any] = {}
        for number, path in enumerate(trunk.modules):
            kind = _Chain if isinstance(self.trunk[number], nn.Sequential) else _Stand
            memo[id(expert.get_submodule(path))] = kind(self.trunk[number], number, self._tape)
        for path, parameter in zip(trunk.parameters, self.free, strict=True):
            memo[id(expert.get_parameter(path))] = parameter
        result: nn.Module = copy.deepcopy(expert, memo)
        for path, parameter in zip(trunk.parameters, self.free, strict=True):
            holder, _, name = path.rpartition(".")
            del result.get_submodule(holder)._parameters[name]
            result.get_submodule(holder).__dict__[name] = parameter  # an attribute: `free` registers it
        return result

    def forward(self, inputs: Any, task: str | None = None) -> Any:
        """Inputs -> {task: output}, or with `task` that one's output."""
        if task is not None:
            return call(self.experts[self._number(task)], inputs, task)
        own = inputs_by_model(self.names, inputs)
        once = all(value is inputs for value in own)
        results: dict[str, Any] = {}
        try:
            for name, expert, value in zip(self.names, self.experts, own, strict=True):
                if value is not None:
                    self._tape.start(("write" if not results else "read") if once else "live")
                    results[name] = call(expert, value, name)
            self._tell_apart()
        finally:
            self._tape.start("live")
        return results

    def _tell_apart(self) -> None:
        """Warn, once, of a trunk that is computed more than once because what its networks give it isn't the same."""
        if self._tape.apart and not self._told:
            self._told = True
            path = self.shared.modules[min(self._tape.apart)]
            warnings.warn(
                f"{path} is given something else by each task, and so computed for each: what comes before it isn't all shared."
                " Name the modules that are in share_trunk's `also`.",
                stacklevel=5,
            )

    def network(self, task: str) -> nn.Module:
        """One task's network, for `compare`, `predict` and the like: a view, whose parameters are those of the whole."""
        self._number(task)
        return _Task(self, task)

    def _number(self, task: str) -> int:
        if task not in self.names:
            raise OptionError(Problem("task", f"got {task!r}", nearest(str(task), self.names)))
        return self.names.index(task)


class _Task(Composite):
    """One task of a shared trunk."""

    def __init__(self, whole: SharedTrunk, task: str) -> None:
        super().__init__()
        self.whole, self.task, self.names = whole, task, (task,)

    def forward(self, inputs: Any) -> Any:
        return self.whole(inputs, self.task)


class _Tape:
    """What the trunk's modules gave in the first network's pass, until the last block had run, for the networks after it."""

    def __init__(self, count: int) -> None:
        self.calls: list[list[Any]] = [[] for _ in range(count)]
        self.start("live")

    def start(self, mode: str) -> None:
        """Begin a pass. live: everything is computed; write: and kept; read: what is kept is used, in the order of calls."""
        self.mode, self.places, self.done = mode, [0] * len(self.calls), False
        if mode != "read":
            self.calls = [[] for _ in self.calls]
            self.apart: set[int] = set()

    def kept(self, number: int, given: Any) -> tuple[bool, Any]:
        """Whether the next output of a module is there for what it is given, and it."""
        if self.mode != "read" or self.places[number] >= len(self.calls[number]):
            return False, None
        output, versions, before = self.calls[number][self.places[number]]
        self.places[number] += 1
        if not _alike(given, before):
            self.apart.add(number)
            return False, None
        return _versions(output) == versions, _private(output)

    def keep(self, number: int, given: Any, output: Any) -> None:
        """Write down an output, and of what, where this is the pass for it."""
        if self.mode == "write" and not self.done:
            output = _private(output)
            self.calls[number].append((output, _versions(output), given))
            self.done = number == len(self.calls) - 1


def _alike(given: Any, before: Any) -> bool:
    """Whether the tensors among a module's arguments are those of the call before; None, in training, is."""
    if given is None or before is None:
        return True
    here, there = ([leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (given, before))
    return len(here) == len(there) and all(a is b or _equal(a, b) for a, b in zip(here, there, strict=True))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.allclose(one, other, 0.0, 0.0, equal_nan=True))


def _versions(output: Any) -> list[int]:
    """How often each tensor was changed in place; those of inference mode don't say."""
    return [0 if t.is_inference() else t._version for t in tree_leaves(output) if isinstance(t, Tensor)]


def _private(output: Any) -> Any:
    """The output, with a copy of each tensor that can't say whether it was changed."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, output)


class _Stand(nn.Module):
    """In a network, in place of a module of the trunk: its output from the tape, or computed by the module itself."""

    def __init__(self, module: nn.Module, number: int, tape: _Tape) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not registered here: the trunk holds it
        self.number, self.tape = number, tape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = None if self.module.training else (args, kwargs)
        there, output = self.tape.kept(self.number, given)
        if not there:
            output = self.module(*args, **kwargs)
            self.tape.keep(self.number, given, output)
        return output

    def __getattr__(self, name: str) -> Any:
        """What a network asks of the module beside calling it (a layer's kind, an embedding's weight)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            return getattr(self.__dict__["module"], name)


class _Chain(_Stand):
    """In place of a Sequential, which a network may go through by itself: its parts are shared, and computed for each."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["module"])

    def __len__(self) -> int:
        return len(self.__dict__["module"])

    def __getitem__(self, at: Any) -> Any:
        return self.__dict__["module"][at]


def _check(experts: Any, base: Any) -> None:
    if not isinstance(experts, Mapping) or len(experts) < 2:
        raise OptionError(Problem("experts", f"got {type(experts).__name__}", "task -> network, for at least two tasks"))
    given = {f"experts[{name!r}]": expert for name, expert in experts.items()} | ({} if base is None else {"base": base})
    problems = [
        Problem(path, f"got {type(value).__name__}", "a torch.nn.Module; load_model reads one")
        for path, value in given.items()
        if not isinstance(value, nn.Module)
    ]
    problems += [Problem("experts", f"got {name!r} for a task", "a text") for name in experts if not isinstance(name, str)]
    if problems:
        raise OptionError(*problems)


def _check_also(experts: Mapping[str, nn.Module], also: Sequence[str]) -> None:
    if isinstance(also, str):
        raise OptionError(Problem("also", f"got {also!r}", "a list of paths"))
    problems = []
    for task, expert in experts.items():
        known = [path for path, _ in expert.named_modules() if path]
        problems += [Problem("also", f"{task} has no {path!r}", nearest(path, known)) for path in also if path not in known]
    if problems:
        raise OptionError(*problems)


def place(experts: Mapping[str, nn.Module], depth: int | str, blocks: str | None) -> tuple[Blocks, int]:
    """The blocks, and how many of them are shared."""
    if isinstance(depth, str):
        holder = depth.rpartition(".")[0]
        found = find_blocks(experts, holder if blocks is None else blocks)
        paths = [found.at(number) for number in range(len(found.names))]
        if depth not in paths:
            raise OptionError(Problem("depth", f"no shared block at {depth!r}", nearest(depth, paths)))
        return found, paths.index(depth) + 1
    found = find_blocks(experts, blocks)
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= len(found.names):
        allowed = f"a number of blocks of {found.path or 'the network'!r}, from 0 to {len(found.names)}, or a block's path"
        raise OptionError(Problem("depth", f"got {depth!r}", allowed))
    return found, depth


def merged_trunk(
    experts: Mapping[str, nn.Module], trunk: Trunk, base: nn.Module | None, method: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The trunk's merged tensors by name."""
    if not trunk.modules:
        return {}
    ancestor = None if base is None else _state("base", base, trunk)
    states = {name: _state(f"experts[{name!r}]", expert, trunk) for name, expert in experts.items()}
    try:
        result: dict[str, Tensor] = merge(method, states, base=ancestor, **options)
    except CheckpointError as error:
        raise ModelError(*error.problems) from None
    return result


def _state(name: str, network: nn.Module, trunk: Trunk) -> dict[str, Tensor]:
    state = network.state_dict()
    wanted = tuple(f"{path}." for path in trunk.modules)
    found = {key: value for key, value in state.items() if key.startswith(wanted) or key in trunk.parameters}
    missing = [path for path in (*trunk.modules, *trunk.parameters) if not _has(network, path)]
    if missing:
        raise ModelError(*(Problem(name, f"has no {path!r}", "networks of one architecture") for path in missing))
    return found


def _has(network: nn.Module, path: str) -> bool:
    holder, _, name = path.rpartition(".")
    try:
        return hasattr(network.get_submodule(holder), name)
    except AttributeError:
        return False

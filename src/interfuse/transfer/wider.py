"""Units replicated, and their outgoing weights shared out (Net2Wider, Chen et al. 2016, 1511.05641).

    W[j, :] <- W[g(j), :]        U[:, j] <- U[:, g(j)] * s(j),    the s(j) of one unit's copies sum to 1

g is the identity on the old units and chance on the new. Where the paper adds noise to weights, and so changes the function
a little, here only the shares differ, and it stays. Who reads a module's outputs is traced (torch.fx), else tried out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from interfuse.errors import Problem
from interfuse.modules.inputs import call
from interfuse.transfer.probe import TOLERANCE, change

Width = int | tuple[int, str | Sequence[str]]

_Norm = nn.modules.batchnorm._NormBase
#: The convolutions that are grown.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Keys of a Transformers config that say how wide feed-forward blocks are.
_CONFIG_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")

#: A part of a path that is a number.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Kind(NamedTuple):
    """Where a layer's weight has outputs and inputs, and what its numbers of them are called."""

    out: int
    into: int
    outputs: str
    inputs: str


def kind_of(module: nn.Module) -> Kind | None:
    """A Linear, a convolution, or Transformers' Conv1D, which is a Linear stored the other way; None for what is neither."""
    if isinstance(module, nn.Linear):
        return Kind(0, 1, "out_features", "in_features")
    if isinstance(module, CONVOLUTIONS):
        return Kind(0, 1, "out_channels", "in_channels")
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return Kind(1, 0, "nf", "nx")
    return None


@dataclass
class Chain:
    """What has the same units: the modules that make them, the norms they pass, and those that read them."""

    makers: list[str]
    norms: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)

    def all(self) -> Iterator[str]:
        """Every path."""
        yield from dict.fromkeys([*self.makers, *self.norms, *self.readers])


class _NotThrough(Exception):
    """Why the units can't be followed; `further` says that someone further out may know."""

    def __init__(self, why: str, further: bool = False) -> None:
        super().__init__(why)
        self.further = further


def widen(
    model: nn.Module, wider: Mapping[str, Width], example: Any, before: Sequence[Tensor], noise: float, seed: torch.Generator
) -> list[Problem]:
    """Widen these modules in place, each so that the outputs stay as they were; what couldn't be, and was left."""
    problems = []
    for path, given in wider.items():
        width, named = given if isinstance(given, tuple) else (given, ())
        wrong = _unfit(model, path, width)
        if wrong is None:
            wrong = _widen(
                model, path, width, (named,) if isinstance(named, str) else tuple(named), example, before, noise, seed
            )
        if wrong is not None:
            problems.append(wrong)
    if not problems:
        _tell_config(model, wider)
    return problems


def _unfit(model: nn.Module, path: str, width: int) -> Problem | None:
    module = model.get_submodule(path)
    kind = kind_of(module)
    if kind is None:
        return Problem(f"wider[{path!r}]", f"is a {type(module).__name__}", "a Linear or a convolution")
    now = getattr(module, kind.outputs)
    if not isinstance(width, int) or width <= now:
        return Problem(f"wider[{path!r}]", f"got {width!r}, and has {now} outputs", f"a whole number above {now}")
    return None


def _widen(
    model: nn.Module, path: str, width: int, named: tuple[str, ...], example: Any, before: Sequence[Tensor], noise: float,
    seed: torch.Generator,
) -> Problem | None:  # fmt: skip
    module = model.get_submodule(path)
    kind = kind_of(module)
    assert kind is not None
    units = getattr(module, kind.outputs)
    mapping = torch.cat([torch.arange(units), torch.randint(units, (width - units,), generator=seed)])
    shares = _shares(mapping, units, noise, seed)
    why = "the modules that were named don't read it alone"
    unknown = [name for name in named if name not in dict(model.named_modules())]
    if unknown:
        return Problem(f"wider[{path!r}]", f"no module at {unknown[0]!r}", "the paths of the modules that read it")
    if named:
        chains: Iterator[Chain] = iter([Chain([path], readers=list(named))])
    else:
        traced = _traced(model, path, units)
        chains = iter([traced]) if isinstance(traced, Chain) else _guesses(model, path, units, example)
        why = "what reads it wasn't found" if isinstance(traced, Chain) else traced
    for chain in chains:
        refused = next((w for name in chain.all() if (w := _fixed(model, name, chain))), "")
        if refused:
            why = refused
            continue
        old = [(part, _kept(part)) for part in map(model.get_submodule, chain.all())]
        _apply(model, chain, mapping, shares, units)
        if change(model, example, before) <= TOLERANCE:
            return None
        for part, state in old:
            part.__dict__.clear()
            part.__dict__.update(state)
    return Problem(f"wider[{path!r}]", why, "name the modules that read it, {path: (width, [paths])}, if they alone do")


def _shares(mapping: Tensor, units: int, noise: float, seed: torch.Generator) -> Tensor:
    """The part of its unit's outgoing weight that each copy gets: they sum to 1 for each unit; float64."""
    weights = 1 + noise * (2 * torch.rand(len(mapping), generator=seed, dtype=torch.float64) - 1)
    return weights / torch.zeros(units, dtype=torch.float64).index_add_(0, mapping, weights)[mapping]


def _kept(module: nn.Module) -> dict[str, Any]:
    """What a module holds, to put it back."""
    return {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}


def _fixed(model: nn.Module, path: str, chain: Chain) -> str:
    """Why a module's weights can't be changed, if so."""
    module = model.get_submodule(path)
    if getattr(module, "groups", 1) != 1:
        return f"{path} is a convolution in groups"
    if kind_of(module) is not None and module._parameters.get("weight") is None:
        return f"{path} has no plain weight"
    own = {id(tensor) for tensor in module.parameters(recurse=False)}
    for name, other in model.named_modules():
        if other is not module and own & {id(tensor) for tensor in other.parameters(recurse=False)}:
            return f"{path} is tied to {name}"
    return f"{path} reads its own outputs" if path in chain.makers and path in chain.readers else ""


def _apply(model: nn.Module, chain: Chain, mapping: Tensor, shares: Tensor, units: int) -> None:
    width = len(mapping)
    for path in chain.makers:
        module = model.get_submodule(path)
        kind = kind_of(module)
        assert kind is not None
        _select(module, "weight", kind.out, mapping)
        _select(module, "bias", 0, mapping)
        setattr(module, kind.outputs, width)
    for path in chain.norms:
        norm = model.get_submodule(path)
        for key in ("weight", "bias", "running_mean", "running_var"):
            _select(norm, key, 0, mapping)
        norm.num_features = width  # type: ignore[assignment]
    for path in chain.readers:
        module = model.get_submodule(path)
        kind = kind_of(module)
        assert kind is not None
        each = getattr(module, kind.inputs) // units  # numbers a unit: places of a map that was flattened
        index = (mapping[:, None] * each + torch.arange(each)).flatten()
        _select(module, "weight", kind.into, index, shares.repeat_interleave(each))
        setattr(module, kind.inputs, width * each)


def _select(module: nn.Module, key: str, axis: int, index: Tensor, shares: Tensor | None = None) -> None:
    """Replace a parameter or buffer by entries of an axis, times their shares; a new object: the old one isn't changed."""
    old = getattr(module, key, None)
    if not isinstance(old, Tensor):
        return
    new = old.detach().index_select(axis, index.to(old.device))
    if shares is not None:
        shape = [1] * old.ndim
        shape[axis] = -1
        new = (new.double() * shares.to(old.device).reshape(shape)).to(old.dtype)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = new


class _Tracer(torch.fx.Tracer):
    """Symbolic tracing down to modules without parts, or of torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the tracing stops there."""
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, path: str, units: int) -> Chain | str:
    """Who shares and who reads a module's units, by the smallest part round it that shows that; or why it isn't known."""
    outer, why = path, ""
    while outer:
        outer, _, _ = outer.rpartition(".")
        whole = model.get_submodule(outer)
        try:
            graph = _Tracer().trace(whole)
        except Exception as error:  # the user's forward: it may fail on stand-ins for tensors in any way
            why = why or f"the network can't be traced ({type(error).__name__} in {outer or type(whole).__name__})"
            continue
        prefix = f"{outer}." if outer else ""
        walk = _Walk(graph, whole, units)
        try:
            found = walk.from_(path.removeprefix(prefix))
        except _NotThrough as stop:
            why = str(stop)
            if not stop.further:
                return why
            continue
        return Chain(*([prefix + name for name in names] for names in (found.makers, found.norms, found.readers)))
    return why


class _Walk:
    """Follows units through a traced graph. A class, since the walk notes where it has been."""

    def __init__(self, graph: torch.fx.Graph, whole: nn.Module, units: int) -> None:
        self.graph, self.modules, self.units = graph, dict(whole.named_modules(remove_duplicate=False)), units
        self.wide: dict[Node, None] = {}
        self.chain = Chain([])

    def from_(self, path: str) -> Chain:
        """The chain of the module at `path`; raises `_NotThrough`."""
        nodes = [node for node in self.graph.nodes if node.op == "call_module" and node.target == path]
        if not nodes:
            raise _NotThrough("it isn't seen in the network's forward", further=True)
        for node in nodes:
            self._make(node)
        return self.chain

    def _make(self, node: Node) -> None:
        self.chain.makers += [] if node.target in self.chain.makers else [str(node.target)]
        self._mark(node)

    def _mark(self, node: Node) -> None:
        if node not in self.wide:
            self.wide[node] = None
            for user in node.users:
                self._read(user, node)

    def _read(self, node: Node, by: Node) -> None:
        if node.op == "output":
            raise _NotThrough("its units reach the output", further=True)
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        kind = kind_of(module) if module is not None else None
        if module is not None and kind is not None:
            if getattr(module, kind.inputs) % self.units:
                raise _NotThrough(f"{node.target} reads it along another axis")
            self.chain.readers += [] if node.target in self.chain.readers else [str(node.target)]
            return
        self._pass(node, module)
        for other in node.all_input_nodes:
            if other not in self.wide:
                self._back(other, node)
        self._mark(node)

    def _pass(self, node: Node, module: nn.Module | None) -> None:
        """Note a module that units pass, which must treat each alike."""
        if isinstance(module, _Norm):
            self.chain.norms += [] if node.target in self.chain.norms else [str(node.target)]
        elif module is not None and any(p.numel() > 1 for p in module.parameters()):
            raise _NotThrough(f"{node.target} ({type(module).__name__}) takes its units together")

    def _back(self, node: Node, meets: Node) -> None:
        """What units meet must be as many, from a module that can be widened alike: the other side of a gate."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        kind = kind_of(module) if module is not None else None
        if module is not None and kind is not None and getattr(module, kind.outputs) == self.units:
            self._make(node)
            return
        if kind is not None or node.op in ("placeholder", "get_attr") or len(node.all_input_nodes) != 1:
            raise _NotThrough(f"its units meet others, of {node.name}, in {meets.name}")
        self._pass(node, module)
        (before,) = node.all_input_nodes
        if before not in self.wide:
            self._back(before, node)
        self._mark(node)


def _guesses(model: nn.Module, path: str, units: int, example: Any) -> Iterator[Chain]:
    """Modules that are called after this one and could read it, the next first, for who tries them out."""
    called: list[str] = []
    note: Callable[[str], Callable[..., None]] = lambda name: lambda *_: called.append(name)
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    after = called[called.index(path) + 1 :] if path in called else []
    for name in dict.fromkeys(after):
        module = model.get_submodule(name)
        kind = kind_of(module)
        if kind is not None and name != path and getattr(module, kind.inputs) == units:
            yield Chain([path], readers=[name])


def _tell_config(model: nn.Module, wider: Mapping[str, Width]) -> None:
    """Set a Transformers config's width where every layer was widened alike, so that what is saved loads again."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    patterns: dict[str, set[int]] = {}
    for path in wider:
        patterns.setdefault(_NUMBER.sub("*", path), set())
    for name, module in model.named_modules():
        kind, pattern = kind_of(module), _NUMBER.sub("*", name)
        if kind is not None and pattern in patterns:
            patterns[pattern].add(getattr(module, kind.outputs))
    widths = {width for found in patterns.values() for width in found}
    keys = [key for key in _CONFIG_KEYS if key in config.to_dict()]
    if len(widths) == 1 and len(keys) == 1:
        setattr(config, keys[0], widths.pop())

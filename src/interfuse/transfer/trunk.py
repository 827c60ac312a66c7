"""Which modules of a network are its first k blocks with all that comes before them. Found by structure; nothing is changed.

Blocks are the children of one module, in order: a stack of transformer layers, the parts of a Sequential. What comes before
them is what is registered before them, at each level from the network down to the stack, unless its names put it behind the
layers (`checkpoints.layers`). The flow of data isn't traced: what is used before the blocks but registered after is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from interfuse.checkpoints.layers import Place, find_layers
from interfuse.errors import ModelError, OptionError, Problem, nearest

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called themselves


class Blocks(NamedTuple):
    """The module that holds the blocks ("" is the network), and those of its children that all networks have, in order."""

    path: str
    names: tuple[str, ...]

    def at(self, number: int) -> str:
        """The path of a block."""
        return _join(self.path, self.names[number])


class Trunk(NamedTuple):
    """What is shared: modules by path, the last block last, and parameters that stand in no such module."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def find_blocks(networks: Mapping[str, nn.Module], path: str | None = None) -> Blocks:
    """The blocks that all networks have: those at `path`, else the longest list of blocks of one kind.

    Where no list has two blocks of one kind, it is the longest list of any; of the network's own children the last that has
    parameters, its head, is no block. Raises `ModelError` where there are none, `OptionError` for a path that isn't there.
    """
    first = next(iter(networks.values()))
    if path is not None:
        known = [where for where, module in first.named_modules() if any(True for _ in module.children())]
        if path not in known:
            raise OptionError(Problem("blocks", f"no module with children at {path!r}", nearest(path, known)))
        names = _common(networks, path)
        if not names:
            raise ModelError(Problem("blocks", f"at {path!r} the networks have no first block in common", "name others"))
        return Blocks(path, names)
    lists = [where for where, module in first.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    found = [Blocks(where, names) for where in lists if (names := _common(networks, where))]
    alike = [blocks for blocks in found if len(blocks.names) > 1 and _of_one_kind(first.get_submodule(blocks.path), blocks)]
    if not found:
        wrong = "no ModuleList or Sequential is alike in all networks"
        raise ModelError(Problem("experts", wrong, "name the module that holds the blocks in `blocks`"))
    return max(alike or found, key=lambda blocks: len(blocks.names))


def _common(networks: Mapping[str, nn.Module], path: str) -> tuple[str, ...]:
    """The leading children of the module at `path` that have one structure in all networks."""
    lists: list[list[tuple[str, object]]] = []
    for network in networks.values():
        try:
            holder = network.get_submodule(path)
        except AttributeError:
            return ()
        lists.append([(name, _structure(child)) for name, child in _children(holder)])
    names = [entries[0][0] for entries in zip(*lists, strict=False)]
    same = [all(entry == entries[0] for entry in entries) for entries in zip(*lists, strict=False)]
    names = names[: same.index(False)] if False in same else names
    if not path:
        holder = next(iter(networks.values()))
        learned = [name for name, child in _children(holder) if _has_parameters(child)]
        names = [*_until(names, learned[-1] if learned else None)]
    return tuple(names)


def _until(names: list[str], end: str | None) -> Iterator[str]:
    for name in names:
        if name == end:
            return
        yield name


def _structure(module: nn.Module) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    return type(module).__qualname__, tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _of_one_kind(holder: nn.Module, blocks: Blocks) -> bool:
    children = dict(_children(holder))
    kinds = {type(children[name]) for name in blocks.names}
    return len(kinds) == 1 and all(_has_parameters(children[name]) for name in blocks.names)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by name; one that is registered twice comes twice."""
    return ((name, child) for name, child in module._modules.items() if child is not None)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def trunk_of(network: nn.Module, blocks: Blocks, depth: int, also: Sequence[str] = ()) -> Trunk:
    """The first `depth` blocks of a network with what comes before them, and the modules `also`; nothing for 0."""
    if depth == 0:
        return Trunk((), ())
    places = find_layers(name for name, _ in network.named_parameters(remove_duplicate=False)).places
    modules: list[str] = [found for path in also for found in called(network.get_submodule(path), path, None)]
    parameters: list[str] = []
    path, holder = "", network
    for part in blocks.path.split(".") if blocks.path else ():
        parameters += _own(holder, path, places)
        for name, child in _children(holder):
            if name == part:
                break
            modules += called(child, _join(path, name), places)
        path, holder = _join(path, part), holder.get_submodule(part)
    parameters += _own(holder, path, places)
    for number in range(depth - 1):
        modules += called(holder.get_submodule(blocks.names[number]), blocks.at(number), None)
    last = blocks.at(depth - 1)
    ends = called(network.get_submodule(last), last, None) or [last]
    return Trunk((*(where for where in dict.fromkeys(modules) if where not in ends), *ends), tuple(parameters))


def _own(holder: nn.Module, path: str, places: Mapping[str, Place]) -> list[str]:
    """The parameters that a module holds itself (a class token, position embeddings)."""
    names = [_join(path, name) for name, parameter in holder._parameters.items() if parameter is not None]
    return [name for name in names if places[name].side != "after"]


def called(module: nn.Module, path: str, places: Mapping[str, Place] | None) -> list[str]:
    """The modules with a state at or below `path` that are called as wholes; those whose names put them behind are left."""
    if isinstance(module, _CONTAINERS):
        return [found for name, child in _children(module) for found in called(child, _join(path, name), places)]
    names = [_join(path, name) for name, _ in module.named_parameters(remove_duplicate=False)]
    if not names or (places is not None and all(places[name].side == "after" for name in names)):
        return []
    return [path]

"""One trunk and every head, in memory: `merge` of networks with different heads. All but the heads is merged and computed once.

    y_a = H_a(T(x)),   T = merge(T_1 .. T_M),   T_i all of network i besides its head

This is `sharing`'s network at its deepest, cut at the heads and not at a block. What is a head is `layout.heads`' to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from interfuse.errors import ModelError, OptionError, Problem
from interfuse.layout.heads import find_heads
from interfuse.transfer.sharing import SharedTrunk, merged_trunk
from interfuse.transfer.trunk import Blocks, Trunk, called


def separate_heads(
    method: str, experts: Mapping[str, nn.Module], heads: str | Sequence[str], *, base: nn.Module | None = None, **options: Any
) -> SharedTrunk:
    """Networks with different heads as one: {task: output} from one pass through the merged trunk.

    heads: "separate", or patterns of the heads' tensors. base, method, options: as for `merge`.

    Raises `OptionError` and `ModelError` with every problem, before anything is merged.
    """
    shapes = {task: {name: tuple(t.shape) for name, t in expert.state_dict().items()} for task, expert in experts.items()}
    first = next(iter(experts.values()))
    found = find_heads(shapes, heads, _last_linear(first))
    if found.problems:
        asked = [problem for problem in found.problems if problem.path.startswith("heads")]
        raise OptionError(*found.problems) if asked else ModelError(*found.problems)
    trunk = trunk_beside(first, found.names)
    if not trunk.modules:
        raise ModelError(Problem("models", "the trunk has no module of its own", "networks whose heads are modules"))
    values = merged_trunk(experts, trunk, base, method, options)
    return SharedTrunk(experts, trunk, values, depth=0, blocks=Blocks("", ()))


def trunk_beside(network: nn.Module, heads: Collection[str]) -> Trunk:
    """All of a network but the tensors `heads`: the largest modules without any, and parameters that stand beside them."""
    modules: list[str] = []
    parameters: list[str] = []
    paths = [""]
    while paths:
        path = paths.pop(0)
        inside = f"{path}." if path else ""
        module = network.get_submodule(path)
        if path and not any(name.startswith(inside) for name in heads):
            modules += called(module, path, None)
            continue
        own = [f"{inside}{name}" for name, parameter in module._parameters.items() if parameter is not None]
        parameters += [name for name in own if name not in heads]
        paths = [f"{inside}{name}" for name, child in module._modules.items() if child is not None] + paths
    return Trunk(tuple(dict.fromkeys(modules)), tuple(parameters))


def _last_linear(network: nn.Module) -> list[str]:
    """The tensors of the linear layer that is registered last; none for a network without any."""
    found = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    path = found[-1] if found else ""
    return [f"{path}.{name}" for name in network.get_submodule(path).state_dict()] if path else []

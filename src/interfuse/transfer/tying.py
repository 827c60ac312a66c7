"""`tie`: equal layers of different networks get the very same parameters, which `fit_tasks` then trains for all of them.

Soft sharing has no place here: after the first step the tied layers are still one (hard sharing, Caruana 1997), with the sum of
all networks' gradients. Where the networks are one architecture from the bottom up, `share_trunk` also computes them once.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.modules.inputs import Composite, call, inputs_by_model

STARTS = ("mean", "first")
#: One path for all networks, or each network's own.
Layer = str | Mapping[str, str]


def tie(
    models: Mapping[str, nn.Module], layers: Sequence[Layer], *, start: Literal["mean", "first"] = "mean", copy: bool = True
) -> Tied:
    """Networks whose `layers` have one and the same parameters.

    models: name -> network, of any architectures; they are copied unless `copy=False`.
    layers: paths of modules; of networks that call an equal layer otherwise a mapping, name -> path. Those that a mapping
        doesn't name have no part in it. Parameters of one name must have one shape.
    start: where the tied parameters begin, at the "mean" of the networks' or the "first" one's.

    Raises `OptionError` and `ModelError` with everything that doesn't fit, before anything is tied.
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        raise OptionError(Problem("models", f"got {type(models).__name__}", "name -> network, for at least two"))
    problems = [
        Problem(f"models[{name!r}]", f"got {type(model).__name__}", "a torch.nn.Module")
        for name, model in models.items()
        if not isinstance(model, nn.Module)
    ]
    if start not in STARTS:
        problems.append(Problem("start", f"got {start!r}", nearest(str(start), STARTS)))
    if isinstance(layers, str) or not layers:
        problems.append(Problem("layers", f"got {layers!r}", "a list of paths"))
    if problems:
        raise OptionError(*problems)
    networks = {name: copying.deepcopy(model) if copy else model for name, model in models.items()}
    groups = _groups(networks, layers)
    for group in groups:
        _tie(networks, group, start)
    return Tied(networks, layers)


class Tied(Composite):
    """Networks with parameters in common: `forward(inputs)` gives {name: output}, `forward(inputs, name)` one network's.

    Inputs are for all of them, or a mapping from every name to its own. `networks` are in the order of `names`; `layers` are
    those that are tied; `references` the paths or hub ids that give the networks' code again, if there are any.
    """

    references: tuple[str | None, ...] = ()

    def __init__(self, networks: Mapping[str, nn.Module], layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = tuple(dict(layer) if isinstance(layer, Mapping) else layer for layer in layers)
        self.names = tuple(networks)
        self.networks = nn.ModuleList(networks.values())

    def forward(self, inputs: Any, task: str | None = None) -> Any:
        """Inputs -> {name: output}, or with `task` that one's output."""
        if task is not None:
            return call(self.network(task), inputs, task)
        own = inputs_by_model(self.names, inputs)
        return {
            name: call(network, value, name)
            for name, network, value in zip(self.names, self.networks, own, strict=True)
            if value is not None
        }

    def network(self, name: str) -> nn.Module:
        """The network of that name."""
        if name not in self.names:
            raise OptionError(Problem("task", f"got {name!r}", nearest(str(name), self.names)))
        return self.networks[self.names.index(name)]


def _groups(networks: Mapping[str, nn.Module], layers: Sequence[Layer]) -> list[dict[str, str]]:
    """Parameters to be tied, name -> parameter's path, or everything that doesn't fit."""
    groups: list[dict[str, str]] = []
    problems: list[Problem] = []
    for number, layer in enumerate(layers):
        paths = dict(layer) if isinstance(layer, Mapping) else dict.fromkeys(networks, layer)
        wrong = _problems(networks, f"layers[{number}]", paths)
        problems += wrong
        if not wrong:
            first, path = next(iter(paths.items()))
            for name, _ in networks[first].get_submodule(path).named_parameters():
                groups.append({network: f"{where}.{name}" for network, where in paths.items()})
    if problems:
        raise ModelError(*problems)
    return groups


def _problems(networks: Mapping[str, nn.Module], at: str, paths: Mapping[str, str]) -> list[Problem]:
    if len(paths) < 2:
        return [Problem(at, f"got {dict(paths)!r}", "a path, or name -> path for at least two networks")]
    problems = []
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, path in paths.items():
        known = dict(networks[name].named_modules()) if name in networks else {}
        if name not in networks:
            problems.append(Problem(at, f"no model has the name {name!r}", nearest(str(name), networks)))
        elif not path or path not in known:
            problems.append(Problem(at, f"{name} has no module at {path!r}", nearest(path, [p for p in known if p])))
        else:
            shapes[name] = {key: tuple(p.shape) for key, p in known[path].named_parameters()}
    if problems:
        return problems
    (first, expected), *others = shapes.items()
    if not expected:
        return [Problem(at, f"{paths[first]!r} of {first} has no parameters", "a layer with some")]
    return [
        Problem(at, f"{paths[name]!r} of {name} has the parameters {found}", f"those of {first}: {expected}")
        for name, found in others
        if found != expected
    ]


def _tie(networks: Mapping[str, nn.Module], group: Mapping[str, str], start: str) -> None:
    """Make these parameters the first one, wherever in their networks they stand."""
    found = [networks[name].get_parameter(path) for name, path in group.items()]
    kept = found[0]
    if start == "mean":
        with torch.no_grad():
            kept.copy_(torch.stack([p.to(kept.device, torch.float64) for p in found]).mean(0))
    for name, parameter in zip(group, found, strict=True):
        _replace(networks[name], parameter, kept)


def _replace(network: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new

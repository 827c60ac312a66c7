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
#: Parameters that become one: (network's name, parameter's path).
Group = list[tuple[str, str]]


def tie(
    models: Mapping[str, nn.Module], layers: Sequence[Layer], *, start: Literal["mean", "first"] = "mean", copy: bool = True
) -> Tied:
    """Networks whose `layers` have one and the same parameters.

    models: name -> network, of any architectures; they are copied unless `copy=False`.
    layers: paths of modules; of networks that call an equal layer otherwise a mapping, name -> path. Those that a mapping
        doesn't name have no part in it. Parameters of one name must have one shape and type.
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


def _groups(networks: Mapping[str, nn.Module], layers: Sequence[Layer]) -> list[Group]:
    """Parameters to be tied, or everything that doesn't fit."""
    groups: list[Group] = []
    problems: list[Problem] = []
    for number, layer in enumerate(layers):
        paths = dict(layer) if isinstance(layer, Mapping) else dict.fromkeys(networks, layer)
        wrong = _problems(networks, f"layers[{number}]", layer, paths)
        problems += wrong
        if not wrong:
            first, path = next(iter(paths.items()))
            for name, _ in networks[first].get_submodule(path).named_parameters():
                groups.append([(network, f"{where}.{name}") for network, where in paths.items()])
    if problems:
        raise ModelError(*problems)
    return _joined(networks, groups)


def _joined(networks: Mapping[str, nn.Module], groups: Sequence[Group]) -> list[Group]:
    """Groups that have a parameter in common are one, so that all of it begins at one mean."""
    found: list[tuple[set[int], Group]] = []
    for group in groups:
        ids = {id(networks[name].get_parameter(path)) for name, path in group}
        touched = [entry for entry in found if entry[0] & ids]
        found = [entry for entry in found if not entry[0] & ids]
        members = [member for _, others in touched for member in others]
        found.append((ids.union(*(others for others, _ in touched)), list(dict.fromkeys([*members, *group]))))
    return [group for _, group in found]


def _problems(networks: Mapping[str, nn.Module], at: str, layer: Any, paths: Mapping[str, Any]) -> list[Problem]:
    if len(paths) < 2 or not all(isinstance(path, str) for path in paths.values()):
        return [Problem(at, f"got {layer!r}", "a path, or name -> path for at least two networks")]
    problems = []
    shapes: dict[str, dict[str, str]] = {}
    for name, path in paths.items():
        known = dict(networks[name].named_modules()) if name in networks else {}
        if name not in networks:
            problems.append(Problem(at, f"no model has the name {name!r}", nearest(str(name), networks)))
        elif not path or path not in known:
            problems.append(Problem(at, f"{name} has no module at {path!r}", nearest(path, [p for p in known if p])))
        else:
            shapes[name] = {
                key: f"{tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}" for key, p in known[path].named_parameters()
            }
    if problems:
        return problems
    (first, expected), *others = shapes.items()
    if not expected:
        return [Problem(at, f"{paths[first]!r} of {first} has no parameters", "a layer with some")]
    apart = [(name, [key for key in {**expected, **found} if found.get(key) != expected.get(key)]) for name, found in others]
    return [
        Problem(
            at,
            f"{paths[name]!r} of {name} has the parameters {_some(shapes[name], keys)}",
            f"those of {first}: {_some(expected, keys)}",
        )
        for name, keys in apart
        if keys
    ]


def _form(parameter: Tensor) -> str:
    return f"{tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"


def _some(shapes: Mapping[str, str], keys: Sequence[str], most: int = 3) -> str:
    """The parameters of these names, as far as they are there, in short."""
    shown = ", ".join(f"{key} {shapes[key]}" if key in shapes else f"no {key}" for key in keys[:most])
    return shown + (", ..." if len(keys) > most else "")


def _tie(networks: Mapping[str, nn.Module], group: Group, start: str) -> None:
    """Make these parameters the first one, wherever in their networks they stand."""
    parameters = [networks[name].get_parameter(path) for name, path in group]
    found = list({id(parameter): parameter for parameter in parameters}.values())  # one network may have one of them twice
    kept = found[0]
    if start == "mean":
        with torch.no_grad():
            kept.copy_(torch.stack([p.to(kept.device, torch.float64) for p in found]).mean(0))
    for (name, _), parameter in zip(group, parameters, strict=True):
        _replace(networks[name], parameter, kept)


def _replace(network: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new

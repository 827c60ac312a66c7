"""Blocks that are the identity put into a network: Net2Deeper (Chen et al. 2016, 1511.05641) and block expansion.

Behind an activation a with a(a(x)) = a(x): a layer whose weight is the identity, and a again. Behind a residual block
x + f(x): a copy of it with the last projections of f at zero (Wu et al. 2024, 2401.02415; where depth up-scaling, Kim et al.
2023, 2312.15166, copies layers as they are, which isn't exact: `transplant` with depth="repeat" does that). Which
projections those are is found by trying.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from interfuse.checkpoints.config import output_config
from interfuse.errors import Problem
from interfuse.modules.inputs import call, tensors_of
from interfuse.transfer.probe import TOLERANCE, change, difference
from interfuse.transfer.wider import CONVOLUTIONS, kind_of

_Norm = nn.modules.batchnorm._BatchNorm
_RUN = "give a list that the network runs through in order, whatever its length"


class _Seen(NamedTuple):
    """How a module was called, and what it gave first."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


def deepen(model: nn.Module, paths: Sequence[str], example: Any, before: Sequence[Tensor]) -> list[Problem]:
    """Put an identity behind each of these modules, in place; what is wrong, and then the network isn't to be used."""
    seen = _watched(model, paths, example)
    problems: list[Problem] = []
    added: dict[str, list[tuple[str, list[nn.Module]]]] = {}
    for path in dict.fromkeys(paths):
        outer, _, key = path.rpartition(".")
        made = _identity(model, outer, key, seen.get(path))
        if isinstance(made, str):
            problems.append(
                Problem(f"deeper[{path!r}]", made, "a residual block in a ModuleList or Sequential, or a ReLU there")
            )
        else:
            added.setdefault(outer, []).append((key, made))
    if problems:
        return problems
    for outer, items in added.items():
        _insert(model, outer, dict(items))
        new = [modules[0] for _, modules in items]
        called: list[nn.Module] = []
        hooks = [module.register_forward_hook(lambda module, *_, called=called: called.append(module)) for module in new]
        changed = change(model, example, before)
        for hook in hooks:
            hook.remove()
        if changed > TOLERANCE:
            wrong = f"the outputs change by {changed:.2g} of the largest, though each block is the identity alone"
            problems.append(Problem(f"deeper: {outer or 'model'}", wrong, _RUN))
        elif not set(new) <= set(called):
            problems.append(Problem(f"deeper: {outer or 'model'}", "the network doesn't call what is added", _RUN))
    return problems


def _watched(model: nn.Module, paths: Sequence[str], example: Any) -> dict[str, _Seen]:
    """How each of these was called, the last time."""
    seen: dict[str, _Seen] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            tensors = [tensor for _, tensor in tensors_of(output)]
            if tensors:
                past = {key: None if "past" in key else value for key, value in keywords.items()}  # a cache grows by a call
                seen[path] = _Seen(arguments, past, tensors[0].clone())

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    try:
        call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _identity(model: nn.Module, outer: str, key: str, seen: _Seen | None) -> list[nn.Module] | str:
    """What goes behind a module, or why there is nothing."""
    holder = model.get_submodule(outer)
    module = holder._modules[key]
    assert module is not None
    if not isinstance(holder, nn.Sequential | nn.ModuleList):
        return f"is in a {type(holder).__name__}"
    if seen is None:
        return "isn't called for the example, or gives no tensor"
    if next(module.parameters(), None) is None:
        return _layer(list(holder), list(holder._modules).index(key), seen.output)
    return _block(module, seen)


def _layer(siblings: Sequence[nn.Module], place: int, output: Tensor) -> list[nn.Module] | str:
    """The identity as the kind of layer that stands before the activation, and that activation again."""
    activation = siblings[place]
    before = next((module for module in reversed(siblings[:place]) if kind_of(module) is not None), None)
    if before is None:
        return "no Linear or convolution stands before it"
    like: dict[str, Any] = {"device": output.device, "dtype": output.dtype}
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    if isinstance(before, CONVOLUTIONS) and output.ndim == before.weight.ndim:
        layer = type(before)(output.shape[1], output.shape[1], 3, padding=1, **like)
        nn.init.dirac_(layer.weight)
    else:
        layer = nn.Linear(output.shape[-1], output.shape[-1], **like)
        nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    again = copy.deepcopy(activation)
    if difference([output], [again(layer(output))]) > TOLERANCE:
        return f"is a {type(activation).__name__}, which changes its own outputs when it comes twice"
    return [layer.eval(), again]


def _block(block: nn.Module, seen: _Seen) -> list[nn.Module] | str:
    """A copy of a residual block that is the identity, since as few of its projections as can be, the last ones, are zero."""
    new = copy.deepcopy(block)
    ends = [m for m in new.modules() if isinstance(m, _Norm) or kind_of(m) is not None]
    values = {tensor: tensor.detach().clone() for m in ends for tensor in m.parameters(recurse=False)}
    for tensor in values:
        tensor.zero_()
    if not _is_identity(new, seen):
        return f"is a {type(block).__name__} that isn't its input plus what its projections give"
    for module in ends:
        own = list(module.parameters(recurse=False))
        for tensor in own:
            tensor.copy_(values[tensor])
        if not _is_identity(new, seen):
            for tensor in own:
                tensor.zero_()
    return [new]


def _is_identity(block: nn.Module, seen: _Seen) -> bool:
    """Whether the block gives back what the block before it gave, which it may change in place."""
    arguments, keywords = seen.arguments, dict(seen.keywords)
    if arguments:
        arguments = (seen.output.clone(), *arguments[1:])
    else:
        first = next((key for key, value in keywords.items() if isinstance(value, Tensor)), None)
        if first is None:
            return False
        keywords[first] = seen.output.clone()
    try:
        given = [tensor for _, tensor in tensors_of(block(*arguments, **keywords))]
    except (RuntimeError, ValueError, IndexError, TypeError):  # its output isn't what it takes
        return False
    return bool(given) and difference([seen.output], given[:1]) <= TOLERANCE


def _insert(model: nn.Module, outer: str, added: dict[str, list[nn.Module]]) -> None:
    """Put modules behind those of these keys; numbers count on, other names get new ones beside them."""
    holder = model.get_submodule(outer)
    items: list[tuple[str, nn.Module]] = []
    origins = []
    for number, (key, module) in enumerate(holder.named_children()):
        items.append((key, module))
        items += [(f"{key}_{i}", extra) for i, extra in enumerate(added.get(key, ()), 1)]
        origins += [(0, number)] * (1 + len(added.get(key, ())))
    before = len(holder)  # type: ignore[arg-type]
    if all(key.isdecimal() for key in holder._modules):
        items = [(str(i), module) for i, (_, module) in enumerate(items)]
    holder._modules.clear()
    holder._modules.update(items)
    for i, (_, module) in enumerate(items):
        for part in module.modules():
            if isinstance(getattr(part, "layer_idx", None), int):  # where Transformers' cache keeps a layer
                part.layer_idx = i  # type: ignore[assignment]
    parts = outer.split(".") if outer else []
    holders = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))
    config = next((c for part in holders if hasattr(c := getattr(part, "config", None), "to_dict")), None)
    if config is not None:
        _set(config, _config(config.to_dict(), outer, origins, before))


def _config(config: dict[str, Any], outer: str, origins: list[tuple[int, int]], before: int) -> dict[str, Any]:
    """A config with the new number of layers: its own count, or that of a stage in its list of `depths`."""
    depths, stages = config.get("depths"), [int(part) for part in outer.split(".") if part.isdecimal()]
    if isinstance(depths, list) and stages and depths[stages[-1] : stages[-1] + 1] == [before]:
        return {**config, "depths": [len(origins) if i == stages[-1] else n for i, n in enumerate(depths)]}
    return output_config([config], 0, {f"{outer}.": origins}, {f"{outer}.": before})[0]


def _set(config: Any, made: dict[str, Any]) -> None:
    """Change a config's entries to these, nested as they are."""
    old = config.to_dict()
    for key, value in made.items():
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):
            _set(getattr(config, key), value)
        elif key not in old or old[key] != value:
            setattr(config, key, value)

"""Which parameters a training changes, and how fast each: by name, the head alone, LoRA factors, layer-wise learning rates.

Everything here is undone when the training ends: what may be trained, and LoRA's factors, which are added to the weights
that they stand for (Hu et al. 2021, 2106.09685; peft makes and adds them). Layer-wise decay gives layer l of L the learning
rate eta d^(L-l) (ULMFiT, Howard & Ruder 2018, 1801.06146). Nothing is trained here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from interfuse.checkpoints.layers import find_layers
from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.extras import require
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import Composite, call
from interfuse.modules.taps import are_heads, find_tap, quiet

#: In place of globs: what turns features into predictions, alone.
HEAD = "head"


@contextmanager
def trained(
    model: nn.Module, inputs: Any, train_only: str | Sequence[str] | None, lora: int | Mapping[str, Any] | None
) -> Iterator[None]:
    """Within it, only what is asked for is trained; afterwards the model has the same parameters as before, trained on.

    train_only: globs of parameters' names, or "head". lora: the rank, or options of peft's `LoraConfig`: the linear and
    convolutional layers get factors to train in their place, the head is trained whole. A fusion's frozen networks are
    never trained. Raises `OptionError` and `ModelError` before anything is changed.
    """
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    chosen = _chosen(model, inputs, train_only, before)
    layers = [] if lora is None else _layers(model, inputs, chosen)
    config = None if lora is None else _config(lora, layers)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        if config is not None:
            torch.backends.mha.set_fastpath_enabled(False)  # torch's transformer layers would read weights round the factors
            _add_factors(model, config, layers, heads(model, inputs), chosen)
        yield
    finally:
        if config is not None:
            torch.backends.mha.set_fastpath_enabled(fast)
            _fold(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _chosen(model: nn.Module, inputs: Any, train_only: str | Sequence[str] | None, before: Mapping[str, bool]) -> set[str]:
    if train_only is None:
        return {name for name, wanted in before.items() if wanted}
    patterns = [train_only] if isinstance(train_only, str) else list(train_only)
    found = [f"{path}.*" for path in heads(model, inputs)] if HEAD in patterns and not fnmatch.filter(before, HEAD) else []
    patterns = [p for p in patterns if p != HEAD or not found] + found
    frozen = tuple(f"backbones.{k}." for k, kept in enumerate(model.freeze) if kept) if isinstance(model, ModelFusion) else ()
    names = [name for name in before if not name.startswith(frozen)]
    problems = [
        Problem("train_only", f"{p!r} matches only what is frozen", "make the fusion with freeze=False")
        if fnmatch.filter(before, p)
        else Problem("train_only", f"{p!r} matches no parameter", nearest(p, names))
        for p in patterns
        if not fnmatch.filter(names, p)
    ]
    if problems:
        raise OptionError(*problems)
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def heads(model: nn.Module, inputs: Any) -> list[str]:
    """The paths of the modules that give the predictions: a fusion's head, the linear layer that a network ends in, or those
    that the members of an ensemble end in."""
    if isinstance(model, ModelFusion):
        return ["head"] if model.head is not None and any(True for _ in model.head.parameters()) else []
    tap = find_tap(model, inputs)
    if tap.side == "input":
        return [tap.path]
    return _of_members(model, inputs) if isinstance(model, Composite) else []


def _of_members(model: Composite, inputs: Any) -> list[str]:
    """The linear layer that each member ends in, where the prediction is made of these alone."""
    last: dict[str, str] = {}
    note = lambda path: lambda *_: last.update({".".join(path.split(".")[:2]): path})
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(note(path)) for path, module in linear if path.startswith("backbones.")]
    try:
        with quiet(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    paths = list(last.values())
    return paths if paths and are_heads(model, paths, inputs) else []


def _layers(model: nn.Module, inputs: Any, chosen: set[str]) -> list[str]:
    """The paths of the layers that LoRA adds factors to: linear and convolutional ones that would be trained, without heads."""
    last = heads(model, inputs)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_of_transformers())
    unread = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}  # only its weight is, by torch
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds) and f"{path}.weight" in chosen and getattr(module, "groups", 1) == 1
        and id(module) not in unread
        and not any(path == head or path.startswith(f"{head}.") for head in last)
    ]  # fmt: skip
    if not found:
        raise ModelError(Problem("lora", "no linear or convolutional layer besides the head is trained", "a network with some"))
    return found


def _of_transformers() -> tuple[type[nn.Module], ...]:
    """GPT-2's own linear layers, if there can be any."""
    import sys

    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module is not None else ()


def _config(lora: int | Mapping[str, Any], layers: Sequence[str]) -> Any:
    peft = require("peft")
    options: dict[str, Any] = {"r": lora, "lora_alpha": 2 * lora} if isinstance(lora, int) else dict(lora)
    options.setdefault("target_modules", list(layers))
    also = [name for name in ("modules_to_save", "bias") if options.get(name) not in (None, "none")]
    if also:
        allowed = "leave it out: beside the factors the head alone is trained"
        raise OptionError(*(Problem(f"lora.{name}", f"got {options[name]!r}", allowed) for name in also))
    try:
        return peft.LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise _of_peft(error) from error


def _of_peft(error: Exception) -> OptionError:
    return OptionError(Problem("lora", str(error), "a rank from 1 up, or options of peft's LoraConfig"))


def _add_factors(model: nn.Module, config: Any, layers: Sequence[str], last: Sequence[str], chosen: set[str]) -> None:
    """Put factors beside the layers; of what was there only the heads are trained on."""
    peft = require("peft")
    try:
        peft.inject_adapter_in_model(config, model)
    except (TypeError, ValueError) as error:
        raise _of_peft(error) from error
    for name, parameter in model.named_parameters():
        head = name in chosen and any(name.startswith(f"{path}.") for path in last)
        parameter.requires_grad_(head or ".lora_" in name)


def _fold(model: nn.Module) -> None:
    """Add every layer's factors to its weight, and put the layer back in its place."""
    kind = require("peft").tuners.tuners_utils.BaseTunerLayer
    for path, module in [(p, m) for p, m in model.named_modules() if isinstance(m, kind)]:
        module.merge(safe_merge=True)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module.get_base_layer())


def groups(model: nn.Module, learning_rate: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """What an optimizer is given: the trained parameters with their learning rates, the deeper a layer the higher.

    Layer l of L has learning_rate * layer_decay^(L-l); what stands before all layers counts as layer 0, what comes after
    them, and a fusion's own parameters, have the learning rate itself. Networks in a fusion count their layers apart.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layer_decay is None:
        return [{"params": [p for _, p in named], "lr": learning_rate}]
    rates: dict[float, list[nn.Parameter]] = {}
    depth = _heights(model)
    for name, parameter in named:
        rates.setdefault(learning_rate * layer_decay ** depth[name], []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in sorted(rates.items())]


def _heights(model: nn.Module) -> dict[str, int]:
    """How many layers stand above each parameter, 0 for what follows all layers."""
    names = [name for name, _ in model.named_parameters()]
    if not isinstance(model, Composite):
        return _network_heights(names)
    found = dict.fromkeys(names, 0)
    for k in range(len(model.names)):
        head = f"backbones.{k}."
        own = [name.removeprefix(head) for name in names if name.startswith(head)]
        found |= {f"{head}{name}": height for name, height in _network_heights(own).items()}
    return found


def _network_heights(names: Sequence[str]) -> dict[str, int]:
    places = find_layers([name.replace(".base_layer.", ".") for name in names]).places
    count = max((p.stack.count for p in places.values() if p.stack is not None), default=0)
    found = {}
    for name in names:
        place = places[name.replace(".base_layer.", ".")]
        if place.stack is not None:
            found[name] = place.stack.count - place.layer
        else:
            found[name] = 0 if place.side == "after" else count + 1
    return found

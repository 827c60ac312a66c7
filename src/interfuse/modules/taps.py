"""Taps: the place in a network where its features are read, and how they become (batch, width) or (batch, tokens, width).

A tap is found by a dry run: what feeds the last linear layer where that layer is the network's head, else what the
network returns. Reading uses hooks that are gone after the call; the network isn't changed. Taps don't know of fusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, Problem, nearest
from interfuse.modules.inputs import batch_size, call

#: What a mapping (or a Hugging Face output) calls its features, the best first.
FEATURE_KEYS = (
    *("last_hidden_state", "features", "embeddings", "embedding", "image_embeds", "text_embeds"),
    *("pooler_output", "hidden", "logits"),
)

_CHANNELS_FIRST = (
    nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm,
    nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d,
)  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """Where features are read: a module's path ("" is the whole network), and whether its input or its output is taken.

    `calls` is how often the module runs in one forward pass: features are taken at its last call.
    """

    path: str
    side: Literal["input", "output"] = "output"
    calls: int = 1

    def __str__(self) -> str:
        return f"{self.side} of {self.path or 'the network'}"


class _Stop(BaseException):
    """Ends a forward pass once the features are known."""


def module_at(model: nn.Module, path: str, name: str = "model") -> nn.Module:
    """The module at `path`, or a `ModelError` with the nearest paths."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise ModelError(Problem(f"taps[{name!r}]", f"no module at {path!r}", nearest(path, [p for p in modules if p])))
    return modules[path]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def find_tap(model: nn.Module, inputs: Any, path: str | None = None, name: str = "model") -> Tap:
    """The tap of `model`, by a dry run on `inputs`: the output of the module at `path`; without one the default tap.

    The default is what feeds the last linear layer, if no layer with parameters runs after it (it is then the head),
    and the network's output otherwise, or where the network returns hidden states rather than logits.
    """
    calls: list[str] = []
    handles = []
    if path is not None:
        module_at(model, path, name)
    for where, module in model.named_modules():
        if where == path or any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(lambda *_, where=where: calls.append(where)))
    try:
        with quiet(model):
            output = call(model, inputs, name)
    finally:
        for handle in handles:
            handle.remove()
    if path is not None:
        if path not in calls:
            raise ModelError(Problem(f"taps[{name!r}]", f"the module {path!r} doesn't run in forward", "name one that does"))
        return Tap(path, "output", calls.count(path))
    head = next((where for where in reversed(calls) if isinstance(model.get_submodule(where), nn.Linear)), None)
    if head is None or _gives_hidden_states(output):
        return Tap("")
    later = calls[len(calls) - calls[::-1].index(head) :]
    around = ("", *(head[:i] for i, letter in enumerate(head) if letter == "."))  # a module ends after its parts
    if any(where not in around for where in later):
        return Tap("")
    return Tap(head, "input", calls.count(head))


def _gives_hidden_states(output: Any) -> bool:
    return isinstance(output, Mapping) and "last_hidden_state" in output and "logits" not in output


def read(model: nn.Module, tap: Tap, inputs: Any, *, output: bool, name: str = "model") -> tuple[Any, Any]:
    """Run `model` and give (what is at the tap, the network's output).

    Without `output` the pass ends at the tap and the second is None.
    """
    if not tap.path and tap.side == "output":
        result = call(model, inputs, name)
        return result, result if output else None
    taken: list[Any] = []

    def take(value: Any) -> None:
        taken.append(value)
        if not output and len(taken) == tap.calls:
            raise _Stop

    module = module_at(model, tap.path, name)
    if tap.side == "output":
        handle = module.register_forward_hook(lambda _module, _args, result: take(result))
    else:
        handle = module.register_forward_pre_hook(
            lambda _module, args, kwargs: take(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
        )
    result = None
    try:
        result = call(model, inputs, name)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not taken:
        raise ModelError(Problem(f"taps[{name!r}]", f"the {tap} wasn't reached", "name a module that runs in forward"))
    return taken[-1], result


def features(
    value: Any, inputs: Any, tap_module: nn.Module, *, pool: bool, name: str = "model"
) -> tuple[Tensor, Tensor | None]:
    """What was read at a tap as (batch, width) with `pool`, else (batch, tokens, width); and the tokens' mask or None.

    Tokens (batch, tokens, width) are averaged over the tokens that the attention mask keeps; maps (batch, channels, h, w)
    over their places; of a tuple the first tensor counts, of a mapping the first of `FEATURE_KEYS`. (length, batch, width)
    is turned round when only its second axis is the batch.
    """
    tensor = _tensor(value, name)
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise _no_features(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    size = batch_size(inputs)
    if tensor.shape[0] != size and tensor.ndim == 3 and tensor.shape[1] == size:
        tensor = tensor.transpose(0, 1)
    if tensor.shape[0] != size:
        raise _no_features(name, f"shape {tuple(tensor.shape)} for a batch of {size}")
    if tensor.ndim == 2:
        return tensor, None
    if tensor.ndim >= 4 or isinstance(_last(tap_module), _CHANNELS_FIRST):
        tensor = tensor.flatten(2).transpose(1, 2)  # (batch, places, channels)
        mask = None
    else:
        mask = _token_mask(inputs, tensor)
    if not pool:
        return tensor, mask
    if mask is None:
        return tensor.mean(dim=1), None
    kept = mask.unsqueeze(-1).to(tensor.dtype)
    return (tensor * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1), None


def _no_features(name: str, found: str) -> ModelError:
    allowed = "floats (batch, width), (batch, tokens, width) or (batch, channels, h, w): name another module in `taps`"
    return ModelError(Problem(f"taps[{name!r}]", f"no features in {found}", allowed))


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        tensors = {key: v for key, v in value.items() if isinstance(v, Tensor)}
        for key in FEATURE_KEYS:
            if key in tensors:
                return tensors[key]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        raise _no_features(name, f"a mapping of {list(value)}")
    if isinstance(value, tuple | list) and value:
        return _tensor(value[0], name)
    raise _no_features(name, type(value).__name__)


def _last(module: nn.Module) -> nn.Module:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def _token_mask(inputs: Any, tokens: Tensor) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
        return mask.to(tokens.device).bool()
    return None

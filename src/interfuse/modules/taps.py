"""Taps: the place in a network where its features are read, and how they become (batch, width) or (batch, tokens, width).

A tap is found by a dry run: what feeds the last linear layer where that layer is the network's head, else what the
network returns. It is the head if nothing that the network has learned goes round it or comes after it. Reading uses
hooks that are gone after the call; the network isn't changed. Taps don't know of fusion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, Problem, nearest
from interfuse.modules.inputs import batch_size, call, prediction, with_each

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
    """Ends a forward pass once the features are known. Each reading raises its own: one may run within another."""


def module_at(model: nn.Module, path: str, name: str = "model") -> nn.Module:
    """The module at `path`, or a `ModelError` with the nearest paths."""
    modules = dict(model.named_modules(remove_duplicate=False))
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

    The default is what feeds the last linear layer, if all that the network predicts passes it (it is then the head), and
    the network's output otherwise, or where the network returns hidden states rather than logits.
    """
    if path is not None:
        watched = {path: module_at(model, path, name)}
    else:
        watched = {where: module for where, module in model.named_modules() if isinstance(module, nn.Linear)}
    calls: list[str] = []
    handles = [m.register_forward_hook(lambda *_, where=where: calls.append(where)) for where, m in watched.items()]
    try:
        with quiet(model):
            output = call(model, inputs, name)
    finally:
        for handle in handles:
            handle.remove()
    if path is not None:
        if not calls:
            raise ModelError(Problem(f"taps[{name!r}]", f"the module {path!r} doesn't run in forward", "name one that does"))
        return Tap(path, "output", len(calls))
    if not calls or _gives_hidden_states(output) or not are_heads(model, calls[-1:], inputs, name):
        return Tap("")
    return Tap(calls[-1], "input", calls.count(calls[-1]))


def _gives_hidden_states(output: Any) -> bool:
    return isinstance(output, Mapping) and "last_hidden_state" in output and "logits" not in output


@torch.inference_mode(False)
def are_heads(model: nn.Module, paths: Sequence[str], inputs: Any, name: str = "model") -> bool:
    """Whether the prediction depends on the network's parameters through those layers' outputs alone: with these cut off,
    would anything be left to train?"""
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)  # made in inference mode, it can't be asked itself
    trained = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    cut = lambda _module, _args, result: result.detach()
    handles = [model.get_submodule(path).register_forward_hook(cut) for path in paths]
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(True)
        # the graph is only looked at, so nothing is kept for a backward pass
        nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.new_empty(0), lambda kept: kept)
        with quiet(model), torch.enable_grad(), nothing_kept:
            return not prediction(call(model, with_each(inputs, torch.clone), name), name).requires_grad
    except ModelError:
        return False  # several outputs, of which none is the prediction
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


def read(model: nn.Module, tap: Tap, inputs: Any, *, output: bool, name: str = "model") -> tuple[Any, Any]:
    """Run `model` and give (what is at the tap, the network's output).

    Without `output` the pass ends at the tap and the second is None.
    """
    if not tap.path and tap.side == "output":
        result = call(model, inputs, name)
        return result, result if output else None
    taken: list[Any] = []
    stop = _Stop()

    def take(value: Any) -> None:
        taken.append(value)
        if not output and len(taken) == tap.calls:
            raise stop

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
    except _Stop as reached:
        if reached is not stop:
            raise
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
    over their places, (batch, h, w, channels) behind a linear layer or layer normalisation; (batch, channels, length) is
    known by a one-dimensional convolution, normalisation or pooling. Of a tuple the first tensor counts, of a mapping or an
    object the first of `FEATURE_KEYS`. (length, batch, width) is turned round when only its second axis is the batch.
    """
    tensor = tensor_of(value, name)
    axes = axes_of(tensor, inputs, tap_module, name)
    if axes.batch_second:
        tensor = tensor.transpose(0, 1)
    if tensor.ndim == 2:
        return tensor, None
    mask = None
    if axes.channels_first:
        tensor = tensor.flatten(2).transpose(1, 2)  # (batch, places, channels)
    elif tensor.ndim >= 4:
        tensor = tensor.flatten(1, -2)
    else:
        mask = token_mask(inputs, tensor)
    if not pool:
        return tensor, mask
    if mask is None:
        return tensor.mean(dim=1), None
    kept = mask.unsqueeze(-1).to(tensor.dtype)
    return (tensor * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1), None


class Axes(NamedTuple):
    """Which axis of features is which: (length, batch, width) with `batch_second`, (batch, channels, ...) with
    `channels_first`, else (batch, ..., width)."""

    batch_second: bool
    channels_first: bool


def axes_of(tensor: Tensor, inputs: Any, tap_module: nn.Module, name: str = "model") -> Axes:
    """The axes of what `tap_module` gave for a batch of inputs; a `ModelError` where it holds no features of that batch."""
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise _no_features(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    size = batch_size(inputs)
    last = _last(tap_module)
    turned = tensor.ndim == 3 and tensor.shape[1] == size and (tensor.shape[0] != size or _batch_is_second(last))
    if tensor.shape[1 if turned else 0] != size:
        raise _no_features(name, f"shape {tuple(tensor.shape)} for a batch of {size}")
    if tensor.ndim >= 4:
        return Axes(turned, not (isinstance(last, nn.Linear) or type(last) is nn.LayerNorm))
    return Axes(turned, tensor.ndim == 3 and isinstance(last, _CHANNELS_FIRST))


def _no_features(name: str, found: str) -> ModelError:
    allowed = "floats (batch, width), (batch, tokens, width) or (batch, channels, h, w): name another module in `taps`"
    return ModelError(Problem(f"taps[{name!r}]", f"no features in {found}", allowed))


def tensor_of(value: Any, name: str = "model") -> Tensor:
    """The features in what a module gives: a tensor, the first of a tuple, or of a mapping the best of `FEATURE_KEYS`."""
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
    for key in FEATURE_KEYS:
        if isinstance(found := getattr(value, key, None), Tensor):
            return found
    if isinstance(value, tuple | list) and value:
        return tensor_of(value[0], name)
    raise _no_features(name, type(value).__name__)


def _last(module: nn.Module) -> nn.Module:
    """The last layer of a chain that says what its axes are; activations and dropout don't."""
    if isinstance(module, nn.Sequential):
        parts = [_last(part) for part in module]
        return next((part for part in reversed(parts) if not _is_elementwise(part)), module)
    return module


def _is_elementwise(module: nn.Module) -> bool:
    home = type(module).__module__.removeprefix("torch.nn.modules.")
    return isinstance(module, nn.Identity) or (
        home in ("activation", "dropout") and not isinstance(module, nn.MultiheadAttention)
    )


def _batch_is_second(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer):
        module = module.self_attn
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first


def token_mask(inputs: Any, tokens: Tensor) -> Tensor | None:
    """Which of `tokens` (batch, tokens, width) the inputs' attention mask keeps; None where there is no such mask."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
        return mask.to(tokens.device).bool()
    return None

"""`ModelFusion`: several trained networks of any kind as one, their features joined.

    taps read f_k(x) -> a fusion module gives z(x) -> a head gives logits (+ the parents' own logits, the residual)

This puts the parts together and keeps the networks from being changed. How features are fused is in the modules beside
it; training is in `training`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.modules.inputs import Composite, inputs_by_model, prediction
from interfuse.modules.members import members
from interfuse.modules.taps import Tap, features, find_tap, module_at, quiet, read
from interfuse.registry import find

DEFAULT_DIM = 256


class Reading(NamedTuple):
    """What is read from one network: features (None: missing), the tokens' mask, and its own logits where they count."""

    features: Tensor | None
    mask: Tensor | None = None
    logits: Tensor | None = None


class ModelFusion(Composite):
    """Join the features of several trained networks into one network, to be trained with `fit`.

    models: a list or dict of any `nn.Module`s, or of paths and hub ids. They are copied, so never changed; `copy=False`
        takes them themselves.
    fusion: attention, gate, shared, concat, mean, weighted or transformer; further keywords are that module's options.
    dim: width of the fused features. Default: the largest width, at most 256, rounded up to a multiple of 8 (and of heads).
    head: number of classes (or of values to regress), or a module from (batch, dim) to predictions. Default: none.
    taps: where each network's features are read, as modules' paths, a list or a dict by name; None (or an entry of None)
        is what feeds the network's last linear layer, or its output where it has no linear head.
    freeze: whether the networks are kept as they are: one for all, a list, or a dict by name. Frozen ones always run in
        evaluation mode and without gradients.
    example: inputs for the dry run that finds taps and widths. Without it the first forward does that.
    pool: "mean" averages tokens and places to one vector a network; "none" hands all of them to the fusion.
    residual: where networks predict as many classes as `head` names, add their own logits to the head's, which starts at
        zero: at step 0 the fusion equals those networks' mean, or the one named by `start_from` (`fit` finds the best).

    Raises `ModelError` for models, taps, inputs and heads that don't fit, `OptionError` for options.
    """

    mix: Tensor  # (models,): each parent's share in the residual

    @torch.inference_mode(False)  # what is made in inference mode could never be trained
    def __init__(
        self,
        models: Sequence[nn.Module | str] | Mapping[str, nn.Module | str],
        fusion: str = "attention",
        dim: int | None = None,
        head: int | nn.Module | None = None,
        taps: Sequence[str | None] | Mapping[str, str | None] | None = None,
        freeze: bool | Sequence[bool] | Mapping[str, bool] = True,
        example: Any = None,
        *,
        pool: Literal["mean", "none"] = "mean",
        residual: bool = True,
        copy: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind = fusion
        self.options = find(fusion, "features", "fusion").check(options, "options")
        _check(dim, head, pool)
        self.names, self.backbones, self.references = members(models, copy=copy)
        self.asked_taps = _by_name(self.names, taps, None, "taps")
        for name, backbone, path in zip(self.names, self.backbones, self.asked_taps, strict=True):
            if path is not None:
                module_at(backbone, path, name)
        self.freeze = tuple(bool(f) for f in _by_name(self.names, freeze, True, "freeze"))
        self.dim, self.pool, self.residual = dim, pool, residual
        self.classes = head if isinstance(head, int) else None
        self.fusion: nn.Module | None = None
        self.head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self.taps: tuple[Tap, ...] = ()
        self.widths: tuple[int, ...] = ()
        self.parents: tuple[bool, ...] = ()
        self.register_buffer("mix", torch.ones(len(self.names)))
        self._hold()
        self.train(self.training)
        if example is not None:
            self.build(example)

    def _hold(self) -> None:
        for backbone, frozen in zip(self.backbones, self.freeze, strict=True):
            if frozen:
                backbone.requires_grad_(False)

    @property
    def built(self) -> bool:
        """Whether taps and widths are known, and so the fusion's own parameters exist."""
        return self.fusion is not None

    def train(self, mode: bool = True) -> ModelFusion:
        """Set training mode; frozen networks stay in evaluation mode."""
        super().train(mode)
        for backbone, frozen in zip(self.backbones, self.freeze, strict=True):
            if frozen:
                backbone.eval()
        return self

    def build(self, inputs: Any) -> ModelFusion:
        """Find taps and widths by a dry run on `inputs`, and make the fusion's own parameters. Done once."""
        if self.built:
            return self
        own = inputs_by_model(self.names, inputs)
        taps, seen, outputs = [], [], []
        problems: list[Problem] = []
        for k, x in enumerate(own):
            try:
                tap, found, output = self._try(k, x)
            except ModelError as error:
                problems += error.problems
                continue
            taps.append(tap)
            seen.append(found)
            outputs.append(_width(output))
        if problems:
            raise ModelError(*problems)
        self.make(taps, [int(f.shape[-1]) for f in seen], outputs)
        self.to(seen[0].device)
        self._hold()  # a network may have made its parameters in the dry run
        return self

    def _try(self, k: int, inputs: Any) -> tuple[Tap, Tensor, Any]:
        """Network k's tap, features and output in a dry run."""
        name, backbone = self.names[k], self.backbones[k]
        if inputs is None:
            raise ModelError(Problem(f"inputs[{name!r}]", "None", "the first inputs must be there for every model"))
        if isinstance(backbone, ModelFusion):
            backbone.build(inputs)
        tap = find_tap(backbone, inputs, self.asked_taps[k], name)
        with quiet(backbone):
            value, output = read(backbone, tap, inputs, output=True, name=name)
        return tap, self._features(backbone, tap, value, inputs, name)[0], output

    @torch.inference_mode(False)
    def make(self, taps: Sequence[Tap], widths: Sequence[int], outputs: Sequence[int | None]) -> None:
        """Make the fusion's own parameters for networks with these taps, widths and numbers of classes."""
        step = math.lcm(8, int(self.options.get("heads", 1)))
        dim = self.dim or -(-min(max(widths), DEFAULT_DIM) // step) * step
        fusion = find(self.kind, "features").make(widths, dim, **self.options)
        if self.classes is None and self.head is not None:
            _try_head(self.head, dim)
        self.taps, self.widths, self.dim, self.fusion = tuple(taps), tuple(widths), dim, fusion
        if self.classes is not None:
            self.head = nn.Linear(dim, self.classes)
        self.parents = tuple(self.residual and self.classes is not None and output == self.classes for output in outputs)
        self.mix.copy_(torch.tensor(self.parents, dtype=torch.float) / max(1, sum(self.parents)))
        if any(self.parents) and isinstance(self.head, nn.Linear):  # step 0 is the parents
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        reference = next((p for p in self.backbones.parameters() if p.is_floating_point()), None)
        if reference is not None:
            fusion.to(reference.device)
            self.mix.data = self.mix.to(reference.device)
            if self.head is not None:
                self.head.to(reference.device)

    def start_from(self, name: str) -> None:
        """Make step 0 equal to the network `name`, or to the mean of all parents with `"mean"`."""
        if not self.built:
            raise ModelError(Problem("start_from", f"{name!r} before taps are known", "give example=, or call build(inputs)"))
        allowed = [n for n, parent in zip(self.names, self.parents, strict=True) if parent]
        if name not in (*allowed, "mean"):
            raise ModelError(Problem("start_from", f"{name!r} has no logits for this head", nearest(name, [*allowed, "mean"])))
        keep = [parent and name in (n, "mean") for n, parent in zip(self.names, self.parents, strict=True)]
        self.mix.copy_(torch.tensor(keep, dtype=self.mix.dtype) / sum(keep))

    def forward(self, inputs: Any, return_weights: bool = False) -> Any:
        """Predictions (batch, classes) with a head, else fused features (batch, dim).

        inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a mapping from model name to that model's
            inputs, None for a model whose input is missing.
        return_weights: give (predictions, weights), weights (batch, models): each network's share in the fused features.
        """
        self.build(inputs)
        own = inputs_by_model(self.names, inputs)
        return self.fuse([self.read(k, x) for k, x in enumerate(own)], return_weights)

    def read(self, k: int, inputs: Any) -> Reading:
        """What network `k` gives for its own inputs; `Reading(None)` for inputs of None."""
        if inputs is None:
            return Reading(None)
        name, backbone, tap = self.names[k], self.backbones[k], self.taps[k]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze[k]):
            value, output = read(backbone, tap, inputs, output=self.parents[k], name=name)
            found, mask = self._features(backbone, tap, value, inputs, name)
            return Reading(found, mask, prediction(output, name) if self.parents[k] else None)

    def fuse(self, readings: Sequence[Reading], return_weights: bool = False) -> Any:
        """`forward` from what was read of each network, so that frozen networks need to be read only once."""
        assert self.fusion is not None
        like = next(self.fusion.parameters(), None)  # a fusion may have nothing to learn
        feats = [r.features if r.features is None or like is None else r.features.to(like.dtype) for r in readings]
        z, weights = self.fusion(feats, [r.mask for r in readings])
        if z.ndim == 3:
            z = _mean_over_tokens(z, [r.mask for r in readings if r.features is not None])
        result = z if self.head is None else self.head(z)
        if any(self.parents):
            result = result + self._residual(readings).to(result.dtype)
        return (result, weights) if return_weights else result

    def _residual(self, readings: Sequence[Reading]) -> Tensor:
        there = [k for k, r in enumerate(readings) if r.logits is not None]
        if not there:
            return torch.zeros((), device=self.mix.device)
        logits = torch.stack([r.logits for r in readings if r.logits is not None])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float))  # half precision is too coarse to add in
        share = self.mix[there].to(logits.dtype)
        share = torch.where(share.sum() > 0, share, torch.ones_like(share))  # the one we start from is missing: the others
        share = (share / share.sum()).view(-1, 1, 1)
        return torch.where(share > 0, share * logits, 0.0).sum(dim=0)  # those that have no share may be infinite

    def _features(self, backbone: nn.Module, tap: Tap, value: Any, inputs: Any, name: str) -> tuple[Tensor, Tensor | None]:
        return features(value, inputs, backbone.get_submodule(tap.path), pool=self.pool == "mean", name=name)


def _check(dim: Any, head: Any, pool: str) -> None:
    problems = []
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        problems.append(Problem("dim", f"got {dim!r}", "a whole number from 1 up, or None"))
    if not (
        head is None or isinstance(head, nn.Module) or (isinstance(head, int) and not isinstance(head, bool) and head >= 1)
    ):
        problems.append(Problem("head", f"got {head!r}", "a number of classes, a module, or None"))
    if pool not in ("mean", "none"):
        problems.append(Problem("pool", f"got {pool!r}", nearest(str(pool), ["mean", "none"])))
    if problems:
        raise OptionError(*problems)


def _by_name(names: Sequence[str], value: Any, default: Any, path: str) -> list[Any]:
    """One entry a model from a single value, a list, or a dict by name."""
    if isinstance(value, Mapping):
        unknown = [Problem(f"{path}[{k!r}]", "no model has this name", nearest(str(k), names)) for k in value if k not in names]
        if unknown:
            raise ModelError(*unknown)
        return [value.get(name, default) for name in names]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(names):
            raise ModelError(Problem(path, f"{len(value)} given for {len(names)} models", "one a model, or a dict by name"))
        return list(value)
    return [value] * len(names)


def _width(output: Any) -> int | None:
    try:
        found = prediction(output)
    except ModelError:
        return None  # a network may give no prediction at all: then its features are all that is used
    return int(found.shape[1]) if found.ndim == 2 else None


def _try_head(head: nn.Module, dim: int) -> None:
    place = next((p for p in head.parameters()), torch.zeros(()))
    try:
        with quiet(head):
            head(torch.zeros(2, dim, dtype=place.dtype, device=place.device))
    except (RuntimeError, TypeError, ValueError) as error:
        wrong = f"{type(head).__name__} doesn't take fused features (batch, {dim}): {error}"
        raise ModelError(Problem("head", wrong, f"a module from width {dim}, or another dim")) from error


def _mean_over_tokens(z: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    tokens = [m for m in masks if m is not None and m.ndim == 2]
    if len(tokens) < len(masks):
        return z.mean(dim=1)
    kept = torch.stack(tokens).any(dim=0).unsqueeze(-1).to(z.dtype)
    return (z * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)

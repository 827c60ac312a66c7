"""`ModelFusion`: several trained networks of any kind as one, their features joined.

    taps read f_k(x) -> a fusion module gives z(x) -> a head gives logits (+ the parents' own logits, the residual)

This puts the parts together and keeps the networks from being changed. They may read different inputs; what stands in for
one that is missing is in `readings`, how features are fused in the modules beside it, and training in `training`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.modules.inputs import Composite, Marked, inputs_by_model, lacks, prediction
from interfuse.modules.members import members
from interfuse.modules.readings import Reading as Reading
from interfuse.modules.readings import dropped, marked, presence, rows_there, spread, with_tokens
from interfuse.modules.taps import Tap, features, find_tap, module_at, quiet, read
from interfuse.registry import find

DEFAULT_DIM = 256


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
    inputs: what each network reads, a name a network in a list or a dict: batches may go by these names too, and networks
        that read the same are missing together. Default: each network's own name.
    branch_dropout: in training, each network is dropped from each example with this probability, in [0, 1), never all.
    missing: what stands in for a network without an input: "token", a learned vector in place of its features; "none":
        the fusion leaves it out by itself. Default: "token" with branch_dropout, else "none".

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
        inputs: Sequence[str] | Mapping[str, str] | None = None,
        branch_dropout: float = 0.0,
        missing: Literal["token", "none"] | None = None,
        copy: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind = fusion
        self.options = find(fusion, "features", "fusion").check(options, "options")
        _check(dim, head, pool, branch_dropout, missing)
        self.names, self.backbones, self.references = members(models, copy=copy)
        self.inputs = _reads(self.names, inputs)
        self.branch_dropout, self.missing = float(branch_dropout), missing or ("token" if branch_dropout else "none")
        self.asked_taps = _by_name(self.names, taps, None, "taps")
        for name, backbone, path in zip(self.names, self.backbones, self.asked_taps, strict=True):
            if path is not None:
                module_at(backbone, path, name)
        self.freeze = tuple(bool(f) for f in _by_name(self.names, freeze, True, "freeze"))
        self.dim, self.pool, self.residual = dim, pool, residual
        self.classes = head if isinstance(head, int) else None
        self.fusion: nn.Module | None = None
        self.head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self.tokens: nn.ParameterList | None = None
        self.left_out: frozenset[int] = frozenset()
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
        taps, seen, outputs = [], [], []
        problems: list[Problem] = []
        for k, given in enumerate(inputs_by_model(self.names, inputs, self.inputs, missing=True)):
            x = given.inputs if isinstance(given, Marked) else given
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
        if self.missing == "token":
            self.tokens = nn.ParameterList(torch.randn(width) for width in widths)
        reference = next((p for p in self.backbones.parameters() if p.is_floating_point()), None)
        if reference is not None:
            self.mix.data = self.mix.to(reference.device)
            for own in (fusion, self.head, self.tokens):
                if own is not None:
                    own.to(reference.device)

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
            inputs. An input is missing where it is None or isn't in the mapping (once the fusion is built), and in those
            examples where the mapping's "present", {name: booleans (batch,)}, says so; what it holds there is never read.
        return_weights: give (predictions, weights), weights (batch, models): each network's share in the fused features,
            or that of the token in its place.
        """
        self.build(inputs)
        own = self.own_inputs(inputs)
        readings = [Reading(None) if k in self.left_out else self.read(k, x) for k, x in enumerate(own)]
        return self.fuse(readings, return_weights)

    def own_inputs(self, inputs: Any) -> list[Any]:
        """Each network's own inputs, for `read`: None where they are missing, `Marked` where some examples lack them."""
        own = inputs_by_model(self.names, inputs, self.inputs, missing=True)
        found = [None if lacks(network, x) else x for network, x in zip(self.backbones, own, strict=True)]
        return own if all(x is None for x in found) else found  # where none finds its own, each says what it needs

    @contextmanager
    def without(self, *names: str) -> Iterator[ModelFusion]:
        """As long as it lasts, these inputs (or the inputs of the networks of these names) are missing from every example."""
        known = tuple(dict.fromkeys((*self.inputs, *self.names)))
        problems = [Problem("without", f"no input is named {n!r}", nearest(str(n), known)) for n in names if n not in known]
        gone = {k for k, own in enumerate(zip(self.names, self.inputs, strict=True)) if set(own) & set(names)}
        before, after = self.left_out, self.left_out | gone
        if len(after) == len(self.names):
            problems.append(Problem("without", f"{list(names)} leaves no network an input", "leave at least one"))
        if problems:
            raise OptionError(*problems)
        self.left_out = after
        try:
            yield self
        finally:
            self.left_out = before

    def read(self, k: int, inputs: Any) -> Reading:
        """What network `k` gives for its own inputs; `Reading(None)` for inputs of None."""
        if inputs is None:
            return Reading(None)
        if isinstance(inputs, Marked):
            return self._read_rows(k, inputs)
        name, backbone, tap = self.names[k], self.backbones[k], self.taps[k]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze[k]):
            value, output = read(backbone, tap, inputs, output=self.parents[k], name=name)
            found, mask = self._features(backbone, tap, value, inputs, name)
            return Reading(found, mask, prediction(output, name) if self.parents[k] else None)

    def _read_rows(self, k: int, inputs: Marked) -> Reading:
        """What network `k` gives for the examples that have its input; it doesn't see the others."""
        kept, rows = rows_there(inputs)
        if len(rows):
            return spread(self.read(k, kept), rows, inputs.present)
        if self.pool == "none":
            return Reading(None)  # nobody knows how many tokens there would be
        none = self.mix.new_zeros(0, self.widths[k])
        logits = self.mix.new_zeros(0, self.classes or 0) if self.parents[k] else None
        return spread(Reading(none, None, logits), rows, inputs.present)

    def fuse(self, readings: Sequence[Reading], return_weights: bool = False) -> Any:
        """`forward` from what was read of each network, so that frozen networks need to be read only once."""
        assert self.fusion is not None
        like = next(self.fusion.parameters(), None)  # a fusion may have nothing to learn
        seen = [r if k not in self.left_out else Reading(None) for k, r in enumerate(readings)]
        seen = [r if r.features is None or like is None else r._replace(features=r.features.to(like.dtype)) for r in seen]
        seen, given = self._stand_in(seen)
        z, weights = self.fusion([r.features for r in given], [r.mask for r in given])
        if z.ndim == 3:
            z = _mean_over_tokens(z, [r.mask for r in seen if r.features is not None])
        result = z if self.head is None else self.head(z)
        if any(self.parents):
            result = result + self._residual(seen).to(result.dtype)
        return (result, weights) if return_weights else result

    def _stand_in(self, readings: list[Reading]) -> tuple[list[Reading], list[Reading]]:
        """What is there of the readings, after branch dropout; and what the fusion is given, tokens in place of the rest."""
        dropping = self.training and self.branch_dropout > 0
        whole = all(r.features is not None and r.present is None for r in readings)
        if all(r.features is None for r in readings) or not (
            dropping or any(r.present is not None for r in readings) or (self.tokens is not None and not whole)
        ):
            return readings, readings
        there = presence(readings)
        there = dropped(there, self.branch_dropout) if dropping else there
        seen = marked(readings, there)
        return seen, seen if self.tokens is None else with_tokens(seen, there, list(self.tokens))

    def _residual(self, readings: Sequence[Reading]) -> Tensor:
        """The parents' own logits, each example's from those that are there."""
        there = [k for k, r in enumerate(readings) if r.logits is not None]
        if not there:
            return torch.zeros((), device=self.mix.device)
        logits = torch.stack([r.logits for r in readings if r.logits is not None])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float))  # half precision is too coarse to add in
        marks = [readings[k].present for k in there]
        share = self.mix[there].to(logits.dtype).unsqueeze(1).expand(logits.shape[:2])  # (models, batch)
        left = torch.stack([share.new_ones(share.shape[1]) if m is None else m.to(share) for m in marks])
        share = share * left
        share = torch.where(share.sum(0) > 0, share, left)  # the one we start from is missing: the others
        share = (share / share.sum(0).clamp(min=torch.finfo(share.dtype).tiny)).unsqueeze(2)
        return torch.where(share > 0, share * logits, 0.0).sum(dim=0)  # those that have no share may be infinite

    def _features(self, backbone: nn.Module, tap: Tap, value: Any, inputs: Any, name: str) -> tuple[Tensor, Tensor | None]:
        return features(value, inputs, backbone.get_submodule(tap.path), pool=self.pool == "mean", name=name)


def _check(dim: Any, head: Any, pool: str, branch_dropout: Any, missing: Any) -> None:
    problems = []
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        problems.append(Problem("dim", f"got {dim!r}", "a whole number from 1 up, or None"))
    if not (
        head is None or isinstance(head, nn.Module) or (isinstance(head, int) and not isinstance(head, bool) and head >= 1)
    ):
        problems.append(Problem("head", f"got {head!r}", "a number of classes, a module, or None"))
    if pool not in ("mean", "none"):
        problems.append(Problem("pool", f"got {pool!r}", nearest(str(pool), ["mean", "none"])))
    if isinstance(branch_dropout, bool) or not isinstance(branch_dropout, int | float) or not 0 <= branch_dropout < 1:
        problems.append(Problem("branch_dropout", f"got {branch_dropout!r}", "a probability from 0 up, below 1"))
    if missing not in (None, "token", "none"):
        problems.append(Problem("missing", f"got {missing!r}", nearest(str(missing), ["token", "none"])))
    if problems:
        raise OptionError(*problems)


def _reads(names: Sequence[str], inputs: Any) -> tuple[str, ...]:
    """What each network reads: its own name where nothing is said."""
    given = _by_name(names, inputs, None, "inputs")
    found = tuple(name if read is None else read for name, read in zip(names, given, strict=True))
    problems = [
        Problem(f"inputs[{name!r}]", f"got {read!r}", "the name of what the network reads, such as 'image'")
        for name, read in zip(names, found, strict=True)
        if not isinstance(read, str) or not read
    ]
    problems += [
        Problem(f"inputs[{name!r}]", f"{read!r} is another network, which reads {found[names.index(read)]!r}", "another name")
        for name, read in zip(names, found, strict=True)
        if read in names and found[names.index(read)] != read
    ]
    if problems:
        raise ModelError(*problems)
    return found


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

"""Cross-stitch: trained networks side by side, which at several depths see a little of each other's features.

    h_k' = alpha_kk h_k + sum over j != k of alpha_kj (P_kj h_j + c_kj)        at each depth, alpha = 0.9 own, 0.1 others'

(Misra et al. 2016, 1604.03539.) There the networks have one architecture and P is the identity; here they may be any, and
P_kj is the affine map that gives h_k from h_j best, least squares on the example: so the mix begins near the parent though
channels are in another order, and is the parent for equal networks. Each network keeps its head, and the mean of all is
given; or all share one, of what feeds their heads side by side, which begins as that mean.

Each network runs from one depth to the next, with what is behind passed over as in `stitched`. It isn't a fusion of features
at one place (`fused`), and costs all its networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, UserError, nearest
from interfuse.modules.inputs import Composite, call, inputs_by_model, prediction
from interfuse.modules.least_squares import Moments
from interfuse.modules.members import members
from interfuse.modules.places import Layout, join, layout_of
from interfuse.modules.stitched import blanks_of, earlier, from_place_on, passed_over, put_into, shapes_of, watching
from interfuse.modules.taps import Tap, features, find_tap, module_at, quiet, read, tensor_of

_RIDGE = 1e-6  # as in `transfer.stitch`


class CrossUnit(nn.Module):
    """The mix at one depth: features (batch, places ..., width_k) of all networks -> as many, of the same shapes.

    `alphas[k]` is (models,), or (models, width_k) with one a channel.
    """

    def __init__(self, widths: Sequence[int], own: float, per: str) -> None:
        super().__init__()
        count = len(widths)
        self.alphas = nn.ParameterList()
        self.maps = nn.ModuleList()
        for k, width in enumerate(widths):
            start = torch.full((count,), (1 - own) / max(1, count - 1))
            start[k] = own
            self.alphas.append(nn.Parameter(start if per == "unit" else start.unsqueeze(1).repeat(1, width)))
            self.maps.append(nn.ModuleList(nn.Identity() if j == k else nn.Linear(w, width) for j, w in enumerate(widths)))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """h -> h'."""
        mixed = []
        rows: Any
        for h, alpha, rows in zip(features, self.alphas, self.maps, strict=True):
            places = tuple(h.shape[1:-1])
            mixed.append(sum(a * to_h(join(x, places)) for a, to_h, x in zip(alpha, rows, features, strict=True)))
        return mixed

    @torch.no_grad()
    def align(self, features: Sequence[Tensor]) -> None:
        """Make P_kj the least-squares map between these features."""
        rows: Any
        for k, (h, rows) in enumerate(zip(features, self.maps, strict=True)):
            for j, x in enumerate(features):
                if j != k:
                    moments = Moments()
                    moments.add(join(x, tuple(h.shape[1:-1])).flatten(0, -2), h.flatten(0, -2))
                    weight, bias = moments.solve(_RIDGE)
                    rows[j].weight.copy_(weight)
                    rows[j].bias.copy_(bias)


class CrossStitch(Composite):
    """Several trained networks side by side, mixed at several depths; gives the mean of their predictions, (batch, classes),
    or the prediction of one head for all.

    models: as for `ModelFusion`; copied unless `copy=False`. at: the modules' paths in the order they run, one list for all
        networks or a list a network; depth by depth the networks are mixed after these modules.
    example: inputs, a few hundred or more, from which the maps between the networks are made; not kept.
    own: how much of itself each network begins with, in [0, 1]; the others share the rest.
    per: one weight for a network's features as a whole ("unit"), or one for each "channel".
    freeze: whether the networks are kept as they are, in evaluation mode, and only what joins them is trained.
    head: how many outputs one linear layer for all has, of what feeds each network's last linear layer (or of its outputs,
        where that isn't its head); where the networks have as many outputs it begins as the mean of their heads. Default:
        each keeps its own, and they must predict the same classes.

    Raises `ModelError` for places that aren't there, don't follow one another, or that something random or with running
    statistics goes round, `OptionError` for options.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        models: Sequence[nn.Module | str] | Mapping[str, nn.Module | str],
        at: Sequence[str] | Sequence[Sequence[str]],
        example: Any,
        *,
        own: float = 0.9,
        per: str = "unit",
        freeze: bool = True,
        head: int | None = None,
        copy: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.backbones, self.references = members(models, copy=copy)
        self.at = _paths(at, len(self.names), own, per, head)
        self.freeze, self.per = freeze, per
        inputs = inputs_by_model(self.names, example)
        self.before = self._check(inputs)
        self._blanks: dict[Any, dict[str, Any]] = {}
        self.layouts: list[list[Layout]] = []
        self.units = nn.ModuleList()
        self.head: nn.Linear | None = None
        self.taps: list[Tap] = []
        with quiet(self):
            self._run(inputs, own, per)
            if head is not None:
                self.taps = [find_tap(n, x, None, name) for n, x, name in zip(self.backbones, inputs, self.names, strict=True)]
                widths = [part.shape[1] for part in self._run(inputs, heads=False)]
                self.head = _joint_head(self.backbones, self.taps, widths, head)
        self._hold()

    @classmethod
    @torch.inference_mode(False)
    def made_of(cls, networks: Mapping[str, nn.Module], about: Mapping[str, Any]) -> CrossStitch:
        """The same of these networks without an example, by what `about` says; what joins them isn't learned yet.

        about: at, per, freeze, before, layouts (a list a depth), taps and widths (of a head: sizes in and out, or None).
        """
        made = cls.__new__(cls)
        Composite.__init__(made)
        made.names, made.backbones, made.references = members(networks, copy=False)
        made.at, made.per, made.freeze = [list(row) for row in about["at"]], about["per"], about["freeze"]
        made.before = [[tuple(names) for names in rows] for rows in about["before"]]
        made.layouts, made._blanks = [list(row) for row in about["layouts"]], {}
        made.units = nn.ModuleList(CrossUnit([layout.width for layout in row], 0.0, made.per) for row in made.layouts)
        made.taps, made.head = list(about["taps"]), None if about["widths"] is None else nn.Linear(*about["widths"])
        made._hold()
        return made

    def _hold(self) -> None:
        """Keep what isn't trained as it is: the networks where they are frozen, and heads that stand aside."""
        if self.freeze:
            self.backbones.requires_grad_(False)
        for tap, network in zip(self.taps, self.backbones, strict=False):
            if tap.side == "input":
                module_at(network, tap.path).requires_grad_(False)
        self.train(self.training)

    def _check(self, inputs: Sequence[Any]) -> list[list[tuple[str, ...]]]:
        """By network and depth the modules that are passed over; everything that is wrong with the places at once."""
        problems: list[Problem] = []
        before = []
        for k, (name, network, own) in enumerate(zip(self.names, self.backbones, inputs, strict=True)):
            rows: list[tuple[str, ...]] = []
            for depth, path in enumerate(self.at[k]):
                try:
                    rows.append(_before(network, self.at[k][:depth], path, own, name))
                except UserError as error:
                    problems += error.problems
            before.append(rows)
        if problems:
            raise ModelError(*problems)
        return before

    def train(self, mode: bool = True) -> CrossStitch:
        """Set training mode; frozen networks stay in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.backbones.eval()
        return self

    def forward(self, inputs: Any) -> Tensor:
        """Inputs -> the mean of the networks' predictions, or what the head for all of them gives."""
        if self.head is None:
            return torch.stack(self.each(inputs)).mean(dim=0)
        return self.head(torch.cat(self._run(self._own(inputs), heads=False), dim=1))

    def each(self, inputs: Any) -> list[Tensor]:
        """Inputs -> every network's own prediction, by its own head."""
        outputs = self._run(self._own(inputs))
        if len({output.shape for output in outputs}) > 1:
            found = ", ".join(f"{name} {tuple(output.shape)}" for name, output in zip(self.names, outputs, strict=True))
            raise ModelError(Problem("models", f"predictions of different shapes: {found}", "networks with the same classes"))
        return outputs

    def _own(self, inputs: Any) -> list[Any]:
        own = inputs_by_model(self.names, inputs)
        if any(x is None for x in own):
            raise ModelError(Problem("inputs", "a network's input is None", "networks that are cross-stitched need theirs"))
        return own

    def _run(self, inputs: Sequence[Any], share: float = 0.0, per: str = "", *, heads: bool = True) -> list[Tensor]:
        """All networks from depth to depth, to their predictions or what feeds their heads; with `per`, making the units."""
        carried: list[Tensor | None] = [None] * len(inputs)
        known = [self._known(k, own) for k, own in enumerate(inputs)]
        for depth in range(len(self.at[0])):
            found = []
            for k, own in enumerate(inputs):
                with self._from(k, depth - 1, carried[k], known[k]):
                    value = read(self.backbones[k], Tap(self.at[k][depth]), own, output=False, name=self.names[k])[0]
                found.append(tensor_of(value, self.names[k]))
            if per:
                self._make(depth, found, inputs, share, per)
            layouts = self.layouts[depth]
            arranged = [layout.arranged(tensor) for layout, tensor in zip(layouts, found, strict=True)]
            if per:
                self.units[depth].align(arranged)  # type: ignore[operator]
            mixed = self.units[depth](arranged)
            carried = [layout.put_back(h) for layout, h in zip(layouts, mixed, strict=True)]
        outputs = []
        for k, own in enumerate(inputs):
            with self._from(k, len(self.at[0]) - 1, carried[k], known[k]):
                outputs.append(self._end(k, own, heads))
        return outputs

    def _end(self, k: int, inputs: Any, heads: bool) -> Tensor:
        """Network k's prediction, or (batch, width) of what feeds its head."""
        network, name = self.backbones[k], self.names[k]
        if heads:
            return prediction(call(network, inputs, name), name)
        value = read(network, self.taps[k], inputs, output=False, name=name)[0]
        return features(value, inputs, module_at(network, self.taps[k].path), pool=True, name=name)[0]

    def _make(self, depth: int, found: Sequence[Tensor], inputs: Sequence[Any], share: float, per: str) -> None:
        layouts = [
            layout_of(tensor, own, module_at(network, paths[depth]), name)
            for tensor, own, network, paths, name in zip(found, inputs, self.backbones, self.at, self.names, strict=True)
        ]
        self.layouts.append(layouts)
        self.units.append(CrossUnit([layout.width for layout in layouts], share, per).to(found[0].device))

    def _from(self, k: int, depth: int, features: Tensor | None, known: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Network k as it runs from that depth on."""
        if features is None:
            return nullcontext()
        path = self.at[k][depth]
        blanks = {name: known[name] for name in (*self.before[k][depth], path) if name in known}
        return from_place_on(self.backbones[k], path, features, blanks)

    def _known(self, k: int, inputs: Any) -> dict[str, Any]:
        """The forms of what network k's modules give for inputs of this shape, by a pass of the network alone where new."""
        key = k, shapes_of(inputs)
        if key not in self._blanks:
            seen: dict[str, Any] = {}
            watched = dict.fromkeys(path for names in self.before[k] for path in names) | dict.fromkeys(self.at[k])
            with quiet(self.backbones[k]), watching(self.backbones[k], list(watched), seen):
                call(self.backbones[k], inputs, self.names[k])
            self._blanks[key] = blanks_of(seen)
        return self._blanks[key]


def _joint_head(networks: nn.ModuleList, taps: Sequence[Tap], widths: Sequence[int], classes: int) -> nn.Linear:
    """A linear layer of all features side by side; the mean of the networks' own heads where these are such layers."""
    joint = nn.Linear(sum(widths), classes)
    like = next((p for p in networks.parameters() if p.is_floating_point()), joint.weight)
    ends = [module_at(network, tap.path) for network, tap in zip(networks, taps, strict=True) if tap.side == "input"]
    own = [end for end in ends if isinstance(end, nn.Linear) and end.out_features == classes]
    if len(own) == len(networks):
        biases: list[Tensor] = [end.bias if end.bias is not None else end.weight.new_zeros(classes) for end in own]
        with torch.no_grad():
            joint.weight.copy_(torch.cat([end.weight for end in own], dim=1) / len(own))
            joint.bias.copy_(torch.stack(biases).mean(dim=0))
    return joint.to(like.device, like.dtype)


def _paths(at: Any, count: int, own: Any, per: Any, head: Any) -> list[list[str]]:
    """The places by network; everything that is wrong with the options at once."""
    problems = []
    if not (isinstance(own, int | float) and 0 <= own <= 1):
        problems.append(Problem("own", f"got {own!r}", "a number in [0, 1]"))
    if per not in ("unit", "channel"):
        problems.append(Problem("per", f"got {per!r}", nearest(str(per), ["unit", "channel"])))
    if head is not None and not (type(head) is int and head >= 1):
        problems.append(Problem("head", f"got {head!r}", "a whole number from 1, or None"))
    given = list(at) if isinstance(at, Sequence) and not isinstance(at, str) else []
    rows = [list(given)] * count if all(isinstance(path, str) for path in given) else [list(row) for row in given]
    if not rows or len(rows) != count or len({len(row) for row in rows}) != 1 or not rows[0] or any("" in row for row in rows):
        problems.append(Problem("at", f"got {at!r}", f"paths for all networks, or {count} lists of equally many"))
    if problems:
        raise OptionError(*problems)
    return rows


def _before(network: nn.Module, earlier_places: Sequence[str], path: str, inputs: Any, name: str) -> tuple[str, ...]:
    """What is passed over once the place at `path` is reached, or a `ModelError` for why it can't be a place."""
    tap = find_tap(network, inputs, path, name)
    if tap.calls > 1:
        raise ModelError(Problem(f"at[{name!r}]", f"{path!r} runs {tap.calls} times in one pass", "a module that runs once"))
    with quiet(network):
        value = read(network, tap, inputs, output=False, name=name)[0]
    put_into(value, tensor_of(value, name))
    found = passed_over(network, path, inputs)
    for place in earlier_places:
        if not any(place == other or place.startswith(f"{other}.") for other in found):
            wrong = f"{place!r} isn't wholly before {path!r}"
            raise ModelError(Problem(f"at[{name!r}]", wrong, "modules in the order they run, that nothing goes round"))
    for other in earlier(network, path, inputs):
        if other not in found and any(map(_changes, module_at(network, other).modules())):
            wrong = f"{other!r} is used after {path!r} too, and would run more than once"
            raise ModelError(Problem(f"at[{name!r}]", wrong, "a place that everything passes"))
    return found


def _changes(module: nn.Module) -> bool:
    """Whether a module gives something else when it runs again in training."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "Dropout" in type(module).__name__

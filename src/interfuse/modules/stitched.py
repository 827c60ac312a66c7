"""`Stitched`: one network up to a place, an affine map, and another network from a place on.

    f(x) = b_after( W a_upto(x) + c )

at each token or point of a map, where it is a 1 x 1 convolution. (Model stitching, Lenc & Vedaldi 2015, 1411.5908; Bansal
et al. 2021, 2106.07682.) How W and c are found is `transfer.stitch`'s part; this is the network that they make.

`a` ends at its place. `b` runs as it is, its own code, with features put in at its place; modules that ran before it, and
whose values are found to matter no more, are passed over. What `b` computes outside of modules is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, Problem
from interfuse.modules.inputs import Composite, call, inputs_by_model, prediction, tensors_of
from interfuse.modules.members import members
from interfuse.modules.places import Layout, join
from interfuse.modules.taps import Tap, module_at, quiet, read, tensor_of

Blank = Any  # what a module gives with its tensors' (shape, dtype) in their places; see `_blank`


@dataclass(frozen=True)
class StitchRecord:
    """How well a stitch fits.

    error: mean squared error over variance of b's features (1 - R^2; 0 is perfect, 1 is what a constant does), on the
        examples that it was fitted to; held_out: that of a fit to four fifths of the examples, on the others. The second
        is the honest one: with few examples the first is too low. None where there are fewer than five examples.
    examples: how many inputs were read; rows: places and tokens counted each.
    quality: of a (where its predictions fit b's targets), b and the stitched network on the test data by `metric`; empty
        without test data.
    """

    at: tuple[str, str]
    error: float
    held_out: float | None
    examples: int
    rows: int
    metric: str = ""
    higher: bool = True
    quality: Mapping[str, float] = field(default_factory=dict)

    @property
    def survives(self) -> float | None:
        """The share of b's quality that the stitched network has (b's over its, where lower is better); None untested."""
        if not self.quality:
            return None
        over, under = self.quality["stitched"], self.quality["b"]
        if not self.higher:
            over, under = under, over
        return over / under if under else None

    def __str__(self) -> str:
        text = f"{self.at[0]} -> {self.at[1]}: error {self.error:.4g} on {self.examples} examples"
        if self.held_out is not None:
            text += f" ({self.held_out:.4g} on those held out)"
        if self.quality:
            text += f"; {self.metric}: " + ", ".join(f"{name} {value:.4g}" for name, value in self.quality.items())
        return text


class Stitched(Composite):
    """`a` up to a module's output, an affine map, and `b` from a module's output on; gives what `b` gives.

    at: the two modules' paths. source, target: how the features lie there (`places.layout_of`). places: where b's features
    differ from a's in number, b's; None keeps a's. before: modules of b that need not run.
    Both networks are frozen and in evaluation mode until something of them is made trainable; the map is trained by `fit`.
    Inputs are as for `ModelFusion`: both networks get the same, or {"a": ..., "b": ...}.
    """

    record: StitchRecord | None = None

    @torch.inference_mode(False)
    def __init__(
        self,
        a: nn.Module | str,
        b: nn.Module | str,
        at: tuple[str, str],
        source: Layout,
        target: Layout,
        *,
        places: tuple[int, ...] | None = None,
        before: Sequence[str] = (),
        copy: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.backbones, self.references = members({"a": a, "b": b}, copy=copy)
        self.backbones.requires_grad_(False)
        self.at, self.source, self.target, self.places, self.before = at, source, target, places, tuple(before)
        self.map = nn.Linear(source.width, target.width)
        like = next((p for p in module_at(self.backbones[1], at[1]).parameters() if p.is_floating_point()), None)
        if like is not None:
            self.map.to(like.device)
        self._blanks: dict[Any, dict[str, Blank]] = {}
        self.train(self.training)

    def train(self, mode: bool = True) -> Stitched:
        """Set training mode; a network of which nothing is trained stays in evaluation mode."""
        super().train(mode)
        for backbone in self.backbones:
            if not any(p.requires_grad for p in backbone.parameters()):
                backbone.eval()
        return self

    def forward(self, inputs: Any) -> Any:
        """Inputs -> what `b` gives."""
        first, second = inputs_by_model(self.names, inputs)
        if first is None or second is None:
            raise ModelError(Problem("inputs", "one network's input is None", "a stitched network needs both"))
        value, _ = read(self.backbones[0], Tap(self.at[0]), first, output=False, name="a")
        features = self.source.arranged(tensor_of(value, "a"))
        if self.places is not None:
            features = join(features, self.places)
        return self._rest(second, self.target.put_back(self.map(features.to(self.map.weight.dtype))))

    def _rest(self, inputs: Any, features: Tensor) -> Any:
        """b's own pass with `features` at its place. The first pass for inputs of a shape runs what later ones pass over."""
        b, place = self.backbones[1], self.at[1]
        shapes = shapes_of(inputs)
        known = self._blanks.get(shapes)
        if known is None:
            return self._first(inputs, features, shapes)
        with from_place_on(b, place, features, known):
            return call(b, inputs, "b")

    def _first(self, inputs: Any, features: Tensor, shapes: Any) -> Any:
        b, place = self.backbones[1], self.at[1]
        seen: dict[str, Any] = {}
        with watching(b, (*self.before, place), seen), putting(b, place, features):
            output = call(b, inputs, "b")
        self._blanks[shapes] = blanks_of(seen)
        return output


def put_into(value: Any, features: Tensor) -> Any:
    """What a module gave with `features` in place of its own, in their type; a `ModelError` for what can't be rebuilt."""
    if isinstance(value, Tensor):
        return features.to(value.dtype)
    if type(value) in (tuple, list) and value:
        return type(value)([put_into(value[0], features), *value[1:]])
    wrong = f"its module gives a {type(value).__name__}"
    raise ModelError(Problem("at[1]", wrong, "a module that gives a tensor, or a tuple that begins with one"))


@contextmanager
def putting(model: nn.Module, path: str, features: Tensor) -> Iterator[None]:
    """The output of the module at `path` replaced by `features`."""
    handle = module_at(model, path).register_forward_hook(lambda _module, _args, result: put_into(result, features))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watching(model: nn.Module, paths: Sequence[str], seen: dict[str, Any]) -> Iterator[None]:
    """What the modules at these paths give, into `seen`."""

    def keep(path: str) -> Callable[..., None]:
        return lambda _module, _args, result: seen.__setitem__(path, result)

    handles = [module_at(model, path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """These functions in place of the forward of the modules at these paths."""
    modules = {path: module_at(model, path) for path in functions}
    before = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.forward = functions[path]
        yield
    finally:
        for path, module in modules.items():
            own = before[path]
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)


def shapes_of(inputs: Any) -> tuple[Any, ...]:
    """What blanks are remembered by: every tensor of the inputs, with its shape and type."""
    return tuple((path, tuple(t.shape), t.dtype) for path, t in tensors_of(inputs))


def blanks_of(seen: Mapping[str, Any]) -> dict[str, Blank]:
    """The forms of what modules gave, by path, of those that hold nothing but tensors."""
    return {path: blank for path, value in seen.items() if (blank := _blank(value)) is not None}


@contextmanager
def from_place_on(model: nn.Module, path: str, features: Tensor, blanks: Mapping[str, Blank]) -> Iterator[None]:
    """The model run with `features` at the module at `path`, and without the modules that there are blanks of.

    The module at `path` runs too, only where it gives tensors beside its features.
    """
    functions = {name: _giving(blank, features.device) for name, blank in blanks.items() if name != path}
    form = blanks.get(path)
    if form is not None and _one(form):
        functions[path] = lambda *_, **__: _filled(form, features.device, features)
        with standing_in(model, functions):
            yield
    else:
        with standing_in(model, functions), putting(model, path, features):
            yield


def passed_over(model: nn.Module, path: str, inputs: Any) -> tuple[str, ...]:
    """The modules that run before the one at `path` and matter to what comes after it through its output alone.

    Found by trial, in evaluation mode: with NaN in place of all that they give, and the module's own features at its place,
    the network must predict the same bits. Of modules within one another the outermost; only those that run once.
    """
    candidates = earlier(model, path, inputs)
    seen: dict[str, Any] = {}
    with quiet(model), watching(model, (*candidates, path), seen):
        expected = prediction(call(model, inputs, "b"), "b")
    features = tensor_of(seen[path], "b")
    blanks = {name: blank for name in candidates if (blank := _blank(seen[name])) is not None}

    def same(names: Sequence[str]) -> bool:
        functions = {name: _giving(blanks[name], features.device, torch.nan) for name in names}
        try:
            with quiet(model), standing_in(model, functions), putting(model, path, features):
                return torch.equal(prediction(call(model, inputs, "b"), "b"), expected)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            return False

    if same(list(blanks)):
        return tuple(blanks)
    alone = [name for name in blanks if same([name])]
    return tuple(alone) if same(alone) else ()


def earlier(model: nn.Module, path: str, inputs: Any) -> list[str]:
    """The outermost modules that ran once, and were done before the module at `path` began."""
    modules = {name: module for name, module in model.named_modules() if name}
    target = module_at(model, path)
    begun: dict[str, int] = dict.fromkeys(modules, 0)
    done: list[str] = []
    reached: list[bool] = []

    def end(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            begun[name] += 1
            if not reached:
                done.append(name)

        return note

    handles = [module.register_forward_hook(end(name)) for name, module in modules.items()]
    handles.append(target.register_forward_pre_hook(lambda *_: reached.append(True)))
    try:
        with quiet(model):
            call(model, inputs, "b")
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name in modules if name in done and begun[name] == 1]
    outermost: list[str] = []
    for name in once:
        if not any(name.startswith(f"{other}.") for other in outermost):
            outermost.append(name)
    return outermost


def _blank(value: Any) -> Blank | None:
    """The form of what a module gave, its tensors as (shape, dtype); None where it holds anything but tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if type(value) in (tuple, list) and value:
        parts = [("none",) if part is None else _blank(part) for part in value]
        return None if any(part is None for part in parts) else [type(value), *parts]
    return None


def _filled(blank: Blank, device: torch.device, features: Tensor | None = None, fill: float = 0.0) -> Any:
    """A value of that form: tensors of zeros, the first one `features` if there are any."""
    if blank == ("none",):
        return None
    if isinstance(blank, list):
        kind, first, *others = blank
        return kind([_filled(first, device, features, fill), *(_filled(other, device, None, fill) for other in others)])
    shape, dtype = blank
    if features is not None:
        return features.to(dtype)
    return torch.full(shape, fill if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _giving(blank: Blank, device: torch.device, fill: float = 0.0) -> Callable[..., Any]:
    return lambda *_, **__: _filled(blank, device, None, fill)


def _one(blank: Blank) -> bool:
    """Whether a form holds its features alone, which come first."""
    if isinstance(blank, list):
        return _one(blank[1]) and all(part == ("none",) for part in blank[2:])
    return bool(blank != ("none",))

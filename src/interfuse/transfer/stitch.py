"""`stitch`: two trained networks joined by an affine map that is computed, not trained.

    W, c = argmin sum |b_upto(x) - W a_upto(x) - c|^2  over unlabelled samples x

Least squares from a few hundred samples (Csiszarik et al. 2021, 2110.14633), in float64 from sums over batches. Says how
well a's features replace b's, and what it costs in quality. Fine-tuning the map is `fit`'s part; a map of networks'
similarity over all their layers is `evaluation.similarity`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from interfuse.errors import DataError, ModelError, OptionError, Problem, UserError
from interfuse.evaluation.metrics import AnyMetric, find_metric, score
from interfuse.inference.batches import batches, first, in_order, length
from interfuse.inference.predict import predict
from interfuse.models import load_model
from interfuse.modules.inputs import batch_size as size_of
from interfuse.modules.inputs import inputs_by_model, move, split_batch
from interfuse.modules.least_squares import Moments
from interfuse.modules.places import Layout, join, layout_of
from interfuse.modules.stitched import Stitched, StitchRecord, passed_over, put_into
from interfuse.modules.taps import Tap, find_tap, module_at, quiet, read, tensor_of, token_mask
from interfuse.progress import track

_NAMES = ("a", "b")
_HELD_OUT = 5  # every fifth example


def stitch(
    a: nn.Module | str,
    b: nn.Module | str,
    at: tuple[str, str],
    data: Any,
    *,
    test: Any = None,
    metric: AnyMetric = "accuracy",
    ridge: float = 1e-6,
    samples: int | None = None,
    batch_size: int = 64,
    copy: bool = True,
    progress: bool = True,
) -> Stitched:
    """`a` up to the output of the module at[0], a linear map of it, and `b` from the output of the module at[1] on.

    at: the modules' paths; tokens, maps and vectors of any widths. Places that differ in number are joined by interpolation
        (`modules.places`); tokens that an attention mask leaves out don't count.
    data: unlabelled samples, a few hundred or more: a tensor, or what `predict` reads (targets are left out of account).
    test: other data, with b's targets, on which b, the stitched network, and a where its predictions fit, are measured by
        `metric`.
    ridge: from 0 up, times the mean variance of a's features, holds back weights that the samples don't determine.
    samples: stop with the batch that makes so many examples; None takes all.
    copy: whether the networks are copied, or become part of the result.

    Gives a network of which only the map is trainable, with a `record`. The networks given are left as they are, but with
    copy=False frozen. Raises `ModelError` for places that aren't there or can't be joined, `OptionError` and `DataError`.
    """
    measure = _checked(at, ridge, samples, metric)
    networks = [load_model(model) if isinstance(model, str) else model for model in (a, b)]
    loader = batches(TensorDataset(data) if isinstance(data, Tensor) else data, batch_size)
    example = inputs_by_model(_NAMES, _placed(split_batch(first(loader))[0], networks))
    _check_places(networks, at, example)
    fitting, held_out = Moments(), Moments()
    reader = _Reader(networks, at)
    examples = 0
    for inputs in track(_limited(loader, samples), "stitching", length(loader), shown=progress):
        x, y, owner = reader.rows(inputs_by_model(_NAMES, _placed(inputs, networks)))
        held = (owner + examples) % _HELD_OUT == _HELD_OUT - 1
        fitting.add(x[~held], y[~held])
        if held.any():
            held_out.add(x[held], y[held], fitting.shift)
        examples += size_of(inputs)
    before = passed_over(networks[1], at[1], example[1])
    source, target = reader.layouts
    result = Stitched(networks[0], networks[1], at, source, target, places=reader.places, before=before, copy=copy)
    result.references = tuple(given if isinstance(given, str) else None for given in (a, b))
    error, honest = _solve(result, fitting, held_out, ridge)
    quality: dict[str, float] = {}
    if test is not None:
        trio = {"a": networks[0], "b": networks[1], "stitched": result.eval()}
        for name, model in trio.items():
            with suppress(UserError) if name == "a" else nullcontext():  # a may predict other classes, or nothing
                quality[name] = _quality(model, test, measure, batch_size, name)
    rows = fitting.rows + held_out.rows
    result.record = StitchRecord(at, error, honest, examples, rows, measure.name, measure.higher, quality)
    return result


def _checked(at: Any, ridge: Any, samples: Any, metric: AnyMetric) -> Any:
    problems = []
    if not (isinstance(at, tuple | list) and len(at) == 2 and all(isinstance(path, str) for path in at)):
        problems.append(Problem("at", f"got {at!r}", "two modules' paths, a's and b's"))
    elif not at[1]:
        problems.append(Problem("at[1]", "names the whole network", "a module of b, after which some of it is left"))
    if not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        problems.append(Problem("ridge", f"got {ridge!r}", "a number from 0 up"))
    if not (samples is None or (isinstance(samples, int) and samples > 0)):
        problems.append(Problem("samples", f"got {samples!r}", "a whole number from 1 up, or None"))
    try:
        measure = find_metric(metric)
    except OptionError as error:
        problems += error.problems
    if problems:
        raise OptionError(*problems)
    return measure


def _check_places(networks: list[nn.Module], at: tuple[str, str], example: list[Any]) -> None:
    """Both places are there, run once, and give features; all that is wrong at once."""
    problems: list[Problem] = []
    for k, (name, network, path, inputs) in enumerate(zip(_NAMES, networks, at, example, strict=True)):
        try:
            tap = find_tap(network, inputs, path, name)
            if tap.calls > 1:
                raise ModelError(Problem(f"at[{k}]", f"{path!r} runs {tap.calls} times in one pass", "a module that runs once"))
            with quiet(network):
                value = read(network, tap, inputs, output=False, name=name)[0]
            layout_of(tensor_of(value, name), inputs, module_at(network, path), name)
            if k:
                put_into(value, tensor_of(value, name))
        except UserError as error:
            problems += [
                problem._replace(path=problem.path.replace(f"taps[{name!r}]", f"at[{k}]")) for problem in error.problems
            ]
    if problems:
        raise ModelError(*problems)


class _Reader:
    """Reads rows of both networks' features, and what is the same in all batches: their layouts, and b's places."""

    def __init__(self, networks: list[nn.Module], at: tuple[str, str]) -> None:
        self.networks, self.at = networks, at
        self.layouts: list[Layout] = []
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def rows(self, inputs: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(x (rows, width of a), y (rows, width of b), which example of the batch each row is of)."""
        arranged = []
        self.layouts = []
        mask = None
        for name, network, path, own in zip(_NAMES, self.networks, self.at, inputs, strict=True):
            with quiet(network):
                tensor = tensor_of(read(network, Tap(path), own, output=False, name=name)[0], name)
            layout = layout_of(tensor, own, module_at(network, path), name)
            self.layouts.append(layout)
            arranged.append(layout.arranged(tensor))
            mask = token_mask(own, arranged[-1]) if len(layout.places) == 1 else None
        self._note()
        x, y = join(arranged[0], self.layouts[1].places), arranged[1]
        owner = torch.arange(len(y), device=y.device)
        owner = owner.reshape(-1, *[1] * len(self.layouts[1].places)).expand(y.shape[:-1])
        kept = torch.ones_like(owner, dtype=torch.bool) if mask is None else mask
        if not (x.isfinite().all() and y.isfinite().all()):
            raise DataError(Problem("data", "the features hold NaN or infinity", "inputs that the networks can read"))
        return x[kept.to(x.device)].to(y.device), y[kept], owner[kept]

    def _note(self) -> None:
        places = self.layouts[0].places, self.layouts[1].places
        if places not in self.seen:
            self.seen.append(places)
        if len(self.seen) > 1 and any(here != there for here, there in self.seen):
            found = ", ".join(f"{here} and {there}" for here, there in self.seen)
            raise ModelError(Problem("at", f"the places differ, and change from batch to batch: {found}", "inputs of one size"))

    @property
    def places(self) -> tuple[int, ...] | None:
        """b's places where a's are others."""
        here, there = self.seen[0]
        return None if here == there else there


def _placed(inputs: Any, networks: list[nn.Module]) -> Any:
    parameter = next((p for network in networks for p in network.parameters()), None)
    return inputs if parameter is None else move(inputs, parameter.device)


def _limited(loader: Any, samples: int | None) -> Iterator[Any]:
    seen = 0
    for batch in in_order(loader):
        inputs = split_batch(batch)[0]
        yield inputs
        seen += size_of(inputs)
        if samples is not None and seen >= samples:
            return


def _solve(result: Stitched, fitting: Moments, held_out: Moments, ridge: float) -> tuple[float, float | None]:
    """Give the stitch its map; its error on all rows, and the error on rows that a fit to the others hadn't seen."""
    honest = held_out.error(*fitting.solve(ridge)) if held_out.rows else None
    everything = fitting + held_out if held_out.rows else fitting
    weight, bias = everything.solve(ridge)
    with torch.no_grad():
        result.map.weight.copy_(weight)
        result.map.bias.copy_(bias)
    return everything.error(weight, bias), honest


def _quality(model: nn.Module, test: Any, metric: Any, batch_size: int, name: str) -> float:
    found = predict(model, test, batch_size=batch_size, progress=False)
    if found.targets is None:
        raise DataError(Problem("test", "it has no targets", "give (inputs, targets), or a mapping with 'labels'"))
    try:
        return score(metric, found.outputs, found.targets)
    except DataError as error:
        raise DataError(*(p._replace(path=f"{name}: {p.path}") for p in error.problems)) from error

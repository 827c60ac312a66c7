"""`Ensemble`: the predictions of several networks as one. The level outputs; the networks aren't trained.

How predictions are combined, and the sources, are `combine`'s; what is learned from validation data is `learning`'s. An
ensemble costs all its members at inference; of greedy selection those that were drawn. Whether networks of one architecture
run in one pass is `batched`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interfuse.ensemble.batched import Batched, unlike
from interfuse.ensemble.calibration import Calibration, cross_validated
from interfuse.ensemble.combine import COMBINE, LEARNS, Labels, combined, log_probabilities_of
from interfuse.errors import DataError, ModelError, OptionError, Problem, nearest
from interfuse.evaluation.metrics import are_probabilities
from interfuse.inference.predict import predict as predictions
from interfuse.modules.inputs import Composite, call, inputs_by_model, prediction
from interfuse.modules.members import members
from interfuse.registry import register

Kind = Literal["probabilities", "logits", "log_probabilities", "vote", "weighted", "temperature", "stacking", "greedy"]
Names = Sequence[Sequence[str]] | Mapping[str, Sequence[str]]

_COMBINE = (
    "What is combined: the mean of probabilities, of log_probabilities, or of logits (the outputs as they are, for numbers"
    " too); a vote; or, learned from validation data, weighted, greedy, temperature or stacking."
)
_CLASSES = "Each model's class names in the order of its outputs, where they differ: a list a model, or by model name."
_BATCHED = (
    "Whether networks of one architecture run in one pass with their weights stacked, a second time in memory: left out,"
    " where it's measured to be faster; true, wherever it can be done; false, never, for the same bits in every run."
)

#: Every number that an ensemble may have learned; `scale` is the temperature of the whole.
LEARNED = (*dict.fromkeys(name for names in LEARNS.values() for name in names), "scale")


@register("ensemble", "outputs", paper="Lakshminarayanan et al. 2017, arXiv:1612.01474", needs="nothing, or validation data")
class Ensemble(Composite):
    """The predictions of several networks as one, (batch, classes), as logits whose softmax is the combined probability.

    models: classifiers that give logits, whose softmax is p_k; for `combine="logits"` networks with any outputs.
    combine: the mean of `probabilities`, `log_probabilities` or `logits` (the outputs as they are, which regression needs),
        or a `vote`; `weighted`, `greedy`, `temperature` and `stacking` are learned by `calibrate`.
    classes: the class names of each network, a list a network or a dict by name, where they differ: the result has all
        names in the order they are first seen, as `classes`; a network gives no probability to a class it doesn't know.
    batched: whether networks of one architecture run in one pass (`ensemble.batched` says how and when). None measures it on
        the batches that come, and so may give other last bits from run to run; True is wherever it can be done, in
        evaluation mode and without gradients of the weights, and a `ModelError` for networks that can't; False is never.
    Inputs are as for `ModelFusion`; a network whose inputs are None is left out. Networks are copied unless `copy=False`.

    Raises `ModelError` where the predictions don't fit each other, aren't (batch, 2 or more classes) for any kind but
    logits, or where what is learned hasn't been; `OptionError` for options.
    """

    weight: Tensor | None
    scale: Tensor | None

    @torch.inference_mode(False)
    def __init__(
        self,
        models: Sequence[nn.Module | str] | Mapping[str, nn.Module | str],
        copy: bool = True,
        *,
        combine: Annotated[Kind, Field(description=_COMBINE)] = "probabilities",
        classes: Annotated[Names | None, Field(description=_CLASSES)] = None,
        batched: Annotated[bool | None, Field(description=_BATCHED)] = None,
    ) -> None:
        super().__init__()
        problems = []
        if combine not in COMBINE:
            problems.append(Problem("combine", f"got {combine!r}", nearest(str(combine), COMBINE)))
        if batched not in (None, True, False):
            problems.append(Problem("batched", f"got {batched!r}", "True, False, or None"))
        if problems:
            raise OptionError(*problems)
        self.combine, self.batched = combine, batched
        self.names, self.backbones, self.references = members(models, copy=copy)
        self.spaces = label_spaces(self.names, classes)
        self.labels = Labels() if self.spaces is None else Labels.join(self.spaces)
        if combine in ("logits", "log_probabilities") and not self.labels.alike:
            wrong = f"got {combine!r} for networks with different classes"
            raise OptionError(Problem("combine", wrong, "probabilities, a vote, or a kind that is learned"))
        if batched and (reason := unlike(list(self.backbones))):
            raise ModelError(Problem("batched", f"True, but {reason}", "leave it out, or give False"))
        for name in LEARNED:
            self.register_buffer(name, None)
        self.one_pass = Batched()
        self.drawn: list[float] = []

    @staticmethod
    def learns(combine: str) -> bool:
        """Whether a kind needs validation data."""
        return bool(LEARNS.get(combine))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the result's classes, if the networks' were given."""
        return self.labels.names

    @property
    def numbers(self) -> dict[str, Tensor]:
        """What has been learned, by name."""
        found = {name: getattr(self, name) for name in LEARNED}
        return {name: value for name, value in found.items() if value is not None}

    def learned(self, numbers: Mapping[str, Tensor]) -> Ensemble:
        """Take these numbers as what has been learned, in place of any before."""
        place = next(self.backbones.parameters(), torch.empty(0)).device
        for name in LEARNED:
            value = numbers.get(name)
            setattr(self, name, None if value is None else value.detach().to(place, torch.float))
        return self

    def calibrate(self, validation: Any, *, folds: int = 5, seed: int = 0, **predict: Any) -> Calibration:
        """Learn from validation data what the kind learns, or one temperature for those that learn nothing.

        validation: data that no network was trained on, with class numbers, as `predict` takes it (and its options).
        The record compares before and after, after by `folds`-fold cross-validation; what is kept is learned from all of
        it. Raises `DataError` where the data don't fit, `ModelError` where the networks don't classify, or give
        probabilities in place of logits.
        """
        each = _Each(self)
        found = predictions(each, validation, **predict)
        if found.targets is None:
            raise DataError(Problem("validation", "no targets", "labelled examples, at least one a fold"))
        if each.soft:
            raise ModelError(*(Problem(f"models[{name!r}]", SOFT, LOGITS) for name in self.names if name in each.soft))
        logs = found.outputs.double().transpose(0, 1)
        numbers, before, after = cross_validated(self.combine, logs, found.targets, folds=folds, seed=seed)
        self.learned(numbers)
        said = {name: value.tolist() for name, value in numbers.items() if name != "matrix"}
        return Calibration(self.combine, before, after, len(found.targets), folds, said, self)

    def forward(self, inputs: Any) -> Tensor:
        """Inputs -> (batch, classes)."""
        together = self._together(inputs)
        return self.join(self.each(inputs) if together is None else together)

    @property
    def held(self) -> int:
        """Bytes of the stacked weights, where networks run in one pass."""
        return self.one_pass.bytes

    def _apply(self, fn: Any, recurse: bool = True) -> Ensemble:
        self.one_pass.forget()  # the stack isn't moved along
        return super()._apply(fn, recurse)

    def _together(self, inputs: Any) -> list[Tensor] | None:
        """Every network's output by one pass; None where they run one by one."""
        own = inputs_by_model(self.names, inputs)
        if self.batched is False or own[0] is None or any(x is not own[0] for x in own):
            return None
        if not all(self._shares()):
            return None

        def one_by_one() -> list[Tensor]:
            return [prediction(call(model, own[0], name), name) for name, model in zip(self.names, self.backbones, strict=True)]

        return self.one_pass.run(list(self.backbones), own[0], one_by_one, self.batched)

    def _shares(self) -> list[float]:
        """Each network's share in the draws of greedy selection, 1 for other kinds: those with 0 don't run."""
        if self.combine != "greedy" or self.weight is None:
            return [1.0] * len(self.names)
        if not torch.compiler.is_compiling():  # while it is traced, weights have no values: those of the last call hold
            self.drawn = self.weight.tolist()
        return self.drawn or [1.0] * len(self.names)

    def each(self, inputs: Any, *, all_of_them: bool = False) -> list[Tensor | None]:
        """Every network's outputs, (batch, its classes); None of those without inputs, or without a share in the result."""
        own = inputs_by_model(self.names, inputs)
        shares = self._shares()
        if all_of_them or not any(share for share, x in zip(shares, own, strict=True) if x is not None):
            shares = [1.0] * len(own)
        return [
            prediction(call(model, x, name), name) if x is not None and share else None
            for name, model, x, share in zip(self.names, self.backbones, own, shares, strict=True)
        ]

    def join(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """The networks' outputs as one prediction, (batch, classes)."""
        there = [k for k, output in enumerate(outputs) if output is not None]
        if self.combine == "logits":
            stacked = torch.stack(self._fitting(outputs))
            result = stacked.mean(dim=0)
            return result if self.scale is None else result / self.scale.to(result)
        missing = [name for name in LEARNS[self.combine] if name not in self.numbers]
        if missing:
            wrong = f"{self.combine!r} hasn't been learned yet"
            raise ModelError(Problem("combine", wrong, "call calibrate(validation) with data that no network was trained on"))
        if self.combine == "stacking" and len(there) < len(self.names):
            absent = [name for k, name in enumerate(self.names) if k not in there]
            raise ModelError(Problem("inputs", f"None for {absent}", "stacking needs every network's prediction"))
        logs = self.log_probabilities(outputs)
        numbers = {name: value.to(logs) for name, value in self.numbers.items()}
        each = {name: value[there] if name in ("weight", "temperatures") else value for name, value in numbers.items()}
        result = combined(self.combine, logs, each)
        if "scale" in numbers:
            result = (result / numbers["scale"]).log_softmax(-1)
        return result.to(next(output.dtype for output in outputs if output is not None))

    def log_probabilities(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """The log-probabilities (networks, batch, classes) of those outputs that are there, over all classes."""
        fitting = self._fitting(outputs, log_probabilities_of)
        first = fitting[0]
        if first.ndim != 2 or first.shape[-1] < 2:
            wrong = f"got {self.combine!r} for predictions {tuple(first.shape)}"
            raise ModelError(Problem("combine", wrong, "networks that give (batch, 2 or more classes), or combine='logits'"))
        return torch.stack(fitting).to(torch.promote_types(first.dtype, torch.float))

    def _fitting(self, outputs: Sequence[Tensor | None], change: Any = lambda output: output) -> list[Tensor]:
        """The outputs that are there, over all classes, or a `ModelError` with those that don't fit."""
        there = {k: output for k, output in enumerate(outputs) if output is not None}
        if self.spaces is None:
            first = next(iter(there.values()))
            if any(output.shape != first.shape for output in there.values()):
                found = ", ".join(f"{self.names[k]} {tuple(output.shape)}" for k, output in there.items())
                allowed = "networks with the same classes, or their names in `classes`"
                raise ModelError(Problem("models", f"predictions of different shapes: {found}", allowed))
            return [change(output) for output in there.values()]
        problems = [
            Problem(
                f"classes[{self.names[k]!r}]", f"{len(self.spaces[k])} names for predictions {tuple(output.shape)}", "one each"
            )
            for k, output in there.items()
            if output.ndim != 2 or output.shape[1] != len(self.spaces[k])
        ]
        if problems:
            raise ModelError(*problems)
        return [self.labels.spread(k, change(output)) for k, output in there.items()]


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Every ensemble within `model` runs its networks one by one, for the same bits each time."""
    found = [(module, module.batched) for module in model.modules() if isinstance(module, Ensemble)]
    try:
        for module, _ in found:
            module.batched = False
        yield
    finally:
        for module, batched in found:
            module.batched = batched


#: A network that ends in a softmax, whose outputs would go through another one.
SOFT, LOGITS = "gives probabilities, not logits", "the network without its softmax, or their logarithm"


class _Each(Composite):
    """Every network's log-probabilities, (batch, networks, classes)."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble, self.names = ensemble, ensemble.names
        self.soft = set(ensemble.names)  # those that gave nothing but probabilities

    def forward(self, inputs: Any) -> Tensor:
        outputs = self.ensemble.each(inputs, all_of_them=True)
        given = zip(self.names, outputs, strict=True)
        self.soft -= {name for name, output in given if output is not None and not are_probabilities(output)}
        absent = [name for name, output in zip(self.names, outputs, strict=True) if output is None]
        if absent:
            raise ModelError(Problem("validation", f"no inputs for {absent}", "every network's inputs in every batch"))
        return self.ensemble.log_probabilities(outputs).transpose(0, 1)


def label_spaces(names: Sequence[str], classes: Names | None) -> tuple[tuple[str, ...], ...] | None:
    """Each network's class names, or an `OptionError` with everything that is wrong with them."""
    if classes is None:
        return None
    problems = []
    if isinstance(classes, Mapping):
        problems += [Problem(f"classes[{n!r}]", "missing", "its class names") for n in names if n not in classes]
        problems += [
            Problem(f"classes[{n!r}]", "no model has this name", nearest(str(n), names)) for n in classes if n not in names
        ]
        listed = [classes.get(name, ()) for name in names]
    else:
        listed = list(classes)
        if len(listed) != len(names):
            problems.append(Problem("classes", f"{len(listed)} lists for {len(names)} networks", "one list a network"))
    for name, space in zip(names, listed, strict=False):
        if isinstance(space, str) or not isinstance(space, Sequence) or not all(isinstance(label, str) for label in space):
            problems.append(Problem(f"classes[{name!r}]", f"got {space!r}", "a list of names"))
        elif len(set(space)) < len(space):
            problems.append(Problem(f"classes[{name!r}]", "a name occurs twice", "each class has a name of its own"))
    if problems:
        raise OptionError(*problems)
    return tuple(tuple(space) for space in listed)


def make_room(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Room in every ensemble within `model` for what it had learned, where a state with these shapes holds any."""
    for path, module in model.named_modules():
        if isinstance(module, Ensemble):
            at = {name: f"{path}.{name}" if path else name for name in LEARNED}
            module.learned({name: torch.ones(tuple(shapes[key])) for name, key in at.items() if key in shapes})

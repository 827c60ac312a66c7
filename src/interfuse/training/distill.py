"""`distill`: train a student on what its teachers say, by `fit`.

    classes   alpha * task loss + (1 - alpha) T^2 KL(p, softmax(z / T)) + hint_weight * hints
    numbers   alpha * task loss + (1 - alpha) mean squared error to the teachers' mean + hint_weight * hints
    hints     sum over hints of |r(h_student) - h_teacher|^2 / |h_teacher - mean h_teacher|^2, as means over examples

(Hinton et al. 2015, 1503.02531; hints: Romero et al. 2015, 1412.6550, here beside the loss and not before it.) p is the
teachers' target, by `teaching`. Without labels there is no task loss, and alpha counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from interfuse.ensemble.combine import Labels
from interfuse.ensemble.network import LOGITS, SOFT, Names, label_spaces
from interfuse.errors import DataError, ModelError, OptionError, Problem, nearest
from interfuse.evaluation.metrics import AnyMetric, are_probabilities, find_metric, score
from interfuse.inference.batches import first
from interfuse.inference.predict import predict
from interfuse.modules.inputs import call, move, prediction, split_batch
from interfuse.modules.members import members
from interfuse.modules.taps import quiet
from interfuse.training.fit import FitRecord, fit, wrong_options
from interfuse.training.losses import Loss, loss_for
from interfuse.training.teaching import COMBINE, Hint, Hinted, Lesson, Teachers, hints_of, loader_of, numbered, target, taught


@dataclass(frozen=True)
class DistillRecord(FitRecord):
    """How a distillation went: as a training did, and how far the student follows its teachers.

    agreement: the share of examples to which student and teachers give the same class, in [0, 1]; for numbers the mean
    squared difference. It is measured on the validation data, or without them on the training data, as `agreement_on` says.
    labelled: whether the training data had labels. numbers: whether numbers are taught, not classes.
    """

    agreement: float = math.nan
    agreement_on: str = ""
    labelled: bool = False
    numbers: bool = False


def distill(
    teachers: nn.Module | Sequence[nn.Module | str] | Mapping[str, nn.Module | str],
    student: nn.Module,
    train: Any,
    validation: Any = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    combine: Literal["mean", "confidence", "per_task"] = "mean",
    classes: Names | None = None,
    hints: Mapping[str, Any] | None = None,
    hint_weight: float = 1.0,
    loss: str | Loss = "auto",
    metric: AnyMetric | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> DistillRecord:
    """Train `student` in place to predict what `teachers` do; the weights of the best epoch on `validation` are kept.

    teachers: a network (an `Ensemble`, say), a list, or a dict by name; they aren't changed. Their outputs are computed once
        and kept in memory. student: any network with as many outputs: a new one, one of the teachers, a merge.
    train, validation: as for `fit`, but labels may be left out: a tensor is inputs alone. They must be the same each time
        they are read. Inputs may be by name: {teacher: its inputs, ..., "student": its inputs}.
    temperature: above 0. alpha: the task loss's share, in [0, 1]; loss: the task loss, as for `fit`.
    combine: how several teachers are weighted for each example: all alike; by confidence in the label, or without labels in
        themselves; or per_task, by who knows the label, from `classes`.
    classes: each teacher's class names in the order of its outputs, where they differ, a list a teacher or a dict by name:
        the student's are all names in the order they are first seen.
    hints: {teacher's module: student's module} whose features are to follow; with several teachers {teacher: {..}}.
    metric: what the best epoch is chosen by; default accuracy on labels, without labels agreement with the teachers.
    The rest are `fit`'s options. Raises `OptionError`, `ModelError` and `DataError` before anything is trained.
    """
    names, networks, _ = members([teachers] if isinstance(teachers, nn.Module) else teachers, copy=False)
    own = {**options, "loss": loss, "metric": metric, "batch_size": batch_size, "seed": seed}
    pairs, spaces = _check(names, networks, student, temperature, alpha, combine, classes, hints, hint_weight, own)
    labels = Labels() if spaces is None else Labels.join(spaces)
    school = Teachers(names, networks, pairs)
    loaders = {"train": loader_of(train, batch_size, shuffle=True, seed=seed, name="train")}
    if validation is not None:
        loaders["validation"] = loader_of(validation, batch_size, shuffle=False, seed=seed, name="validation")
    lessons = {name: taught(school, loader, progress=progress) for name, loader in loaders.items()}
    begins = {"train": 0, "validation": len(lessons["train"].outputs[0])}
    sets = {name: numbered(loader, school.names, begins[name]) for name, loader in loaders.items()}
    inputs, outputs = _example(student, sets["train"])
    goal = _Goal(names, lessons, labels, combine, temperature, alpha, hint_weight)
    goal.fits(outputs, loss)
    model: nn.Module = student
    if pairs:
        model = Hinted(student, pairs, [hint.shape[1] for hint in lessons["train"].hints], inputs)
    record = fit(
        model,
        sets["train"],
        sets.get("validation"),
        loss=goal.loss,
        metric=goal.metric(metric),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        **options,
    )
    found = predict(student.eval(), sets[goal.judged], progress=progress)
    assert found.targets is not None
    agreement = goal.agreement(found.outputs, found.targets)
    return DistillRecord(
        **{f.name: getattr(record, f.name) for f in fields(record)},
        agreement=agreement,
        agreement_on=goal.judged,
        labelled=lessons["train"].labels is not None,
        numbers=goal.numbers,
    )


class _Goal:
    """The loss and the metric as functions of the student's outputs and the rows' numbers, train's before validation's."""

    def __init__(
        self,
        names: Sequence[str],
        lessons: dict[str, Lesson],
        labels: Labels,
        combine: str,
        temperature: float,
        alpha: float,
        hint_weight: float,
    ) -> None:
        every = list(lessons.values())
        self.lessons, self.temperature, self.alpha, self.hint_weight = lessons, temperature, alpha, hint_weight
        _check_lessons(lessons, labels, combine)
        floats = any(lesson.labels is not None and lesson.labels.is_floating_point() for lesson in every)
        self.numbers = labels.names is None and (floats or every[0].outputs[0].shape[1] == 1)
        soft = [] if self.numbers else [n for n, z in zip(names, every[0].outputs, strict=True) if are_probabilities(z)]
        if soft:
            raise ModelError(*(Problem(f"teachers[{name!r}]", SOFT, LOGITS) for name in soft))
        if self.numbers:
            targets = [torch.stack(lesson.outputs).mean(0) for lesson in every]
        else:
            targets = [target(lesson, combine, temperature, labels) for lesson in every]
        self.target = torch.cat(targets)
        self.width, self.begin = self.target.shape[1], len(targets[0])
        self.hints = [torch.cat(parts) for parts in zip(*(lesson.hints for lesson in every), strict=True)]
        train = [hint[: self.begin] for hint in self.hints]
        self.spreads = [float((h - h.mean(0)).square().sum(1).mean().clamp(min=1e-12)) for h in train]
        self.judged = "validation" if "validation" in lessons else "train"
        self.task: Loss | None = None

    def fits(self, outputs: Tensor, loss: str | Loss) -> None:
        """A `ModelError` where the student's outputs aren't the teachers'; else its task loss, where there are labels."""
        if outputs.reshape(len(outputs), -1).shape[1] != self.width or (not self.numbers and outputs.ndim != 2):
            wrong = f"its outputs are {tuple(outputs.shape)}, the teachers' target is (batch, {self.width})"
            raise ModelError(Problem("student", wrong, "one output for each class or value"))
        labels = self.lessons["train"].labels
        if labels is not None and self.alpha:
            self.task = loss_for(loss, outputs.reshape(len(outputs), -1), labels[: len(outputs)])

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The loss of one batch."""
        z, at = self._own(outputs), rows.cpu()
        labels = self._labels(at)
        alpha = 0.0 if self.task is None or labels is None else self.alpha
        total = (1 - alpha) * self._imitation(z, self.target[at].to(outputs))
        if alpha and self.task is not None and labels is not None:
            total = total + alpha * self.task(z, labels.to(outputs.device))
        begin = self.width
        for hint, spread in zip(self.hints, self.spreads, strict=True):
            end = begin + hint.shape[1]
            error = (outputs[:, begin:end] - hint[at].to(outputs)).square().sum(1).mean()
            total, begin = total + self.hint_weight * error / spread, end
        return total

    def _own(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(len(outputs), -1)[:, : self.width]

    def _imitation(self, z: Tensor, wanted: Tensor) -> Tensor:
        if self.numbers:
            return mse_loss(z, wanted)
        said = (z / self.temperature).log_softmax(1)
        return self.temperature**2 * kl_div(said, wanted, reduction="batchmean")

    def _labels(self, rows: Tensor) -> Tensor | None:
        """The rows' labels; all of them are of one data set."""
        name, begin = ("train", 0) if int(rows[0]) < self.begin else ("validation", self.begin)
        labels = self.lessons[name].labels
        return None if labels is None else labels[rows - begin]

    def agreement(self, outputs: Tensor, rows: Tensor) -> float:
        """`DistillRecord.agreement`."""
        z, wanted = self._own(outputs), self.target[rows.cpu()].to(outputs)
        if self.numbers:
            return float(mse_loss(z, wanted))
        return float((z.argmax(1) == wanted.argmax(1)).double().mean())

    def metric(self, metric: AnyMetric | None) -> AnyMetric:
        """The metric asked for, on labels; without one accuracy or mse, or where there are no labels the agreement."""
        labels = self.lessons[self.judged].labels
        if labels is None:
            if metric is not None:
                raise DataError(Problem(self.judged, "has no labels to measure a metric by", "labels, or metric=None"))
            return "agreement", self.agreement, not self.numbers
        known = find_metric(metric if metric is not None else "mse" if labels.is_floating_point() else "accuracy")

        def value(outputs: Tensor, rows: Tensor) -> float:
            found = self._labels(rows.cpu())
            assert found is not None
            return score(known, self._own(outputs), found)

        return known.name, value, known.higher


def _example(student: nn.Module, data: Any) -> tuple[Any, Tensor]:
    """The first batch's inputs, where the student is, and its outputs."""
    inputs = split_batch(first(data, "train"))[0]
    place = next(student.parameters(), None)
    inputs = inputs if place is None else move(inputs, place.device)
    with quiet(student):
        return inputs, prediction(call(student, inputs, "student"), "student")


def _check_lessons(lessons: Mapping[str, Lesson], labels: Labels, combine: str) -> None:
    """Teachers that don't fit each other, and labels that are needed or beyond the classes."""
    problems = []
    widths = [part.shape[1] for part in lessons["train"].outputs]
    expected = widths[:1] * len(widths) if labels.names is None else [len(columns) for columns in labels.columns]
    if widths != expected:
        allowed = "teachers with the same classes, or each one's names in `classes`"
        problems.append(Problem("teachers", f"they give {widths} classes", allowed))
    for name, lesson in lessons.items():
        if combine == "per_task" and lesson.labels is None:
            problems.append(Problem(name, "no labels", "combine='per_task' goes by them"))
        found = lesson.labels
        if found is not None and not found.is_floating_point() and widths[0] > 1 and found.numel():
            count = widths[0] if labels.names is None else len(labels.names)
            if found.ndim != 1:
                problems.append(Problem(name, f"labels of shape {tuple(found.shape)}", "class numbers (n,), or floats"))
            elif int(found.min()) < 0 or int(found.max()) >= count:
                problems.append(Problem(name, f"labels from {int(found.min())} to {int(found.max())}", f"0 to {count - 1}"))
    if problems:
        raise DataError(*problems)


def _check(
    names: Sequence[str],
    networks: nn.ModuleList,
    student: Any,
    temperature: float,
    alpha: float,
    combine: str,
    classes: Any,
    hints: Any,
    hint_weight: float,
    options: Mapping[str, Any],
) -> tuple[list[Hint], Sequence[Sequence[str]] | None]:
    """The hints as a list and each teacher's class names, or an `OptionError` with everything wrong among the options."""
    rules = {
        "student": (student, isinstance(student, nn.Module), "a torch.nn.Module"),
        "temperature": (temperature, _number(temperature) and temperature > 0, "a number above 0"),
        "alpha": (alpha, _number(alpha) and 0 <= alpha <= 1, "a number in [0, 1]"),
        "hint_weight": (hint_weight, _number(hint_weight) and hint_weight >= 0, "a number from 0 up"),
    }
    problems = [Problem(name, f"got {value!r}", allowed) for name, (value, fine, allowed) in rules.items() if not fine]
    if combine not in COMBINE:
        problems.append(Problem("combine", f"got {combine!r}", nearest(str(combine), COMBINE)))
    if combine == "per_task" and classes is None:
        problems.append(Problem("classes", "missing", "combine='per_task' needs each teacher's class names"))
    spaces, pairs = None, []
    try:
        spaces = label_spaces(names, classes)
    except OptionError as error:
        problems += error.problems
    if misfits := _hint_problems(hints, names):
        problems += misfits
    else:
        pairs = hints_of(hints, names)
    for k, path, own in pairs if isinstance(student, nn.Module) else []:
        for model, at, who in ((networks[k], path, names[k]), (student, own, "the student")):
            known = [p for p, _ in model.named_modules(remove_duplicate=False)]
            if at not in known:
                problems.append(Problem("hints", f"{who} has no module at {at!r}", nearest(str(at), filter(None, known))))
    for name in ("train_only", "lora") if pairs else ():
        if options.get(name) is not None:
            problems.append(Problem(name, "beside hints", "hints are for layers that are trained: leave one of the two out"))
    problems += wrong_options(options)
    if problems:
        raise OptionError(*problems)
    return pairs, spaces


def _hint_problems(hints: Any, names: Sequence[str]) -> list[Problem]:
    """Hints of another form than modules' paths by path, those of several teachers by name."""
    if hints is not None and not isinstance(hints, Mapping):
        return [Problem("hints", f"got {hints!r}", "{teacher's module: student's module}")]
    given = dict(hints or {})
    if len(names) == 1 and not (given and set(given) <= set(names)):
        by_name = {"hints": given}
        problems = []
    else:
        by_name = {f"hints[{name!r}]": pairs for name, pairs in given.items() if name in names}
        problems = [
            Problem(f"hints[{n!r}]", "no teacher has this name", nearest(str(n), names)) for n in given if n not in names
        ]
    return problems + [
        Problem(path, f"got {pairs!r}", "{teacher's module: student's module}, by paths")
        for path, pairs in by_name.items()
        if not isinstance(pairs, Mapping) or not all(isinstance(part, str) for pair in pairs.items() for part in pair)
    ]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

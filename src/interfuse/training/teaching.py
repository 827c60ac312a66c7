"""What teachers teach: their outputs over a data set, computed once, as one target an example, and hints for the layers.

With z_k teacher k's logits, T the temperature, w_k(x) its weight for an example, sum_k w_k = 1:

    target      p(x) = sum_k w_k(x) softmax(z_k(x) / T)
    mean        w_k = 1/K
    confidence  w_k = 1/(K-1) (1 - exp(L_k) / sum_j exp(L_j)), L_k teacher k's cross-entropy (Zhang et al. 2022, 2201.00007);
                without labels the entropy of its own prediction stands for that
    per_task    w_k = 1 / (the teachers that know the example's class) for those, else 0

As sum_k w_k KL(p_k, q) and KL(p, q) differ by what the student can't change, one distribution an example is all that is
kept, in memory. Numbers are taught by the mean of the teachers' outputs. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset

from interfuse.ensemble.combine import Labels, log_probabilities_of
from interfuse.ensemble.network import one_by_one
from interfuse.errors import DataError, ModelError, Problem
from interfuse.inference.batches import batches, first, in_order, is_indexed
from interfuse.inference.predict import predict
from interfuse.modules.inputs import Composite, call, inputs_by_model, prediction, split_batch, tensors_of
from interfuse.modules.taps import features, module_at

#: A teacher's module and the student's that is to follow it: (teacher's number, its path, the student's path).
Hint = tuple[int, str, str]


@dataclass
class Lesson:
    """All that is taught over one data set of n examples, in its order.

    outputs: each teacher's, (n, its classes or values). hints: features at each hint's module, (n, width).
    labels: (n,) or None.
    """

    outputs: list[Tensor]
    hints: list[Tensor] = field(default_factory=list)
    labels: Tensor | None = None


class Numbered(Dataset[Any]):
    """A data set's batches of inputs with their rows' numbers, from `begin` on, in place of targets."""

    def __init__(self, loader: DataLoader[Any], student: Sequence[str], begin: int) -> None:
        self.data, self.collate, self.names, self.begin = loader.dataset, loader.collate_fn, student, begin

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])

    def __getitems__(self, rows: Sequence[int]) -> tuple[Any, Tensor]:
        whole = getattr(self.data, "__getitems__", None)
        batch = self.collate(whole(rows) if whole is not None else [self.data[i] for i in rows])
        return inputs_by_model(self.names, split_batch(batch)[0])[-1], torch.as_tensor(rows) + self.begin


def loader_of(data: Any, batch_size: int, *, shuffle: bool, seed: int, name: str) -> Any:
    """`data` as batches in a fixed order of rows: a loader, or a list of batches. A tensor is inputs without labels."""
    data = TensorDataset(data) if isinstance(data, Tensor) else data
    loader = batches(data, batch_size, shuffle=shuffle, seed=seed, name=name)
    if not is_indexed(loader):
        return list(loader)
    seen = [[t for _, t in tensors_of(split_batch(first(loader, name, seed=seed))[0])] for seed in (0, 1)]
    if any(not torch.equal(a, b) for a, b in zip(*seen, strict=True)):
        wrong = "differ each time they are read (random augmentation?)"
        raise DataError(Problem(name, wrong, "data without random changes: the teachers see them once"))
    return loader


def numbered(loader: Any, student: Sequence[str], begin: int) -> Any:
    """The same batches, of the last of these models' inputs and the rows' numbers."""
    if isinstance(loader, list):
        rows = begin
        found = []
        for batch in loader:
            inputs = split_batch(batch)[0]
            size = len(tensors_of(inputs)[0][1])
            found.append((inputs_by_model(student, inputs)[-1], torch.arange(rows, rows + size)))
            rows += size
        return found
    data, sampler = Numbered(loader, student, begin), loader.batch_sampler
    options = {"collate_fn": _as_it_is, "generator": loader.generator, "num_workers": loader.num_workers}
    if type(sampler) is BatchSampler:  # Lightning shares out the rows among processes where it is a plain one
        return DataLoader(data, sampler.batch_size, sampler=sampler.sampler, drop_last=sampler.drop_last, **options)
    return DataLoader(data, batch_sampler=sampler, **options)


def _as_it_is(batch: Any) -> Any:
    return batch


class Teachers(Composite):
    """Every teacher's outputs and the features at its hints, side by side: (batch, all columns)."""

    def __init__(self, names: Sequence[str], teachers: nn.ModuleList, hints: Sequence[Hint]) -> None:
        super().__init__()
        self.teachers, self.hints = teachers, hints
        self.names = (*names, "student")
        self.widths: list[int] = []

    def forward(self, inputs: Any) -> Tensor:
        """Inputs -> (batch, all columns); `widths` then says how many are whose."""
        own = inputs_by_model(self.names, inputs)
        outputs, found = [], []
        for k, teacher in enumerate(self.teachers):
            paths = [path for number, path, _ in self.hints if number == k]
            with watched(teacher, paths, self.names[k]) as seen:
                outputs.append(prediction(call(teacher, own[k], self.names[k]), self.names[k]))
            found += [features(seen[p], own[k], module_at(teacher, p), pool=True, name=self.names[k])[0] for p in paths]
        columns = [part.reshape(len(part), -1).float() for part in (*outputs, *found)]
        self.widths = [part.shape[1] for part in columns]
        return torch.cat(columns, 1)


@contextmanager
def watched(model: nn.Module, paths: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """What the modules at these paths give at their last call."""
    seen: dict[str, Any] = {}
    handles = [
        module_at(model, path, name).register_forward_hook(lambda _m, _a, result, path=path: seen.update({path: result}))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    absent = [Problem(f"hints[{path!r}]", f"the module doesn't run in {name}", "name one that does") for path in paths]
    if problems := [problem for path, problem in zip(paths, absent, strict=True) if path not in seen]:
        raise ModelError(*problems)


def taught(teachers: Teachers, loader: Any, *, progress: bool) -> Lesson:
    """One pass of the teachers over the data, in order, in evaluation mode and without gradients."""
    with one_by_one(teachers):
        found = predict(teachers, in_order(loader), progress=progress)
    parts = list(found.outputs.split(teachers.widths, 1))
    count = len(teachers.teachers)
    return Lesson(parts[:count], parts[count:], found.targets)


def target(lesson: Lesson, combine: str, temperature: float, labels: Labels) -> Tensor:
    """What the student's softmax at `temperature` is to be, (n, classes)."""
    soft = [labels.spread(k, (z / temperature).log_softmax(1)).exp() for k, z in enumerate(lesson.outputs)]
    weight = _WEIGHTS[combine](lesson, labels)
    return torch.stack([w[:, None] * p for w, p in zip(weight, soft, strict=True)]).sum(0)


def _mean(lesson: Lesson, labels: Labels) -> Tensor:
    return torch.full((len(lesson.outputs), len(lesson.outputs[0])), 1 / len(lesson.outputs))


def _confidence(lesson: Lesson, labels: Labels) -> Tensor:
    logs = [labels.spread(k, log_probabilities_of(z)) for k, z in enumerate(lesson.outputs)]
    if len(logs) == 1:
        return _mean(lesson, labels)
    if lesson.labels is None:
        losses = torch.stack([-(p.exp() * torch.where(p.isinf(), 0.0, p)).sum(1) for p in logs])
    else:
        own = torch.stack([p.gather(1, lesson.labels[:, None])[:, 0] for p in logs])
        losses = -own.clamp(min=-1e4)  # of a class that a teacher doesn't know
    return (1 - losses.softmax(0)) / (len(logs) - 1)


def _per_task(lesson: Lesson, labels: Labels) -> Tensor:
    assert lesson.labels is not None
    knows = torch.zeros(len(lesson.outputs), len(labels.names or ()))
    for k, columns in enumerate(labels.columns):
        knows[k, list(columns)] = 1
    share = knows / knows.sum(0)
    return share[:, lesson.labels]


_WEIGHTS = {"mean": _mean, "confidence": _confidence, "per_task": _per_task}
COMBINE = tuple(_WEIGHTS)


class Hinted(Composite):
    """A student that also gives, behind its outputs, a linear map of its features at each hint: (batch, all columns).

    The maps are FitNets' regressors (Romero et al. 2015, 1412.6550), of features averaged over places or tokens, and
    trained along; they aren't part of the student.
    """

    def __init__(self, student: nn.Module, hints: Sequence[Hint], widths: Sequence[int], inputs: Any) -> None:
        super().__init__()
        self.names, self.backbones = ("student",), nn.ModuleList([student])
        self.paths = [path for _, _, path in hints]
        like = next(student.parameters())
        with torch.no_grad():
            found = self._read(inputs)[1]
        self.regressors = nn.ModuleList(
            nn.Linear(part.shape[1], width, device=like.device, dtype=like.dtype)
            for part, width in zip(found, widths, strict=True)
        )

    def forward(self, inputs: Any) -> Tensor:
        """Inputs -> (batch, all columns), the student's outputs first."""
        output, found = self._read(inputs)
        regressed = [layer(part) for layer, part in zip(self.regressors, found, strict=True)]
        return torch.cat([output.reshape(len(output), -1), *regressed], 1)

    def _read(self, inputs: Any) -> tuple[Tensor, list[Tensor]]:
        student = self.backbones[0]
        with watched(student, self.paths, "student") as seen:
            output = prediction(call(student, inputs, "student"), "student")
        found = [features(seen[p], inputs, module_at(student, p), pool=True, name="student")[0] for p in self.paths]
        return output, found


def hints_of(hints: Mapping[str, Any] | None, names: Sequence[str]) -> list[Hint]:
    """{teacher's path: student's path}, or with several teachers that by teacher's name, as a list in teachers' order."""
    by_teacher = {names[0]: hints or {}} if len(names) == 1 and not (hints and set(hints) <= set(names)) else dict(hints or {})
    return [
        (k, teacher, student) for k, name in enumerate(names) for teacher, student in dict(by_teacher.get(name, {})).items()
    ]

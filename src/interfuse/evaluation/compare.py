"""`compare`: models side by side on the same data, with quality, its uncertainty, and costs.

Each model is run once over each task (`predict`), then scored on resamples that all models share, so that differences
are paired. The result and its views are `comparison`'s. Nothing is chosen here for later use: the best parent is named
for display, and how it was picked is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.errors import DataError, OptionError, Problem, nearest
from interfuse.evaluation.comparison import ClassWeights, Comparison, Row, Score
from interfuse.evaluation.cost import Cost, cost, device_of
from interfuse.evaluation.metrics import AnyMetric, Metric, find_metric, interval, resampled
from interfuse.inference.batches import batches, first
from interfuse.inference.predict import Predictions, predict
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import split_batch
from interfuse.progress import track


@dataclass(frozen=True)
class _Run:
    """What running one model gave: its score by task with the resampled ones, weights by task, and its cost.

    whole: the model whose row this is once more, with one input missing.
    """

    name: str
    whole: str | None
    scores: dict[str, tuple[float, Tensor]]
    weights: dict[str, ClassWeights]
    cost: Cost

    @property
    def score(self) -> tuple[float, Tensor]:
        """The mean over tasks, and that of each resample."""
        values = [value for value, _ in self.scores.values()]
        return sum(values) / len(values), torch.stack([drawn for _, drawn in self.scores.values()]).mean(0)


def compare(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    data: Any,
    *,
    metric: AnyMetric = "accuracy",
    batch_size: int = 64,
    cost_batch: int = 32,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    parents: Sequence[str] = (),
    best_parent: str | None = None,
    views: Mapping[str, Any] | None = None,
    missing: bool | None = None,
    device: torch.device | str | None = None,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Comparison:
    """Score every model on `data` and measure what it costs: one row a model.

    `models` maps names to modules; those of a sequence are named after their classes. `data` is anything that `predict`
    reads, with targets, or a mapping from task names to such data: a score for each task, and their mean. Every pass
    over it must give the examples in one order. `views` maps a model's name to the same data as that model reads it (by
    its own tokenizer, at its own image size), where it doesn't read `data` as it is. `bootstrap` is the number of
    resamples behind each interval. Costs are measured on the first `cost_batch` examples of the first batch, on the
    device that holds the model or on `device`. Where `parents` are named, every other model gets the paired difference to
    `best_parent`, by default the parent with the best score on this same data. `missing` adds a row for each input of a
    fusion, in which it is missing from every example ("fusion without text"), with the paired difference to the whole; left
    out, to those with tokens for what is missing. `cache` is the folder of frozen backbones'
    features, or None. Raises `UserError`, with every problem in the arguments before a model is run.
    """
    named = _named(models)
    tasks, own = _tasks(data), {name: _tasks(view) for name, view in (views or {}).items()}
    sizes = {"batch_size": batch_size, "cost_batch": cost_batch, "bootstrap": bootstrap}
    problems = _problems(named, tasks, sizes, confidence, parents, best_parent, device)
    runs_of = _passes(named, missing, problems)
    how = _How(_metric(metric, problems + _view_problems(named, tasks, own)), batch_size, bootstrap, seed, device, cache)
    examples = {name: _first_examples(view, cost_batch) for name, view in {"": tasks, **own}.items()}
    seen: dict[str, Tensor] = {}  # each task's targets, as the first model met them
    measure = how.metric
    runs = [
        _run(name, gone, named[name], own.get(name, tasks), examples.get(name, examples[""]), how, seen)
        for name, gone in track(runs_of, "comparing", len(runs_of), shown=progress)
    ]
    reference = _reference(runs, parents, best_parent, measure)
    return Comparison(
        metric=measure.name,
        higher=measure.higher,
        tasks=tuple(tasks),
        examples=tuple(len(seen[task]) for task in tasks),
        rows=tuple(_row(r, r.whole is None and r.name in parents, reference, confidence, runs) for r in runs),
        confidence=confidence,
        resamples=bootstrap,
        best_parent=reference.name if reference else None,
        chosen_here=reference is not None and best_parent is None,
        device=_described(device or device_of(next(iter(named.values())))),
    )


@dataclass(frozen=True)
class _How:
    """What is the same for all models."""

    metric: Metric
    batch_size: int
    bootstrap: int
    seed: int
    device: torch.device | str | None
    cache: Path | str | None


def _passes(models: Mapping[str, nn.Module], missing: bool | None, problems: list[Problem]) -> list[tuple[str, str]]:
    """(model, the input that is missing, "" for none) for each row; what is wrong is added to the problems."""
    passes: list[tuple[str, str]] = []
    for name, model in models.items():
        passes.append((name, ""))
        inputs = list(dict.fromkeys(model.inputs)) if isinstance(model, ModelFusion) else []
        wanted = missing if missing is not None else isinstance(model, ModelFusion) and model.missing == "token"
        passes += [(name, gone) for gone in inputs if wanted and len(inputs) > 1]
    taken = [_title(name, gone) for name, gone in passes if gone]
    problems += [Problem(f"models[{name!r}]", "is the name of a row with an input missing", "another name")
                 for name in models if name in taken]  # fmt: skip
    return passes


def _title(name: str, gone: str) -> str:
    return f"{name} without {gone}" if gone else name


def _run(
    name: str, gone: str, model: nn.Module, tasks: Mapping[str, Any], example: Any, how: _How, seen: dict[str, Tensor]
) -> _Run:
    """One model over all tasks, with the input `gone` missing where one is named, and what it costs on `example`."""
    scores, weights = {}, {}
    with _on(model, how.device), model.without(gone) if isinstance(model, ModelFusion) and gone else nullcontext():
        for number, (task, source) in enumerate(tasks.items()):
            found = predict(model, source, batch_size=how.batch_size, device=how.device, cache=how.cache, progress=False)
            with _naming(name, task if len(tasks) > 1 else ""):
                wanted = _same_targets(found, seen, task)
                scores[task] = resampled(how.metric, found.outputs, wanted, resamples=how.bootstrap, seed=how.seed + number)
            if found.weights is not None and not gone:
                weights[task] = _by_class(found.weights.detach().cpu(), wanted, model, source)
        return _Run(_title(name, gone), name if gone else None, scores, weights, cost(model, example))


def _named(models: Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Models by name; a sequence's by class, numbered where a class comes again: CNN, CNN-2."""
    if isinstance(models, Mapping):
        return dict(models)
    names: dict[str, nn.Module] = {}
    met: Counter[str] = Counter()
    for model in models:
        kind = type(model).__name__
        met[kind] += 1
        names[kind if met[kind] == 1 else f"{kind}-{met[kind]}"] = model
    return names


def _tasks(data: Any) -> dict[str, Any]:
    """Data by task. What can be gone through once only is kept, since every model goes through it."""
    tasks = data if isinstance(data, Mapping) else {"data": data}
    return {task: list(source) if isinstance(source, Iterator) else source for task, source in tasks.items()}


def _problems(
    models: Mapping[str, nn.Module],
    tasks: Mapping[str, Any],
    sizes: Mapping[str, int],
    confidence: float,
    parents: Sequence[str],
    best_parent: str | None,
    device: torch.device | str | None,
) -> list[Problem]:
    """Everything wrong with the arguments of `compare`, save its metric."""
    problems = [
        Problem(f"models[{name!r}]", f"got {type(model).__name__}", "a torch module; load_model reads one")
        for name, model in models.items()
        if not isinstance(model, nn.Module)
    ]
    for path, given in (("models", models), ("data", tasks)):
        if not given:
            problems.append(Problem(path, "empty", "give at least one"))
    problems += [Problem(name, f"got {size}", "at least 1") for name, size in sizes.items() if size < 1]
    if not 0 < confidence < 1:
        problems.append(Problem("confidence", f"got {confidence}", "a share in (0, 1), such as 0.95"))
    if isinstance(parents, str):
        problems.append(Problem("parents", f"got {parents!r}", "a list of names"))
    else:
        problems += [
            Problem("parents", f"no model is named {name!r}", nearest(name, models)) for name in parents if name not in models
        ]
        if best_parent is not None and best_parent not in parents:
            problems.append(Problem("best_parent", f"{best_parent!r} isn't a parent", nearest(best_parent, parents)))
    try:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            problems.append(Problem("device", f"got {str(device)!r}, but torch sees no GPU", "'cpu'"))
    except RuntimeError as error:
        problems.append(Problem("device", f"got {device!r}", str(error).splitlines()[0]))
    return problems


def _view_problems(
    models: Mapping[str, nn.Module], tasks: Mapping[str, Any], views: Mapping[str, Mapping[str, Any]]
) -> list[Problem]:
    """Views of models that there aren't, or of other tasks."""
    problems = [Problem("views", f"no model is named {name!r}", nearest(name, models)) for name in views if name not in models]
    return problems + [
        Problem(f"views[{name!r}]", f"has the tasks {list(view)}", f"those of data: {list(tasks)}")
        for name, view in views.items()
        if list(view) != list(tasks)
    ]


def _metric(metric: AnyMetric, problems: list[Problem]) -> Metric:
    """The metric, or an `OptionError` with all problems found before and its own."""
    try:
        found = find_metric(metric)
    except OptionError as error:
        raise OptionError(*problems, *error.problems) from None
    if problems:
        raise OptionError(*problems)
    return found


def _first_examples(tasks: Mapping[str, Any], count: int) -> Any:
    """The inputs of the first task's first batch, cut to `count` examples; every task must have targets."""
    inputs, problems = [], []
    for task, data in tasks.items():
        path = "data" if len(tasks) == 1 else f"data[{task!r}]"
        given, targets = split_batch(first(batches(data, count, name=path), path))
        inputs.append(given)
        if targets is None:
            problems.append(Problem(path, "it has no targets", "give (inputs, targets), or a mapping with 'labels'"))
    if problems:
        raise DataError(*problems)
    return _cut(inputs[0], count)


def _cut(inputs: Any, count: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:count] if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {key: _cut(value, count) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_cut(value, count) for value in inputs)
    return inputs


@contextmanager
def _on(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The model on `device`, and back where it was afterwards."""
    if device is None:
        yield
        return
    before = device_of(model)
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def _naming(model: str, task: str) -> Iterator[None]:
    """The model's name in front of what is wrong with its outputs."""
    try:
        yield
    except DataError as error:
        place = f"{model} on {task}" if task else model
        raise DataError(*(problem._replace(path=f"{place}: {problem.path}") for problem in error.problems)) from error


def _same_targets(found: Predictions, seen: dict[str, Tensor], task: str) -> Tensor:
    """The task's targets, which must be those that the first model met: differences are taken example by example."""
    if found.targets is None:
        raise DataError(Problem("targets", "none", "give (inputs, targets), or a mapping with 'labels'"))
    targets = found.targets.detach().cpu()
    if not torch.equal(targets, seen.setdefault(task, targets)):
        raise DataError(Problem("targets", "their order changed between two passes", "use a loader that doesn't shuffle"))
    return targets


def _by_class(weights: Tensor, targets: Tensor, model: nn.Module, data: Any) -> ClassWeights:
    """Mean weights `[n, models]` over the examples of each class that occurs; over all where targets aren't classes."""
    names = tuple(map(str, getattr(model, "names", ())))
    if len(names) != weights.shape[1]:
        names = tuple(f"model {i + 1}" for i in range(weights.shape[1]))
    if targets.ndim != 1 or targets.is_floating_point():
        return ClassWeights(names, ("all",), (tuple(weights.double().mean(0).tolist()),))
    titles = getattr(data, "classes", None) or ()
    present = targets.unique().tolist()
    classes = tuple(str(titles[number]) if 0 <= number < len(titles) else str(number) for number in present)
    values = tuple(tuple(weights[targets == number].double().mean(0).tolist()) for number in present)
    return ClassWeights(names, classes, values)


def _reference(runs: list[_Run], parents: Sequence[str], best_parent: str | None, metric: Metric) -> _Run | None:
    """The parent that differences are taken to; the first of equals, and None where no parents are named."""
    if best_parent is not None:
        return next(run for run in runs if run.name == best_parent)
    candidates = [run for run in runs if run.whole is None and run.name in parents]
    choose = max if metric.higher else min
    return choose(candidates, key=lambda run: run.score[0]) if candidates else None


def _row(run: _Run, parent: bool, reference: _Run | None, confidence: float, runs: Sequence[_Run]) -> Row:
    value, drawn = run.score
    whole = next((other for other in runs if other.name == run.whole), None)
    return Row(
        name=run.name,
        parent=parent,
        score=Score(value, *interval(drawn, confidence)),
        scores={task: Score(v, *interval(d, confidence)) for task, (v, d) in run.scores.items()},
        cost=run.cost,
        difference=None if parent else _difference(run, reference, confidence),
        weights=run.weights,
        whole=run.whole,
        change=_difference(run, whole, confidence),
    )


def _difference(run: _Run, other: _Run | None, confidence: float) -> Score | None:
    """A run's score less another's, paired."""
    if other is None:
        return None
    (value, drawn), (less, less_drawn) = run.score, other.score
    return Score(value - less, *interval(drawn - less_drawn, confidence))


def _described(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''}), torch {torch.__version__}"

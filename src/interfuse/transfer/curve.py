"""`trunk_curve`: parameters and latency against quality, from M separate experts to one merged body, and a point chosen on it.

The point is chosen by validation data alone; test data, where given, are only reported. Chosen is the network with the fewest
parameters in which no task, or the mean of all, has lost more than a share of the experts' validation value. What is shared is
merged and nothing else, unless `tune` trains each network further before it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from torch import Tensor, nn

from interfuse import units
from interfuse.errors import DataError, OptionError, Problem, nearest
from interfuse.evaluation.cost import Cost, cost
from interfuse.evaluation.metrics import AnyMetric, Metric, find_metric, score
from interfuse.extras import require
from interfuse.inference.batches import batches, first
from interfuse.inference.predict import predict
from interfuse.modules.inputs import split_batch, with_each
from interfuse.progress import track
from interfuse.transfer.sharing import SharedTrunk, place, share_trunk
from interfuse.transfer.trunk import find_blocks

WITHIN = ("each", "mean")


@dataclass(frozen=True)
class Point:
    """The network with `depth` shared blocks: its cost, all tasks in one pass, and each task's metric.

    depth: a number of blocks, or the path of the last module that is shared.
    """

    depth: int | str
    cost: Cost
    validation: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True)
class TrunkCurve:
    """Points from the largest to the smallest. `blocks` is the path of the blocks; `tolerance` the share of the experts' value
    that may be lost, by a task or the mean (`within`); `chosen` the point that validation chose; `tuned` its weights, where the
    networks were trained further."""

    metric: str
    higher: bool
    blocks: str
    method: str
    tolerance: float
    points: tuple[Point, ...]
    chosen: Point
    within: str = "each"
    tuned: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def network(self, experts: Mapping[str, nn.Module], **options: Any) -> SharedTrunk:
        """The chosen network, of the same experts; options as those of the curve (`base`, the method's own)."""
        depth = self.chosen.depth
        blocks = None if isinstance(depth, str) else self.blocks
        shared = share_trunk(experts, depth, method=self.method, blocks=blocks, **options)
        if self.tuned is not None:
            shared.load_state_dict(self.tuned)
        return shared

    def markdown(self) -> str:
        """A Markdown table, the chosen row in bold."""
        tasks = list(self.points[0].validation)
        sets = [which for which in ("validation", "test") if getattr(self.points[0], which)]
        heads = ["Shared blocks", "Parameters", "FLOPs/example", f"Latency (batch {self.points[0].cost.batch})"]
        heads += [f"{task}, {which}" for which in sets for task in tasks]
        lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
        for point in self.points:
            cells = [str(point.depth), units.count(point.cost.parameters), units.count(point.cost.flops)]
            cells += [units.seconds(point.cost.latency)]
            cells += [units.value(getattr(point, which)[task]) for which in sets for task in tasks]
            lines.append([f"**{cell}**" for cell in cells] if point is self.chosen else cells)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{self.caption()}\n"

    def caption(self) -> str:
        """What the table and the picture show."""
        which = {"each": "no task's validation value is", "mean": "the mean of the tasks' validation values isn't"}[self.within]
        whose = {"each": "its expert's", "mean": "the experts'"}[self.within]
        return (
            f"{self.metric} ({'higher' if self.higher else 'lower'} is better); latency of all tasks in one pass. In bold: the"
            f" smallest network in which {which} more than {self.tolerance:.1%} worse than {whose}."
        )

    def save_figure(self, path: str | Path) -> Path:
        """Quality against parameters and against latency, a line a task, as a picture of the path's kind (svg, png, pdf)."""
        figure = require("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        which = "test" if self.points[0].test else "validation"
        sides = ((left, "parameters (millions)", 1e-6, "parameters"), (right, "latency (ms)", 1e3, "latency"))
        for axes, label, scale, name in sides:
            at = [getattr(point.cost, name) * scale for point in self.points]
            for task in self.points[0].validation:
                axes.plot(at, [getattr(point, which)[task] for point in self.points], marker="o", markersize=4, label=task)
            axes.axvline(getattr(self.chosen.cost, name) * scale, color="0.6", linestyle=":", label="chosen")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        left.set_ylabel(f"{self.metric} ({which})")
        for x, point in zip([p.cost.parameters * 1e-6 for p in self.points], self.points, strict=True):
            best = max(getattr(point, which).values())
            left.annotate(f"k={point.depth}", (x, best), xytext=(0, 5), textcoords="offset points", fontsize=8, ha="center")
        right.legend()
        figure.savefig(path)
        return Path(path)


def trunk_curve(
    experts: Mapping[str, nn.Module],
    validation: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
    *,
    depths: Sequence[int | str] | None = None,
    base: nn.Module | None = None,
    method: str = "linear",
    blocks: str | None = None,
    tune: Callable[[SharedTrunk], Any] | None = None,
    tolerance: float = 0.01,
    within: Literal["each", "mean"] = "each",
    metric: AnyMetric = "accuracy",
    batch_size: int = 64,
    cost_batch: int = 32,
    progress: bool = True,
    **options: Any,
) -> TrunkCurve:
    """`share_trunk` at every depth, each task's metric and what the whole costs, and the smallest network that is good enough.

    experts, base, method, blocks, options: as for `share_trunk`. validation, test: task -> data as `predict` takes it, with
    targets. depths: from 0 (the separate experts, always among them) to all blocks, or paths as for `share_trunk`, such as that
    of the embeddings; left out, every number.
    tune: is given each shared network before it is measured, to train what is left of it, as `fit_tasks` does. It must not
        see the test data.
    tolerance: the share in [0, 1) of the experts' validation value that may be lost; within: by "each" task, or by the "mean"
        of all. Costs are measured on the first `cost_batch` examples of the first task.

    Raises `OptionError`, `ModelError` and `DataError`.
    """
    measure = find_metric(metric)
    found = find_blocks(experts, blocks)
    wanted = list(range(len(found.names) + 1)) if depths is None else [0, *(k for k in dict.fromkeys(depths) if k != 0)]
    _check(experts, validation, test, wanted, len(found.names), tolerance, within)
    for path in (depth for depth in wanted if isinstance(depth, str)):
        place(experts, path, None)
    inputs, _ = split_batch(first(batches(next(iter(validation.values())), cost_batch)))
    example = with_each(inputs, lambda tensor: tensor[:cost_batch])
    points: list[Point] = []
    weights: Mapping[str, Tensor] | None = None
    for depth in track(wanted, "sharing", len(wanted), shown=progress):
        at = None if isinstance(depth, str) else found.path
        shared = share_trunk(experts, depth, base=base, method=method, blocks=at, **options)
        if tune is not None and depth != 0:
            tune(shared)
        values = [_values(shared, data or {}, measure, batch_size) for data in (validation, test)]
        points.append(Point(depth, cost(shared, example), *values))
        if tune is not None and depth != 0 and _chosen(points, measure, tolerance, within) is points[-1]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in shared.state_dict().items()}
    chosen = _chosen(points, measure, tolerance, within)
    order = tuple(sorted(points, key=lambda point: -point.cost.parameters))
    return TrunkCurve(measure.name, measure.higher, found.path, method, tolerance, order, chosen, within, weights)


def _chosen(points: Sequence[Point], metric: Metric, tolerance: float, within: str) -> Point:
    """The smallest of the points that are good enough; the experts, which come first, are."""
    start = _held(points[0], within)

    def fine(point: Point) -> bool:
        losses = [
            (before - now) * (1 if metric.higher else -1) for before, now in zip(start, _held(point, within), strict=True)
        ]
        return all(loss <= tolerance * abs(before) for loss, before in zip(losses, start, strict=True))

    return min((point for point in points if fine(point)), key=lambda point: point.cost.parameters)


def _held(point: Point, within: str) -> list[float]:
    """The values that may not fall too far."""
    values = list(point.validation.values())
    return values if within == "each" else [fmean(values)]


def _values(shared: SharedTrunk, data: Mapping[str, Any], metric: Metric, batch_size: int) -> dict[str, float]:
    found = {}
    for task, source in data.items():
        outputs, targets, _ = predict(shared.network(task), source, batch_size=batch_size, progress=False)
        if targets is None:
            raise DataError(Problem(f"data[{task!r}]", "it has no targets", "give (inputs, targets)"))
        found[task] = score(metric, outputs, targets)
    return {task: found[task] for task in shared.names if task in found}


def _check(
    experts: Mapping[str, nn.Module],
    validation: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    depths: Sequence[int | str],
    count: int,
    tolerance: float,
    within: str,
) -> None:
    problems = []
    for path, data in (("validation", validation), ("test", test)):
        if data is not None and set(data) != set(experts):
            problems.append(Problem(path, f"has the tasks {list(data)}", f"those of the experts: {list(experts)}"))
    if test is not None:
        problems += [
            Problem(f"test[{task!r}]", "is the validation data, which the point is chosen by", "give other data")
            for task, data in test.items()
            if data is validation.get(task)
        ]
    numbers = [k for k in depths if not isinstance(k, str)]
    problems += [
        Problem("depths", f"got {k!r}", f"numbers from 0 to {count}, or paths") for k in numbers if not 0 <= k <= count
    ]
    if within not in WITHIN:
        problems.append(Problem("within", f"got {within!r}", nearest(str(within), WITHIN)))
    if not 0 <= tolerance < 1:
        problems.append(Problem("tolerance", f"got {tolerance!r}", "a share in [0, 1), such as 0.01"))
    if problems:
        raise OptionError(*problems)

"""`trunk_curve`: parameters and latency against quality, from M separate experts to one merged body, and a point chosen on it.

The point is chosen by validation data alone; test data, where given, are only reported. Chosen is the network with the fewest
parameters in which no task has lost more than a share of its expert's validation value. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from interfuse import units
from interfuse.errors import DataError, OptionError, Problem
from interfuse.evaluation.cost import Cost, cost
from interfuse.evaluation.metrics import AnyMetric, Metric, find_metric, score
from interfuse.extras import require
from interfuse.inference.batches import batches, first
from interfuse.inference.predict import predict
from interfuse.modules.inputs import split_batch, with_each
from interfuse.progress import track
from interfuse.transfer.sharing import SharedTrunk, share_trunk
from interfuse.transfer.trunk import find_blocks


@dataclass(frozen=True)
class Point:
    """The network with `depth` shared blocks: its cost, all tasks in one pass, and each task's metric."""

    depth: int
    cost: Cost
    validation: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True)
class TrunkCurve:
    """Points by depth. `blocks` is the path of the blocks; `tolerance` the share of its expert's value that a task may lose;
    `chosen` the point that validation chose."""

    metric: str
    higher: bool
    blocks: str
    method: str
    tolerance: float
    points: tuple[Point, ...]
    chosen: Point

    def network(self, experts: Mapping[str, nn.Module], **options: Any) -> SharedTrunk:
        """The chosen network, of the same experts; options as those of the curve (`base`, the method's own)."""
        return share_trunk(experts, self.chosen.depth, method=self.method, blocks=self.blocks or None, **options)

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
        return (
            f"{self.metric} ({'higher' if self.higher else 'lower'} is better); latency of all tasks in one pass. In bold: the"
            f" smallest network in which no task's validation value is more than {self.tolerance:.1%} worse than its expert's."
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
    depths: Sequence[int] | None = None,
    base: nn.Module | None = None,
    method: str = "linear",
    blocks: str | None = None,
    tolerance: float = 0.01,
    metric: AnyMetric = "accuracy",
    batch_size: int = 64,
    cost_batch: int = 32,
    progress: bool = True,
    **options: Any,
) -> TrunkCurve:
    """`share_trunk` at every depth, each task's metric and what the whole costs, and the smallest network that is good enough.

    experts, base, method, blocks, options: as for `share_trunk`. validation, test: task -> data as `predict` takes it, with
    targets. depths: from 0 (the separate experts, always among them) to all blocks; left out, every one.
    tolerance: the share in [0, 1) of its expert's validation value that a task may lose. Costs are measured on the first
    `cost_batch` examples of the first task. Raises `OptionError`, `ModelError` and `DataError`.
    """
    measure = find_metric(metric)
    count = len(find_blocks(experts, blocks).names)
    wanted = range(count + 1) if depths is None else sorted({0, *depths})
    _check(experts, validation, test, wanted, count, tolerance)
    inputs, _ = split_batch(first(batches(next(iter(validation.values())), cost_batch)))
    example = with_each(inputs, lambda tensor: tensor[:cost_batch])
    points: list[Point] = []
    for depth in track(wanted, "sharing", len(wanted), shown=progress):
        shared = share_trunk(experts, depth, base=base, method=method, blocks=blocks, **options)
        values = [_values(shared, data or {}, measure, batch_size) for data in (validation, test)]
        points.append(Point(depth, cost(shared, example), *values))
    found = find_blocks(experts, blocks).path
    chosen = _chosen(points, measure, tolerance)
    return TrunkCurve(measure.name, measure.higher, found, method, tolerance, tuple(points), chosen)


def _chosen(points: Sequence[Point], metric: Metric, tolerance: float) -> Point:
    """The smallest of the points that are good enough; the experts are."""
    start = points[0].validation

    def fine(point: Point) -> bool:
        losses = [(start[t] - value) * (1 if metric.higher else -1) for t, value in point.validation.items()]
        return all(loss <= tolerance * abs(start[t]) for loss, t in zip(losses, start, strict=True))

    return min((point for point in points if fine(point)), key=lambda point: point.cost.parameters)


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
    depths: Sequence[int],
    count: int,
    tolerance: float,
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
    problems += [Problem("depths", f"got {k!r}", f"numbers from 0 to {count}") for k in depths if not 0 <= k <= count]
    if not 0 <= tolerance < 1:
        problems.append(Problem("tolerance", f"got {tolerance!r}", "a share in [0, 1), such as 0.01"))
    if problems:
        raise OptionError(*problems)

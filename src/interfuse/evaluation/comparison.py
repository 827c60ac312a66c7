"""The result of `compare`: one row a model, frozen, and its views for the terminal, Markdown and JSON.

Nothing is measured here (`compare` does) and nothing drawn (`report.html` does).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from interfuse import units
from interfuse.errors import OptionError, Problem, nearest
from interfuse.evaluation.cost import Cost

if TYPE_CHECKING:
    from rich.table import Table


_ABBREVIATIONS = {"f1": "macro F1", "auroc": "AUROC", "ece": "ECE", "mse": "MSE", "mae": "MAE", "r2": "R²"}


class Score(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassWeights:
    """A fusion's mean weight on each of its models (columns), over the examples of each class (rows)."""

    models: tuple[str, ...]
    classes: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Row:
    """One model: `score` is the mean over tasks (or the only one's), `scores` by task.

    `difference` is its score minus the best parent's, paired, for models that aren't parents. `weights` is there for a
    fusion that weighs its models, by task.

    In a row of a fusion with one input missing from every example, `whole` is the row of the fusion with all inputs, and
    `change` its score minus that one's, paired.
    """

    name: str
    parent: bool
    score: Score
    scores: dict[str, Score]
    cost: Cost
    difference: Score | None = None
    weights: dict[str, ClassWeights] = dataclasses.field(default_factory=dict)
    whole: str | None = None
    change: Score | None = None


class Column(NamedTuple):
    """One column as text: `best` holds the rows whose number is the best; several where it is shared."""

    title: str
    cells: tuple[str, ...]
    best: frozenset[int]


@dataclass(frozen=True)
class Comparison:
    """Models side by side. `rows` are in the order that the models were given in.

    metric, higher: what was measured, and whether higher is better; tasks: the names of the data, in order; examples:
    how many each has; confidence: of the intervals, in (0, 1), from `resamples` bootstrap resamples; best_parent: the
    row that differences are taken to, `chosen_here` if it was picked by its score on this same data; device: where it ran.
    """

    metric: str
    higher: bool
    tasks: tuple[str, ...]
    examples: tuple[int, ...]
    rows: tuple[Row, ...]
    confidence: float
    resamples: int
    best_parent: str | None
    chosen_here: bool
    device: str

    def __getitem__(self, name: str) -> Row:
        """The row of that model."""
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise OptionError(Problem("comparison", f"no model is named {name!r}", nearest(name, names)))

    def best(self) -> Row:
        """The row with the best score, of those with all inputs; the first of equals."""
        return (max if self.higher else min)(self.models, key=lambda row: row.score.value)

    @property
    def models(self) -> tuple[Row, ...]:
        """One row a model: without those in which an input is missing."""
        return tuple(row for row in self.rows if row.whole is None)

    def columns(self) -> list[Column]:
        """The table as text, the names first."""
        rows, batches = self.rows, sorted({row.cost.batch for row in self.rows})
        parts = [Column("Model", tuple(row.name for row in rows), frozenset())]
        if len(self.tasks) > 1:
            parts += [self._quality(task, [row.scores[task] for row in rows]) for task in self.tasks]
        heading = f"mean {self.title}" if len(self.tasks) > 1 else self.title
        parts.append(self._quality(heading[:1].upper() + heading[1:], [row.score for row in rows]))
        if any(row.difference for row in rows):
            cells = tuple(units.span(*row.difference, signed=True) if row.difference else "" for row in rows)
            parts.append(Column(f"vs {self.best_parent}", cells, frozenset()))
        if any(row.change for row in rows):
            cells = tuple(units.span(*row.change, signed=True) if row.change else "" for row in rows)
            parts.append(Column("vs all inputs", cells, frozenset()))
        named = "/".join(map(str, batches))
        parts += [
            _cheapest("Parameters", [row.cost.parameters for row in rows], units.count),
            _plain("Trainable", [units.count(row.cost.trainable) for row in rows]),
            _cheapest("Size", [row.cost.bytes for row in rows], lambda n: units.count(n, "B")),
            _cheapest("FLOPs/example", [row.cost.flops for row in rows], units.count),
            _cheapest(f"Latency (batch {named})", [row.cost.latency for row in rows], units.seconds),
            _cheapest("Peak memory", [row.cost.memory for row in rows], lambda n: units.count(n, "B")),
        ]
        return parts

    @property
    def title(self) -> str:
        """The metric's name in a sentence: "balanced accuracy", "AUROC"."""
        return _ABBREVIATIONS.get(self.metric, self.metric.replace("_", " "))

    def _quality(self, title: str, scores: list[Score]) -> Column:
        values = [score.value for score in scores]
        best = (max if self.higher else min)(values)
        return Column(title, tuple(units.span(*score) for score in scores), _equal(values, best))

    def caption(self) -> str:
        """What the columns are, in one or two sentences."""
        sizes = " + ".join(f"{n:,}" for n in self.examples)
        text = f"{self.title} ({'higher' if self.higher else 'lower'} is better) on {sizes} examples, with "
        text += f"{self.confidence:.0%} bootstrap intervals; costs on {self.device}."
        if self.best_parent is not None and self.chosen_here:
            text += f" {self.best_parent} is the best parent on this same data, which favours it a little."
        if len(self.models) < len(self.rows):
            text += ' In a row "without" an input, that is missing from every example.'
        return text

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self.caption(), caption_justify="left")
        columns = self.columns()
        for column in columns:
            table.add_column(Text(column.title), justify="left" if column is columns[0] else "right")
        for i in range(len(self.rows)):
            table.add_row(*(Text(c.cells[i], style="bold green" if i in c.best else "") for c in columns))
        return table

    def markdown(self) -> str:
        """A Markdown table, the best of each column in bold."""
        columns = self.columns()
        lines = [
            [_escaped(column.title) for column in columns],
            [":--" if column is columns[0] else "--:" for column in columns],
        ]
        for i, row in enumerate(self.rows):
            cells = [f"**{c.cells[i]}**" if i in c.best else c.cells[i] for c in columns[1:]]
            lines.append([_escaped(row.name), *cells])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{_escaped(self.caption())}\n"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as dictionaries, lists, numbers and strings; `from_dict` reads it."""
        result = dataclasses.asdict(self)
        result["tasks"], result["examples"] = list(self.tasks), list(self.examples)
        result["rows"] = [
            {**dataclasses.asdict(row), "score": row.score._asdict(), "difference": _named(row.difference)}
            | {"change": _named(row.change)}
            | {"scores": {task: score._asdict() for task, score in row.scores.items()}}
            | {"weights": {task: _listed(weights) for task, weights in row.weights.items()}}
            for row in self.rows
        ]
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` gave."""
        rows = tuple(
            Row(
                name=row["name"],
                parent=row["parent"],
                score=Score(**row["score"]),
                scores={task: Score(**score) for task, score in row["scores"].items()},
                cost=Cost(**row["cost"]),
                difference=Score(**row["difference"]) if row["difference"] else None,
                weights={task: _class_weights(weights) for task, weights in row["weights"].items()},
                whole=row.get("whole"),
                change=Score(**row["change"]) if row.get("change") else None,
            )
            for row in values["rows"]
        )
        return cls(**{**values, "rows": rows, "tasks": tuple(values["tasks"]), "examples": tuple(values["examples"])})

    def json(self) -> str:
        """`to_dict` as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(title: str, cells: list[str]) -> Column:
    return Column(title, tuple(cells), frozenset())


def _cheapest(title: str, numbers: list[Any], text: Any) -> Column:
    return Column(title, tuple(text(number) for number in numbers), _equal(numbers, min(numbers)))


def _equal(numbers: list[Any], best: Any) -> frozenset[int]:
    """The rows that have the best number; none where all do, since that says nothing."""
    rows = frozenset(i for i, number in enumerate(numbers) if number == best)
    return rows if len(rows) < len(numbers) else frozenset()


def _escaped(text: str) -> str:
    """Text that means itself within a Markdown table's cell."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _named(score: Score | None) -> dict[str, float] | None:
    return None if score is None else score._asdict()


def _listed(weights: ClassWeights) -> dict[str, Any]:
    return {
        "models": list(weights.models),
        "classes": list(weights.classes),
        "values": [list(row) for row in weights.values],
    }


def _class_weights(values: Mapping[str, Any]) -> ClassWeights:
    return ClassWeights(tuple(values["models"]), tuple(values["classes"]), tuple(map(tuple, values["values"])))

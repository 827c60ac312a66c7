"""`write_report`: a comparison as one self-contained HTML page. It fetches nothing and runs no script.

The page's text and style are in `report.html.jinja`, its plots come from `figures`. Nothing is measured here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from interfuse import units
from interfuse.errors import OptionError, Problem
from interfuse.evaluation.comparison import ClassWeights, Comparison, Row
from interfuse.extras import require
from interfuse.report.figures import Point, scatter

_WIDE, _NARROW = (540, 380), (340, 360)  # pixels


class _Figure(NamedTuple):
    title: str
    wide: Any
    narrow: Any
    left_out: str
    key: list[str]


class _Heat(NamedTuple):
    title: str
    weights: ClassWeights

    def shade(self, weight: float) -> int:
        """How strong the colour is, in percent: the largest weight gets 60, so that text on it stays readable."""
        largest = max(max(row) for row in self.weights.values)
        return round(60 * max(weight, 0.0) / largest) if largest > 0 else 0


def write_report(
    comparison: Comparison,
    path: Path | str,
    *,
    title: str = "Models compared",
    notes: str | Sequence[str] = (),
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write `comparison` to `path` as one HTML page and give the path back.

    `notes` are paragraphs below the title, `about` says of each model, by name, what it is. The page appears whole: a file
    that is there is replaced at the end. Raises `OptionError` where `path` is a folder, and `MissingExtra` without
    matplotlib and jinja2.
    """
    path = Path(path)
    if path.is_dir():
        raise OptionError(Problem("path", f"{path} is a folder", "give the name of a file, such as report.html"))
    page = _page(comparison, title, [notes] if isinstance(notes, str) else list(notes), about or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return path


def _page(comparison: Comparison, title: str, notes: list[str], about: Mapping[str, str]) -> str:
    jinja2 = require("jinja2")
    from interfuse import __version__

    source = resources.files("interfuse.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    several = len(comparison.tasks) > 1
    heats = [
        _Heat(f"{row.name} on {task}" if several else row.name, weights)
        for row in comparison.rows
        for task, weights in row.weights.items()
        if len(weights.models) > 1  # one model alone has all the weight
    ]
    return environment.from_string(source).render(
        title=title,
        summary=_summary(comparison),
        notes=notes,
        about=about,
        comparison=comparison,
        columns=comparison.columns(),
        confidence=f"{comparison.confidence:.0%}",
        parents=any(row.parent for row in comparison.rows),
        figures=_figures(comparison),
        heats=heats,
        method=_method(comparison),
        version=__version__,
    )


def _summary(comparison: Comparison) -> str:
    best = comparison.best()
    text = f"Best {comparison.title}: {best.name}, {units.span(*best.score)}"
    if best.difference is None:
        return text + "."
    low, high = sorted((best.difference.low, best.difference.high))
    unsure = low <= 0 <= high
    text += f"; {units.span(*best.difference, signed=True)} against the parent {comparison.best_parent}"
    return text + (". The interval holds zero: the difference may be chance." if unsure else ".")


def _figures(comparison: Comparison) -> list[_Figure]:
    batch = comparison.rows[0].cost.batch
    quality = comparison.title
    return [
        _figure(comparison, f"{quality} against parameters", "parameters", lambda r: r.cost.parameters, units.count),
        _figure(
            comparison,
            f"{quality} against latency",
            f"latency of a batch of {batch}",
            lambda row: row.cost.latency,
            units.seconds,
        ),
    ]


def _figure(
    comparison: Comparison, title: str, xlabel: str, cost: Callable[[Row], float], ticks: Callable[[float], str]
) -> _Figure:
    from markupsafe import Markup

    best = comparison.best()
    shown = [row for row in comparison.models if cost(row) > 0]
    hidden = [row.name for row in comparison.models if cost(row) <= 0]

    def drawn(labels: list[str], size: tuple[int, int]) -> str:
        points = [
            Point(row.name, label, cost(row), *row.score, parent=row.parent, best=row is best)
            for row, label in zip(shown, labels, strict=True)
        ]
        if not points:
            return ""
        drawing = scatter(
            points,
            xlabel=xlabel,
            ylabel=comparison.title,
            ticks=ticks,
            higher=comparison.higher,
            size=size,
            name=f"{title.rpartition(' ')[2]}-{size[0]}",
        )
        return Markup(drawing)

    key = [row.name for row in shown]
    return _Figure(
        title=title[:1].upper() + title[1:],
        wide=drawn(key, _WIDE),
        narrow=drawn([str(i + 1) for i in range(len(key))], _NARROW),  # a phone has no room for names
        left_out=f"Not shown, since a log axis has no zero: {', '.join(hidden)}." if hidden else "",
        key=key,
    )


def _method(comparison: Comparison) -> list[tuple[str, str]]:
    """What each column is, in the page's words; the definitions are `metrics`' and `cost`'s."""
    batches = sorted({row.cost.batch for row in comparison.rows})
    batch = " or ".join(map(str, batches))
    percent = f"{comparison.confidence:.0%}"
    lines = [
        (
            comparison.title,
            f"On every example of the data, with a {percent} percentile bootstrap interval from "
            f"{comparison.resamples:,} resamples of the examples. It covers the choice of test examples, not another "
            "training run.",
        )
    ]
    if comparison.best_parent is not None:
        how = (
            f"{comparison.best_parent} is the parent with the best score on this same data; having been picked on it "
            "favours it a little"
            if comparison.chosen_here
            else f"{comparison.best_parent} was named beforehand"
        )
        lines.append(
            (f"vs {comparison.best_parent}", f"The difference on the same resamples of the same examples (paired). {how}.")
        )
    if len(comparison.models) < len(comparison.rows):
        said = "The same model with that input missing from every example, by what it learned to put in its place."
        lines.append(("without ...", said))
        lines.append(("vs all inputs", "The difference to the same model with all inputs, on the same resamples (paired)."))
    return [
        *lines,
        ("Parameters", "Elements of all parameters, shared ones once. Trainable: those that require gradients."),
        ("Size", "Bytes of parameters and saved buffers as safetensors stores them, shared ones once."),
        (
            "FLOPs",
            "Of one forward pass, per example, by torch's counter: matrix products, convolutions and attention, a "
            "multiply-add being two. Element-wise work isn't counted.",
        ),
        ("Latency", f"Median of repeated forward passes of a batch of {batch} after warm-up, on {comparison.device}."),
        (
            "Peak memory",
            f"Most bytes alive in a forward pass of a batch of {batch}: parameters, buffers and activations, without the "
            "inputs.",
        ),
    ]

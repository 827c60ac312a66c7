"""Quality against cost, as SVG that takes its colours and font from the page. matplotlib draws; no state of it is changed.

Colours are drawn as markers (`_INK`, ...) and replaced by the page's CSS variables, so that one drawing serves light and
dark; text stays text.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from interfuse import units
from interfuse.extras import require
from interfuse.report.labels import Box, Place, place

_INK, _MUTED, _GRID, _ACCENT, _PARENT, _PAGE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--line",
    _ACCENT: "--accent",
    _PARENT: "--parent",
    _PAGE: "--card",
}
_STYLE = {"svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 12, "path.simplify": False}
_MARGIN = {"left": 58, "right": 22, "bottom": 44, "top": 10}  # pixels


class Point(NamedTuple):
    """One model: its cost (above 0), its quality with the interval, and how it is shown; `label` is written by it."""

    name: str
    label: str
    x: float
    value: float
    low: float
    high: float
    parent: bool
    best: bool


def scatter(
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str,
    ticks: Callable[[float], str],
    higher: bool,
    size: tuple[int, int],
    name: str,
) -> str:
    """An inline SVG of quality against cost on a log axis, `size` (width, height) in pixels; `name` is its id's prefix."""
    require("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*[Gg]lyph")  # the reader's fonts draw the text, not ours
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        canvas = FigureCanvasAgg(figure)
        left, bottom = _MARGIN["left"] / size[0], _MARGIN["bottom"] / size[1]
        right, top = 1 - _MARGIN["right"] / size[0], 1 - _MARGIN["top"] / size[1]
        axes = figure.add_axes((left, bottom, right - left, top - bottom))
        _frame(axes, points, xlabel, ylabel, ticks, (right - left) * size[0])
        _frontier(axes, points, higher)
        _points(axes, points)
        _names(axes, points, canvas.get_renderer(), size)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(drawn.getvalue(), name, f"{ylabel} against {xlabel}: {_spoken(points)}")


def _frame(axes: Any, points: Sequence[Point], xlabel: str, ylabel: str, ticks: Callable[[float], str], pixels: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = min(p.x for p in points), max(p.x for p in points)
    axes.set_xscale("log")
    room = max((high / low) ** 0.1, 1.25)
    axes.set_xlim(low / room, high * room)
    axes.xaxis.set_major_locator(FixedLocator(_tick_places(low / room, high * room, ticks, pixels)))
    bottom, top = min(p.low for p in points), max(p.high for p in points)
    room = 0.12 * (top - bottom) or 0.1 * abs(top) or 1.0
    axes.set_ylim(bottom - room, top + room)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks(x)))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(xlabel, color=_MUTED)
    axes.set_ylabel(ylabel, color=_MUTED, parse_math=False)
    axes.tick_params(colors=_MUTED, length=0, pad=5)
    axes.grid(color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)


def _tick_places(low: float, high: float, ticks: Callable[[float], str], pixels: float) -> list[float]:
    """Round numbers between `low` and `high`, as many as `pixels` have room for on a log axis."""
    per_decade = pixels / math.log10(high / low)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ([k / 2 for k in range(2, 20)], range(1, 10), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        gaps = [math.log10(b / a) * per_decade for a, b in itertools.pairwise(found)]
        widths = [7.5 * len(ticks(place)) + 8 for place in found]
        if all(gap > (a + b) / 2 for gap, (a, b) in zip(gaps, itertools.pairwise(widths), strict=True)):
            break
    return found


def _frontier(axes: Any, points: Sequence[Point], higher: bool) -> None:
    """The steps through the models than which none is both cheaper and better."""
    steps: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.value if higher else p.value)):
        if not steps or (point.value > steps[-1].value if higher else point.value < steps[-1].value):
            steps.append(point)
    if len(steps) > 1:
        axes.step(
            [p.x for p in steps], [p.value for p in steps], where="post", color=_MUTED, linewidth=1, dashes=(3, 3), zorder=1
        )


def _points(axes: Any, points: Sequence[Point]) -> None:
    for point in points:
        colour = _PARENT if point.parent else _ACCENT
        axes.plot([point.x] * 2, [point.low, point.high], color=colour, alpha=0.45, linewidth=1.5, zorder=2)
        axes.plot(
            [point.x],
            [point.value],
            marker="o",
            markersize=8,
            markerfacecolor=_PAGE if point.parent else colour,
            markeredgecolor=colour if point.parent else _PAGE,
            markeredgewidth=2 if point.parent else 1,
            zorder=3,
        )


def _names(axes: Any, points: Sequence[Point], renderer: Any, size: tuple[int, int]) -> None:
    texts = [
        axes.annotate(_short(p.label), (0, 0), xycoords="figure pixels", color=_INK, weight="bold" if p.best else "normal")
        for p in points
    ]
    for text in texts:
        text.set_parse_math(False)
    extents = [text.get_window_extent(renderer) for text in texts]
    spots = [tuple(axes.transData.transform((p.x, p.value))) for p in points]
    bars = []
    for point, (x, _) in zip(points, spots, strict=True):
        low, high = (axes.transData.transform((point.x, y))[1] for y in (point.low, point.high))
        bars.append(Box(x - 1, low, x + 1, high))
    bounds = Box(_MARGIN["left"], _MARGIN["bottom"], size[0] - 2, size[1] - 2)
    places = place(spots, [(extent.width, extent.height) for extent in extents], bounds, bars)
    for text, spot, found in zip(texts, spots, places, strict=True):
        _settle(axes, text, spot, found)


def _settle(axes: Any, text: Any, spot: tuple[float, float], found: Place) -> None:
    text.set_verticalalignment("center")
    middle = (found.box.left + found.box.right) / 2
    # Anchored on the side of its point, so that the reader's narrower or wider font doesn't move it off or onto it.
    if found.box.left >= spot[0]:
        text.set_position((found.box.left, (found.box.bottom + found.box.top) / 2))
    elif found.box.right <= spot[0]:
        text.set_horizontalalignment("right")
        text.set_position((found.box.right, (found.box.bottom + found.box.top) / 2))
    else:
        text.set_horizontalalignment("center")
        text.set_position((middle, (found.box.bottom + found.box.top) / 2))
    text.xy = text.get_position()
    if found.line is not None:
        axes.annotate(
            "",
            spot,
            found.line,
            xycoords="figure pixels",
            textcoords="figure pixels",
            arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5},
            annotation_clip=False,
        )


def _short(name: str, most: int = 26) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _spoken(points: Sequence[Point]) -> str:
    return "; ".join(f"{p.name} {units.value(p.value)}" for p in points)


def _inline(svg: str, name: str, spoken: str) -> str:
    """The `<svg>` element alone, with ids of its own, the page's colours and font, and a text for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ((?:bold |\d+ )?)([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", svg)
    svg = svg.replace("font-weight: ; ", "")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(spoken)}" ', 1)

"""Where the names of points go so that they stay readable: a greedy search over boxes, in pixels. Draws nothing.

Each name takes the nearest free place round its point; where names crowd, a place farther away, with a line to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

_ANGLES = 24
_STEPS = (8, 12, 17, 23, 30, 38, 47, 57, 68, 80, 93, 107, 122, 140, 160)
_LINE = 14  # a place farther away than this is joined to its point by a line


Segment: TypeAlias = "tuple[tuple[float, float], tuple[float, float]]"


class Box(NamedTuple):
    """A rectangle: left, bottom, right, top, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def grown(self, by: float) -> Box:
        """The rectangle with `by` pixels more on every side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def overlap(self, other: Box) -> float:
        """The area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


class Place(NamedTuple):
    """Where a name goes; `line` is the end of the line from the point, None where the name is next to it."""

    box: Box
    line: tuple[float, float] | None


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    avoid: Sequence[Box] = (),
) -> list[Place]:
    """A place for each name of `sizes` (width, height) round its point, within `bounds`.

    Names don't cover points or each other where there is room at all; `avoid` (error bars) they cover only where that
    saves a long way. Names choose one after the other; of a few orders the best is kept.
    """
    crowd = [sum(math.exp(-math.dist(a, b) / 40) for b in points) for a in points]
    indices = range(len(points))
    orders = (
        sorted(indices, key=lambda i: -crowd[i]),
        sorted(indices, key=lambda i: -points[i][1]),
        sorted(indices, key=lambda i: points[i][1]),
        sorted(indices, key=lambda i: -sizes[i][0]),
    )
    return min((_in_order(order, points, sizes, bounds, avoid) for order in orders), key=lambda found: found[0])[1]


def _in_order(
    order: Sequence[int],
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    avoid: Sequence[Box],
) -> tuple[float, list[Place]]:
    """The places that names get in this order, and what they cost together."""
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    names: list[Box] = []
    lines: list[Segment] = []
    total, chosen = 0.0, {}
    for i in order:
        others = [mark for j, mark in enumerate(marks) if j != i]
        lowest, best = math.inf, None
        for step, candidate in _candidates(points[i], sizes[i], bounds):
            if lowest <= step:
                break  # nothing farther away can cost less
            price = step + _price(candidate, points[i], [*others, *names], lines, avoid, lowest - step)
            if price < lowest:
                lowest, best = price, candidate
        assert best is not None
        total, chosen[i] = total + lowest, best
        names.append(best.box.grown(1.5))
        if (line := _line(points[i], best.line)) is not None:
            lines.append(line)
    return total, [chosen[i] for i in range(len(points))]


def _candidates(point: tuple[float, float], size: tuple[float, float], bounds: Box) -> list[tuple[float, Place]]:
    """Places within `bounds` at growing distance; at each, right and left first, then round."""
    x, y = point
    width, height = size
    turns = sorted(range(_ANGLES), key=lambda k: (abs(math.sin(2 * math.pi * k / _ANGLES)), k))
    found = []
    for step in _STEPS:
        for turn in turns:
            cos, sin = math.cos(2 * math.pi * turn / _ANGLES), math.sin(2 * math.pi * turn / _ANGLES)
            left = x + step * cos - width * (1 - cos) / 2
            bottom = y + step * sin - height * (1 - sin) / 2
            left = max(bounds.left, min(left, bounds.right - width))
            bottom = max(bounds.bottom, min(bottom, bounds.top - height))
            box = Box(left, bottom, left + width, bottom + height)
            end = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
            found.append((float(step), Place(box, end if math.dist(point, end) > _LINE else None)))
    return found


def _price(
    candidate: Place,
    point: tuple[float, float],
    others: Sequence[Box],
    lines: Sequence[Segment],
    avoid: Sequence[Box],
    limit: float,
) -> float:
    """How bad a place is, in pixels of distance: names, points and lines covered or crossed weigh most, then bars.

    From `limit` on the rest isn't looked at: the place is out.
    """
    box, own = candidate.box, _line(point, candidate.line)
    x, y = point
    price = 1000 * (box.overlap(Box(x - 5, y - 5, x + 5, y + 5)) + sum(box.overlap(other) for other in others))
    price += 200 * sum(_cuts(line, box) for line in lines)
    if price < limit:  # whose name it is must be seen
        price += 5 * sum(box.grown(6).overlap(other) > 0 for other in others)
        price += 6 * sum(box.overlap(bar) > 0 for bar in avoid)
    if price < limit and own is not None:
        price += 200 * sum(_cuts(own, other) for other in others) + 200 * sum(_cross(own, line) for line in lines)
        price += 6 * sum(_cuts(own, bar) for bar in avoid)
    return price


def _line(point: tuple[float, float], end: tuple[float, float] | None) -> Segment | None:
    """The line from a point to its name, without its first pixels, which lie on the point."""
    if end is None:
        return None
    share = 7 / math.dist(point, end)
    start = (point[0] + (end[0] - point[0]) * share, point[1] + (end[1] - point[1]) * share)
    return start, end


def _cuts(line: Segment, box: Box) -> bool:
    """Whether a line runs through a rectangle: what is left of it within the four sides."""
    (x, y), (end_x, end_y) = line
    dx, dy = end_x - x, end_y - y
    first, last = 0.0, 1.0
    for step, room in ((-dx, x - box.left), (dx, box.right - x), (-dy, y - box.bottom), (dy, box.top - y)):
        if step == 0:
            if room <= 0:
                return False
        elif step < 0:
            first = max(first, room / step)
        else:
            last = min(last, room / step)
    return first < last


def _cross(one: Segment, other: Segment) -> bool:
    """Whether two lines cross: the ends of each are on different sides of the other."""

    def side(line: Segment, point: tuple[float, float]) -> bool:
        (ax, ay), (bx, by) = line
        return (bx - ax) * (point[1] - ay) > (by - ay) * (point[0] - ax)

    return side(one, other[0]) != side(one, other[1]) and side(other, one[0]) != side(other, one[1])

"""A tensor of one shape made fit for another: cut, padded, interpolated, or its rows placed by token.

`adapter` decides from names, types and shapes alone, before any value is read; what it gives computes. Nothing is guessed:
a tensor of another shape stays out unless a way was asked for that fits it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from interfuse.checkpoints.numbers import STORED_FLOATS
from interfuse.checkpoints.source import TensorSpec
from interfuse.errors import OptionError, Problem, nearest

#: crop: of a longer axis the first entries. pad: behind a shorter one zeros. kernels: the spatial axes of a convolution cut
#: or padded with zeros round their centre. positions: a square grid of position embeddings, interpolated. heads: the first
#: heads of attention.
WAYS = ("crop", "pad", "kernels", "positions", "heads")
Adapt = str | Sequence[str] | Mapping[str, str | Sequence[str]]
#: The values of the source and those that the target has -> what it gets.
Make = Callable[[Tensor, Tensor], Tensor]

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
#: Projections to queries, keys and values in one tensor, in thirds.
_FUSED = re.compile(r"(^|[._])(in_proj|qkv|c_attn)([._]|$)")
_MOST_EXTRA = 2  # position embeddings of no place on the grid: class and distillation token


class Adapter(NamedTuple):
    """What is done to a tensor, in words, and the function that does it."""

    how: str
    make: Make


@dataclass(frozen=True)
class Rows:
    """Rows by token: row `target[i]` of each tensor in `names` (the target's) is row `source[i]`; `size` is the target's."""

    names: frozenset[str]
    source: tuple[int, ...]
    target: tuple[int, ...]
    size: int


def check_ways(adapt: Adapt | None, names: Sequence[str]) -> list[Problem]:
    """What is wrong with the option `adapt`: ways that there aren't, patterns that fit none of these names."""
    given = adapt if isinstance(adapt, Mapping) else {"": () if adapt is None else adapt}
    problems = []
    for pattern, ways in given.items():
        path = f"adapt[{pattern!r}]" if pattern else "adapt"
        if not isinstance(ways, str | list | tuple) or not isinstance(pattern, str):
            problems.append(Problem(path, f"got {ways!r}", f"one or several of {', '.join(WAYS)}; or these by pattern"))
            continue
        problems += [Problem(path, f"got {way!r}", nearest(str(way), WAYS)) for way in _tuple(ways) if way not in WAYS]
        if isinstance(adapt, Mapping) and not any(fnmatchcase(name, pattern) for name in names):
            problems.append(Problem(path, "fits no tensor of the target", nearest(pattern, names)))
    return problems


def adapter(name: str, source: TensorSpec, target: TensorSpec, adapt: Adapt | None, rows: Rows | None) -> Adapter | str:
    """How the source's tensor becomes the target's tensor `name`; a text is why it doesn't. `how` is empty for a plain copy.

    A floating-point type of another width is converted by the caller; other types must agree.
    """
    if source.dtype != target.dtype and not (source.dtype in STORED_FLOATS and target.dtype in STORED_FLOATS):
        return f"type {source.dtype} into {target.dtype}"
    if rows is not None and name in rows.names:
        return _by_token(source, target, rows)
    if source.shape == target.shape:
        return Adapter("", lambda value, old: value)
    shapes = f"shape {list(source.shape)} into {list(target.shape)}"
    if len(source.shape) != len(target.shape):
        return shapes
    ways, named = _ways(adapt, name), isinstance(adapt, Mapping)
    if not (named or target.dtype in STORED_FLOATS):
        return f"{shapes}: whole numbers and masks belong to a shape (name it in adapt={{pattern: way}} if these don't)"
    reason = ""
    if "positions" in ways and (named or "pos" in name.lower()):
        found = _positions(source.shape, target.shape)
        if isinstance(found, Adapter):
            return found
        reason = f": {found}"
    axes = _axes(name, source.shape, target.shape, ways, named)
    if axes is not None:
        return axes
    return f"{shapes}{reason or _hint(source.shape, target.shape)}"


def _tuple(ways: str | Sequence[str]) -> tuple[str, ...]:
    return (ways,) if isinstance(ways, str) else tuple(ways)


def _ways(adapt: Adapt | None, name: str) -> tuple[str, ...]:
    if isinstance(adapt, Mapping):
        return next((_tuple(ways) for pattern, ways in adapt.items() if fnmatchcase(name, pattern)), ())
    return _tuple(adapt or ())


def _hint(source: Sequence[int], target: Sequence[int]) -> str:
    """Which ways would do."""
    needed = [way for way in ("crop", "pad") if any((s > t) == (way == "crop") for s, t in _differing(source, target))]
    return f" (adapt={' and '.join(map(repr, needed))} would fit it)"


def _differing(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
    return [(s, t) for s, t in zip(source, target, strict=True) if s != t]


def _by_token(source: TensorSpec, target: TensorSpec, rows: Rows) -> Adapter | str:
    axis = next((i for i, size in enumerate(target.shape) if size != 1), 0)
    rest = [shape[:axis] + shape[axis + 1 :] for shape in (source.shape, target.shape)]
    if len(source.shape) != len(target.shape) or rest[0] != rest[1] or source.shape[axis] <= max(rows.source, default=-1):
        return f"shape {list(source.shape)} into {list(target.shape)}, rows by token"

    def make(value: Tensor, old: Tensor) -> Tensor:
        wide = torch.promote_types(value.dtype, old.dtype)  # the caller rounds once
        chosen = value.index_select(axis, torch.tensor(rows.source, dtype=torch.long)).to(wide)
        return old.to(wide, copy=True).index_copy_(axis, torch.tensor(rows.target, dtype=torch.long), chosen)

    return Adapter(f"rows of {len(rows.target):,} of {rows.size:,} tokens; the others as they were", make)


def _positions(source: tuple[int, ...], target: tuple[int, ...]) -> Adapter | str:
    """Bicubic interpolation (a = -0.75, corners not aligned) of a square grid.

    That is [1, N, D] or [N, D], with extra tokens first, or [1, D, H, W], which may be any rectangle.
    """
    if len(source) == 4:
        if source[:2] != target[:2]:
            return "other channels"
        return Adapter(f"grid {_by(source[2:])} to {_by(target[2:])}", lambda value, old: _resized(value, target[2:]))
    if len(source) not in (2, 3) or source[:-2] != target[:-2] or source[-1] != target[-1]:
        return "only the number of positions may differ"
    s, t = source[-2], target[-2]
    extra = next((p for p in range(_MOST_EXTRA + 1) if _is_square(s - p) and _is_square(t - p)), None)
    if extra is None:
        return "the positions are no square grid"
    sizes = [(math.isqrt(n - extra),) * 2 for n in (s, t)]

    def make(value: Tensor, old: Tensor) -> Tensor:
        flat = value.reshape(s, -1)
        grid = flat[extra:].T.reshape(1, -1, *sizes[0])
        new = _resized(grid, sizes[1]).reshape(-1, t - extra).T
        return torch.cat([flat[:extra].to(new.dtype), new]).reshape(target)

    kept = f", {extra} extra as they are" if extra else ""
    return Adapter(f"positions {_by(sizes[0])} to {_by(sizes[1])}, bicubic{kept}", make)


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _resized(grid: Tensor, size: Sequence[int]) -> Tensor:
    wide = grid if grid.dtype == torch.float64 else grid.float()
    return torch.nn.functional.interpolate(wide, size=tuple(size), mode="bicubic", align_corners=False)


def _axes(name: str, source: tuple[int, ...], target: tuple[int, ...], ways: Sequence[str], named: bool) -> Adapter | None:
    """Each axis that differs cut or padded by a way that was asked for; None where one has no way."""
    moves: list[tuple[int, list[int], list[int]]] = []
    words = []
    fused = _fused_axis(name, source, target)
    for axis, (s, t) in enumerate(zip(source, target, strict=True)):
        if s == t:
            continue
        centred = "kernels" in ways and len(source) > 2 and axis >= 2
        heads = "heads" in ways and s > t and (named or _ATTENTION.search(name) is not None)
        if not (centred or heads or ("crop" if s > t else "pad") in ways):
            return None
        parts = 3 if axis == fused else 1
        moves.append((axis, *_indices(s, t, parts, centred)))
        what = "first heads, " if heads else "centre, " if centred else ""
        words.append(f"axis {axis}: {what}{s} {'cut' if s > t else 'padded with zeros'} to {t}{', by thirds' * (parts > 1)}")

    def make(value: Tensor, old: Tensor) -> Tensor:
        for axis, theirs, ours in moves:
            shape = list(value.shape)
            shape[axis] = target[axis]
            chosen = value.index_select(axis, torch.tensor(theirs))
            value = value.new_zeros(shape).index_copy_(axis, torch.tensor(ours), chosen)
        return value

    return Adapter("; ".join(words), make)


def _fused_axis(name: str, source: Sequence[int], target: Sequence[int]) -> int | None:
    """The axis that holds queries, keys and values behind each other."""
    found = _FUSED.search(name)
    if found is None:
        return None
    axis = 1 if found[2] == "c_attn" and len(source) == 2 else 0
    return axis if source[axis] % 3 == 0 and target[axis] % 3 == 0 else None


def _indices(s: int, t: int, parts: int, centred: bool) -> tuple[list[int], list[int]]:
    """Which entries of an axis of `s` go where on one of `t`, both in so many equal parts."""
    s, t = s // parts, t // parts
    length = min(s, t)
    first, place = ((s - length) // 2, (t - length) // 2) if centred else (0, 0)
    theirs = [part * s + first + i for part in range(parts) for i in range(length)]
    return theirs, [part * t + place + i for part in range(parts) for i in range(length)]


def token_rows(source: Mapping[str, int], target: Mapping[str, int], names: Sequence[str], size: int) -> Rows:
    """The rows of the tokens that both have; raises `OptionError` where they share none."""
    shared = [token for token in target if token in source]
    if not shared:
        raise OptionError(Problem("vocabulary", "the two share no token", "give both as token -> row"))
    places = tuple(target[token] for token in shared)
    return Rows(frozenset(names), tuple(source[token] for token in shared), places, size)

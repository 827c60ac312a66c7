"""What a recipe's parameters say of one tensor: plain values, ramps over depth, filters by name, and which level wins.

A setting is a number, a boolean or a text; a list of them, read over depth; `{filter, value}`; or a list of those, of
which the first that matches wins. What no entry matches falls through to the next level. Nothing here knows a method, so
whether a value is in range is checked elsewhere (`recipe/check.py`). Source: methods.md section 1; the spelling is mergekit's.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from interfuse.errors import Problem, nearest

Scalar = bool | int | float | str
_ENTRY = ("filter", "value")
_FORMS = "a number, true or false, a text, a list of them over depth, {filter, value}, or a list of those"


def plain(value: Any) -> Any:
    """The value with NumPy's scalars and arrays in it as Python's numbers and lists, which is what a file would have."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Rule(NamedTuple):
    """One entry of a setting: the test of a tensor's name (None: every name), and a scalar, or the knots of a ramp."""

    test: Callable[[str], bool] | None
    value: Scalar | tuple[Scalar, ...]


class Scopes:
    """The parameters that hold in one place of a recipe, most specific level first, made ready to be read fast.

    As what no entry matches falls through, the entries of all levels are one chain, which ends where one matches every
    name. That's done once here; reading a value is then a look-up, and a test a filter.
    """

    def __init__(self, *levels: Mapping[str, Any]):
        self._chains: dict[str, tuple[_Rule, ...]] = {}
        for option in dict.fromkeys(option for level in levels for option in level):
            self._chains[option] = tuple(_chain(level[option] for level in levels if option in level))
        conditional = [chain for chain in self._chains.values() if chain[0].test is not None]
        self.tests = tuple(tuple(rule.test for rule in chain) for chain in conditional)

    def entries(self, name: str) -> tuple[int, ...]:
        """Which entry holds for the tensor `name`, for each option that has filters: for the same ones, at one depth, every
        option has the same value."""
        return tuple([_first(tests, name) for tests in self.tests]) if self.tests else ()

    def resolve(self, option: str, name: str, t: float, default: Any = None) -> Any:
        """The option's value for the tensor `name` at depth `t` in [0, 1]; `default` where no level has a word on it."""
        for test, value in self._chains.get(option, ()):
            if test is None or test(name):
                return ramp(value, t) if type(value) is tuple else value
        return default


def _first(tests: tuple[Callable[[str], bool] | None, ...], name: str) -> int:
    """The first test that the name passes, or -1."""
    for i, test in enumerate(tests):
        if test is None or test(name):
            return i
    return -1


def _chain(settings: Iterable[Any]) -> Iterator[_Rule]:
    for setting in settings:
        for entry in _entries(setting):
            pattern = entry.get("filter")
            value = entry["value"]
            yield _Rule(None if pattern is None else matcher(pattern), tuple(value) if isinstance(value, list) else value)
            if pattern is None:
                return  # matches every name: nothing below it is ever read


def _entries(setting: Any) -> list[Mapping[str, Any]]:
    """A setting as the list of `{filter, value}` that it is short for."""
    if isinstance(setting, Mapping):
        return [setting]
    if isinstance(setting, list) and setting and isinstance(setting[0], Mapping):
        return setting
    return [{"value": setting}]


def ramp(knots: tuple[Any, ...], t: float) -> Scalar:
    """The value at `t` in [0, 1] of knots at i/(n-1): piecewise linear between numbers; else the last knot reached.

    >>> ramp((0, 0.5, 1), 0.25)
    0.25
    """
    at = t * (len(knots) - 1)
    left = min(int(at), len(knots) - 1)
    low, high = knots[left], knots[min(left + 1, len(knots) - 1)]
    if isinstance(low, bool | str) or low == high:
        return low
    share = at - left
    return (1 - share) * low + share * high


@functools.lru_cache(maxsize=256)  # so that the same pattern is the same test, wherever it stands
def matcher(pattern: str) -> Callable[[str], bool]:
    """The test of a name: `/regex/` finds it anywhere, with `*` or `?` it's a glob of the whole name, else a substring."""
    if len(pattern) > 1 and pattern.startswith("/") and pattern.endswith("/"):
        found = re.compile(pattern[1:-1]).search
        return lambda name: found(name) is not None
    if "*" in pattern or "?" in pattern:
        whole = re.compile(fnmatch.translate(pattern)).match
        return lambda name: whole(name) is not None
    return lambda name: pattern in name


def pattern_problems(pattern: Any, path: str) -> list[Problem]:
    """What is wrong with a pattern of names."""
    if not isinstance(pattern, str) or not pattern:
        return [Problem(path, f"got {pattern!r}", "a part of a tensor's name, a glob, or /regex/")]
    try:
        matcher(pattern)
    except re.error as error:
        return [Problem(path, f"got {pattern!r}: {error}", "a regular expression between two slashes")]
    return []


def setting_problems(setting: Any, path: str) -> list[Problem]:
    """What is wrong with the form of a setting, each problem with its path."""
    problems: list[Problem] = []
    several = isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting)
    entries = list(enumerate(setting)) if several else [(None, setting)]
    catch_all: int | None = None
    for i, entry in entries:
        where = path if i is None else f"{path}[{i}]"
        if not isinstance(entry, Mapping):
            said = "an entry is {filter, value}; one without a filter matches all" if several else _FORMS
            problems += [Problem(where, f"got {entry!r}", said)] if several else _value_problems(entry, where)
            continue
        problems += _entry_problems(entry, where)
        if catch_all is not None:
            problems.append(Problem(where, f"is never reached: {path}[{catch_all}] matches every tensor", "move it up"))
        elif entry.get("filter") is None and i is not None:
            catch_all = i
    return problems


def _entry_problems(entry: Mapping[str, Any], path: str) -> list[Problem]:
    problems = [Problem(f"{path}.{key}", "unknown key", nearest(str(key), _ENTRY)) for key in entry if key not in _ENTRY]
    if entry.get("filter") is not None:
        problems += pattern_problems(entry["filter"], f"{path}.filter")
    if "value" not in entry:
        return [*problems, Problem(f"{path}.value", "missing", "give a value, or a list over depth")]
    return problems + _value_problems(entry["value"], f"{path}.value")


def _value_problems(value: Any, path: str) -> list[Problem]:
    if not isinstance(value, list):
        return [] if _is_scalar(value) else [Problem(path, f"got {value!r}", _FORMS)]
    if not value:
        return [Problem(path, "got []", "a list over depth has at least one value")]
    wrong = [Problem(f"{path}[{i}]", f"got {knot!r}", _FORMS) for i, knot in enumerate(value) if not _is_scalar(knot)]
    kinds = dict.fromkeys(_kind(knot) for knot in value)
    if not wrong and len(kinds) > 1:
        wrong = [Problem(path, f"got {value!r}", f"values of one kind, not {' and '.join(kinds)}")]
    return wrong


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | str) or (isinstance(value, int | float) and math.isfinite(value))


def _kind(value: Scalar) -> str:
    return "booleans" if isinstance(value, bool) else "texts" if isinstance(value, str) else "numbers"


def filters(setting: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every filter in a setting of sound form: its path and the pattern."""
    several = isinstance(setting, list)
    for i, entry in enumerate(_entries(setting)):
        if entry.get("filter") is not None:
            yield f"{path}[{i}].filter" if several else f"{path}.filter", entry["filter"]


def scalars(setting: Any, path: str) -> Iterator[tuple[str, Scalar, bool]]:
    """Every scalar in a setting of sound form: its path, the value, and whether it's a knot of a ramp of numbers."""
    several = isinstance(setting, list) and bool(setting) and isinstance(setting[0], Mapping)
    for i, entry in enumerate(_entries(setting)):
        where = f"{path}[{i}].value" if several else f"{path}.value" if isinstance(setting, Mapping) else path
        value = entry["value"]
        if isinstance(value, list):
            for j, knot in enumerate(value):
                yield f"{where}[{j}]", knot, _kind(knot) == "numbers" and len(value) > 1
        else:
            yield where, value, False

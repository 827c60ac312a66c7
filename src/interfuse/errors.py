"""Every error that interfuse raises on purpose, and how its message is built.

    InterfuseError
    ├── UserError                 the user's mistake: the command line exits with 2
    │   ├── RecipeError           a recipe: carries every problem found, not just the first
    │   ├── ModelError            a model, tap, head or input that can't be fused as asked
    │   ├── CheckpointError       a file of weights that is missing, damaged or doesn't fit
    │   ├── DataError             a data set that can't be read or doesn't fit the model
    │   └── OptionError           an option of a function or command that is out of range or unknown
    └── MissingExtra              an optional library isn't installed (also an ImportError)

A problem names the place, what is wrong there (with the value got), and what is allowed or how to get out. This module
isn't a place for validation: who knows the rule raises the error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong: where (`models[1].tap`), what (with the value), and what is allowed or the way out."""

    path: str
    wrong: str
    allowed: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.wrong}" if self.path else self.wrong
        return f"{text}; {self.allowed}" if self.allowed else text


class InterfuseError(Exception):
    """The root of the tree above."""


class UserError(InterfuseError, ValueError):
    """The user's mistake. `problems` holds everything that was found wrong; `str(error)` is one problem a line."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem("", p) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


class RecipeError(UserError):
    """A recipe that can't be run; every problem at once."""


class ModelError(UserError):
    """A model, tap, head or input that can't be fused as asked."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or doesn't fit the others."""


class DataError(UserError):
    """A data set that can't be read, or doesn't fit the model."""


class OptionError(UserError):
    """An option that is unknown, of the wrong type, or out of range."""


class MissingExtra(InterfuseError, ImportError):
    """An optional library isn't installed; the message is the line that installs it."""


def nearest(name: str, allowed: Iterable[str], most: int = 5) -> str:
    """What to offer for a name that doesn't exist: the nearest names, or all of them where none is near.

    >>> nearest("atention", ["attention", "gate"])
    "did you mean 'attention'?"
    >>> nearest("zzz", ["attention", "gate"])
    'allowed: attention, gate'
    """
    names = list(dict.fromkeys(allowed))
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.6)
    close = close or [known for known in names if name and (known.startswith(name) or name.startswith(known))][:most]
    if close:
        return f"did you mean {_either(close)}?"
    shown = ", ".join(names[:20]) or "none"
    return f"allowed: {shown}{', ...' if len(names) > 20 else ''}"


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" or {quoted[-1]}"

"""Names that differ by what stands before them: `model.layers.0.w` in one file is `layers.0.w` in another.

Not a map between architectures: one prefix is added or taken away, for all names that aren't there as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from interfuse.errors import CheckpointError, Problem


def align(wanted: Iterable[str], present: Iterable[str], path: str = "") -> dict[str, str]:
    """`{wanted: present}` for the names that are there, as they are or by the one change of prefix that finds most.

    Names that aren't there are left out. Two changes that find equally many are a `CheckpointError`.
    """
    there = dict.fromkeys(present)
    wanted = list(dict.fromkeys(wanted))
    found = {name: name for name in wanted if name in there}
    missing = [name for name in wanted if name not in found]
    if not missing:
        return found
    changes = _changes(missing, there)
    if not changes:
        return found
    most = max(len(names) for names in changes.values())
    best = [change for change, names in changes.items() if len(names) == most]
    if len(best) > 1:
        said = " or ".join(_said(*change) for change in best)
        raise CheckpointError(Problem(path, f"{missing[0]!r} isn't there, and {said} finds {most} tensors each", "rename them"))
    found |= changes[best[0]]
    return {name: found[name] for name in wanted if name in found}


def _changes(missing: list[str], there: Mapping[str, None]) -> dict[tuple[str, str], dict[str, str]]:
    """What each change of prefix, (taken away, added), finds of the missing names."""
    ending: dict[str, list[str]] = {}
    for name in there:
        for at in _dots(name):
            ending.setdefault(name[at:], []).append(name[:at])
    changes: dict[tuple[str, str], dict[str, str]] = {}
    for name in missing:
        for added in ending.get(name, ()):
            changes.setdefault(("", added), {})[name] = added + name
        for at in _dots(name):
            if name[at:] in there:
                changes.setdefault((name[:at], ""), {})[name] = name[at:]
    return changes


def _dots(name: str) -> list[int]:
    """Where the parts of a name begin, after the first."""
    return [at + 1 for at, letter in enumerate(name) if letter == "."]


def _said(taken: str, added: str) -> str:
    return f"adding {added!r}" if added else f"taking {taken!r} away"

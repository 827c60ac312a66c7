"""One network, names that differ by a prefix: what data-parallel training, compilers and task heads put before them all.

Only a constant prefix is resolved: of whole models (`match_names`, which says what it did), and for a few tensors of one
(`align`). Renamed parts aren't guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from interfuse.errors import CheckpointError, Problem

_WRAPPERS = ("module.", "model.", "_orig_mod.")
_SHOWN = 5  # names that a message lists of many


def match_names(reference: Collection[str], names: Collection[str]) -> tuple[dict[str, str], str]:
    """(the reference's name of each tensor -> its name here, in the order here; what was done to match them, or nothing).

    A name that the reference lacks stands for itself.
    """
    known = reference if isinstance(reference, dict) else dict.fromkeys(reference)
    best, note = {name: name for name in names}, ""
    shared = len(best.keys() & known.keys())
    if 2 * shared > min(len(best), len(known)):  # most names agree: a prefix could only match fewer
        return best, ""
    for theirs, ours in _prefixes(known, best):
        moved = {
            name if name in known else ours + name[len(theirs) :] if name.startswith(theirs) else name: name for name in names
        }
        here = len(moved.keys() & known.keys())
        if len(moved) == len(best) and here > shared:
            best, note, shared = moved, _moved(theirs, ours), here
    return best, note


def align(wanted: Iterable[str], present: Iterable[str], path: str = "") -> dict[str, str]:
    """`{wanted: present}` for the names that are there, as they are or by the one change of prefix that finds most.

    Names that aren't there are left out. Two changes that find equally many are a `CheckpointError`.
    """
    there = dict.fromkeys(present)
    wanted = list(dict.fromkeys(wanted))
    found = {name: name for name in wanted if name in there}
    missing = [name for name in wanted if name not in found]
    ours, theirs = (_endings(there), _endings(missing)) if missing else ({}, {})
    changes: dict[str, dict[str, str]] = {}
    for name in missing:
        for prefix in ours.get(name, ()):
            changes.setdefault(f"adding {prefix!r}", {})[name] = prefix + name
    for name in there:
        for prefix in theirs.get(name, ()):
            changes.setdefault(f"taking {prefix!r} away", {})[prefix + name] = name
    most = max(map(len, changes.values()), default=0)
    best = [change for change, names in changes.items() if len(names) == most]
    if len(best) > 1:
        wrong = f"{missing[0]!r} isn't there, and {' or '.join(best)} finds {most} tensors each"
        raise CheckpointError(Problem(path, wrong, "rename them"))
    found |= changes[best[0]] if best else {}
    return {name: found[name] for name in wanted if name in found}


def listed(names: Sequence[str], what: str) -> list[str]:
    """One line a tensor, or one line for all of many: `tensor 'a' is missing`."""
    if len(names) <= _SHOWN:
        return [f"tensor {name!r} is {what}" for name in names]
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return [f"{len(names)} tensors are {what}: {shown} and {len(names) - _SHOWN} more"]


def _moved(theirs: str, ours: str) -> str:
    if not ours:
        return f"the prefix {theirs!r} of its names is left out"
    if not theirs:
        return f"its names are read with the prefix {ours!r}"
    return f"the prefix {theirs!r} of its names is read as {ours!r}"


def _prefixes(reference: Collection[str], names: Collection[str]) -> list[tuple[str, str]]:
    """(theirs, ours) to try: wrappers round all names, then the prefix that most names have on one side alone."""
    votes: Counter[tuple[str, str]] = Counter()
    ours, theirs = _endings(reference), _endings(names)
    for name in names:
        votes.update(("", prefix) for prefix in ours.get(name, ()))
    for name in reference:
        votes.update((prefix, "") for prefix in theirs.get(name, ()))
    return [(_wrapper(names), _wrapper(reference)), *(pair for pair, _ in votes.most_common(1))]


def _endings(names: Iterable[str]) -> dict[str, list[str]]:
    """What names end in, from a dot on -> the prefixes before it."""
    found: dict[str, list[str]] = {}
    for name in names:
        for dot in (i for i, letter in enumerate(name) if letter == "."):
            found.setdefault(name[dot + 1 :], []).append(name[: dot + 1])
    return found


def _wrapper(names: Collection[str]) -> str:
    """The longest run of wrappers that every name begins with."""
    prefix = ""
    while True:
        for wrapper in _WRAPPERS:
            if names and all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            return prefix

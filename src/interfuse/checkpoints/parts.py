"""Which tensors a named part of a network has: `encoder`, `vision_tower`, `text_decoder`, or any prefix of its names, a sub-folder (`unet/`) among them.

Read off the names; there is no list of architectures. Three names also stand for what a part does, as in mergekit's
recipes: `vision_tower`, `multi_modal_projector` and `text_decoder`, which is everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from interfuse.errors import Problem, nearest

Test = Callable[[str], bool]

_PROJECTOR = ("projector", "merger", "mm_proj", "connector")
_VISION = ("vision", "visual", "image", "vit")


def find_parts(parts: Iterable[str], names: Collection[str]) -> tuple[dict[str, Test], list[Problem]]:
    """For each part the test whether a tensor is in it, and the parts that aren't there or share a tensor."""
    parts = list(parts)
    if not parts:
        return {}, []
    tests: dict[str, Test] = {}
    problems: list[Problem] = []
    prefixes = _prefixes(names)
    for part in parts:
        test = _test(part, prefixes, names)
        if part != "default" and not any(map(test, names)):
            problems.append(Problem(f"modules.{part}", "no tensor is in it", nearest(part, [*prefixes, *_ROLES])))
        tests[part] = test
    if "default" in tests:
        others = [test for part, test in tests.items() if part != "default"]
        tests["default"] = lambda name: not any(test(name) for test in others)
    for name in names:
        within = [part for part, test in tests.items() if test(name)]
        if len(within) > 1:
            problems.append(Problem(f"modules.{within[1]}", f"{name!r} is in {within[0]} too", "parts that share no tensor"))
            break
    return tests, problems


def _test(part: str, prefixes: Collection[str], names: Collection[str]) -> Test:
    part = _dotted(part.rstrip("/"))
    inner = [prefix for prefix in prefixes if prefix == part or prefix.endswith(f".{part}")]
    outermost = [prefix for prefix in inner if not any(prefix.startswith(f"{other}.") for other in inner)]
    if part in prefixes or any(_dotted(name).startswith(f"{part}.") for name in names):  # `layers.3`: numbers are in no prefix
        outermost = [part]
    if outermost:
        heads = tuple(f"{prefix}." for prefix in outermost)
        return lambda name: _dotted(name).startswith(heads)
    wanted = _ROLES.get(part)
    return lambda name: wanted is not None and _role(name) == wanted


_ROLES = {"vision_tower": "vision", "multi_modal_projector": "projector", "text_decoder": "text"}


def _role(name: str) -> str:
    words = name.lower().split(".")
    if any(piece in word for word in words for piece in _PROJECTOR):
        return "projector"
    return "vision" if any(piece in word for word in words for piece in _VISION) else "text"


def _dotted(name: str) -> str:
    """A name in which a sub-folder is a part like any other."""
    return name.replace("/", ".")


def _prefixes(names: Iterable[str]) -> dict[str, None]:
    """Every run of whole parts that a name begins with, as far as its first number."""
    found: dict[str, None] = {}
    for name in map(_dotted, names):
        at = name.find(".")
        while at >= 0 and not name[name.rfind(".", 0, at) + 1 : at].isdigit():
            found[name[:at]] = None
            at = name.find(".", at + 1)
    return found

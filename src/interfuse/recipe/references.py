"""Which model a recipe means: a path or hub id, its revision, and an adapter on top; as text or as a mapping.

`path`, `hub/id`, `id@revision`, `https://...`, `model+lora`, `model@revision+lora@revision`, or `{model: {path, revision},
lora: {path, revision}}`; `path#task` is a task of a merge that has an output for each. What is on disk comes first: a path
that exists is that path, whatever is in its name. Not a downloader, and nothing here looks into a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interfuse.checkpoints.tasks import split_task
from interfuse.errors import Problem, RecipeError, nearest

_FORMS = "allowed: a path or hub id, id@revision, model+lora, or {model: {path, revision}, lora: {path, revision}}"
_KEYS = ("model", "lora")
_PART = ("path", "revision")


@dataclass(frozen=True)
class Reference:
    """A model: `path` (or hub id, or `python:` function), its `revision`, and a LoRA adapter to be added to it."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        model = _joined(self.path, self.revision)
        return model if self.lora is None else f"{model}+{_joined(self.lora, self.lora_revision)}"

    @classmethod
    def parse(cls, value: Any, folder: Path | None = None) -> Reference:
        """The reference in a text or mapping, its paths read from `folder` (left out: the current one) and kept as written.

        What isn't a reference is a `RecipeError` without a path.
        """
        if isinstance(value, Reference):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(value, folder)
        if not isinstance(value, str) or not value:
            raise RecipeError(Problem("", f"got {value!r}", _FORMS))
        if value.startswith("python:") or _exists(value, folder):
            return cls(value)
        model, lora = _split(value, "+", folder)
        path, revision = _split(model, "@", folder)
        lora_path, lora_revision = _split(lora, "@", folder) if lora is not None else (None, None)
        if not path or revision == "" or lora_path == "" or lora_revision == "":
            raise RecipeError(Problem("", f"got {value!r}", _FORMS))
        return cls(path, revision, lora_path, lora_revision)

    def absolute(self, folder: Path) -> Reference:
        """The reference with what is in `folder`, or can only be a path, made an absolute path."""
        lora = None if self.lora is None else place(self.lora, folder)
        return Reference(place(self.path, folder), self.revision, lora, self.lora_revision)


def place(ref: str, folder: Path, always: bool = False) -> str:
    """A path made absolute if it is there, or can only be a path (or `always`); a hub id and `python:` as they are."""
    if ref.startswith("python:"):
        return ref
    task = split_task(folder / Path(ref).expanduser())
    if task is not None:
        return f"{task[0].resolve()}#{task[1]}"
    path = folder / Path(ref).expanduser()
    return str(path.resolve()) if always or path.exists() or ref.startswith((".", "/", "~")) else ref


def _joined(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


def _exists(ref: str, folder: Path | None) -> bool:
    try:
        path = (folder or Path()) / Path(ref).expanduser()
        return path.exists() or split_task(path) is not None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, or a null character: not a path here
        return False


def _split(text: str, sign: str, folder: Path | None) -> tuple[str, str | None]:
    """The text before and after the sign that parts it; a sign within a path that exists, or an @ in a URL, parts nothing."""
    places = [i for i, letter in enumerate(text) if letter == sign]
    if not places or _exists(text, folder) or (sign == "@" and "://" in text):
        return text, None
    for at in reversed(places):
        if _exists(text[:at], folder):
            return text[:at], text[at + 1 :]
    for at in places:
        if _exists(text[at + 1 :], folder):
            return text[:at], text[at + 1 :]
    if len(places) > 1:
        raise RecipeError(Problem("", f"got {text!r} with {len(places)} {sign!r}, and no such path", _FORMS))
    return text[: places[0]], text[places[0] + 1 :]


def _from_mapping(value: Mapping[str, Any], folder: Path | None) -> Reference:
    if "path" in value:
        value = {"model": value}
    problems = [Problem(str(key), "unknown key", nearest(str(key), _KEYS)) for key in value if key not in _KEYS]
    if "model" not in value:
        problems.append(Problem("model", "missing", _FORMS))
    parts: list[tuple[str | None, str | None]] = []
    for key in _KEYS:
        try:
            parts.append(_part(value.get(key), key, folder))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    (path, revision), (lora, lora_revision) = parts
    return Reference(path or "", revision, lora, lora_revision)


def _part(part: Any, key: str, folder: Path | None) -> tuple[str | None, str | None]:
    """The path and the revision of the model, or of the adapter, of a reference in mapping form."""
    if part is None:
        return None, None
    if isinstance(part, str) and part:
        return (part, None) if part.startswith("python:") else _split(part, "@", folder)
    if not isinstance(part, Mapping):
        raise RecipeError(Problem(key, f"got {part!r}", "a path or hub id, or {path, revision}"))
    problems = [Problem(f"{key}.{k}", "unknown key", nearest(str(k), _PART)) for k in part if k not in _PART]
    path, revision = part.get("path"), part.get("revision")
    if not isinstance(path, str) or not path:
        problems.append(Problem(f"{key}.path", f"got {path!r}", "a path or hub id"))
    if not (revision is None or (isinstance(revision, str) and revision)):
        problems.append(Problem(f"{key}.revision", f"got {revision!r}", "a branch, tag or commit, in quotes if it's a number"))
    if problems:
        raise RecipeError(*problems)
    return path, revision

"""References to models: every spelling, what is on disk first, and what isn't one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interfuse.errors import RecipeError
from interfuse.recipe.references import Reference


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("org/model", Reference("org/model")),
        ("./base", Reference("./base")),
        ("org/model@v1", Reference("org/model", "v1")),
        ("org/model+org/lora", Reference("org/model", None, "org/lora")),
        ("org/model@v1+org/lora@v2", Reference("org/model", "v1", "org/lora", "v2")),
        ("org/model+org/lora@v2", Reference("org/model", None, "org/lora", "v2")),
        ("python:net:build", Reference("python:net:build")),
        ({"model": {"path": "a", "revision": "v1"}}, Reference("a", "v1")),
        ({"model": "a@v1", "lora": "b"}, Reference("a", "v1", "b")),
        ({"model": {"path": "a"}, "lora": {"path": "b", "revision": "v2"}}, Reference("a", None, "b", "v2")),
        ({"path": "a", "revision": "v1"}, Reference("a", "v1")),
    ],
)
def test_every_spelling_is_read(value: Any, reference: Reference) -> None:
    assert Reference.parse(value) == reference
    assert Reference.parse(str(reference)) == reference


def test_a_path_that_exists_may_have_any_name(tmp_path: Path) -> None:
    for name in ("a+b", "c@d", "e@f+g@h"):
        (tmp_path / name).mkdir()
        assert Reference.parse(name, tmp_path) == Reference(name)
        assert Reference.parse(str(tmp_path / name)) == Reference(str(tmp_path / name))
    assert Reference.parse("a+b+c@d", tmp_path) == Reference("a+b", None, "c@d")
    assert Reference.parse("org/x+a+b", tmp_path) == Reference("org/x", None, "a+b")
    assert Reference.parse("c@d@v1", tmp_path) == Reference("c@d", "v1")
    assert Reference.parse({"model": "c@d", "lora": "a+b"}, tmp_path) == Reference("c@d", None, "a+b")


def test_relative_paths_are_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    reference = Reference.parse("./base@v1+lora", tmp_path).absolute(tmp_path)
    assert reference == Reference(str(tmp_path / "base"), "v1", str(tmp_path / "lora"))
    assert Reference("org/x", None, "org/y").absolute(tmp_path) == Reference("org/x", None, "org/y")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", r"got ''; allowed: a path or hub id"),
        (5, r"got 5; allowed"),
        ("a+b+c", r"got 'a\+b\+c' with 2 '\+'"),
        ("a@b@c", r"got 'a@b@c' with 2 '@'"),
        ("a@", r"got 'a@'"),
        ("a+", r"got 'a\+'"),
        ("+b", r"got '\+b'"),
        ({"lora": "b"}, r"model: missing"),
        ({"model": "a", "lorra": "b"}, r"lorra: unknown key; did you mean 'lora'\?"),
        ({"model": {"path": "a", "revison": "b"}}, r"model\.revison: unknown key; did you mean 'revision'\?"),
        ({"model": {"path": 3}}, r"model\.path: got 3"),
        ({"model": {"path": "a", "revision": 4}}, r"model\.revision: got 4"),
        ({"model": "a", "lora": ["b"]}, r"lora: got \['b'\]"),
    ],
)
def test_what_is_not_a_reference(value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Reference.parse(value)

"""A recipe file, or a mapping, into a `Recipe`; every problem at once, each with its path.

YAML by PyYAML's safe loader, with three differences: `1e-5` is a number, a key written twice is an error, and a syntax
error names its line and column. Relative paths are read from the recipe file's folder, and only from there (for a
mapping: from the current folder). What holds between keys is checked in `recipe/check.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from interfuse.errors import Problem, RecipeError, nearest
from interfuse.recipe.check import form_problems, run_problems
from interfuse.recipe.schema import SECTIONS, Recipe
from interfuse.registry import rule

#: Keys of mergekit's recipes that this version doesn't know: what each is.
_NOT_YET = {
    "slices": "stacking layers (slices)",
    "modules": "addressing sub-networks (modules)",
    "tokenizer": "building a tokenizer",
    "tokenizer_source": "choosing a tokenizer",
    "chat_template": "setting a chat template",
}


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """The recipe in a YAML file or a mapping, its paths made absolute; `RecipeError` with every problem of its form."""
    recipe, problems = _read(source)
    return _or_raise(recipe, _joined(problems, form_problems(recipe)))


def check_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    trust_code: bool = False,
    also: Callable[[Recipe], list[Problem]] = lambda recipe: [],
) -> Recipe:
    """`load_recipe`, and the files that a run reads: what is missing, and code that isn't trusted, are problems too.

    `also` finds further problems of a recipe whose form may be faulty elsewhere.
    """
    recipe, problems = (source, []) if isinstance(source, Recipe) else _read(source)
    problems = _joined(problems, form_problems(recipe))
    problems = _joined(problems, run_problems(recipe, trust_code=trust_code))
    problems = _joined(problems, also(recipe))
    return _or_raise(recipe, problems)


def _or_raise(recipe: Recipe, problems: list[Problem]) -> Recipe:
    if problems:
        raise RecipeError(*problems)
    return recipe


def _joined(first: list[Problem], then: list[Problem]) -> list[Problem]:
    """`first`, and of `then` what isn't at, above or below a place that already has a problem."""
    taken = [p.path for p in first]
    taken += ["models"] if any(path in ("slices", "modules") for path in taken) else []  # mergekit's other ways to name them
    return first + [p for p in then if not any(_related(p.path, path) for path in taken)]


def _related(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return long == short or long.startswith((short + ".", short + "["))


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Recipe, list[Problem]]:
    """The recipe as far as it can be read (its faulty values left out), and the problems of its form."""
    if isinstance(source, Mapping):
        raw, folder = copy.deepcopy(dict(source)), Path.cwd()
    else:
        raw, folder = _parse(Path(source)), Path(source).resolve().parent
    problems: list[Problem] | None = None
    while True:  # each round takes something away, and an empty recipe is valid
        try:
            return _absolute(Recipe.model_validate(raw), folder), problems or []
        except ValidationError as error:
            problems = _problems(error) if problems is None else problems
            for item in error.errors():
                _drop(raw, item["loc"], missing=item["type"] == "missing")


#: Stands for a model that can't be read, so that the others keep their numbers. What is found wrong with it isn't said.
_UNREADABLE = "?"


def _drop(raw: dict[str, Any], loc: tuple[int | str, ...], missing: bool) -> None:
    """Take the faulty value away: a model in whole where its reference is at fault, else the key, else its section."""
    models, key = raw.get("models"), str(loc[0])
    if key == "models" and isinstance(models, list) and len(loc) > 1:
        entry = models[int(loc[1])]
        if isinstance(entry, dict) and len(loc) > 2 and loc[2] != "model":
            entry.pop(loc[2], None)
        else:
            models[int(loc[1])] = _UNREADABLE
    elif isinstance(raw.get(key), dict) and len(loc) > 1 and not missing:
        raw[key].pop(loc[1], None)
    else:
        raw.pop(key, None)


def _problems(error: ValidationError) -> list[Problem]:
    problems = []
    for item in error.errors():
        loc = item["loc"]
        path = ""
        for part in loc:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        if item["type"] == "extra_forbidden":
            problems.append(_unknown(path, loc))
        elif item["type"] == "missing":
            problems.append(Problem(path, "missing", "give a value"))
        elif loc[-1] == "model" and isinstance(item["input"], dict):
            problems.append(Problem(path, "a mapping isn't supported by this version", "write the path or hub id"))
        else:
            problems.append(Problem(path, f"got {item['input']!r}", rule(item)))
    return problems


def _unknown(path: str, loc: tuple[int | str, ...]) -> Problem:
    key = str(loc[-1])
    if len(loc) == 1 and key in _NOT_YET:
        return Problem(path, f"{_NOT_YET[key]} isn't supported by this version", "remove the key")
    section = SECTIONS.get(str(loc[0]), Recipe) if len(loc) > 1 else Recipe
    return Problem(path, "unknown key", nearest(key, section.model_fields))


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every path made absolute, so that it means the same from any folder."""

    def place(ref: str | None, always: bool = False) -> str | None:
        if ref is None or ref.startswith("python:"):
            return ref
        path = folder / Path(ref).expanduser()
        here = always or path.exists() or ref.startswith((".", "/", "~"))
        return str(path.resolve()) if here else ref

    models = [
        entry.model_copy(update={"model": place(entry.model), "weights": place(entry.weights, always=True)})
        for entry in recipe.models
    ]
    changes: dict[str, Any] = {"models": models, "base_model": place(recipe.base_model)}
    if recipe.data is not None:
        data = recipe.data
        validation = place(data.validation) if isinstance(data.validation, str) else data.validation
        changes["data"] = data.model_copy(
            update={"train": place(data.train), "validation": validation, "test": place(data.test)}
        )
    return recipe.model_copy(update=changes)


class _Loader(yaml.SafeLoader):
    """The safe loader with the differences that the module's docstring lists."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    first = seen[key.value].line + 1
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is written twice (first in line {first})", key.start_mark
                    )
                seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str | bytes) -> Any:
    """What a text in YAML holds, read as recipes are; raises yaml's own errors."""
    return yaml.load(text, Loader=_Loader)


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path.read_bytes())
    except OSError as error:
        raise RecipeError(Problem(str(path), f"the recipe can't be read ({error.strerror})")) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(Problem(str(path), f"{where}{error.problem}")) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = (str(error) or "nested too deep").partition("\n")[0]
        raise RecipeError(Problem(str(path), f"not YAML: {first}")) from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(Problem(str(path), f"holds {found}", "a recipe is a mapping, such as `fusion: attention`"))
    return raw

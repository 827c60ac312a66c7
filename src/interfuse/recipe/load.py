"""A recipe file, or a mapping, into a `Recipe`; every problem at once, each with its path.

YAML by PyYAML's safe loader, with three differences: `1e-5` is a number, a key written twice is an error, and a syntax
error names its line and column. Relative paths are read from the recipe file's folder, and only from there (for a
mapping: from the current folder). What holds between keys is checked in `recipe/check.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from interfuse.errors import Problem, RecipeError, nearest
from interfuse.recipe.chain import UNREADABLE, absolute, chain_problems
from interfuse.recipe.check import form_problems, names_of, run_problems
from interfuse.recipe.reads import settled
from interfuse.recipe.schema import SECTIONS, Recipe
from interfuse.recipe.sections import Section
from interfuse.recipe.values import plain
from interfuse.registry import rule

#: A recipe, what is wrong with it so far, and the names of earlier recipes -> what else is.
Beside = Callable[[Recipe, Sequence[Problem], Sequence[str]], list[Problem]]


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """The recipe in a YAML file or a mapping, its paths made absolute; `RecipeError` with every problem of its form.

    A file of several recipes is an error here: `load_recipes` reads it.
    """
    return _only(source, load_recipes(source))


def load_recipes(source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Recipe, ...]:
    """The recipes in a YAML file (documents parted by `---`), or one mapping, or several.

    The last one's result is the output. Those before it have a `name`, by which later ones refer to their results.
    """
    return _checked(source)


def check_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    trust_code: bool = False,
    also: Callable[[Recipe], list[Problem]] = lambda recipe: [],
) -> Recipe:
    """`load_recipe`, and the files that a run reads: what is missing, and code that isn't trusted, are problems too.

    `also` finds further problems of a recipe whose form may be faulty elsewhere.
    """
    return _only(source, check_recipes(source, trust_code=trust_code, also=also))


def check_recipes(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe,
    *,
    trust_code: bool = False,
    also: Callable[[Recipe], list[Problem]] = lambda recipe: [],
    beside: Beside = lambda recipe, found, known: [],
) -> tuple[Recipe, ...]:
    """`load_recipes`, and the files that a run reads, as in `check_recipe`.

    `beside` finds what would be found later, were there no problem: it's asked only where there is one, with these and the
    names of earlier recipes.
    """

    def further(recipe: Recipe) -> list[Problem]:
        return _joined(run_problems(recipe, trust_code=trust_code), also(recipe))

    return _checked(source, further, beside)


def _only(source: Any, recipes: tuple[Recipe, ...]) -> Recipe:
    if len(recipes) > 1:
        wrong = f"holds {len(recipes)} recipes, of which later ones use earlier ones"
        raise RecipeError(Problem(str(source) if isinstance(source, str | Path) else "", wrong, "give one recipe"))
    return recipes[0]


def _checked(
    source: Any,
    further: Callable[[Recipe], list[Problem]] = lambda recipe: [],
    beside: Beside = lambda recipe, found, known: [],
) -> tuple[Recipe, ...]:
    """The recipes, or a `RecipeError` with the problems of all."""
    if isinstance(source, Recipe):
        raw: list[Any] = [source]
        folder = Path.cwd()
    elif isinstance(source, str | Path):
        raw, folder = parse_recipes(Path(source)), Path(source).resolve().parent
    else:
        raw, folder = [plain(dict(one)) for one in ([source] if isinstance(source, Mapping) else source)], Path.cwd()
    recipes: list[Recipe] = []
    problems: list[Problem] = []
    for i, document in enumerate(raw):
        known = [recipe.name for recipe in recipes if recipe.name is not None]
        recipe, found = (document, []) if isinstance(document, Recipe) else _read(dict(document), folder, known)
        found = _joined(found, form_problems(recipe))
        found = _joined(found, further(recipe))
        found = _joined(found, beside(recipe, found, known)) if found else []
        inside = f"documents[{i}]." if len(raw) > 1 else ""
        problems += [Problem(f"{inside}{p.path}".rstrip("."), p.wrong, p.allowed) for p in found]
        recipes.append(recipe)
    if len(recipes) > 1:
        problems = _joined(problems, chain_problems(recipes))
    if problems:
        raise RecipeError(*problems)
    return tuple(settled(recipe, names_of(recipe)) for recipe in recipes)


def _joined(first: list[Problem], then: list[Problem]) -> list[Problem]:
    """`first`, and of `then` what isn't at, above or below a place that already has a problem."""
    taken = [p.path for p in first]
    taken += ["models"] if any(path.startswith(("slices", "modules")) for path in taken) else []  # other ways to name them
    return first + [p for p in then if not any(_related(p.path, path) for path in taken)]


def _related(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    return long == short or long.startswith((short + ".", short + "["))


def _read(raw: dict[Any, Any], folder: Path, known: Sequence[str]) -> tuple[Recipe, list[Problem]]:
    """The recipe as far as it can be read (its faulty values left out), and the problems of its form."""
    problems: list[Problem] | None = None
    while True:  # each round takes something away, and an empty recipe is valid
        try:
            recipe, wrong = absolute(Recipe.model_validate(raw), folder, known)
        except ValidationError as error:
            problems = _problems(error) if problems is None else problems
            for item in error.errors():
                if item["type"] == "extra_forbidden" and _meant(raw, item["loc"]):
                    continue
                if item["type"] != "extra_forbidden" or not _dropped(raw, item["loc"]):
                    _drop(raw, item["loc"], missing=item["type"] == "missing")
        else:
            return recipe, [*(problems or []), *wrong]


def _meant(raw: dict[Any, Any], loc: tuple[int | str, ...]) -> bool:
    """Give a misspelt `merge_method` or `fusion` its name, without which all else would look wrong; whether it's one."""
    known = ("merge_method", "fusion")
    near = difflib.get_close_matches(str(loc[0]), known, n=1) if len(loc) == 1 and not {*known} & {*raw} else []
    if near:
        raw[near[0]] = raw.pop(loc[0])
    return bool(near)


def _dropped(raw: Any, loc: tuple[int | str, ...]) -> bool:
    """Take a key away that isn't known, and nothing with it; whether it was found."""
    for part in loc[:-1]:
        known = part in raw if isinstance(raw, dict) else isinstance(raw, list) and type(part) is int and part < len(raw)
        if not known:
            return False
        raw = raw[part]
    return isinstance(raw, dict) and raw.pop(loc[-1], None) is not None


def _drop(raw: dict[Any, Any], loc: tuple[int | str, ...], missing: bool) -> None:
    """Take the faulty value away: a model in whole where its reference is at fault, else the key, else its section or stage."""
    models, key = raw.get("models"), str(loc[0])
    if key == "models" and isinstance(models, list) and len(loc) > 1:
        entry = models[int(loc[1])]
        if isinstance(entry, dict) and len(loc) > 2 and loc[2] != "model":
            _ = _dropped(raw, loc) or entry.pop(loc[2], None)
        else:
            models[int(loc[1])] = UNREADABLE
    elif key == "stages" and _in_stage(raw.get(key), loc):
        _ = _dropped(raw, loc) or raw[key][int(loc[1])].pop(loc[2])
    elif key not in ("slices", "modules") and isinstance(raw.get(key), dict) and len(loc) > 1 and not missing:
        raw[key].pop(loc[1], None)
    else:
        raw.pop(loc[0], None)


def _in_stage(stages: Any, loc: tuple[int | str, ...]) -> bool:
    """Whether a key of one stage is at fault."""
    return isinstance(stages, list) and len(loc) > 2 and isinstance(stage := stages[int(loc[1])], dict) and loc[2] in stage


def _problems(error: ValidationError) -> list[Problem]:
    problems = []
    for item in error.errors():
        loc = item["loc"]
        path = ""
        for part in loc:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        if item["type"] == "extra_forbidden":
            problems.append(Problem(path, "unknown key", nearest(str(loc[-1]), _section(loc).model_fields)))
        elif item["type"] == "missing":
            problems.append(Problem(path, "missing", "give a value"))
        elif item["type"] == "reference":
            problems.append(Problem(path, item["msg"]))
        else:
            problems.append(Problem(path, f"got {item['input']!r}", rule(item)))
    return problems


def _section(loc: tuple[int | str, ...]) -> type[Section]:
    """The section that a key which isn't known stands in: the innermost named on the way to it."""
    return next((SECTIONS[part] for part in reversed(loc[:-1]) if isinstance(part, str) and part in SECTIONS), Recipe)


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


def parse_recipes(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file; empty ones, as behind a last `---`, don't count."""
    try:
        documents = list(yaml.load_all(path.read_bytes(), Loader=_Loader))
    except OSError as error:
        raise RecipeError(Problem(str(path), f"the recipe can't be read ({error.strerror})")) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(Problem(str(path), f"{where}{error.problem}")) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = (str(error) or "nested too deep").partition("\n")[0]
        raise RecipeError(Problem(str(path), f"not YAML: {first}")) from None
    found = [document for document in documents if document is not None]
    for raw in found or [None]:
        if not isinstance(raw, dict):
            kind = "nothing" if raw is None else f"a {type(raw).__name__}"
            raise RecipeError(Problem(str(path), f"holds {kind}", "a recipe is a mapping, such as `fusion: attention`"))
    return found

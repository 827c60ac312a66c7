"""Name -> method, at every level. A method is a plain function or a final module; registering it only writes it down.

What a recipe may say of a method is read off its signature: keyword-only arguments are its options, their annotations
(`Annotated[float, Field(ge=0, le=1)]`) the ranges, their defaults the only place where a default is written. pydantic
checks the values. Other packages' methods are found by their entry points. Nothing here does arithmetic.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from interfuse.errors import OptionError, Problem, nearest

Level = Literal["weights", "adapters", "layers", "features", "outputs"]
LEVELS: tuple[Level, ...] = typing.get_args(Level)
#: What a weight method can be (`interfuse.methods.forms`).
FORMS = ("coefficients", "rule", "blocks", "matrices")
#: The group of entry points by which other packages add methods.
ENTRY_POINTS = "interfuse.methods"

#: Where the built-in methods of a level register themselves. A level is imported when it is first asked for, so that
#: looking up a weight method doesn't import torch.
_HOMES: dict[Level, str] = {
    "weights": "interfuse.methods",
    "adapters": "interfuse.engine.adapters.methods",
    "layers": "interfuse.transfer.methods",
    "features": "interfuse.modules",
    "outputs": "interfuse.training.methods",
}

#: Marks, in an option's annotation `Annotated[tuple[float, ...], EACH, Field(...)]`, that it has one value a model. The
#: field's bounds are each value's; a default of one value, `(1.0,)`, is every model's.
EACH = "one value a model"

_METHODS: dict[tuple[Level, str], Method] = {}
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """What is known of one method: its name, level, function or module, what it needs, and its source."""

    name: str
    level: Level
    make: Callable[..., Any]
    paper: str
    needs: str
    form: str = ""
    of: str = ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.make) or "").partition("\n")[0]

    @functools.cached_property
    def options(self) -> type[BaseModel]:
        """The options as a pydantic model, read off the keyword-only arguments."""
        target = self.make.__init__ if inspect.isclass(self.make) else self.make
        hints = typing.get_type_hints(target, include_extras=True)
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(target).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                hint, default = hints.get(name, Any), parameter.default
                if EACH in getattr(hint, "__metadata__", ()):
                    one = typing.get_args(hint.__origin__)[0]
                    hint = functools.reduce(lambda kind, more: Annotated[kind, more], hint.__metadata__, one)
                    default = default if default is parameter.empty else default[0]
                fields[name] = (hint, ... if default is parameter.empty else default)
        # An option whose name Python reserves ("lambda") is an alias of its argument ("lambda_"); both are taken.
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, populate_by_name=True, strict=True)
        return create_model(self.name, __config__=config, **fields)

    @functools.cached_property
    def each(self) -> tuple[str, ...]:
        """The options that have one value a model."""
        return tuple(name for name, field in self.options.model_fields.items() if EACH in field.metadata)

    @functools.cached_property
    def sees_base(self) -> bool:
        """Whether the method works on differences from a base, or a base and another; else a base is a model among others."""
        return "base" in self.needs or self.form != "coefficients" or (self.takes("gram") and self.of == "deltas")

    def takes(self, what: str) -> bool:
        """Whether a weight method's function asks for the `gram` matrix, or for a tensor's `depth`."""
        return what in inspect.signature(self.make).parameters

    def check(self, values: Mapping[str, Any], path: str = "parameters") -> dict[str, Any]:
        """The options by argument, with defaults filled in, or an `OptionError` with every unknown name and bad value."""
        try:
            options = self.options.model_validate(dict(values))
        except ValidationError as error:
            allowed = [field.alias or name for name, field in self.options.model_fields.items()]
            raise OptionError(*problems_of(error, path, allowed)) from None
        return {name: getattr(options, name) for name in type(options).model_fields}


def problems_of(error: ValidationError, path: str, allowed: list[str]) -> list[Problem]:
    """pydantic's errors in our words: the path, the value got, what is allowed."""
    problems = []
    for item in error.errors():
        where = path
        for part in item["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        if item["type"] == "extra_forbidden":
            problems.append(Problem(where, "unknown option", nearest(str(item["loc"][-1]), allowed)))
        elif item["type"] == "missing":
            problems.append(Problem(where, "missing", "give a value"))
        else:
            problems.append(Problem(where, f"got {item['input']!r}", rule(item)))
    return problems


_RULES = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string_too_short": "a text that isn't empty",
    "string_pattern_mismatch": "letters, digits, - and _ alone",
    "string": "a text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "literal_error": "allowed: {expected}",
}


def rule(item: Mapping[str, Any]) -> str:
    """What one of pydantic's errors allows, in our words."""
    kind = item["type"]
    text = _RULES.get(kind) or _RULES.get(kind.partition("_")[0])
    if text is None:
        return str(item["msg"][:1].lower() + item["msg"][1:]).removeprefix("input ")
    return text.format(**item.get("ctx", {}))


def register(
    name: str, level: Level, *, form: str = "", of: str = "deltas", paper: str = "", needs: str = ""
) -> Callable[[_F], _F]:
    """Write a method down under `name`; the decorated function or class is returned unchanged.

    `form` says what a weight method is given and gives (`interfuse.methods.forms`), and `of` whether its Gram matrix is
    that of the `deltas` from the base or that of the `models`. `paper` is the source to cite, `needs` what the method
    asks for beyond models ("a base", "training data").
    """

    def write_down(make: _F) -> _F:
        if level == "weights" and form not in FORMS:
            raise OptionError(Problem(f"register({name!r}, {level!r})", f"form is {form!r}", nearest(form, FORMS)))
        if not getattr(make, "__module__", "").startswith(f"{__package__}."):
            _known(level)  # ours have their names first
        if (level, name) in _METHODS and _METHODS[level, name].make is not make:
            raise OptionError(Problem(f"register({name!r}, {level!r})", "the name is taken", "choose another name"))
        _METHODS[level, name] = Method(name, level, make, paper, needs, form, of)
        return make

    return write_down


def methods(level: Level | None = None) -> list[Method]:
    """All methods, or those of one level, in the order of levels and registration; other packages' behind ours.

    A package names a module of its own as an entry point of the group `interfuse.methods` (docs/extending.md); one that
    can't be imported is a warning.
    """
    for problem in _others():
        warnings.warn(str(problem), stacklevel=2)
    return _known(level)


def find(name: str, level: Level, path: str = "method") -> Method:
    """The method of that name at that level, or an `OptionError` with the nearest names.

    Other packages are looked into, and imported, only for a name that isn't one of ours.
    """
    known = {method.name: method for method in _known(level)}
    if name in known:
        return known[name]
    broken = _others()
    known = {method.name: method for method in _known(level)}
    if name not in known:
        raise OptionError(Problem(path, f"no {level} method is named {name!r}", nearest(name, known)), *broken)
    return known[name]


def _known(level: Level | None) -> list[Method]:
    """The methods that have been registered, ours among them."""
    for wanted in LEVELS if level is None else (level,):
        if wanted in _HOMES:
            importlib.import_module(_HOMES[wanted])
    return [m for wanted in LEVELS for m in _METHODS.values() if m.level == wanted and level in (None, wanted)]


@functools.cache
def _others() -> tuple[Problem, ...]:
    """Import other packages' methods, once; what can't be imported."""
    from importlib.metadata import entry_points

    broken = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (entry.name, entry.value)):
        try:
            entry.load()
        except Exception as error:  # someone else's code: it may fail in any way, and mustn't take ours along
            package = f" of {entry.dist.name}" if entry.dist is not None else ""
            wrong = f"{entry.value!r}{package} can't be loaded ({type(error).__name__}: {error})"
            broken.append(Problem(f"entry point {entry.name!r}", wrong, "mend or uninstall that package"))
    return tuple(broken)

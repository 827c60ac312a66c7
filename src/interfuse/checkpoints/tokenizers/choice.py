"""What a recipe's `tokenizer` or `tokenizer_source` asks for, checked: a source, rules for single tokens, a multiple.

The values are mergekit's, and mean what they mean there (docs/tokenizers.md says where not). Only the form is checked here,
and that models are those of the recipe: what tokenizers hold is `vocabulary`'s matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from interfuse.checkpoints.tokenizers.tokenizer import Home
from interfuse.errors import Problem, RecipeError, nearest


class TokenRule(NamedTuple):
    """What a recipe says of one token: its row is `model`'s for `token` (text or id), or zeros, or as without a rule."""

    model: str | None = None
    token: str | int | None = None
    zero: bool = False
    force: bool = False


class Choice(NamedTuple):
    """A recipe's `tokenizer` section: `source` is `"base"`, `"union"`, or a model's files; `key` is that model, if merged.

    `text` is the source as the recipe has it.
    """

    source: str | Home
    key: str | None
    rules: dict[str, TokenRule]
    multiple: int | None
    text: str


def read_choice(
    choice: str | Mapping[str, Any], folders: Mapping[str, Home | None], elsewhere: Mapping[str, Home] | None = None
) -> Choice:
    """A recipe's `tokenizer_source` or `tokenizer` value, checked; every problem at once as a `RecipeError`.

    `folders` are the merged models' by name, `elsewhere` those of others that the source may name.
    """
    if not isinstance(choice, Mapping):
        source, key, problems = _source(choice, folders, elsewhere or {}, "tokenizer_source")
        if problems:
            raise RecipeError(*problems)
        return Choice(source, key, {}, None, reference_text(choice) or "")
    known = ("source", "tokens", "pad_to_multiple_of")
    problems = [Problem(f"tokenizer.{name}", "unknown key", nearest(str(name), known)) for name in choice if name not in known]
    asked = choice.get("source", "union")
    source, key, wrong = _source(asked, folders, elsewhere or {}, "tokenizer.source")
    multiple = choice.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        problems.append(Problem("tokenizer.pad_to_multiple_of", f"got {multiple!r}", "allowed: an integer, 1 or more"))
    tokens = {} if choice.get("tokens") is None else choice["tokens"]
    rules: dict[str, TokenRule] = {}
    if not isinstance(tokens, Mapping):
        problems.append(Problem("tokenizer.tokens", f"got {tokens!r}", "allowed: a mapping of tokens to {source, force}"))
        tokens = {}
    for token, value in tokens.items():
        path = f"tokenizer.tokens.{token}"
        if not isinstance(token, str) or not token:
            problems.append(Problem(path, f"the token {token!r} isn't a text", "write it in quotes"))
        else:
            rules[token], more = _rule(value, folders, path)
            problems += more
    if problems + wrong:
        raise RecipeError(*problems, *wrong)
    return Choice(source, key, rules, multiple, reference_text(asked) or "")


def reference_text(value: Any) -> str | None:
    """A model's reference as one text, of a text or `{model: {path, revision}, lora: ...}`; None if it is neither."""
    if isinstance(value, Mapping) and "model" in value and set(value) <= {"model", "lora"}:
        parts = [_part(value[name]) for name in ("model", "lora") if value.get(name) is not None]
        return None if None in parts or not parts else "+".join(part for part in parts if part is not None)
    return value if isinstance(value, str) and value else None


def _part(value: Any) -> str | None:
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        return value["path"] + (f"@{value['revision']}" if value.get("revision") is not None else "")
    return value if isinstance(value, str) else None


def _source(
    value: Any, folders: Mapping[str, Home | None], elsewhere: Mapping[str, Home], path: str
) -> tuple[str | Home, str | None, list[Problem]]:
    """Where the tokenizer comes from, and which of the models that is."""
    if value in ("base", "union"):
        return value, None, []
    text = reference_text(value)
    key = None if text is None else _key(text, folders)
    known = None if key is None else folders[key]
    if known is not None:
        return known, key, []
    if text is not None and text in elsewhere:
        return elsewhere[text], None, []
    folder = None if text is None else Path(text).expanduser()
    if folder is not None and folder.is_dir():
        return folder, None, []
    return "base", None, [Problem(path, f"got {value!r}", source_allowed(text))]


def source_allowed(text: str | None) -> str:
    """What to offer for a tokenizer's source that is none."""
    offered = nearest(text or "", ("base", "union"))
    return offered if offered.startswith("did you") else "allowed: base, union, or a model's folder"


def _key(text: str, folders: Mapping[str, Home | None]) -> str | None:
    """The model that a reference means: by its name, or by the folder it is in."""
    if text in folders:
        return text
    there = Path(text).expanduser().resolve()
    return next((key for key, home in folders.items() if isinstance(home, Path) and home.resolve() == there), None)


def _rule(value: Any, folders: Mapping[str, Home | None], path: str) -> tuple[TokenRule, list[Problem]]:
    if not isinstance(value, Mapping):
        return TokenRule(), [Problem(path, f"got {value!r}", "allowed: {source: MODEL | {kind: ...}, force: true | false}")]
    known = ("source", "force")
    problems = [Problem(f"{path}.{name}", "unknown key", nearest(str(name), known)) for name in value if name not in known]
    force, source = value.get("force", False), value.get("source")
    if not isinstance(force, bool):
        problems.append(Problem(f"{path}.force", f"got {force!r}", "allowed: true or false"))
    if source is None:
        return TokenRule(force=bool(force)), problems
    if isinstance(source, Mapping) and "kind" in source:
        rule, more = _kind(source, folders, f"{path}.source")
    else:
        key, more = _model(source, folders, f"{path}.source")
        rule = TokenRule(model=key)
    return rule._replace(force=bool(force)), problems + more


def _kind(source: Mapping[str, Any], folders: Mapping[str, Home | None], path: str) -> tuple[TokenRule, list[Problem]]:
    """`{kind: zero}`, or `{kind: model_token, model, token | token_id}`."""
    kinds = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
    kind = source["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        return TokenRule(), [Problem(f"{path}.kind", f"got {kind!r}", nearest(str(kind), kinds))]
    problems = [Problem(f"{path}.{n}", "unknown key", nearest(str(n), kinds[kind])) for n in source if n not in kinds[kind]]
    if kind == "zero":
        return TokenRule(zero=True), problems
    key, more = _model(source.get("model"), folders, f"{path}.model")
    given = {name: source[name] for name in ("token", "token_id") if source.get(name) is not None}
    if len(given) != 1:
        more.append(Problem(path, f"has {' and '.join(given) or 'neither token nor token_id'}", "give one of token, token_id"))
    for name, (kind_of, said) in {"token": (str, "a text"), "token_id": (int, "an integer, 0 or more")}.items():
        value = given.get(name)
        if value is not None and (type(value) is not kind_of or (type(value) is int and value < 0)):
            more.append(Problem(f"{path}.{name}", f"got {value!r}", f"allowed: {said}"))
    return TokenRule(model=key, token=next(iter(given.values()), None)), problems + more


def _model(value: Any, folders: Mapping[str, Home | None], path: str) -> tuple[str | None, list[Problem]]:
    text = reference_text(value)
    key = None if text is None else _key(text, folders)
    if key is not None:
        return key, []
    return None, [Problem(path, f"{value!r} isn't a model of this recipe", nearest(text or "", folders))]

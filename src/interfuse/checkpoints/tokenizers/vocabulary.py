"""The vocabulary of a merge: its tokenizer, each model's row for each of its tokens, and where missing rows come from.

Decided before any tensor is read, from the recipe's `tokenizer` or `tokenizer_source` and the models' tokenizer files. Rows
without a token (padding) count as tokens named by their number. Not the gathering of rows itself (`embedding`), nor the
making of one tokenizer from several (`union`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from interfuse.checkpoints.tokenizers.choice import TokenRule, read_choice
from interfuse.checkpoints.tokenizers.tokenizer import Home, Tokenizer, read_json, read_tokenizer, tokenizer_files, with_tokens
from interfuse.checkpoints.tokenizers.union import union
from interfuse.errors import CheckpointError, Problem, RecipeError

#: Files that say what tokens mean to the model.
CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a merge's tokens are and where their rows come from. Made by `vocabulary`.

    `files` is the tokenizer, to be written beside the weights; `tokens` each token's row; `size` the number of rows, padding
    included. `rows[model][i]` is the model's own row for output row `i`, or -1 where it hasn't it: then it gets the mean of
    the rows `donors[model][i]` that aren't -1, zeros where `zero[i]`, and where there is neither the mean of its other rows.
    `changes` has, by file, what the output's config files must say of tokens, nested as they are; None takes an entry away.
    The number of rows in them is for `config` to set.
    """

    files: dict[str, bytes]
    tokens: dict[str, int]
    size: int
    rows: dict[str, np.ndarray]
    donors: dict[str, np.ndarray]
    zero: np.ndarray
    changes: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def vocabulary(
    choice: str | Mapping[str, Any],
    folders: Mapping[str, Home | None],
    base: str | None,
    sizes: Mapping[str, int],
    elsewhere: Mapping[str, Home] | None = None,
) -> Vocabulary:
    """The vocabulary that `tokenizer_source` (a text) or `tokenizer` (a mapping) asks for.

    `folders` has the folder or small files of each model in the recipe's order (None for one that is a file or in memory),
    `sizes` the rows of its embedding (`embedding_rows`), `base` the base model's key; where there is none, tokenizer and
    config are the first model's. `elsewhere` are models that aren't merged, whose tokenizer may be asked for. Raises
    `RecipeError` for what is wrong with `choice`, `CheckpointError` for tokenizers that don't fit.
    """
    asked = read_choice(choice, folders, elsewhere)
    first = base or next(iter(folders))
    tokenizers, notes = _tokenizers(folders, first, sizes)
    home = origin = folders[first] or {}
    made = tokenizers[first]
    if asked.source == "union":
        made, more = union([made, *(tokenizers[key] for key in folders if key != first)])
        notes += more
    elif not isinstance(asked.source, str):
        home = asked.source
        made = tokenizers[asked.key] if asked.key else _read(home, asked.text)
    new = [{"content": token} for token in asked.rules if token not in made.tokens]
    made = with_tokens(made, new) if new else made
    owner = asked.key or (first if home == origin else None)
    size = _size(made, asked.multiple, sizes[owner] if owner else _rows_in_config(home, asked.text))
    own = {key: _own_rows(made.tokens, tokenizers[key].tokens, sizes[key], size) for key in folders}
    rows, donors, zero = _sources(asked.rules, made.tokens, tokenizers, own, base, sizes)
    notes += _notes(made, rows, donors, zero, sizes, tokenizers)
    changes, more = ({}, []) if home == origin else _changes(made, tokenizers[first], (first, origin), (asked.text, home))
    return Vocabulary(made.files, made.tokens, size, rows, donors, zero, changes, tuple(notes + more))


def _tokenizers(
    folders: Mapping[str, Home | None], first: str, sizes: Mapping[str, int]
) -> tuple[dict[str, Tokenizer], list[str]]:
    """The tokenizer of each model; one without has the first's, if its embedding has as many rows."""
    found: dict[str, Tokenizer] = {}
    notes, problems, lacking = [], [], []
    seen: list[tuple[dict[str, bytes], Tokenizer]] = []
    for key, folder in folders.items():
        try:
            files = tokenizer_files(folder) if folder else {}
            same = next((made for known, made in seen if known == files), None)
            made = same or (read_tokenizer(folder, key) if folder else None)
        except CheckpointError as error:
            problems += list(error.problems)
            continue
        if made is None:
            lacking.append(key)
        else:
            found[key] = made
            seen += [] if same else [(files, made)]
    if first in lacking:
        problems.append(Problem(first, "has no tokenizer files", "put its tokenizer into its folder"))
    elif not problems:
        for key in lacking:
            if sizes[key] != sizes[first]:
                wrong = f"has no tokenizer files, and {sizes[key]} rows where {first} has {sizes[first]}"
                problems.append(Problem(key, wrong, "put its tokenizer into its folder"))
            found[key] = found[first]
            notes.append(f"{key} has no tokenizer files: taken to have the tokens of {first}")
    if problems:
        raise CheckpointError(*problems)
    return found, notes


def _read(home: Home, name: str) -> Tokenizer:
    found = read_tokenizer(home, name)
    if found is None:
        raise CheckpointError(Problem(name, "has no tokenizer files", "name a folder that has, base or union"))
    return found


def _size(made: Tokenizer, multiple: int | None, rows: int) -> int:
    """The output's rows: the source's own number, if its tokens fit; the next multiple, if one is asked for."""
    needed = max(made.tokens.values(), default=-1) + 1
    return -(-needed // multiple) * multiple if multiple else max(needed, rows)


def _own_rows(tokens: Mapping[str, int], mine: Mapping[str, int], count: int, size: int) -> np.ndarray:
    """For each of `size` output rows the model's own, of `count`, or -1; rows without a token go by their number."""
    rows = np.full(size, -1, np.int64)
    named = np.zeros(size, np.bool_)
    for token, place in tokens.items():
        named[place] = True
        row = mine.get(token, -1)
        if row < count:
            rows[place] = row
    unnamed = np.arange(size) < count
    unnamed[[row for row in mine.values() if row < size]] = False
    unnamed &= ~named
    rows[unnamed] = np.flatnonzero(unnamed)
    return rows


def _sources(
    rules: Mapping[str, TokenRule],
    tokens: Mapping[str, int],
    tokenizers: Mapping[str, Tokenizer],
    own: Mapping[str, np.ndarray],
    base: str | None,
    sizes: Mapping[str, int],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Each model's rows, each missing row's donors, and which are zero: the base's if it has it, else of all that have it."""
    rows = {key: mine.copy() for key, mine in own.items()}
    donors = {key: mine.copy() for key, mine in own.items()}
    zero = np.zeros(len(next(iter(own.values()))), np.bool_)
    if base is not None:
        for key in own:
            if key != base:
                donors[key][own[base] >= 0] = -1
    problems = []
    for token, rule in rules.items():
        place = tokens[token]
        if rule.zero or rule.model is not None:
            for key in donors:
                donors[key][place] = -1
        zero[place] = rule.zero
        if rule.model is not None:
            wanted = token if rule.token is None else rule.token
            row = tokenizers[rule.model].tokens.get(wanted, -1) if isinstance(wanted, str) else wanted
            if not 0 <= row < sizes[rule.model]:
                what = f"{rule.model} has no row for token {wanted!r}" if isinstance(wanted, str) else f"got token_id {wanted}"
                allowed = "name one of its tokens" if isinstance(wanted, str) else f"allowed: below {sizes[rule.model]}"
                problems.append(Problem(f"tokenizer.tokens.{token}.source", what, allowed))
            donors[rule.model][place] = row
        if rule.force:
            for key in rows:
                rows[key][place] = -1
    if problems:
        raise RecipeError(*problems)
    return rows, donors, zero


def _notes(
    made: Tokenizer,
    rows: Mapping[str, np.ndarray],
    donors: Mapping[str, np.ndarray],
    zero: np.ndarray,
    sizes: Mapping[str, int],
    tokenizers: Mapping[str, Tokenizer],
) -> list[str]:
    """What becomes of each model's rows, and what a reader should know of tokens that aren't everywhere."""
    size, names = len(zero), {place: token for token, place in made.tokens.items()}
    notes = [f"the output has {len(made.tokens)} tokens in {size} rows"]
    for key, mine in tokenizers.items():
        missing = np.flatnonzero(rows[key] < 0)
        if len(missing) or sizes[key] != size:
            said = [f"{size - len(missing)} its own", *_filled(missing, donors, zero, names)]
            notes.append(f"{key}: {sizes[key]} rows become {size}: {', '.join(said)}")
        rowless = [token for token, place in mine.tokens.items() if place >= sizes[key]]
        gone = [token for token in mine.tokens if token not in made.tokens]
        notes += _counted(key, rowless, "of its tokens have no row in its embedding")
        notes += _counted(key, gone, "of its tokens aren't in the output")
    nobody = ~zero & np.all([theirs < 0 for theirs in donors.values()], axis=0)
    bare = [token for token, place in made.tokens.items() if nobody[place]]
    return notes + _counted("every model", bare, "of the output's tokens have no row anywhere and get the mean of the others")


def _filled(missing: np.ndarray, donors: Mapping[str, np.ndarray], zero: np.ndarray, names: Mapping[int, str]) -> Iterator[str]:
    """How many of the missing rows come from whom, those that come from the same in one, with a token of them."""
    gives = np.array([(theirs[missing] >= 0) & ~zero[missing] for theirs in donors.values()])
    kinds, first, counts = np.unique([*gives, zero[missing]], axis=1, return_index=True, return_counts=True)
    for at in np.argsort(first):
        whose = [key for key, given in zip(donors, kinds[:-1, at], strict=True) if given]
        means = "the mean of its others" if not whose else f"the mean of {' and '.join(whose)}"
        how = "zeros" if kinds[-1, at] else f"from {whose[0]}" if len(whose) == 1 else means
        token = names.get(missing[first[at]])
        yield f"{counts[at]} {how}" + ("" if token is None else f" (e.g. {token!r})")


def _counted(key: str, tokens: list[str], what: str) -> list[str]:
    return [f"{key}: {len(tokens)} {what}, e.g. {tokens[0]!r}"] if tokens else []


def _changes(
    made: Tokenizer, old: Tokenizer, origin: tuple[str, Home], home: tuple[str, Home]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What config.json and generation_config.json must say of tokens, and notes on ids that mean nothing any more.

    They are those in `origin`, of a model with the tokenizer `old`; `home` has the new tokenizer's own. Both with a name.
    """
    changes: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for file in CONFIGS:
        theirs = read_json(home[1], file, home[0])
        for path, value in _entries(read_json(origin[1], file, origin[0])):
            if not path[-1].endswith("_token_id"):
                continue
            new = _new_id(path, value, made, old, theirs)
            if new is None and value is not None:
                notes.append(f"{file}: {path[-1]} was {value}, a token that the output hasn't")
            if new != value:
                _set(changes.setdefault(file, {}), path, new)
    return changes, notes


def _new_id(path: tuple[str, ...], value: Any, made: Tokenizer, old: Tokenizer, theirs: Mapping[str, Any]) -> Any:
    """An id in a config, for another tokenizer: as its own folder says, else that of the same role, else of the same token."""
    said = dict(_entries(theirs)).get(path)
    if said is not None:
        return said
    token = made.role(path[-1].removesuffix("_id"))
    if token in made.tokens:
        return made.tokens[token]
    names = {place: token for token, place in old.tokens.items()}
    if isinstance(value, list):
        kept = [made.tokens[names[place]] for place in value if names.get(place) in made.tokens]
        return kept or None
    if value not in names:
        return value
    return made.tokens.get(names[value])


def _entries(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value, (*path, key))
        else:
            yield (*path, key), value


def _set(changes: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        changes = changes.setdefault(key, {})
    changes[path[-1]] = value


def _rows_in_config(home: Home, name: str) -> int:
    """The rows that a model's config says its embedding has; 0 if it says nothing."""
    found = [value for path, value in _entries(read_json(home, "config.json", name)) if path[-1] == "vocab_size"]
    return next((value for value in found if type(value) is int), 0)

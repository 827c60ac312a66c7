"""The words of a merge: what `tokenizer_source`, `tokenizer` and `chat_template` make of its models and its output.

Decided from headers and tokenizer files, before there is a plan: models whose embeddings all have the output's rows, and the
files that go beside its weights. Which tokens and rows these are is for `checkpoints.tokenizers` to say; no tensor is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interfuse.checkpoints.names import match_names
from interfuse.checkpoints.remote.headers import place_of, side_files
from interfuse.checkpoints.remote.store import Store
from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.ties import tie
from interfuse.checkpoints.tokenizers.chat import template_of, with_chat_template
from interfuse.checkpoints.tokenizers.choice import source_allowed
from interfuse.checkpoints.tokenizers.embedding import Fill, embedding_rows, resized, vocabulary_tensors, with_vocabulary
from interfuse.checkpoints.tokenizers.tokenizer import Home, has_tokenizer, tokenizer_files
from interfuse.checkpoints.tokenizers.vocabulary import CONFIGS, Vocabulary, vocabulary
from interfuse.engine.opening import Commits, at_commit, fetch_side_files, located, open_references
from interfuse.errors import CheckpointError, Problem, RecipeError, UserError
from interfuse.plan import Wording, config_of
from interfuse.recipe import Recipe
from interfuse.recipe.merges import gives_tasks, tokenizer_models
from interfuse.recipe.pieces import pieces, references
from interfuse.recipe.references import Reference

Models = Mapping[str, Checkpoint]


def reworded(
    recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint], given: Models, commits: Commits | None = None
) -> tuple[dict[Reference, Checkpoint], Wording]:
    """The checkpoints with one vocabulary, and what the output is to say of it.

    `given` are the results of earlier recipes by name, `commits` as in `open_references`. Everything wrong is one
    `RecipeError`, or a `CheckpointError` where a model is at fault too.
    """
    first = pieces(recipe)[0]
    lead = Reference.parse(first.base or first.sources[0].model)
    models = {str(reference): checkpoints[reference] for reference in dict.fromkeys([lead, *checkpoints])}
    homes = {key: _home(model) for key, model in models.items()}
    errors: list[UserError] = []
    found, origins = None, list[str]()
    choice = _choice(recipe)
    if choice is not None:
        try:
            names = _tensors(models)
            sizes = {key: _rows(model) for key, model in models.items()}
            base = None if first.base is None else str(lead)
            elsewhere, origins = _elsewhere(recipe, homes, given, commits or {})
            found = vocabulary(choice, homes, base, sizes, elsewhere)
            models = {key: _with(found, key, models, names[key]) for key in models}
            if gives_tasks(recipe) and models[str(lead)] is not checkpoints[lead]:
                wrong = f"per_task reads {lead} as it is, and the tokenizer gives it other rows"
                raise RecipeError(Problem("parameters.output", wrong, "tokenizer_source: base, or leave one of the two out"))
        except UserError as error:
            errors.append(error)
    try:
        files, notes = _files(recipe, str(lead), homes, found)
    except UserError as error:
        errors.append(error)
    if errors:
        raise together(errors)
    wording = Wording(files, notes=notes, digest=_digest(files, found), origins=tuple(origins))
    if found is not None:
        rows = _rows(checkpoints[lead]), found.size
        where = f"rows of tokens are in {', '.join(names[str(lead)])}"
        wording = wording._replace(changes=found.changes, rows=rows, notes=(*found.notes, where, *notes))
    return {reference: models[str(reference)] for reference in checkpoints}, wording


def together(errors: Sequence[UserError]) -> UserError:
    """One error with the problems of all: of their class, or a `CheckpointError` if they are of several."""
    kinds = list(dict.fromkeys(map(type, errors)))
    problems = dict.fromkeys(problem for error in errors for problem in error.problems)
    return (kinds[0] if len(kinds) == 1 else CheckpointError)(*problems)


def leveled(checkpoints: Mapping[Reference, Checkpoint]) -> dict[Reference, Checkpoint]:
    """The checkpoints as if their vocabularies had one size: to see what else is wrong where they couldn't be united."""
    found = {}
    for reference, checkpoint in checkpoints.items():
        try:
            names = vocabulary_tensors(checkpoint.specs, embedding_rows(checkpoint.specs) or 0, checkpoint.name)
        except CheckpointError:
            names = ()  # said already
        specs = {name: resized(spec, 1) if name in names else spec for name, spec in checkpoint.specs.items()}
        found[reference] = replace(checkpoint, specs=specs)
    return found


def _choice(recipe: Recipe) -> str | dict[str, Any] | None:
    if recipe.tokenizer is not None:
        return recipe.tokenizer.model_dump(exclude_none=True)
    return recipe.tokenizer_source


def _home(checkpoint: Checkpoint) -> Home | None:
    """Where a model's tokenizer and config are: its folder, or the files themselves where it has others than that."""
    fetch_side_files(checkpoint)
    folder = checkpoint.folder
    if not checkpoint.beside or folder is None:
        return folder
    configs = {name: (folder / name).read_bytes() for name in CONFIGS if (folder / name).is_file()}
    files: dict[str, bytes | None] = {**tokenizer_files(folder), **configs, **checkpoint.beside}
    return {name: content for name, content in files.items() if content is not None}


def _elsewhere(
    recipe: Recipe, homes: Mapping[str, Home | None], given: Models, commits: Commits
) -> tuple[dict[str, Home], list[str]]:
    """The files of a model that isn't merged and whose tokenizer is asked for, and where they are exactly.

    A folder on this machine is itself the place.
    """
    found: dict[str, Home] = {}
    origins: list[str] = []
    for path, value in tokenizer_models(recipe):
        reference = Reference.parse(value)
        if path not in ("tokenizer_source", "tokenizer.source") or str(reference) in homes or Path(reference.path).is_dir():
            continue
        try:
            home, where = _home_of(at_commit(reference, commits), given)
        except UserError as error:
            raise located(error, reference, path) from None
        if home is not None:
            found[str(reference)] = home
            origins += where
    return found, origins


def source_problems(recipe: Recipe, given: Models) -> list[Problem]:
    """What is wrong with the model that the tokenizer is to come from: all that is known of it while others can't be opened."""
    merged = references(recipe)
    problems: list[Problem] = []
    for path, value in tokenizer_models(recipe):
        reference = Reference.parse(value)
        if path not in ("tokenizer_source", "tokenizer.source") or reference in merged:
            continue
        try:
            if _home_of(reference, given)[0] is None:
                problems.append(Problem(path, f"got {value!r}", source_allowed(str(reference))))
        except UserError as error:
            problems += located(error, reference, path).problems
    return problems


def _home_of(reference: Reference, given: Models) -> tuple[Home | None, list[str]]:
    """The files of a model anywhere, None for what is no folder; and where it is exactly, if not on this machine."""
    if reference.path in given or reference.lora is not None:
        model = open_references([reference], given)[reference]
        return _home(model), [store.origin for store in model.stores()]
    where, _ = place_of(reference.path, reference.revision)
    if isinstance(where, Store):
        where.get(side_files(where), False)
        return where.folder, [where.origin]
    return (where if where.is_dir() else None), []


def _rows(checkpoint: Checkpoint) -> int:
    return embedding_rows(checkpoint.specs) or 0


def _tensors(models: Models) -> dict[str, tuple[str, ...]]:
    """The tensors of each model that hold a vocabulary; a model without an embedding is refused."""
    found: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for key, model in models.items():
        try:
            if not _rows(model):
                wrong = "no embedding of tokens is found in it, whose rows would follow a tokenizer"
                raise CheckpointError(Problem(key, wrong, "leave the tokenizer's keys out"))
            found[key] = vocabulary_tensors(model.specs, _rows(model), key)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return found


def _with(found: Vocabulary, key: str, models: Models, names: Sequence[str]) -> Checkpoint:
    """A model with the output's rows, those that it lacks filled from models that may call their tensors otherwise."""
    model = models[key]
    donors = {other: _named_as(model, checkpoint, names) for other, checkpoint in models.items()}
    return with_vocabulary(model, found.rows[key], Fill(found.donors, found.zero, donors), names)


def _named_as(model: Checkpoint, other: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """`other` with `model`'s names for the tensors `names`, those that are tied in it under both."""
    if other is model or all(name in other.specs for name in names):
        return other
    there, _ = match_names(model.specs, other.specs)
    there, _ = tie(there, other.specs, config_of(other), model.specs)
    there = {name: there[name] for name in names if name in there}
    specs = {name: other.specs[own] for name, own in there.items()}
    return replace(other, specs=specs, places={name: other.places[own] for name, own in there.items()}, within=(other,))


def _files(
    recipe: Recipe, lead: str, homes: Mapping[str, Home | None], found: Vocabulary | None
) -> tuple[dict[str, bytes | None], tuple[str, ...]]:
    """The output's tokenizer files, None for those of the lead that go, and notes."""
    theirs = tokenizer_files(homes[lead] or {})
    files, notes = theirs if found is None else found.files, tuple[str, ...]()
    if recipe.chat_template is not None:
        if not has_tokenizer(files):
            wrong = f"{lead} has no tokenizer files that it could go with"
            raise RecipeError(Problem("chat_template", wrong, "leave it out"))
        templates = [None if home is None else template_of(tokenizer_files(home), key) for key, home in homes.items()]
        files, notes = with_chat_template(files, recipe.chat_template, templates)
    return {**dict.fromkeys(name for name in theirs if name not in files), **files}, notes


def _digest(files: Mapping[str, bytes | None], found: Vocabulary | None) -> str:
    """The SHA-256 of what determines the output: its files, and where each row comes from."""
    digest = hashlib.sha256(json.dumps([sorted(files), found and found.changes]).encode())
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name] or b"").digest())
    if found is not None:
        for array in (*found.rows.values(), *found.donors.values(), found.zero):
            digest.update(array.tobytes())
    return digest.hexdigest()

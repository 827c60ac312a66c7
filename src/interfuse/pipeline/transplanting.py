"""Runs of `transplant`: what its recipe asks for, and the one between two folders, which builds no network.

From folder to folder tensors are copied one at a time, out of core, as a merge's are; the output says how it was made, and
`interfuse verify` checks it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from interfuse.checkpoints.hashes import file_hashes, lines_of
from interfuse.checkpoints.source import open_checkpoint, open_folder
from interfuse.checkpoints.tokenizers.tokenizer import read_tokenizer
from interfuse.checkpoints.writer import check_output, whole_folder
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem, UserError
from interfuse.models import CODE, load_tokenizer
from interfuse.pipeline.finished import is_saved
from interfuse.pipeline.intended import intended, written
from interfuse.pipeline.record import DESCRIPTION, RunRecord, hash_data, versions
from interfuse.pipeline.record import write as write_record
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, options_of
from interfuse.transfer.transplant import Prepared, Tokens, prepare

KIND = "transplant"


def copies_files(recipe: Recipe) -> bool:
    """Whether the recipe is a transplant from one folder of weights into another, which takes no network."""
    if recipe.fusion != KIND or len(recipe.models) != 1 or recipe.target is None or recipe.models[0].weights is not None:
        return False
    return all(Path(ref).is_dir() and not is_saved(ref) for ref in (recipe.models[0].model, recipe.target))


def asked_of(options: Mapping[str, Any], source: str, target: str, path: str) -> dict[str, Any]:
    """A recipe's options as arguments of `transplant`: `vocabulary` with the tokens of the models, or of folders.

    Raises `OptionError`, under `path`, for a model without a tokenizer.
    """
    asked = dict(options)
    said = asked.pop("vocabulary", None)
    if said is None or said is False:
        return asked
    named = said if isinstance(said, Mapping) else {}
    found, problems = [], []
    for side, model in (("source", source), ("target", target)):
        tokens = _tokens(named.get(side, model))
        if tokens is None:
            wrong = f"{named.get(side, model)} has no tokenizer"
            problems.append(Problem(f"{path}.vocabulary", wrong, f"name its folder: {{{side}: FOLDER}}"))
        found.append(tokens)
    if problems:
        raise OptionError(*problems)
    return asked | {"vocabulary": tuple(found)}


def _tokens(reference: str) -> Tokens | None:
    if reference.startswith(CODE):
        return None
    if Path(reference).is_dir():
        known = read_tokenizer(Path(reference))
        return None if known is None else known.tokens
    tokenizer = load_tokenizer(reference)
    return None if tokenizer is None else dict(tokenizer.get_vocab())


def prepared_by(recipe: Recipe) -> Prepared:
    """What the recipe does from folder to folder; everything that is wrong with it is a `UserError`."""
    source, target = recipe.models[0].model, str(recipe.target)
    problems: list[Problem] = []
    opened = []
    for path, ref in (("models[0].model", source), ("target", target)):
        try:
            opened.append(open_checkpoint(ref))
        except UserError as error:
            problems += [Problem(path, str(problem)) for problem in error.problems]
    if recipe.data is not None and recipe.data.test is not None and not (Path(target) / "config.json").is_file():
        allowed = "leave the test out, or name the code that builds the target"
        problems.append(Problem("data.test", f"{target} has no network to evaluate", allowed))
    if problems:
        raise ModelError(*problems)
    return prepare(*opened, **asked_of(options_of(recipe), source, target, "parameters"))


def digest_of(prepared: Prepared) -> str:
    """By what the plan of a transplant is known again: what becomes of every tensor."""
    rows = [[row.name, str(prepared.goal.specs[row.name]), row.action, row.source, row.how] for row in prepared.report.rows]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def run_transplant(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool,
    dry_run: bool,
    trust_code: bool,
    device: str | None,
    threads: int | None,
    progress: bool,
) -> RunRecord:
    """Copy one folder's tensors into those of another, into the folder `out`, or only check that it can be done."""
    started = time.monotonic()
    inputs = [recipe.models[0].model, str(recipe.target)]
    prepared = _checked(recipe, out, overwrite, inputs)
    record = intended(recipe, [])
    record = replace(record, plan=f"{record.plan}\n{prepared.report}", versions=versions())
    if dry_run:
        return replace(record, seconds=time.monotonic() - started)
    with whole_folder(out, overwrite=overwrite, inputs=inputs, nbytes=prepared.nbytes) as folder:
        made = write_into(recipe, prepared, folder)
        found: Any = None
        if recipe.data is not None and recipe.data.test is not None:
            from interfuse.pipeline import networks

            with networks.settled(recipe.seed, threads):
                found = networks.evaluate_merged(recipe, folder, trust_code=trust_code, device=device, progress=progress)
        models = [
            {"name": name, "model": source["model"], "weights": None, "xxh3": source["xxh3"]}
            for name, source in zip([*names_of(recipe), "target"], made["sources"], strict=True)
        ]
        record = replace(
            record,
            out=Path(out),
            inputs={"models": models, "data": hash_data(recipe)},
            test=None if found is None else found.test,
            classes=None if found is None else found.classes,
            notes=tuple(made["notes"]),
            versions=versions(),
            seconds=time.monotonic() - started,
        )
        write_record(folder, [recipe], record, kind=KIND)
    return record


def _checked(recipe: Recipe, out: str | Path, overwrite: bool, inputs: list[str]) -> Prepared:
    """The transplant, once it's sure that it can be done and written."""
    errors: list[UserError] = []
    prepared = None
    try:
        prepared = prepared_by(recipe)
    except UserError as error:
        errors.append(error)
    try:
        check_output(out, overwrite=overwrite, inputs=inputs, nbytes=0 if prepared is None else prepared.nbytes)
    except UserError as error:
        errors.append(error)
    if errors:
        from interfuse.engine.wording import together

        raise together(errors)
    assert prepared is not None
    return prepared


def write_into(recipe: Recipe, prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Write the tensors, the target's small files and `interfuse.json` into a folder that is there; what that file says."""
    left_out = prepared.write(folder)
    there = open_folder(folder, stems=prepared.goal.stems)
    wrong = [name for name, spec in prepared.goal.specs.items() if there.specs.get(name) != spec]
    if wrong:
        shown = ", ".join(map(repr, wrong[:5]))
        raise CheckpointError(Problem(str(folder), f"reads back otherwise than it was written: {shown}", "check the disk"))
    record = {
        "kind": KIND,
        "method": KIND,
        "recipes": written([recipe]),
        "sources": [{"model": source.name, "xxh3": source.hash()} for source in (prepared.origin, prepared.goal)],
        "plan": digest_of(prepared),
        "notes": [f"from {names_of(recipe)[0]}: {prepared.report.summary()}", *prepared.report.notes],
        "versions": versions(),
        "left_out": left_out,
        "output": there.hash(),
        "files": file_hashes(folder, [file.path for file in there.files()]),
        "tensors": lines_of(there),
    }
    (folder / DESCRIPTION).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record

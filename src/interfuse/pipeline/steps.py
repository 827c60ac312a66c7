"""`run`: check everything, then do it, into a folder that appears whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interfuse.checkpoints.numbers import FLOATS, float_named
from interfuse.checkpoints.tasks import on_disk
from interfuse.checkpoints.writer import settle, whole_folder
from interfuse.engine.estimate import room_for
from interfuse.engine.on_device import device_for
from interfuse.engine.output.folder import merge_into
from interfuse.errors import OptionError, Problem, UserError, nearest
from interfuse.pipeline.adapting import merges_adapters, run_adapters
from interfuse.pipeline.finished import code_of, description, is_saved
from interfuse.pipeline.intended import finished_before, intended, machine, models_problems, planned, written
from interfuse.pipeline.record import DESCRIPTION, STAGES, RunRecord, hash_data, restored, versions, write
from interfuse.recipe import Recipe, check_recipes
from interfuse.recipe.check import TRUST, chooses, method_of, names_of
from interfuse.recipe.learned import learns
from interfuse.recipe.own_data import named
from interfuse.recipe.pieces import references
from interfuse.recipe.schema import TARGETED


def check(
    recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe, *, trust_code: bool = False
) -> tuple[Recipe, ...]:
    """The recipes, ready to run; `RecipeError` with everything that can be found wrong without loading a model or data."""
    beside = lambda read, found, known: models_problems(read, found, known) if merges_files([read]) else []
    return check_recipes(recipe, trust_code=trust_code, also=lambda read: _further(read, trust_code), beside=beside)


def run(
    recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    trust_code: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
    mergekit_compat: bool = False,
) -> RunRecord:
    """Run a recipe: merge, fuse, train, evaluate, and write the model and its record to the folder `out`.

    recipe: a YAML file, or a mapping; or several, of which later ones merge what earlier ones give. out: appears whole or
    not at all; one that is there needs `overwrite`. resume: a merge of files, or stages, go on where a run that was killed
    was, and one that was finished, of the same recipe and models, is left as it is. trust_code: allow `python:`
    references. seed: in place of the recipe's. threads: the merge's, or torch's, for this run. device: "cpu" or "cuda"; left
    out, cuda for networks, if there is one, and the CPU for merges. dry_run: check all, write nothing. allow_nonfinite: NaN
    and infinity may be merged. mergekit_compat: follow mergekit (docs/mergekit.md).

    Raises `UserError` with every problem, before anything is written.
    """
    started = time.monotonic()
    chain = _checked(recipe, Path(out), trust_code, overwrite or resume, seed=seed, threads=threads, device=device)
    beside = Path(recipe).resolve().parent if isinstance(recipe, str | Path) else None
    chain = tuple(read.model_copy(update={} if seed is None else {"seed": seed}) for read in chain)
    how: dict[str, Any] = {"trust_code": trust_code, "threads": threads, "device": device, "progress": progress}
    chain, how_found = _with_chosen(chain, Path(out), beside, overwrite=overwrite or resume, dry_run=dry_run, **how)
    checked, of_files = chain[-1], merges_files(chain)
    if (made := _apart(chain, out, overwrite=overwrite, resume=resume, dry_run=dry_run, **how)) is not None:
        return made
    if resume and not dry_run:
        exactly = {"compat": mergekit_compat, "nonfinite": allow_nonfinite}
        before = finished_before(chain, out, **exactly) if of_files else _staged_before(checked, out, beside, trust_code)
        if before is not None:
            settle(out)
            return dataclasses.replace(before, seconds=time.monotonic() - started)
    output: dict[str, Any] = {"overwrite": overwrite, "inputs": _inputs(chain)}
    stages = planned(chain if of_files else (), out, compat=mergekit_compat, **output)
    _, plan, sources = stages[-1] if stages else (None, None, [])
    record = _said(intended(checked, stages), how_found)
    if dry_run:
        here = machine(stages, out, threads)
        return dataclasses.replace(record, here=here, versions=versions(), seconds=time.monotonic() - started)
    with whole_folder(out, resume=resume, nbytes=room_for(stages), **output) as folder:
        if plan is not None:
            merge_into(
                plan, sources, folder, recipes=written(chain), compat=mergekit_compat,
                threads=threads, allow_nonfinite=allow_nonfinite, resume=resume, progress=progress, device=device_for(device),
            )  # fmt: skip
        found: Any = None
        if plan is None or checked.data is not None:
            found = _with_networks(checked, folder, beside, merged=plan is not None, **how)
        record = dataclasses.replace(
            record,
            out=Path(out),
            inputs=_hashed(checked, found.hashes if found else {}, description(folder)),
            **_learned(found),
            notes=(*description(folder).get("notes", ()), *(found.notes if found else ())),
            versions=versions() if found or device_for(device) else description(folder)["versions"],
            seconds=time.monotonic() - started,
        )
        write(folder, chain, record, kind="weights")
    return record


def _checked(recipe: Any, out: Path, trust_code: bool, overwrite: bool, **options: Any) -> tuple[Recipe, ...]:
    """The recipes, ready to run with these options; where anything is wrong with either, what is with `out` is told beside."""
    chain: tuple[Recipe, ...] = ()
    errors: list[UserError] = []
    try:
        chain = check(recipe, trust_code=trust_code)
    except UserError as error:
        errors.append(error)
    try:
        _check_options(**options)
    except UserError as error:
        errors.append(error)
    if not errors:
        return chain
    plain = bool(chain) and merges_files(chain) and not (chooses(chain[-1]) or learns(chain[-1]))
    try:
        planned(chain if plain else (), out, compat=False, overwrite=overwrite, inputs=_inputs(chain))
    except UserError as error:
        errors.append(error)
    from interfuse.engine.wording import together

    raise together(errors)


def _said(record: RunRecord, found: Mapping[str, Any]) -> RunRecord:
    """The record with how the recipe's models or numbers were found, their papers first."""
    return dataclasses.replace(record, **{**found, "papers": (*found.get("papers", ()), *record.papers)})


def _learned(found: Any) -> dict[str, Any]:
    """What training and evaluation gave, nothing where there was neither."""
    return {key: getattr(found, key, None) for key in ("training", "test", "classes", "tasks", "curve", "stitch")}


def _apart(
    chain: Sequence[Recipe], out: str | Path, *, overwrite: bool, resume: bool, dry_run: bool, progress: bool, **how: Any
) -> RunRecord | None:
    """The runs that have ways of their own, of adapters and of transplants from folder to folder; None for all others."""
    output: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run, "progress": progress}
    if merges_adapters(chain):
        return run_adapters(chain[-1], out, resume=resume, **output)
    if chain[-1].fusion == "transplant":
        from interfuse.pipeline.transplanting import copies_files, run_transplant

        if copies_files(chain[-1]):
            return run_transplant(chain[-1], out, **output, **how)
    return None


def _staged_before(recipe: Recipe, out: str | Path, beside: Path | None, trust_code: bool) -> RunRecord | None:
    """The record of stages whose output is in place, of this recipe, its models and its data; else None."""
    if recipe.fusion != "stages" or not (Path(out) / DESCRIPTION).is_file():
        return None
    from interfuse.pipeline.layers import finished

    with code_beside(beside):
        run = finished(recipe, Path(out), trust_code=trust_code)
    return None if run is None else restored(intended(recipe, []), Path(out), run)


def _with_networks(
    recipe: Recipe, folder: Path, beside: Path | None, *, merged: bool, threads: int | None, **how: Any
) -> Any:  # fmt: skip
    """What is done with networks: all of a recipe, or what is left of one whose merge lies in `folder`."""
    from interfuse.pipeline import networks

    if not merged:
        _emptied(folder, STAGES if recipe.fusion == "stages" else "")
    step = networks.evaluate_merged if merged else _step(recipe)
    with networks.settled(recipe.seed, threads), code_beside(beside):
        return step(recipe, folder, **how)


def _emptied(folder: Path, kept: str) -> None:
    """Take away what a run that was killed has left, but for what is kept to go on with."""
    for item in folder.iterdir():
        if item.name != kept:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _step(recipe: Recipe) -> Callable[..., Any]:
    """What runs a recipe of networks."""
    if recipe.form == "layers":
        from interfuse.pipeline.joined import run_joined
        from interfuse.pipeline.layers import run_layers

        return run_layers if recipe.fusion in TARGETED else run_joined
    from interfuse.pipeline.networks import run_networks

    return run_networks


def _with_chosen(
    chain: tuple[Recipe, ...], out: Path, beside: Path | None, **options: Any
) -> tuple[tuple[Recipe, ...], dict[str, Any]]:
    """The recipes, a soup's with the models that its data choose, one of learned coefficients with these; and what the record
    says of how they were found."""
    given: dict[str, Any] = {"inputs": _inputs(chain), "of_files": merges_files(chain), **options}
    if chooses(chain[-1]):
        from interfuse.pipeline.soup import chosen_soup

        with code_beside(beside):
            plain, found = chosen_soup(chain[-1], out, **given)
        return plain, {"soup": found}
    if learns(chain[-1]):
        from interfuse.pipeline.learned import learned_merge

        with code_beside(beside):
            plain, found = learned_merge(chain[-1], out, **given)
        method = method_of(chain[-1])
        return plain, {"coefficients": found, "papers": (method.paper,) if method is not None else ()}
    return chain, {}


@contextmanager
def code_beside(folder: Path | None) -> Iterator[None]:
    """`python:` references also find modules in `folder`, that of the recipe."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def merges_files(chain: Sequence[Recipe]) -> bool:
    """Whether the recipes are merges from file to file, without building a network."""
    names = [recipe.name for recipe in chain]
    if any(recipe.form != "merge" or any(entry.weights is not None for entry in recipe.models) for recipe in chain):
        return False
    paths = [reference.path for recipe in chain for reference in references(recipe)]
    return all(not path.startswith("python:") and (path in names or not is_saved(path)) for path in paths)


def _further(recipe: Recipe, trust_code: bool) -> list[Problem]:
    """What the recipe's form doesn't show: names of types, metrics and losses; code in folders; merges to evaluate."""
    problems = [
        Problem(key, f"got {name!r}", nearest(name, FLOATS))
        for key, name in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype))
        if name is not None and float_named(name) is None
    ]
    if not trust_code:
        problems += _untrusted(recipe)
    named = recipe.training is not None and (recipe.training.metric or recipe.training.loss)
    if named or (recipe.evaluate is not None and recipe.evaluate.metric):
        from interfuse.pipeline.networks import names_problems

        problems += names_problems(recipe)
    tested = recipe.data is not None and recipe.data.test is not None
    key = "test" if tested else "validation"
    evaluated = recipe.data is not None and (recipe.data.test is not None or chooses(recipe))
    if evaluated and recipe.models and merges_files([recipe]):
        reference = Path(recipe.base_model or recipe.models[0].model)
        if not (reference / "config.json").is_file():
            allowed = "name the code: model: python:module:function with weights: FILE"
            problems.append(Problem(f"data.{key}", f"{reference} has no network to evaluate the merge with", allowed))
    if recipe.form == "merge" and not merges_files([recipe]):
        asked = {"tokenizer": recipe.tokenizer, "chat_template": recipe.chat_template}
        asked |= {"tokenizer_source": recipe.tokenizer_source} if recipe.tokenizer_source != "base" else {}
        wrong, allowed = "the models are built by code, and merged without their tokenizers", "give folders, or leave it out"
        problems += [Problem(key, wrong, allowed) for key, value in asked.items() if value is not None]
    return problems


def _untrusted(recipe: Recipe) -> list[Problem]:
    """The folders whose networks are built by code."""
    refs = [(f"models[{i}].model", entry.model) for i, entry in enumerate(recipe.models)]
    refs += recipe.beside.items()
    found = [(path, ref, code_of(ref)) for path, ref in refs]
    return [
        Problem(path, f"{ref} is built by {', '.join(code)}, which runs code", TRUST) for path, ref, code in found if code
    ]  # fmt: skip


def _check_options(seed: int | None, threads: int | None, device: str | None) -> None:
    problems = [
        Problem(name, f"got {value!r}", f"a whole number from {least}")
        for name, value, least in (("seed", seed, 0), ("threads", threads, 1))
        if value is not None and (not isinstance(value, int) or value < least)
    ]
    if device is not None:
        from interfuse.pipeline.networks import check_device

        problems += check_device(device)
    if problems:
        raise OptionError(*problems)


def _inputs(chain: Sequence[Recipe]) -> list[str]:
    """The files and folders that are read, which the output must not replace."""
    refs: list[Any] = []
    for recipe in chain:
        refs += [*(entry.weights for entry in recipe.models), recipe.target]
        refs += [path for reference in references(recipe) for path in (reference.path, reference.lora)]
        refs += [source for _, source in named(recipe)]
    return [str(path) for ref in refs if isinstance(ref, str) and (path := on_disk(ref)) is not None]


def _hashed(recipe: Recipe, hashes: Mapping[str, str], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with their hashes: of the networks as loaded, or as a merge of files found them."""
    found = {part["model"]: part["xxh3"] for part in merged.get("sources", [])}
    models = []
    for name, entry in zip(names_of(recipe), recipe.models, strict=True):
        about = {"name": name, "model": entry.model, "weights": entry.weights}
        models.append(about | {"xxh3": hashes.get(name) or found.get(entry.model)})
    for key, ref in recipe.beside.items():
        name = key.removesuffix("_model")
        models.append({"name": name, "model": ref, "weights": None, "xxh3": hashes.get(f" {name}") or found.get(ref)})
    return {"models": models, "data": hash_data(recipe)}

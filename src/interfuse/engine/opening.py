"""References to checkpoints opened: on this machine, on a hub, behind a URL, an adapter added. No network is built.

What is elsewhere is opened from its headers, and fetched (`fetch`) when a plan has no problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from interfuse.checkpoints.adapters.lora import with_adapter
from interfuse.checkpoints.adapters.pairs import Adapter, open_adapter
from interfuse.checkpoints.config import output_config
from interfuse.checkpoints.remote.headers import free_space_problems, open_store, place_of, side_files
from interfuse.checkpoints.remote.store import RemoteFile, Store
from interfuse.checkpoints.remote.store import fetch as fetch_files
from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.tasks import open_model
from interfuse.checkpoints.tokenizers.embedding import embedding_rows
from interfuse.checkpoints.tokenizers.tokenizer import encode, has_tokenizer, tokenizer_files
from interfuse.errors import CheckpointError, Problem, UserError
from interfuse.plan import Plan, config_of
from interfuse.recipe.references import Reference

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


#: The commit of a model on a hub, by its id and the revision that a recipe gives (None: none).
Commits = Mapping[tuple[str, str | None], str]


def open_references(
    references: Sequence[Reference],
    given: Mapping[str, Checkpoint] | None = None,
    places: Mapping[Reference, str] | None = None,
    commits: Commits | None = None,
) -> dict[Reference, Checkpoint]:
    """Every checkpoint, in order; those `given` by name are taken as they are. What can't be opened is one error.

    `places` are where in a recipe each stands, to be said of a model that isn't there; `commits` which version of a model on
    a hub is meant, whatever its branch has now.
    """
    opened: dict[Reference, Checkpoint] = {}
    problems: list[Problem] = []
    for reference in references:
        try:
            opened[reference] = _open(at_commit(reference, commits or {}), given or {})
        except UserError as error:
            problems += located(error, reference, (places or {}).get(reference)).problems
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return opened


def at_commit(reference: Reference, commits: Commits) -> Reference:
    """The reference with the commits of its model and its adapter, where they are known, as revisions."""
    revision = commits.get((reference.path, reference.revision), reference.revision)
    lora = None if reference.lora is None else commits.get((reference.lora, reference.lora_revision), reference.lora_revision)
    return replace(reference, revision=revision, lora_revision=lora)


def commits_of(sources: Sequence[Mapping[str, Any]], asked: Sequence[Reference]) -> dict[tuple[str, str | None], str]:
    """The commits of models on a hub by what a recipe calls them, from the `sources` of the record of its run.

    `asked` are the recipe's references. A repository that is asked for in several revisions has its commits in their order;
    where their numbers differ, as of a branch and a tag with one commit among three, it's left out.
    """
    parts = [(repo, at) for r in asked for repo, at in ((r.path, r.revision), (r.lora, r.lora_revision)) if repo is not None]
    origins = [origin.rpartition("@") for source in sources for origin in source.get("origins", ()) if "://" not in origin]
    found: dict[tuple[str, str | None], str] = {}
    for repo in dict.fromkeys(repo for repo, _, _ in origins):
        commits = list(dict.fromkeys(commit for name, _, commit in origins if name == repo))
        wanted = list(dict.fromkeys(part for part in parts if part[0] == repo))
        if len(commits) in (1, len(wanted)):
            found |= dict(zip(wanted, commits * (len(wanted) if len(commits) == 1 else 1), strict=True))
    return found


def located(error: UserError, reference: Reference, place: str | None) -> UserError:
    """The error with the recipe's place before what is wrong with a model or adapter as a whole; a file is a place itself."""
    if place is None:
        return error
    whole = [str(reference), reference.path, f"{reference.path}@{reference.revision}"]
    whole += [str(reference.lora), f"{reference.lora}@{reference.lora_revision}"]
    problems = [Problem(place, f"{p.path}: {p.wrong}", p.allowed) if p.path in whole else p for p in error.problems]
    return type(error)(*problems)


def _open(reference: Reference, given: Mapping[str, Checkpoint]) -> Checkpoint:
    plain = given.get(reference.path)
    checkpoint = plain if plain is not None else open_model(reference.path, reference.revision)
    if reference.lora is None:
        return checkpoint
    adapter = _adapter(reference.lora, reference.lora_revision)
    model = with_adapter(checkpoint, adapter)
    return replace(model, beside={**checkpoint.beside, **_beside(checkpoint, model, adapter)})


def _beside(before: Checkpoint, model: Checkpoint, adapter: Adapter) -> dict[str, bytes | None]:
    """What a model with an adapter has otherwise than the model: the adapter's tokenizer, and in its config the rows."""
    files: dict[str, bytes | None] = {}
    theirs = tokenizer_files(adapter.folder)
    if has_tokenizer(theirs):
        fetch_side_files(before)
        mine = tokenizer_files(before.folder) if before.folder else {}
        there = tokenizer_files({name: content for name, content in before.beside.items() if content is not None})
        files |= {**dict.fromkeys([*mine, *there]), **theirs}
    rows, config = (embedding_rows(before.specs), embedding_rows(model.specs)), config_of(before)
    if config is not None and rows[0] is not None and rows[1] is not None and rows[0] != rows[1]:
        files["config.json"] = encode(output_config([config], 0, {}, {}, vocabulary=(rows[0], rows[1]))[0])
    return files


def _adapter(path: str, revision: str | None) -> Adapter:
    where, _ = place_of(path, revision)
    if not isinstance(where, Store):
        return open_adapter(where)
    file = next((name for name in _ADAPTER if name in where.sizes), None)
    if file is None or "adapter_config.json" not in where.sizes:
        raise CheckpointError(Problem(where.name, "holds no LoRA adapter", f"a file is missing: {' or '.join(_ADAPTER)}"))
    where.get(["adapter_config.json", *side_files(where)], False)
    return open_adapter(where.folder, open_store(where, file))


def fetch(plan: Plan, sources: Sequence[Checkpoint], *, shown: bool = True) -> None:
    """Fetch what the plan reads of models that aren't on this machine, and the lead's side files."""
    files = wanted(plan, sources)
    by_store: dict[Store, list[str]] = {}
    for file in files:
        by_store.setdefault(file.store, []).append(file.name)
    problems = free_space_problems(list(by_store.items()))
    if problems:
        raise CheckpointError(*problems)
    fetch_files(files, shown=shown)


def wanted(plan: Plan, sources: Sequence[Checkpoint]) -> list[RemoteFile]:
    """The files elsewhere that the plan takes, fetched or not."""
    read: dict[int, dict[str, None]] = {}
    for output in plan.outputs:
        for source, name in output.reads:
            read.setdefault(source, {})[name] = None
    files = [file for i, names in read.items() for file in sources[i].files(names) if isinstance(file, RemoteFile)]
    lead = sources[plan.lead].store
    return list(dict.fromkeys([*files, *([] if lead is None else map(lead.file, side_files(lead)))]))


def fetch_side_files(checkpoint: Checkpoint) -> None:
    """Fetch config, tokenizer and the like of a model that isn't on this machine, for who reads them in its folder."""
    if checkpoint.store is not None and checkpoint.folder is not None:
        checkpoint.store.get(side_files(checkpoint.store), False)

"""References to checkpoints opened: on this machine, on a hub, behind a URL, an adapter added. No network is built.

What is elsewhere is opened from its headers, and fetched (`fetch`) when a plan has no problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from interfuse.checkpoints.adapters import Adapter, open_adapter
from interfuse.checkpoints.lora import with_adapter
from interfuse.checkpoints.remote import free_space_problems, open_anywhere, open_store, place_of, side_files
from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.store import RemoteFile, Store
from interfuse.checkpoints.store import fetch as fetch_files
from interfuse.errors import CheckpointError, Problem, UserError
from interfuse.plan import Plan
from interfuse.recipe.references import Reference

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def open_references(
    references: Sequence[Reference], given: Mapping[str, Checkpoint] | None = None
) -> dict[Reference, Checkpoint]:
    """Every checkpoint, in order; those `given` by name are taken as they are. What can't be opened is one error."""
    opened: dict[Reference, Checkpoint] = {}
    problems: list[Problem] = []
    for reference in references:
        try:
            opened[reference] = _open(reference, given or {})
        except UserError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return opened


def _open(reference: Reference, given: Mapping[str, Checkpoint]) -> Checkpoint:
    plain = given.get(reference.path)
    checkpoint = plain if plain is not None else open_anywhere(reference.path, reference.revision)
    if reference.lora is None:
        return checkpoint
    return with_adapter(checkpoint, _adapter(reference.lora, reference.lora_revision))


def _adapter(path: str, revision: str | None) -> Adapter:
    where, _ = place_of(path, revision)
    if not isinstance(where, Store):
        return open_adapter(where)
    file = next((name for name in _ADAPTER if name in where.sizes), None)
    if file is None or "adapter_config.json" not in where.sizes:
        raise CheckpointError(Problem(where.name, "holds no LoRA adapter", f"a file is missing: {' or '.join(_ADAPTER)}"))
    where.get(["adapter_config.json"], False)
    return open_adapter(where.folder, open_store(where, file))


def fetch(plan: Plan, sources: Sequence[Checkpoint], *, shown: bool = True) -> None:
    """Fetch what the plan reads of models that aren't on this machine, and the lead's side files."""
    read: dict[int, dict[str, None]] = {}
    for output in plan.outputs:
        for source, name in output.reads:
            read.setdefault(source, {})[name] = None
    files = [file for i, names in read.items() for file in sources[i].files(names) if isinstance(file, RemoteFile)]
    lead = sources[plan.lead].store
    files += [lead.file(name) for name in side_files(lead)] if lead is not None else []
    by_store: dict[Store, list[str]] = {}
    for file in dict.fromkeys(files):
        by_store.setdefault(file.store, []).append(file.name)
    problems = free_space_problems(list(by_store.items()))
    if problems:
        raise CheckpointError(*problems)
    fetch_files(list(dict.fromkeys(files)), shown=shown)


def fetch_side_files(checkpoint: Checkpoint) -> None:
    """Fetch config, tokenizer and the like of a model that isn't on this machine, for who reads them in its folder."""
    if checkpoint.store is not None and checkpoint.folder is not None:
        checkpoint.store.get(side_files(checkpoint.store), False)

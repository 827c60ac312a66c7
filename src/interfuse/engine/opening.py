"""A reference to a checkpoint opened: a local path, a hub id with its revision, an adapter added. No network is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from interfuse.checkpoints.adapters import open_adapter
from interfuse.checkpoints.lora import with_adapter
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.errors import CheckpointError, MissingExtra, Problem, UserError
from interfuse.extras import require
from interfuse.recipe.references import Reference

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_PICKLES = ["*.bin", "*.bin.index.json", "*.pt", "*.pth"]


def open_references(
    references: Sequence[Reference], given: Mapping[str, Checkpoint] | None = None
) -> dict[Reference, Checkpoint]:
    """Every checkpoint, in order; those `given` by name are taken as they are. What can't be opened is one error."""
    opened: dict[Reference, Checkpoint] = {}
    problems: list[Problem] = []
    for reference in references:
        try:
            opened[reference] = _open(reference, given or {})
        except MissingExtra:
            raise
        except UserError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return opened


def _open(reference: Reference, given: Mapping[str, Checkpoint]) -> Checkpoint:
    plain = given.get(reference.path)
    checkpoint = plain if plain is not None else open_checkpoint(local(reference.path, reference.revision))
    if reference.lora is None:
        return checkpoint
    return with_adapter(checkpoint, open_adapter(local(reference.lora, reference.lora_revision)))


def local(path: str, revision: str | None) -> Path:
    """The path on this machine: as it is where something is there, else fetched from the hub into its cache."""
    here = Path(path).expanduser()
    if here.exists() or (revision is None and (path.startswith(("/", ".", "~")) or path.count("/") != 1)):
        return here
    hub = require("huggingface_hub")
    try:
        folder = hub.snapshot_download(path, revision=revision, allow_patterns=_FILES)
        if not any(Path(folder).glob("*.safetensors")):
            folder = hub.snapshot_download(path, revision=revision, allow_patterns=[*_FILES, *_PICKLES])
    except Exception as error:  # what a hub client raises is its own affair
        reason = str(error).strip().partition("\n")[0][:200]
        allowed = "give a folder or file on this machine, or a hub id that exists"
        wrong = f"is no file or folder here, and can't be fetched from the hub ({type(error).__name__}: {reason})"
        raise CheckpointError(Problem(path if revision is None else f"{path}@{revision}", wrong, allowed)) from None
    return Path(folder)

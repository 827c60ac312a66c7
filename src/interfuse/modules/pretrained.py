"""`save_pretrained`, `from_pretrained` and `push_to_hub`, named as `huggingface_hub`'s PyTorchModelHubMixin names them.

The methods are short for `interfuse.save`, `load` and `push_to_hub`, which know how each kind of network is stored. They
stand above this package and are looked up when a method is called. Nothing is stored here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from interfuse.errors import OptionError, Problem

Self = TypeVar("Self", bound="Pretrained")
Patterns = Sequence[str] | str | None


class Pretrained(nn.Module):
    """A network that is saved, loaded and pushed by methods of its own."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        backbones: Literal["reference", "value"] = "reference",
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push: Any,
    ) -> str | None:
        """Save as `interfuse.save` does, with a model card; the folder appears whole or not at all.

        push_to_hub: push it, too, to `repo_id` (left out, the folder's name) with the further options of that method; then
            the commit's address is returned. The rest, and what is raised, is as for `interfuse.save`.
        """
        if push and not push_to_hub:
            raise OptionError(Problem(next(iter(push)), "is an option of a push", "give push_to_hub=True, too"))
        hub = importlib.import_module("interfuse.hub")
        hub.save_pretrained(self, save_directory, backbones=backbones, overwrite=overwrite)
        if not push_to_hub:
            return None
        name = Path(save_directory).name if repo_id is None else repo_id
        return self.push_to_hub(name, backbones=backbones, **push)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        *,
        models: Sequence[nn.Module] | Mapping[str, nn.Module] | nn.Module | None = None,
        head: nn.Module | None = None,
        trust_code: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a folder or a hub id, `owner/name` or `owner/name@revision`, in evaluation mode.

        models, head, trust_code: as for `interfuse.load`: networks that were saved without their code are given again. The
        others are of the hub's client. Raises `CheckpointError` or `ModelError`, also where it is a model of another class.
        """
        hub = importlib.import_module("interfuse.hub")
        return hub.from_pretrained(
            pretrained_model_name_or_path,
            models,
            head=head,
            trust_code=trust_code,
            revision=revision,
            kind=cls,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        backbones: Literal["reference", "value"] = "reference",
        commit_message: str = "Push model using interfuse",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        delete_patterns: Patterns = None,
    ) -> str:
        """Push it to a hub as `interfuse.push_to_hub` does, which says what the options mean and what is raised."""
        return importlib.import_module("interfuse.hub").push_to_hub(
            self,
            repo_id,
            backbones=backbones,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            delete_patterns=delete_patterns,
        )

"""Models on a hub: folders of `save` with a model card, pushed, and loaded again by their id.

What is written and how it's loaded is `saving`'s: safetensors and a description, no pickle and no code; networks that came
as Python objects are given again when it is loaded. This isn't `huggingface_hub`'s `PyTorchModelHubMixin`, a base class that
keeps a network's arguments of `__init__` and calls it again; the methods' names and keywords are its own
(`modules.pretrained`), and its client does the talking.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from torch import nn

from interfuse.checkpoints.remote.hub import fetched
from interfuse.checkpoints.writer import whole_folder
from interfuse.engine.output.card import Made, Use, listed, use_of, write_card
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem
from interfuse.extras import require
from interfuse.registry import find
from interfuse.saving import DESCRIPTION, folders_used, load, write_model

_HERE = "this-folder"
_TOKEN = "set HF_TOKEN, run `hf auth login`, or give token="
Patterns = Sequence[str] | str | None


def save_pretrained(
    model: nn.Module, folder: str | Path, *, backbones: Literal["reference", "value"] = "reference", overwrite: bool = False
) -> Path:
    """What `save` writes, and a model card, README.md; the options and errors are `save`'s."""
    with whole_folder(folder, overwrite=overwrite, inputs=folders_used(model) if backbones == "reference" else ()) as part:
        write_model(model, part, backbones=backbones)
        _write_card(model, part, _HERE)
    return Path(folder)


def from_pretrained(
    ref: str | Path,
    models: Sequence[nn.Module] | Mapping[str, nn.Module] | nn.Module | None = None,
    *,
    head: nn.Module | None = None,
    trust_code: bool = False,
    revision: str | None = None,
    kind: type[nn.Module] = nn.Module,
    **options: Any,
) -> nn.Module:
    """`load` of a folder or hub id, with a revision and the hub client's options (`checkpoints.remote.hub.fetched`).

    kind: what the result must be. Raises `ModelError` where it is something else, and as `load` does.
    """
    folder = Path(ref) if Path(ref).is_dir() else fetched(str(ref), revision=revision, **options)
    model = load(folder, models, head=head, trust_code=trust_code)
    if not isinstance(model, kind):
        found = type(model).__name__
        raise ModelError(Problem(str(ref), f"holds a {found}, not a {kind.__name__}", "interfuse.load takes any of them"))
    return model


def push_to_hub(
    model: nn.Module,
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
    """Push a `ModelFusion`, an `Ensemble` or any network to a hub, with a model card; `load(repo_id)` loads it again.

    repo_id: `owner/name`, or a name of yours; a repository is made where there is none.
    backbones: "value" also stores the weights of members that were loaded from a hub id and haven't changed. Members that
        were loaded from a folder on this machine are always stored, and the folder isn't named.
    private: whether a new repository is; None is what the owner has chosen.
    branch: where it goes, made where there is none. create_pr: as a pull request to the main branch, instead.
    allow_patterns, ignore_patterns: the files that are pushed; `ignore_patterns="README.md"` keeps a card that was edited
        on the hub. delete_patterns: files there that are removed by the same commit.

    Returns the commit's address, with `pr_url`, `oid` and more of huggingface_hub's `CommitInfo`. Raises `ModelError` for a
    model that can't be saved, before anything is pushed, `CheckpointError` where the hub refuses.
    """
    hub = require("huggingface_hub")
    _check(hub, repo_id, branch, create_pr)
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder), backbones=backbones, elsewhere=True)
        _write_card(model, Path(folder), repo_id)
        api = hub.HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(repo, branch=branch, exist_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )
        except Exception as error:  # what a hub's client raises is its own affair
            raise CheckpointError(_refused(repo_id, error)) from error


def _check(hub: ModuleType, repo_id: str, branch: str | None, create_pr: bool) -> None:
    problems = []
    try:
        hub.utils.validate_repo_id(repo_id)
    except hub.utils.HFValidationError:
        problems.append(Problem("repo_id", f"got {repo_id!r}", "owner/name, or a name of yours"))
    if create_pr and branch is not None:
        problems.append(Problem("branch", f"got {branch!r} for a pull request", "one or the other: it has a branch of its own"))
    if problems:
        raise OptionError(*problems)


def _refused(repo_id: str, error: Exception) -> Problem:
    """What a hub's client raised at a push, in our words."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return Problem(repo_id, f"the hub doesn't let you write there ({code or 'no token'})", _TOKEN)
    reason = str(error).strip().partition("\n")[0][:200]
    return Problem(repo_id, f"can't be pushed ({type(error).__name__}: {reason})", "try again, or save it and push the folder")


def _write_card(model: nn.Module, folder: Path, name: str) -> None:
    """The card of a folder that `write_model` wrote; `name` is how it's called where it is loaded."""
    path = folder / DESCRIPTION
    if not path.is_file():  # written by Transformers
        use = use_of(folder)
        write_card(folder, type(model).__name__, [], "", use=use._replace(code=use.code.replace(_HERE, name)))
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    members = about.get("members", [])
    kind, title, recipe, paper = about["kind"], about["class"], "", None
    if kind == "fusion":
        names = ("dim", "pool", "residual")
        given = {"fusion": about["fusion"], "parameters": about["options"] | {name: about[name] for name in names}}
        recipe = _yaml(given | ({"head": about["head"]} if isinstance(about["head"], int) else {}))
        title = f"{about['fusion']} fusion of {listed([member['name'] for member in members])}"
        paper = find(about["fusion"], "features").paper
    elif kind == "ensemble":
        recipe = _yaml({"fusion": "ensemble", "parameters": {"combine": about["combine"]}})
        title = f"ensemble of {listed([member['name'] for member in members])}"
        paper = find("ensemble", "outputs").paper
    folders = [Path(ref) if ref is not None and Path(ref).is_dir() else None for ref in getattr(model, "references", ())]
    made = [
        Made(member["name"], member["reference"] or member["class"], home)
        for member, home in zip(members, folders, strict=False)
    ]
    write_card(folder, title, made, recipe, use=Use("interfuse", _code(about, name)), papers=[paper] if paper else [])


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _code(about: Mapping[str, Any], name: str) -> str:
    """The code that loads the model, with a line for each network that has to be given."""
    if "members" not in about:
        return f'import interfuse as itf\n\nnetwork = ...  # a {about["class"]}\nmodel = itf.load("{name}", network)'
    lines, given = [], []
    for member in about["members"]:
        if member["reference"] is None:
            lines.append(f"{json.dumps(member['name'])}: ...,  # a {member['class']}")
    if lines:
        given.append("models")
    if isinstance(about.get("head"), str):
        given.append("head")
    text = "import interfuse as itf\n\n"
    if lines:
        text += "models = {\n" + "".join(f"    {line}\n" for line in lines) + "}\n"
    if "head" in given:
        text += f"head = ...  # a {about['head']}\n"
    trust = any(str(member["reference"]).startswith("python:") for member in about["members"])
    options = [f"{key}={key}" for key in given] + (["trust_code=True"] if trust else [])
    return text + f"model = itf.load({', '.join([json.dumps(name), *options])})"

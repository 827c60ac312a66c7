"""The model card of an output, README.md as hubs expect it: what it was made from and how, its licence, how to load it.

One writer for merges, mixtures and runs of every level. What isn't known isn't said: only models with a hub id are named as
base models, and a licence stands there if every model has that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from interfuse import __version__
from interfuse.checkpoints.source import Checkpoint
from interfuse.plan import Plan
from interfuse.registry import find

NAME = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = ("license", "license_name", "license_link")
_RECIPE = "## Recipe\n"


class Made(NamedTuple):
    """A model that went into the output: what it was there, what the recipe calls it, and its folder on this machine."""

    role: str
    name: str
    folder: Path | None = None


class Use(NamedTuple):
    """The library that loads a folder, by the name that hubs have for it ("": none), and the code that does."""

    library: str
    code: str


def write_card(
    folder: Path,
    title: str,
    made: Sequence[Made],
    recipe: str,
    *,
    use: Use | None = None,
    papers: Sequence[str] = (),
    quality: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> None:
    """Write the card. `recipe` is YAML, or "" for none; `quality` lines on the model's scores, `use` is `use_of(folder)`'s if
    left out.
    """
    use = use_of(folder) if use is None else use
    parts = [
        f"---\n{yaml.safe_dump(_header(made, use.library, tags), sort_keys=False, allow_unicode=True)}---",
        f"# {title[:1].upper()}{title[1:]}",
        f"Made by interfuse {__version__}{' from:' if made else '.'}",
        "\n".join(f"- {model.role}: `{model.name}`" if model.role else f"- `{model.name}`" for model in made),
        _quality(quality),
        f"{_RECIPE}\n```yaml\n{recipe}```" if recipe else "",
        f"## Use\n\n```python\n{use.code}\n```",
        "\n".join(["## Sources", "", *(f"- {paper}" for paper in papers)]) if papers else "",
    ]
    (folder / NAME).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def write_merge_card(folder: Path, plan: Plan, sources: Sequence[Checkpoint], recipes: Sequence[Mapping[str, Any]]) -> None:
    """The card of a merge of files; `recipes` as in `interfuse.json`."""
    merged = dict.fromkeys(read.source for output in plan.outputs for read in output.inputs)
    bases = dict.fromkeys(output.base.source for output in plan.outputs if output.base is not None)
    made = [Made("" if i in merged else "base", sources[i].name, sources[i].folder) for i in sorted({**bases, **merged})]
    names = [Path(model.name).name for model in made if not model.role]
    text = yaml.safe_dump_all([dict(recipe) for recipe in recipes], sort_keys=False, allow_unicode=True)
    paper = find(plan.method, "weights").paper
    write_card(folder, f"{plan.method} merge of {listed(names)}", made, text, papers=[paper] if paper else [])


def add_quality(folder: Path, quality: Sequence[str]) -> None:
    """Add what was measured to a card that is there."""
    if quality:
        text = (folder / NAME).read_text(encoding="utf-8")
        (folder / NAME).write_text(text.replace(_RECIPE, f"{_quality(quality)}\n\n{_RECIPE}", 1), encoding="utf-8")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _quality(lines: Sequence[str]) -> str:
    return "\n".join(["## Quality", "", *(f"- {line}" for line in lines)]) if lines else ""


def _header(made: Sequence[Made], library: str, tags: Sequence[str]) -> dict[str, Any]:
    """What stands before the text, for hubs: only keys that they know."""
    ids = list(dict.fromkeys(found for model in made for found in _hub_ids(model.name)))
    header: dict[str, Any] = {"base_model": ids, "base_model_relation": "merge"} if ids else {}
    header |= {"library_name": library} if library else {}
    licenses = [_license(model.folder) for model in made]
    if licenses and all(found == licenses[0] for found in licenses):
        header |= licenses[0]
    return header | {"tags": ["merge", "interfuse", *tags]}


def _hub_ids(name: str) -> list[str]:
    """The hub ids in a reference, `org/name@revision+org/adapter`."""
    parts = [part.partition("@")[0] for part in ([] if "://" in name or name.startswith("python:") else name.split("+"))]
    return [part for part in parts if _HUB_ID.fullmatch(part) and not part.startswith(".") and not Path(part).exists()]


def _license(folder: Path | None) -> dict[str, Any]:
    """What a model's own card says of its licence."""
    path = None if folder is None else folder / NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, RecursionError):
        return {}
    return {key: header[key] for key in _LICENSE if key in header} if isinstance(header, dict) else {}


def use_of(folder: Path) -> Use:
    """How a folder is loaded, by what is in it."""
    if (folder / "model_index.json").is_file():
        return Use("diffusers", _code("diffusers", "DiffusionPipeline"))
    if (folder / "modules.json").is_file():
        load = 'SentenceTransformer("this-folder")'
        return Use("sentence-transformers", f"from sentence_transformers import SentenceTransformer\n\nmodel = {load}")
    config = _config(folder)
    if isinstance(config.get("_class_name"), str):
        return Use("diffusers", _code("diffusers", config["_class_name"]))
    names = config.get("architectures")
    if "auto_map" in config and isinstance(config.get("model_type"), str):
        return Use("transformers", _code("transformers", "AutoModel", ", trust_remote_code=True"))
    if isinstance(config.get("model_type"), str):
        name = names[0] if isinstance(names, list) and names and str(names[0]).isidentifier() else "AutoModel"
        return Use("transformers", _code("transformers", name))
    files = sorted(item.name for item in folder.glob("*.safetensors")) or ["model.safetensors"]
    return Use("", f'from safetensors.torch import load_file\n\nstate = load_file("this-folder/{files[0]}")')


def _code(library: str, name: str, more: str = "") -> str:
    return f'from {library} import {name}\n\nmodel = {name}.from_pretrained("this-folder"{more})'


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}

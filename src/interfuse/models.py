"""Load a network by name: a Transformers folder or hub id, or a function of the user's that builds one.

Weights alone are no network: a `.safetensors` or `.pt` file of tensors needs the code that it belongs to, which a
`python:` reference names. Code is only run when the caller trusts it. Folders that `interfuse.save` wrote are loaded by
`interfuse.load`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interfuse.checkpoints.source import open_checkpoint
from interfuse.checkpoints.tensors import to_tensor
from interfuse.errors import CheckpointError, ModelError, Problem
from interfuse.extras import require

CODE = "python:"


def load_model(ref: str, *, weights: str | Path | None = None, trust_code: bool = False) -> nn.Module:
    """The network that `ref` names, in evaluation mode.

    ref: a folder with a Transformers `config.json`, a hub id (`name/model` or `name/model@revision`), or
        `python:package.module:function`, a function without arguments that returns an `nn.Module`; this runs code, and
        needs `trust_code`.
    weights: a file or folder of tensors to fill the network with; names and shapes must match exactly.
    """
    if ref.startswith(CODE):
        made = call_reference(ref, trust_code=trust_code)
        if not isinstance(made, nn.Module):
            raise ModelError(Problem(ref, f"returned {type(made).__name__}", "a function that returns a torch.nn.Module"))
        network = made
    else:
        network = _from_transformers(ref)
    if weights is not None:
        fill(network, weights)
    return network.eval()


def load_tokenizer(ref: str) -> Any:
    """The tokenizer that lies with the network `ref`, or None where there is none."""
    if ref.startswith(CODE):
        return None
    name, revision = _split(ref)
    folder = Path(name)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if folder.exists() and not any((folder / file).exists() for file in files):
        return None
    return require("transformers").AutoTokenizer.from_pretrained(name, **revision)


def call_reference(ref: str, *, trust_code: bool) -> Any:
    """What the function named by `python:package.module:function` returns; refused unless its code is trusted."""
    if not trust_code:
        raise ModelError(Problem(ref, "this runs code", "give --trust-code (trust_code=True) if you trust it"))
    return _function(ref)()


def _function(ref: str) -> Callable[[], Any]:
    module, separator, name = ref.removeprefix(CODE).partition(":")
    if not separator or not module or not name:
        raise ModelError(Problem(ref, "isn't python:package.module:function", "name a module and a function in it"))
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # a module beside the recipe, as `python -m` finds it
    try:
        function: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(Problem(ref, f"no module named {error.name!r}", "install it, or run from its folder")) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ModelError(Problem(ref, f"{module} has no function {name!r}", "name a function without arguments"))
    return function


def _split(ref: str) -> tuple[str, dict[str, str]]:
    name, _, revision = ref.partition("@") if not Path(ref).exists() else (ref, "", "")
    return name, {"revision": revision} if revision else {}


def _from_transformers(ref: str) -> nn.Module:
    path, (name, revision) = Path(ref), _split(ref)
    if path.is_file():
        allowed = "name the code that builds the network, python:package.module:function, and give this file as `weights`"
        raise ModelError(Problem(ref, "is a file of weights without the network's code", allowed))
    if path.is_dir() and not (path / "config.json").exists():
        allowed = "a folder written by save_pretrained or interfuse.save, a hub id, or python:package.module:function"
        raise ModelError(Problem(ref, "has no config.json", allowed))
    if not path.exists() and (ref.startswith((".", "/", "~")) or ref.count("/") > 1):
        raise ModelError(Problem(ref, "no such folder", "a folder, a hub id, or python:package.module:function"))
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name, **revision)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, architecture, None) or transformers.AutoModel
        network: nn.Module = kind.from_pretrained(name, dtype=torch.float32, **revision)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        allowed = "a folder or hub id that Transformers can load (is the hub reachable?)"
        raise ModelError(Problem(ref, str(error).partition("\n")[0], allowed)) from error
    return network


def fill(network: nn.Module, weights: str | Path) -> None:
    """Copy the tensors of a checkpoint into `network`; every name and shape must match, or nothing is copied."""
    checkpoint = open_checkpoint(weights)
    problems = []
    state = network.state_dict()
    for name, tensor in state.items():
        if name not in checkpoint.specs:
            problems.append(Problem(f"{weights}: {name}", "missing", f"the network needs it, shape {tuple(tensor.shape)}"))
        elif tuple(checkpoint.specs[name].shape) != tuple(tensor.shape):
            problems.append(
                Problem(f"{weights}: {name}", f"shape {tuple(checkpoint.specs[name].shape)}", f"{tuple(tensor.shape)}")
            )
    problems += [Problem(f"{weights}: {name}", "not in the network", "") for name in checkpoint.specs if name not in state]
    if problems:
        raise CheckpointError(*problems)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(to_tensor(checkpoint.read(name), checkpoint.specs[name].dtype))

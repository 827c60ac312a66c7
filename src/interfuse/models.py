"""Load a network by name: a Transformers folder or hub id, or a function of the user's that builds one.

Weights alone are no network: a `.safetensors` or `.pt` file of tensors needs the code that it belongs to, which a
`python:` reference names. Code is only run when the caller trusts it. Folders that `interfuse.save` wrote are loaded by
`interfuse.load`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.checkpoints.merged import MERGED, is_merge
from interfuse.checkpoints.source import open_checkpoint
from interfuse.checkpoints.tasks import config_folder, open_task, split_task
from interfuse.checkpoints.tensors import to_tensor
from interfuse.errors import CheckpointError, ModelError, Problem
from interfuse.extras import require

CODE = "python:"
_ENDLESS = 10**9  # tokens; a tokenizer that knows no greatest length says 10**30


def load_model(ref: str, *, weights: str | Path | None = None, trust_code: bool = False, exactly: bool = False) -> nn.Module:
    """The network that `ref` names, in evaluation mode.

    ref: a folder with a Transformers `config.json`, `folder#task` for a task of a merge that has one for each, a hub
        id (`name/model` or `name/model@revision`), or `python:package.module:function`, a function without arguments that
        returns an `nn.Module`; this runs code, and needs `trust_code`.
    weights: a file or folder of tensors to fill the network with; names and shapes must match exactly.
    exactly: keep the tensors' types as they're stored, half precision too; else they become float32.

    Raises `ModelError` for a reference that gives no network, `CheckpointError` for weights that don't fit.
    """
    if ref.startswith(CODE):
        made = call_reference(ref, trust_code=trust_code)
        if not isinstance(made, nn.Module):
            raise ModelError(Problem(ref, f"returned {type(made).__name__}", "a function that returns a torch.nn.Module"))
        network = made
    elif (task := split_task(ref)) is not None:
        own = config_folder(*task)
        network = _from_transformers(str(task[0]), exactly) if own is None else _of_config(str(own))
        weights = ref if weights is None else weights
    else:
        network = _from_transformers(ref, exactly)
    if weights is not None:
        fill(network, weights, exactly=exactly)
    if is_merge(ref if weights is None else weights):
        network.__dict__[MERGED] = True
    return network.eval()


def load_tokenizer(ref: str) -> Any:
    """The tokenizer that lies with the network `ref`, or None where there is none."""
    if ref.startswith(CODE):
        return None
    ref = str(task[0]) if (task := split_task(ref)) is not None else ref
    name, revision = _split(ref)
    folder = Path(name)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if folder.exists() and not any((folder / file).exists() for file in files):
        return None
    transformers = require("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **revision)
    if tokenizer.model_max_length > _ENDLESS:  # it doesn't say how much the network reads
        config = transformers.AutoConfig.from_pretrained(name, **revision)
        places = getattr(config, "max_position_embeddings", None)
        if places:
            tokenizer.model_max_length = places - 2  # two are kept from texts by networks whose places start after padding
    return tokenizer


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


def _from_transformers(ref: str, exactly: bool) -> nn.Module:
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
        dtype = "auto" if exactly else torch.float32
        with without_bar(transformers, path.is_dir()):
            network, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **revision)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        lead = "" if path.exists() else "no such folder here, and as a hub id: "
        wrong, allowed = str(error).partition("\n")[0].rstrip("."), "a folder or hub id that Transformers can load"
        raise ModelError(Problem(ref, lead + wrong, f"{allowed} (is the hub reachable?)")) from error
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would leave them at random values
        raise ModelError(*(Problem(f"{ref}: {key}", "missing", f"the {kind.__name__} needs it") for key in missing))
    return network


def _of_config(ref: str) -> nn.Module:
    """A network of a folder's config, its weights to be filled in."""
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(ref)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, architecture, None)
        made: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        wrong = str(error).partition("\n")[0].rstrip(".")
        raise ModelError(Problem(ref, wrong, "a config that Transformers knows")) from error
    return made


@contextmanager
def without_bar(transformers: Any, local: bool = True) -> Iterator[None]:
    """No progress bar for files on this disk, which load in a moment; a download has one."""
    logging = transformers.utils.logging
    shown = local and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fill(network: nn.Module, weights: str | Path, *, exactly: bool = False) -> None:
    """Copy the tensors of a checkpoint into `network`; every name and shape must match, or nothing is copied.

    Of tensors that are tied in the network one is enough. exactly: the network takes on the tensors' types, too.
    """
    checkpoint = open_checkpoint(weights) if (task := split_task(weights)) is None else open_task(*task)
    state = network.state_dict()
    there = {place(tensor) for name, tensor in state.items() if name in checkpoint.specs}
    problems = []
    for name, tensor in state.items():
        if name not in checkpoint.specs:
            if place(tensor) not in there:
                problems.append(Problem(f"{weights}: {name}", "missing", f"the network needs it, shape {tuple(tensor.shape)}"))
        elif checkpoint.specs[name].shape != tuple(tensor.shape):
            wrong = f"shape {checkpoint.specs[name].shape}"
            problems.append(Problem(f"{weights}: {name}", wrong, f"the network has {tuple(tensor.shape)}"))
    allowed = "give the network that these weights are of"
    problems += [Problem(f"{weights}: {name}", "not in the network", allowed) for name in checkpoint.specs if name not in state]
    if problems:
        raise CheckpointError(*problems)
    for name, tensor in state.items():
        if name in checkpoint.specs:
            value = to_tensor(checkpoint.read(name).copy(), checkpoint.specs[name].dtype)
            put(network, name, value if exactly else value.to(tensor.dtype))


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: the same for tensors that are tied."""
    start = tensor.data_ptr() if tensor.numel() else id(tensor)  # what is empty lies nowhere
    return tensor.device, start, tensor.dtype, tensor.shape, tensor.stride()


def put(network: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer to `value`, bit for bit; its object stays, and so does what is tied to it."""
    path, _, key = name.rpartition(".")
    module = network.get_submodule(path)
    target = module._parameters.get(key) if key in module._parameters else module._buffers[key]
    assert target is not None
    if target.dtype == value.dtype:
        with torch.no_grad():
            target.copy_(value)
    else:
        target.data = value.to(target.device)

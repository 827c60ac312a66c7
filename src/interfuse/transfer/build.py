"""`build`: a fresh network of the same structure as another, for where there is no target to transplant into.

Structure is copied, values are drawn anew as each part draws its own. Not a way to change a structure: `grow` is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, Problem
from interfuse.extras import require


def build(source: nn.Module | str | Path, *, seed: int = 0) -> nn.Module:
    """A network of the structure of `source`, which is unchanged, with parameters and buffers as before any training.

    source: a module, or a folder with a Transformers `config.json`, of which no weights are read. A Transformers model is
    made from its config; any other is copied, and each part's `reset_parameters` called, so that what is tied stays tied.
    Constants (buffers of whole numbers, and those that a state dict leaves out) are the source's. The seed is that of all
    values; torch's own random state is left alone. Raises `ModelError` with every part that has other values of its own and
    no way to reset them.
    """
    if not isinstance(source, nn.Module | str | Path):
        raise ModelError(Problem("source", f"got a {type(source).__name__}", "a module, or a folder of Transformers"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(source, (str, Path)):
            return _of_folder(Path(source))
        if _is_transformers(source):
            fresh = type(source)(copy.deepcopy(source.config))
            return fresh.train(source.training)
        return _reset(source)


def _is_transformers(source: nn.Module) -> bool:
    """Whether it's a model of that library's, which is made from a config alone."""
    return any(kind.__module__ == "transformers.modeling_utils" for kind in type(source).__mro__)


def _of_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ModelError(Problem(str(folder), "has no config.json", "give a module, or a folder of Transformers"))
    transformers = require("transformers")
    config = transformers.AutoConfig.from_pretrained(str(folder))
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def _reset(source: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(source)
    resets = {path: _way(module) for path, module in fresh.named_modules()}
    covered = {id(tensor) for path, reset in resets.items() if reset for tensor in _values(fresh.get_submodule(path), True)}
    problems = [
        Problem(
            path or "source",
            f"{type(module).__name__} has values of its own and no reset_parameters",
            "give it one, or build the network by its own code",
        )
        for path, module in fresh.named_modules()
        if any(id(tensor) not in covered for tensor in _learned(module))
    ]
    if problems:
        raise ModelError(*problems)
    with torch.no_grad():
        for reset in reversed(list(resets.values())):  # a whole has the last word on its parts
            if reset is not None:
                reset()
    return fresh


def _way(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _values(module: nn.Module, recurse: bool) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _learned(module: nn.Module) -> list[Tensor]:
    """A module's own values that aren't constants: a buffer of whole numbers, or one that is no part of its state, is one."""
    kept = [b for key, b in module._buffers.items() if b is not None and key not in module._non_persistent_buffers_set]
    return [*module.parameters(False), *(buffer for buffer in kept if buffer.is_floating_point() or buffer.is_complex())]

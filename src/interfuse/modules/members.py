"""The networks that a composite is made of: named, checked, and copied so that fusing never changes the originals."""

from __future__ import annotations

import copy as copying
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from interfuse.errors import ModelError, Problem
from interfuse.models import load_model


def members(
    models: Sequence[nn.Module | str] | Mapping[str, nn.Module | str], *, copy: bool
) -> tuple[tuple[str, ...], nn.ModuleList, tuple[str | None, ...]]:
    """(names, networks, references) of what the user gave: networks, or paths and hub ids to load.

    Names of a list are the class names, made unique (`ResNet`, `ResNet_2`). A reference is the path or hub id that a
    network was loaded from, else None. With `copy`, networks are deep copies, parameters and all.
    """
    if isinstance(models, str) or not isinstance(models, Mapping | Sequence):
        raise ModelError(Problem("models", f"got {type(models).__name__}", "a list or a dict of networks"))
    given = dict(models) if isinstance(models, Mapping) else None
    entries: list[Any] = list(given.values()) if given is not None else list(models)
    if not entries:
        raise ModelError(Problem("models", "none given", "give at least one network"))
    problems = [
        Problem(f"models[{key!r}]", f"got {type(entry).__name__}", "a torch.nn.Module, or a path or hub id to load one from")
        for key, entry in zip(given or range(len(entries)), entries, strict=True)
        if not isinstance(entry, nn.Module | str)
    ]
    if problems:
        raise ModelError(*problems)
    references = tuple(entry if isinstance(entry, str) else None for entry in entries)
    networks = [load_model(e) if isinstance(e, str) else _copied(e, i) if copy else e for i, e in enumerate(entries)]
    names = tuple(map(str, given)) if given is not None else unique_names(networks)
    return names, nn.ModuleList(networks), references


def unique_names(networks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Class names, numbered from the second of a kind on."""
    names: list[str] = []
    for network in networks:
        base = type(network).__name__
        free = (f"{base}_{number}" for number in itertools.count(2))
        names.append(base if base not in names else next(name for name in free if name not in names))
    return tuple(names)


def _copied(network: nn.Module, index: int) -> Any:
    try:
        return copying.deepcopy(network)
    except Exception as error:  # deepcopy runs the network's own code, which may raise anything
        wrong = f"{type(network).__name__} can't be copied ({error})"
        raise ModelError(Problem(f"models[{index}]", wrong, "give copy=False to use the network itself")) from error

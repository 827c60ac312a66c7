"""What a layout is made of: slots, the groups that they share, and the headers that it's read from. No logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from interfuse.checkpoints.header import TensorSpec
from interfuse.errors import Problem
from interfuse.recipe.references import Reference
from interfuse.recipe.values import Scopes


class Header(NamedTuple):
    """What is known of a model before it's read: its tensors, and its config.json if it has one."""

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """What the tensors of one piece of a recipe have in common.

    `scopes` are the parameters of each source, and `shared` those that hold for all of them. `base_at` says which of the
    sources is the base, if one is. What is `copied` isn't merged: it has one source and is taken as it is.
    """

    path: str
    sources: tuple[Reference, ...]
    scopes: tuple[Scopes, ...]
    shared: Scopes
    base: Reference | None = None
    base_at: int | None = None
    copied: bool = False


class Slot(NamedTuple):
    """An output tensor: its name in each of the group's `sources`, in the `base` (None without one), and its depth.

    A source's parameters are read with the name there, `group.scopes[i].resolve(option, names[i], t)`; those that hold for
    all sources with the output's, `group.shared.resolve(option, name, t)`.
    """

    name: str
    group: Group
    names: tuple[str, ...]
    base: str | None
    t: float


@dataclass(frozen=True)
class Layout:
    """All output tensors in order; what is wrong; what should be said. `layers` has for each stack of the output, by
    the name before its numbers, where each layer comes from: a model (the base, else the first source) and its layer."""

    slots: tuple[Slot, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    layers: Mapping[str, tuple[tuple[Reference, int], ...]]


def copied(reference: Reference) -> Group:
    """The group of tensors that are taken from one model as they are."""
    return Group("keep", (reference,), (Scopes(),), Scopes(), copied=True)

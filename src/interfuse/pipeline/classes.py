"""Class names in runs of outputs: each model's own, joined by name, and the data's class numbers in the order of the joined.

Names are those of the recipe's `parameters.classes`; left out, those that every model says itself: a Transformers config's
`id2label`, or the classes that an earlier run recorded. Nothing is trained or written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from interfuse.data import Data
from interfuse.ensemble.combine import Labels
from interfuse.pipeline.finished import classes_of, description
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.outputs import written_classes


@dataclass(frozen=True)
class Spaces:
    """The models' class names. `own`: each model's, None where they are all the same and not written in the recipe;
    `joined`: the result's, None where they aren't known; `note`: what was found out, for the record. `said`: what the
    networks in a fusion of features say, whose head is learned in the data's own classes."""

    own: dict[str, tuple[str, ...]] | None = None
    joined: tuple[str, ...] | None = None
    note: str = ""
    said: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def arrange(self, data: Data) -> Data:
        """The data with its classes as the networks in a fusion have them, where all that know just these agree."""
        orders = list(dict.fromkeys(space for space in self.said.values() if set(space) == set(data.classes or ())))
        return data.named(orders[0]) if len(orders) == 1 else data

    def otherwise(self, data: Data) -> list[str]:
        """The networks that know just the data's classes, and have them in another order."""
        return [n for n, space in self.said.items() if set(space) == set(data.classes or ()) and space != data.classes]

    def order(self, data: Data) -> Data:
        """The data with its class numbers in the joined order; a `DataError` for a class that is in no model.

        Where the names are only what all models say alike, data with other names keep their own order.
        """
        if self.joined is None or data.classes is None:
            return data
        if self.own is None and not all(name in self.joined for name in data.classes):
            return data
        return data.named(self.joined)


#: No names are known.
UNNAMED = Spaces()


def spaces_of(recipe: Recipe, networks: Mapping[str, nn.Module]) -> Spaces:
    """The class names of an ensemble's members, a student's teachers, the networks in a fusion, or a network alone."""
    names = names_of(recipe)
    written = written_classes(recipe, names)
    if written is not None:
        return Spaces(written, Labels.join(list(written.values())).names)
    if recipe.form == "single":
        return space_of(recipe.models[0].model, networks[names[0]])
    if recipe.form not in ("ensemble", "distill", "fusion"):
        return UNNAMED
    said = {name: _said(entry.model, networks[name]) for name, entry in zip(names, recipe.models, strict=True)}
    own = {name: space for name, space in said.items() if space is not None}
    if recipe.form == "fusion":
        return Spaces(said=own)
    if len(own) < len(names):
        return UNNAMED
    joined = Labels.join(list(own.values())).names
    assert joined is not None
    if len(dict.fromkeys(own.values())) == 1:
        return Spaces(None, joined)
    return Spaces(own, joined, f"the models' classes are joined by the names that they have themselves: {', '.join(joined)}")


def space_of(reference: str, network: nn.Module) -> Spaces:
    """The class names that one network says it has."""
    return Spaces(None, _said(reference, network))


def _said(reference: str, network: nn.Module) -> tuple[str, ...] | None:
    """What a network says its classes are called, in the order of its outputs; None for numbers, which are no names."""
    recorded = classes_of(reference) or description(reference).get("run", {}).get("classes")
    config = getattr(network, "config", None)
    labels = getattr(config, "id2label", None)
    if recorded:
        found = [str(name) for name in recorded]
    elif isinstance(labels, Mapping):
        found = [str(labels[key]) for key in sorted(labels, key=int)]
    else:
        return None
    plain = all(re.fullmatch(r"(LABEL_)?\d+", name) for name in found)
    return None if plain or len(dict.fromkeys(found)) < len(found) else tuple(found)


def say_classes(network: nn.Module, classes: tuple[str, ...] | None) -> None:
    """Give a Transformers network the names of its classes, where it has as many and knows none."""
    config: Any = getattr(network, "config", None)
    labels = getattr(config, "id2label", None)
    if classes is None or not isinstance(labels, Mapping) or len(labels) != len(classes) or _said("", network) is not None:
        return
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}

"""Cross-stitched networks in a run: joined on examples of the training data. What joins them is `modules.cross_stitch`'s."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from interfuse.data import Data
from interfuse.modules.cross_stitch import CrossStitch
from interfuse.modules.inputs import split_batch
from interfuse.recipe import Recipe
from interfuse.recipe.check import options_of
from interfuse.recipe.crossing import places_of


def crossed(recipe: Recipe, networks: Mapping[str, nn.Module], data: Data, classes: int) -> CrossStitch:
    """The recipe's networks side by side, not yet trained; a head for all has `classes` outputs."""
    options = options_of(recipe)
    loader = data.loader(min(options["examples"], len(data)), shuffle=True, seed=recipe.seed)
    inputs, _ = split_batch(next(iter(loader)))
    return CrossStitch(
        networks,
        places_of(options["at"], list(networks)),
        inputs,
        own=options["own"],
        per=options["per"],
        freeze=recipe.models[0].freeze is not False,
        head=classes if options["heads"] == "shared" else None,
        copy=False,
    )

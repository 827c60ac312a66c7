"""Where in its network a tensor stands, read off the names alone: in which layer of which stack, or before or after all.

A stack is what stands before a number that counts up: `model.layers.` in `model.layers.3.mlp.up_proj.weight`. Of nested
numbers (experts in layers, blocks in stages) the outermost that repeats counts the layers. No architecture is known here,
and nothing is said of what a tensor does; the rule for tensors outside all stacks is in `side`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Side = Literal["before", "after"]

#: What stands before a layer's number, where there may be only one layer.
_LAYER_WORDS = ("layers", "layer", "h", "blocks", "block", "resblocks", "stages", "stage")
#: Parts of a name that put it after the layers, whatever else is in it.
_AFTER = (
    *("lm_head", "head", "heads", "classifier", "score", "pooler", "cls", "fc", "embed_out", "qa_outputs", "predictions"),
    *("output", "output_layer", "output_projection", "text_projection", "visual_projection", "proj_out", "project_out"),
    *("logit_scale", "logit_bias", "summary", "vocab_projector", "vocab_transform", "vocab_layer_norm", "pre_classifier"),
    *("out_proj", "dense_head", "seq_relationship", "last_linear", "bn2", "conv_norm_out", "conv_out"),
)
#: Pieces of a part that put a name before the layers, unless one of the parts above is in it.
_BEFORE = (
    *("embed", "patch", "stem", "position", "pos_", "token", "wte", "wpe", "emb_", "pre_", "ln_pre", "norm_pre", "conv1"),
    *("bn1",),
)
#: Pieces of a part that put a name after the layers, unless one of those before it has put it elsewhere.
_NORMS = ("norm", "ln_")
#: A level of numbers below one of these isn't a stack: a head of two Linear layers, a list of embeddings.
_NO_STACK = (*_AFTER, "stem", "embeddings", "embedding", "embed_tokens", "lm_heads", "conv_stem")
#: Keys of a config that count layers.
LAYER_KEYS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"),
    *("num_encoder_layers", "depth", "n_blocks", "num_blocks"),
)

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
#: `layer1.0`, a stage whose number is part of its name, with no number before it.
_GLUED = re.compile(r"^(?:(?!\d+\.)[^.]*\.)*?[A-Za-z_]+?(\d+)(?=\.\d+(?:\.|$))")


@dataclass(frozen=True)
class Stack:
    """Layers that are counted up. `head` is what stands before the number, `numbers` those that occur, in order."""

    head: str
    numbers: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many layers."""
        return len(self.numbers)

    @property
    def consecutive(self) -> bool:
        """Whether no number is skipped, as in a Sequential with activations between its layers."""
        return self.numbers[-1] - self.numbers[0] + 1 == len(self.numbers)

    def name(self, layer: int, tail: str) -> str:
        """The name of a tensor in the layer of that index, from 0."""
        return f"{self.head}{self.numbers[0] + layer}{tail}"

    def __str__(self) -> str:
        return self.head.rstrip(".") or "(top)"


class Place(NamedTuple):
    """A tensor's place: in layer `layer`, from 0, of `stack`, where its name ends in `tail`; or on a `side` of all layers."""

    stack: Stack | None
    layer: int
    tail: str
    side: Side | None

    def depth(self, *, compat: bool = False) -> float:
        """How deep it stands, in [0, 1]: layer/(layers-1), and 1 in a single layer; 0 before all layers, and 1 after.

        `compat` gives 0 after the layers, as mergekit does.
        """
        if self.stack is None:
            return 1.0 if self.side == "after" and not compat else 0.0
        return self.layer / (self.stack.count - 1) if self.stack.count > 1 else 1.0


_NOWHERE = Place(None, 0, "", None)


@dataclass(frozen=True)
class Layers:
    """The place of every tensor, in the names' order, and the stacks in the order of their first tensors.

    `tails` has for each stack's head, layer by layer, what a name ends in there -> the name.
    """

    places: Mapping[str, Place]
    stacks: tuple[Stack, ...]
    tails: Mapping[str, tuple[Mapping[str, str], ...]] = field(repr=False)


def find_layers(names: Iterable[str]) -> Layers:
    """The stacks of layers in these names, and where each name stands. Linear in the names' length."""
    places: dict[str, Place] = dict.fromkeys(names, _NOWHERE)
    tails: dict[str, list[dict[str, str]]] = {}
    stacks: dict[str, Stack] = {}
    waiting: dict[str, int] = dict.fromkeys(places, 0)  # where to look on for a number; those in no stack yet
    pattern = _GLUED
    while waiting:
        found = {name: m for name, start in waiting.items() if (m := pattern.search(name, start))}
        numbers: dict[str, set[int]] = {}
        for name, m in found.items():
            numbers.setdefault(name[: m.start(1)], set()).add(int(m[1]))
        ranks = {head: {n: i for i, n in enumerate(sorted(ns))} for head, ns in numbers.items() if _is_stack(head, ns)}
        stacks |= {head: Stack(head, tuple(ranks[head])) for head in ranks}
        tails |= {head: [{} for _ in ranks[head]] for head in ranks}
        waiting = waiting if pattern is _GLUED else {name: m.end() for name, m in found.items()}
        for name, m in found.items():
            head = name[: m.start(1)]
            if head in ranks:
                layer, tail = ranks[head][int(m[1])], name[m.end(1) :]
                places[name] = Place(stacks[head], layer, tail, None)
                tails[head][layer][tail] = name
                del waiting[name]
        pattern = _NUMBER
    for name, place in places.items():
        if place is _NOWHERE:
            places[name] = Place(None, 0, name, side(name))
    order = dict.fromkeys(place.stack.head for place in places.values() if place.stack is not None)
    return Layers(places, tuple(stacks[head] for head in order), {head: tuple(tails[head]) for head in order})


def side(name: str) -> Side:
    """On which side of all layers a tensor outside them stands: stored order means nothing, so its name says it.

    After: a part of the name is a head's (`lm_head`, `classifier`, `pooler`, `fc`, ...), or ends in `_head`. Else
    before: a part has an embedding's or stem's piece in it (`embed`, `patch`, `stem`, `position`, `token`, `wte`, ...).
    Else after: a part is a norm's (`norm`, `ln_f`). Everything else is before.
    """
    parts = name.lower().split(".")
    if any(part in _AFTER or part.endswith("_head") for part in parts):
        return "after"
    if any(piece in part for part in parts for piece in _BEFORE):
        return "before"
    return "after" if any(piece in part for part in parts for piece in _NORMS) else "before"


def config_counts(config: Mapping[str, Any] | None) -> dict[tuple[str, ...], int]:
    """Every count of layers in a config, by the keys that lead to it, sections like `text_config` included."""
    found: dict[tuple[str, ...], int] = {}
    for key, value in (config or {}).items():
        if key in LAYER_KEYS and type(value) is int:
            found[key,] = value
        elif key.endswith("config") and isinstance(value, Mapping):
            found |= {(key, *path): count for path, count in config_counts(value).items()}
    return found


def _is_stack(head: str, numbers: set[int]) -> bool:
    words = head.lower().rstrip(".").split(".")
    if any(word in _NO_STACK or word.endswith("_head") for word in words):
        return False
    if head and not head.endswith("."):  # glued to a word: only where it counts up from 0 or 1
        return len(numbers) > 1 and min(numbers) < 2 and max(numbers) - min(numbers) + 1 == len(numbers)
    return 0 in numbers and (len(numbers) > 1 or words[-1] in _LAYER_WORDS)

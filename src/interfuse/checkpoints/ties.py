"""Tied weights: one table under several names, of which a file may hold one or all.

An output layer that is tied to the embedding is in one model's file and not in another's. Which names are tied is read off
the config and off how embeddings and output layers are called; a value is never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interfuse.checkpoints.header import TensorSpec

_TABLES = ("shared.weight", "embed_tokens.weight", "word_embeddings.weight", "wte.weight", "tok_embeddings.weight")
_OUTPUTS = ("lm_head.weight", "predictions.decoder.weight", "lm_head.decoder.weight", "embed_out.weight")


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a config ties output and embedding; `transformers` does where the config says nothing."""
    if not config:
        return False
    sections = (config, config.get("text_config"), config.get("decoder"))
    said = [s["tie_word_embeddings"] for s in sections if isinstance(s, Mapping) and "tie_word_embeddings" in s]
    return bool(said[0]) if said else "model_type" in config


def tie(
    names: Mapping[str, str], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, wanted: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """`names` (wanted name -> name in `specs`) with tied tables under the names that are wanted, and what was done.

    A table that is wanted and missing is read from the one that the model has; one that isn't wanted is left out where the
    wanted ones hold the same. Embeddings that are there twice (`shared`, `encoder.embed_tokens`) are always tied, outputs
    where the config says so.
    """
    found = dict(names)
    notes: list[str] = []
    tied = (*_TABLES, *_OUTPUTS) if is_tied(config) else _TABLES
    if not config:
        return found, notes
    for name in wanted:
        if name not in names and name.endswith(tied):
            source = _table(names, specs)
            if source is not None:
                found[name] = names[source]
                notes.append(f"{name!r} is tied to {source!r} and read from there")
    for name in names:
        if name not in wanted and name.endswith(tied) and _table(dict.fromkeys(wanted, ""), {}) not in (None, name):
            del found[name]
            notes.append(f"{name!r} is tied to the embedding and left out")
    return found, notes


def _table(names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> str | None:
    """The embedding of tokens, or None where there is none or which one isn't clear."""
    for ending in _TABLES:
        found = [name for name in names if name.endswith(ending)]
        shapes = dict.fromkeys(specs[names[name]].shape for name in found if names[name] in specs)
        if found and len(shapes) < 2:
            return found[0]
    return None

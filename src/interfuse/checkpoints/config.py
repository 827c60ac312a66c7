"""The output's config.json: the number of layers, every list with an entry a layer, the vocabulary, the type of numbers.

Pure: mappings in, a new mapping out, and notes on what was changed or couldn't be. A config's keys are told by their names
and values; no architecture is known here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from interfuse.checkpoints.layers import LAYER_KEYS, config_counts
from interfuse.errors import Problem

Config = Mapping[str, Any]
Picks = Sequence[tuple[int, int]]

#: Lists of which layers are of a kind, by their numbers, not of an entry for each layer.
_NUMBERS_OF_LAYERS = (
    *("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layers", "full_attn_idxs", "attn_layer_idxs"),
    *("attn_layer_indices", "global_layers", "sparse_layers", "dense_layers"),
)
#: Numbers that say which layers are of a kind by counting, which other layers in another order don't follow.
_COUNTED_FROM_THE_TOP = (
    *("first_k_dense_replace", "max_window_layers", "num_kv_shared_layers", "sliding_window_pattern", "decoder_sparse_step"),
    *("moe_layer_freq", "interleave_moe_layer_step", "attn_layer_period", "attn_layer_offset", "expert_layer_period"),
    *("expert_layer_offset", "full_attention_interval", "no_rope_layer_interval", "cross_attention_interval"),
    *("global_attn_every_n_layers",),
)
#: Lists that may happen to be as long as the stack, and aren't about layers.
_OTHER_LISTS = (
    *("architectures", "mrope_section", "image_mean", "image_std", "image_size", "patch_size", "eos_token_id", "kernel_size"),
    *("short_factor", "long_factor", "conv_kernel", "conv_stride", "conv_dim", "upsample_rates", "bad_words_ids"),
)
_SHOWN = 40  # letters of a value that a message shows
_SIDES = ("encoder", "decoder")
_SENSES = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech"), "text": ("text", "language")}


def output_config(
    configs: Sequence[Config | None],
    lead: int,
    layers: Mapping[str, Picks],
    before: Mapping[str, int],
    *,
    vocabulary: tuple[int, int] | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The config of a merge, made from that of source `lead`, and notes.

    `configs` are the sources'. `layers` has for each stack of the output, by the name before its numbers, the source and
    the layer there that each layer comes from, and `before` how many layers the lead has in each. `vocabulary` is the
    embedding's number of rows in the lead and in the output, `dtype` the type as torch names it (`"bfloat16"`).
    """
    config: dict[str, Any] = copy.deepcopy(dict(configs[lead] or {}))
    notes: list[str] = []
    for head, picks in layers.items():
        if list(picks) != [(lead, i) for i in range(before.get(head, -1))]:
            notes += _restack(config, configs, head, picks, before.get(head, 0), several=len(layers) > 1)
    if vocabulary is not None:
        notes += _set_vocabulary(config, *vocabulary)
    if dtype is not None:
        _set_dtype(config, dtype.removeprefix("torch."))
    return config, notes


def config_problems(config: Config | None, path: str) -> list[Problem]:
    """What is wrong with the types of a config's counts and lists of layers and its vocabulary; `path` is the file."""
    wrong = []
    for section, keys in _nested(config or {}, ""):
        for key, value in section.items():
            rule = _RULES.get(key)
            if value is not None and rule is not None and not rule[0](value):
                wrong.append(Problem(path, f"{keys}{key} is {repr(value)[:_SHOWN]}", f"it is {rule[1]} in a sound file"))
    return wrong


def _nested(config: Config, keys: str) -> Iterator[tuple[Config, str]]:
    """A config and its sections, each with the keys that lead to it."""
    yield config, keys
    for key, value in config.items():
        if key.endswith("config") and isinstance(value, Mapping):
            yield from _nested(value, f"{keys}{key}.")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count_or_several(value: Any) -> bool:
    """Networks of stages have one number for each, and LXMERT's has a mapping."""
    several = list(value.values()) if isinstance(value, dict) else value
    return _is_count(value) or (isinstance(several, list) and all(map(_is_count, several)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


#: What a key's value must be where it isn't null, and how that is said.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(LAYER_KEYS, (_is_count_or_several, "a whole number")),
    "vocab_size": (_is_count, "a whole number"),
    **dict.fromkeys(("layer_types", *_NUMBERS_OF_LAYERS), (_is_list, "a list")),
}


def changed(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with these entries, nested as they are; None takes one away."""
    result = {**config, **changes}
    for key, value in changes.items():
        if value is None:
            result.pop(key)
        elif isinstance(value, Mapping):
            result[key] = changed(config.get(key) or {}, value)
    return result


def _restack(
    config: dict[str, Any], configs: Sequence[Config | None], head: str, picks: Picks, before: int, *, several: bool
) -> Iterator[str]:
    """Set the count of a stack and rebuild its lists, in place; what is said of it."""
    stack = head.rstrip(".")
    paths = _count_paths(config, head, before, several=several)
    if not paths:
        if len(picks) != before:
            yield f"config.json has no number of layers for {stack}, which has {len(picks)} now"
        return
    section: dict[str, Any] = config
    for key in paths[0][:-1]:
        section = section[key]
    total = section[paths[0][-1]]
    if total != before:
        yield f"config.json counts {total} layers in {stack}, and the weights have {before}"
    for path in paths:
        section[path[-1]] = len(picks)
    if len(picks) != before:
        yield f"{stack}: {len(picks)} layers instead of {before} ({', '.join('.'.join(path) for path in paths)})"
    others = [_at(other, paths[0][:-1]) for other in configs]
    for key, value in list(section.items()):
        if isinstance(value, list) and key in _NUMBERS_OF_LAYERS and all(type(item) is int for item in value):
            section[key] = [i for i, (source, layer) in enumerate(picks) if layer in (others[source].get(key) or [])]
            yield f"{key}: the layers' new numbers"
        elif _is_per_layer(key, value, total):
            rebuilt = _picked(others, key, picks)
            if rebuilt is None:
                yield f"{key} has an entry a layer, and not in every model: check it"
            else:
                section[key] = rebuilt
                yield f"{key}: an entry for each new layer"
        elif key in _COUNTED_FROM_THE_TOP and value:
            yield f"{key} is {value!r}, which may not hold for the new layers: check it"


def _count_paths(config: Config, head: str, before: int, *, several: bool) -> list[tuple[str, ...]]:
    """The keys that count a stack's layers: those of one section that fit its name, and agree."""
    counts = config_counts(config)
    sections = list(dict.fromkeys(path[:-1] for path in counts))
    words = [word for word in head.lower().split(".") if word]
    sense = next((names for names in _SENSES.values() if any(name in word for name in names for word in words)), None)
    fitting = [s for s in sections if sense and any(name in key for name in sense for key in s)]
    if not fitting:
        apart = (*_SENSES["vision"], *_SENSES["audio"])
        fitting = [s for s in sections if not any(name in key for name in apart for key in s)]
    agreeing = [s for s in fitting if before in [count for path, count in counts.items() if path[:-1] == s]]
    if not fitting or (several and not agreeing):
        return []
    section = (agreeing or fitting)[0]
    here = {path: count for path, count in counts.items() if path[:-1] == section}
    side = next((side for side in _SIDES if any(side in word for word in words)), None)
    own = [path for path in here if side and side in path[-1]]
    neutral = [path for path in here if not any(other in path[-1] for other in _SIDES)]
    found = [*own, *(neutral if side != "decoder" or not own else [])] or list(here)
    wanted = before if before in [here[path] for path in found] else here[found[0]]
    return [path for path in found if here[path] == wanted]


def _at(config: Config | None, path: Sequence[str]) -> Config:
    """A section of a config, empty where it isn't there."""
    section: Any = config or {}
    for key in path:
        section = section.get(key, {}) if isinstance(section, Mapping) else {}
    return section if isinstance(section, Mapping) else {}


def _is_per_layer(key: str, value: Any, total: int) -> bool:
    """Whether a list has an entry for each layer: it's as long, and is named for layers or has different entries."""
    if not isinstance(value, list) or len(value) != total or key in _OTHER_LISTS:
        return False
    named = "layer" in key or "block" in key
    return named or (total > 3 and any(item != value[0] for item in value))


def _picked(sections: Sequence[Config], key: str, picks: Picks) -> list[Any] | None:
    """The entries of the layers that were picked; None where a model has none for one."""
    found = []
    for source, layer in picks:
        entries = sections[source].get(key)
        if not isinstance(entries, list) or layer >= len(entries):
            return None
        found.append(copy.deepcopy(entries[layer]))
    return found


def _set_vocabulary(config: dict[str, Any], before: int, rows: int) -> Iterator[str]:
    """Set every `vocab_size` that is the number of rows before, and the config's own; give it one where there is none."""
    found = [place for place in _sections(config) if type(place.get("vocab_size")) is int]
    for place in found:
        if place is config or place["vocab_size"] == before:
            if place["vocab_size"] != rows:
                yield f"vocab_size is {rows}, {place['vocab_size']} before"
            place["vocab_size"] = rows
    if not found and rows != before:
        config["vocab_size"] = rows
        yield f"vocab_size is {rows}"


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every mapping in it, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The type under the key that the config has for it, also in its sections; `torch_dtype` where it has none."""
    sections = [value for key, value in config.items() if key.endswith("config") and isinstance(value, dict)]
    found = [(place, key) for place in (config, *sections) for key in ("dtype", "torch_dtype") if key in place]
    for place, key in found:
        if place[key] is None or isinstance(place[key], str):
            place[key] = dtype
    if not any(place is config for place, _ in found):
        config["torch_dtype"] = dtype

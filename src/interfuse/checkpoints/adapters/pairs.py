"""LoRA adapters as peft writes them: which pair of small factors belongs to which tensor, and what is saved whole.

Only what is in the folder is read here; nothing is applied, merged or checked against a model (`lora`). Formats: peft's
adapter_config.json and adapter_model.safetensors, https://huggingface.co/docs/peft/developer_guides/checkpoint. Methods:
LoRA 2106.09685, rank-stabilised 2312.03732, DoRA 2402.09353.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from interfuse.checkpoints.numbers import STORED_FLOATS
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.errors import CheckpointError, Problem

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: What peft puts before the name of every tensor.
PREFIX = "base_model.model."

_FILES = (WEIGHTS, "adapter_model.bin")
#: Entries of the config that change what the factors mean in ways that can't be written into a weight.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_USED = "alpha_pattern bias fan_in_fan_out init_lora_weights lora_alpha lora_bias peft_type r rank_pattern use_dora use_rslora"
#: Entries that say how the adapter was trained, or what it was trained on.
_UNUSED = """
auto_mapping base_model_name_or_path corda_config ensure_weight_tying ephemeral_gpu_offload eva_config exclude_modules
inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
modules_to_save peft_version qalora_group_size revision runtime_config target_modules task_type velora_config
"""
_KNOWN = {*_USED.split(), *_UNUSED.split()}
#: Initialisations that change the base: the factors fit the changed base alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<tensor>[^.]+)")
_FOREIGN = re.compile(r"(^|\.)(lora_|token_adapter|original_module|prompt_|ia3_|vera_|hada_|lokr_|oft_|boft_|vblora_)")


@dataclass(frozen=True)
class Pair:
    """The factors of one module's weight: W + `scale` * B A, with A `[r, in]` and B `[out, r]` under these names.

    Convolutions have A `[r, in, *kernel]` and B `[out, r, 1, ...]`. An embedding's W is `[vocabulary, width]`: A is
    `[r, vocabulary]`, B `[width, r]`, and the change is transposed. `magnitude` (DoRA) is the norm that each output's
    weights are given afterwards; `bias` is what is added, times `scale`, to the module's bias.
    """

    module: str
    kind: Literal["matrix", "embedding"]
    down: str
    up: str
    scale: float
    magnitude: str | None = None
    bias: str | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: `pairs` by module, `whole` (tensor of the model -> stored name) what replaces a tensor.

    `weights` holds the stored tensors, `config` peft's settings.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    weights: Checkpoint
    pairs: Mapping[str, Pair]
    whole: Mapping[str, str]

    def rank(self, pair: Pair) -> int:
        """The number of columns of B."""
        return self.weights.specs[pair.down].shape[0]


@dataclass
class _Parts:
    """What is found of one module's factors, before it's known to be complete."""

    kind: Literal["matrix", "embedding"]
    names: dict[str, str] = field(default_factory=dict)


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of an adapter, and not of a model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def open_adapter(folder: str | Path, weights: Checkpoint | None = None) -> Adapter:
    """Open a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`, as peft writes it.

    Anything but LoRA (with its rank-stabilised and DoRA forms), a setting or a stored tensor that isn't understood, and
    factors that don't fit each other or the config are a `CheckpointError` that names them all. `weights` are the adapter's
    where they aren't in the folder yet.
    """
    folder = Path(folder)
    config = _read_config(folder)
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if weights is None and not files:
        raise CheckpointError(Problem(str(folder), "no adapter's weights", f"a file is missing: {' or '.join(_FILES)}"))
    weights = open_checkpoint(files[0]) if weights is None else weights
    found, whole, problems = _sort(weights)
    adapter = Adapter(str(folder), folder, config, weights, {}, whole)
    pairs = {}
    for module, parts in found.items():
        pair = _pair(module, parts, config)
        wrong = [f"{module!r} has {', '.join(parts.names)} alone"] if pair is None else _misfits(pair, weights, config)
        problems += wrong
        if pair is not None and not wrong:
            pairs[module] = pair
    if not found and not whole and not problems:
        problems.append("holds no tensor")
    if problems:
        raise CheckpointError(*(Problem(str(files[0]), wrong) for wrong in problems))
    return Adapter(adapter.name, folder, config, weights, pairs, whole)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(Problem(str(folder), f"no {CONFIG}", "give the folder of a peft adapter"))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(Problem(str(path), "isn't a JSON object", "get the file again"))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(Problem(str(path), f"peft_type is {kind!r}", "only LORA can be written into weights"))
    problems = [
        Problem(str(path), f"{key} is {config[key]!r}", "such an adapter can't be written into weights")
        for key in _REFUSED
        if config.get(key)
    ]
    problems += [
        Problem(str(path), f"unknown setting {key}: {value!r}", "remove it if it only mattered while training")
        for key, value in config.items()
        if value and key not in _KNOWN and key not in _REFUSED
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        allowed = "save the adapter with peft's path_initial_model_for_weight_conversion, or as a whole model"
        problems.append(Problem(str(path), f"init_lora_weights is {start!r}, which changed the base's own weights", allowed))
    problems += [Problem(str(path), *wrong) for wrong in _bad_numbers(config)]
    if problems:
        raise CheckpointError(*problems)
    return config


def _bad_numbers(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ranks and alphas that aren't numbers."""
    wrong = []
    for key in ("r", "lora_alpha"):
        if not _positive(config.get(key)) and not (key == "lora_alpha" and _number(config.get(key))):
            wrong.append((f"{key} is {config.get(key)!r}", "a positive number"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            wrong.append((f"{key} is {patterns!r}", "a mapping from names to numbers"))
            continue
        for name, value in patterns.items():
            if not _number(value) or not _compiles(name):
                wrong.append((f"{key} has {name!r}: {value!r}", "a mapping from names (regular expressions) to numbers"))
    return wrong


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _sort(weights: Checkpoint) -> tuple[dict[str, _Parts], dict[str, str], list[str]]:
    """The factors by module, the tensors saved whole, and the names that are neither."""
    found: dict[str, _Parts] = {}
    whole: dict[str, str] = {}
    problems: list[str] = []
    for key in weights.specs:
        name = key.removeprefix(PREFIX)
        factor = _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if factor is None:
            target = _saved(name)
            if _FOREIGN.search(target):
                problems.append(f"unknown tensor {key!r}")
            elif target in whole:
                problems.append(f"{key!r} and {whole[target]!r} are both saved for {target!r}")
            else:
                whole[target] = key
            continue
        groups = factor.groupdict()
        module = _without_wrapper(groups["module"])
        kind: Literal["matrix", "embedding"] = "embedding" if factor.re is _EMBEDDING else "matrix"
        part = "magnitude" if "part" not in groups else "bias" if groups.get("what") == "bias" else groups["part"]
        parts = found.setdefault(module, _Parts(kind))
        if factor.re is _EMBEDDING:
            parts.kind = kind
        if part in parts.names:
            problems.append(f"{key!r} and {parts.names[part]!r} are both {part} of {module!r}: more than one adapter")
        elif part == "bias" and groups["part"] == "A":
            problems.append(f"unknown tensor {key!r}")
        else:
            parts.names[part] = key
    return found, whole, problems


def _saved(name: str) -> str:
    """The model's name of a tensor that is saved whole."""
    saved = _SAVED.fullmatch(name)
    return _without_wrapper(f"{saved['module']}.{saved['tensor']}" if saved else name)


def _without_wrapper(name: str) -> str:
    """A name without the step that peft's layers add between a module and what it wraps."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _pair(module: str, parts: _Parts, config: Mapping[str, Any]) -> Pair | None:
    names = parts.names
    if "A" not in names or "B" not in names:
        return None
    rank = _by_pattern(config, "rank_pattern", module, config["r"])
    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(module, parts.kind, names["A"], names["B"], scale, names.get("magnitude"), names.get("bias"))


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """The value of the first pattern that fits the module's name, at its start or after a dot."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _misfits(pair: Pair, weights: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the shapes and types of one module's factors."""
    down, up = weights.specs[pair.down], weights.specs[pair.up]
    stored = [name for name in (pair.down, pair.up, pair.magnitude, pair.bias) if name is not None]
    wrong = [f"{name!r} is {weights.specs[name]}" for name in stored if weights.specs[name].dtype not in STORED_FLOATS]
    fits = len(down.shape) == len(up.shape) >= 2 and down.shape[0] == up.shape[1] and set(up.shape[2:]) <= {1}
    if not fits or not down.count or not up.count:
        return [*wrong, f"{pair.module!r}: A is {down} and B is {up}, whose product is no weight"]
    rank = _by_pattern(config, "rank_pattern", pair.module, config["r"])
    if rank != down.shape[0]:
        wrong.append(f"{pair.module!r} has rank {down.shape[0]}, the config says {rank}")
    for what, name in (("magnitude", pair.magnitude), ("bias", pair.bias)):
        if name is not None and weights.specs[name].count != up.shape[0]:
            wrong.append(f"{pair.module!r}: {what} {weights.specs[name]} doesn't fit B {up}")
    if bool(config.get("use_dora")) != (pair.magnitude is not None):
        wrong.append(f"{pair.module!r} has {'a' if pair.magnitude else 'no'} magnitude, use_dora is {config.get('use_dora')}")
    return wrong

"""The forms of a mixture's output: what its tensors are called, and how its config says it. Data, and one function for each
way in which a dense config becomes another; no tensor is looked at.

Names are those of the published checkpoints, which Transformers, vLLM and llama.cpp read: Mixtral
https://arxiv.org/abs/2401.04088, DeepSeekMoE https://arxiv.org/abs/2401.06066, Qwen2 https://arxiv.org/abs/2407.10671, Qwen3
https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interfuse.errors import Problem

Config = dict[str, Any]

#: The three matrices of a gated feed-forward block, by their names in dense models.
PARTS = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")


@dataclass(frozen=True)
class Layout:
    """One form of output.

    `accepts` are the dense models' types that it can hold. Tensors of a layer are named after `model.layers.N.`:
    `router`, `expert` (by `{expert}` and `{part}`), `shared` (by `{part}`) and `shared_gate`; `rename` has parts that are
    called otherwise. `biases` are those of the attention that a layer must have, `may` other tensors that it may have.
    `counts` is the config's key for the number of experts, `drop` has keys of dense configs that mean nothing here.
    """

    model_type: str
    architecture: str
    accepts: tuple[str, ...]
    paper: str
    router: str
    expert: str
    counts: str
    rename: Mapping[str, str]
    shared: str | None = None
    shared_gate: str | None = None
    biases: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    needs_plain_heads: bool = False

    def part(self, name: str) -> str:
        """What a part of a feed-forward block is called here."""
        return self.rename.get(name, name)

    def holds(self, name: str) -> bool:
        """Whether a tensor of a layer, named after `model.layers.N.`, has a place here; feed-forward blocks aside."""
        return name in (*_NORMS, *_ATTENTION, *self.biases, *self.may)


_QKV_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
_DENSE_ONLY = ("pretraining_tp", "mlp_bias")

#: In the order in which one is chosen where several would do.
LAYOUTS: dict[str, Layout] = {
    "mixtral": Layout(
        "mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        "https://arxiv.org/abs/2401.04088",
        router="block_sparse_moe.gate.weight",
        expert="block_sparse_moe.experts.{expert}.{part}.weight",
        counts="num_local_experts",
        rename={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        drop=(*_DENSE_ONLY, "attention_bias", "layer_types"),
    ),
    "deepseek": Layout(
        "deepseek",
        "DeepseekForCausalLM",
        ("llama", "mistral"),
        "https://arxiv.org/abs/2401.06066",
        router="mlp.gate.weight",
        expert="mlp.experts.{expert}.{part}.weight",
        counts="n_routed_experts",
        rename={},
        shared="mlp.shared_experts.{part}.weight",
        drop=(*_DENSE_ONLY, "layer_types", "head_dim", "sliding_window", "rope_parameters"),
        needs_plain_heads=True,
    ),
    "qwen2_moe": Layout(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("qwen2", "llama", "mistral"),
        "https://arxiv.org/abs/2407.10671",
        router="mlp.gate.weight",
        expert="mlp.experts.{expert}.{part}.weight",
        counts="num_experts",
        rename={},
        shared="mlp.shared_expert.{part}.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        biases=_QKV_BIASES,
        drop=(*_DENSE_ONLY, "attention_bias", "head_dim"),
        needs_plain_heads=True,
    ),
    "qwen3_moe": Layout(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        "https://arxiv.org/abs/2505.09388",
        router="mlp.gate.weight",
        expert="mlp.experts.{expert}.{part}.weight",
        counts="num_experts",
        rename={},
        may=("self_attn.q_norm.weight", "self_attn.k_norm.weight", *_QKV_BIASES, "self_attn.o_proj.bias"),
        drop=(*_DENSE_ONLY, "layer_types", "max_window_layers"),
    ),
}

#: What Transformers takes for a key that a dense model's config.json leaves out, where the new type has another value.
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_UNSAID: dict[str, Config] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        **_COMMON,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_THETA = 10000.0
#: The width of a shared expert that adds nothing, where the layout must have one and the recipe gives none.
NEUTRAL_WIDTH = 64

_HUB_CODE = "deepseek-ai/deepseek-moe-16b-base--"


def layouts_named(name: str) -> list[Layout]:
    """The layouts that a name means: ours, or the beginning of mergekit's (`Mixtral`, `DeepSeek MoE`, `Qwen MoE`)."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    others = {"qwen2_moe": "qwenmoe", "deepseek": "deepseekmoe"}
    found = []
    for key, layout in LAYOUTS.items():
        known = (key.replace("_", ""), others.get(key, ""))
        if wanted and any(other.startswith(wanted) for other in known):
            found.append(layout)
    return found


def with_defaults(config: Mapping[str, Any]) -> Config:
    """A dense model's config with what it leaves to Transformers written out."""
    full = {**_UNSAID.get(str(config.get("model_type")), {}), **config}
    full["num_key_value_heads"] = full.get("num_key_value_heads") or full.get("num_attention_heads")
    if full.get("head_dim") is None and full.get("num_attention_heads"):
        full["head_dim"] = full.get("hidden_size", 0) // full["num_attention_heads"]
    if "rope_parameters" not in full:
        full["rope_theta"] = full.get("rope_theta") or _THETA
    return full


def config_problems(layout: Layout, config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """What of a dense config (with defaults) the layout can't say."""
    heads, size, width = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if layout.needs_plain_heads and heads and size and width and heads * width != size:
        wrong = f"head_dim {width} times {heads} heads isn't hidden_size {size}"
        yield Problem(name, wrong, f"{layout.model_type} has no head_dim: choose another architecture")
    window = _window(config)
    if layout.model_type == "deepseek" and window:
        yield Problem(name, f"sliding_window is {window}", "deepseek has none: choose another architecture")
    if layout.model_type in ("mixtral", "qwen3_moe") and window and not all(_sliding(config)):
        wrong = f"sliding_window {window} is that of some layers alone"
        yield Problem(name, wrong, f"in {layout.model_type} all layers have it, or none")
    if layout.model_type == "deepseek" and config.get("hidden_act") != "silu":
        yield Problem(name, f"hidden_act is {config.get('hidden_act')!r}", "deepseek has silu")


def mixture_config(
    layout: Layout, config: Mapping[str, Any], *, experts: int, per_token: int, shared: bool, dtype: str | None
) -> Config:
    """The output's config.json from the base's (with defaults); `shared`: whether the recipe gives a shared expert."""
    made = {key: value for key, value in config.items() if key not in layout.drop}
    made |= {"model_type": layout.model_type, "architectures": [layout.architecture]}
    made |= {layout.counts: experts, "num_experts_per_tok": per_token}
    width = config.get("intermediate_size")
    if layout.model_type == "mixtral":
        made["sliding_window"] = _window(config)
    else:
        made |= {"moe_intermediate_size": width, "norm_topk_prob": True}
    if layout.model_type.startswith("qwen"):
        made |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": bool(_window(config))}
    if layout.model_type == "qwen2_moe":
        kinds = ["sliding_attention" if slides else "full_attention" for slides in _sliding(config)]
        made |= {"shared_expert_intermediate_size": width if shared else min(NEUTRAL_WIDTH, width or NEUTRAL_WIDTH)}
        made |= {"layer_types": kinds, "qkv_bias": True, "max_window_layers": made.get("max_window_layers", 0)}
    if layout.model_type == "deepseek":
        made |= _deepseek(config, shared)
    if dtype is not None:
        made["dtype" if "dtype" in made else "torch_dtype"] = dtype
    return made


def _deepseek(config: Mapping[str, Any], shared: bool) -> Config:
    """The keys of DeepSeek's own code, which isn't in Transformers: it's fetched from the hub where it's trusted."""
    rope = config.get("rope_parameters") or {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    classes = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "modeling_deepseek.DeepseekModel"}
    classes["AutoModelForCausalLM"] = "modeling_deepseek.DeepseekForCausalLM"
    return {
        "n_shared_experts": 1 if shared else None,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "attention_bias": False,
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or _THETA,
        "rope_scaling": config.get("rope_scaling") if not rope else None if plain else scaling,
        "auto_map": {name: _HUB_CODE + code for name, code in classes.items()},
    }


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window that the dense model has, if it has one."""
    window = config.get("sliding_window")
    if str(config.get("model_type")).startswith("qwen") and not config.get("use_sliding_window"):
        return None
    return window or None


def _sliding(config: Mapping[str, Any]) -> list[bool]:
    """Of each layer of the dense model, whether its attention has the window."""
    layers, window = int(config.get("num_hidden_layers") or 0), _window(config)
    kinds = config.get("layer_types")
    if not window:
        return [False] * layers
    if isinstance(kinds, list) and len(kinds) == layers:
        return [kind == "sliding_attention" for kind in kinds]
    first = config.get("max_window_layers", 28) if str(config.get("model_type")).startswith("qwen") else 0
    return [i >= first for i in range(layers)]

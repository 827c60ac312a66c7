"""The same recipes through mergekit 0.1.5 and through interfuse, in float32, compared tensor by tensor. Not a speed test.

Tiny Llamas (four layers, random weights, all magnitudes of a delta distinct, so that "the k largest" means one thing) are
made in a temporary folder. A tensor agrees where it differs by at most 1e-6 of its largest magnitude. Where we differ on
purpose, the recipe says for which tensors and why; what differs elsewhere, or agrees there, is a failure. Random methods
are compared where chance has no part, at density 1.

mergekit can't be installed beside interfuse: `python -m venv mk && mk/bin/pip install mergekit==0.1.5`, then

    python benchmarks/mergekit_agreement.py mk/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import deserialize
from safetensors.numpy import save_file

TOLERANCE = 1e-6  # of a tensor's largest magnitude
LAYERS, HIDDEN, INNER, VOCABULARY = 4, 16, 24, 40
OURS = (sys.executable, "-c", "from interfuse.cli import main; main()", "run")

#: Runs every recipe in one process of mergekit's; argument: a JSON list of [recipe, out]; prints the errors by number.
THEIRS = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
errors = {}
for number, (recipe, out) in enumerate(json.loads(sys.argv[1])):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(recipe)))
        run_merge(config, out, options=MergeOptions(quiet=True, copy_tokenizer=False))
    except Exception as error:
        errors[number] = f"{type(error).__name__}: {error}".replace("\\n", " ")[:200]
print("\\n" + json.dumps(errors))
"""


@dataclass(frozen=True)
class Case:
    """A recipe, with models by name. `but`: what tensors differ by design have in their names, and `why` they do."""

    name: str
    recipe: dict[str, Any]
    but: tuple[str, ...] = ()
    why: str = ""
    options: tuple[str, ...] = ()
    tolerance: float = TOLERANCE


@dataclass
class Outcome:
    """The largest difference where agreement is asked for, what is wrong with it, and the difference where it isn't."""

    agreed: float = 0.0
    excepted: float = 0.0
    wrong: list[str] = field(default_factory=list)


AFTER = ("model.norm.weight", "lm_head.weight")
APART = ("layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj")  # the two where some mean cosine is negative
RAMP = "tensors after the last layer: a ramp ends there, at t = 1; theirs begins again, at t = 0"
BASE = {"base_model": "base"}


def models(*names: str, **each: list[Any]) -> dict[str, Any]:
    """`models:` with one value a model of each parameter."""
    entries = []
    for i, name in enumerate(names):
        parameters = {key: values[i] for key, values in each.items() if values[i] is not None}
        entries.append({"model": name} | ({"parameters": parameters} if parameters else {}))
    return {"models": entries}


def method(name: str, *parts: Mapping[str, Any], **parameters: Any) -> dict[str, Any]:
    """A recipe in float32; `lambda_` is the parameter `lambda`."""
    recipe: dict[str, Any] = {"merge_method": name, "dtype": "float32"}
    for part in parts:
        recipe |= part
    return recipe | ({"parameters": {key.rstrip("_"): value for key, value in parameters.items()}} if parameters else {})


def source(model: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    """One source of a slice."""
    return {"model": model, "layer_range": [start, stop]} | ({"parameters": parameters} if parameters else {})


def slices(*parts: list[dict[str, Any]], parameters: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """`slices:`, with one mapping of parameters a slice where given."""
    given = parameters or [{} for _ in parts]
    return {"slices": [{"sources": p} | ({"parameters": dict(g)} if g else {}) for p, g in zip(parts, given, strict=True)]}


def cases() -> Iterator[Case]:
    """Every recipe that is compared."""
    yield from averages()
    yield from arcs()
    yield from deltas()
    yield from selections()
    yield from stacks()
    yield from forms()
    yield from vocabularies()


def averages() -> Iterator[Case]:
    """linear and task_arithmetic."""
    three = models("a", "b", "c", weight=[0.5, 0.3, 0.2])
    pair = models("a", "b", weight=[0.75, 0.5])
    yield Case("linear", method("linear", three))
    yield Case("linear, weights not normalized", method("linear", pair, normalize=False))
    yield Case("linear, a negative weight", method("linear", models("a", "b", "c", weight=[1.0, 0.5, -0.25])))
    yield Case("linear, one weight for all", method("linear", models("a", "b", "c"), weight=1.0))
    yield Case("linear, one model", method("linear", models("a", weight=[1.0])))
    yield Case("linear, the base listed", method("linear", models("base", "a", weight=[0.4, 0.6]), BASE))
    yield Case("linear, ramps", method("linear", models("a", "b", weight=[[0.0, 1.0], [1.0, 0.25, 0.5]])), AFTER, RAMP)
    filters = [{"filter": "mlp", "value": 0.75}, {"filter": "self_attn", "value": [0.1, 0.9]}, {"value": 0.5}]
    yield Case("linear, filters", method("linear", models("a", "b", weight=[filters, 1.0])))
    star = [{"filter": "q_proj", "value": 0.2}, {"filter": "*", "value": 0.6}]
    yield Case("linear, the filter *", method("linear", models("a", "b", weight=[star, 1.0])))
    missed = [{"filter": "mlp", "value": 0.75}]
    yield Case("linear, a filter falls through", method("linear", models("a", "b", weight=[missed, None]), weight=0.5))
    yield Case("task_arithmetic", method("task_arithmetic", three, BASE))
    yield Case("task_arithmetic, lambda", method("task_arithmetic", three, BASE, lambda_=0.7))
    yield Case("task_arithmetic, normalized", method("task_arithmetic", pair, BASE, normalize=True))
    yield Case("task_arithmetic, a negative weight", method("task_arithmetic", models("a", "b", weight=[1.0, -0.5]), BASE))
    listed = models("base", "a", "b", weight=[None, 0.6, 0.4])
    yield Case("task_arithmetic, the base listed", method("task_arithmetic", listed, BASE))
    ramp = models("a", "b", weight=[[0.0, 0.3, 1.0], [0.7, 0.1]])
    yield Case("task_arithmetic, ramps", method("task_arithmetic", ramp, BASE), AFTER, RAMP)
    yield Case("task_arithmetic, int8_mask", method("task_arithmetic", three, BASE, int8_mask=True))
    lambdas = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    yield Case("task_arithmetic, lambda by filter", method("task_arithmetic", three, BASE, lambda_=lambdas))


def arcs() -> Iterator[Case]:
    """Spherical means."""
    pair = models("base", "a")
    popular = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    yield Case("slerp", method("slerp", pair, BASE, t=0.3))
    yield Case("slerp, the base listed last", method("slerp", models("a", "base"), BASE, t=0.3))
    yield Case("slerp, the base not listed", method("slerp", models("a"), BASE, t=0.3))
    yield Case("slerp, t = 0", method("slerp", pair, BASE, t=0.0))
    yield Case("slerp, t = 1", method("slerp", pair, BASE, t=1.0))
    yield Case("slerp, a ramp", method("slerp", pair, BASE, t=[0.0, 0.4, 1.0]), AFTER, RAMP)
    yield Case("slerp, filters and ramps", method("slerp", pair, BASE, t=popular))
    whole = slices([source("base", 0, LAYERS), source("a", 0, LAYERS)])
    yield Case("slerp, slices, filters and ramps", method("slerp", whole, BASE, t=popular))
    yield Case("slerp, almost parallel", method("slerp", models("base", "near"), BASE, t=0.3))
    two = models("a", "b", weight=[0.6, 0.2])
    yield Case("nuslerp", method("nuslerp", two))
    yield Case("nuslerp, by column", method("nuslerp", two, nuslerp_flatten=False))
    yield Case("nuslerp, by row", method("nuslerp", two, nuslerp_flatten=False, nuslerp_row_wise=True))
    yield Case("nuslerp, deltas", method("nuslerp", two, BASE))
    yield Case("nuslerp, deltas by column", method("nuslerp", two, BASE, nuslerp_flatten=False))
    three = models("a", "b", "c", weight=[0.5, 0.3, 0.4])
    yield Case("multislerp", method("multislerp", three))
    yield Case("multislerp, deltas", method("multislerp", three, BASE))
    yield Case("multislerp, weights not normalized", method("multislerp", three, normalize_weights=False))
    yield Case("karcher", method("karcher", models("a", "b", "c")))
    yield Case("karcher, two models", method("karcher", models("a", "b"), max_iter=20, tol=1e-6))
    yield Case("karcher, two iterations", method("karcher", models("a", "b", "c"), max_iter=2))
    yield Case("model_stock, two models", method("model_stock", models("a", "b"), BASE))
    yield Case("model_stock", method("model_stock", models("a", "b", "c"), BASE))
    clamp = "rows whose deltas point apart: ours stays between base and mean, theirs goes past the base"
    rows = method("model_stock", models("a", "b", "c"), BASE, filter_wise=True)
    yield Case("model_stock, filter_wise", rows, APART, clamp)


def deltas() -> Iterator[Case]:
    """Trim, elect, scale."""
    half = models("a", "b", "c", weight=[0.5, 0.3, 0.4], density=[0.5, 0.7, 0.3])
    yield Case("ties", method("ties", half, BASE))
    yield Case("ties, not normalized", method("ties", half, BASE, normalize=False))
    yield Case("ties, lambda", method("ties", half, BASE, lambda_=0.7))
    yield Case("ties, rescaled", method("ties", half, BASE, rescale=True))
    yield Case("ties, int8_mask", method("ties", half, BASE, int8_mask=True, normalize=True))
    yield Case("ties, density 1", method("ties", models("a", "b"), BASE, weight=0.5))
    yield Case("ties, density for all", method("ties", models("a", "b", weight=[1.0, 0.5]), BASE, density=0.25))
    yield Case("ties, a negative weight", method("ties", models("a", "b", "c", weight=[1, 0.5, -0.4]), BASE, density=0.5))
    ramps = models("a", "b", weight=[[0.2, 1.0], 0.5], density=[[1.0, 0.5, 0.1], 0.5])
    yield Case("ties, ramps", method("ties", ramps, BASE), AFTER, RAMP)
    rules = [{"filter": "mlp", "value": [0, 0.3, 1]}, {"value": 0.4}]
    yield Case("ties, filters and ramps", method("ties", models("a", "b", weight=[rules, 0.5]), BASE, density=0.5))
    listed = models("a", "base", "b", weight=[0.5, None, 0.3], density=[0.5, None, 0.5])
    yield Case("ties, the base listed", method("ties", listed, BASE))
    crumbs = models("a", "b", "c", weight=[0.5, 0.3, 0.4], density=[0.9, 0.6, 0.3], gamma=[0.01, 0.1, 0.05])
    yield Case("breadcrumbs", method("breadcrumbs", crumbs, BASE))
    yield Case("breadcrumbs, default gamma", method("breadcrumbs", half, BASE))
    yield Case("breadcrumbs, density and gamma above 1", method("breadcrumbs", half, BASE, density=0.9, gamma=0.3))
    yield Case("breadcrumbs, normalized, rescaled", method("breadcrumbs", crumbs, BASE, normalize=True, rescale=True))
    yield Case("breadcrumbs_ties", method("breadcrumbs_ties", crumbs, BASE))
    yield Case("breadcrumbs_ties, lambda", method("breadcrumbs_ties", crumbs, BASE, lambda_=1.5))
    full = models("a", "b", "c", weight=[0.5, 0.3, 0.4])
    for name in ("dare_linear", "dare_ties", "della", "della_linear"):
        yield Case(f"{name}, density 1", method(name, full, BASE, density=1.0))
    yield Case("dare_ties, normalized", method("dare_ties", full, BASE, density=1.0, normalize=True))
    yield Case("della, not normalized, lambda", method("della", full, BASE, density=1.0, normalize=False, lambda_=0.8))
    yield Case("sce", method("sce", models("a", "b", "c"), BASE))
    yield Case("sce, half the positions", method("sce", models("a", "b", "c"), BASE, select_topk=0.5))
    yield Case("sce, int8_mask", method("sce", models("a", "b", "c"), BASE, select_topk=0.3, int8_mask=True))
    small = "mean squares of deltas sum to less than 1e-6: weighed by them all the same; theirs weigh alike"
    yield Case("sce, small deltas", method("sce", models("near", "near2"), BASE), ("weight",), small)


def selections() -> Iterator[Case]:
    """Rules by entry."""
    yield Case("nearswap", method("nearswap", models("base", "a"), BASE, t=0.01))
    yield Case("nearswap, a ramp", method("nearswap", models("a"), BASE, t=[0.001, 0.02]), AFTER, RAMP)
    yield Case("arcee_fusion", method("arcee_fusion", models("base", "a"), BASE))
    yield Case("ram", method("ram", models("a", "b", "c"), BASE, epsilon=0.01))
    yield Case("ram, default epsilon", method("ram", models("a", "b"), BASE))
    yield Case("ramplus_tl", method("ramplus_tl", models("a", "b", "c"), BASE, epsilon=0.01))
    yield Case("ramplus_tl, r and alpha", method("ramplus_tl", models("a", "b"), BASE, epsilon=0.02, r=0.3, alpha=0.5))


def stacks() -> Iterator[Case]:
    """Slices, stacked layers, scales."""
    yield Case("passthrough", method("passthrough", models("a")))
    yield Case("passthrough, stacked", method("passthrough", slices([source("a", 0, 3)], [source("b", 1, 4)])))
    same = slices([source("a", 0, 2)], [source("a", 1, 3)], [source("a", 1, 4)])
    yield Case("passthrough, layers repeated", method("passthrough", same))
    yield Case("passthrough, cut short", method("passthrough", slices([source("b", 0, 1)], [source("b", 3, 4)])))
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    scaled = slices([source("a", 0, 4)], [source("a", 2, 4, scale=scale)])
    yield Case("passthrough, scaled by filters", method("passthrough", scaled))
    yield Case("passthrough, deeper", method("passthrough", slices([source("deep", 0, 6)], [source("a", 3, 4)])))
    blend = slices([source("a", 0, 2, weight=0.6), source("b", 0, 2, weight=0.4)], [source("b", 1, 4, weight=1.0)])
    yield Case("linear, slices", method("linear", blend))
    crossed = slices([source("a", 0, 3, weight=0.6), source("b", 1, 4, weight=0.4)])
    yield Case("linear, layers of other depth", method("linear", crossed))
    by_slice: list[dict[str, Any]] = [{"weight": 1.0}, {"weight": [0.5, 1.0]}]
    steps = slices(
        [source("a", 0, 2), source("b", 0, 2)],
        [source("a", 2, 4), source("b", 2, 4)],
        parameters=by_slice,
    )
    yield Case("linear, parameters of slices", method("linear", steps))
    ties = [[source("base", i, j), source("a", i, j, weight=0.5), source("b", i, j)] for i, j in ((0, 2), (1, 4))]
    level: list[dict[str, Any]] = [{"density": 0.5, "weight": 0.3}, {"density": [0.9, 0.3]}]
    yield Case("ties, stacked", method("ties", slices(*ties, parameters=level), BASE, weight=0.4), AFTER, RAMP)
    one = slices(
        [source("base", 0, 1), source("a", 0, 1)],
        [source("base", 1, 4), source("a", 1, 4)],
        parameters=[{"t": [0.2, 0.8]}, {"t": [0.1, 0.5]}],
    )
    yield Case("slerp, a slice of one layer", method("slerp", one, BASE), AFTER, RAMP)


def forms() -> Iterator[Case]:
    """Other ways to write a recipe, other types, tied embeddings."""
    half = models("a", "b", weight=[0.5, 0.3])
    whole = {"modules": {"default": models("a", "b", weight=[0.5, 0.3]) | {"parameters": {"normalize": False}}}}
    yield Case("modules", method("linear", whole))
    yield Case("no dtype", {key: value for key, value in method("ties", half, BASE, density=0.5).items() if key != "dtype"})
    yield Case("out_dtype float16", method("linear", half, {"out_dtype": "float16"}), tolerance=2.0**-11)
    yield Case("out_dtype bfloat16", method("ties", half, BASE, {"out_dtype": "bfloat16"}, density=0.5), tolerance=2.0**-8)
    low = "theirs computes in bfloat16; ours in float32, rounded once"
    yield Case("dtype bfloat16", method("task_arithmetic", half, BASE, {"dtype": "bfloat16"}), ("weight",), low)
    early = "theirs rounds float32 inputs to bfloat16 before it adds; ours rounds once, at the end"
    yield Case("dtype bfloat16, linear", method("linear", half, {"dtype": "bfloat16"}), ("weight",), early)
    tied = models("tied1", "tied2", weight=[0.5, 0.3])
    yield Case("tied embeddings", method("linear", tied))
    yield Case("tied embeddings, ties", method("ties", tied, {"base_model": "tied0"}, density=0.5))
    ramp = method("slerp", models("base", "a"), BASE, t=[0.0, 0.4, 1.0])
    yield Case("slerp, a ramp, --mergekit-compat", ramp, options=("--mergekit-compat",))
    levels = method("linear", models("a", "b", weight=[[0.0, 1.0], 0.5]))
    yield Case("linear, ramps, --mergekit-compat", levels, options=("--mergekit-compat",))


def vocabularies() -> Iterator[Case]:
    """Models of other tokens: one with a word and an added token more than the base, one with fewer in another order."""
    base, more = {"base_model": "words0"}, models("words0", "words1", weight=[0.5, 0.3])
    all_three = models("words0", "words1", "words2", weight=[0.5, 0.3, 0.4])
    yield Case("tokenizer_source union", method("linear", more, {"tokenizer_source": "union"}))
    yield Case("tokenizer_source union, three models", method("linear", all_three, base, {"tokenizer_source": "union"}))
    deltas = models("words1", "words2", weight=[0.5, 0.3])
    yield Case("tokenizer_source union, deltas", method("task_arithmetic", deltas, base, {"tokenizer_source": "union"}))
    yield Case("tokenizer_source base", method("task_arithmetic", deltas, base, {"tokenizer_source": "base"}))
    yield Case("tokenizer_source a model", method("linear", all_three, base, {"tokenizer_source": "words2"}))
    rows = {
        "w3": {"source": "words1", "force": True},
        "w4": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "words1", "token": "w7"}},
        "<ninth>": {"source": {"kind": "model_token", "model": "words2", "token_id": 9}},
    }
    asked = {"tokenizer": {"source": "union", "tokens": rows, "pad_to_multiple_of": 16}}
    yield Case("tokenizer, single tokens, padded", method("linear", all_three, base, asked))


def make_models(folder: Path) -> dict[str, Path]:
    """All models, by name: a base, three fine-tunes of it that share a direction, two near it, a deep one, tied ones, and
    three with tokenizers."""
    random = np.random.default_rng(0)
    made: dict[str, dict[str, np.ndarray]] = {"base": tensors(random, LAYERS)}
    common = tensors(random, LAYERS)
    for name, scale in (("a", 0.5), ("b", 0.5), ("c", 0.5), ("near", 1e-3), ("near2", 2e-3)):
        own = tensors(random, LAYERS)
        made[name] = {key: t + np.float32(scale) * (common[key] + own[key]) for key, t in made["base"].items()}
    made["deep"] = tensors(random, LAYERS + 2)
    for i, name in enumerate(("base", "a", "b")):
        made[f"tied{i}"] = {key: t for key, t in made[name].items() if key != "lm_head.weight"}
    for name in ("a", "b", "c"):
        distinct(made[name], made["base"])
    words = [f"w{i}" for i in range(VOCABULARY)]
    tokens = {"words0": (words, []), "words1": ([*words, "x"], ["<new1>"]), "words2": (words[35:1:-1], [])}
    for name, origin in (("words0", "base"), ("words1", "a"), ("words2", "b")):
        rows = sum(map(len, tokens[name]))
        grown = {
            key: np.concatenate([t, t[:2] * np.float32(1.5)])[:rows] for key, t in made[origin].items() if len(t) == VOCABULARY
        }
        made[name] = made[origin] | grown
    for name, values in made.items():
        path = folder / name
        path.mkdir()
        save_file(values, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config(values, tied="tied" in name)))
        if name in tokens:
            put_tokenizer(path, *tokens[name])
    return {name: folder / name for name in made}


def put_tokenizer(folder: Path, words: Sequence[str], added: Sequence[str]) -> None:
    """A tokenizer of whole words, with tokens that are added."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    extra = [{"id": len(words) + i, "content": token, **flags} for i, token in enumerate(added)]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]}
    parts = {"truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None}
    whole = {"version": "1.0", **parts, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": extra, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def tensors(random: np.random.Generator, layers: int) -> dict[str, np.ndarray]:
    """A Llama's tensors of standard deviation 0.05, in float32."""
    narrow = HIDDEN // 2
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def distinct(values: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> None:
    """Fail where two entries of a delta have one magnitude."""
    for name, tensor in values.items():
        delta = np.abs(tensor - base[name])
        assert np.unique(delta).size == delta.size, f"{name} has equal magnitudes; take another seed"


def config(values: Mapping[str, np.ndarray], tied: bool) -> dict[str, Any]:
    """The config.json of these tensors."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in values),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(values["model.embed_tokens.weight"]),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def placed(value: Any, paths: Mapping[str, Path], key: str = "") -> Any:
    """The recipe with paths in place of the models' names."""
    if isinstance(value, dict):
        return {name: placed(item, paths, name) for name, item in value.items()}
    if isinstance(value, list):
        return [placed(item, paths) for item in value]
    if key in ("source", "tokenizer_source") and value in ("base", "union"):
        return value
    return str(paths[value]) if key in ("model", "base_model", "source", "tokenizer_source") else value


def run_theirs(python: Path, jobs: list[tuple[Path, Path]]) -> dict[int, str]:
    """Run mergekit on every recipe; the errors by number."""
    argument = json.dumps([[str(recipe), str(out)] for recipe, out in jobs])
    done = subprocess.run([python, "-c", THEIRS, argument], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return {int(number): error for number, error in json.loads(done.stdout.splitlines()[-1]).items()}


def run_ours(recipe: Path, out: Path, options: tuple[str, ...]) -> str:
    """Run interfuse on a recipe; its error, or nothing."""
    done = subprocess.run([*OURS, recipe, out, *options], capture_output=True, text=True)
    return "" if not done.returncode else (done.stderr.strip() or f"exit status {done.returncode}").replace("\n", " ")[:200]


def compared(case: Case, ours: Path, theirs: Path) -> Outcome:
    """Two outputs, tensor by tensor."""
    outcome = Outcome()
    a, b = load(ours), load(theirs)
    if a.keys() != b.keys():
        outcome.wrong.append(f"one side alone has {', '.join(sorted(a.keys() ^ b.keys())[:4])}")
    for name in (name for name in b if name in a):
        if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            sides = [f"{side[name].dtype}{list(side[name].shape)}" for side in (a, b)]
            outcome.wrong.append(f"{name}: {' and '.join(sides)}")
            continue
        x, y = (np.asarray(side[name], np.float64) for side in (a, b))
        difference = float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30))
        if any(part in name for part in case.but):
            outcome.excepted = max(outcome.excepted, difference)
        else:
            outcome.agreed = max(outcome.agreed, difference)
            if not difference <= case.tolerance:
                outcome.wrong.append(f"{name}: {difference:.1e}")
    if case.but and outcome.excepted <= case.tolerance:
        outcome.wrong.append("what is said to differ agrees")
    return outcome


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of an output; bf16 as float32."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(entry["data"], {"F16": np.float16, "F32": np.float32, "F64": np.float64}[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


def table(rows: list[tuple[Case, Outcome]]) -> str:
    """The outcomes as Markdown."""
    failed = sum(bool(outcome.wrong) for _, outcome in rows)
    lines = [
        "# Agreement with mergekit",
        "",
        f"{len(rows)} recipes, run by mergekit 0.1.5 and by interfuse on the same tiny Llamas in float32; {failed} fail. The",
        "difference is the largest of any tensor, relative to the tensor's largest magnitude (allowed: 1e-6; where the output",
        "is float16 or bfloat16, one step of it). What differs on purpose stands in the last two columns.",
        "",
        "| recipe | difference | differs on purpose | by |",
        "|---|--:|---|--:|",
    ]
    for case, outcome in rows:
        excepted = f"{outcome.excepted:.1e}" if case.but else ""
        said = f"{outcome.agreed:.1e}" if not outcome.wrong else "**" + "; ".join(outcome.wrong[:3]).replace("|", "/") + "**"
        lines.append(f"| {case.name} | {said} | {case.why} | {excepted} |")
    return "\n".join([*lines, "", "`python benchmarks/mergekit_agreement.py mk/bin/python`", ""])


def main() -> int:
    """Run, compare, print, write; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mergekit", type=Path, help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--only", default="", help="recipes whose name has this in it; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="where the table is written")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_models(folder)
        jobs = []
        for number, case in enumerate(chosen):
            recipe = folder / f"{number}.yaml"
            recipe.write_text(yaml.safe_dump(placed(case.recipe, paths), sort_keys=False))
            jobs.append((recipe, folder / f"{number}-theirs"))
        theirs = run_theirs(options.mergekit, jobs)
        with ThreadPoolExecutor(2) as pool:
            arguments = [(jobs[i][0], folder / f"{i}-ours", case.options) for i, case in enumerate(chosen)]
            ours = list(pool.map(lambda argument: run_ours(*argument), arguments))
        rows = []
        for number, case in enumerate(chosen):
            errors = [f"mergekit: {theirs[number]}"] if number in theirs else []
            errors += [f"interfuse: {ours[number]}"] if ours[number] else []
            found = Outcome(wrong=errors) if errors else compared(case, folder / f"{number}-ours", folder / f"{number}-theirs")
            rows.append((case, found))
    text = table(rows)
    print(text)
    if not options.only:
        options.out.write_text(text, encoding="utf-8")
    return int(any(outcome.wrong for _, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())

"""The same recipes through mergekit-moe 0.1.5 and through interfuse, tensor by tensor. Not a speed test.

Tiny dense models with random weights and a tokenizer of letters are made in a temporary folder. Copied tensors must be equal to
the bit. Routers must agree to 1e-6 where both compute in float32; where mergekit reads the prompts in bfloat16, their cosine
must be above 0.999. Random gates aren't compared: both draw their own.

mergekit can't be installed beside interfuse: `python -m venv mk && mk/bin/pip install mergekit==0.1.5`, then

    python benchmarks/moe_agreement.py mk/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

LAYERS, HIDDEN, INNER = 3, 32, 48
SPECIAL, LETTERS = ("<s>", "</s>", "<unk>"), "abcdefghijklmnopqrstuvwxyz\u0120"
EXACT, COSINE = 1e-6, 0.999

#: Names that Mixtral's files have for what others call otherwise.
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

#: Runs every recipe in one process of mergekit's; argument: a JSON list of [recipe, out]; prints the errors by number.
THEIRS = """
import json, sys, yaml
from mergekit.merge import MergeOptions
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build
errors = {}
for number, (recipe, out) in enumerate(json.loads(sys.argv[1])):
    try:
        config = MoEMergeConfig.model_validate(yaml.safe_load(open(recipe)))
        build(config, out, MergeOptions(), device="cpu")
    except BaseException as error:
        errors[number] = f"{type(error).__name__}: {error}".replace("\\n", " ")[:200]
print("\\n" + json.dumps(errors))
"""


@dataclass(frozen=True)
class Case:
    """A recipe on models of one kind; `more` is added to it, `shared` to its shared expert, if it has one."""

    name: str
    kind: str
    more: dict[str, Any]
    shared: dict[str, Any] | None = None
    expert: dict[str, Any] = field(default_factory=dict)

    @property
    def bfloat16(self) -> bool:
        """Whether mergekit reads the prompts with a network, which it does in bfloat16."""
        return self.more["gate_mode"].startswith("hidden")

    def recipe(self) -> dict[str, Any]:
        """The recipe, with models by name."""
        experts = [
            {"source_model": f"{self.kind}-a", "positive_prompts": ["sums and proofs"], **self.expert},
            {"source_model": f"{self.kind}-b", "positive_prompts": ["poems of rhymes"], "negative_prompts": ["sums and sums"]},
        ]
        found = {"base_model": f"{self.kind}-base", "experts": experts, **self.more}
        shared = [] if self.shared is None else [{"source_model": f"{self.kind}-a", **self.shared}]
        return found | ({"shared_experts": shared} if shared else {})


CASES = (
    Case("Mixtral, hidden", "llama", {"gate_mode": "hidden"}),
    Case("Mixtral, hidden_avg", "llama", {"gate_mode": "hidden_avg"}),
    Case("Mixtral, cheap_embed", "llama", {"gate_mode": "cheap_embed", "experts_per_token": 1}),
    Case("Mixtral from Mistral, cheap_embed", "mistral", {"gate_mode": "cheap_embed"}),
    Case("Mixtral, residual_scale", "llama", {"gate_mode": "cheap_embed"}, expert={"residual_scale": 0.5}),
    Case("Mixtral, bfloat16", "llama", {"gate_mode": "cheap_embed", "dtype": "bfloat16"}),
    Case("DeepSeek, cheap_embed", "llama", {"gate_mode": "cheap_embed", "architecture": "deepseek"}),
    Case("DeepSeek with a shared expert", "llama", {"gate_mode": "cheap_embed"}, {"residual_scale": 0.25}),
    Case("Qwen MoE, cheap_embed", "qwen2", {"gate_mode": "cheap_embed"}, {"positive_prompts": ["code and loops"]}),
    Case("Qwen MoE, hidden", "qwen2", {"gate_mode": "hidden"}, {"positive_prompts": ["code and loops"]}),
    Case("Qwen MoE from Llama", "llama", {"gate_mode": "cheap_embed"}, {"positive_prompts": ["code and loops"]}),
    Case("Qwen3 MoE, cheap_embed", "qwen3", {"gate_mode": "cheap_embed"}),
    Case("Qwen3 MoE, hidden", "qwen3", {"gate_mode": "hidden"}),
)


def make_models(folder: Path) -> None:
    """A base and two experts of each kind, in float32, with a tokenizer."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64}
    sizes |= {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32"}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "rope_theta": 10000.0}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    for k, (kind, name) in enumerate(names.items()):
        width = 16 if kind == "qwen3" else HIDDEN // 4
        for i, model in enumerate(("base", "a", "b")):
            random = np.random.default_rng([k, i])
            target = folder / f"{kind}-{model}"
            target.mkdir()
            shapes = _shapes(kind, width)
            tensors = {key: (random.normal(size=shape) * 0.3).astype(np.float32) for key, shape in shapes.items()}
            save_file(tensors, target / "model.safetensors", {"format": "pt"})
            config = {"model_type": kind, "architectures": [f"{name}ForCausalLM"], **sizes}
            config |= {"sliding_window": None} if kind == "mistral" else {}
            config |= {"head_dim": width} if kind == "qwen3" else {}
            (target / "config.json").write_text(json.dumps(config))
            _tokenizer(target)


def _shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, HIDDEN), "lm_head.weight": (32, HIDDEN)}
    found["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        head = f"model.layers.{layer}."
        for part, heads in (("q", 4), ("k", 2), ("v", 2)):
            found[f"{head}self_attn.{part}_proj.weight"] = (heads * width, HIDDEN)
            if kind == "qwen2":
                found[f"{head}self_attn.{part}_proj.bias"] = (heads * width,)
        found[f"{head}self_attn.o_proj.weight"] = (HIDDEN, 4 * width)
        if kind == "qwen3":
            found |= {f"{head}self_attn.{part}_norm.weight": (width,) for part in "qk"}
        found |= {f"{head}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{head}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{head}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return found


def _tokenizer(folder: Path) -> None:
    """One that reads letter by letter, of the kind that all these models' libraries load."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *LETTERS))}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": token, "special": True, **plain} for i, token in enumerate(SPECIAL)]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    whole |= {"version": "1.0", "model": model, "added_tokens": added, "pre_tokenizer": bytewise, "decoder": bytewise}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors under published names, in float32 (bfloat16 widened)."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _read(path)
    for name in [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        head, value = name.rpartition(".")[0], found.pop(name)
        for i, own in enumerate(value):
            parts = {"down_proj": own}
            if name.endswith("gate_up_proj"):
                parts = {"gate_proj": own[: len(own) // 2], "up_proj": own[len(own) // 2 :]}
            found |= {f"{head}.{i}.{part}.weight": matrix for part, matrix in parts.items()}
    plain = {}
    for name, value in found.items():
        for old, new in (
            (".block_sparse_moe.", ".mlp."),
            (".w1.", ".gate_proj."),
            (".w2.", ".down_proj."),
            (".w3.", ".up_proj."),
        ):
            name = name.replace(old, new)
        plain[name] = value
    return plain


def _read(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors; NumPy has no bfloat16, whose bits are the upper half of a float32."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if all(entry.get("dtype") != "BF16" for entry in header.values()):
        return dict(load_file(path))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + at for at in entry["data_offsets"])
            bits = np.frombuffer(raw[start:stop], "<u2").astype(np.uint32) << np.uint32(16)
            found[name] = bits.view(np.float32).reshape(entry["shape"])
    return found


def compared(case: Case, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong."""
    wrong = [f"{case.name}: {name} is in one alone" for name in sorted(ours.keys() ^ theirs.keys())]
    gates = [name for name in ours if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    rest = [name for name in ours if name not in gates and name in theirs]
    differing = [name for name in rest if not np.array_equal(ours[name], theirs[name])]
    wrong += [f"{case.name}: {name} differs" for name in differing]
    largest, cosine = 0.0, 1.0
    for name in gates:
        one, other = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        largest = max(largest, float(np.abs(one - other).max()))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = min(cosine, float(((one * other).sum(1) / lengths).min()))
    good = cosine > COSINE if case.bfloat16 else largest <= EXACT
    wrong += [] if good else [f"{case.name}: routers differ by {largest:.3g}, cosine {cosine:.6f}"]
    copied = f"{len(rest) - len(differing)} of {len(rest)}"
    return f"| {case.name} | {copied} | {len(gates)} | {largest:.1e} | {cosine:.6f} |", wrong


def main() -> None:
    """Make the models, run both, compare; print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mergekit", help="the Python that has mergekit 0.1.5")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        jobs = []
        for i, case in enumerate(CASES):
            path = folder / f"{i}.yaml"
            path.write_text(yaml.safe_dump(case.recipe()))
            jobs.append([str(path), str(folder / f"theirs-{i}")])
            code = "from interfuse.cli import main; main()"
            subprocess.run([sys.executable, "-c", code, "moe", str(path), str(folder / f"ours-{i}")], check=True)
        command = [options.mergekit, "-c", THEIRS, json.dumps(jobs)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        errors = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"all": done.stderr[-2000:]}
        rows, wrong = [], [f"mergekit, {key}: {said}" for key, said in errors.items()]
        for i, case in enumerate(CASES):
            if str(i) not in errors and "all" not in errors:
                row, more = compared(case, tensors(folder / f"ours-{i}"), tensors(folder / f"theirs-{i}"))
                rows.append(row)
                wrong += more
    head = "| Recipe | Copied tensors, equal to the bit | Routers | Largest difference | Least cosine |\n|---|---|---|---|---|"
    page = "\n".join(
        [f"# Mixtures of experts beside mergekit-moe 0.1.5\n\n{__doc__.partition('Tiny')[0].strip()}\n", head, *rows]
    )
    page += "\n\nUnder `hidden`, mergekit reads the prompts in bfloat16, here they are read in the model's own float32.\n"
    print(page)
    if options.out is not None:
        options.out.write_text(page, encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

"""Makes a Llama-shaped bf16 model and fine-tunes of it, in shards, out of seeded noise. They say nothing; they weigh.

A fine-tune is the base plus noise, rounded to bf16. The noise is so small that 44% of the differences are exactly zero,
which is what real bf16 fine-tunes look like; equal magnitudes are what makes exact selection hard.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 1 << 20  # elements made at a time
BASE_SCALE, NOISE_SCALE = 0.02, 6.7e-5  # standard deviations; these two give 44% zeros


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, by the names that its config has."""

    num_hidden_layers: int = 22
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    shards: int = 5

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the layers."""
        wide, inner = self.hidden_size, self.intermediate_size
        narrow = wide // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (narrow, wide),
            "self_attn.v_proj": (narrow, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
            "input_layernorm": (wide,),
            "post_attention_layernorm": (wide,),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, wide)}
        for index in range(self.num_hidden_layers):
            found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": (wide,), "lm_head.weight": (self.vocab_size, wide)}

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(int(np.prod(shape)) for shape in self.tensors.values())


FULL = Shape()
TINY = Shape(2, 64, 128, 4, 2, 512, 2)


def make_models(folder: Path, shape: Shape, finetunes: int, seed: int = 0) -> list[Path]:
    """Write `base` and `finetune-1`, ... under `folder`; returns their folders, the base first."""
    folders = [folder / "base", *(folder / f"finetune-{i + 1}" for i in range(finetunes))]
    shards = _shards(shape)
    files: list[list[int]] = []  # a descriptor for each shard and model
    for path in folders:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(_config(shape), indent=2))
    index: dict[str, str] = {}
    blocks: list[tuple[int, int, int, int, int]] = []  # shard, number of the tensor, place in the file, first, count
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header = _header(shard)
        files.append([os.open(path / name, os.O_CREAT | os.O_RDWR, 0o644) for path in folders])
        for descriptor in files[-1]:
            os.pwrite(descriptor, header, 0)
        place = len(header)
        for tensor, dimensions in shard.items():
            count = int(np.prod(dimensions))
            for first in range(0, count, BLOCK):
                blocks.append((number, len(index), place + 2 * first, first, min(BLOCK, count - first)))
            index[tensor] = name
            place += 2 * count
    total = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": index}
    for path in folders:
        (path / "model.safetensors.index.json").write_text(json.dumps(total, indent=2))

    def fill(block: tuple[int, int, int, int, int]) -> None:
        shard, tensor, place, first, count = block
        drawn = _draw(np.random.default_rng((seed, tensor, first)), count, finetunes, len(shape_of[tensor]) == 1)
        for descriptor, values in zip(files[shard], drawn, strict=True):
            os.pwrite(descriptor, values.data, place)

    shape_of = [shape for shard in shards for shape in shard.values()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(fill, blocks):
            pass
    for descriptor in (d for shard in files for d in shard):
        os.close(descriptor)
    return folders


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """One tensor of a sharded or a single safetensors file, in float64."""
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with open(folder / file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size))[name]
        start, stop = entry["data_offsets"]
        stream.seek(8 + size + start)
        bits = np.frombuffer(stream.read(stop - start), np.uint16)
    return widen(bits).astype(np.float64).reshape(entry["shape"])


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16, as uint16, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _draw(random: np.random.Generator, count: int, finetunes: int, gain: bool) -> Iterator[np.ndarray]:
    """The base's block and each fine-tune's, in bf16; `gain` is a norm's weights, round 1."""
    base = random.standard_normal(count, dtype=np.float32)
    base *= BASE_SCALE
    base += np.float32(gain)
    bits = _round(base)
    yield bits
    base = widen(bits)
    for _ in range(finetunes):
        noise = random.standard_normal(count, dtype=np.float32)
        noise *= NOISE_SCALE
        noise += base
        yield _round(noise)


def _round(values: np.ndarray) -> np.ndarray:
    """Finite float32 in bf16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut into shards of about one size."""
    share, done = shape.parameters / shape.shards, 0
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shape.shards)]
    for name, dimensions in shape.tensors.items():
        shards[min(int(done / share), shape.shards - 1)][name] = dimensions
        done += int(np.prod(dimensions))
    return [shard for shard in shards if shard]


def _header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dimensions in tensors.items():
        start, end = end, end + 2 * int(np.prod(dimensions))
        entries[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [start, end]}  # type: ignore[dict-item]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _config(shape: Shape) -> dict[str, object]:
    sizes = dataclasses.asdict(shape)
    del sizes["shards"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }

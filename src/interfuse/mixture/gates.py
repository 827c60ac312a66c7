"""The routers' weights: one vector an expert and layer, along which a token's state is the expert's.

hidden: the base reads the prompts, and the states that enter each layer are taken, at each prompt's last token or as the mean
over its tokens; those of the positive prompts less those of the negative ones, to length 1. cheap_embed: the prompts' mean
embedding, alike for all layers. Else numbers are drawn. Only hidden states need torch; the prompts need the base's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from interfuse.checkpoints.numbers import widen
from interfuse.checkpoints.source import Checkpoint
from interfuse.errors import ModelError, Problem
from interfuse.mixture.recipe import DRAWN, Expert, MixtureRecipe
from interfuse.progress import track
from interfuse.recipe.references import Reference

#: What a vector's length is divided by at least, so that prompts that cancel out give a vector near zero, not noise.
_LEAST = 1e-8
#: A vector has length 1, or near 0 where prompts cancel out: as in the first layer, where the last tokens are the same.
_NOTHING = 0.5
_EMBEDDING = "model.embed_tokens.weight"


def gate_vectors(
    recipe: MixtureRecipe, base: Checkpoint, layers: int, hidden: int, *, device: str | None, progress: bool
) -> np.ndarray:
    """The gates `[layers, experts, hidden]` in float32; a shared expert's, where it has one or all are drawn, comes last.

    `device` is where the base reads prompts: cpu or cuda, left out cuda if there is one. A base without a tokenizer, or one
    that can't be loaded, is a `ModelError`.
    """
    gated = list(recipe.experts)
    if recipe.shared is not None and (recipe.shared.positive_prompts is not None or recipe.gate_mode in DRAWN):
        gated.append(recipe.shared)
    if recipe.gate_mode in DRAWN:
        return _drawn(recipe, layers, len(gated), hidden)
    tokenize = _tokenizer(recipe)
    state = _embedded(base, layers) if recipe.gate_mode == "cheap_embed" else _states(recipe, base, device)
    found = [
        _of_expert(expert, lambda prompts: state([tokenize(prompt) for prompt in prompts]))
        for expert in track(gated, "reading prompts", len(gated), shown=progress)
    ]
    empty = [i for i, vectors in enumerate(found) if np.linalg.norm(vectors, axis=-1).max() < _NOTHING]
    if empty:
        names = [f"experts[{i}]" if i < len(recipe.experts) else "shared_experts[0]" for i in empty]
        wrong, allowed = "the positive prompts less the negative ones leave nothing", "give prompts that differ"
        raise ModelError(*(Problem(name, wrong, allowed) for name in names))
    return np.stack(found, 1).astype(np.float32)


def _drawn(recipe: MixtureRecipe, layers: int, experts: int, hidden: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=[recipe.seed, 0]))
    if recipe.gate_mode == "random":
        return random.standard_normal((layers, experts, hidden), np.float32)
    bound = hidden**-0.5
    return random.uniform(-bound, bound, (layers, experts, hidden)).astype(np.float32)


def _of_expert(expert: Expert, state: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """`[layers, hidden]`: positive less negative, to length 1."""
    vectors = state(expert.positive_prompts or [])
    if expert.negative_prompts:
        vectors = vectors - state(expert.negative_prompts)
    return _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _LEAST)


def _tokenizer(recipe: MixtureRecipe) -> Callable[[str], list[int]]:
    """From a prompt to its tokens, after the token that begins a text, where the base has one."""
    from interfuse.models import load_tokenizer

    reference = Reference.parse(recipe.base_model)
    tokenizer = load_tokenizer(str(Reference(reference.path, reference.revision)))
    if tokenizer is None:
        allowed = "add its tokenizer's files, or give gate_mode: random"
        raise ModelError(Problem("base_model", f"{reference.path} has no tokenizer to read the prompts with", allowed))

    begin = tokenizer.bos_token or ""

    def tokens(prompt: str) -> list[int]:
        found: list[int] = tokenizer(begin + prompt, add_special_tokens=False)["input_ids"]
        if len(found) <= bool(begin):
            raise ModelError(Problem("prompts", f"{prompt!r} gives no token", "give a text that the base's tokenizer reads"))
        return found

    return tokens


def _embedded(base: Checkpoint, layers: int) -> Callable[[Sequence[list[int]]], np.ndarray]:
    """The direction of the tokens' mean embedding, for every layer; rows are read one by one, not the table."""
    spec = base.specs[_EMBEDDING]
    width = spec.shape[1]

    def state(prompts: Sequence[list[int]]) -> np.ndarray:
        total: np.ndarray = np.zeros(width)
        row: np.ndarray = np.empty(width)
        for token in (token for prompt in prompts for token in prompt):
            widen(base.block(_EMBEDDING, token * width, (token + 1) * width), spec.dtype, row)
            total += row
        return np.repeat(_unit(total)[None], layers, 0)

    return state


def _states(recipe: MixtureRecipe, base: Checkpoint, device: str | None) -> Callable[[Sequence[list[int]]], np.ndarray]:
    """The mean over prompts of the states that enter each layer: one pass of the base for each list of prompts."""
    import torch

    from interfuse.checkpoints.tensors import to_tensor
    from interfuse.models import load_model

    reference = Reference.parse(recipe.base_model)
    network: Any = load_model(str(Reference(reference.path, reference.revision)), exactly=True)
    if reference.lora is not None:
        with torch.no_grad():
            for name in base.declared:
                network.get_parameter(name).copy_(to_tensor(base.read(name), base.specs[name].dtype))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network.to(where)
    averaged = recipe.gate_mode == "hidden_avg"

    @torch.no_grad()
    def state(prompts: Sequence[list[int]]) -> np.ndarray:
        length = max(map(len, prompts))
        tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=where)
        there = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=where)
        places = (there.cumsum(1) - 1).clamp(min=0)
        found = network(
            input_ids=tokens, attention_mask=there, position_ids=places, output_hidden_states=True, use_cache=False
        ).hidden_states[:-1]
        vectors = []
        for layer in found:
            layer = layer.double()
            one = (layer * there[:, :, None]).sum(1) / there.sum(1, keepdim=True) if averaged else layer[:, -1]
            vectors.append(one.mean(0).cpu().numpy())
        return np.stack(vectors)

    return state

"""Every fusion computes the formula in its docstring: against slow references of plain loops in float64, to 1e-10.

The references share nothing with the modules but the numbers in their state.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from interfuse.registry import find

WIDTHS, DIM, BATCH = (5, 8, 3), 8, 4
State = dict[str, np.ndarray]
Row = list[list[np.ndarray]]  # of one example: each model's tokens
Result = tuple[np.ndarray, list[float]]


def made(name: str, **options: Any) -> tuple[Any, State]:
    torch.manual_seed(3)
    module = find(name, "features").make(WIDTHS, DIM, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module, {key: value.numpy() for key, value in module.state_dict().items()}


def given(counts: list[int] | None) -> list[torch.Tensor]:
    torch.manual_seed(4)
    shapes = [(BATCH, w) if counts is None else (BATCH, n, w) for w, n in zip(WIDTHS, counts or WIDTHS, strict=True)]
    return [torch.randn(shape, dtype=torch.float64) * 3 + 1 for shape in shapes]


def matrix(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.array([sum(weight[i, j] * x[j] for j in range(len(x))) for i in range(len(weight))])


def branch(state: State, k: int, f: np.ndarray) -> np.ndarray:
    """h_k: layer normalisation, then a linear map."""
    mean = sum(f) / len(f)
    variance = sum((x - mean) ** 2 for x in f) / len(f)
    normal = np.array([(x - mean) / math.sqrt(variance + 1e-5) for x in f])
    normal = normal * state[f"branches.{k}.norm.weight"] + state[f"branches.{k}.norm.bias"]
    return matrix(state[f"branches.{k}.project.weight"], normal) + state[f"branches.{k}.project.bias"]


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def mean(state: State, h: list[np.ndarray]) -> Result:
    return sum(h) / len(h), [1 / len(h)] * len(h)  # type: ignore[return-value]


def weighted(state: State, h: list[np.ndarray]) -> Result:
    share = softmax([float(state[f"scores.{k}"]) for k in range(len(h))])
    return np.sum([a * x for a, x in zip(share, h, strict=True)], axis=0), share


def gate(state: State, h: list[np.ndarray]) -> Result:
    middle, total, shares = sum(h) / len(h), np.zeros(DIM), []
    for x in h:
        score = matrix(state["own.weight"], x) + state["own.bias"] + matrix(state["others.weight"], np.asarray(middle))
        opened = np.array([1 / (1 + math.exp(-s)) for s in score])
        total += opened * x
        shares.append(float(sum(opened) / DIM))
    return total, shares


def shared(state: State, h: list[np.ndarray]) -> Result:
    passed = [matrix(state["layer.0.weight"], x) + state["layer.0.bias"] for x in h]
    return np.sum([[gelu(v) for v in s] for s in passed], axis=0) / len(h), [1 / len(h)] * len(h)


def concat(state: State, h: list[np.ndarray]) -> Result:
    hidden = np.array([gelu(v) for v in np.sum(h, axis=0)])
    sizes = [math.sqrt(sum(v * v for v in x)) for x in h]
    return matrix(state["layer.2.weight"], hidden) + state["layer.2.bias"], [s / sum(sizes) for s in sizes]


def attention(state: State, tokens: Row) -> Result:
    query = state["query"]
    heads, part = query.shape
    flat = [(k, x) for k, own in enumerate(tokens) for x in own]
    keys = [np.tanh(matrix(state["key.weight"], x) + state["key.bias"]) for _, x in flat]
    z, shares = np.zeros(DIM), [0.0] * len(tokens)
    for head in range(heads):
        at = range(head * part, (head + 1) * part)
        alpha = softmax([sum(query[head, i - at.start] * key[i] for i in at) / math.sqrt(part) for key in keys])
        for a, (k, x) in zip(alpha, flat, strict=True):
            shares[k] += a / heads
            for i in at:
                z[i] += a * x[i]
    return z, shares


VECTORS = {"mean": mean, "weighted": weighted, "gate": gate, "shared": shared, "concat": concat}


@pytest.mark.parametrize("name", VECTORS)
def test_fusion_of_vectors_is_its_formula(name: str) -> None:
    module, state = made(name)
    features = given(None)
    fused, weights = module(features)
    for row in range(BATCH):
        z, share = VECTORS[name](state, [branch(state, k, f[row].numpy()) for k, f in enumerate(features)])
        np.testing.assert_allclose(fused[row].detach(), z, rtol=0, atol=1e-10)
        np.testing.assert_allclose(weights[row].detach(), share, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VECTORS)
def test_fusion_of_tokens_is_its_formula_at_every_token(name: str) -> None:
    module, state = made(name)
    features = given([3, 3, 3])
    fused, weights = module(features)
    for row in range(BATCH):
        shares = []
        for token in range(3):
            h = [branch(state, k, f[row, token].numpy()) for k, f in enumerate(features)]
            z, share = VECTORS[name](state, h)
            np.testing.assert_allclose(fused[row, token].detach(), z, rtol=0, atol=1e-10)
            shares.append(share)
        np.testing.assert_allclose(weights[row].detach(), np.mean(shares, axis=0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("counts", [None, [2, 1, 4]])
def test_attention_is_its_formula(heads: int, counts: list[int] | None) -> None:
    module, state = made("attention", heads=heads)
    features = given(counts)
    fused, weights = module(features)
    for row in range(BATCH):
        tokens = [[branch(state, k, x.numpy()) for x in f[row].view(-1, WIDTHS[k])] for k, f in enumerate(features)]
        z, share = attention(state, tokens)
        np.testing.assert_allclose(fused[row].detach(), z, rtol=0, atol=1e-10)
        np.testing.assert_allclose(weights[row].detach(), share, rtol=0, atol=1e-10)


def attend(layer: nn.MultiheadAttention, query: np.ndarray, row: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Multi-head attention of one query over a row, from the layer's numbers."""
    weight, bias = layer.in_proj_weight.detach().numpy(), layer.in_proj_bias.detach().numpy()
    of = [weight[i * DIM : (i + 1) * DIM] for i in range(3)], [bias[i * DIM : (i + 1) * DIM] for i in range(3)]
    q = matrix(of[0][0], query) + of[1][0]
    keys, values = ([matrix(of[0][i], x) + of[1][i] for x in row] for i in (1, 2))
    part = DIM // layer.num_heads
    result, shares = np.zeros(DIM), [0.0] * len(row)
    for head in range(layer.num_heads):
        at = slice(head * part, (head + 1) * part)
        alpha = softmax([float(q[at] @ key[at]) / math.sqrt(part) for key in keys])
        result[at] = np.sum([a * v[at] for a, v in zip(alpha, values, strict=True)], axis=0)
        shares = [s + a / layer.num_heads for s, a in zip(shares, alpha, strict=True)]
    return matrix(layer.out_proj.weight.detach().numpy(), result) + layer.out_proj.bias.detach().numpy(), shares


def passed(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(layer(torch.from_numpy(x)))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("counts", [None, [2, 1, 4]])
def test_transformer_is_its_formula(depth: int, counts: list[int] | None) -> None:
    module, state = made("transformer", heads=2, depth=depth)
    features = given(counts)
    fused, weights = module(features)
    for row in range(BATCH):
        tokens = [(k, branch(state, k, x.numpy())) for k, f in enumerate(features) for x in f[row].view(-1, WIDTHS[k])]
        line = [state["cls"], *(h for _, h in tokens)]
        for layer in module.encoder.layers:
            normal = [passed(layer.norm1, x) for x in line]
            line = [x + attend(layer.self_attn, n, normal)[0] for x, n in zip(line, normal, strict=True)]
            hidden = [np.array([gelu(v) for v in passed(layer.linear1, passed(layer.norm2, x))]) for x in line]
            line = [x + passed(layer.linear2, u) for x, u in zip(line, hidden, strict=True)]
        line = [passed(module.encoder.norm, x) for x in line]
        read, alpha = attend(module.reader, line[0], line[1:])
        share = [sum(a for a, (owner, _) in zip(alpha, tokens, strict=True) if owner == k) for k in range(len(WIDTHS))]
        np.testing.assert_allclose(fused[row].detach(), line[0] + read, rtol=0, atol=1e-10)
        np.testing.assert_allclose(weights[row].detach(), share, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "weighted"])
def test_models_weigh_the_same_at_the_start(name: str) -> None:
    module = find(name, "features").make(WIDTHS, DIM)
    _, weights = module([f.float() for f in given(None)])
    assert torch.allclose(weights, torch.full((BATCH, 3), 1 / 3))


def test_a_vector_beside_tokens_is_repeated_over_them() -> None:
    module, _ = made("gate")
    vector, tokens = given(None)[0], given([1, 3, 3])[1:]
    fused, weights = module([vector, *tokens])
    again, same = module([vector.unsqueeze(1).expand(-1, 3, -1), *tokens])
    torch.testing.assert_close(fused, again)
    torch.testing.assert_close(weights, same)


def test_heads_must_divide_the_width() -> None:
    for name in ("attention", "transformer"):
        with pytest.raises(ValueError, match="dim 8 isn't a multiple of 3 heads"):
            find(name, "features").make(WIDTHS, DIM, heads=3)

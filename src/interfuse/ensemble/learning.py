"""What an ensemble learns from validation data: weights, temperatures, or a linear map, by the mean log loss, in float64.

    weighted     w = argmin -1/n sum_i log sum_k w_k p_k(y_i | x_i) on the simplex, convex, by expectation maximisation
    greedy       draw networks with replacement, each time the one that lowers this loss the most, until none lowers it;
                 w_k is k's share of the draws (Caruana et al. 2004, without bagging)
    temperature  T = argmin -1/n sum_i log 1/M sum_k softmax(log p_k(x_i) / T_k)[y_i], all at once: networks that are each
                 calibrated alone have an underconfident mean (Rahaman & Thiery 2021, 2007.08792); from T = 1 on
    stacking     argmin sum_i log loss(softmax(b + sum_k V_k log p_k)) + 1/2 |V - I/M|^2 + 1/2 |b|^2 (Wolpert 1992): logistic
                 regression that starts from, and is held to, the mean of log-probabilities

`temperature_of` is the one temperature of one classifier (Guo et al. 2017, 1706.04599): convex in 1/T, by bisection.
The networks themselves aren't trained. Nothing here measures how good the result is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from interfuse.ensemble.combine import combined

#: How far the weights' loss may be above the least one, in nats, and the passes after which it is left there.
GAP, PASSES = 1e-6, 10_000
#: Temperatures are in [1/HOTTEST, HOTTEST]: with every example right, or none, the best one would be 0 or infinity.
HOTTEST = 100.0
#: The most draws of greedy selection: its weights are shares of that many.
DRAWS = 100


def learn(kind: str, logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What `kind` learns from M networks' log-probabilities (M, n, classes) and class numbers (n,); {} where nothing."""
    rule = _RULES.get(kind)
    return {} if rule is None else rule(logs.double(), targets)


def _weights(logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    own = _of_target(logs, targets)
    weight = own.new_full((len(own),), 1 / len(own))
    for _ in range(PASSES):
        ratio = (own - (own + weight.log()[:, None]).logsumexp(0)).exp().mean(1)
        if ratio.max() - 1 <= GAP:  # the loss is convex: it can't fall by more than that
            break
        weight = weight * ratio
        weight = weight / weight.sum()
    return {"weight": weight}


def _greedy(logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    # A class that none of those drawn knows has the least chance that there is, so that the next draw can better it.
    own = _of_target(logs, targets).exp().clamp(min=torch.finfo(logs.dtype).tiny)
    counts, total, loss = own.new_zeros(len(own)), torch.zeros_like(own[0]), math.inf
    for drawn in range(1, DRAWS + 1):
        losses = -((total + own) / drawn).log().mean(1)
        best = int(losses.argmin())
        if drawn > 1 and losses[best] >= loss:
            break
        counts[best], total, loss = counts[best] + 1, total + own[best], float(losses[best])
    return {"weight": counts / counts.sum()}


def _temperatures(logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    start = torch.zeros(len(logs), dtype=logs.dtype)

    def numbers(at: Tensor) -> dict[str, Tensor]:
        return {"temperatures": (math.log(HOTTEST) * (at / math.log(HOTTEST)).tanh()).exp()}

    def loss(at: Tensor) -> Tensor:
        return -_of_target(combined("temperature", logs, numbers(at))[None], targets).mean()

    return numbers(_least(loss, start)[0])


def temperature_of(logs: Tensor, targets: Tensor) -> float:
    """The temperature at which log-probabilities (n, classes) have the least log loss, in [0.01, 100].

    Examples whose class has no probability don't count; where none is left it is 1.
    """
    logs = logs.double()
    own = logs.gather(1, targets[:, None])[:, 0]
    logs, own = logs[own > -math.inf], own[own > -math.inf]
    if not len(own):
        return 1.0
    known = torch.where(logs.isinf(), 0.0, logs)
    low, high = -math.log(HOTTEST), math.log(HOTTEST)  # of log 1/T, in which the slope only changes sign once
    while high - low > 1e-9:
        middle = (low + high) / 2
        chance = (logs * math.exp(middle)).softmax(1)
        slope = float(((chance * known).sum(1) - own).mean())
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def _stacking(logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    count, _, classes = logs.shape
    start = torch.eye(classes, dtype=logs.dtype).repeat(count, 1, 1) / count
    level = torch.zeros(classes, dtype=logs.dtype)

    def loss(matrix: Tensor, bias: Tensor) -> Tensor:
        z = combined("stacking", logs, {"matrix": matrix, "bias": bias})
        return -_of_target(z[None], targets).sum() + ((matrix - start).square().sum() + bias.square().sum()) / 2

    matrix, bias = _least(loss, start, level)
    return {"matrix": matrix, "bias": bias}


def _least(loss: Callable[..., Tensor], *start: Tensor) -> list[Tensor]:
    """Where a smooth loss is least, from a start, by L-BFGS."""
    at = [tensor.clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.LBFGS(at, max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        optimizer.zero_grad()
        found = loss(*at)
        found.backward()
        return found

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(value)
    return [tensor.detach() for tensor in at]


_RULES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "weighted": _weights,
    "greedy": _greedy,
    "temperature": _temperatures,
    "stacking": _stacking,
}


def _of_target(logs: Tensor, targets: Tensor) -> Tensor:
    """Each network's log-probability of the target, (M, n)."""
    return logs.gather(2, targets.view(1, -1, 1).expand(len(logs), -1, 1))[:, :, 0]


def folds_of(targets: Tensor, folds: int, seed: int) -> Tensor:
    """A fold's number for each example, (n,): shuffled, and every class spread over the folds."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(targets[order], stable=True)]
    numbers = torch.empty_like(order)
    numbers[order] = torch.arange(len(order)) % folds
    return numbers

"""How the predictions of M classifiers become one: plain functions of their log-probabilities. Nothing is learned here.

    probabilities      1/M sum_k p_k                         (deep ensembles, Lakshminarayanan et al. 2017, 1612.01474)
    log_probabilities  softmax(1/M sum_k log p_k)            (the geometric mean; a product of experts, Hinton 2002)
    vote               (votes + 1/M sum_k p_k) / (M + 1)     (the majority; of equal votes the higher mean probability)
    weighted, greedy   sum_k w_k p_k, w on the simplex
    temperature        1/M sum_k softmax(log p_k / T_k)
    stacking           softmax(b + sum_k V_k log p_k)        (Wolpert 1992, Neural Networks 5(2))

A class that a network doesn't know has no probability from it: log p = -inf, and 0 among what stacking reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

#: What each kind learns from validation data, by name: all of the networks' numbers are in the networks' order.
LEARNS: dict[str, tuple[str, ...]] = {
    "probabilities": (),
    "logits": (),
    "log_probabilities": (),
    "vote": (),
    "weighted": ("weight",),
    "temperature": ("temperatures",),
    "stacking": ("matrix", "bias"),
    "greedy": ("weight",),
}
COMBINE = tuple(LEARNS)

#: The least log-probability that a class has from a network that knows it: that of float32's smallest number.
FLOOR = math.log(torch.finfo(torch.float32).tiny)

Numbers: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True)
class Labels:
    """The networks' label spaces joined by name: all names, in the order they are first seen, and each network's columns.

    `names` is None where the networks have the same classes in the same order, and none are named.
    """

    names: tuple[str, ...] | None = None
    columns: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def join(cls, spaces: Sequence[Sequence[str]]) -> Labels:
        """The union of the networks' lists of names."""
        names = tuple(dict.fromkeys(name for space in spaces for name in space))
        return cls(names, tuple(tuple(names.index(name) for name in space) for space in spaces))

    @property
    def alike(self) -> bool:
        """Whether every network knows every class."""
        return self.names is None or all(len(columns) == len(self.names) for columns in self.columns)

    def spread(self, k: int, values: Tensor) -> Tensor:
        """Network k's values (n, its classes) as (n, all classes), -inf where it doesn't know a class."""
        if self.names is None:
            return values
        index = torch.tensor(self.columns[k], device=values.device)
        return values.new_full((values.shape[0], len(self.names)), -math.inf).index_copy(1, index, values)


def log_probabilities_of(outputs: Tensor) -> Tensor:
    """Logits (n, classes) as log-probabilities, none below `FLOOR`."""
    return outputs.log_softmax(-1).clamp(min=FLOOR)


def _probabilities(logs: Tensor, numbers: Numbers) -> Tensor:
    return logs.logsumexp(0) - math.log(len(logs))


def _log_probabilities(logs: Tensor, numbers: Numbers) -> Tensor:
    return logs.mean(0).log_softmax(-1)


def _vote(logs: Tensor, numbers: Numbers) -> Tensor:
    votes = torch.nn.functional.one_hot(logs.argmax(-1), logs.shape[-1]).sum(0)
    return ((votes + logs.exp().mean(0)) / (len(logs) + 1)).clamp(min=torch.finfo(logs.dtype).tiny).log()


def _weighted(logs: Tensor, numbers: Numbers) -> Tensor:
    weight = numbers["weight"]
    weight = torch.where(weight.sum() > 0, weight, torch.ones_like(weight))  # those that count are missing: the others
    return (logs + (weight / weight.sum()).log().view(-1, 1, 1)).logsumexp(0)


def _temperature(logs: Tensor, numbers: Numbers) -> Tensor:
    unknown = logs.isinf()  # kept out of the division, whose gradient there would be NaN
    cooled = torch.where(unknown, 0.0, logs) / numbers["temperatures"].view(-1, 1, 1)
    return _probabilities(torch.where(unknown, logs, cooled).log_softmax(-1), numbers)


def _stacking(logs: Tensor, numbers: Numbers) -> Tensor:
    read = torch.where(logs.isinf(), 0.0, logs)
    return (torch.einsum("mnc,mdc->nd", read, numbers["matrix"]) + numbers["bias"]).log_softmax(-1)


_RULES: dict[str, Callable[[Tensor, Numbers], Tensor]] = {
    "probabilities": _probabilities,
    "log_probabilities": _log_probabilities,
    "vote": _vote,
    "weighted": _weighted,
    "greedy": _weighted,
    "temperature": _temperature,
    "stacking": _stacking,
}


def combined(kind: str, logs: Tensor, numbers: Numbers) -> Tensor:
    """The log-probabilities (n, classes) of M networks' (M, n, classes), by a kind with what it has learned."""
    return _RULES[kind](logs, numbers)

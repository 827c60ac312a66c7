"""A weight method with its numbers: what it gives before it sees a tensor, and what it has against them. Computes nothing.

Tensors with the same numbers share one call. Which numbers a tensor has is for `plan` to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Combination, Rule, normalized
from interfuse.registry import Method

_TOO_LARGE = Problem("weights", "give coefficients too large to compute with", "use weights of ordinary size")


@dataclass(frozen=True)
class Call:
    """A method with its numbers, shared by all tensors that have the same.

    `options` are by argument; one that has a value a model is a tuple. `made` is what the method gives without seeing a
    tensor: a `Combination` or a `Rule`; None says that the engine runs it for each tensor.
    """

    method: str
    form: str
    weights: tuple[float, ...]
    options: tuple[tuple[str, Any], ...]
    made: Combination | Rule | None

    def __str__(self) -> str:
        parts = [f"weight {_shown(self.weights)}"] if self.method != "copy" else []
        return ", ".join([self.method, *parts, *(f"{name.rstrip('_')} {_shown(value)}" for name, value in self.options)])


#: A tensor that is taken as it is.
COPY = Call("copy", "coefficients", (1.0,), (), Combination(0.0, (1.0,), 1.0))


def make_call(
    method: Method, weights: tuple[float, ...], options: Mapping[str, Any], *, depth: float = 0.0, whole: bool = False
) -> Call:
    """The method with these weights and options, for tensors at that depth; `whole`: for matrices, not vectors.

    Raises the method's own `UserError`, or an `OptionError` where numbers are too large or there is no model.
    """
    if not weights:
        raise OptionError(Problem("models", "none besides the base", "give at least one model to merge into it"))
    try:
        made = _made(method, weights, options, depth, whole)
    except OverflowError:
        raise OptionError(_TOO_LARGE) from None
    if isinstance(made, Combination) and not all(map(_finite, (made.base, *made.models, made.total))):
        raise OptionError(_TOO_LARGE)
    form = "coefficients" if isinstance(made, Combination) else method.form
    return Call(method.name, form, weights, tuple(options.items()), made)


def _made(
    method: Method, weights: tuple[float, ...], options: Mapping[str, Any], depth: float, whole: bool
) -> Combination | Rule | None:
    """What the method gives without a tensor; one that needs its tensor is run on a tiny one, to hear its objections."""
    if method.form == "rule":
        rule: Rule = method.make(weights, **options)
        return rule
    if method.form == "matrices" and not whole:
        return _mean(weights, options.get("lambda_", 1.0))
    if method.form == "matrices":
        method.make(np.zeros((len(weights), 1, 1), np.float32), weights, **options)
    elif method.form == "blocks":
        method.make(_Empty(len(weights)), weights, **options)
    elif method.takes("gram"):
        method.make(weights, np.eye(len(weights) + (method.of == "models" and method.sees_base)), **options)
    else:
        combination: Combination = method.make(weights, *((depth,) if method.takes("depth") else ()), **options)
        return combination
    return None


class _Empty(NamedTuple):
    """A tensor of no elements, by which a method of blocks shows what it has against weights and the number of models."""

    models: int
    shape: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _mean(weights: Sequence[float], scale: float) -> Combination:
    """What methods on matrices do with other tensors: the scaled mean delta, and the base where there is one."""
    shares = tuple(scale * share for share in normalized(weights))
    return Combination(1.0 - math.fsum(shares), shares, 1.0)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""Methods that choose, entry by entry, whose task vector counts: the largest, those many agree on, those that changed.

Each goes through a tensor in blocks, first for what it must know of the whole tensor, if anything. Everywhere a model's
weight multiplies its task vector, d_i = w_i (t_i - t0), before anything else is done, unless its docstring says otherwise.
Sources: MagMax, https://arxiv.org/abs/2407.06322; TALL masks, https://arxiv.org/abs/2405.07813; EMR-Merging,
https://arxiv.org/abs/2405.17461; Reinforced Agent Merging, https://arxiv.org/abs/2601.13572.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Block, Blocks, Scale
from interfuse.registry import EACH, register

Merge = Callable[[Block], np.ndarray]

_RAM = "https://arxiv.org/abs/2601.13572"

_FINITE = Field(ge=0, allow_inf_nan=False)

Output = Annotated[
    Literal["merged", "per_task"],
    Field(description="per_task: the output folder also has, for each model, what makes its own task's model of the merge."),
]
Epsilon = Annotated[float, _FINITE, Field(description="Entries of a delta up to this size count as unchanged.")]


@register("magmax", "weights", form="blocks", paper="https://arxiv.org/abs/2407.06322", needs="a base")
def magmax(tensor: Blocks, weights: Sequence[float], *, lambda_: Scale = 1.0) -> Merge:
    """At each entry the task vector of largest magnitude: t0 + lambda d_j, j = argmax |d_j|.

    Of two that are equal but for their sign, the positive one.
    """

    def merge(block: Block) -> np.ndarray:
        high, low = _ends(_scaled(block, weights))
        return np.where(high >= -low, high, low) * lambda_

    return merge


@register("consensus", "weights", form="blocks", paper="https://arxiv.org/abs/2405.07813", needs="a base")
def consensus(
    tensor: Blocks,
    weights: Sequence[float],
    *,
    k: Annotated[int, Field(ge=0, description="How many models must use an entry for it to be kept.")] = 2,
    threshold: Annotated[
        tuple[float, ...],
        EACH,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="A model uses an entry where |its delta| is at least this times |the others'|.",
        ),
    ] = (0.4,),
    lambda_: Scale = 1.0,
    output: Output = "merged",
) -> Merge:
    """The sum of task vectors at the entries that at least `k` models use: t0 + lambda D, D = sum d_i, elsewhere t0.

    Model i uses an entry where |d_i| >= threshold_i |D - d_i|. The paper calls `threshold` lambda, and picks it from 0.2 to
    0.6 for each task; `lambda` is, as everywhere here, what the merged delta is multiplied by. `k` 0 is task arithmetic, 1
    drops what no model uses, 2 also what one alone uses; more than there are models is an `OptionError`. With `output:
    per_task` nothing is dropped, and a task's model is the base but for the entries that it uses: a mask of a bit an entry.
    """
    if k > tensor.models:
        wrong = f"got {k} with {tensor.models} models, which keeps nothing"
        raise OptionError(Problem("parameters.k", wrong, f"at most {tensor.models}"))
    wanted = k if output == "merged" else 0

    def merge(block: Block) -> np.ndarray:
        used, total = _used(block, weights, threshold)
        return np.where(used.sum(0) >= wanted, total * lambda_, 0)

    return merge


def _used(block: Block, weights: Sequence[float], threshold: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which entries each model uses, bool [M, n], and the sum of the deltas [n]."""
    deltas = _scaled(block, weights)
    total = deltas.sum(0, dtype=np.float64).astype(deltas.dtype)
    return abs(deltas) >= _column(threshold, deltas.dtype) * abs(total - deltas), total


@register("emr", "weights", form="blocks", paper="https://arxiv.org/abs/2405.17461", needs="a base")
def emr(tensor: Blocks, weights: Sequence[float], *, output: Output = "merged") -> Merge:
    """The unified task vector of EMR-Merging: the sign of sum d_i, the largest |d_i| among those of that sign.

    That is a trunk for all tasks. The model of one task is t0 + s_i (m_i * unified), with a mask of one bit an entry, where
    its own delta has the trunk's sign, and one number for the whole model, s_i = sum |d_i| / sum |m_i * unified|: `output:
    per_task` writes them. 0 where the sum is 0.
    """
    return lambda block: _unified(_scaled(block, weights))


class Tasks(NamedTuple):
    """What parts a trunk into tasks, of one block: where each takes the trunk's entries, bool [M, n], and sums for scales.

    `sums` are float64 [2, M]; those of all blocks and tensors, added up, give a task's scale as their quotient.
    """

    masks: np.ndarray
    sums: np.ndarray


def _emr_tasks(block: Block, weights: Sequence[float], options: Mapping[str, Any]) -> Tasks:
    deltas = _scaled(block, weights)
    unified = _unified(deltas)
    masks = np.sign(deltas) * np.sign(unified) > 0
    kept = np.where(masks, abs(unified), 0)
    return Tasks(masks, np.stack([abs(deltas).sum(1, dtype=np.float64), kept.sum(1, dtype=np.float64)]))


def _tall_masks(block: Block, weights: Sequence[float], options: Mapping[str, Any]) -> Tasks:
    masks, _ = _used(block, weights, options["threshold"])
    return Tasks(masks, np.ones((2, len(weights))))


#: Methods with an output for each task: a block, the weights and the method's options to that block's part.
PER_TASK: dict[str, Callable[[Block, Sequence[float], Mapping[str, Any]], Tasks]] = {
    "emr": _emr_tasks,
    "consensus": _tall_masks,
}


@register(
    "nearswap",
    "weights",
    form="blocks",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    needs="a base and one other model",
)
def nearswap(
    tensor: Blocks,
    weights: Sequence[float],
    *,
    t: Annotated[float, _FINITE, Field(description="The furthest that an entry moves from the base.")],
) -> Merge:
    """From the base towards another model, each entry by `t` at most: t0 + w d min(1, t / |d|), d = t1 - t0.

    Where the two are near, within `t`, the entry is the model's. `t` is in the weights' own unit. Any other number of
    models than one beside the base is an `OptionError`.
    """
    one_other(tensor, "nearswap")
    (weight,) = weights
    return lambda block: block.deltas[0].clip(-t, t) * weight


@register("ram", "weights", form="blocks", paper=_RAM, needs="a base")
def ram(tensor: Blocks, weights: Sequence[float], *, epsilon: Epsilon = 1e-5) -> Merge:
    """Where one model alone changed an entry its task vector, where several did their mean: t0 + sum d_i / count.

    A model changed an entry where |t_i - t0| > epsilon, whatever its weight; other entries of a delta count as 0.
    """
    scale, alone = _column(weights, np.float64), np.ones((tensor.models, 1))
    return lambda block: _contributions(block.deltas, scale, alone, epsilon)


@register("ramplus_tl", "weights", form="blocks", paper=_RAM, needs="a base")
def ramplus_tl(
    tensor: Blocks,
    weights: Sequence[float],
    *,
    r: Annotated[float, _FINITE, Field(description="How much more a model's own entries count, times its ratio.")] = 0.1,
    alpha: Annotated[float, _FINITE, Field(description="The ratio's upper bound.")] = 0.2,
    epsilon: Epsilon = 1e-5,
) -> Merge:
    """RAM with each model's own entries scaled up by how much else it shares: times 1 + r min(alpha, shared / own).

    `own` and `shared` count, in this tensor, the entries that model i changed alone and together with others. The paper
    counts over the whole model; this is the tensor-local form, as in mergekit.
    """
    scale, counts = _column(weights, np.float64), np.zeros((2, tensor.models))
    for block in tensor:
        changed = abs(block.deltas) > epsilon
        together = changed.sum(0)
        counts += (changed & (together == 1)).sum(1), (changed & (together > 1)).sum(1)
    own, shared = counts
    ratio = shared / np.maximum(own, 1)  # without own entries nothing is scaled by it
    alone = (1 + r * np.minimum(ratio, alpha))[:, None]
    return lambda block: _contributions(block.deltas, scale, alone, epsilon)


def one_other(tensor: Blocks, name: str) -> None:
    """An `OptionError` unless there is exactly one model beside the base."""
    if tensor.models != 1:
        wrong, allowed = f"got {tensor.models} beside the base", f"{name} takes a base and exactly one other model"
        raise OptionError(Problem("models", wrong, allowed))


def _contributions(deltas: np.ndarray, scale: np.ndarray, alone: np.ndarray, epsilon: float) -> np.ndarray:
    """The mean of the weighted deltas over the models that changed an entry; of a lone one, times its `alone` [M, 1]."""
    changed = abs(deltas) > epsilon
    count = changed.sum(0)
    factor = np.where(count == 1, alone, 1.0) * scale  # in float64, so that the mean of equal ones is exact
    total = np.where(changed, deltas * factor, 0.0).sum(0)
    return (total / np.maximum(count, 1)).astype(deltas.dtype)


def _unified(deltas: np.ndarray) -> np.ndarray:
    high, low = _ends(deltas)
    total = deltas.sum(0, dtype=np.float64)
    return np.where(total > 0, high, np.where(total < 0, low, 0))


def _ends(deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest over models at each entry."""
    return deltas.max(0), deltas.min(0)


def _scaled(block: Block, weights: Sequence[float]) -> np.ndarray:
    """The deltas times the weights, [M, n]."""
    return block.deltas * _column(weights, block.deltas.dtype)


def _column(values: Sequence[float], dtype: Any) -> np.ndarray:
    """One value a model, or one for all, [M or 1, 1]."""
    return np.array(values, dtype)[:, None]

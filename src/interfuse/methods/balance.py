"""Methods that score every entry and then keep the best of a tensor: competition between tasks, and change of meaning.

Both are streamed: a cut is an exact order statistic of the scores over all blocks (`exact`), never a sample. Sources:
PCB-Merging, https://arxiv.org/abs/2410.02396; Arcee Fusion has no paper, it is defined by mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from interfuse.methods.exact import order_statistics
from interfuse.methods.forms import Block, Blocks, Scale
from interfuse.methods.selection import Merge, one_other
from interfuse.registry import register

#: The share of a delta's largest and of its smallest magnitudes that PCB clips.
_OUTLIERS = 1e-4

#: Rows longer than this are summed in pieces of this length, so that sums don't depend on the blocks.
_PIECE = 1 << 16

#: Added to probabilities, so that their ratio is defined.
_LEAST = 1e-8


@register("pcb", "weights", form="blocks", paper="https://arxiv.org/abs/2410.02396", needs="a base")
def pcb(
    tensor: Blocks,
    weights: Sequence[float],
    *,
    density: Annotated[float, Field(gt=0, le=1, description="The share of each delta's entries that compete.")] = 0.1,
    lambda_: Scale = 1.0,
) -> Merge:
    """Task vectors averaged by how they compete: t0 + lambda sum w_i b_i c_i / sum b_i, c_i the delta without outliers.

    Within a task an entry counts exp(M n_i^2), with n_i = |c_i| from 0 at the tensor's smallest to 1 at its largest; between
    tasks tanh(d_i sum_j d_j). b_i is their product, from 0 at the cut that leaves the `density` share of largest ones to 1
    at the largest, and 0 below. Outliers are clipped, the 0.01% of largest and of smallest magnitudes. This is what the
    authors' code computes (the paper writes softmaxes over the entries for both factors), on one tensor at a time where
    they take the whole model as one vector. Weights scale what is summed; scores don't see them.
    """
    models = tensor.models
    count = math.prod(tensor.shape)
    outliers = int(count * _OUTLIERS)
    ends = order_statistics(lambda: (abs(block.deltas) for block in tensor), models, [outliers, count - 1 - outliers])
    low, high = ends[:, :1], ends[:, 1:]

    def clipped(block: Block) -> np.ndarray:
        return np.copysign(abs(block.deltas).clip(low, high), block.deltas) * (block.deltas != 0)

    def scores(block: Block) -> np.ndarray:
        deltas = block.deltas.astype(np.float64)
        within = _between(abs(block.deltas), low, high)
        return (np.exp(models * within**2) * np.tanh(deltas * deltas.sum(0))).astype(block.deltas.dtype)

    cuts = order_statistics(lambda: map(scores, tensor), models, [min(int(count * (1 - density)), count - 1), count - 1])
    scale = np.array(weights, np.float64)[:, None]

    def merge(block: Block) -> np.ndarray:
        found = scores(block)
        # Where all that compete score alike the range is empty: they share evenly.
        share = np.where(cuts[:, :1] == cuts[:, 1:], found >= cuts[:, :1], _between(found, cuts[:, :1], cuts[:, 1:]))
        total = share.sum(0)
        summed = (scale * share * clipped(block)).sum(0) / np.where(total > 0, total, 1.0)
        return (lambda_ * summed).astype(block.deltas.dtype)

    return merge


def _between(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where values lie from `low`, 0, to `high`, 1, those outside taken as the nearer end; 0 where the two are equal."""
    width = high.astype(np.float64) - low
    return (values.clip(low, high).astype(np.float64) - low) / np.where(width > 0, width, 1.0)


@register(
    "arcee_fusion",
    "weights",
    form="blocks",
    paper="https://github.com/arcee-ai/mergekit",
    needs="a base and one other model",
)
def arcee_fusion(tensor: Blocks, weights: Sequence[float]) -> Merge:
    """Takes over another model's entries where they matter most: t0 + w d where |d| KL >= median + 1.5 (q3 - q1), else t0.

    d = t1 - t0, and KL is that of the softmax of the model's row (along the last axis) from the base's, each probability
    plus 1e-8. q1, the median and q3 are the |d| KL of rank floor(q (n - 1)), exact: mergekit takes a sample above a million
    entries, and sums up in float32, where the KL of small changes drowns. Any other number of models than one beside the
    base is an `OptionError`.
    """
    one_other(tensor, "arcee_fusion")
    (weight,) = weights
    importance = _importance(tensor)
    count = math.prod(tensor.shape)
    ranks = [int(q * (count - 1)) if count else 0 for q in (0.25, 0.5, 0.75)]
    first, median, third = order_statistics(lambda: (importance(block)[None] for block in tensor), 1, ranks)[0].astype(float)
    threshold = median + 1.5 * (third - first)

    def merge(block: Block) -> np.ndarray:
        return np.where(importance(block) >= threshold, block.deltas[0] * weight, 0)

    return merge


def _importance(tensor: Blocks) -> Callable[[Block], np.ndarray]:
    """Block -> |d| KL, [n]. Where a row doesn't fit a block, its KL is found here, in three passes, and kept."""
    row = tensor.shape[-1] if tensor.shape else 1
    first = next(iter(tensor), None)

    def of_rows(block: Block) -> np.ndarray:
        base, model = (side.reshape(-1, row) for side in _sides(block))
        change = _change(base, model, _logits(base), _logits(model))
        return (abs(block.deltas[0].reshape(-1, row)) * change[:, None]).astype(block.deltas.dtype).reshape(-1)

    if first is None or first.deltas.shape[1] >= row:
        return of_rows
    changes = _long_rows(tensor, row)

    def of_pieces(block: Block) -> np.ndarray:
        at = np.arange(block.start, block.start + block.deltas.shape[1]) // row
        return (abs(block.deltas[0]) * changes[at]).astype(block.deltas.dtype)

    return of_pieces


def _sides(block: Block) -> np.ndarray:
    """The base and the model in float64 [2, n]."""
    assert block.base is not None, "the method needs a base"
    base = block.base.astype(np.float64)
    return np.stack([base, base + block.deltas[0]])


def _logits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a softmax takes of each row [rows, row]: its largest entry and the sum of exp(x - largest), [rows, 1]."""
    top = rows.max(1, keepdims=True)
    return top, _row_sums(np.exp(rows - top))[:, None]


def _change(base: np.ndarray, model: np.ndarray, of_base: tuple, of_model: tuple) -> np.ndarray:
    """The KL divergence of the models' rows from the base's, [rows]."""
    (top, total), (model_top, model_total) = of_base, of_model
    q = np.exp(base - top) / total + _LEAST
    p = np.exp(model - model_top) / model_total + _LEAST
    return _row_sums(p * np.log(p / q)).clip(min=0)


def _row_sums(rows: np.ndarray) -> np.ndarray:
    total = rows[:, :_PIECE].sum(1)
    for start in range(_PIECE, rows.shape[1], _PIECE):
        total += rows[:, start : start + _PIECE].sum(1)
    return total


def _long_rows(tensor: Blocks, row: int) -> np.ndarray:
    """The KL of each row, float64 [rows]: for rows longer than a block, so that there are few."""
    count = math.prod(tensor.shape) // row
    top, total = np.full((2, count), -np.inf), np.zeros((2, count))
    change = np.zeros(count)
    for at, sides in _pieces(tensor, row):
        top[:, at] = np.maximum(top[:, at], sides.max(1))
    for at, sides in _pieces(tensor, row):
        total[:, at] += np.exp(sides - top[:, at, None]).sum(1)
    for at, sides in _pieces(tensor, row):
        p, q = (np.exp(sides - top[:, at, None]) / total[:, at, None] + _LEAST)[::-1]
        change[at] += (p * np.log(p / q)).sum()
    return change.clip(min=0)


def _pieces(tensor: Blocks, row: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each row's number and its next piece of base and model, float64 [2, n], cut every `_PIECE` from the row's start."""
    held, at = np.empty((2, 0)), 0
    for block in tensor:
        held = np.concatenate([held, _sides(block)], axis=1)
        while held.shape[1] >= (wanted := min(_PIECE, row - at % row)):
            yield at // row, held[:, :wanted]
            held, at = held[:, wanted:], at + wanted

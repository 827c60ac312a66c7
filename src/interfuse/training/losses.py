"""The losses that `fit` knows by name, and which loss and metric fit a model's outputs and targets. No training here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from interfuse.errors import DataError, ModelError, Problem
from interfuse.evaluation.metrics import AnyMetric, Metric, find_metric

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of logits (n, classes) and class numbers (n,), or probabilities (n, classes)."""
    try:
        return nn.functional.cross_entropy(outputs, targets if targets.is_floating_point() else targets.long())
    except IndexError:  # the CPU finds a class that isn't there only when it is met
        raise ModelError(_beyond(outputs, targets)) from None


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of logits (n,) or (n, 1) and 0 or 1; entry by entry where there are several."""
    outputs = _wide(outputs)
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error, entry by entry."""
    outputs = _wide(outputs)
    return nn.functional.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute error, entry by entry."""
    outputs = _wide(outputs)
    return nn.functional.l1_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


_LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
    "mae": mae,
}
LOSSES = ("auto", *_LOSSES)


def _wide(outputs: Tensor) -> Tensor:
    """In float32 at least, so that targets aren't rounded to the outputs' half precision."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def loss_for(loss: str | Loss, outputs: Tensor, targets: Tensor | None) -> Loss:
    """The loss asked for, once it's sure that it takes these outputs and targets of the first batch."""
    if callable(loss):
        return loss
    if targets is None:
        raise DataError(Problem("train", "the batches hold no targets", "give (inputs, targets), or a loss of your own"))
    if loss == "auto":
        one = outputs.ndim == 1 or outputs.shape[-1] == 1
        loss = "mse" if targets.is_floating_point() else "binary_cross_entropy" if one else "cross_entropy"
    problem = _misfit(loss, outputs, targets)
    if problem is not None:
        raise ModelError(problem)
    return _LOSSES[loss]


def _misfit(loss: str, outputs: Tensor, targets: Tensor) -> Problem | None:
    wrong = f"{loss} of outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    problem = Problem("head", wrong, "give the head one output for each class or value")
    if loss == "cross_entropy" and not targets.is_floating_point():
        if outputs.ndim < 2 or targets.shape != (len(outputs), *outputs.shape[2:]):
            return problem
        known = targets[targets != -100]  # torch's mark for a target to leave out
        fine = known.numel() == 0 or (int(known.min()) >= 0 and int(known.max()) < outputs.shape[1])
        return None if fine else _beyond(outputs, targets)
    if outputs.numel() != targets.numel():
        return problem
    if loss == "binary_cross_entropy" and not (targets.min() >= 0 and targets.max() <= 1):
        low, high = targets.min().item(), targets.max().item()
        return Problem("head", f"one output, but the targets go from {low} to {high}", "0 and 1, or one output a class")
    return None


def _beyond(outputs: Tensor, targets: Tensor) -> Problem:
    known = targets[targets != -100]
    wrong = f"{outputs.shape[1]} classes, but the targets go from {int(known.min())} to {int(known.max())}"
    return Problem("head", wrong, "give the head one output for each class; the first class is 0")


def metric_for(metric: AnyMetric | None, outputs: Tensor, targets: Tensor | None) -> Metric | None:
    """The metric asked for; accuracy for class numbers; none otherwise."""
    if metric is not None:
        return find_metric(metric)
    return find_metric("accuracy") if targets is not None and not targets.is_floating_point() and targets.ndim == 1 else None

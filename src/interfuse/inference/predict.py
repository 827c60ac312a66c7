"""Predictions of a network over a whole data set, in evaluation mode and without gradients. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from interfuse.errors import DataError, Problem
from interfuse.inference.batches import batches, length
from interfuse.inference.features import cached
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import call, move, prediction, split_batch
from interfuse.modules.taps import quiet
from interfuse.progress import track

Row: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None]"  # outputs, targets, weights of a batch


class Predictions(NamedTuple):
    """All outputs (n, ...) on the CPU, the targets (n, ...) or None, and a fusion's weights (n, models) or None."""

    outputs: Tensor
    targets: Tensor | None
    weights: Tensor | None


def predict(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Predictions:
    """Run `model` over `data` (a loader, data set, (inputs, targets), or iterable of batches) and gather what it gives.

    device: where to run; default: where the model is. cache: a folder for the features of a fusion's frozen networks.
    """
    loader: Iterable[Any] = batches(data, batch_size)
    if device is not None:
        model.to(device)
    parameter = next(model.parameters(), None)
    place = torch.device(device or (parameter.device if parameter is not None else "cpu"))
    stored = "" if cache is None else cached(model, loader, Path(cache), progress=progress)
    from_readings = not isinstance(stored, str)
    rows: list[Row] = []
    with quiet(model):
        for batch in track(stored if from_readings else loader, "predicting", length(loader), shown=progress):
            rows.append(_one(model, batch, place, from_readings=from_readings))
    if not rows:
        raise DataError(Problem("data", "no batches", "give at least one"))
    outputs, targets, weights = zip(*rows, strict=True)
    return Predictions(torch.cat(outputs), _joined(targets), _joined(weights))


def _one(model: nn.Module, batch: Any, device: torch.device, *, from_readings: bool) -> Row:
    inputs, targets = batch if from_readings else split_batch(batch)
    inputs = move(inputs, device)
    weights = None
    if isinstance(model, ModelFusion):
        outputs, weights = model.fuse(inputs, True) if from_readings else model(inputs, True)
    else:
        outputs = prediction(call(model, inputs))
    return outputs.float().cpu(), targets, None if weights is None else weights.float().cpu()


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [part.cpu() for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None

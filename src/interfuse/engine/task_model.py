"""`task_model`: the model of one task of a merge with `output: per_task`, in memory or as a folder. The public function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interfuse.checkpoints.tasks import open_task
from interfuse.checkpoints.writer import whole_folder
from interfuse.engine.chain import plan_recipe
from interfuse.engine.output.folder import merge_into
from interfuse.recipe import Recipe

if TYPE_CHECKING:
    import torch


def task_model(
    folder: str | Path,
    task: str,
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, torch.Tensor] | Path:
    """The model of one task of a folder that a merge with `output: per_task` wrote: its tensors, or with `out` a folder.

    `base` says where the merge's base is if it has moved. With `out` it is written in blocks, with the trunk's side files,
    and its Path is given; one that is there needs `overwrite`. In recipes and comparisons `FOLDER#TASK` is the same model.
    A task that isn't there, or a base that isn't the one it was, is a `CheckpointError`.
    """
    from interfuse.checkpoints.tensors import to_tensor

    checkpoint = open_task(folder, task, base)
    if out is None:
        return {name: to_tensor(checkpoint.read(name).copy(), spec.dtype) for name, spec in checkpoint.specs.items()}
    content: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": checkpoint.name, "name": task}]}
    recipe = Recipe.model_validate(content)
    plan, sources = plan_recipe(recipe, {checkpoint.name: checkpoint})
    with whole_folder(out, overwrite=overwrite, inputs=[folder, *([] if base is None else [base])]) as part:
        merge_into(plan, sources, part, recipes=[recipe.model_dump(exclude_defaults=True)])
    return Path(out)

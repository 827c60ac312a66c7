"""The methods of layers as recipes know them: options, read off these signatures. What they do is in the modules beside."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from interfuse.registry import register
from interfuse.transfer.report import Report
from interfuse.transfer.stages import Stage, Stages, StagesRecord
from interfuse.transfer.transplant import transplant

_RULES = "Patterns of the source's names and the target's, {encoder.layer.*: layers.*}; null leaves tensors out."
_DEPTH = "A stack of the target and where the source's layers go in it, {layers: {0: 0, 1: 2}}; or spread, or repeat."
_ADAPT = "How tensors of other shapes are made to fit: crop, pad, kernels, positions, heads; for all, or by pattern."
_STRICT = "Whether a tensor that finds no place, or is given none, is an error."


@register("transplant", "layers", paper="Yosinski et al. 2014, arXiv:1411.1792", needs="a target")
def transplanted(
    source: nn.Module,
    target: nn.Module,
    *,
    rules: Annotated[dict[str, str | None] | None, Field(description=_RULES)] = None,
    depth: Annotated[str | dict[str, Any] | None, Field(description=_DEPTH)] = None,
    adapt: Annotated[str | list[str] | dict[str, str | list[str]] | None, Field(description=_ADAPT)] = None,
    strict: Annotated[bool, Field(description=_STRICT)] = False,
) -> Report:
    """Copies parameters into `target` as they are: by name, by map, by layer, adapted where asked."""
    return transplant(source, target, rules, depth=depth, adapt=adapt, strict=strict, show=False)


@register("stages", "layers", paper="Howard & Ruder 2018, arXiv:1801.06146", needs="a target, training data")
def staged(stages: list[Stage], target: nn.Module, models: dict[str, nn.Module], train: Any, validation: Any) -> StagesRecord:
    """Builds `target` up step by step: `stages` say what is copied from where, what grows, and what is trained."""
    return Stages(stages).run(target, models, train, validation)

"""The methods of layers as recipes know them: options, read off these signatures. What they do is in the modules beside."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from interfuse.modules.cross_stitch import CrossStitch
from interfuse.modules.stitched import Stitched
from interfuse.registry import register
from interfuse.transfer.report import Report
from interfuse.transfer.sharing import SharedTrunk, share_trunk
from interfuse.transfer.stages import Stage, Stages, StagesRecord
from interfuse.transfer.stitch import stitch
from interfuse.transfer.transplant import transplant
from interfuse.transfer.tying import Tied, tie

_RULES = "Patterns of the source's names and the target's, {encoder.layer.*: layers.*}; null leaves tensors out."
_DEPTH = "A stack of the target and where the source's layers go in it, {layers: {0: 0, 1: 2}}; or spread, or repeat."
_ADAPT = "How tensors of other shapes are made to fit: crop, pad, kernels, positions, heads; for all, or by pattern."
_VOCABULARY = (
    "true: rows of embeddings and heads go by token, as the tokenizers of both models say; {source: FOLDER, target: FOLDER} "
    "names others."
)
_STRICT = "Whether a tensor that finds no place, or is given none, is an error."

_BLOCKS_DEPTH = "How many blocks are shared, or the path of the last one; auto: the smallest network that is good enough."
_METHOD = "The method of weights that merges the trunks."
_OPTIONS = "That method's own options, and `weights`, one a model."
_BLOCKS = "The module whose children are the blocks; left out, the longest list of blocks that all models have."
_ALSO = "Modules that are used in the trunk and registered behind it."
_TOLERANCE = "With depth: auto, the share of the models' validation value that may be lost."
_WITHIN = "With depth: auto, who may lose so much: each task, or the mean of all."
_DEPTHS = "With depth: auto, the depths that are tried; left out, all."
_LAYERS = "Paths of modules, or {model: path} of those models that have a part in it."
_START = "Where tied parameters begin: at the mean of the models', or at the first one's."
_AT = "The two modules: the output of the first model's is put, through a map, in the place of the second's."
_RIDGE = "Times the mean variance of the first model's features, what holds back weights that the samples don't determine."
_SAMPLES = "How many samples the map is fitted to; left out, all."
_Place = Annotated[str, Field(min_length=1)]


_CROSS = inspect.signature(CrossStitch).parameters  # its defaults, which are written there alone


@register("transplant", "layers", paper="Yosinski et al. 2014, arXiv:1411.1792", needs="a target")
def transplanted(
    source: nn.Module,
    target: nn.Module,
    *,
    rules: Annotated[dict[str, str | None] | None, Field(description=_RULES)] = None,
    depth: Annotated[str | dict[str, Any] | None, Field(description=_DEPTH)] = None,
    adapt: Annotated[str | list[str] | dict[str, str | list[str]] | None, Field(description=_ADAPT)] = None,
    vocabulary: Annotated[bool | dict[Literal["source", "target"], str] | None, Field(description=_VOCABULARY)] = None,
    strict: Annotated[bool, Field(description=_STRICT)] = False,
) -> Report:
    """Copies parameters into `target` as they are: by name, by map, by layer, adapted where asked."""
    tokens = (vocabulary["source"], vocabulary["target"]) if isinstance(vocabulary, dict) else None
    return transplant(source, target, rules, depth=depth, adapt=adapt, vocabulary=tokens, strict=strict, show=False)


@register("stages", "layers", paper="Howard & Ruder 2018, arXiv:1801.06146", needs="a target, training data")
def staged(stages: list[Stage], target: nn.Module, models: dict[str, nn.Module], train: Any, validation: Any) -> StagesRecord:
    """Builds `target` up step by step: `stages` say what is copied from where, what grows, and what is trained."""
    return Stages(stages).run(target, models, train, validation)


@register(
    "share_trunk", "layers", paper="Caruana 1997, doi:10.1023/A:1007379606734", needs="a depth, or validation data a task"
)
def shared(
    experts: Mapping[str, nn.Module],
    *,
    depth: Annotated[Annotated[int, Field(ge=0)] | _Place, Field(description=_BLOCKS_DEPTH)] = "auto",
    method: Annotated[str, Field(description=_METHOD)] = "linear",
    options: Annotated[dict[str, Any] | None, Field(description=_OPTIONS)] = None,
    blocks: Annotated[str | None, Field(description=_BLOCKS)] = None,
    also: Annotated[list[_Place] | None, Field(description=_ALSO)] = None,
    tolerance: Annotated[float, Field(ge=0, lt=1, description=_TOLERANCE)] = 0.01,
    within: Annotated[Literal["each", "mean"], Field(description=_WITHIN)] = "each",
    depths: Annotated[list[Annotated[int, Field(ge=0)] | _Place] | None, Field(description=_DEPTHS)] = None,
) -> SharedTrunk:
    """Merges the first blocks of several fine-tunes into one trunk; the rest and the heads stay each one's own."""
    return share_trunk(experts, depth, method=method, blocks=blocks, also=also or (), **(options or {}))


@register("tie", "layers", paper="Caruana 1997, doi:10.1023/A:1007379606734", needs="training data a task")
def tied(
    models: Mapping[str, nn.Module],
    *,
    layers: Annotated[list[_Place | dict[str, str]], Field(min_length=1, description=_LAYERS)],
    start: Annotated[Literal["mean", "first"], Field(description=_START)] = "mean",
) -> Tied:
    """Gives equal layers of different networks the same parameters, and trains all of them together."""
    return tie(models, layers, start=start)


@register("stitch", "layers", paper="Csiszarik et al. 2021, arXiv:2110.14633", needs="samples, labelled or not")
def stitched(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    at: Annotated[list[_Place], Field(min_length=2, max_length=2, description=_AT)],
    ridge: Annotated[float, Field(ge=0, description=_RIDGE)] = 1e-6,
    samples: Annotated[int | None, Field(ge=1, description=_SAMPLES)] = None,
) -> Stitched:
    """Joins two trained networks by a linear map, by least squares: one up to a place, the other from a place on."""
    return stitch(a, b, (at[0], at[1]), data, ridge=ridge, samples=samples)


_CROSSED = "The modules after which the networks are mixed, in the order they run: a list for all, a list a model, or by model."
_OWN = "How much of itself each network begins with; the others share the rest."
_UNIT = "One weight for a network's features as a whole, or one a channel."
_HEADS = "Each network keeps its own, and their mean is given; or one for all, which begins as that mean."
_EXAMPLES = "How many training samples the maps between the networks are made from."


@register("cross_stitch", "layers", paper="Misra et al. 2016, arXiv:1604.03539", needs="training data")
def crossed(
    models: Mapping[str, nn.Module],
    example: Any,
    *,
    at: Annotated[list[_Place] | list[list[_Place]] | dict[str, list[_Place]], Field(min_length=1, description=_CROSSED)],
    own: Annotated[float, Field(ge=0, le=1, description=_OWN)] = _CROSS["own"].default,
    per: Annotated[Literal["unit", "channel"], Field(description=_UNIT)] = _CROSS["per"].default,
    heads: Annotated[Literal["own", "shared"], Field(description=_HEADS)] = "own",
    examples: Annotated[int, Field(ge=2, description=_EXAMPLES)] = 512,
) -> CrossStitch:
    """Runs trained networks side by side, which at several depths see a little of each other's features."""
    places = [at[name] for name in models] if isinstance(at, dict) else at
    return CrossStitch(models, places, example, own=own, per=per)

"""The recipe's form: which keys there are, of which type, in which range. What the user wrote, frozen; no arithmetic.

A value left out is `None` and stays out, so that every default is written once, where it is used. What holds between
keys (a method and its options, data and training) is in `recipe/check.py`. Source: the design's section 6; the spelling
of merges is mergekit's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict, JsonValue
from pydantic_core import PydanticCustomError

from interfuse.errors import RecipeError
from interfuse.recipe.references import Reference
from interfuse.recipe.sections import (
    COLUMNS,
    Count,
    DataSection,
    Evaluate,
    Grow,
    Head,
    Ref,
    Schedule,
    Section,
    Stage,
    Training,
    is_column,
    or_short,
)


def _as_text(value: Any) -> Any:
    """A reference's mapping form as its text."""
    if not isinstance(value, dict):
        return value
    try:
        return str(Reference.parse(value))
    except RecipeError as error:
        said = "; ".join(str(problem).replace("{", "{{").replace("}", "}}") for problem in error.problems)
        raise PydanticCustomError("reference", said) from None


def _as_range(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2 and all(type(end) is int and end >= 0 for end in value):
        return value
    raise PydanticCustomError("layer_range", "should be two whole numbers, [first, the one after the last]")


_TEXT_OR_MAPPING: list[JsonValue] = [{"type": "string", "minLength": 1}, {"type": "object"}]
_REFERENCE: JsonDict = {"anyOf": _TEXT_OR_MAPPING}
_REFERENCE_OR_NONE: JsonDict = {"anyOf": [*_TEXT_OR_MAPPING, {"type": "null"}]}

ModelRef = Annotated[str, BeforeValidator(_as_text), Field(min_length=1, json_schema_extra=_REFERENCE)]


Parameters = dict[str, Any]
#: The fusions of layers; those that fill a target; and those whose models each know a task, with data of its own.
LAYERS = ("transplant", "stages", "share_trunk", "tie", "stitch")
TARGETED = ("transplant", "stages")
TASKS = ("share_trunk", "tie")
#: Fusions that are a form of recipe by themselves.
APART = ("ensemble", "distill", "cross_stitch")


class ModelEntry(Section):
    """One model of the pool."""

    model_config = ConfigDict(json_schema_extra=or_short("string"))

    model: ModelRef = Field(
        description="A folder (transformers, or interfuse's own), FOLDER#TASK, a hub id, python:package.module:function "
        "(needs --trust-code); for a merge also a file of weights, MODEL@REVISION, MODEL+LORA, or {model: {path, revision}, "
        "lora: {path, revision}}.",
        json_schema_extra=_REFERENCE,
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="What the model is called in tables and weights; left out, it is read off the reference.",
    )
    weights: Ref | None = Field(
        default=None, description="A safetensors file, or a folder with one, that fills the network which `model` builds."
    )
    tap: Ref | None = Field(
        default=None, description="The module whose output is the feature; left out, what feeds the last Linear layer."
    )
    freeze: bool | None = Field(
        default=None,
        description="Whether this model's weights stay as they are. Default: true in a fusion; false for a model alone, "
        "where true trains only the last Linear layer.",
    )
    input: Any = Field(
        default=None,
        description="What this model reads of the data, in place of data.input: an array or column, or a list of columns of "
        "numbers. Empty cells are inputs that are missing.",
        json_schema_extra={"anyOf": [*COLUMNS, {"type": "null"}]},
    )
    parameters: Parameters = Field(default_factory=dict, description="This model's own options in a merge: {weight: 0.3}.")
    data: DataSection | None = Field(
        default=None,
        description="Data of this model's own: its task's (share_trunk, tie), what it teaches on (distill), or what its "
        "coefficients are learned from (adamerging). Its keys stand before those of the recipe's `data`, which holds for all.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"model": value}
        if isinstance(value, dict) and isinstance(value.get("tap"), int) and not isinstance(value["tap"], bool):
            return value | {"tap": str(value["tap"])}  # a module of a Sequential, which YAML reads as a number
        return value

    @field_validator("input")
    @classmethod
    def _input(cls, value: Any) -> Any:
        if value is None or is_column(value):
            return value
        raise PydanticCustomError("input", "should be a name, or a list of names")


class SliceSource(Section):
    """A range of a model's layers."""

    model: ModelRef = Field(description="The model, as in `models`.", json_schema_extra=_REFERENCE)
    layer_range: Annotated[list[int], BeforeValidator(_as_range)] = Field(
        description="The first layer, counted from 0, and the one after the last: [0, 16]."
    )
    parameters: Parameters = Field(default_factory=dict, description="This source's own options.")


class Slice(Section):
    """A run of output layers, made of as many layers of each source."""

    sources: Annotated[list[SliceSource], Field(min_length=1)] = Field(description="The ranges of layers that are merged.")
    parameters: Parameters = Field(default_factory=dict, description="Options for this slice.")
    base_model: ModelRef | None = Field(
        default=None, description="In place of the recipe's base.", json_schema_extra=_REFERENCE_OR_NONE
    )
    residual_weight: float | None = Field(default=None, description="Accepted, and changes nothing, as in mergekit.")


class Module(Section):
    """A part of a network, merged in its own way: give `slices` or `models`."""

    slices: list[Slice] | None = Field(default=None, description="As the recipe's own, for this part.")
    models: list[ModelEntry] | None = Field(default=None, description="As the recipe's own, for this part.")
    parameters: Parameters = Field(default_factory=dict, description="Options for this part.")


class TokenRow(Section):
    """Where a token's rows come from."""

    source: Any = Field(
        default=None,
        description="A model, {kind: model_token, model, token or token_id}, or {kind: zero}.",
        json_schema_extra=_REFERENCE_OR_NONE,
    )
    force: bool = Field(default=False, description="Whether models that have the token get this row too.")


class Tokenizer(Section):
    """The output's vocabulary, as docs/tokenizers.md says."""

    source: Any = Field(
        default="union", description="union, base, or a model whose tokenizer is taken.", json_schema_extra=_REFERENCE
    )
    tokens: dict[str, TokenRow] | None = Field(default=None, description="Tokens that are added, or whose rows are chosen.")
    pad_to_multiple_of: Count | None = Field(default=None, description="Rows up to the next multiple; 1 cuts padding off.")


class Recipe(Section):
    """Several trained models in, one better model out: what to fuse, how, on which data."""

    fusion: Ref | None = Field(
        default=None, description="How features or outputs are fused; see `interfuse methods`. Left out: a merge, or one model."
    )
    merge_method: Ref | None = Field(default=None, description="How weights are merged, in mergekit's spelling.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="In a file of several recipes, what later ones call this one's result.",
    )
    base_model: ModelRef | None = Field(
        default=None, description="The common ancestor, for merges of task vectors.", json_schema_extra=_REFERENCE_OR_NONE
    )
    target: ModelRef | None = Field(
        default=None,
        description="The network that is copied into, for transplant and stages, or taught, for distill: as in `models`.",
        json_schema_extra=_REFERENCE_OR_NONE,
    )
    stages: list[Stage] | None = Field(default=None, description="With fusion: stages, the steps in order.")
    models: list[ModelEntry] = Field(default_factory=list, description="The pool of models, in order.")
    slices: list[Slice] | None = Field(
        default=None, description="In place of `models`: layers of any models, stacked in this order."
    )
    modules: dict[str, Module] | None = Field(
        default=None,
        description="In place of `models`: parts of the network by the prefix of their names (vision_tower, text_decoder, "
        "encoder, ...). What is in none of them is taken as it is from the base, else from the first model.",
    )
    parameters: Parameters = Field(default_factory=dict, description="The method's options.")
    drop: list[str] | None = Field(
        default=None, description="Tensors that are left out wherever they occur: patterns as in a filter."
    )
    keep: list[str] | None = Field(
        default=None,
        description="Tensors that aren't merged but taken as they are from the base, else from the first model that has them.",
    )
    heads: Any = Field(
        default=None,
        description="separate: models with different heads become one trunk, merged, and a head a task (FOLDER#NAME); or "
        "patterns of the heads' tensors, where they can't be found.",
        json_schema_extra={
            "anyOf": [{"const": "separate"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "null"}]
        },
    )
    head: Head | None = Field(
        default=None, description="The outputs of a fusion; left out, the data's classes, or one for each value to predict."
    )
    dtype: Ref | None = Field(default=None, description="The type of a merge's inputs, and the output's default.")
    out_dtype: Ref | None = Field(default=None, description="The type that a merge is written in.")
    int8_mask: bool | None = Field(default=None, description="Accepted, and changes nothing.")
    tokenizer_source: Any = Field(
        default=None, description="The output's tokens: union, base, or a model's.", json_schema_extra=_REFERENCE_OR_NONE
    )
    tokenizer: Tokenizer | None = Field(default=None, description="In place of tokenizer_source, where more is to be said.")
    chat_template: Ref | None = Field(
        default=None, description="auto (most models'), alpaca, chatml, exaone, llama3, mistral, or Jinja."
    )
    data: DataSection | None = Field(default=None, description="The data sets.")
    training: Training | None = Field(default=None, description="How to train.")
    evaluate: Evaluate | None = Field(default=None, description="How to score on data.test.")
    seed: int = Field(default=0, ge=0, description="The seed of everything random.")

    @field_validator("heads")
    @classmethod
    def _heads(cls, value: Any) -> Any:
        listed = isinstance(value, list) and bool(value) and all(isinstance(pattern, str) and pattern for pattern in value)
        if value is None or value == "separate" or listed:
            return value
        raise PydanticCustomError("heads", "should be separate, or a list of patterns")

    @property
    def beside(self) -> dict[str, str]:
        """The network that stands beside the models, by its key: the base of a merge, the target of a transplant."""
        found = {"base_model": self.base_model, "target": self.target}
        return {key: ref for key, ref in found.items() if ref is not None}

    @property
    def form(self) -> str:
        """`merge`, `layers`, one of `APART`, `fusion`, or `single` (one model alone)."""
        if self.merge_method is not None:
            return "merge"
        if self.fusion in LAYERS:
            return "layers"
        if self.fusion is not None:
            return self.fusion if self.fusion in APART else "fusion"
        return "single"


class Wide(Section):
    """The options that every fusion of features has, beside those of its method: `ModelFusion`'s own."""

    dim: Count | None = Field(
        default=None, description="The width of the fused features; left out, the largest model's, at most 256."
    )
    pool: Literal["mean", "none"] | None = Field(
        default=None,
        description="mean (as left out): one vector a model from its tokens or places; none: a model's tokens are kept.",
    )
    residual: bool | None = Field(
        default=None,
        description="Whether the models' own predictions are added, so that training starts there; true as left out.",
    )
    branch_dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="In training, each model is dropped from each example with this probability, never all; 0 as left out.",
    )
    missing: Literal["token", "none"] | None = Field(
        default=None,
        description="What stands in for a model whose input is missing: a learned token (as left out with branch_dropout), or "
        "none: the fusion does without it.",
    )


#: The sections below the top, by key: where an unknown key is looked up.
SECTIONS: dict[str, type[Section]] = {
    "models": ModelEntry,
    "slices": Slice,
    "sources": SliceSource,
    "modules": Module,
    "tokenizer": Tokenizer,
    "tokens": TokenRow,
    "head": Head,
    "data": DataSection,
    "training": Training,
    "schedule": Schedule,
    "evaluate": Evaluate,
    "stages": Stage,
    "grow": Grow,
}

"""The sections of a recipe about data, training and evaluation, and what all sections are made of. No models: see `schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Ref = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


#: What names one input: an array or column, or several columns of numbers, which stand side by side.
COLUMNS: list[Any] = [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "uniqueItems": True},
]


def is_column(value: Any) -> bool:
    """Whether `value` is a name, or a list of different names."""
    listed = value if isinstance(value, list) and len(set(map(str, value))) == len(value) else [value]
    return bool(listed) and all(isinstance(name, str) and name for name in listed)


def or_short(kind: str) -> Any:
    """A section that may also be written as one bare value: the JSON Schema says so."""

    def extend(schema: dict[str, Any]) -> None:
        full = dict(schema)
        schema.clear()
        schema.update({"title": full.get("title", ""), "anyOf": [{"type": kind}, full]})

    return extend


class Section(BaseModel):
    """Unknown keys are errors, nothing is coerced (`"5"` isn't 5), and nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Head(Section):
    """What turns fused features into predictions."""

    model_config = ConfigDict(json_schema_extra=or_short("integer"))

    classes: Any = Field(
        description="How many outputs, or the classes' names in order.",
        json_schema_extra={
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
            ]
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"classes": value}

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        names = isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
        if names and len(dict.fromkeys(value)) == len(value):
            return value
        raise PydanticCustomError("head", "should be a whole number from 1, or a list of different names")

    @property
    def width(self) -> int:
        """The number of outputs."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)


class DataSection(Section):
    """The data sets, and how they are read."""

    train: Ref | None = Field(
        default=None,
        description="What is learned from: an npz or csv(.gz) file, a folder of images by class, a folder or hub id of "
        "`datasets` (`id:split`), or python:package.module:function (needs --trust-code).",
    )
    validation: Any = Field(
        default=None,
        description="The share of the training data that is held out (between 0 and 1), or a source of its own.",
        json_schema_extra={
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "minLength": 1},
                {"type": "null"},
            ]
        },
    )
    test: Ref | None = Field(default=None, description="What is evaluated on; never seen in training.")
    seed: int | None = Field(default=None, ge=0, description="The seed of the split; left out, the recipe's.")
    input: Any = Field(
        default=None,
        description="The array or column that is read as input (npz: x; csv: text, or all columns of numbers), "
        "a list of columns of numbers, or one or the other for each model by name.",
        json_schema_extra={
            "anyOf": [
                *COLUMNS,
                {"type": "object", "additionalProperties": {"anyOf": COLUMNS}, "minProperties": 1},
                {"type": "null"},
            ]
        },
    )
    target: Ref | None = Field(default=None, description="The array or column of targets (npz: y; csv: label, or the last).")
    labels: bool | None = Field(
        default=None,
        description="Whether train and validation have targets; false where they have none, or none are to be read.",
    )
    classes: list[Ref] | None = Field(
        default=None, description="The names of the data's class numbers, in order, where the models' classes have names."
    )
    image_size: Count | None = Field(default=None, description="Images are resized to this many pixels a side.")
    mean: list[float] | None = Field(default=None, description="A value a channel, subtracted from images in [0, 1].")
    std: list[Positive] | None = Field(default=None, description="A value a channel that images are then divided by.")

    @field_validator("validation")
    @classmethod
    def _validation(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (isinstance(value, str) and value) or (number and 0 < value < 1):
            return value
        raise PydanticCustomError("validation", "should be a share between 0 and 1 (both excluded), or a source")

    @field_validator("input")
    @classmethod
    def _input(cls, value: Any) -> Any:
        if value is None or is_column(value):
            return value
        if isinstance(value, dict) and value and all(isinstance(k, str) and is_column(value[k]) for k in value):
            return value
        raise PydanticCustomError("input", "should be a name, a list of names, or a mapping of model names to these")


class Schedule(Section):
    """How validation sets the weights of a `weighted` fusion, epoch by epoch; {} leaves both to `WeightSchedule`."""

    temperature: Positive | None = Field(
        default=None, description="The lower it is, the more of the weight the best model alone has; left out, 1."
    )
    smoothing: float | None = Field(
        default=None, ge=0, lt=1, description="How much of the last weights is kept; left out, 0.5."
    )


class Training(Section):
    """The options of `fit`. Left out, a value is `fit`'s own default."""

    epochs: int | None = Field(default=None, ge=0, description="Passes over the training data; 0 trains nothing.")
    learning_rate: Positive | None = Field(default=None, description="AdamW's learning rate at its peak.")
    batch_size: Count | None = Field(default=None, description="Samples a step.")
    weight_decay: NonNegative | None = Field(default=None, description="AdamW's weight decay.")
    patience: Count | None = Field(
        default=None, description="Stop after this many epochs without a better validation value (of data.validation)."
    )
    seed: int | None = Field(default=None, ge=0, description="The seed of training; left out, the recipe's.")
    loss: Ref | None = Field(
        default=None, description="auto (by the targets), cross_entropy, binary_cross_entropy, mse or mae."
    )
    metric: Ref | None = Field(
        default=None, description="What the best epoch is chosen by: accuracy for classes, else the loss."
    )
    train_only: list[str] | str | None = Field(
        default=None, description="What is trained: patterns of parameters' names, or head; left out, all that isn't frozen."
    )
    lora: Any = Field(
        default=None,
        description="Train low-rank factors in place of layers: their rank, or options of peft's LoraConfig.",
        json_schema_extra={"anyOf": [{"type": "integer", "minimum": 1}, {"type": "object"}, {"type": "null"}]},
    )
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="What the learning rate is multiplied by from each layer to the one below it."
    )
    l2_sp: NonNegative | None = Field(default=None, description="How strongly weights are held to where they start.")
    schedule: Schedule | None = Field(
        default=None, description="Of a weighted fusion: its weights are set by validation in each epoch, not trained."
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] | None = Field(
        default=None, description="The arithmetic of training, as Lightning names it; left out, 32-true."
    )

    @field_validator("lora")
    @classmethod
    def _lora(cls, value: Any) -> Any:
        if value is None or isinstance(value, dict) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise PydanticCustomError("lora", "should be a rank from 1, or options of peft's LoraConfig")


class Grow(Section):
    """How the target grows where a stage begins, behind what it copies; what it computes stays the same."""

    wider: dict[str, Any] | None = Field(
        default=None,
        description="Paths of Linear layers or convolutions, with their new width: {up: 512}; or [512, the modules that read "
        "it] where these can't be found.",
    )
    deeper: list[Ref] | None = Field(
        default=None, description="Paths of blocks or activations that get an identity behind them, which is then trained."
    )
    noise: float | None = Field(
        default=None, ge=0, lt=1, description="By how much the shares of replicated units differ; left out, not at all."
    )

    @field_validator("wider")
    @classmethod
    def _wider(cls, value: Any) -> Any:
        count = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 1
        pair = lambda w: isinstance(w, list) and len(w) == 2 and count(w[0]) and isinstance(w[1], str | list)
        if value is None or (value and all(count(width) or pair(width) for width in value.values())):
            return value
        raise PydanticCustomError("wider", "should be paths with widths from 1, or [width, paths of the readers]")


class Stage(Section):
    """One step of building up a target."""

    name: str | None = Field(default=None, description="What the stage is called; left out, it is numbered.")
    copied: dict[str, list[str] | dict[str, Any]] | None = Field(
        default=None,
        description="What is copied first, by the model's name: patterns of tensors, or options of transplant.",
    )
    grow: Grow | None = Field(default=None, description="How the target grows then.")
    training: Training | None = Field(
        default=None,
        description="How this stage trains, before what `training` says for all; epochs: 0 is not at all.",
    )
    data: DataSection | None = Field(
        default=None,
        description="What this stage trains on (train, validation): its keys stand before those of the recipe's `data`.",
    )


class Evaluate(Section):
    """How `data.test` is scored."""

    metric: Ref | None = Field(default=None, description="The metric; left out, accuracy for classes, mse for numbers.")
    batch_size: Count | None = Field(default=None, description="Samples a batch.")

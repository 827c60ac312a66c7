"""The data of a run as its networks read them: sets loaded, class numbers in one order, texts through each model's tokenizer.

Which classes the models have is `classes`' to find; loading one file is `data`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interfuse.data import Data, load_data
from interfuse.errors import DataError, ModelError, Problem, UserError
from interfuse.models import load_tokenizer
from interfuse.pipeline.classes import UNNAMED, Spaces
from interfuse.pipeline.finished import home_of, reference_of
from interfuse.pipeline.lessons import has_own, lessons
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.outputs import STUDENT
from interfuse.recipe.sections import DataSection


def load_sets(recipe: Recipe, *, trust_code: bool, merged: Path | None = None, spaces: Spaces = UNNAMED) -> dict[str, Data]:
    """`train`, `validation` and `test`, as far as the recipe names them; every problem in any of them at once.

    `merged` is the folder of the recipe's result, if there is one already. Class numbers are in the order of `spaces`.
    """
    section = recipe.data if recipe.data is not None or not has_own(recipe) else DataSection()
    sets: dict[str, Data] = {}
    problems: list[Problem] = []
    if section is None:
        return sets
    classes = recipe.head.classes if recipe.head is not None and isinstance(recipe.head.classes, list) else None
    for key in ("train", "validation", "test"):
        source = getattr(section, key)
        if not isinstance(source, str):
            continue
        known = sets["train"].classes if "train" in sets else classes
        options = read_options(section, alone(recipe, trained=key != "test"))
        options["labels"] = key == "test" or section.labels is not False
        try:
            sets[key] = in_order(source, section, known, spaces, trust_code=trust_code, path=f"data.{key}", **options)
        except UserError as error:
            problems += error.problems
    if has_own(recipe):
        try:
            sets["train"] = lessons(recipe, sets.get("train"), spaces, trust_code=trust_code)
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    if isinstance(section.validation, float):
        seed = section.seed if section.seed is not None else recipe.seed
        sets["train"], sets["validation"] = sets["train"].split(section.validation, seed)
    if any(data.has_texts for data in sets.values()):
        tokenizers = load_tokenizers(recipe, merged)
        lone = {"test": tokenizers[STUDENT]} if recipe.form == "distill" else {}
        sets = {key: data.tokenize(lone.get(key, tokenizers)) for key, data in sets.items()}
    return sets


def in_order(
    source: str, section: DataSection, classes: Sequence[str] | None, spaces: Spaces, **options: Any
) -> Data:  # fmt: skip
    """`load_data`, its class numbers in the order of `spaces`, else in that of `classes`, where these are known.

    The recipe may name the data's own class numbers, which then go by these names.
    """
    if spaces.joined is not None:
        return spaces.order(load_data(source, classes=section.classes, **options))
    if section.classes is not None:
        data = load_data(source, classes=section.classes, **options)
        return spaces.arrange(data) if classes is None else data.named(classes)
    data = load_data(source, classes=classes, **options)
    return spaces.arrange(data) if classes is None else data


def alone(recipe: Recipe, *, trained: bool = False) -> Sequence[str]:
    """The name that a run's result reads its inputs by where it is one network of several that are named; else nothing."""
    if recipe.form == "distill":
        return () if trained else (STUDENT,)
    return names_of(recipe) if recipe.form == "single" else ()


def read_options(section: DataSection, alone: Sequence[str] = ()) -> dict[str, Any]:
    """How the data is read, as `load_data` takes it; a model alone takes its input without its name."""
    options = {key: getattr(section, key) for key in ("input", "target", "image_size", "mean", "std")}
    if alone and isinstance(section.input, dict):
        options["input"] = section.input[alone[0]]
    return options


def load_tokenizers(recipe: Recipe, result: Path | None = None) -> Any:
    """{model name: tokenizer}, or the one tokenizer of a recipe whose result is one plain network.

    A merge may have another tokenizer than its models: that in the folder of its `result`, if there is one.
    """
    single = recipe.form in ("single", "merge", "layers") and recipe.fusion != "stitch"
    text = recipe.data.input if recipe.data is not None and isinstance(recipe.data.input, dict) else None
    made = load_tokenizer(str(result)) if result is not None and recipe.form == "merge" else None
    if made is not None:
        return made
    entries = {"": reference_of(recipe)} if single else dict(zip(names_of(recipe), recipe.models, strict=True))
    entries |= {STUDENT: reference_of(recipe)} if recipe.form == "distill" else {}
    found = {name: load_tokenizer(home_of(entry.model)) for name, entry in entries.items()}
    missing = [name for name, tokenizer in found.items() if tokenizer is None]
    if missing and text is None:
        allowed = "a model with its tokenizer in its folder, or data of numbers"
        raise ModelError(*(Problem(f"models {name}".strip(), "no tokenizer for the text in data", allowed) for name in missing))
    return found[""] if single else {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

"""The recipe of a mixture of experts, spelled as mergekit-moe's files are, read strictly. No model is opened."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from interfuse.checkpoints.numbers import FLOATS, float_named
from interfuse.errors import Problem, RecipeError, nearest
from interfuse.mixture.layouts import LAYOUTS, layouts_named
from interfuse.recipe.load import parse_recipes
from interfuse.recipe.references import Reference
from interfuse.recipe.schema import ModelRef
from interfuse.recipe.sections import Section
from interfuse.registry import problems_of

#: Modes that read prompts, and those that draw numbers.
PROMPTED = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
DRAWN = ("random", "uniform_random")

Prompts = Annotated[list[str], Field(min_length=1)]


class Expert(Section):
    """A model whose feed-forward blocks become one expert of each layer."""

    source_model: ModelRef = Field(description="The model: a folder, a file of weights, a hub id, MODEL@REVISION, MODEL+LORA.")
    positive_prompts: Prompts | None = Field(default=None, description="Texts that should be routed to this expert.")
    negative_prompts: Prompts | None = Field(default=None, description="Texts that should not.")
    noise_scale: float | None = Field(
        default=None, ge=0, description="The deviation of normal noise that is added to its weights, so that equal ones part."
    )
    residual_scale: float | None = Field(default=None, description="What its output (down_proj) is multiplied by.")


class MixtureRecipe(Section):
    """Dense models into a mixture of experts."""

    base_model: ModelRef = Field(description="Where all but the experts comes from: embeddings, attention, norms, tokenizer.")
    experts: Annotated[list[Expert], Field(min_length=1)] = Field(description="The experts, in order.")
    gate_mode: Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"] = Field(
        default="hidden",
        description="hidden (or hidden_last): the prompts' last hidden states, hidden_avg: their mean over the tokens, "
        "cheap_embed: the tokens' embeddings, alike for all layers; random: normal, uniform_random: as a new Linear layer.",
    )
    dtype: str | None = Field(default=None, description="The output's type; left out, each tensor's in the base.")
    experts_per_token: int = Field(default=2, ge=1, description="How many experts each token is sent to.")
    shared_experts: list[Expert] | None = Field(default=None, description="An expert that every token goes through: one.")
    architecture: str | None = Field(default=None, description=f"The output's layout: {', '.join(LAYOUTS)}.")
    seed: int = Field(default=0, ge=0, description="What random gates and noise are drawn from.")

    @property
    def shared(self) -> Expert | None:
        """The expert that every token goes through."""
        return self.shared_experts[0] if self.shared_experts else None


def load_mixture(source: str | Path | Mapping[str, Any] | MixtureRecipe) -> MixtureRecipe:
    """The recipe in a YAML file or mapping, its paths made absolute; `RecipeError` with every problem of its form."""
    folder = Path.cwd()
    if isinstance(source, MixtureRecipe):
        raw: dict[str, Any] = source.model_dump(exclude_unset=True)
    elif isinstance(source, str | Path):
        documents, folder = parse_recipes(Path(source)), Path(source).resolve().parent
        if len(documents) != 1:
            wrong = f"holds {len(documents)} documents"
            raise RecipeError(Problem(str(source), wrong, "a mixture of experts is one"))
        raw = documents[0]
    else:
        raw = copy.deepcopy(dict(source))
    try:
        recipe = MixtureRecipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(*_unreadable(error), *_further(raw, error)) from None
    problems = list(_problems(recipe))
    if problems:
        raise RecipeError(*problems)
    return _absolute(recipe, folder)


def _unreadable(error: ValidationError) -> list[Problem]:
    """pydantic's errors, each with the names that are allowed where it stands."""
    top, inner = list(MixtureRecipe.model_fields), list(Expert.model_fields)
    found = []
    for problem in problems_of(error, "", top):
        last = problem.path.rpartition(".")[2]
        if problem.wrong == "unknown option":
            allowed = nearest(last, inner if "]." in problem.path else top)
            problem = Problem(problem.path, "unknown key", allowed)
        found.append(problem)
    return found


def _further(raw: Mapping[str, Any], error: ValidationError) -> Iterator[Problem]:
    """What else is wrong, save what may follow from that: prompts, where an expert or the gate_mode is at fault."""
    at_fault = {str(item["loc"][0]) for item in error.errors()}
    rest = {"base_model": "?", **{key: value for key, value in raw.items() if key not in at_fault}}
    if at_fault & {"gate_mode", "experts"}:
        rest["gate_mode"] = "random"
    if "experts" in at_fault:
        listed = raw.get("experts")
        count = len(listed) if isinstance(listed, list) else 0
        rest["experts"] = [{"source_model": "?"}] * (count or 2)
        rest = rest if count else {key: value for key, value in rest.items() if key != "experts_per_token"}
    try:
        recipe = MixtureRecipe.model_validate(rest)
    except ValidationError:
        return
    yield from (problem for problem in _problems(recipe) if problem.path.partition("[")[0] not in at_fault)


def _problems(recipe: MixtureRecipe) -> Iterator[Problem]:
    count = len(recipe.experts)
    if recipe.experts_per_token > count:
        allowed = f"from 1 to {count}, the number of experts"
        yield Problem("experts_per_token", f"got {recipe.experts_per_token}", allowed)
    if recipe.dtype is not None and float_named(recipe.dtype) is None:
        yield Problem("dtype", f"got {recipe.dtype!r}", nearest(recipe.dtype, FLOATS))
    if recipe.architecture is not None and not layouts_named(recipe.architecture):
        yield Problem("architecture", f"got {recipe.architecture!r}", nearest(recipe.architecture, LAYOUTS))
    if len(recipe.shared_experts or []) > 1:
        yield Problem("shared_experts", f"got {len(recipe.shared_experts or [])}", "no layout has more than one")
    if recipe.gate_mode in PROMPTED:
        for i, expert in enumerate(recipe.experts):
            if expert.positive_prompts is None:
                allowed = f"gate_mode {recipe.gate_mode} needs one or more; or give gate_mode: random"
                yield Problem(f"experts[{i}].positive_prompts", "missing", allowed)
        prompts = [(expert.positive_prompts, expert.negative_prompts) for expert in recipe.experts]
        if count > 1 and all(one is not None and (one, other) == prompts[0] for one, other in prompts):
            wrong = "are the same for all, and so would the gates be"
            yield Problem("experts", f"the prompts {wrong}", "give each expert its own, or gate_mode: random")
    shared = recipe.shared
    if shared is not None and shared.negative_prompts is not None and shared.positive_prompts is None:
        yield Problem("shared_experts[0].positive_prompts", "missing beside negative_prompts", "give both, or neither")


def _absolute(recipe: MixtureRecipe, folder: Path) -> MixtureRecipe:
    """The recipe with references that mean the same from any folder."""
    problems: list[Problem] = []

    def model(path: str, ref: str) -> str:
        try:
            return str(Reference.parse(ref, folder).absolute(folder))
        except RecipeError as error:
            problems.extend(Problem(path, p.wrong, p.allowed) for p in error.problems)
            return ref

    def experts(key: str, given: list[Expert] | None) -> list[Expert] | None:
        return given and [
            expert.model_copy(update={"source_model": model(f"{key}[{i}].source_model", expert.source_model)})
            for i, expert in enumerate(given)
        ]

    changes = {
        "base_model": model("base_model", recipe.base_model),
        "experts": experts("experts", recipe.experts),
        "shared_experts": experts("shared_experts", recipe.shared_experts),
    }
    if problems:
        raise RecipeError(*problems)
    return recipe.model_copy(update=changes)

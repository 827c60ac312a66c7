"""Growth in stages of a recipe: tried before anything is trained, and written down so that the network can be built again.

`grow` looks at what a network computes on an example; a finished folder keeps the form of one (shapes, types, ranges), no
data of anyone's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.data import Data
from interfuse.errors import ModelError, OptionError, Problem, UserError
from interfuse.inference.batches import first
from interfuse.modules.inputs import move, split_batch
from interfuse.pipeline.record import DESCRIPTION
from interfuse.recipe import Recipe
from interfuse.recipe.sections import Grow, Stage
from interfuse.transfer.build import build
from interfuse.transfer.grow import grow
from interfuse.transfer.stage_checks import unmatched

_EXAMPLES = 4
Growth = Callable[[nn.Module], nn.Module]


def rehearsed(
    recipe: Recipe, target: nn.Module, sets: Mapping[str, Data], own: Sequence[Mapping[str, Data] | None]
) -> list[Growth | None]:
    """What grows the network at each stage (None: nothing does), tried in order; `target` is left as it is.

    Raises `ModelError` where a stage can't grow what those before it have left, or a Transformers config can't say it;
    `OptionError` where a stage then trains what isn't there.
    """
    found: list[Growth | None] = []
    network, problems = target, []
    for i, stage in enumerate(recipe.stages or ()):
        if stage.grow is None:
            found.append(None)
            problems += _untrained(stage, network, i)
            continue
        growth = _growth(stage.grow, _example(own[i] or sets), recipe.seed)
        try:
            network = growth(network)
            _check_config(network)
        except UserError as error:
            raise ModelError(*(p._replace(path=f"stages[{i}].grow: {p.path}") for p in error.problems)) from None
        found.append(growth)
        problems += _untrained(stage, network, i)
    if problems:
        raise OptionError(*problems)
    return found


def _untrained(stage: Stage, network: nn.Module, number: int) -> list[Problem]:
    """Patterns of what a stage trains that fit nothing in the network as it is then."""
    patterns = None if stage.training is None else stage.training.train_only
    names = [name for name, _ in network.named_parameters()]
    return [Problem(f"stages[{number}].training.train_only", *wrong) for wrong in unmatched(patterns, names)]


def _growth(asked: Grow, example: Any, seed: int) -> Growth:
    options = _options(asked)

    def grown(network: nn.Module) -> nn.Module:
        place = next(network.parameters()).device
        return grow(network, **options, example=move(example, place), seed=seed)

    return grown


def _options(asked: Grow) -> dict[str, Any]:
    """A section as arguments of `grow`."""
    options = asked.model_dump(exclude_none=True)
    wider = {path: tuple(width) if isinstance(width, list) else width for path, width in options.pop("wider", {}).items()}
    return {"wider": wider, **options}


def _example(sets: Mapping[str, Data]) -> Any:
    data = sets["train"]
    return split_batch(first(data.loader(min(_EXAMPLES, len(data)))))[0]


def _check_config(network: nn.Module) -> None:
    """That a Transformers network is what its config says, or what is saved wouldn't load."""
    config = getattr(network, "config", None)
    if not hasattr(config, "to_dict"):
        return
    made = {name: tensor.shape for name, tensor in build(network).state_dict().items()}
    if made != {name: tensor.shape for name, tensor in network.state_dict().items()}:
        allowed = "widen the feed-forward blocks of all layers alike, or grow in Python"
        raise ModelError(Problem("the target", "its Transformers config has no word for such a network", allowed))


def note_growth(
    recipe: Recipe, sets: Mapping[str, Data], own: Sequence[Mapping[str, Data] | None], folder: Path
) -> None:  # fmt: skip
    """Write down, in the description of a saved network, how it grew from the recipe's target."""
    path = folder / DESCRIPTION
    steps = [(i, stage.grow) for i, stage in enumerate(recipe.stages or ()) if stage.grow is not None]
    if not steps or not path.is_file():
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    about["grown"] = [
        {"example": form_of(_example(own[i] or sets)), **asked.model_dump(exclude_none=True)} for i, asked in steps
    ]
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def grown_again(target: nn.Module, about: Mapping[str, Any], seed: int) -> nn.Module:
    """The recipe's target, grown as a folder's description says; its values are whatever they are."""
    for step in about.get("grown", ()):
        asked = Grow(**{key: value for key, value in step.items() if key != "example"})
        target = _growth(asked, made_of(step["example"]), seed)(target)
    return target


def form_of(inputs: Any) -> Any:
    """Inputs without their values, as JSON: of each tensor its shape, type, least and largest number."""
    if isinstance(inputs, Tensor):
        ends = (inputs.min().item(), inputs.max().item())
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch."), "ends": list(ends)}
    if isinstance(inputs, Mapping):
        return {"named": {key: form_of(value) for key, value in inputs.items()}}
    return {"listed": [form_of(value) for value in inputs]}


def made_of(form: Mapping[str, Any]) -> Any:
    """Inputs of that form: floats drawn between the ends, by a fixed seed; whole numbers, such as tokens, all the largest."""
    if "named" in form:
        return {key: made_of(value) for key, value in form["named"].items()}
    if "listed" in form:
        return tuple(made_of(value) for value in form["listed"])
    dtype: torch.dtype = getattr(torch, form["dtype"])
    low, high = form["ends"]
    if not dtype.is_floating_point:
        return torch.full(form["shape"], high, dtype=dtype)
    drawn = torch.rand(form["shape"], generator=torch.Generator().manual_seed(0))
    return (low + (high - low) * drawn).to(dtype)

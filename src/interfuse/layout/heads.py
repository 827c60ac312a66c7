"""Which tensors of several fine-tunes are their heads, what each has for its own task, and which the trunk that they share.

Read off names and shapes: a head is what isn't there in all models, or of another shape, with what stands in the same module;
where nothing differs, what a name calls a head, else the last layer. No values are looked at, and nothing is merged here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interfuse.checkpoints.layers import Place, find_layers
from interfuse.checkpoints.names import listed
from interfuse.checkpoints.source import Checkpoint
from interfuse.errors import CheckpointError, OptionError, Problem
from interfuse.recipe import Recipe
from interfuse.recipe.pieces import places
from interfuse.recipe.references import Reference
from interfuse.recipe.values import matcher

SEPARATE = "separate"
#: Parts of a name that make it a head's.
_WORDS = (
    *("head", "heads", "lm_head", "classifier", "score", "fc", "cls", "qa_outputs", "predictions", "embed_out"),
    *("last_linear", "output_projection", "proj_out", "project_out"),
)
_EMBEDDING = re.compile(r"embed|wte|wpe|patch|stem|position")
_ALLOWED = "fine-tunes of one network, which differ in their heads alone"

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Heads:
    """The names of all heads' tensors, whichever model has them, and what is wrong: then the names mean nothing."""

    names: frozenset[str]
    problems: tuple[Problem, ...] = ()


def find_heads(models: Mapping[str, Shapes], asked: str | Sequence[str], last: Sequence[str] = ()) -> Heads:
    """The heads of these models, name -> shape each.

    asked: "separate", or patterns of their tensors' names, as in a filter. last: the tensors of the layer that is the head
        where nothing differs and no name says so.
    """
    union = list(dict.fromkeys(name for shapes in models.values() for name in shapes))
    if isinstance(asked, str):
        differing = [name for name in union if not _alike(name, models)]
        stacks = find_layers(union).places
        wrong = [name for name in differing if _in_trunk(name, stacks[name])]
        names = _with_modules(differing, union) if differing else _by_name(union, stacks) or list(last)
        problems = _unlike(wrong, models)
        if not names:
            problems.append(Problem("heads", "no head is found", "patterns of its tensors' names"))
    else:
        tests = list(map(matcher, asked))
        names = [name for name in union if any(test(name) for test in tests)]
        problems = [
            Problem(f"heads[{i}]", f"{asked[i]!r} matches no tensor", "a part of a tensor's name, a glob, or /regex/")
            for i, test in enumerate(tests)
            if not any(map(test, union))
        ]
        problems += _unlike([name for name in union if name not in names and not _alike(name, models)], models)
    if not problems and len(names) == len(union):
        problems.append(Problem("models", "have nothing in common besides their heads", _ALLOWED))
    if not problems:
        lacking = [model for model, shapes in models.items() if not any(name in shapes for name in names)]
        problems += [Problem(f"model {model}", "has no head", "a model with one") for model in lacking]
    return Heads(frozenset(names), tuple(problems))


def _alike(name: str, models: Mapping[str, Shapes]) -> bool:
    found = [tuple(shapes[name]) if name in shapes else None for shapes in models.values()]
    return None not in found and len(set(found)) == 1


def _unlike(names: Sequence[str], models: Mapping[str, Shapes]) -> list[Problem]:
    """What isn't the same in all models, and belongs to the trunk."""
    said = []
    for name in names:
        found = [f"{list(shapes[name])} in {m}" if name in shapes else f"missing in {m}" for m, shapes in models.items()]
        said.append(f"{name} is {', '.join(dict.fromkeys(found))}")
    return [Problem("models", f"the trunks differ: {line}", _ALLOWED) for line in said[:5]] + (
        [Problem("models", f"the trunks differ in {len(said) - 5} more tensors", _ALLOWED)] if len(said) > 5 else []
    )


def _in_trunk(name: str, place: Place) -> bool:
    """Whether a tensor can't be a head's by where it stands: in a layer that isn't the last, or among embeddings."""
    if place.stack is not None:
        return place.layer < place.stack.count - 1
    return place.side == "before" and _EMBEDDING.search(name.lower()) is not None


def _with_modules(names: Sequence[str], union: Sequence[str]) -> list[str]:
    """The names, and those of the same modules."""
    owners = {name.rpartition(".")[0] for name in names}
    return [name for name in union if name in names or (name.rpartition(".")[0] in owners and "." in name)]


def _by_name(union: Sequence[str], stacks: Mapping[str, Place]) -> list[str]:
    """What names call heads; else, where all tensors stand in one stack, its last layer."""
    outside = [name for name in union if stacks[name].stack is None]
    called = [name for name in outside if any(p in _WORDS or p.endswith("_head") for p in name.lower().split("."))]
    if called or outside or len({stacks[name].stack for name in union}) > 1:
        return called
    return [name for name in union if (s := stacks[name]).stack is not None and s.layer == s.stack.count - 1]


def models_of(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> dict[Reference, Checkpoint]:
    """The checkpoints that have a task: all but the base."""
    base = None if recipe.base_model is None else Reference.parse(recipe.base_model)
    return {reference: checkpoint for reference, checkpoint in checkpoints.items() if reference != base}


def heads_in(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> Heads:
    """The heads of a merge's models, as its `heads` asks for them."""
    shapes = {str(ref): {n: s.shape for n, s in c.specs.items()} for ref, c in models_of(recipe, checkpoints).items()}
    return find_heads(shapes, recipe.heads or SEPARATE)


def heads_note(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> list[str]:
    """What is to be said of a sound merge's heads; nothing without any."""
    if recipe.heads is None:
        return []
    names = sorted(heads_in(recipe, checkpoints).names)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [f"each of {len(models_of(recipe, checkpoints))} tasks keeps its own head, which isn't merged: {shown}"]


def apart(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> Recipe:
    """The recipe of the trunk: heads are kept as the base (else the first model) has them, and dropped where it has none.

    A base's own head is kept, too. Raises a `CheckpointError` where trunks differ, an `OptionError` where there is no head.
    """
    if recipe.heads is None:
        return recipe
    found = heads_in(recipe, checkpoints)
    if found.problems:
        at_fault = [p for p in found.problems if p.path.startswith("heads")]
        raise OptionError(*found.problems) if at_fault else CheckpointError(*found.problems)
    experts = models_of(recipe, checkpoints)
    lead = next(
        checkpoint for reference, checkpoint in checkpoints.items() if reference not in experts or not recipe.base_model
    )
    union = dict.fromkeys(name for checkpoint in experts.values() for name in checkpoint.specs)
    lacking = [name for name in union if name not in found.names and name not in lead.specs]
    if lacking:
        wrong = [Problem(places(recipe)[Reference.parse(str(recipe.base_model))], line, "a base with the models' own names")
                 for line in listed(lacking, "missing")]  # fmt: skip
        raise CheckpointError(*wrong)
    own = [name for name in lead.specs if name in found.names or name not in union]
    gone = [name for name in found.names if name not in lead.specs]
    keep, drop = [*(recipe.keep or ()), *_exactly(own)], [*(recipe.drop or ()), *_exactly(sorted(gone))]
    return recipe.model_copy(update={"keep": keep or None, "drop": drop or None})


def _exactly(names: Sequence[str]) -> list[str]:
    """A pattern of these names and no others; none for none."""
    return [f"/^(?:{'|'.join(map(re.escape, names))})$/"] if names else []

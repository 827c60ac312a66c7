"""Runs whose networks are joined and keep their own parts: a trunk shared, layers tied, two networks stitched.

Each task reads data of its own (`task_data`), is measured before and after, and stands in the record by its model's name.
How networks are joined is `transfer`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from interfuse import units
from interfuse.checkpoints.source import open_checkpoint
from interfuse.data import Data
from interfuse.errors import ModelError, OptionError, Problem, UserError
from interfuse.extras import require
from interfuse.models import CODE
from interfuse.pipeline.finished import is_saved
from interfuse.pipeline.networks import (
    BASE,
    Result,
    default_metric,
    device_name,
    evaluate,
    lightning_on,
    load_networks,
    load_sets,
    metric_of,
    size_of,
    train,
)
from interfuse.pipeline.record import CURVE
from interfuse.pipeline.task_data import Sets, load_tasks
from interfuse.pipeline.trial import try_networks
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of, options_of
from interfuse.recipe.layers import finds_depth
from interfuse.saving import write_model
from interfuse.transfer.curve import TrunkCurve, trunk_curve
from interfuse.transfer.sharing import SharedTrunk, share_trunk
from interfuse.transfer.stitch import stitch
from interfuse.transfer.together import fit_tasks
from interfuse.transfer.tying import Tied, tie


@dataclass
class Joined(Result):
    """A run's result with each task's values, the curve of a sweep over depths, and how well a stitch fits."""

    tasks: dict[str, dict[str, Any]] | None = None
    curve: dict[str, Any] | None = None
    stitch: dict[str, Any] | None = None


@dataclass(frozen=True)
class _How:
    """What holds for a whole run."""

    trust_code: bool
    device: str
    progress: bool


def run_joined(recipe: Recipe, folder: Path, *, trust_code: bool, device: str | None, progress: bool) -> Joined:
    """Load, join, train, evaluate, and write the model's files to `folder`. The recipe has been checked."""
    how = _How(trust_code, device_name(device), progress)
    networks = load_networks(recipe, trust_code=trust_code)
    hashes = {name: open_checkpoint(network).hash() for name, network in networks.items()}
    kinds: dict[str, Callable[..., Joined]] = {"share_trunk": _share_trunk, "tie": _tie, "stitch": _stitch}
    result = kinds[str(recipe.fusion)](recipe, networks, folder, how)
    result.hashes = hashes
    model: Any = result.model.to("cpu")
    model.references = tuple(_again(entry.model) for entry in recipe.models)
    write_model(model, folder)
    return result


def _again(reference: str) -> str | None:
    """A reference by which a network's code can be had again without a recipe."""
    return None if reference.startswith(CODE) or is_saved(reference) else reference


def _share_trunk(recipe: Recipe, networks: Mapping[str, nn.Module], folder: Path, how: _How) -> Joined:
    options = options_of(recipe)
    merged = {"base": networks.get(BASE), "also": options["also"] or (), **(options["options"] or {})}
    experts = {name: networks[name] for name in names_of(recipe)}
    tasks = _tasks(recipe, experts, how)
    before = _tested(recipe, experts.__getitem__, tasks, how)
    curve, training = None, None
    with _told():
        if finds_depth(recipe):
            curve = _curve(recipe, experts, tasks, options, merged, how)
            curve.save_figure(folder / CURVE)
            shared = curve.network(experts, **merged)
        else:
            placed = {"method": options["method"], "blocks": options["blocks"]}
            shared = share_trunk(experts, options["depth"], **placed, **merged)
            training = _trained(recipe, shared, tasks, how) if recipe.training is not None else None
    found = _compared(before, _tested(recipe, shared.network, tasks, how), tasks)
    points = None if curve is None else _points(curve)
    return Joined(shared, training, notes=(_size(shared, experts),), tasks=found, curve=points)


def _size(shared: SharedTrunk, experts: Mapping[str, nn.Module]) -> str:
    """What is shared, and what that saves."""
    count = lambda network: sum(parameter.numel() for parameter in network.parameters())
    apart, now = sum(map(count, experts.values())), count(shared)
    where = f"{shared.depth} of {len(shared.blocks.names)} blocks of {shared.blocks.path or 'the network'!r} are shared"
    return f"{where}: {units.count(now)} parameters, the models have {units.count(apart)}"


def _curve(
    recipe: Recipe,
    experts: Mapping[str, nn.Module],
    tasks: Mapping[str, Sets],
    options: Mapping[str, Any],
    merged: Mapping[str, Any],
    how: _How,
) -> TrunkCurve:
    """The sweep over depths; with `training`, each network is trained before it is measured."""
    require("matplotlib")
    tuned = None if recipe.training is None else lambda shared: _trained(recipe, shared, tasks, how)
    asked = recipe.evaluate
    usual = dict.fromkeys(default_metric(sets["validation"]) for sets in tasks.values())
    if len(usual) > 1 and (asked is None or asked.metric is None):
        allowed = "name one that fits all, or give parameters.depth"
        raise OptionError(Problem("evaluate.metric", "missing, and some tasks have classes, others numbers", allowed))
    every = all("test" in sets for sets in tasks.values())
    return trunk_curve(
        experts,
        {name: sets["validation"] for name, sets in tasks.items()},
        {name: sets["test"] for name, sets in tasks.items()} if every else None,
        metric=(asked.metric if asked is not None else None) or next(iter(usual)),
        tune=tuned,
        progress=how.progress,
        **{key: options[key] for key in ("depths", "method", "blocks", "tolerance", "within")},
        **size_of(recipe),
        **merged,
    )


def _points(curve: TrunkCurve) -> dict[str, Any]:
    """The curve for the record: what two runs agree on, and so no latency."""
    points = [
        {"depth": point.depth, "parameters": point.cost.parameters, "flops": point.cost.flops}
        | {"validation": point.validation, "test": point.test}
        for point in curve.points
    ]
    about = {key: getattr(curve, key) for key in ("metric", "blocks", "method", "tolerance", "within")}
    return {**about, "chosen": curve.chosen.depth, "points": points}


def _tie(recipe: Recipe, networks: Mapping[str, nn.Module], folder: Path, how: _How) -> Joined:
    tasks = _tasks(recipe, networks, how)
    before = _tested(recipe, networks.__getitem__, tasks, how)
    with _told():
        tied = tie(networks, copy=False, **options_of(recipe))
        training = _trained(recipe, tied, tasks, how)
    return Joined(tied, training, tasks=_compared(before, _tested(recipe, tied.network, tasks, how), tasks))


def _stitch(recipe: Recipe, networks: Mapping[str, nn.Module], folder: Path, how: _How) -> Joined:
    options = options_of(recipe)
    sets = load_sets(recipe, trust_code=how.trust_code)
    try_networks(networks, sets["train"])
    a, b = (networks[name].to(how.device) for name in names_of(recipe))
    data = sets.get("test", sets["train"])
    measured: dict[str, Any] = {"metric": metric_of(recipe, data), "test": sets.get("test")}
    with _told():
        stitched = stitch(
            a, b, tuple(options.pop("at")), sets["train"], copy=False, progress=how.progress, **measured, **options
        )
    record = stitched.record
    assert record is not None
    training = train(recipe, stitched, sets, how.device, progress=how.progress) if recipe.training is not None else None
    test = evaluate(recipe, stitched, data, how.device, progress=how.progress) if "test" in sets else None
    about = asdict(record) | {"survives": record.survives}
    stays = () if record.survives is None else (f"{record.survives:.1%} of b's {record.metric} survives the stitch",)
    return Joined(stitched, training, test, classes=data.classes, notes=(str(record), *stays), stitch=about)


def _tasks(recipe: Recipe, experts: Mapping[str, nn.Module], how: _How) -> dict[str, Sets]:
    """Every task's sets, which its network has read a batch of."""
    tasks = load_tasks(recipe, experts, trust_code=how.trust_code)
    problems: list[Problem] = []
    for i, (name, sets) in enumerate(tasks.items()):
        try:
            try_networks({name: experts[name]}, next(iter(sets.values()))) if sets else None
        except UserError as error:
            problems += [Problem(f"models[{i}] ({name})", p.wrong, p.allowed) for p in error.problems]
    if problems:
        raise ModelError(*problems)
    return tasks


def _trained(recipe: Recipe, model: SharedTrunk | Tied, tasks: Mapping[str, Sets], how: _How) -> dict[str, Any]:
    """`fit_tasks` as the recipe says; the record as a dict."""
    options = recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}
    options.setdefault("seed", recipe.seed)
    held = {name: sets["validation"] for name, sets in tasks.items() if "validation" in sets}
    validation = held if len(held) == len(tasks) else None
    data = {name: sets["train"] for name, sets in tasks.items()}
    return asdict(fit_tasks(model, data, validation, progress=how.progress, **lightning_on(how.device), **options))


def _tested(
    recipe: Recipe, network: Callable[[str], nn.Module], tasks: Mapping[str, Sets], how: _How
) -> dict[str, dict[str, Any]]:
    """Each task's metric on its test data, by its own network."""
    found = {}
    for name, sets in tasks.items():
        if "test" in sets:
            found[name] = evaluate(recipe, network(name), sets["test"], how.device, progress=how.progress)
    return found


def _compared(
    before: Mapping[str, Any], after: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Data]]
) -> dict[str, dict[str, Any]]:
    """What the record says of each task."""
    return {
        name: {"test": after.get(name), "before": before.get(name), "classes": next(iter(sets.values())).classes}
        for name, sets in tasks.items()
        if sets
    }


#: Arguments that stand under a recipe's `parameters`.
_OPTIONS = ("at", "depth", "depths", "blocks", "also", "layers", "start", "ridge", "samples")


@contextmanager
def _told() -> Iterator[None]:
    """Problems with arguments are told as the recipe has them: `at[0]` is `parameters.at[0]`."""
    try:
        yield
    except UserError as error:
        moved = [
            problem._replace(path=f"parameters.{problem.path}") if problem.path.partition("[")[0] in _OPTIONS else problem
            for problem in error.problems
        ]
        raise type(error)(*moved) from None

"""The part of a run that needs torch: networks and data loaded, put together, trained, evaluated and saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from interfuse.checkpoints.source import open_checkpoint
from interfuse.data import Data
from interfuse.ensemble.network import Ensemble
from interfuse.errors import ModelError, OptionError, Problem, UserError
from interfuse.evaluation.metrics import interval, resampled
from interfuse.inference.batches import first
from interfuse.inference.features import default_folder
from interfuse.inference.predict import predict
from interfuse.merging import merge
from interfuse.models import CODE, load_model, load_tokenizer
from interfuse.modules.cross_stitch import CrossStitch
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import split_batch
from interfuse.pipeline.classes import UNNAMED, Spaces, spaces_of
from interfuse.pipeline.crossing import crossed
from interfuse.pipeline.finished import is_saved, load_network, reference_of
from interfuse.pipeline.reading import load_sets as load_sets
from interfuse.pipeline.scheduling import draw_weights, schedule_of
from interfuse.pipeline.teaching import teach
from interfuse.pipeline.trial import check_whole, try_networks
from interfuse.recipe import Recipe
from interfuse.recipe.check import experts_of, names_of, options_of
from interfuse.recipe.outputs import STUDENT
from interfuse.recipe.reads import reads_of
from interfuse.recipe.schema import ModelEntry
from interfuse.saving import write_model
from interfuse.training.fit import fit
from interfuse.training.parameters import heads
from interfuse.training.schedule import WeightSchedule


@dataclass
class Result:
    """What a run of networks gives: the model, and what goes into the record."""

    model: nn.Module
    training: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def run_networks(recipe: Recipe, folder: Path, *, trust_code: bool, device: str | None, progress: bool) -> Result:
    """Load, fuse, train, evaluate, and write the model's files to `folder`. The recipe has been checked."""
    place = device_name(device)
    networks = load_networks(recipe, trust_code=trust_code)
    hashes = {name: open_checkpoint(network).hash() for name, network in networks.items()}
    spaces = spaces_of(recipe, networks)
    sets = load_sets(recipe, trust_code=trust_code, spaces=spaces)
    if recipe.form != "fusion":
        check_whole(sets)
    if sets:
        try_networks(_reading(recipe, networks), next(iter(sets.values())))
    result = Result(assemble(recipe, networks, sets.get("train"), spaces), hashes=hashes, classes=_classes(sets, spaces))
    notes = [spaces.note] if spaces.note else []
    if "train" in sets and recipe.form == "fusion" and (others := _aside(recipe, spaces, sets["train"])):
        notes.append(f"the predictions of {', '.join(others)} aren't added: their classes are in another order than the data's")
    schedule = schedule_of(recipe)
    if "train" in sets and recipe.form in ("fusion", "single", "cross_stitch"):
        result.training = train(recipe, result.model, sets, place, progress=progress, schedule=schedule)
    if recipe.form == "distill":
        teachers = {name: network.to(place) for name, network in networks.items()}
        result.training, said = teach(recipe, result.model, teachers, sets, spaces, lightning_on(place), progress=progress)
        notes += said
    if isinstance(result.model, Ensemble) and "validation" in sets:
        notes.append(str(result.model.calibrate(sets["validation"], seed=recipe.seed, device=place, progress=progress)))
    result.notes = tuple(notes)
    if "test" in sets:
        result.test = evaluate(recipe, result.model, sets["test"], place, progress=progress)
    result.model.to("cpu")
    write_model(result.model, folder, backbones="reference" if _by_reference(recipe) else "value")
    if schedule is not None:
        draw_weights(schedule, folder)
    if (folder / "config.json").exists():
        tokenizer = load_tokenizer(reference_of(recipe).model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return result


def evaluate_merged(recipe: Recipe, folder: Path, *, trust_code: bool, device: str | None, progress: bool) -> Result:
    """Evaluate the merge that lies in `folder`, as Transformers loads it."""
    place = device_name(device)
    model = load_model(str(folder), trust_code=trust_code)
    sets = load_sets(recipe, trust_code=trust_code, merged=folder)
    found = evaluate(recipe, model, sets["test"], place, progress=progress) if "test" in sets else None
    return Result(model, test=found, classes=_classes(sets))


def _classes(sets: Mapping[str, Data], spaces: Spaces = UNNAMED) -> tuple[str, ...] | None:
    known = spaces.joined if spaces.own is not None else None
    return known or next((data.classes for data in sets.values() if data.classes is not None), None)


def _reading(recipe: Recipe, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks that read the data, by the names that inputs go by."""
    called = {TARGET: STUDENT} if recipe.form == "distill" else {}
    return {called.get(name, name): network for name, network in networks.items() if name != BASE}


@contextmanager
def settled(seed: int, threads: int | None) -> Iterator[None]:
    """Seeds for Python, NumPy and torch, and torch's threads; all of them are put back afterwards."""
    python, numpy, before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            torch.set_num_threads(threads or before)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads(before)


def device_name(device: str | None) -> str:
    """The device as asked, or cuda where there is one."""
    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_device(device: str | None) -> list[Problem]:
    """What is wrong with a device's name, if anything."""
    if device is None:
        return []
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return [Problem("device", f"got {device!r}", "cpu or cuda")]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        return [Problem("device", f"there is no {device!r} here", "cpu" if kind == "cuda" else "cpu or cuda")]
    return []


def load_networks(recipe: Recipe, *, trust_code: bool) -> dict[str, nn.Module]:
    """The recipe's networks by name; in a merge those that are merged, and the base as ` base`."""
    named = dict(zip(names_of(recipe), recipe.models, strict=True))
    paths = {name: f"models[{i}]" for i, name in enumerate(named)}
    if recipe.form == "merge":
        experts = experts_of(recipe)
        named = {name: entry for name, entry in named.items() if entry in experts}
    for key, ref in recipe.beside.items():
        name = f" {key.removesuffix('_model')}"
        named[name], paths[name] = ModelEntry(model=ref), key
    networks, problems = {}, []
    for name, entry in named.items():
        try:
            networks[name] = load_network(entry, trust_code=trust_code)
        except UserError as error:
            problems += [Problem(paths[name], str(problem)) for problem in error.problems]
    if problems:
        raise ModelError(*problems)
    return networks


BASE, TARGET = " base", " target"  # no models' names: names have no spaces


def assemble(
    recipe: Recipe, networks: Mapping[str, nn.Module], data: Data | None, spaces: Spaces = UNNAMED
) -> nn.Module:  # fmt: skip
    """The model that the recipe describes, not yet trained."""
    options = options_of(recipe)
    if recipe.form == "distill":
        return networks[TARGET]
    if recipe.form == "single":
        return next(iter(networks.values()))
    if recipe.form == "merge":
        return merged_networks(recipe, networks)
    model: ModelFusion | Ensemble | CrossStitch
    if recipe.form == "cross_stitch":
        assert data is not None  # the check of the recipe asks for it
        model = crossed(recipe, networks, data, _head(recipe, data))
    elif recipe.form == "ensemble":
        model = Ensemble(networks, **{**options, "classes": spaces.own, "copy": False})
    else:
        named = dict(zip(names_of(recipe), recipe.models, strict=True))
        model = ModelFusion(
            networks,
            str(recipe.fusion),
            head=_head(recipe, data),
            taps={name: entry.tap for name, entry in named.items()},
            freeze={name: entry.freeze is not False for name, entry in named.items()},
            inputs=reads_of(recipe, list(named)),
            copy=False,
            **options | ({"residual": False} if data is not None and _aside(recipe, spaces, data) else {}),
        )
    model.references = tuple(None if is_saved(entry.model) else entry.model for entry in recipe.models)
    return model


def _aside(recipe: Recipe, spaces: Spaces, data: Data) -> list[str]:
    """The networks for whose sake a fusion adds no network's own predictions, unless the recipe asks for it."""
    return [] if "residual" in recipe.parameters else spaces.otherwise(data)


def merged_networks(recipe: Recipe, networks: Mapping[str, nn.Module]) -> nn.Module:
    """The merge of networks in memory that a recipe describes, a model's own parameters before all models'."""
    experts = {name: network for name, network in networks.items() if name != BASE}
    entries = dict(zip(names_of(recipe), recipe.models, strict=True))
    own: dict[str, dict[str, Any]] = {}
    for name in experts:
        for option, value in entries[name].parameters.items():
            own.setdefault(option, {})[name] = value
    options: dict[str, Any] = {**recipe.parameters, **own, "dtype": recipe.out_dtype or recipe.dtype, "seed": recipe.seed}
    options |= {"drop": recipe.drop, "keep": recipe.keep}
    merged = merge(str(recipe.merge_method), experts, base=networks.get(BASE), heads=recipe.heads, **options)
    assert isinstance(merged, nn.Module)
    return merged


def _head(recipe: Recipe, data: Data | None) -> int:
    assert data is not None  # the check of the recipe asks a fusion for training data
    found = len(data.classes) if data.classes is not None else int(data.targets[0].numel())
    if recipe.head is None:
        return found
    if recipe.head.width < found:
        raise ModelError(Problem("head.classes", f"{recipe.head.width}, but the data has {found}", f"at least {found}"))
    return recipe.head.width


def train(
    recipe: Recipe, model: nn.Module, sets: Mapping[str, Data], device: str, *, progress: bool,
    schedule: WeightSchedule | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`fit` as the recipe says; the record as a dict."""
    options = (recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}) | lightning_on(device)
    written = options.pop("schedule", None)
    if recipe.form == "single" and recipe.models[0].freeze:
        options["train_only"] = _last_linear(model, sets["train"])
    options.setdefault("seed", recipe.seed)
    if schedule is not None:
        options["callbacks"] = [schedule.callback()]
    record = asdict(fit(model, sets["train"], sets.get("validation"), progress=progress, **options))
    return record if schedule is None else record | {"schedule": {"options": written, "history": schedule.history}}


def lightning_on(device: str) -> dict[str, Any]:
    """A device as Lightning's options."""
    index = torch.device(device).index
    return {"accelerator": "gpu" if device.startswith("cuda") else "cpu", "devices": 1 if index is None else [index]}


def _last_linear(model: nn.Module, data: Data) -> list[str]:
    """The parameters' names of the linear layer that runs last."""
    inputs, _ = split_batch(first(data.loader(2)))
    found = heads(model, inputs)
    if not found:
        allowed = "freeze: false, or a network that ends in a Linear layer"
        raise ModelError(Problem("models[0].freeze", "the network doesn't end in a Linear layer to train", allowed))
    return [f"{found[0]}.*"]


def evaluate(recipe: Recipe, model: nn.Module, data: Data, device: str, *, progress: bool) -> dict[str, Any]:
    """The metric on the test data, with its 95% bootstrap interval."""
    metric, size = metric_of(recipe, data), size_of(recipe)
    found = predict(model, data, device=device, cache=default_folder(), progress=progress, **size)
    assert found.targets is not None
    value, drawn = resampled(metric, found.outputs, found.targets, seed=recipe.seed)
    low, high = interval(drawn)
    record = {"metric": metric, "value": value, "low": low, "high": high, "examples": len(found.targets)}
    inputs = list(dict.fromkeys(model.inputs)) if isinstance(model, ModelFusion) and model.missing == "token" else []
    without: dict[str, Any] = {}
    for name in inputs if len(inputs) > 1 else ():
        assert isinstance(model, ModelFusion)
        with model.without(name):
            less = predict(model, data, device=device, cache=default_folder(), progress=progress, **size)
        other, redrawn = resampled(metric, less.outputs, found.targets, seed=recipe.seed)
        ends, change = interval(redrawn), interval(redrawn - drawn)
        without[name] = {"value": other, "low": ends[0], "high": ends[1]}
        without[name] |= {"change": other - value, "change_low": change[0], "change_high": change[1]}
    return record | ({"without": without} if without else {})


def metric_of(recipe: Recipe, data: Data) -> str:
    """The metric that `evaluate` names, else the data's usual one."""
    return (recipe.evaluate.metric if recipe.evaluate is not None else None) or default_metric(data)


def size_of(recipe: Recipe) -> dict[str, Any]:
    """The batch size that `evaluate` names, as an option; nothing where it names none."""
    return recipe.evaluate.model_dump(include={"batch_size"}, exclude_none=True) if recipe.evaluate is not None else {}


def default_metric(data: Data) -> str:
    """Accuracy for classes, mse for numbers."""
    return "accuracy" if data.classes is not None else "mse"


def _by_reference(recipe: Recipe) -> bool:
    """Whether every member can be had again, bit for bit, by its reference alone."""
    return not any(e.model.startswith(CODE) or e.weights is not None or is_saved(e.model) for e in recipe.models)


def names_problems(recipe: Recipe) -> list[Problem]:
    """Metrics and losses that don't exist."""
    from interfuse.evaluation.metrics import find_metric
    from interfuse.training.losses import LOSSES

    training, asked = recipe.training, recipe.evaluate
    problems = []
    for path, metric in (
        ("training.metric", training.metric if training else None),
        ("evaluate.metric", asked.metric if asked else None),
    ):
        try:
            find_metric(metric) if metric is not None else None
        except OptionError as error:
            problems += [Problem(path, p.wrong, p.allowed) for p in error.problems]
    if training is not None and training.loss is not None and training.loss not in LOSSES:
        problems.append(Problem("training.loss", f"no loss is named {training.loss!r}", f"allowed: {', '.join(LOSSES)}"))
    return problems

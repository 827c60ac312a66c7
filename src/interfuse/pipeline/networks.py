"""The part of a run that needs torch: networks and data loaded, put together, trained, evaluated and saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from interfuse.checkpoints.source import open_checkpoint
from interfuse.data import Data, load_data
from interfuse.engine.merge import merge
from interfuse.ensemble.network import Ensemble
from interfuse.errors import DataError, ModelError, OptionError, Problem, UserError
from interfuse.evaluation.metrics import interval, resampled
from interfuse.inference.batches import first
from interfuse.inference.features import default_folder
from interfuse.inference.predict import predict
from interfuse.models import CODE, load_model, load_tokenizer
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import split_batch
from interfuse.pipeline.finished import is_saved, load_network
from interfuse.pipeline.layers import put_layers
from interfuse.pipeline.trial import try_networks
from interfuse.recipe import Recipe
from interfuse.recipe.check import experts_of, names_of, options_of, weights_of
from interfuse.recipe.schema import ModelEntry
from interfuse.recipe.sections import DataSection
from interfuse.saving import write_model
from interfuse.training.fit import fit
from interfuse.training.parameters import heads


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
    sets = load_sets(recipe, trust_code=trust_code)
    if sets:
        read = [TARGET] if recipe.form == "layers" else [name for name in networks if name != BASE]
        try_networks({name: networks[name] for name in read}, next(iter(sets.values())))
    result = Result(assemble(recipe, networks, sets.get("train")), hashes=hashes, classes=_classes(sets))
    if recipe.form == "layers":
        on = lightning_on(place)
        result.training, result.notes = put_layers(recipe, result.model, networks, sets, on, progress=progress)
    if "train" in sets and recipe.form in ("fusion", "single"):
        result.training = train(recipe, result.model, sets, place, progress=progress)
    if isinstance(result.model, Ensemble) and "validation" in sets:
        result.notes = (str(result.model.calibrate(sets["validation"], seed=recipe.seed, device=place, progress=progress)),)
    if "test" in sets:
        result.test = evaluate(recipe, result.model, sets["test"], place, progress=progress)
    result.model.to("cpu")
    write_model(result.model, folder, backbones="reference" if _by_reference(recipe) else "value")
    if (folder / "config.json").exists():
        tokenizer = load_tokenizer(_reference(recipe).model)
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


def _classes(sets: Mapping[str, Data]) -> tuple[str, ...] | None:
    return next(iter(sets.values())).classes if sets else None


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


def load_sets(recipe: Recipe, *, trust_code: bool, merged: Path | None = None) -> dict[str, Data]:
    """`train`, `validation` and `test`, as far as the recipe names them; every problem in any of them at once.

    `merged` is the folder of the recipe's result, if there is one already.
    """
    section = recipe.data
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
        options = read_options(section, names_of(recipe) if recipe.form == "single" else ())
        try:
            sets[key] = load_data(source, trust_code=trust_code, classes=known, path=f"data.{key}", **options)
        except UserError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    if isinstance(section.validation, float):
        seed = section.seed if section.seed is not None else recipe.seed
        sets["train"], sets["validation"] = sets["train"].split(section.validation, seed)
    if any(data.has_texts for data in sets.values()):
        tokenizers = load_tokenizers(recipe, merged)
        sets = {key: data.tokenize(tokenizers) for key, data in sets.items()}
    return sets


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
    single = recipe.form in ("single", "merge", "layers")
    text = recipe.data.input if recipe.data is not None and isinstance(recipe.data.input, dict) else None
    made = load_tokenizer(str(result)) if result is not None and recipe.form == "merge" else None
    if made is not None:
        return made
    entries = {"": _reference(recipe)} if single else dict(zip(names_of(recipe), recipe.models, strict=True))
    found = {name: load_tokenizer(entry.model) for name, entry in entries.items()}
    missing = [name for name, tokenizer in found.items() if tokenizer is None]
    if missing and text is None:
        allowed = "a model with its tokenizer in its folder, or data of numbers"
        raise ModelError(*(Problem(f"models {name}".strip(), "no tokenizer for the text in data", allowed) for name in missing))
    return found[""] if single else {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def assemble(recipe: Recipe, networks: Mapping[str, nn.Module], data: Data | None) -> nn.Module:
    """The model that the recipe describes, not yet trained."""
    options = options_of(recipe)
    if recipe.form == "layers":
        return networks[TARGET]
    if recipe.form == "single":
        return next(iter(networks.values()))
    if recipe.form == "merge":
        experts = [network for name, network in networks.items() if name != BASE]
        dtype = recipe.out_dtype or recipe.dtype
        merged = merge(
            str(recipe.merge_method), experts, base=networks.get(BASE), weights=weights_of(recipe), dtype=dtype, **options
        )
        assert isinstance(merged, nn.Module)
        return merged
    model: ModelFusion | Ensemble
    if recipe.form == "ensemble":
        model = Ensemble(networks, **{**options, "copy": False})
    else:
        named = dict(zip(names_of(recipe), recipe.models, strict=True))
        model = ModelFusion(
            networks,
            str(recipe.fusion),
            head=_head(recipe, data),
            taps={name: entry.tap for name, entry in named.items()},
            freeze={name: entry.freeze is not False for name, entry in named.items()},
            copy=False,
            **options,
        )
    model.references = tuple(None if is_saved(entry.model) else entry.model for entry in recipe.models)
    return model


def _head(recipe: Recipe, data: Data | None) -> int:
    assert data is not None  # the check of the recipe asks a fusion for training data
    found = len(data.classes) if data.classes is not None else int(data.targets[0].numel())
    if recipe.head is None:
        return found
    if recipe.head.width < found:
        raise ModelError(Problem("head.classes", f"{recipe.head.width}, but the data has {found}", f"at least {found}"))
    return recipe.head.width


def train(recipe: Recipe, model: nn.Module, sets: Mapping[str, Data], device: str, *, progress: bool) -> dict[str, Any]:
    """`fit` as the recipe says; the record as a dict."""
    options = (recipe.training.model_dump(exclude_none=True) if recipe.training is not None else {}) | lightning_on(device)
    if recipe.form == "single" and recipe.models[0].freeze:
        options["train_only"] = _last_linear(model, sets["train"])
    options.setdefault("seed", recipe.seed)
    return asdict(fit(model, sets["train"], sets.get("validation"), progress=progress, **options))


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
    asked = recipe.evaluate
    metric = (asked.metric if asked is not None else None) or default_metric(data)
    size = {"batch_size": asked.batch_size} if asked is not None and asked.batch_size is not None else {}
    found = predict(model, data, device=device, cache=default_folder(), progress=progress, **size)
    assert found.targets is not None
    value, drawn = resampled(metric, found.outputs, found.targets, seed=recipe.seed)
    low, high = interval(drawn)
    return {"metric": metric, "value": value, "low": low, "high": high, "examples": len(found.targets)}


def default_metric(data: Data) -> str:
    """Accuracy for classes, mse for numbers."""
    return "accuracy" if data.classes is not None else "mse"


def _reference(recipe: Recipe) -> ModelEntry:
    """The model whose code, config and tokenizer a single network has."""
    return next((ModelEntry(model=ref) for ref in recipe.beside.values()), None) or recipe.models[0]


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

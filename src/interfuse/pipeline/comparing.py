"""Several finished runs, recipes and models side by side on the same data, which each of them reads in its own way.

What can be wrong is looked at before a recipe is run. The table itself is `evaluation.compare`'s.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interfuse.errors import DataError, ModelError, OptionError, Problem, UserError
from interfuse.pipeline.finished import classes_of, description, load_network, load_run
from interfuse.pipeline.record import DESCRIPTION, RECIPE
from interfuse.recipe import Recipe, load_recipe
from interfuse.recipe.check import source_problems
from interfuse.recipe.outputs import STUDENT
from interfuse.recipe.schema import ModelEntry
from interfuse.recipe.sections import DataSection

if TYPE_CHECKING:
    from torch import nn

    from interfuse.data import Data
    from interfuse.evaluation.comparison import Comparison


@dataclass(frozen=True)
class _Entry:
    """One row: where it came from, its network, its recipe if it has one, and its classes if it recorded them.

    `tokenizer` is a merge's own, which may be another than its models'.
    """

    reference: str
    model: nn.Module
    recipe: Recipe | None
    classes: tuple[str, ...] | None
    members: Mapping[str, str | None]
    tokenizer: Any = None


def compare_runs(
    references: Sequence[str | Path],
    data: Any,
    *,
    metric: str | None = None,
    trust_code: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Finished runs side by side on the same test data: see `compare`.

    references: output folders; recipes, which are run first, into a folder that is thrown away; or models as `load_model`
        takes them. data: what `load_data` reads. Every run reads it as its recipe says, texts by its own tokenizers; a model
        without a recipe reads it as the first run does. Models that others here were made from are marked as parents.
    metric: left out, accuracy for classes and mse for numbers.
    """
    from interfuse.evaluation.compare import compare
    from interfuse.pipeline.networks import default_metric

    _check(references, data, metric, trust_code, device)
    entries = _opened(references, trust_code, device, progress)
    views = _views(entries, data, trust_code)
    shared = next(iter(views.values()))
    return compare(
        {name: entry.model for name, entry in entries.items()},
        shared,
        metric=metric or default_metric(shared),
        parents=_parents(entries),
        views=views,
        device=device,
        progress=progress,
    )


def _check(references: Sequence[str | Path], data: Any, metric: str | None, trust_code: bool, device: str | None) -> None:
    """Everything that can be seen to be wrong before anything is run."""
    from interfuse.evaluation.metrics import find_metric
    from interfuse.pipeline.networks import check_device
    from interfuse.pipeline.steps import check

    problems = list(source_problems(data, "--data", trust_code)) if isinstance(data, str) else []
    problems += check_device(device)
    try:
        find_metric(metric) if metric is not None else None
    except UserError as error:
        problems += [Problem("--metric", p.wrong, p.allowed) for p in error.problems]
    for reference in references:
        try:
            if _is_recipe(reference):
                check(reference, trust_code=trust_code)
        except UserError as error:
            problems += [Problem(f"{reference}: {p.path}", p.wrong, p.allowed) for p in error.problems]
    if problems:
        raise OptionError(*problems)


def _opened(
    references: Sequence[str | Path], trust_code: bool, device: str | None, progress: bool
) -> dict[str, _Entry]:  # fmt: skip
    """The networks by name; every one that can't be loaded is named."""
    entries: dict[str, _Entry] = {}
    problems: list[Problem] = []
    for reference in sorted(references, key=_is_recipe):  # what may fail at once comes before what takes long
        if problems and _is_recipe(reference):
            break
        try:
            entries[_name(reference, entries)] = _open(str(reference), trust_code, device, progress)
        except UserError as error:
            problems += error.problems
    if problems:
        raise ModelError(*problems)
    order = list(map(str, references))
    return dict(sorted(entries.items(), key=lambda item: order.index(item[1].reference)))


def _open(reference: str, trust_code: bool, device: str | None, progress: bool) -> _Entry:
    from interfuse.pipeline.steps import run

    if _is_recipe(reference):
        with tempfile.TemporaryDirectory() as folder:
            run(reference, Path(folder) / "out", trust_code=trust_code, device=device, progress=progress)
            return _finished(reference, Path(folder) / "out", trust_code)
    if (Path(reference) / DESCRIPTION).is_file():
        return _finished(reference, Path(reference), trust_code)
    entry = ModelEntry(model=reference)
    network = load_network(entry, trust_code=trust_code)
    return _Entry(reference, network, Recipe(models=[entry]), classes_of(reference), {})


def _finished(reference: str, folder: Path, trust_code: bool) -> _Entry:
    from interfuse.models import load_tokenizer

    about = description(folder)
    recipe = load_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else None
    classes = about.get("run", {}).get("classes")
    members = {member["name"]: member["reference"] for member in about.get("members", ())}
    model = load_run(folder, trust_code=trust_code)
    own = load_tokenizer(str(folder)) if recipe is not None and recipe.form == "merge" else None
    return _Entry(reference, model, recipe, tuple(classes) if classes else None, members, own)


def _is_recipe(reference: str | Path) -> bool:
    return str(reference).endswith((".yaml", ".yml"))


def _name(reference: str | Path, taken: Mapping[str, Any]) -> str:
    last = Path(str(reference).rpartition(":")[2])
    plain = last.resolve().stem if _is_recipe(reference) else last.resolve().name
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    return name


def _parents(entries: Mapping[str, _Entry]) -> list[str]:
    """The entries that other entries fuse or merge."""
    made = [e.recipe for e in entries.values() if e.recipe is not None and e.recipe.form != "single"]
    used = [model.model for recipe in made for model in recipe.models]
    places = {name: Path(entry.reference) for name, entry in entries.items()}
    return [
        name
        for name, entry in entries.items()
        if (str(places[name].resolve()) if places[name].exists() else entry.reference) in used
    ]


def _views(entries: Mapping[str, _Entry], data: Any, trust_code: bool) -> dict[str, Data]:
    """The data as each model reads it; read once for all that read it in the same way."""
    from interfuse.pipeline.classes import UNNAMED
    from interfuse.pipeline.reading import in_order

    sections = {name: e.recipe.data for name, e in entries.items() if e.recipe is not None and e.recipe.data is not None}
    common = next(iter(sections.values()), DataSection())
    classes = _classes(entries)
    loaded: dict[str, Data] = {}
    views: dict[str, Data] = {}
    for name, entry in entries.items():
        options = _reading(name, entry, sections.get(name, common))
        key = json.dumps(options)
        if key not in loaded:
            section, where = sections.get(name, common), {"trust_code": trust_code, "path": "--data"}
            loaded[key] = in_order(data, section, classes, UNNAMED, **where, **options)
        views[name] = loaded[key].tokenize(_tokenizers(name, entry)) if loaded[key].has_texts else loaded[key]
    return views


def _reading(name: str, entry: _Entry, section: DataSection) -> dict[str, Any]:
    """How a model's data is read, as `load_data` takes it."""
    from interfuse.pipeline.reading import alone, read_options

    lone = alone(entry.recipe) if entry.recipe is not None else ()
    own = section.input if isinstance(section.input, dict) else {}
    if own and lone and lone[0] not in own:
        wrong = f"the other runs have inputs for {list(own)}, none for {name}"
        raise DataError(Problem("--data", wrong, "compare it as a run, whose recipe says which input it reads"))
    return read_options(section, lone)


def _classes(entries: Mapping[str, _Entry]) -> tuple[str, ...] | None:
    """The classes' names in the order in which the runs learned them, which must be one order."""
    found = {name: entry.classes for name, entry in entries.items() if entry.classes is not None}
    if not found:
        return None
    first = next(iter(found))
    for name, classes in found.items():
        if classes != found[first]:
            wrong = f"{first} knows the classes {list(found[first])}, {name} {list(classes)}"
            raise DataError(Problem("--data", wrong, "compare runs that were trained on the same classes"))
    return found[first]


def _tokenizers(name: str, entry: _Entry) -> Any:
    """The tokenizers of a run, or of a saved network that no recipe made."""
    from interfuse.models import load_tokenizer
    from interfuse.pipeline.reading import load_tokenizers

    if entry.tokenizer is not None:
        return entry.tokenizer
    if entry.recipe is not None:
        tokenizers = load_tokenizers(entry.recipe)
        return tokenizers[STUDENT] if entry.recipe.form == "distill" else tokenizers
    found = {member: load_tokenizer(ref) if ref else None for member, ref in entry.members.items()}
    if not found or None in found.values():
        raise ModelError(Problem(name, "no tokenizer for the text in --data", "compare a run, whose recipe names its models"))
    return found

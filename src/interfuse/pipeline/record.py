"""What a run leaves beside the model: its record, in `interfuse.json`, the recipe as it was run, and a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from interfuse import __version__
from interfuse.engine.output.card import NAME as CARD
from interfuse.engine.output.card import Made, Use, add_quality, listed, write_card
from interfuse.recipe import Recipe
from interfuse.recipe.check import names_of
from interfuse.recipe.own_data import named
from interfuse.report.plan import text

RECIPE = "recipe.yaml"
#: The picture of a fusion's weights by epoch, where validation set them.
WEIGHTS = "weights.svg"
DESCRIPTION = "interfuse.json"
#: The picture of a sweep over depths, beside the output. The one file that holds measured times.
CURVE = "curve.svg"
#: Where finished stages are kept in an output that isn't whole yet.
STAGES = ".stages"
#: What isn't written down, or the same recipe would give another folder each time.
_OF_ONE_RUN = ("out", "plan", "here", "before")
_TIMES = ("seconds", "train_seconds")
#: What a run of layers makes, where that isn't said by its method.
_LAYERS = {"share_trunk": "shared trunk of ", "tie": "tied layers of ", "stitch": "stitch of "}


@dataclass(frozen=True)
class RunRecord:
    """What was run and what came of it.

    out: the folder, None in a dry run. form: fusion, layers, cross_stitch, ensemble, distill, merge or single; method: its
    name, "" for a model alone.
    plan: what was, or would be, done: of a merge of files as data (docs/recipes.md), else as text; here: what such a merge
    would take of this machine, in a dry run. inputs: models and data sets with SHA-256 hashes, where they have one.
    training: `FitRecord` as a dict. test: metric, value, low and high (95% bootstrap interval), examples; of a fusion with
    tokens `without`: for each input value, low and high with it missing, and the paired change with its interval.
    tasks: of a shared trunk or tied networks, each task's test, that of its model before, and its classes; curve: the sweep
    over depths; stitch: how well the map fits, and what quality survives.
    soup: how a soup's models were chosen: metric, validation data, value, steps; None for other runs.
    coefficients: how merge coefficients were learned: options, data by task, history, values and the tensors of each group.
    classes: the names of the classes, in the order of the outputs; None for numbers. notes: what was resolved on the way.
    seconds: all of it; like every other time it isn't written down, for no two runs agree on it. before: whether an earlier
    run had finished it, so that nothing was left to do.
    """

    out: Path | None
    form: str
    method: str
    models: tuple[str, ...]
    seed: int
    plan: str | dict[str, Any]
    here: dict[str, Any] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    soup: dict[str, Any] | None = None
    coefficients: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    curve: dict[str, Any] | None = None
    stitch: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    before: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON; what isn't a finite number is null."""
        values = dataclasses.asdict(self) | {"out": None if self.out is None else str(self.out)}
        plain: dict[str, Any] = _plain(values)
        return plain

    def text(self, width: int = 200) -> str:
        """The record in a few lines, of at most `width` characters where they are a table's."""
        if self.out is None:
            plan = self.plan if isinstance(self.plan, str) else text(self.plan, self.here, width=width)
            choice = f"which of these are averaged is chosen on {self.soup['validation']}\n" if self.soup is not None else ""
            if self.coefficients is not None:
                sources = listed(list(dict.fromkeys(part["source"] for part in self.coefficients["data"].values())))
                choice = f"the weights are where learning begins: {self.coefficients['steps']} steps on {sources}\n"
            return f"{plan}\n{choice}nothing was written (dry run)"
        end = "finished by an earlier run, nothing was left to do" if self.before else f"in {self.seconds:.1f} s"
        lines = [f"{self.out}: {self.title()}, {end}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), *self.scores()])

    def title(self) -> str:
        """`attention fusion of cnn and vit`."""
        names = listed(self.models)
        if self.form == "layers" and not names:
            return self.method
        if self.form == "layers":
            return _LAYERS.get(self.method, f"{self.method} from ") + names
        what = {"fusion": f"{self.method} fusion of ", "merge": f"{self.method} merge of ", "ensemble": "ensemble of "}
        what |= {"distill": "student of ", "cross_stitch": "cross-stitch of "}
        return what.get(self.form, "") + names

    def scores(self) -> list[str]:
        """One line for the validation, one for the test."""
        lines = []
        if self.soup is not None:
            for i, step in enumerate(self.soup["steps"]):
                what = "kept" if step["kept"] else "left out"
                value = f"{self.soup['metric']} {step['value']:.4g} on validation"
                lines.append(f"{'+ ' if i else ''}{step['model']}: {value}, {what}")
        if self.coefficients is not None:
            lines += _coefficients(self.coefficients)
        if self.training is not None and self.training["best"]:
            values = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in self.training["best"].items())
            lines.append(f"best epoch {self.training['best_epoch']}: {values}")
            lines += _weights(self.training)
        if self.test is not None:
            lines.append(_scored(self.test))
            lines += [_without(name, about) for name, about in self.test.get("without", {}).items()]
        for name, task in (self.tasks or {}).items():
            if task["test"] is not None:
                lines.append(f"{name}: {_scored(task['test'])}; before {task['before']['value']:.4g}")
        return lines


def _without(name: str, about: dict[str, Any]) -> str:
    interval = f"95% interval {about['change_low']:+.4g} to {about['change_high']:+.4g}"
    return f"without {name} {about['value']:.4g} ({about['change']:+.4g}, {interval})"


def _scored(test: dict[str, Any]) -> str:
    interval = f"95% interval {test['low']:.4g} to {test['high']:.4g}, {test['examples']} examples"
    return f"test {test['metric']} {test['value']:.4g} ({interval})"


def _weights(training: dict[str, Any]) -> list[str]:
    """The weights that validation set for the epoch that is kept: the last before it of those that were set."""
    rows = training.get("schedule", {}).get("history", [])
    kept = [row for row in rows if row["epoch"] <= max(training["best_epoch"], 1)]
    if not kept:
        return []
    values = ", ".join(f"{name} {weight:.4g}" for name, weight in kept[-1].items() if name != "epoch")
    return [f"weights set by validation: {values} (every epoch's are in {WEIGHTS})"]


def _coefficients(about: dict[str, Any]) -> list[str]:
    """What was learned, one line for all and one a task."""
    history = about["history"]
    if not history:
        return []
    loss = f"{about['objective']} {history[0]['loss']:.4g} -> {history[-1]['loss']:.4g} in {len(history)} steps"
    lines = [f"coefficients learned on {about['split']} data by {loss}"]
    for task, values in about["values"].items():
        low, high = min(values.values()), max(values.values())
        shown = f"{low:.4g}" if len(values) == 1 else f"{low:.4g} to {high:.4g} over {len(values)} groups of layers"
        lines.append(f"coefficient of {task}: {shown}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def restored(record: RunRecord, out: Path, run: dict[str, Any]) -> RunRecord:
    """The record of a run that was finished before, from what it wrote down and what is known of it."""
    known: dict[str, Any] = {field.name: run[field.name] for field in dataclasses.fields(record) if field.name in run}
    known |= {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return dataclasses.replace(record, **known, out=out, before=True)


def _timeless(value: Any) -> Any:
    """Without how long things took."""
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key not in _TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def write(folder: Path, chain: Sequence[Recipe], record: RunRecord, kind: str) -> None:
    """Add the run to what `save` or `merge` wrote in `folder`; `kind` is said where they wrote no description.

    `chain` is the recipe, behind those whose results it merges.
    """
    path = folder / DESCRIPTION
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kind": kind, "interfuse": __version__}
    about["run"] = {key: value for key, value in _timeless(record.to_dict()).items() if key not in _OF_ONE_RUN}
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(as_yaml(chain), encoding="utf-8")
    _write_card(folder, chain, record, about["kind"])


def as_yaml(chain: Sequence[Recipe]) -> str:
    """The recipes as a file that can be run again from any folder."""
    values = [recipe.model_dump(mode="json", exclude_defaults=True) | {"seed": recipe.seed} for recipe in chain]
    return yaml.safe_dump_all(values, sort_keys=False, allow_unicode=True)


_USE = """import interfuse as itf

model = itf.load_run("this-folder")  # trust_code=True where the recipe names code that you trust"""
_USE_TASK = '\nnetwork = model.network("{}")  # one task; model(inputs) gives every task its own'
_USE_ADAPTER = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "this-folder")'


def _write_card(folder: Path, chain: Sequence[Recipe], record: RunRecord, kind: str) -> None:
    recipe = chain[-1]
    if kind == "merge" and (folder / CARD).is_file():  # the merge wrote it
        add_quality(folder, record.scores())
        return
    entries = zip(names_of(recipe), recipe.models, strict=False)
    made = [Made(name, e.model + (f" with {e.weights}" if e.weights else "")) for name, e in entries]
    made += [Made(key.removesuffix("_model"), ref) for key, ref in recipe.beside.items()]
    code = _USE + (_USE_TASK.format(next(iter(record.tasks))) if record.tasks else "")
    use = Use("peft", _USE_ADAPTER) if kind == "adapter merge" else None if kind == "transplant" else Use("interfuse", code)
    quality = record.scores()
    quality += [f"![Each task's quality against parameters and latency]({CURVE})"] if (folder / CURVE).is_file() else []
    quality += [f"![Each model's weight by epoch]({WEIGHTS})"] if (folder / WEIGHTS).is_file() else []
    write_card(folder, record.title(), made, as_yaml(chain), use=use, papers=record.papers, quality=quality)


def versions() -> dict[str, str]:
    """The versions of what is loaded and could change a result."""
    names = ("numpy", "torch", "lightning", "transformers", "datasets", "pillow")
    modules = {"pillow": "PIL"}
    found = {name: importlib.metadata.version(name) for name in names if modules.get(name, name) in sys.modules}
    return {"interfuse": __version__, "python": platform.python_version(), **found}


def hash_data(recipe: Recipe) -> dict[str, Any]:
    """The data sets that a recipe names, with their hashes."""
    sources = {path.removeprefix("data."): source for path, source in named(recipe)}
    return {key: {"source": source, "sha256": hash_source(source)} for key, source in sources.items()}


def hash_source(source: str) -> str | None:
    """The SHA-256 of a data file, or of all files in a folder with their names; None for what isn't on this disk."""
    path = Path(source)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()

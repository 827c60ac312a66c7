"""The experts with one trunk: by depth and method of merging, merged only or trained further; each result is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks.text_experts.experts import RATE, Classifier, accuracies
from benchmarks.text_experts.texts import BATCH, ByLength, Task
from torch import nn

import interfuse as itf
from interfuse.evaluation.cost import cost
from interfuse.transfer.sharing import SharedTrunk

#: Usual values, none chosen by a score.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.3},
    "ties": {"lambda": 0.3, "density": 0.2, "normalize": False},
    "tsv_m": {},
    "iso_c": {},
}
COSTED = 8  # texts of a timed batch
EMBEDDINGS, LAYERS = "encoder.embeddings", 6
DEPTHS: tuple[int | str, ...] = (EMBEDDINGS, *range(1, LAYERS + 1))
Tuning = Literal["merged", "own", "all", "distilled"]
TUNINGS: dict[Tuning, str] = {
    "merged": "merged, nothing trained",
    "own": "each task's own layers trained, half an epoch",
    "all": "all trained together, half an epoch",
    "distilled": "all trained together on the experts' probabilities, half an epoch",
}


@dataclass(frozen=True)
class Result:
    """A network's accuracies by task, and how long what was trained took, in seconds."""

    depth: int | str
    method: str
    tuning: Tuning
    validation: dict[str, float]
    test: dict[str, float]
    seconds: float

    @property
    def mean(self) -> float:
        """The validation accuracies' mean."""
        return fmean(self.validation.values())


@dataclass(frozen=True)
class Given:
    """What all parts work on: tasks, experts, what they came from, and the folder for results."""

    tasks: Mapping[str, Task]
    experts: Mapping[str, Classifier]
    base: Classifier
    folder: Path

    def kept(self) -> list[Result]:
        """All results that the folder has."""
        return [Result(**json.loads(path.read_text())) for path in sorted((self.folder / "results").glob("*.json"))]


def share(given: Given, depth: int | str, method: str) -> SharedTrunk:
    """The experts with one trunk."""
    base = None if method == "linear" else given.base
    experts: dict[str, nn.Module] = dict(given.experts)
    return itf.share_trunk(experts, depth, base=base, method=method, **METHODS[method])


def result(given: Given, depth: int | str, method: str, tuning: Tuning = "merged", *, test: bool = False) -> Result:
    """A point of the curve, from the folder where it is there; with `test` also on the test texts."""
    name = f"{str(depth).rpartition('.')[2]}-{method}-{tuning}"
    path = given.folder / "results" / f"{name}.json"
    found = Result(**json.loads(path.read_text())) if path.exists() else None
    if found is not None and (found.test or not test):
        return found
    shared, seconds = share(given, depth, method), 0.0
    if tuning != "merged":
        seconds = found.seconds if found is not None else 0.0
        if found is None:
            seconds = _tune(given, shared, tuning)
            itf.save(shared, given.folder / "shared" / name, overwrite=True)
        itf.load(given.folder / "shared" / name, shared)
    validation = found.validation if found is not None else _of(given, shared, "validation")
    found = Result(depth, method, tuning, validation, _of(given, shared, "test") if test else {}, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=1))
    print(f"{name}: {found.mean:.4f} {fmean(found.test.values()) if test else ''} {seconds:.0f} s", flush=True)
    return found


def _of(given: Given, shared: SharedTrunk, part: str) -> dict[str, float]:
    return {name: accuracies(shared.network(name), task, (part,))[part] for name, task in given.tasks.items()}


def _tune(given: Given, shared: SharedTrunk, tuning: Tuning) -> float:
    begun = time.monotonic()
    labels = dict.fromkeys(given.tasks) if tuning != "distilled" else {name: _taught(given, name) for name in given.tasks}
    train = {name: task.loader("train", shuffle=True, labels=labels[name]) for name, task in given.tasks.items()}
    only = "experts.*" if tuning == "own" else None
    options: dict[str, Any] = {"limit_train_batches": 0.5, "learning_rate": RATE, "loss": "cross_entropy", "progress": False}
    itf.fit_tasks(shared, train, epochs=1, train_only=only, **options)
    return time.monotonic() - begun


def _taught(given: Given, name: str) -> Any:
    """An expert's probabilities for its training texts, in the set's order of rows."""
    task = given.tasks[name]
    outputs = itf.predict(given.experts[name], task.loader("train"), progress=False).outputs.softmax(-1)
    rows = [row for batch in ByLength(task.parts["train"], BATCH, shuffle=False) for row in batch]
    return outputs[sorted(range(len(rows)), key=rows.__getitem__)]


def costs(given: Given, *, again: bool = False) -> dict[str, dict[str, float]]:
    """Depth -> parameters, FLOPs a text and latency of a pass for all tasks, measured once unless `again`."""
    path = given.folder / "costs.json"
    if again or not path.exists():
        inputs, _ = next(iter(next(iter(given.tasks.values())).loader("validation", shuffle=True)))
        inputs, found = {name: tensor[:COSTED] for name, tensor in inputs.items()}, {}
        for depth in (0, *DEPTHS):
            price = cost(share(given, depth, "linear"), inputs, repeats=2, warmup=1)
            found[str(depth)] = {"parameters": price.parameters, "flops": price.flops, "latency": price.latency}
        path.write_text(json.dumps(found, indent=1))
    prices: dict[str, dict[str, float]] = json.loads(path.read_text())
    return prices

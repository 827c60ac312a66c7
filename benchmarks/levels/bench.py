"""What the levels share: networks trained once and kept under a key of all that they depend on, predictions, rows.

A training that was cut short begins anew, one that was finished is never done again. Times are the process's own seconds
of processor time, on one thread, so that other programs on the machine count little.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.levels.data import Task
from benchmarks.levels.networks import PARENTS, probe
from torch import Tensor, nn

import interfuse as itf
from interfuse.data import Data
from interfuse.evaluation.cost import cost
from interfuse.evaluation.metrics import score

SEEDS = (0, 1, 2)
EPOCHS = {"image": 8, "text": 3}
RATES = {"image": 1e-3, "text": 1e-4}
PARTS = ("validation", "test")


@dataclass
class Made:
    """A network, what it depends on, the seconds that it took with all that it is made of, and a remark for the table."""

    network: nn.Module
    spec: dict[str, Any]
    seconds: float = 0.0
    note: str = ""


@dataclass
class Row:
    """A line of the table: `said` are the logits on the validation and the test part."""

    level: str
    method: str
    made: Made
    said: dict[str, Tensor] = field(repr=False)


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    """Writes the processor's seconds within it to found["seconds"]."""
    begun = time.process_time()
    yield
    found["seconds"] = time.process_time() - begun


class Bench:
    """One set and its parents. A class, for what is asked for again: rates, the best parent, predictions."""

    def __init__(self, task: Task, cache: Path) -> None:
        self.task, self.cache, self.epochs = task, cache, EPOCHS[task.kind]
        self.names = tuple(PARENTS[task.kind])

    def kept(self, spec: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, made once for this set and spec."""
        whole = {**self.task.spec, **spec}
        key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / self.task.name / f"{key}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = make()
            torch.save({**found, "spec": json.dumps(whole)}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return dict(torch.load(path, weights_only=True))

    def trained(
        self, network: nn.Module, spec: dict[str, Any], train: Callable[[nn.Module], Any], *before: Made, note: str = ""
    ) -> Made:
        """`network` as `train` leaves it; what it gives may be a remark. `before` is what it is made of."""

        def make() -> dict[str, Any]:
            found: dict[str, Any] = {}
            with timed(found):
                said = train(network)
            kept = {name: value.clone() for name, value in network.state_dict().items() if not self._known(network, name)}
            return {"state": kept, "note": said if isinstance(said, str) else note, **found}

        found = self.kept(spec, make)
        network.load_state_dict(found["state"], strict=False)
        return Made(network.eval(), spec, found["seconds"] + sum(made.seconds for made in before), found["note"])

    @staticmethod
    def _known(network: nn.Module, name: str) -> bool:
        """Whether a tensor is a frozen network's within a fusion, which is kept elsewhere."""
        return isinstance(network, itf.ModelFusion | itf.CrossStitch) and name.startswith("backbones.")

    def start(self, name: str) -> nn.Module:
        """A parent before its fine-tuning: pre-trained, with a head by logistic regression."""
        network = PARENTS[self.task.kind][name](self.task.classes, self.cache)

        def make() -> dict[str, Any]:
            probe(network, self.task)
            return {"state": network.state_dict()}

        network.load_state_dict(self.kept({"start": name}, make)["state"])
        return network.eval()

    def fit(self, network: nn.Module, *, epochs: int, rate: float, seed: int = 0, data: Data | None = None, **more: Any) -> Any:
        """`itf.fit` on the training part, the best epoch by validation."""
        how: dict[str, Any] = {"epochs": epochs, "learning_rate": rate, "seed": seed, "patience": None, "progress": False}
        loader = self.task.loader(data or self.task.train, seed)
        return itf.fit(network, loader, self.task.validation, accelerator="cpu", **how, **more)

    def rate(self, name: str, build: Callable[[], nn.Module], rates: Sequence[float], **more: Any) -> float:
        """The learning rate that is best on the validation part after one short epoch, on a third of the training part."""

        def make() -> dict[str, Any]:
            some = self.task.train.split(1 / 3, seed=0)[1]
            ends = [self.fit(build(), epochs=1, rate=rate, data=some, **more).history[-1] for rate in rates]
            return {"tried": [[one["validation_accuracy"], -one["validation_loss"]] for one in ends]}

        tried = self.kept({"rate": name, "rates": list(rates)}, make)["tried"]
        return rates[max(range(len(rates)), key=lambda i: tried[i])]

    def fine_tuned(self, name: str, seed: int = 0, epochs: int | None = None) -> Made:
        """A parent, fine-tuned; all parameters."""
        epochs, rate = epochs or self.epochs, RATES[self.task.kind]
        spec = {"fine-tune": name, "seed": seed, "epochs": epochs, "learning rate": rate}
        note = f"learning rate {rate:g}"
        return self.trained(
            self.start(name), spec, lambda net: said_of(self.fit(net, epochs=epochs, rate=rate, seed=seed), note)
        )

    @cached_property
    def parents(self) -> dict[str, Made]:
        """Both parents."""
        return {name: self.fine_tuned(name) for name in self.names}

    @cached_property
    def best(self) -> str:
        """The parent that is best on the validation part."""
        return max(self.names, key=lambda name: self.rank(self.said(self.parents[name])["validation"]))

    @cached_property
    def longer(self) -> int:
        """For how many epochs the best parent is trained at the cost of both parents, by floating-point operations."""
        flops = {name: cost(self.start(name), self.task.example(), repeats=1, warmup=0).flops for name in self.names}
        return math.ceil(self.epochs * sum(flops.values()) / flops[self.best])

    def said(self, made: Made) -> dict[str, Tensor]:
        """A network's logits on the validation and the test part."""
        return {part: self.predicted(made, part) for part in PARTS}

    def predicted(self, made: Made, part: str) -> Tensor:
        """A network's logits on a part of the data."""

        def make() -> dict[str, Any]:
            data = getattr(self.task, part)
            cache = self.cache / "features" if isinstance(made.network, itf.ModelFusion) else None
            return {"logits": itf.predict(made.network, data, cache=cache, progress=False).outputs}

        found: Tensor = self.kept({"predicted": part, "by": made.spec}, make)["logits"]
        return found

    def rank(self, logits: Tensor) -> tuple[float, float]:
        """How good these are on the validation part: accuracy, then log loss."""
        targets = self.task.validation.targets
        return score("accuracy", logits, targets), -score("log_loss", logits, targets)

    def row(self, level: str, method: str, made: Made) -> Row:
        """The row of a network."""
        return Row(level, method, made, self.said(made))


def said_of(record: Any, note: str) -> str:
    """A training's remark."""
    return f"{note}, epoch {record.best_epoch}"

"""Stages: a network built up step by step; each step copies from trained networks, grows, and trains a part for a while.

    target, stage by stage:  copy (transplant)  ->  grow  ->  train what the stage names (fit)  ->  next stage

Gradual unfreezing (ULMFiT, Howard & Ruder 2018, 1801.06146) and progressive growth (Gong et al. 2019, "Efficient training
of BERT by progressively stacking") are lists of stages. How tensors are copied is `transplant`'s part, how networks grow
`grow`'s, and how they learn `fit`'s; this holds the order, and goes on after a kill at the stage that was running.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interfuse.checkpoints.layers import find_layers
from interfuse.errors import ModelError, OptionError, Problem
from interfuse.training.fit import FitRecord, fit
from interfuse.transfer.report import Report
from interfuse.transfer.stage import Stage as Stage
from interfuse.transfer.stage_checks import check_run, stage_problems
from interfuse.transfer.transplant import transplant


@dataclass(frozen=True)
class StageRecord:
    """What one stage did: the reports of its copies by model, and how its training went (None: it trained nothing)."""

    name: str
    copies: Mapping[str, Report]
    training: FitRecord | None

    def written(self) -> dict[str, Any]:
        """The record as JSON, of each copy its sums."""
        copied = {name: report.summary() for name, report in self.copies.items()}
        return {"name": self.name, "copied": copied, "training": None if self.training is None else asdict(self.training)}


@dataclass(frozen=True)
class StagesRecord:
    """The network at the end, and what each stage did; `earlier` are the written records of stages that a run before this
    finished, `resumed` their names."""

    model: nn.Module
    stages: tuple[StageRecord, ...]
    resumed: tuple[str, ...] = ()
    earlier: tuple[dict[str, Any], ...] = ()

    def written(self) -> list[dict[str, Any]]:
        """All stages' records as JSON."""
        return [*self.earlier, *(stage.written() for stage in self.stages)]

    def lines(self) -> list[str]:
        """A line a stage, of whichever run: what it copied, and its best epoch's values."""
        lines = []
        for stage in self.written():
            copied = "; ".join(f"from {name}: {summary}" for name, summary in stage["copied"].items())
            best = stage["training"]["best"] if stage["training"] is not None else {}
            values = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in best.items())
            lines.append(": ".join((stage["name"], "; ".join(part for part in (copied, values) if part) or "done")))
        return lines

    def __str__(self) -> str:
        before = [f"{name}: done before" for name in self.resumed]
        return "\n".join([*before, *self.lines()[len(self.earlier) :]])


class Stages:
    """Builds up a network in stages.

    A class, since the list is checked when it is made, before any network is there. Raises `OptionError` with all that is
    wrong in any stage's options, and names that stand twice.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        given = tuple(stages)
        problems = stage_problems(given)
        if problems:
            raise OptionError(*problems)
        self.stages = tuple(replace(s, name=s.name or f"stage {i}") for i, s in enumerate(given, 1))

    def run(
        self,
        target: nn.Module,
        models: Mapping[str, nn.Module] | None = None,
        train: Any = None,
        validation: Any = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        seed: int = 0,
        progress: bool = True,
        **trainer: Any,
    ) -> StagesRecord:
        """Build up `target` in place (where nothing grows it: then the record's `model` is another) from `models`.

        train, validation: the data of stages that have none of their own, as for `fit`. folder: where finished stages are
        kept, so that with `resume` a run that was killed goes on in the stage, at the epoch, where it was; with the same
        data and seed it ends with the same weights. **trainer: Lightning's options and callbacks, for every stage.

        Raises `ModelError` and `OptionError` for names that aren't there and copies that don't fit, in whatever stage until
        one grows the network, before anything is changed; `OptionError` for a folder that holds other stages.
        """
        check_run(self.stages, target, models, train)
        kept = None if folder is None else _Kept(Path(folder), self._hash(seed), resume)
        done = 0 if kept is None else kept.done
        for stage in self.stages[:done]:
            target = _grown(stage, target)
        if kept is not None and done:
            kept.load(target)
        records = []
        for number, stage in enumerate(self.stages[done:], done):
            copies = {
                name: transplant((models or {})[name], target, **{"show": progress, **how})
                for name, how in stage.copies().items()
            }
            target = _grown(stage, target)
            training = None
            if stage.train is None or stage.train:
                how = {"seed": seed, "progress": progress, **trainer, **stage.options}
                how |= {"train_only": stage.train} | ({} if kept is None else kept.checkpoints(number))
                training = fit(target, *(stage.data or (train, validation)), **how)
            records.append(StageRecord(stage.name, copies, training))
            if kept is not None:
                kept.keep(target, number + 1, records[-1].written())
        earlier = () if kept is None else tuple(kept.records[:done])
        return StagesRecord(target, tuple(records), tuple(stage.name for stage in self.stages[:done]), earlier)

    def _hash(self, seed: int) -> str:
        text = json.dumps([seed, *(stage.written() for stage in self.stages)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _grown(stage: Stage, target: nn.Module) -> nn.Module:
    if stage.grow is None:
        return target
    grown = stage.grow(target)
    if not isinstance(grown, nn.Module):
        raise ModelError(
            Problem(f"{stage.name}: grow", f"gave a {type(grown).__name__}", "a function that returns a network")
        )
    return grown


class _Kept:
    """Finished stages on disk: stages.json, the weights after the last of them, and the running one's checkpoints."""

    def __init__(self, folder: Path, stages: str, resume: bool) -> None:
        self.folder, self.stages, self.resume, self.done = folder, stages, resume, 0
        self.records: list[dict[str, Any]] = []
        written = folder / "stages.json"
        if written.exists():
            found = json.loads(written.read_text(encoding="utf-8"))
            if not resume:
                raise OptionError(Problem("folder", f"{folder} holds stages already", "resume=True, or another folder"))
            if found["stages"] != stages:
                raise OptionError(
                    Problem("folder", f"{folder} holds other stages", "the same stages and seed, or another folder")
                )
            self.done, self.records = found["done"], found.get("records", [])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()

    def _write(self) -> None:
        with _in_place(self.folder / "stages.json") as part:
            about = {"stages": self.stages, "done": self.done, "records": self.records}
            part.write_text(json.dumps(about), encoding="utf-8")

    def load(self, model: nn.Module) -> None:
        """Give the model the weights of the last finished stage."""
        model.load_state_dict(torch.load(self.folder / f"stage-{self.done}.pt", weights_only=True))

    def keep(self, model: nn.Module, done: int, record: dict[str, Any]) -> None:
        """A stage is finished: keep its weights, then say so with its record, then drop what it left."""
        with _in_place(self.folder / f"stage-{done}.pt") as part:
            torch.save(model.state_dict(), part)
        before, self.done = self.done, done
        self.records.append(record)
        self._write()
        (self.folder / f"stage-{before}.pt").unlink(missing_ok=True)
        shutil.rmtree(self.folder / f"running-{done - 1}", ignore_errors=True)

    def checkpoints(self, number: int) -> dict[str, Any]:
        """Where a stage's training leaves its checkpoints, and the one to go on from."""
        folder = self.folder / f"running-{number}"
        last = folder / "last.ckpt"
        return {"checkpoints": folder, "resume": last if self.resume and last.exists() else None}


@contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """A file to write to, which then takes the place of `path`, whole."""
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb+") as handle:
        os.fsync(handle.fileno())
    part.replace(path)


def unfreezing(model: nn.Module, *, first: str | Sequence[str] = "head", **options: Any) -> list[Stage]:
    """Stages of gradual unfreezing: `first` alone, then with the top layer, then the next, down to all of the network.

    Layers are found from the parameters' names; **options are `fit`'s, for each stage. Raises `ModelError` where the names
    show no layers.
    """
    layers = find_layers([name for name, _ in model.named_parameters()])
    if not layers.stacks:
        raise ModelError(Problem("model", "its parameters' names show no layers", "stages written out"))
    stack = max(layers.stacks, key=lambda stack: stack.count)
    opened = [first] if isinstance(first, str) else list(first)
    opened_all = [Stage("head", train=tuple(opened), options=options)]
    for layer in reversed(stack.numbers):
        opened.append(f"{stack.head}{layer}.*")
        opened_all.append(Stage(f"{stack} {layer} and above", train=tuple(opened), options=options))
    return [*opened_all, Stage("all", options=options)]

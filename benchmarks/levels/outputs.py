"""The level outputs: ensembles of unlike networks and of seeds, calibrated or learned on validation, and students of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.levels.bench import PARTS, RATES, SEEDS, Bench, Made, Row
from benchmarks.levels.data import part

import interfuse as itf

LEVEL = "outputs"


def baselines(bench: Bench) -> Iterator[Row]:
    """Parents, and what the fusion's cost buys without a fusion."""
    for name, made in bench.parents.items():
        yield bench.row("parents", name, made)
    longer = bench.fine_tuned(bench.best, epochs=bench.longer)
    yield bench.row("baselines", f"{bench.best}, {bench.longer} epochs in place of {bench.epochs}", longer)
    yield _row(bench, "baselines", f"two seeds of {bench.best}, ensemble", "probabilities", seeds(bench, 2))


def seeds(bench: Bench, count: int = len(SEEDS)) -> list[Made]:
    """Fine-tunes of the best parent's pre-trained network: one start, other orders of the data."""
    return [bench.fine_tuned(bench.best, seed=seed) for seed in SEEDS[:count]]


def ensemble(bench: Bench, combine: Any, members: list[Made], *, calibrated: bool = False) -> Made:
    """An ensemble; one that learns does so on the validation part."""
    model = itf.Ensemble({str(k): made.network for k, made in enumerate(members)}, copy=False, combine=combine)
    spec = {"ensemble": combine, "of": [made.spec for made in members], "calibrated": calibrated}
    learns = calibrated or itf.Ensemble.learns(combine)

    def make() -> dict[str, object]:
        if learns:
            model.calibrate(bench.task.validation, progress=False)
        return {"numbers": model.numbers}

    model.learned(bench.kept(spec, make)["numbers"])
    return Made(model.eval(), spec, sum(made.seconds for made in members))


def ensembles(bench: Bench) -> Iterator[Row]:
    """Both parents; then all fine-tunes there are."""
    pair = list(bench.parents.values())
    yield _row(bench, LEVEL, "ensemble, mean of probabilities", "probabilities", pair)
    yield _row(bench, LEVEL, "the same, calibrated", "probabilities", pair, calibrated=True)
    for combine in ("log_probabilities", "temperature", "weighted", "stacking"):
        yield _row(bench, LEVEL, f"ensemble, {combine}", combine, pair)
    every = [*seeds(bench), *(made for name, made in bench.parents.items() if name != bench.best)]
    yield _row(bench, LEVEL, "ensemble, greedy out of both parents and two seeds more", "greedy", every)


def _row(bench: Bench, level: str, method: str, combine: Any, members: list[Made], *, calibrated: bool = False) -> Row:
    """An ensemble's row, from what its members say."""
    made = ensemble(bench, combine, members, calibrated=calibrated)
    assert isinstance(made.network, itf.Ensemble)
    said = {which: made.network.join([bench.predicted(one, which) for one in members]) for which in PARTS}
    return Row(level, method, made, said)


def students(bench: Bench) -> Iterator[Row]:
    """Students of the parents' ensemble: the best parent's pre-trained network, at one parent's cost."""
    teacher = ensemble(bench, "probabilities", list(bench.parents.values()))
    yield bench.row(LEVEL, f"student ({bench.best}) of the ensemble", _student(bench, teacher, more=False))
    yield bench.row(LEVEL, "student by the teacher alone, on more examples", _student(bench, teacher, more=True))


def _student(bench: Bench, teacher: Made, *, more: bool) -> Made:
    """With `more`, by the teacher alone, on examples that it hasn't seen too, in as many steps."""
    rate, epochs, data, alpha = RATES[bench.task.kind], bench.epochs, bench.task.train, 0.5
    if more:
        epochs, alpha = bench.epochs // 2 + 1, 0.0
        data = part(bench.task.pool, len(data) * bench.epochs // epochs)
    spec = {"student": bench.best, "of": teacher.spec, "epochs": epochs, "alpha": alpha, "more": len(data)}

    def train(network: torch.nn.Module) -> str:
        record = itf.distill(
            teacher.network,
            network,
            bench.task.loader(data),
            bench.task.validation,
            alpha=alpha,
            epochs=epochs,
            learning_rate=rate,
            patience=None,
            accelerator="cpu",
            progress=False,
        )
        return f"agrees with its teacher on {record.agreement:.1%} of validation"

    return bench.trained(bench.start(bench.best), spec, train, teacher)

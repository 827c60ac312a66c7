"""The level features: both fine-tuned parents frozen, their features joined; and cross-stitch units at two depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.levels.bench import RATES, Bench, Made, Row, said_of
from benchmarks.levels.networks import PLACES
from torch import nn

import interfuse as itf

LEVEL = "features"
KINDS = ("concat", "attention", "gate", "shared", "transformer", "weighted")
EPOCHS = 10
#: Whether the parents' own predictions are added to the head's, and the learning rate: of these validation chooses.
CHOICES = ((True, 1e-4), (True, 1e-3), (False, 1e-3))
PLAIN = ((False, 1e-4), (False, 1e-3))


def fusions(bench: Bench) -> Iterator[Row]:
    """Every kind, and as a baseline concatenation without the parents' predictions, as it is done everywhere."""
    yield bench.row("baselines", "concat without the parents' predictions", _fused(bench, "concat", PLAIN))
    for kind in KINDS:
        yield bench.row(LEVEL, kind, _fused(bench, kind, CHOICES))


def unseen(bench: Bench) -> Iterator[Row]:
    """Some kinds, trained on examples that the parents haven't seen; the best parent with these examples from its start."""
    name, rate, pool = bench.best, RATES[bench.task.kind], bench.task.pool
    spec = {"fine-tune": name, "epochs": bench.epochs, "learning rate": rate, "on": "the pool"}
    note = f"learning rate {rate:g}"
    parent = bench.trained(
        bench.start(name), spec, lambda net: said_of(bench.fit(net, epochs=bench.epochs, rate=rate, data=pool), note)
    )
    yield bench.row("baselines", f"{name}, trained on those examples too", parent)
    for kind in ("concat", "attention", "gate"):
        yield bench.row(LEVEL, f"{kind}, on unseen examples", _fused(bench, kind, CHOICES, unseen=True))


def _fused(bench: Bench, kind: str, choices: Sequence[tuple[bool, float]], *, unseen: bool = False) -> Made:
    """The choice that is best on validation."""
    tried = [_at(bench, kind, residual, rate, unseen) for residual, rate in choices]
    return max(tried, key=lambda made: bench.rank(bench.predicted(made, "validation")))


def _at(bench: Bench, kind: str, residual: bool, rate: float, unseen: bool) -> Made:
    networks = {f"parent{k}": made.network for k, made in enumerate(bench.parents.values())}
    fusion = itf.ModelFusion(
        networks, kind, head=bench.task.classes, example=bench.task.example(4), residual=residual, copy=False
    )
    spec = {"fusion": kind, "residual": residual, "learning rate": rate, "epochs": EPOCHS}
    spec |= {"of": [made.spec for made in bench.parents.values()]} | ({"on": "unseen examples"} if unseen else {})
    data = bench.task.more if unseen else bench.task.train

    def train(network: nn.Module) -> str:
        record = bench.fit(network, epochs=EPOCHS, rate=rate, data=data, cache=bench.cache / "features")
        start = bench.names[int(record.start[-1])] if record.start[-1:].isdigit() else record.start
        return f"learning rate {rate:g}, epoch {record.best_epoch}, {f'from {start}' if start else 'from nothing'}"

    return bench.trained(fusion, spec, train, *bench.parents.values())


def cross_stitch(bench: Bench) -> Iterator[Row]:
    """Units after two depths, alone trained for one epoch."""
    networks = {f"parent{k}": made.network for k, made in enumerate(bench.parents.values())}
    places = [list(PLACES[name]) for name in bench.names]
    model = itf.CrossStitch(networks, places, bench.task.example(256), copy=False)
    spec = {"cross-stitch": places, "epochs": 1, "of": [made.spec for made in bench.parents.values()]}
    made = bench.trained(
        model, spec, lambda net: f"epoch {bench.fit(net, epochs=1, rate=1e-3).best_epoch}", *bench.parents.values()
    )
    yield bench.row(LEVEL, "cross_stitch", made)

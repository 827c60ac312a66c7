"""The level weights: three fine-tunes of the best parent's network from one start, in other orders of the data, merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.levels.bench import Bench, Made, Row
from benchmarks.levels.networks import normalized
from benchmarks.levels.outputs import seeds
from torch import nn

import interfuse as itf

LEVEL = "weights"
STEPS = 20


def merges(bench: Bench) -> Iterator[Row]:
    """The usual coefficients, none of them chosen by a score; a soup and learned coefficients, by validation."""
    three = seeds(bench)
    jobs: dict[str, tuple[list[Made], dict[str, Any]]] = {
        "linear": (three, {}),
        "slerp": (three[:2], {"t": 0.5}),
        "ties": (three, {"density": 0.5}),
        "model_stock": (three, {}),
    }
    for method, (members, options) in jobs.items():
        yield bench.row(LEVEL, f"{method} of {len(members)} seeds", _merged(bench, method, members, options))
    try:
        yield bench.row(LEVEL, "learned coefficients, a layer, of 3 seeds", _learned(bench, three))
    except itf.DataError as error:  # seeds that went far apart have no loss between them
        print(f"{bench.task.name}: no coefficients were learned: {error}", flush=True)


def _merged(bench: Bench, method: str, members: list[Made], options: dict[str, Any]) -> Made:
    spec = {"merge": method, "of": [made.spec for made in members], **options}
    models = [made.network for made in members]
    base: nn.Module | None
    if method == "slerp":  # from the first to the second
        base, models = models[0], models[1:]
    else:
        base = None if method == "linear" else bench.start(bench.best)

    def train(network: nn.Module) -> None:
        network.load_state_dict(itf.merge(method, models, base=base, **options).state_dict())
        normalized(network, bench.task)

    return bench.trained(bench.start(bench.best), spec, train, *members)


def _learned(bench: Bench, members: list[Made]) -> Made:
    """One coefficient a seed and layer, by the cross-entropy on the validation part."""
    spec = {"coefficients": "layer", "steps": STEPS, "of": [made.spec for made in members]}

    def train(network: nn.Module) -> None:
        experts = {f"seed{k}": made.network for k, made in enumerate(members)}
        data = {name: bench.task.validation.loader(16, shuffle=True, seed=k) for k, name in enumerate(experts)}
        found = itf.learn_coefficients(
            bench.start(bench.best),
            experts,
            data,
            objective="cross_entropy",
            steps=STEPS,
            learning_rate=1e-2,
            start=1 / len(members),
            progress=False,
        )
        network.load_state_dict(found.merge().state_dict())
        normalized(network, bench.task)

    return bench.trained(bench.start(bench.best), spec, train, *members)

"""The level layers: parts of networks joined. Stitches and a transplant of fine-tunes, and a student built up in stages.

The student is the example of a network in two languages: its lower half comes from one pre-trained network, its upper half
from another one of other widths, joined by a stitch; it is trained in three stages, and once more from nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.levels.bench import RATES, Bench, Made, Row
from benchmarks.levels.data import part
from benchmarks.levels.networks import PLACES, UPPER, normalized
from benchmarks.levels.outputs import seeds
from torch import nn

import interfuse as itf

LEVEL = "layers"
SAMPLES = 512
FROM_NOTHING = (3e-4, 1e-3)
ALL = ["map.*", "backbones.*"]


def joined(bench: Bench) -> Iterator[Row]:
    """One parent up to a place, the other from there on, nothing trained; and half of one fine-tune within another."""
    yield bench.row(LEVEL, "stitch of the parents, the best of four", _stitched(bench))
    yield bench.row(LEVEL, "transplant of the upper part of one seed into another", _transplanted(bench))


def _stitched(bench: Bench) -> Made:
    """Both directions at both depths; the best by validation."""
    samples, tried = part(bench.task.train, SAMPLES), []
    for first, second in (bench.names, bench.names[::-1]):
        for depth in (0, 1):
            places = (PLACES[first][depth], PLACES[second][depth])
            made = (bench.parents[first], bench.parents[second])
            spec = {"stitch": places, "samples": SAMPLES, "of": [one.spec for one in made]}
            model = itf.stitch(made[0].network, made[1].network, places, samples, progress=False)
            note = f"{first} up to {places[0]}, {second} from {places[1]}"
            tried.append(Made(model.eval(), spec, sum(one.seconds for one in made), note))
    return max(tried, key=lambda one: bench.rank(bench.predicted(one, "validation")))


def _transplanted(bench: Bench) -> Made:
    """The upper part of the second seed's fine-tune in the first's; nothing is trained."""
    below, above = seeds(bench, 2)
    spec = {"transplant": UPPER[bench.best], "of": [below.spec, above.spec]}

    def train(network: nn.Module) -> str:
        network.load_state_dict(below.network.state_dict())
        itf.transplant(above.network, network, {**{glob: glob for glob in UPPER[bench.best]}, "*": None}, show=False)
        normalized(network, bench.task)
        return ""

    return bench.trained(bench.start(bench.best), spec, train, below, above)


def staged(bench: Bench) -> Iterator[Row]:
    """The student in stages, and the same network from nothing in as many epochs."""
    lower, upper = bench.names
    about = f"{lower} up to {PLACES[lower][0]}, {upper} from {PLACES[upper][0]}"
    for method, made in (("stages", _in_stages(bench)), ("from nothing", _from_nothing(bench))):
        made.note = ", ".join(part for part in (about, made.note) if part)
        yield bench.row(LEVEL, f"half and half, {method}", made)


def _student(bench: Bench) -> nn.Module:
    """The lower half of one pre-trained network, a stitch, the upper half of the other, with its head."""
    lower, upper = bench.names
    places = (PLACES[lower][0], PLACES[upper][0])
    samples = part(bench.task.train, SAMPLES)
    return itf.stitch(bench.start(lower), bench.start(upper), places, samples, copy=False, progress=False)


def _in_stages(bench: Bench) -> Made:
    rate, student = RATES[bench.task.kind], _student(bench)
    last = {"epochs": bench.epochs - 2, "learning_rate": rate}
    stages = itf.Stages(
        [
            itf.Stage("the stitch", train=["map.*"], options={"epochs": 1, "learning_rate": 1e-3}),
            itf.Stage("and above", train=["map.*", "backbones.1.*"], options={"epochs": 1, "learning_rate": rate}),
            itf.Stage("all", train=ALL, options=last),
        ]
    )
    spec = {"stages": [stage.written() for stage in stages.stages], "of": bench.names}

    def train(network: nn.Module) -> str:
        loader = bench.task.loader(bench.task.train)
        record = stages.run(
            network, train=loader, validation=bench.task.validation, patience=None, accelerator="cpu", progress=False
        )
        values = [stage.training.best["validation_accuracy"] for stage in record.stages if stage.training is not None]
        return "validation after each stage " + ", ".join(f"{value:.3f}" for value in values)

    return bench.trained(student, spec, train)


def _from_nothing(bench: Bench) -> Made:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return _forgotten(_student(bench))

    rate = bench.rate("half and half, from nothing", build, FROM_NOTHING, train_only=ALL)
    spec = {"from nothing": bench.names, "epochs": bench.epochs, "learning rate": rate}

    def train(network: nn.Module) -> str:
        record = bench.fit(network, epochs=bench.epochs, rate=rate, train_only=ALL)
        return f"learning rate {rate:g}, epoch {record.best_epoch}"

    return bench.trained(build(), spec, train)


def _forgotten(network: nn.Module) -> nn.Module:
    """The network with every module's parameters as they are in a new one; embeddings small, as BERT's begin."""
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return network

"""When an ensemble of one architecture is faster in one pass than one by one: by network, number of members, and batch.

Networks with random weights, which cost what trained ones do: two small MLPs, a small CNN, and an encoder of MiniLM's size (six
layers of width 384, 32 tokens a text). Both ways run in turn on the same batch, in evaluation mode without gradients, on one
thread; times are the processor's, which other work beside it doesn't change much, and the least of the rounds. Prints a table
and writes it beside this file. It fails where outputs differ by more than 1e-5 of the largest.

    python benchmarks/batched_ensembles.py --rounds 7
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interfuse import Ensemble

DIFFERENCE = 1e-5  # of the largest output: what must hold


class Encoder(nn.Module):
    """A text classifier of MiniLM-L6's size, (batch, tokens) -> (batch, 10)."""

    def __init__(self, layers: int = 6, width: int = 384, words: int = 2000) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers -> logits."""
        return self.head(self.layers(self.words(ids)).mean(1))


def mlp(width: int, hidden: int) -> nn.Module:
    """64 numbers -> `hidden` layers of one width -> 10 classes."""
    inner = [part for _ in range(hidden - 1) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *inner, nn.Linear(width, 10))


def cnn() -> nn.Module:
    """Images of 28 x 28 -> three convolutions -> 10 classes."""
    blocks = [
        part
        for before, after in ((1, 8), (8, 16), (16, 32))
        for part in (nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(512, 10))


class Kind(NamedTuple):
    """A network: how it is made, a batch for it, and the ensemble and batch sizes that are tried."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    members: tuple[int, ...]
    batches: tuple[int, ...]


KINDS = {
    "MLP, 1 x 32": Kind(lambda: mlp(32, 1), lambda n: torch.randn(n, 64), (4, 16, 64), (1, 32, 256)),
    "MLP, 4 x 128": Kind(lambda: mlp(128, 4), lambda n: torch.randn(n, 64), (4, 16, 64), (1, 32, 256)),
    "CNN": Kind(cnn, lambda n: torch.randn(n, 1, 28, 28), (4, 16, 64), (1, 32)),
    "encoder": Kind(Encoder, lambda n: torch.randint(0, 2000, (n, 32)), (2, 4), (1, 8)),
}


class Row(NamedTuple):
    """Milliseconds either way, the largest difference as a share, and whether the ensemble chose one pass."""

    kind: str
    members: int
    batch: int
    loop: float
    together: float
    difference: float
    chosen: bool


def seconds(model: nn.Module, inputs: Tensor) -> float:
    """The processor's time for one call."""
    start = time.process_time()
    model(inputs)
    return time.process_time() - start


def measure(name: str, members: int, batch: int, rounds: int) -> Row:
    """One row of the table."""
    torch.manual_seed(0)
    networks = [KINDS[name].make() for _ in range(members)]
    loop, together, free = (Ensemble(networks, copy=False, combine="logits", batched=how).eval() for how in (False, True, None))
    inputs = KINDS[name].batch(batch)
    one, other = loop(inputs), together(inputs)
    spans = [(seconds(loop, inputs), seconds(together, inputs)) for _ in range(rounds)]
    together.one_pass.forget()
    for _ in range(2):
        free(inputs)
    return Row(
        name,
        members,
        batch,
        min(span[0] for span in spans) * 1e3,
        min(span[1] for span in spans) * 1e3,
        float((one - other).abs().max() / one.abs().max()),
        any(free.one_pass.choices.values()),
    )


def table(rows: list[Row], rounds: int) -> str:
    """The page."""
    lines = [
        "# Ensembles in one pass against one by one",
        "",
        "Milliseconds of processor time for one batch through all members, on one thread; the least of the rounds. The last",
        "column is what the ensemble itself chose, by the clock, when the shape came for the second time.",
        "",
        "| network | members | batch | one by one, ms | one pass, ms | times as fast | chosen |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        way = "one pass" if row.chosen else "one by one"
        ratio = f"{row.loop / row.together:.2f}"
        ratio = f"**{ratio}**" if row.loop > row.together else ratio
        lines.append(f"| {row.kind} | {row.members} | {row.batch} | {row.loop:.3g} | {row.together:.3g} | {ratio} | {way} |")
    worst = max(row.difference for row in rows)
    chosen = max((row.together if row.chosen else row.loop) / min(row.loop, row.together) for row in rows)
    cores = len(os.sched_getaffinity(0))
    paying = [row for row in rows if row.loop > row.together]
    least = min((row.members for row in paying), default=0)
    lines += [
        "",
        f"- One pass was faster in {len(paying)} of {len(rows)} cases, none of them with fewer than {least} members."
        if paying
        else "- One pass was faster nowhere.",
        f"- The ensemble's own choice, from five runs each way, took at most {chosen:.2f} times as long as the better.",
        f"- The two ways' outputs differ by {worst:.1e} of the largest at most ({DIFFERENCE:.0e} is allowed).",
        f"- {rounds} rounds; one of {cores} cores ({platform.machine()}), with other work beside it;",
        f"  torch {torch.__version__}. Not measured on a GPU.",
        f"- `python benchmarks/batched_ensembles.py --rounds {rounds}`",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write, and say whether what must hold does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="one network's name")
    parser.add_argument("--members", type=int, nargs="*", help="in place of the table's")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for name, kind in KINDS.items():
            for members in (given.members or kind.members) if given.only in (None, name) else ():
                for batch in kind.batches:
                    rows.append(measure(name, members, batch, given.rounds))
                    print(*rows[-1], flush=True)
    text = table(rows, given.rounds)
    given.out.write_text(text, encoding="utf-8")
    print(text)
    return int(max(row.difference for row in rows) > DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())

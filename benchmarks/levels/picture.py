"""levels.svg: accuracy with its interval against the cost of a prediction, a panel a set, a colour a level.

python -m benchmarks.levels.picture
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.levels.table import LEVELS
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).parent


def main() -> None:
    """Draw results.json."""
    rows = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    sets = list(dict.fromkeys(row["set"] for row in rows))
    pyplot.rcParams.update({"svg.hashsalt": "interfuse", "font.size": 9})
    lines = -(-len(sets) // 2)
    figure, panels = pyplot.subplots(lines, 2, figsize=(9.2, 3.8 * lines), squeeze=False, layout="constrained")
    for axes, name in zip(panels.flat, sets, strict=False):
        draw(axes, name, [row for row in rows if row["set"] == name])
        axes.set_ylabel("accuracy on the test part")
    panels.flat[len(sets) - 1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "levels.svg", metadata={"Date": None})


def draw(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    """One set; networks from nothing, far below the others, are left out."""
    floor = min(row["accuracy"][1] for row in rows if row["level"] in ("parents", "features"))
    for number, level in enumerate(LEVELS):
        own = [row for row in rows if row["level"] == level and row["accuracy"][0] >= floor]
        x = [row["flops"] * 1e-6 * 1.012 ** (k - len(own) / 2) for k, row in enumerate(own)]  # beside each other
        y = [row["accuracy"][0] for row in own]
        spans = [
            [row["accuracy"][0] - row["accuracy"][1] for row in own],
            [row["accuracy"][2] - row["accuracy"][0] for row in own],
        ]
        style = {"fmt": "o", "markersize": 4, "elinewidth": 0.5, "color": f"C{number}", "label": level}
        axes.errorbar(x, y, yerr=spans, **style)  # type: ignore[arg-type]
    best = next(row for row in rows if row["best"])
    axes.axhline(best["accuracy"][0], color="0.6", linestyle=":", linewidth=1)
    axes.set(title=name, xlabel="million operations a prediction")
    axes.grid(alpha=0.2)


if __name__ == "__main__":
    main()

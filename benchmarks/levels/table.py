"""results.json, a line a set and method, and the table that is made of it.

Quality is `itf.compare`'s, of the predictions that are kept: accuracy with its interval and the paired difference to the best
parent, and the calibration error. Costs are measured on the networks themselves.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.levels.bench import Bench, Row
from torch import Tensor, nn

import interfuse as itf
from interfuse import units
from interfuse.evaluation.cost import cost
from interfuse.evaluation.metrics import score

LEVELS = ("parents", "baselines", "features", "weights", "layers", "outputs")
#: README.md up to here is written by hand.
TABLES = "## The tables"


class Said(nn.Module):
    """Predictions that are there already, by the rows' numbers: `compare` reads them as a network's."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, rows: Tensor) -> Tensor:
        """Rows' numbers -> their logits."""
        return self.logits[rows]


def accuracy(bench: Bench, row: Row) -> float:
    """On the test part."""
    return score("accuracy", row.said["test"], bench.task.test.targets)


def add(folder: Path, bench: Bench, row: Row, *, latency: bool) -> None:
    """Put a row in results.json, in the place of an older one of that set and method."""
    path = folder / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    old = next((one for one in found if (one["set"], one["method"]) == (bench.task.name, row.method)), None)
    new = _measured(bench, row) | _costs(bench, row, old, latency=latency)
    if old is None:
        found.append(new)
    else:
        found[found.index(old)] = new
    path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def _measured(bench: Bench, row: Row) -> dict[str, Any]:
    test, best = bench.task.test.targets, bench.best
    models = {"best": Said(bench.predicted(bench.parents[best], "test")), "this": Said(row.said["test"])}
    data = (torch.arange(len(test)), test)
    quality, error = (
        itf.compare(models, data, metric=metric, parents=["best"], best_parent="best", progress=False)["this"]
        for metric in ("accuracy", "ece")
    )
    parent = row.level == "parents"
    return {
        "set": bench.task.name,
        "level": row.level,
        "method": row.method,
        "examples": len(test),
        "accuracy": list(quality.score),
        "difference": None if (parent and row.method == best) or quality.difference is None else list(quality.difference),
        "ece": error.score.value,
        "validation": score("accuracy", row.said["validation"], bench.task.validation.targets),
        "best": parent and row.method == best,
        "seconds": row.made.seconds,
        "note": row.made.note,
    }


def _costs(bench: Bench, row: Row, old: Mapping[str, Any] | None, *, latency: bool) -> dict[str, Any]:
    """Parameters, FLOPs and latency; a latency that was measured is kept until it is measured again."""
    if old is not None and not latency:
        return {name: old[name] for name in ("parameters", "flops", "latency")}
    found = cost(row.made.network, bench.task.example(), repeats=10 if latency else 1, warmup=2 if latency else 0)
    return {"parameters": found.parameters, "flops": found.flops, "latency": found.latency if latency else None}


def write(folder: Path) -> None:
    """README.md: what is written by hand, then the tables."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = [TABLES, ""]
    for name in dict.fromkeys(row["set"] for row in found):
        rows = [row for level in LEVELS for row in found if row["set"] == name and row["level"] == level]
        lines += [f"### {name}", "", *_table(rows), ""]
    lines += [f"One thread ({platform.machine()}), torch {torch.__version__}.", ""]
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8").partition(TABLES)[0] if path.exists() else "# Every level, measured\n\n"
    path.write_text(old + "\n".join(lines), encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    best = next((row["method"] for row in rows if row["best"]), "the best parent")
    heads = ["Level", "Method", "Accuracy", f"vs {best}", "ECE", "Parameters", "FLOPs/example", "Latency (batch 32)"]
    heads += ["Training, s", "Remark"]
    lines = [heads, [":--", ":--", *["--:"] * 7, ":--"]]
    for row in rows:
        latency = "" if row["latency"] is None else units.seconds(row["latency"])
        lines.append(
            [
                row["level"],
                row["method"],
                units.span(*row["accuracy"]),
                units.span(*row["difference"], signed=True) if row["difference"] else "",
                f"{row['ece']:.3f}",
                units.count(row["parameters"]),
                units.count(row["flops"]),
                latency,
                f"{row['seconds']:,.0f}",
                row["note"].replace("_", "\\_"),
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]

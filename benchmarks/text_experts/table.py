"""What came out: the point that validation chose, the tables and the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.text_experts.sharing import DEPTHS, METHODS, TUNINGS, Result
from matplotlib.figure import Figure

from interfuse import units

POINT = 0.01  # how far the mean may fall
Records = Mapping[str, Mapping[str, Any]]
Prices = Mapping[str, Mapping[str, float]]


def mean_of(records: Records, which: str, part: str) -> float:
    """The mean over tasks of what the records say of `probe` or `expert`."""
    return fmean(record[which][part] for record in records.values())


def chosen(results: Sequence[Result], prices: Prices, records: Records) -> Result | None:
    """The smallest whose validation mean is within a point of the experts', of one size the best; None where there is none."""
    floor = mean_of(records, "expert", "validation") - POINT
    fine = [found for found in results if found.mean >= floor]
    return min(fine, key=lambda found: (prices[str(found.depth)]["parameters"], -found.mean), default=None)


def markdown(results: Sequence[Result], prices: Prices, records: Records, point: Result | None) -> str:
    """Experts; merged networks by method and depth; networks trained further; what was chosen."""
    nothing = "## Chosen\n\nThe experts: no network that was measured is within a point of their mean."
    last = nothing if point is None else _chosen(prices, records, point)
    return "\n\n".join([_experts(records), _merged(results), _tested(results, prices, records), last])


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, [":--", *["--:"] * (len(head) - 1)], *rest])


def _experts(records: Records) -> str:
    heads = [
        "Task",
        "Texts (train, validation, test)",
        "Probe, validation",
        "Expert, validation",
        "Probe, test",
        "Expert, test",
    ]
    columns = [(which, part) for part in ("validation", "test") for which in ("probe", "expert")]
    rows = [
        [name, ", ".join(f"{n:,}" for n in record["sizes"].values()), *(f"{record[w][p]:.4f}" for w, p in columns)]
        for name, record in records.items()
    ]
    last = ["**mean**", "", *(f"**{mean_of(records, which, part):.4f}**" for which, part in columns)]
    about = "Accuracy; the probe is the pre-trained encoder under the head that its expert starts from."
    return f"## The experts\n\n{_table([heads, *rows, last])}\n\n{about}"


def _merged(results: Sequence[Result]) -> str:
    found = {(r.method, r.depth): r for r in results if r.tuning == "merged"}
    heads = ["Shared", *(f"`{method}`" for method in METHODS)]
    rows = [
        [shown(depth), *(f"{found[m, depth].mean:.4f}" if (m, depth) in found else "" for m in METHODS)] for depth in DEPTHS
    ]
    options = "; ".join(f"`{m}` {', '.join(f'{k} {v}' for k, v in o.items())}" for m, o in METHODS.items() if o)
    about = f"Mean validation accuracy; blank cells weren't measured. Options that aren't the defaults: {options}."
    return f"## Merged, nothing trained\n\n{_table([heads, *rows])}\n\n{about}"


def _tested(results: Sequence[Result], prices: Prices, records: Records) -> str:
    heads = ["Shared", "Merged by", "Then", "Parameters", "FLOPs/text", "Latency", "Validation", "Test", "Trained, s"]
    expert = {part: f"{mean_of(records, 'expert', part):.4f}" for part in ("validation", "test")}
    spent = f"{sum(record['seconds'] for record in records.values()):.0f}"
    rows = [["nothing", "", "", *_price(prices["0"]), expert["validation"], expert["test"], spent]]
    kept = [r for r in results if r.test or r.tuning != "merged"]
    for found in sorted(kept, key=lambda r: (-prices[str(r.depth)]["parameters"], r.mean)):
        price = _price(prices[str(found.depth)])
        values = [f"{found.mean:.4f}", f"{fmean(found.test.values()):.4f}" if found.test else "", f"{found.seconds:.0f}"]
        rows.append([shown(found.depth), f"`{found.method}`", TUNINGS[found.tuning], *price, *values])
    about = (
        "Mean accuracies. Latency: 8 texts through all tasks in one pass. The first row's time is that of training the"
        " experts. Times were taken beside other work."
    )
    return f"## Merged, and trained further: tested\n\n{_table([heads, *rows])}\n\n{about}"


def _price(price: Mapping[str, float]) -> list[str]:
    return [units.count(int(price["parameters"])), units.count(int(price["flops"])), units.seconds(price["latency"])]


def _chosen(prices: Prices, records: Records, point: Result) -> str:
    ratio = prices["0"]["parameters"] / prices[str(point.depth)]["parameters"]
    parts = [part for part in ("validation", "test") if getattr(point, part)]
    means = {part: fmean(getattr(point, part).values()) for part in parts}
    told = "; ".join(f"{part} {now:.4f}, the experts' {mean_of(records, 'expert', part):.4f}" for part, now in means.items())
    rows = [["", *point.validation]]
    for part in parts:
        rows.append([f"experts, {part}", *(f"{records[task]['expert'][part]:.4f}" for task in point.validation)])
        rows.append([f"chosen, {part}", *(f"{getattr(point, part)[task]:.4f}" for task in point.validation)])
    how = f"{shown(point.depth)} shared, `{point.method}`, {TUNINGS[point.tuning]}"
    return f"## Chosen\n\n{how}: {ratio:.2f} times fewer parameters than the experts; {told}.\n\n{_table(rows)}"


def shown(depth: int | str) -> str:
    """A depth in words."""
    return "embeddings" if isinstance(depth, str) else f"{depth} layer{'s' * (depth > 1)}"


def figure(results: Sequence[Result], prices: Prices, records: Records, point: Result | None, path: Path) -> None:
    """Mean validation accuracy against parameters and against latency, a line a method, a mark for each that was trained."""
    drawn = Figure(figsize=(9, 3.8), layout="constrained")
    sides = drawn.subplots(1, 2, sharey=True)
    expert = mean_of(records, "expert", "validation")
    for axes, key, scale, label in zip(
        sides, ("parameters", "latency"), (1e-6, 1e3), ("parameters (millions)", "latency (ms)"), strict=True
    ):
        start = prices["0"][key] * scale
        for method in METHODS:
            line = [r for depth in DEPTHS for r in results if (r.depth, r.method, r.tuning) == (depth, method, "merged")]
            at = [start, *(prices[str(r.depth)][key] * scale for r in line)]
            axes.plot(at, [expert, *(r.mean for r in line)], marker="o", markersize=3, linewidth=1, label=method)
        for tuning, mark in (("own", "^"), ("all", "s"), ("distilled", "D")):
            some = [r for r in results if r.tuning == tuning]
            at = [prices[str(r.depth)][key] * scale for r in some]
            axes.plot(at, [r.mean for r in some], mark, markersize=6, color="black", mfc="none", label=f"trained: {tuning}")
        axes.axhline(expert - POINT, color="0.6", linestyle=":", label="experts - 1 point")
        if point is not None:
            axes.plot(
                [prices[str(point.depth)][key] * scale], [point.mean], "*", markersize=12, color="tab:red", label="chosen"
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    sides[0].axvline(prices["0"]["parameters"] * 1e-6 / 3, color="0.8", linestyle="--", label="a third of the experts")
    sides[0].set_ylabel("mean accuracy (validation)")
    drawn.legend(*sides[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    drawn.savefig(path)

"""How much own memory a merge takes, for every method on one huge tensor and for many models: not how fast it is.

Each row is `interfuse run RECIPE OUT` as a whole process, whose own (anonymous) memory is sampled every 20 ms together with
that of all it starts. Models are bf16 files of a single tensor, made by writing one random pattern again and again: a
fine-tune is the base plus noise so small that a good part of the differences is 0. Files that are mapped aren't own memory.
A process is stopped from taking more than 3 GB of data. Linux; the folder given needs 20 GB, and isn't kept in memory.

    python -m benchmarks.merge_memory [--work FOLDER] [--only METHOD ...] [--missing]

With --only the rows of other methods stay as they were, with --missing all that the table has.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmarks.merge_speed.measure import Failed, run

from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.checkpoints.numbers import narrow

HERE = Path(__file__)
RUN: tuple[str | Path, ...] = (sys.executable, "-c", "from interfuse.cli import main; main()", "run")
BOUND, MOST = 500, 3 * 10**9  # MB that are asked for, bytes at which a process is stopped
PATTERN = 8_000_009  # elements: no multiple of any block or row
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """A method and its options on so many models beside the base, if there is one."""

    method: str
    models: int = 2
    base: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def recipe(self, folder: Path) -> dict[str, Any]:
        """The recipe, for files in that folder."""
        names = [str(folder / f"{number}.safetensors") for number in range(self.models + 1)]
        based = {"base_model": names[0]} if self.base else {}
        models = [{"model": name} for name in names[1:]]
        return {"merge_method": self.method, **based, "models": models, "parameters": self.options}

    def __str__(self) -> str:
        said = ", ".join(f"{key} {str(value).lower()}" for key, value in self.options.items())
        return f"`{self.method}`" + (f", {said}" if said else "")


HALF = {"density": 0.5}
RULES = [
    Case("ties", options=HALF), Case("ties", options={**HALF, "rescale": True}),
    Case("ties", options={**HALF, "trim": "global"}),
    Case("dare_linear", options=HALF), Case("dare_ties", options=HALF), Case("dare_ties", options={**HALF, "rescale": "l1"}),
    Case("della", options=HALF), Case("della_linear", options={**HALF, "rescale": "l1"}),
    Case("breadcrumbs", options={**HALF, "gamma": 0.05}), Case("breadcrumbs_ties", options={**HALF, "gamma": 0.05}),
    Case("sce", options={"select_topk": 0.5}),
]  # fmt: skip
ALL = [
    Case("linear", base=False), Case("slerp", 1, options={"t": 0.4}), Case("nuslerp"),
    Case("nuslerp", options={"nuslerp_flatten": False}),
    Case("nuslerp", options={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("multislerp"), Case("karcher", base=False), Case("task_arithmetic"), Case("model_stock"),
    Case("model_stock", options={"filter_wise": True}), Case("nan"), Case("lines", options={"alpha": 0.3, "beta": 0.7}),
    Case("expo"), Case("uniform_soup", base=False), Case("ema", base=False, options={"decay": 0.5}),
    *RULES,
    Case("magmax"), Case("consensus"), Case("consensus", options={"output": "per_task"}),
    Case("emr"), Case("emr", options={"output": "per_task"}), Case("pcb"), Case("nearswap", 1, options={"t": 1e-4}),
    Case("arcee_fusion", 1), Case("ram"), Case("ramplus_tl"), Case("passthrough", 1, base=False),
]  # fmt: skip
LARGE = [
    Case("linear", base=False), Case("ties", options=HALF), Case("della", options=HALF),
    Case("sce", options={"select_topk": 0.5}), Case("model_stock"),
]  # fmt: skip
ROW = [
    Case("linear", base=False), Case("ties", options=HALF), Case("della", options=HALF),
    Case("sce", options={"select_topk": 0.5}), Case("model_stock", options={"filter_wise": True}),
]  # fmt: skip
MANY = [
    Case(case.method, 64, case.base, case.options)
    for case in ALL
    if case.models > 1 and case.method != "nuslerp"
]  # fmt: skip
SPECTRAL = [Case("iso_c"), Case("tsv_m"), Case("wudi"), Case("wudi", options={"solver": "descent", "steps": 10})]

PARTS: list[tuple[tuple[int, int], list[Case]]] = [
    ((20_000, 25_000), ALL),
    ((40_000, 50_000), LARGE),
    ((1, 2_000_000_000), ROW),
    ((4_000, 5_000), MANY),
    ((3_072, 4_096), SPECTRAL),
]


def main() -> None:
    """Measure all cases, or those of some methods, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where models are written")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these alone; the table's other rows stay")
    parser.add_argument("--missing", action="store_true", help="only what the table hasn't")
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))  # processes that this one starts have it too
    rows = _former()
    for shape, cases in PARTS:
        wanted = [case for case in cases if not chosen.only or case.method in chosen.only]
        wanted = [case for case in wanted if not (chosen.missing and _name(shape, case) in rows)]
        for name, took in _measured(shape, wanted, chosen.work) if wanted else ():
            rows[name] = took
            print(name + took, flush=True)
            HERE.with_suffix(".md").write_text(_table(rows), encoding="utf-8")


def _measured(shape: tuple[int, int], cases: Sequence[Case], work: Path) -> Iterator[tuple[str, str]]:
    """The rows of one shape, by their beginning and their end; its models are made for it and removed."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        make_models(folder, shape, 1 + max(case.models for case in cases))
        for case in cases:
            recipe = folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(case.recipe(folder)), encoding="utf-8")
            try:
                found = run([*RUN, recipe, folder / "out"], memory=True)
                took = f"{found.own:.0f} | {found.seconds:.0f} |"
            except Failed as error:
                took = f"failed: {str(error).splitlines()[-1]} | - |"
            shutil.rmtree(folder / "out", ignore_errors=True)
            yield _name(shape, case), took


def _name(shape: tuple[int, int], case: Case) -> str:
    """How a row begins."""
    size = f"{math.prod(shape) / 1e6:,.0f} million, {list(shape)}"
    return f"| {case} | {size} | {'base + ' if case.base else ''}{case.models} | "


def _former() -> dict[str, str]:
    """The rows that the table has."""
    path = HERE.with_suffix(".md")
    known = [_name(shape, case) for shape, cases in PARTS for case in cases]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: line.removeprefix(name) for line in lines for name in known if line.startswith(name)}


def make_models(folder: Path, shape: tuple[int, int], count: int) -> None:
    """Write 0.safetensors, the base, and fine-tunes 1, 2, ... of one bf16 tensor each."""
    random = np.random.default_rng(0)
    base = 0.02 * random.standard_normal(PATTERN, dtype=np.float32)
    spec = TensorSpec("BF16", shape)
    header, _ = encode_header({"weight": spec}, None)
    for number in range(count):
        noise = 7e-5 * random.standard_normal(PATTERN, dtype=np.float32) if number else np.float32(0)
        pattern = memoryview(narrow(base + noise, "BF16").tobytes())
        with open(folder / f"{number}.safetensors", "wb") as file:
            file.write(header)
            for written in range(0, spec.nbytes, len(pattern)):
                file.write(pattern[: spec.nbytes - written])


def _table(rows: Mapping[str, str]) -> str:
    names = [_name(shape, case) for shape, cases in PARTS for case in cases]
    untold = [f"{case} with {case.models} models" for shape, cases in PARTS for case in cases if _name(shape, case) not in rows]
    processor = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return "\n".join([
        "# Memory",
        "",
        "Own (anonymous) memory at its peak, in MB, of `interfuse run` as a whole process, on one bf16 tensor, for all methods",
        f"that go by blocks. At most {BOUND} MB are asked for, whatever the tensor and however many the models.",
        "",
        "| method | parameters | models | own memory, MB | seconds |",
        "|---|--:|--:|--:|--:|",
        *(name + rows[name] for name in names if name in rows),
        "",
        "- Methods of whole matrices (`tsv_m`, `iso_c`, `iso_cts`, `subspace_boost`, `cart`, `star`, `knots`, `wudi`, `ace`)",
        "  are bounded by their largest matrix: the last rows. They hold its deltas in float32 (4 bytes a parameter and model)",
        "  and 4 to 9 copies of it in float64, on every thread that has such a matrix.",
        "- Every thread has its buffers, so memory grows a little with the processor's cores. Seconds are those of a shared",
        "  machine, busy or not, with files on a disk, and say little.",
        *([f"- Not measured yet: {'; '.join(untold)}."] if untold else []),
        f"- {CORES} cores ({processor}), Python {platform.python_version()}.",
        "- To get it again: `python -m benchmarks.merge_memory`, which needs 20 GB of disk.",
        "",
    ])  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()

"""Merges a Llama-shaped bf16 model of 1.1 billion parameters in shards by every method, and times it three ways.

- ours: `interfuse run RECIPE OUT` as a whole process, start-up included, and the engine's part of it by its own record;
- the floor: a C program that reads all of the method's inputs once, sums them and writes one output (`floor.c`);
- mergekit 0.1.5, on the same recipe, where `--mergekit` names the Python that has it. It can't be installed beside
  interfuse: `python -m venv mk && mk/bin/pip install mergekit==0.1.5`, then `--mergekit mk/bin/python`. It takes minutes
  a method, so its results are kept in `results.json` and shown until they are measured again.

Ours and the floor take turns, on all cores, and the table has their medians; inputs are read once before every timed run.
Memory is sampled in runs of their own (for mergekit in the timed one). Inputs and outputs are on memory-backed storage,
because disks here throttle writes; one line tells what a disk makes of it. Needs Linux, 12 GB there and 4 GB beside.

    python -m benchmarks.merge_speed --mergekit mk/bin/python      # on a virtual machine, with --room 4 beside
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from benchmarks.merge_speed import reference
from benchmarks.merge_speed.measure import Failed, Measured, compile_floor, floor_command, hold_memory, read_all, run
from benchmarks.merge_speed.model import FULL, TINY, Shape, make_models

HERE = Path(__file__).parent
OURS: tuple[str | Path, ...] = (sys.executable, "-c", "from interfuse.cli import main; main()", "run")
CHECKED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.norm")
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """A method, its options, and what must hold: at most `within` times the floor, `faster` times mergekit's speed."""

    method: str
    within: float | None = None
    faster: float | None = None
    models: int = 3
    base: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    each: dict[str, list[float]] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """How many models are read."""
        return self.models + self.base

    def recipe(self, folders: Sequence[Path]) -> dict[str, Any]:
        """What mergekit and interfuse both read; the first folder is the base's."""
        models = [
            {"model": str(path), "parameters": {name: values[i] for name, values in self.each.items()}}
            for i, path in enumerate(folders[1 : 1 + self.models])
        ]
        recipe = {"merge_method": self.method, "models": models, "parameters": self.options, "dtype": "bfloat16"}
        return recipe | ({"base_model": str(folders[0])} if self.base else {})


WEIGHT = {"weight": [0.5, 0.3, 0.2]}
HALF = WEIGHT | {"density": [0.5, 0.5, 0.5]}
MOST = WEIGHT | {"density": [0.9, 0.9, 0.9], "gamma": [0.01, 0.01, 0.01]}
SPREAD = HALF | {"epsilon": [0.15, 0.15, 0.15]}
CASES = (
    Case("linear", 1.5, 10, base=False, each=WEIGHT),
    Case("task_arithmetic", 1.5, 10, each=WEIGHT),
    Case("slerp", 1.5, 10, models=1, options={"t": 0.4}),
    Case("model_stock", 1.5, 10),
    Case("karcher", 1.5, 10, base=False),
    Case("ties", 3, 60, each=HALF),
    Case("dare_ties", 3, 30, each=HALF),
    Case("della", 3, 30, each=SPREAD),
    Case("breadcrumbs", 3, 30, each=MOST),
    Case("sce", 3, 30, options={"select_topk": 0.5}),
    Case("dare_linear", each=HALF),
    Case("della_linear", each=SPREAD),
    Case("breadcrumbs_ties", each=MOST),
    Case("nuslerp", models=2, each={"weight": [0.6, 0.4]}),
    Case("multislerp", base=False, each=WEIGHT),
    Case("nearswap", models=1, options={"t": 0.0001}),
    Case("arcee_fusion", models=1),
    Case("ram"),
)


def main() -> int:
    """Measure, keep, print; 1 where something failed or what must hold doesn't."""
    options = _options()
    shape = TINY if options.quick else FULL
    cases = [case for case in CASES if options.only is None or case.method in options.only.split(",")]
    results = options.out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory(prefix="interfuse-benchmark-", dir=options.data) as temporary:
        folder = options.models or Path(temporary) / "models"
        folders = _models(folder, shape)
        bench = Bench(folders, Path(temporary), compile_floor(Path(temporary)), 1 if options.quick else options.runs)
        bench.held = hold_memory(options.room * 10**9) if options.room else None
        for case in cases:
            rows = found.setdefault(case.method, {})
            if not options.only_mergekit:
                rows |= bench.ours(case)
            if options.mergekit:
                rows["mergekit"] = bench.mergekit(case, options.mergekit)
            print(f"{case.method}: {json.dumps(rows)}", flush=True)
            _keep(results, found)
        if options.disk:
            found["disk"] = bench.disk(options.disk)
    found["about"] = _about(shape, options.runs)
    _keep(results, found)
    text = table(found)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    return int(any(found[case.method].get("failed") or (not options.quick and missed(case, found)) for case in cases))


class Bench:
    """The models, the place for outputs, and the floor's program; every method measures one case."""

    def __init__(self, folders: list[Path], work: Path, floor: Path | None, runs: int) -> None:
        self.folders, self.work, self.floor, self.runs = folders, work, floor, runs
        self.held: object = None  # memory that is to stay in use until the end

    def ours(self, case: Case) -> dict[str, Any]:
        """Our runs and the floor's, in turns; then one for memory and one look at the output."""
        recipe, out = self._recipe(case), self.work / "out"
        floors, processes, engines = [], [], []
        try:
            run([*OURS, recipe, out, "--overwrite"])  # compiles what isn't compiled yet
            for _ in range(self.runs):
                if self.floor:
                    floors.append(self._timed(floor_command(self.floor, self._inputs(case), out, CORES), case).seconds)
                timed = self._timed([*OURS, recipe, out, "--json"], case)
                processes.append(timed.seconds)
                engines.append(json.loads(timed.said)["seconds"])
            peak = self._timed([*OURS, recipe, out], case, memory=True)
        except Failed as error:
            return {"failed": str(error)}
        values = {"floor": floors, "process": processes, "engine": engines, "own": peak.own, "resident": peak.resident}
        return {"failed": None} | values | {"error": self._error(case)}

    def mergekit(self, case: Case, python: Path) -> dict[str, Any]:
        """One run of mergekit; its time, memory and error."""
        command: list[str | Path] = [
            python,
            "-m",
            "mergekit.scripts.run_yaml",
            self._recipe(case),
            self.work / "out",
            "--quiet",
        ]
        try:
            peak = self._timed(command, case, memory=True)
        except Failed as error:
            return {"failed": str(error)}
        values = {"seconds": peak.seconds, "own": peak.own, "resident": peak.resident, "others": peak.others}
        return values | {"error": self._error(case)}

    def disk(self, folder: Path) -> dict[str, Any]:
        """The linear merge's floor with fsync, and ours, written to a disk."""
        case, out = CASES[0], Path(tempfile.mkdtemp(dir=folder)) / "out"
        recipe = self._recipe(case)
        found: dict[str, list[float]] = {"floor": [], "process": []}
        for _ in range(self.runs):
            if self.floor:
                command: list[Any] = floor_command(self.floor, self._inputs(case), out, CORES, sync=True)
                found["floor"].append(self._timed(command, case, out).seconds)
            found["process"].append(self._timed([*OURS, recipe, out], case, out).seconds)
        shutil.rmtree(out.parent)
        return found

    def _timed(self, command: Sequence[str | Path], case: Case, out: Path | None = None, memory: bool = False) -> Measured:
        """One run that finds its inputs in memory, and no output: what one held until now is free."""
        read_all(file for path in self._inputs(case) for file in sorted(path.iterdir()))
        _remove(out or self.work / "out")
        return run(command, memory=memory)

    def _inputs(self, case: Case) -> list[Path]:
        return self.folders[0 if case.base else 1 : 1 + case.models]

    def _recipe(self, case: Case) -> Path:
        path = self.work / f"{case.method}.yaml"
        path.write_text(yaml.safe_dump(case.recipe(self.folders), sort_keys=False))
        return path

    def _error(self, case: Case) -> list[float] | None:
        base = self.folders[0] if case.base else None
        models = self.folders[1 : 1 + case.models]
        options = case.options | {k: v if k == "weight" else v[0] for k, v in case.each.items()}
        names = [f"{name}.weight" for name in CHECKED]
        found = reference.error(case.method, self.work / "out", models, base, options, names)
        return None if found is None else list(found)


def missed(case: Case, found: dict[str, Any]) -> bool:
    """Whether the case is slower than it must be, by what was measured."""
    row = found[case.method]
    if "process" not in row:
        return False
    process = statistics.median(row["process"])
    slow = bool(case.within and row["floor"] and process > case.within * statistics.median(row["floor"]))
    peer = (row.get("mergekit") or {}).get("seconds")
    return slow or bool(case.faster and peer and peer < case.faster * process)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# The speed of merging",
        "",
        "Seconds, the median of runs in turns; peak memory of one's own (anonymous, not files), in MB; the error is the",
        "largest and the mean distance from a float64 reference, in steps of bf16 (a single rounding: 0.5 and 0.25).",
        "",
        "| method | models | engine, s | process, s | floor, s | engine / floor | process / floor | mergekit, s "
        "| times as fast | memory | mergekit's | error | mergekit's |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    failures = []
    for case in CASES:
        row = found.get(case.method)
        if row is None:
            continue
        peer = row.get("mergekit") or {}
        inputs = f"{'base + ' if case.base else ''}{case.models}"
        if row.get("failed") or "process" not in row:
            failures.append(f"- `{case.method}`: {row.get('failed') or 'not measured'}".replace("\n", " "))
            lines.append(
                f"| {case.method} | {inputs} | - | - | - | - | - | {_number(peer.get('seconds'))} | - | - | - | - | - |"
            )
            continue
        engine, process = statistics.median(row["engine"]), statistics.median(row["process"])
        floor = statistics.median(row["floor"]) if row["floor"] else None
        cells = [
            *(_number(value, 2) for value in (engine, process, floor)),
            _bound(floor and engine / floor, None),
            _bound(floor and process / floor, case.within),
            _number(peer.get("seconds")),
            _bound(peer.get("seconds") and peer["seconds"] / process, case.faster, least=True),
            _number(row["own"], 0),
            _number(peer.get("own"), 0),
            *(" / ".join(f"{v:.2f}" for v in e["error"]) if e.get("error") else "-" for e in (row, peer)),
        ]
        lines.append(f"| {case.method} | {inputs} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *failures, *_notes(found), ""])


def _notes(found: dict[str, Any]) -> list[str]:
    about = found["about"]
    notes = [
        '- What must hold stands in brackets. "floor" is plain C that reads the same inputs once and writes one output, on the',
        "  same threads: `floor.c`. A method that needs sums or ranks of a tensor (slerp, ties) reads it twice.",
        "- mergekit computes most methods in the recipe's `dtype`, bfloat16; we compute in float32 and round once. Of equal",
        "  magnitudes it keeps any, which its error in `ties` and `breadcrumbs` counts; its `sce` weighs models alike where",
        "  the mean squares of deltas are below 1e-6, as they are here and in most fine-tunes. The largest error of `sce` is",
        "  at positions whose variances are equal but for a rounding: of those the reference keeps others.",
    ]
    if disk := found.get("disk"):
        ours, floor = statistics.median(disk["process"]), statistics.median(disk["floor"]) if disk["floor"] else None
        notes.append(f"- The linear merge written to a disk: process {ours:.2f} s, floor with fsync {_number(floor, 2)} s.")
    return [
        *notes,
        f"- {about['parameters'] / 1e9:.2f} billion parameters in bf16, {about['shards']} shards a model; {about['machine']}.",
        f"- {about['versions']}; mergekit 0.1.5. `python -m benchmarks.merge_speed --mergekit mk/bin/python`",
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bound(value: float | None, bound: float | None, least: bool = False) -> str:
    """A ratio and, in brackets, what it must be."""
    if value is None:
        return "-"
    must = "" if bound is None else f" ({'≥' if least else '≤'} {bound:g})"
    return f"{value:.0f}{must}" if least else f"{value:.2f}{must}"


def _models(folder: Path, shape: Shape) -> list[Path]:
    """The base and three fine-tunes, made unless they are there."""
    folders = [folder / "base", *(folder / f"finetune-{i}" for i in (1, 2, 3))]
    if all((path / "model.safetensors.index.json").exists() for path in folders):
        return folders
    free, needed = shutil.disk_usage(folder.parent).free, 10 * shape.parameters
    if free < needed:
        sys.exit(f"{folder.parent}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed; name another with --data")
    return make_models(folder, shape, 3)


def _about(shape: Shape, runs: int) -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba")]
    return {
        "parameters": shape.parameters,
        "shards": shape.shards,
        "runs": runs,
        "machine": f"{CORES} cores ({names[0] if names else platform.machine()}), {memory:.0f} GB",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _keep(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment that has mergekit 0.1.5")
    parser.add_argument("--only-mergekit", action="store_true", help="measure mergekit alone")
    parser.add_argument("--only", help="these methods, with commas between; other rows stay as they are")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of ours and of the floor")
    parser.add_argument("--data", type=Path, default=Path("/dev/shm"), help="where inputs and outputs are, for a while")
    parser.add_argument("--models", type=Path, help="a folder where the models are kept, and made unless they are there")
    parser.add_argument("--room", type=int, help="GB of memory to leave free, 4 or more: steadier on virtual machines")
    parser.add_argument("--disk", type=Path, help="also write the linear merge to this folder, on a disk")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and the table are written")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one run: does it work? Needs --out")
    options = parser.parse_args()
    if options.quick and options.out == HERE:
        parser.error("--quick measures nothing worth keeping: name another folder with --out")
    return options


if __name__ == "__main__":
    sys.exit(main())

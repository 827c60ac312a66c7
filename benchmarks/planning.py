"""How long a merge is planned before it begins, against the number of tensors; mergekit's planning beside it. Not a merge.

Models are headers alone, in files whose data is a hole: base and two fine-tunes of a mixture of experts (64 layers), merged by
ties with ramps over depth and a filter. Ours are measured in one process, step by step, and as the whole command
`interfuse run RECIPE OUT --dry-run`. mergekit knows no such network and plans Llamas with as many tensors; its time is that
of its planner and schedule, without its start of some 5 s, and is stopped after a minute. Seconds are CPU seconds, the
least of three (headers are opened once): other work on a machine changes them less than those of a clock.

    python benchmarks/planning.py [--mergekit mk/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.engine.opening import open_references
from interfuse.layout import Header, layout
from interfuse.plan import plan_merge, uncollected
from interfuse.recipe import check_recipes
from interfuse.recipe.pieces import references

OURS = (1_000, 8_000, 10_000, 100_000)
THEIRS = (1_000, 8_000)
REPEATS = 3
RECIPE = """
merge_method: ties
base_model: ./base
models:
  - {model: ./a, parameters: &own {weight: [0, 0.5, 1], density: [{filter: up_proj, value: [0.2, 0.8]}, {value: 0.5}]}}
  - {model: ./b, parameters: *own}
parameters: {lambda: 0.9}
"""

#: mergekit's planner and schedule for a config with as many layers; argument: the recipe; prints CPU seconds.
MERGEKIT = """
import sys, time, yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
options = MergeOptions(quiet=True, copy_tokenizer=False)
began = time.process_time()
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
architecture = get_architecture_info(config, options)
made = _model_out_config(config, architecture)
targets = MergePlanner(config, architecture, options=options, out_model_config=made).plan_to_disk(out_path="out")
Executor(targets=targets)
print(time.process_time() - began)
"""

_T = TypeVar("_T")


def experts(tensors: int) -> dict[str, TensorSpec]:
    """A header of about so many tensors."""
    layers, parts = 64, ("gate_proj", "up_proj", "down_proj")
    each = max(1, tensors // (layers * len(parts)))
    names = [f"model.layers.{i}.mlp.experts.{j}.{part}.weight" for i in range(layers) for j in range(each) for part in parts]
    return {"model.embed_tokens.weight": TensorSpec("BF16", (320, 64)), **dict.fromkeys(names, TensorSpec("BF16", (64, 64)))}


def llama(tensors: int) -> dict[str, TensorSpec]:
    """A Llama's header, of about so many tensors."""
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{i}.{part}.weight" for i in range(tensors // len(parts)) for part in parts]
    return dict.fromkeys(["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"], TensorSpec("BF16", (8,)))


def write(folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """A model's folder whose data is a hole."""
    folder.mkdir(parents=True)
    head, _ = encode_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))


def least(run: Callable[[], _T]) -> tuple[float, _T]:
    """The CPU seconds of the quickest of a few runs, and what it gave."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        result = run()
        times.append(time.process_time() - began)
    return min(times), result


def steps(folder: Path) -> dict[str, float]:
    """Our planning, step by step, and as a command."""
    (recipe,) = check_recipes(folder / "recipe.yaml")
    began = time.process_time()
    with uncollected():
        checkpoints = open_references(references(recipe))
    opening = time.process_time() - began
    headers = {reference: Header(checkpoint.specs) for reference, checkpoint in checkpoints.items()}
    laying, _ = least(lambda: layout(recipe, headers))
    planning, plan = least(lambda: plan_merge(recipe, checkpoints))
    command = [sys.executable, "-c", "from interfuse.cli import main; main()", "run", "recipe.yaml", "out", "--dry-run"]
    whole = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        whole.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"tensors": len(plan.outputs), "open": opening, "layout": laying, "plan": planning, "whole": min(whole)}


def mergekits(python: str, tensors: int, folder: Path) -> float | None:
    """mergekit's planning of Llamas with about so many tensors; None where it takes more than a minute."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 320, "num_hidden_layers": tensors // 9}
    for name in ("base", "a", "b"):
        write(folder / name, llama(tensors))
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [python, "-c", MERGEKIT, "recipe.yaml"]
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return float(done.stdout.strip().splitlines()[-1])


def report(rows: list[dict[str, float]], theirs: Mapping[int, float | None]) -> str:
    """The page."""
    lines = [
        "# Planning",
        "",
        "CPU seconds, from recipe to plan: the headers of base and two fine-tunes opened, the layout (which tensors meet,",
        "under which parameters), the plan (the layout and each tensor's numbers, and all that's wrong), and the whole",
        "command `interfuse run RECIPE OUT --dry-run`, a process that prints the plan. ties, with ramps and a filter.",
        "",
        "| tensors | headers | layout | plan | headers and plan | whole command | mergekit 0.1.5's planning |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for asked, row in zip(OURS, rows, strict=True):
        beside = "-"
        if asked in theirs:
            taken = theirs[asked]
            beside = "over 60" if taken is None else f"{taken:.2f}"
        numbers = [row["open"], row["layout"], row["plan"], row["open"] + row["plan"], row["whole"]]
        lines.append(f"| {row['tensors']:,.0f} | {' | '.join(f'{number:.2f}' for number in numbers)} | {beside} |")
    first, last = rows[OURS.index(10_000)], rows[OURS.index(100_000)]
    ratio = (last["plan"] / last["tensors"]) / (first["plan"] / first["tensors"])
    lines += [
        "",
        "- Asked for: 100,000 tensors planned in under 2 s, in time linear in the tensors. A tensor's plan costs",
        f"  {ratio:.2f} times as much among 100,000 as among 10,000.",
        "- Headers that are the same to the byte, as fine-tunes' are, are parsed once. No byte of a tensor is read: the",
        "  files' data are holes.",
        "- mergekit's is its planner and schedule alone, for Llamas of about as many tensors; its start isn't counted.",
        f"- {len(os.sched_getaffinity(0))} cores ({_processor()}), Python {platform.python_version()}.",
        "- `python benchmarks/planning.py --mergekit mk/bin/python`",
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure all, and write the page beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit 0.1.5")
    python = parser.parse_args().mergekit
    rows, theirs = [], {}
    with tempfile.TemporaryDirectory() as place:
        for tensors in OURS:
            folder = Path(place, str(tensors))
            for name in ("base", "a", "b"):
                write(folder / name, experts(tensors))
            (folder / "recipe.yaml").write_text(RECIPE)
            rows.append(steps(folder))
            print(rows[-1])
        for tensors in THEIRS if python else ():
            theirs[tensors] = mergekits(str(Path(python).absolute()), tensors, Path(place, f"mergekit-{tensors}"))
            print(tensors, theirs[tensors])
    Path(__file__).with_suffix(".md").write_text(report(rows, theirs))


if __name__ == "__main__":
    main()

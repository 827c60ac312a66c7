"""Fine-tunes MiniLM to eight tasks.

python -m benchmarks.text_experts --data DATA --cache CACHE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.text_experts import experts
from benchmarks.text_experts.texts import TASKS, Sizes, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the sets of texts")
    parser.add_argument("--cache", type=Path, required=True, help="where experts and results are kept; 1 GB")
    options = parser.parse_args()
    words = experts.tokenizer()
    for name in TASKS:
        task = read(options.data, name, words, Sizes())
        experts.expert(options.cache, name, task)


if __name__ == "__main__":
    main()

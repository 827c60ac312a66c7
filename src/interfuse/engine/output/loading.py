"""Folders loaded by transformers without their data: what is missing, unexpected, or of another shape, as it says itself.

Run as a process of its own (`proof`), since a merge loads no torch: `python -m interfuse.engine.output.loading FOLDER...`
prints a JSON list. A folder holds config.json and the header of model.safetensors over a hole: tensors are on torch's `meta`
device, so that neither memory nor time grow with the model. No code from a folder runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Why it can't be told.
CANT = "can't"


def main(folders: Sequence[str]) -> None:
    """Print what loading each folder says."""
    print(json.dumps([load(Path(folder)) for folder in folders]))  # noqa: T201 (it's what the other process reads)


def load(folder: Path) -> dict[str, Any]:
    """The names that are `missing`, `unexpected`, `mismatched`; or the `error`, or why it `can't` be told."""
    import transformers

    transformers.logging.set_verbosity_error()
    version = f"transformers {transformers.__version__}"
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kind = getattr(transformers, name, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        return {"by": version, CANT: f"{version} has no {name}"}
    try:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
        _, found = kind.from_pretrained(folder, device_map="meta", **options)
    except ImportError as error:  # accelerate, which places tensors
        return {"by": version, CANT: _first(error)}
    except Exception as error:  # a config can make a model fail in any way
        return {"by": version, "error": f"{type(error).__name__}: {_first(error)}"}
    mismatched = [item[0] if isinstance(item, (tuple, list)) else item for item in found["mismatched_keys"]]
    parts = {"missing": found["missing_keys"], "unexpected": found["unexpected_keys"], "mismatched": mismatched}
    return {"by": version, **{what: sorted(names) for what, names in parts.items()}}


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


if __name__ == "__main__":
    main(sys.argv[1:])

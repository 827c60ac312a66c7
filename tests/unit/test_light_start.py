"""Starting is cheap: what `import interfuse`, `--help` and merges of files load, seen from a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "numpy",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "transformers",
    "datasets",
    "pandas",
    "matplotlib",
    "PIL",
    "jinja2",
    "safetensors",
)


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` has run."""
    script = f"import sys, json\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    script += "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import interfuse; dir(interfuse)",
        "from interfuse.cli import main; main(['--help'])",
        "from interfuse.cli import main; main(['--version'])",
        "from interfuse.cli import main; main(['run', '--help'])",
        "from interfuse.cli import main; main(['compare', '--help'])",
    ],
)
def test_starting_loads_nothing_heavy(code: str) -> None:
    assert loaded(code).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "code",
    ["import interfuse.recipe", "import interfuse.pipeline", "from interfuse import registry; registry.methods('weights')"],
)
def test_recipes_and_merges_load_no_torch(code: str) -> None:
    assert loaded(code).isdisjoint({"torch", "lightning", "transformers", "matplotlib", "PIL"})


def test_the_probe_sees_what_is_loaded() -> None:
    assert "torch" in loaded("import interfuse; interfuse.fit")

"""Other packages' methods: found by entry points of installed distributions, late, and harmless where they are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interfuse import registry
from interfuse.errors import OptionError

LEAN = '''
from interfuse.methods.forms import Combination
from interfuse.registry import register

@register("lean", "weights", form="coefficients", paper="https://example.org/lean")
def lean(weights, *, share: float = 0.5):
    """The first model, and the mean of the others."""
    return Combination(0.0, (share, *[(1 - share) / (len(weights) - 1)] * (len(weights) - 1)), 1.0)
'''


def install(folder: Path, name: str, code: str, entry: str | None = None) -> None:
    """A distribution as pip leaves it: a module, and a folder that describes it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[interfuse.methods]\n{name} = {entry or name}\n")


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh process that sees what is installed in `folder`."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_a_package_s_method_merges_like_ours(tmp_path: Path) -> None:
    install(tmp_path, "lean_methods", LEAN)
    for i in range(2):
        save_file({"t": np.full(3, float(i), np.float32)}, tmp_path / f"{i}.safetensors")
    models = [{"model": str(tmp_path / f"{i}.safetensors")} for i in range(2)]
    recipe = {"merge_method": "lean", "models": models, "parameters": {"share": 0.25}}
    done = run(tmp_path, f"import interfuse; interfuse.run({recipe!r}, {str(tmp_path / 'out')!r})")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")["t"].tolist() == [0.75] * 3
    assert json.loads((tmp_path / "out" / "interfuse.json").read_text())["papers"] == ["https://example.org/lean"]


def test_it_is_listed_and_its_options_are_checked(tmp_path: Path) -> None:
    install(tmp_path, "lean_methods", LEAN)
    done = run(tmp_path, "from interfuse.cli import main; main(['methods', 'lean', '--json'])")
    assert [method["name"] for method in json.loads(done.stdout)] == ["lean"]
    done = run(tmp_path, "from interfuse.registry import find; find('lean', 'weights').check({'shar': 1})")
    assert "parameters.shar: unknown option; did you mean 'share'?" in done.stderr


def test_a_package_is_imported_only_for_a_name_that_isn_t_ours(tmp_path: Path) -> None:
    install(tmp_path, "lean_methods", LEAN)
    code = "from interfuse.registry import find; import sys\nfind('ties', 'weights'); print('lean_methods' in sys.modules)\n"
    code += (
        "print('importlib.metadata' in sys.modules and False); find('lean', 'weights'); print('lean_methods' in sys.modules)"
    )
    assert run(tmp_path, code).stdout.split() == ["False", "False", "True"]


def test_one_that_is_broken_is_said_and_left_out(tmp_path: Path) -> None:
    install(tmp_path, "lean_methods", LEAN)
    install(tmp_path, "bad_methods", "import no_such_module")
    install(tmp_path, "rude_methods", LEAN.replace('"lean"', '"ties"'))
    install(tmp_path, "gone_methods", "", entry="gone_methods:nothing")
    code = "import warnings; warnings.simplefilter('always'); from interfuse import registry\n"
    done = run(tmp_path, code + "print([m.name for m in registry.methods('weights')][-1])")
    assert done.stdout.strip() == "lean"
    for said in (
        "entry point 'bad_methods': 'bad_methods' of bad_methods can't be loaded (ModuleNotFoundError",
        "entry point 'gone_methods'",
        "register('ties', 'weights'): the name is taken",
    ):
        assert said in done.stderr
    done = run(tmp_path, code + "registry.find('leann', 'weights')")
    assert "no weights method is named 'leann'; did you mean 'lean'" in done.stderr
    assert "can't be loaded (ModuleNotFoundError: No module named 'no_such_module')" in done.stderr
    assert "Warning" not in done.stderr


def test_a_weight_method_must_say_its_form() -> None:
    with pytest.raises(OptionError, match=r"register\('mine', 'weights'\): form is 'blokcs'; did you mean 'blocks'\?"):
        registry.register("mine", "weights", form="blokcs")(lambda: None)
    assert "mine" not in [method.name for method in registry.methods("weights")]


def test_the_example_in_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    done = run(
        Path(), code + "\nfrom interfuse.registry import find; print(find('lean', 'weights').make([1, 1, 1], share=0.5))"
    )
    assert done.stdout.strip() == "Combination(base=0.0, models=(0.5, 0.25, 0.25), total=1.0)", done.stderr

"""The command line: exit statuses, what goes to which stream, JSON, and every command over a fake or a small real run."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interfuse import __version__
from interfuse.cli import main
from interfuse.errors import MissingExtra


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out, err


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that merges two small files."""
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file({"w": np.full((2, 2), float(i), np.float32)}, tmp_path / name / "model.safetensors")
    recipe = tmp_path / "merge.yaml"
    recipe.write_text("merge_method: linear\nmodels: [./a, ./b]\n")
    monkeypatch.chdir(tmp_path)
    return recipe


Capture = pytest.CaptureFixture[str]


def test_run_writes_a_folder_and_says_so(capsys: Capture, merge: Path) -> None:
    code, out, err = call(capsys, "run", str(merge), "out")
    assert (code, err) == (0, "")
    assert out.startswith("out: linear merge of a and b, in ")
    assert (merge.parent / "out" / "model.safetensors").exists()
    code, out, err = call(capsys, "run", str(merge), "out")
    assert (code, out) == (2, "")
    assert err.startswith("out: is there already; ")
    assert call(capsys, "run", str(merge), "out", "--overwrite")[0] == 0


def test_json_is_one_document(capsys: Capture, merge: Path) -> None:
    code, out, _ = call(capsys, "run", str(merge), "out", "--json", "--seed", "3")
    record = json.loads(out)
    assert (code, record["form"], record["models"], record["seed"]) == (0, "merge", ["a", "b"], 3)
    code, out, _ = call(capsys, "run", str(merge), "other", "--dry-run", "--json")
    assert json.loads(out)["out"] is None
    assert not (merge.parent / "other").exists()
    assert "nothing was written" in call(capsys, "run", str(merge), "other", "--dry-run")[1]


def test_what_others_print_stays_out_of_the_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any, **__: Any) -> Any:
        print("a library talks")  # noqa: T201
        return types.SimpleNamespace(to_dict=lambda: {"a": 1})

    monkeypatch.setattr("interfuse.pipeline.run", fake)
    code, out, err = call(capsys, "run", "r.yaml", "o", "--json")
    assert (code, json.loads(out), err) == (0, {"a": 1}, "a library talks\n")


def test_every_problem_is_a_line_on_standard_error(capsys: Capture, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("fusion: atention\nmodels: ['python:m:f', ./gone]\ndata: {train: no.npz}\nsead: 1\n")
    code, out, err = call(capsys, "run", str(recipe), str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        "sead",
        "fusion",
        "data.train",
        "models[0].model",
        "models[1].model",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "r.yaml", "out", "--threads", "0"],
        ["run", "r.yaml", "out", "--bogus"],
        ["nosuch"],
        ["compare", "out"],
        ["run", "none.yaml", "out"],
        ["methods", "tiez"],
        ["methods", "--level", "weight"],
    ],
)
def test_the_users_mistakes_exit_with_2(capsys: Capture, arguments: list[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
        (PermissionError(13, "Permission denied", "a/x"), 2, "a/x: can't be read or written: Permission denied\n"),
        (RuntimeError("boom\nmore"), 1, "RuntimeError: boom (more with interfuse --debug ...)\n"),
        (MissingExtra("lightning isn't installed: pip install 'interfuse[train]'"), 2, "pip install 'interfuse[train]'"),
    ],
)
def test_other_ends(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("interfuse.pipeline.run", fail)
    code, out, err = call(capsys, "run", "r.yaml", "out")
    assert (code, out) == (status, "")
    assert said in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("interfuse.pipeline.run", fail)
    code, _, err = call(capsys, "--debug", "run", "r.yaml", "out")
    assert code == 1
    assert "Traceback" in err


def test_options_reach_the_run(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(recipe: Path, out: Path, **options: Any) -> Any:
        seen.update(options, recipe=recipe, out=out)
        return types.SimpleNamespace(text=lambda width: "done")

    monkeypatch.setattr("interfuse.pipeline.run", fake)
    arguments = ["--threads", "2", "--device", "cpu", "--seed", "4", "--overwrite", "--trust-code", "--dry-run"]
    arguments += ["--resume", "--allow-nonfinite", "--mergekit-compat"]
    assert call(capsys, "run", "r.yaml", "o", *arguments)[:2] == (0, "done\n")
    assert seen == {
        "recipe": Path("r.yaml"),
        "out": Path("o"),
        "threads": 2,
        "device": "cpu",
        "seed": 4,
        "overwrite": True,
        "trust_code": True,
        "dry_run": True,
        "resume": True,
        "allow_nonfinite": True,
        "mergekit_compat": True,
    }


def test_methods_lists_every_method_with_level_needs_options_and_paper(capsys: Capture) -> None:
    from interfuse.registry import methods

    code, out, _ = call(capsys, "methods", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [(m["name"], m["level"]) for m in listed] == [(m.name, m.level) for m in methods()]
    attention = next(m for m in listed if m["name"] == "attention")
    heads = attention["options"]["heads"]
    assert (heads["default"], heads["minimum"], heads["type"]) == (1, 1, "integer")
    plain = call(capsys, "methods")[1]
    assert all(f"\n  {m.name} " in plain for m in methods())
    assert all("description" in option for m in listed for option in m["options"].values())
    weights = json.loads(call(capsys, "methods", "--level", "weights", "--json")[1])
    assert {m["level"] for m in weights} == {"weights"}
    one = call(capsys, "methods", "attention")[1]
    assert "heads: integer, at least 1, default 1" in one
    assert "dim: integer, at least 1\n" in one
    assert "in a recipe `fusion: attention`" in one
    assert "arXiv:1409.0473" in one


def test_schema_is_json_with_the_recipes_keys(capsys: Capture) -> None:
    code, out, _ = call(capsys, "schema")
    assert code == 0
    assert {"fusion", "merge_method", "models", "data"} <= set(json.loads(out)["properties"])


def test_version(capsys: Capture) -> None:
    assert call(capsys, "--version")[:2] == (0, f"interfuse {__version__}\n")


def test_compare_prints_and_writes_its_table(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "clinets.py").write_text(
        "from torch import nn\n\ndef a():\n    return nn.Sequential(nn.Linear(3, 2))\n\n\ndef b():\n    return a()\n"
    )
    np.savez(tmp_path / "t.npz", x=np.random.default_rng(0).normal(size=(20, 3)), y=np.arange(20) % 2)
    monkeypatch.chdir(tmp_path)
    models = ["python:clinets:a", "python:clinets:b"]
    written = ["--markdown", "new/t.md", "--html", "t.html"]
    code, out, _ = call(capsys, "compare", *models, "--data", "t.npz", "--trust-code", *written)
    assert code == 0
    assert "Accuracy" in out
    assert (tmp_path / "new/t.md").read_text().startswith("| Model | Accuracy")
    assert "<html" in (tmp_path / "t.html").read_text()
    code, out, _ = call(capsys, "compare", *models, "--data", "t.npz", "--trust-code", "--json", "--metric", "log_loss")
    assert json.loads(out)["metric"] == "log_loss"
    code, _, err = call(capsys, "compare", *models, "--data", "t.npz", "--html", ".", "--markdown", ".")
    assert (code, [line.partition(":")[0] for line in err.splitlines()]) == (2, ["--html", "--markdown"])
    code, _, err = call(capsys, "compare", *models, "--data", "t.npz")
    assert code == 2
    assert "trust" in err
    sys.modules.pop("clinets", None)


def test_demo_is_handed_its_folder(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    twin = types.ModuleType("interfuse.demo.main")
    twin.demo = lambda out, overwrite: seen.append((out, overwrite))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "interfuse.demo", types.ModuleType("interfuse.demo"))
    monkeypatch.setitem(sys.modules, "interfuse.demo.main", twin)
    assert call(capsys, "demo", "--out", "d", "--overwrite")[0] == 0
    assert seen == [(Path("d"), True)]


def test_the_command_itself_ends_with_the_status(merge: Path) -> None:
    code = "from interfuse.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "run", "none.yaml", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "none.yaml: the recipe can't be read (No such file or directory)\n"

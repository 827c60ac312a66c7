"""The documentation can't go stale: generated parts are up to date, every command and method is in it, recipes are valid."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import interfuse
from interfuse.errors import Problem, RecipeError
from interfuse.mixture.recipe import load_mixture
from interfuse.pipeline import check
from interfuse.recipe.load import read_yaml
from interfuse.registry import methods

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(language: str) -> list[Any]:
    """Every block of code in a language, under the name of its page and line."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match.group(1), id=f"{path.name}:{line}"))
    return found


@pytest.mark.parametrize("name", ["methods.md", "recipes.md", "commands.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    expected = generator().page(name)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run python docs/generate.py"


def test_every_method_and_its_options_are_documented() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method in methods():
        assert f"| `{method.name}` | {method.summary}" in page.replace("\\|", "|")
        for name, field in method.options.model_fields.items():
            assert f"| `{field.alias or name}` |" in page


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = re.findall(r"^@app\.command\(\)\ndef (\w+)", (ROOT / "src/interfuse/cli.py").read_text(), re.MULTILINE)
    assert commands
    assert re.findall(r"^## `interfuse ([\w-]+)`", page, re.MULTILINE) == [name.replace("_", "-") for name in commands]


def problems(recipe: dict[str, Any]) -> tuple[Problem, ...]:
    try:
        check(recipe, trust_code=True)
    except RecipeError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_in_the_documentation_lack_nothing_but_files(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interfuse.recipe.check.is_adapter", lambda path: Path(path).name.startswith("adapter"))
    recipe = read_yaml(text)
    if "experts" in recipe:
        load_mixture(recipe)
        return
    if not recipe.keys() & {"models", "slices", "modules"}:
        recipe["models"] = ["python:mynet:build"]  # a page about one section shows that section
    absent = ("doesn't exist", "nor in the hub's cache", "no adapter_config.json")
    assert [str(p) for p in problems(recipe) if not any(words in p.wrong for words in absent)] == []


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_documentation_names_what_there_is(text: str) -> None:
    tree = ast.parse(text)
    used = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("itf", "interfuse")
    ]
    assert [name for name in used if name not in interfuse.__all__] == []


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_what_the_options_say_of_defaults_is_so() -> None:

    from interfuse.modules.fused import ModelFusion

    given = inspect.signature(ModelFusion).parameters
    assert (given["pool"].default, given["residual"].default, given["dim"].default) == ("mean", True, None)


def test_the_readme_s_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ten lines, with small networks and random images in place of the reader's."""
    block = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]

    def resnet() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def vit() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    images = torch.rand(40, 1, 8, 8)
    data = (images, torch.arange(40) % 10)
    names: dict[str, Any] = {
        "resnet": resnet(),
        "fresh_resnet": resnet(),
        "finetune_a": resnet(),
        "finetune_b": resnet(),
        "vit": vit(),
        "fresh_vit": vit(),
        "images": images,
        "train": data,
        "validation": data,
        "test": data,
    }
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "report.html").exists()
    assert names["weights"].shape == (40, 2)
    assert names["merged"](images).shape == names["logits"].shape == (40, 10)
    assert [row.name for row in names["table"].rows] == ["resnet", "vit", "fusion"]

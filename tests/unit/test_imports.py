"""The house: imports point one way, everything public says what it is, files and functions stay short, and the public
names are those below. Read off the source; nothing is imported but the public names."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import interfuse

SOURCE = Path(interfuse.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

#: A package or module may import those on its line and above, also inside functions. `mixture` stands on the merge engine,
#: which copies its tensors, and below `pipeline`, which verifies and loads what it wrote.
ORDER = """
errors extras registry progress units
checkpoints
methods
models
modules
recipe
data
layout
plan
engine
mixture
inference
evaluation
ensemble
training
transfer
merging
report
saving
hub
exporting
pipeline
demo
cli
"""
#: Ships for other people's tests, and is imported by nothing.
APART = ("testing",)

#: Modules that load no torch when they are imported, so that the command line and merges of files start fast.
LIGHT = (
    "errors",
    "extras",
    "registry",
    "progress",
    "cli",
    "recipe",
    "checkpoints",
    "methods",
    "layout",
    "plan",
    "engine",
    "mixture",
    "merging",
    "__init__",
)
LIGHT_EXCEPT = ("checkpoints/tensors.py",)
HEAVY = ("torch", "lightning", "torchmetrics", "transformers", "datasets", "matplotlib", "jinja2", "PIL", "peft", "mlxtend")

PUBLIC = [
    "CheckpointError",
    "CrossStitch",
    "DataError",
    "Ensemble",
    "InterfuseError",
    "MissingExtra",
    "ModelError",
    "ModelFusion",
    "OptionError",
    "RecipeError",
    "Stage",
    "Stages",
    "UserError",
    "WeightSchedule",
    "build",
    "calibrate",
    "compare",
    "distill",
    "export",
    "extract_lora",
    "fit",
    "fit_tasks",
    "greedy_soup",
    "grow",
    "learn_coefficients",
    "load",
    "load_data",
    "load_model",
    "load_run",
    "merge",
    "moe",
    "predict",
    "push_to_hub",
    "register",
    "reset_statistics",
    "run",
    "save",
    "share_trunk",
    "similarity",
    "stitch",
    "task_model",
    "tie",
    "transplant",
    "trunk_curve",
    "unfreezing",
    "verify",
    "write_report",
]

RANK = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}


def label(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def part(path: Path) -> str:
    """The package or module right below `interfuse` that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a tree, `a.b` and, for `from a import b`, `a.b` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not what is in functions or for type checkers alone."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {part(path) for path in FILES} - {"__init__"} - set(APART) == set(RANK)


@pytest.mark.parametrize("path", [p for p in FILES if part(p) not in ("__init__", *APART)], ids=label)
def test_imports_point_one_way(path: Path) -> None:
    inside = [name.split(".")[1] for name in imported(ast.parse(path.read_text())) if name.startswith("interfuse.")]
    wrong = [name for name in inside if name in APART or (name in RANK and RANK[name] > RANK[part(path)])]
    assert not wrong, f"{label(path)} imports {wrong}, which stand above it"


def test_no_module_needs_itself() -> None:
    modules = {f"interfuse.{label(path).removesuffix('.py').replace('/', '.')}": path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items() if name != "interfuse.__init__"}
    needs = {}
    for module, path in modules.items():
        names = [name if name in modules else name.rpartition(".")[0] for name in imported(ast.parse(path.read_text()))]
        needs[module] = {name for name in names if name in modules} - {module}
    assert len(needs["interfuse.engine.outputs"]) > 3  # names are found at all
    TopologicalSorter(needs).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in LIGHT and label(p) not in LIGHT_EXCEPT], ids=label)
def test_light_modules_load_nothing_heavy(path: Path) -> None:
    names = [name.split(".")[0] for node in at_import(ast.parse(path.read_text())) for name in imported_here(node)]
    assert not [name for name in names if name in HEAVY]


@pytest.mark.parametrize("path", FILES, ids=label)
def test_optional_libraries_load_where_they_are_used(path: Path) -> None:
    if label(path) == "training/loop.py":
        return  # imported inside `fit`, as its base class is Lightning's
    names = [name.split(".")[0] for node in at_import(ast.parse(path.read_text())) for name in imported_here(node)]
    assert not [name for name in names if name in HEAVY and name != "torch"]


def imported_here(node: ast.stmt) -> Iterator[str]:
    """What one statement itself imports."""
    return imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else iter(())


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public functions and classes, and public methods of public classes, by dotted name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", FILES, ids=label)
def test_everything_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{label(path)} doesn't say what it is"
    silent = [name for name, node in definitions(tree) if not ast.get_docstring(node)]
    assert not silent, f"{label(path)}: {silent} have no docstring"


def lines_of(function: ast.FunctionDef) -> int:
    """How many lines a function's body has, its docstring aside."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {node.name: n for node in found if (n := lines_of(node)) > 45}  # about 40
    assert not long, f"{label(path)}: {long} lines"


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert interfuse.__all__ == PUBLIC
    homes = {name: getattr(importlib.import_module(f"interfuse.{home}"), name) for name, home in interfuse._HOME.items()}
    assert {name: getattr(interfuse, name) for name in PUBLIC} == homes
    assert set(dir(interfuse)) == {*PUBLIC, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'fuse'"):
        _ = interfuse.fuse


def test_type_checkers_see_the_same_public_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = [alias.asname for node in ast.walk(guarded[0]) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(filter(None, names)) == PUBLIC

"""Recipes whose models are all LoRA adapters, without a base: an adapter out of `interfuse run`, by every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import interfuse
from interfuse.checkpoints.adapters.pairs import open_adapter
from interfuse.cli import main
from interfuse.errors import CheckpointError, ModelError, RecipeError
from interfuse.registry import find

Capture = pytest.CaptureFixture[str]
SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (10, 12)}


def call(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    code = ended.value.code
    return (0 if code is None else int(code)), out, err


def adapter(folder: Path, seed: int, rank: int, alpha: float) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = random.normal(size=shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters: of ranks 2, 3 and 2."""
    for seed, (name, rank) in enumerate((("a", 2), ("b", 3), ("c", 2))):
        adapter(tmp_path / name, seed, rank, 4.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(folder: Path, module: str) -> np.ndarray:
    """What an adapter adds to a module's weight, in float64."""
    found = open_adapter(folder)
    pair = found.pairs[module]
    up, down = (found.weights.read(name).astype(np.float64) for name in (pair.up, pair.down))
    product: np.ndarray = pair.scale * (up @ down)
    return product


def rank_of(folder: Path) -> int:
    found = open_adapter(folder)
    return max(found.rank(pair) for pair in found.pairs.values())


def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of that rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    product: np.ndarray = (left[:, :rank] * values[:rank]) @ right[:rank]
    return product


def run(work: Path, capsys: Capture, content: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
    (work / "r.yaml").write_text(yaml.safe_dump(content))
    return call(capsys, "run", str(work / "r.yaml"), str(work / "out"), "--overwrite", *arguments)


MODELS = [
    {"model": "./a", "parameters": {"weight": 1.0}},
    {"model": "./b", "parameters": {"weight": 2.0}},
    {"model": "./c", "parameters": {"weight": 0.5}},
]
WEIGHTS = (1.0, 2.0, 0.5)


def test_linear_is_the_mean_of_the_changes_exactly(work: Path, capsys: Capture) -> None:
    code, out, err = run(work, capsys, {"merge_method": "linear", "models": MODELS})
    assert (code, err) == (0, "")
    assert out.startswith(f"{work / 'out'}: linear merge of a, b and c, in ")
    for module in SHAPES:
        wanted = sum(w * change(work / name, module) for w, name in zip(WEIGHTS, "abc", strict=True)) / 3.5
        np.testing.assert_allclose(change(work / "out", module), wanted, atol=1e-5)
    assert rank_of(work / "out") == 7


@pytest.mark.parametrize("rank", [None, 2, 5])
def test_svd_is_its_nearest_of_a_rank(work: Path, capsys: Capture, rank: int | None) -> None:
    parameters = {"normalize": False} | ({} if rank is None else {"rank": rank})
    assert run(work, capsys, {"merge_method": "svd", "models": MODELS, "parameters": parameters})[0] == 0
    for module in SHAPES:
        wanted = sum(w * change(work / name, module) for w, name in zip(WEIGHTS, "abc", strict=True))
        assert isinstance(wanted, np.ndarray)
        np.testing.assert_allclose(change(work / "out", module), cut(wanted, rank or 3), atol=1e-5)


def elected(parts: list[np.ndarray], normalize: bool) -> np.ndarray:
    """TIES' second and third step, from the paper: the weighted entries whose sign is that of their sum."""
    total = np.sign(sum(w * part for w, part in zip(WEIGHTS, parts, strict=True)))
    agree = [np.sign(part) == total for part in parts]
    merged = sum(w * part * good for w, part, good in zip(WEIGHTS, parts, agree, strict=True))
    share = sum(w * (good & (part != 0)) for w, part, good in zip(WEIGHTS, parts, agree, strict=True))
    result: np.ndarray = merged / np.where(share == 0, 1, share) if normalize else np.asarray(merged)
    return result


def trimmed(matrix: np.ndarray, density: float) -> np.ndarray:
    keep = int(density * matrix.size)
    least = np.sort(np.abs(matrix).reshape(-1))[-keep]
    result: np.ndarray = np.where(np.abs(matrix) >= least, matrix, 0.0)
    return result


def test_ties_is_that_of_the_changes_cut_to_the_rank(work: Path, capsys: Capture) -> None:
    content = {"merge_method": "ties", "models": MODELS, "parameters": {"density": 0.5, "lambda": 1.5, "rank": 4}}
    assert run(work, capsys, content)[0] == 0
    for module in SHAPES:
        parts = [trimmed(change(work / name, module), 0.5) for name in "abc"]
        np.testing.assert_allclose(change(work / "out", module), cut(1.5 * elected(parts, True), 4), atol=1e-4)
    assert rank_of(work / "out") == 4


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_1_has_no_chance_in_it(work: Path, capsys: Capture, method: str) -> None:
    content = {"merge_method": method, "models": MODELS, "parameters": {"rank": 8}}
    assert run(work, capsys, content)[0] == 0
    for module in SHAPES:
        parts = [change(work / name, module) for name in "abc"]
        summed = sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))
        wanted = elected(parts, False) if method == "dare_ties" else np.asarray(summed)
        np.testing.assert_allclose(change(work / "out", module), cut(wanted, 8), atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "knots"])
def test_chance_goes_by_the_recipes_seed_and_differs_between_modules(work: Path, capsys: Capture, method: str) -> None:
    parameters = {"density": 0.5} | ({"combine": "dare_ties"} if method == "knots" else {})
    content = {"merge_method": method, "models": MODELS, "parameters": parameters}
    found = []
    for seed in ("1", "1", "2"):
        assert run(work, capsys, content, "--seed", seed)[0] == 0
        found.append((work / "out" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_density_for_each_model(work: Path, capsys: Capture) -> None:
    models: list[dict[str, Any]] = [{"model": f"./{name}"} for name in "abc"]
    for entry, weight, density in zip(models, WEIGHTS, (1, 0.5, 0.1), strict=True):
        entry["parameters"] = {"weight": weight, "density": density}
    assert run(work, capsys, {"merge_method": "ties", "models": models, "parameters": {"rank": 10}})[0] == 0
    parts = [trimmed(change(work / name, "layers.0.q"), d) for name, d in zip("abc", (1, 0.5, 0.1), strict=True)]
    np.testing.assert_allclose(change(work / "out", "layers.0.q"), cut(elected(parts, True), 10), atol=1e-4)


def test_what_lies_in_the_folder(work: Path, capsys: Capture) -> None:
    code, out, _ = run(work, capsys, {"merge_method": "knots", "models": MODELS, "dtype": "bfloat16"}, "--json", "--seed", "3")
    record = json.loads(out)
    assert (code, record["method"], record["models"]) == (0, "knots", ["a", "b", "c"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "interfuse.json", "recipe.yaml"} == {
        item.name for item in (work / "out").iterdir()
    }
    about = json.loads((work / "out" / "interfuse.json").read_text())
    assert (about["kind"], about["options"]["seed"], about["weights"]) == ("adapter merge", 3, list(WEIGHTS))
    assert "PeftModel.from_pretrained" in (work / "out" / "README.md").read_text()
    header = (work / "out" / "adapter_model.safetensors").read_bytes()[:400]
    assert b'"BF16"' in header
    assert interfuse.verify(work / "out", again=True).good
    interfuse.run(work / "out" / "recipe.yaml", work / "second")
    assert load_file.__name__ == "load_file"
    one, two = ((work / name / "adapter_model.safetensors").read_bytes() for name in ("out", "second"))
    assert one == two
    path = work / "out" / "recipe.yaml"
    path.write_text(path.read_text().replace("weight: 2.0", "weight: 3.0"))
    assert [check.name for check in interfuse.verify(work / "out").checks if not check.good] == ["recipe.yaml"]
    with pytest.raises(ModelError, match="holds a LoRA adapter, not a network"):
        interfuse.load_run(work / "out")


def test_a_dry_run_writes_nothing(work: Path, capsys: Capture) -> None:
    code, out, _ = run(work, capsys, {"merge_method": "ties", "models": MODELS}, "--dry-run")
    assert code == 0
    assert out.startswith("ties of adapters, in 2 modules\n")
    assert out.endswith("nothing was written (dry run)\n")
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "tyes"}, "merge_method: no adapters method is named 'tyes'; did you mean 'ties'"),
        ({"parameters": {"densty": 0.5}}, "parameters.densty: ties has no such option; did you mean 'density'"),
        ({"parameters": {"density": 2}}, "parameters.density: got 2; at most 1"),
        ({"parameters": {"density": [0, 1]}}, r"parameters.density: got \[0, 1\]; one value for all modules"),
        ({"tokenizer_source": "union"}, "tokenizer_source: means nothing where adapters are merged"),
        ({"dtype": "bf17"}, "dtype: got 'bf17'"),
        ({"models": ["a", "./gone"]}, "gone doesn't exist"),
    ],
)
def test_mistakes(work: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, CheckpointError), match=message):
        interfuse.run({"merge_method": "ties", "models": ["a", "b"]} | change, "out")
    assert not (work / "out").exists()


def test_adapters_of_other_bases_and_stages_of_them_are_refused(work: Path) -> None:
    tensors = load_file(work / "b" / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "blocks.0"): value for name, value in tensors.items()},
        work / "b" / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"changes none of .*a's modules"):
        interfuse.run({"merge_method": "ties", "models": ["a", "b"]}, "out")
    stages = [{"name": "x", "merge_method": "linear", "models": ["a", "c"]}, {"merge_method": "linear", "models": ["x", "x"]}]
    with pytest.raises(RecipeError, match=r"documents\[0\].models: are adapters without a base"):
        interfuse.run(stages, "out")


def test_each_method_of_adapters_has_its_options_and_refuses_others(work: Path, capsys: Capture) -> None:
    """What the methods by entries share is written once; still each takes what it uses, with its own defaults."""
    shared = {"density": 1.0, "lambda_": 1.0, "rank": None}
    wanted = {
        "ties": {**shared, "normalize": True},
        "dare_linear": {**shared, "normalize": False, "seed": 0},
        "dare_ties": {**shared, "normalize": False, "seed": 0},
    }
    for name, options in wanted.items():
        method = find(name, "adapters")
        assert method.check({}) == options
        assert method.summary.endswith("as near as a change of `rank` can be.")
    code, _, err = run(work, capsys, {"merge_method": "ties", "models": MODELS, "parameters": {"seed": 1}})
    assert (code, err) == (2, "parameters.seed: ties has no such option; allowed: density, normalize, lambda, rank, weight\n")


def test_what_is_wrong_with_the_adapters_is_told_beside_the_options(work: Path, capsys: Capture) -> None:
    factors = {"A": np.ones((1, 2), np.float32), "B": np.ones((2, 1), np.float32)}
    other = {f"base_model.model.other.lora_{part}.weight": factor for part, factor in factors.items()}
    save_file(other, work / "c" / "adapter_model.safetensors")
    (work / "c" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    code, _, err = run(work, capsys, {"merge_method": "ties", "models": MODELS, "parameters": {"seed": 1}})
    assert code == 2
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["parameters.seed", str(work / "c")]
    assert "changes none of" in err

"""TIES trimmed over the whole model: against a slow float64 reference that joins all tensors, and the same bytes always."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import interfuse as itf
from interfuse.engine import global_trim
from interfuse.engine.local import execute

Tensors = dict[str, np.ndarray]
SHAPES = {"b": (7, 9), "a": (40,), "none": (0,), "one": (), "c": (3, 2, 2, 5)}


def tensors(
    seed: int, models: int, *, places: int, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> tuple[Tensors, list[Tensors]]:
    """A base and models on a grid: few places give many equal magnitudes; each tensor has a size of its own."""
    random = np.random.default_rng(seed)
    sizes = {name: 2.0 ** random.integers(-1, 2) for name in shapes}
    base = {name: random.integers(-64, 65, shape) / 64 for name, shape in shapes.items()}
    drawn = [
        {name: base[name] + sizes[name] * random.integers(-places, places + 1, shape) / 256 for name, shape in shapes.items()}
        for _ in range(models)
    ]
    kept = [{name: np.array(value, np.float32) for name, value in one.items()} for one in (base, *drawn)]
    return kept[0], kept[1:]


def reference(
    base: Tensors, models: list[Tensors], weights: list[float], density: list[float | dict[str, float]], scale: float = 1.0
) -> Tensors:
    """Sort all entries of a model that have one density, larger ones first and then earlier ones; keep the first ones."""
    kept: list[dict[str, np.ndarray]] = []
    for model, share in zip(models, density, strict=True):
        of = share if isinstance(share, dict) else dict.fromkeys(base, share)
        deltas = {name: (model[name].astype(np.float64) - base[name]).reshape(-1) for name in base}
        masks = {name: np.zeros(delta.size, bool) for name, delta in deltas.items()}
        for value in dict.fromkeys(of.values()):
            entries = [
                (-abs(x), order, i, name)
                for order, name in enumerate(base)
                if of[name] == value
                for i, x in enumerate(deltas[name])
            ]
            count = min(len(entries), max(1, int(value * len(entries)))) if value > 0 else 0
            for _, _, i, name in sorted(entries)[:count]:
                masks[name][i] = True
        kept.append({name: np.where(masks[name], deltas[name], 0.0) for name in base})
    result = {}
    for name in base:
        d = np.stack([one[name] for one in kept]) * np.array(weights)[:, None]
        sign = np.where(d.sum(0) >= 0, 1, -1)
        agrees = d * sign > 0
        whole = (agrees * np.array(weights)[:, None]).sum(0)
        merged = (d * agrees).sum(0) / np.where(whole == 0, 1, whole)
        result[name] = base[name] + scale * merged.reshape(base[name].shape)
    return result


def same(got: dict[str, Any], expected: Tensors) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=3e-7, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([1, 3, 60]), st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
def test_ties_over_the_whole_model_is_a_sort_of_all_its_entries(seed: int, count: int, places: int, density: float) -> None:
    base, models = tensors(seed, count, places=places)
    weights = [1.0, 0.5, 2.0, 0.25][:count]
    got = itf.merge("ties", models, base=base, weights=weights, density=density, trim="global", lambda_=0.5)
    same(got, reference(base, models, weights, [density] * count, 0.5))


def test_each_model_and_each_density_has_a_cut_of_its_own() -> None:
    base, models = tensors(3, 2, places=5)
    density = {"x": [{"filter": "b", "value": 0.9}, {"value": 0.2}], "y": 0.4}
    named = dict(zip("xy", models, strict=True))
    got = itf.merge("ties", named, base=base, density=density, trim="global")
    first = {name: 0.9 if "b" in name else 0.2 for name in base}
    same(got, reference(base, models, [1.0, 1.0], [first, 0.4]))


def test_a_cut_over_the_model_is_another_than_one_a_tensor() -> None:
    base, models = tensors(4, 2, places=60)
    whole, each = (itf.merge("ties", models, base=base, density=0.3, trim=trim) for trim in ("global", "tensor"))
    plain = itf.merge("ties", models, base=base, density=0.3)
    assert any((whole[name] != each[name]).any() for name in base)
    assert all((plain[name] == each[name]).all() for name in base)


def test_float64_beside_float32_has_one_order() -> None:
    base, models = tensors(5, 2, places=60)
    for one in (base, *models):
        one["a"] = one["a"].astype(np.float64)
    for one in models:
        one["a"] += np.where(one["a"] == base["a"], 0, 1e-12)  # between two float32 numbers
    got = itf.merge("ties", models, base=base, density=0.35, trim="global")
    same(got, reference(base, models, [1.0, 1.0], [0.35, 0.35]))
    assert got["a"].dtype == np.float64


def test_bfloat16_with_many_equal_magnitudes_and_three_threads() -> None:
    base, models = tensors(6, 3, places=2, shapes={"b": (150, 90), "a": (4000,), "c": (64, 64)})
    as_bf16 = [{name: torch.from_numpy(value).bfloat16() for name, value in one.items()} for one in (base, *models)]
    exact = [{name: value.float().numpy() for name, value in one.items()} for one in as_bf16]
    found = [
        itf.merge("ties", as_bf16[1:], base=as_bf16[0], density=0.45, trim="global", dtype="float32", threads=threads)
        for threads in (1, 3, 3)
    ]
    same(found[0], reference(exact[0], exact[1:], [1.0] * 3, [0.45] * 3))
    assert all(torch.equal(found[0][name], one[name]) for one in found for name in base)


@pytest.mark.parametrize(("places", "most"), [(2, 1), (100_000, 2)])
def test_a_sample_brackets_the_cut_and_one_that_misses_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, places: int, most: int
) -> None:
    shapes = {"a": (500, 300), "tiny": (5,), "b": (100_000,)}
    base, models = tensors(7, 2, places=places, shapes=shapes)
    passes: list[int] = []
    tallied = global_trim._tallied

    def counted(*given: Any) -> np.ndarray:
        passes.append(1)
        return tallied(*given)

    monkeypatch.setattr(global_trim, "_tallied", counted)
    first = itf.merge("ties", models, base=base, density=0.2, trim="global")
    assert 1 <= len(passes) <= most
    passes.clear()
    monkeypatch.setattr(global_trim, "_bracket", lambda scores, share, groups: (groups.end - 2, groups.end))
    second = itf.merge("ties", models, base=base, density=0.2, trim="global")
    assert len(passes) > most
    deltas = np.concatenate([(models[0][name] - base[name]).reshape(-1) for name in base])
    assert all(first[name].tobytes() == second[name].tobytes() for name in base)
    kept = sum(
        int(np.count_nonzero(itf.merge("ties", models[:1], base=base, density=0.2, trim="global")[n] != base[n])) for n in base
    )
    assert kept == min(int(0.2 * deltas.size), np.count_nonzero(deltas))


def test_files_resumed_and_stages_of_several_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = tensors(8, 2, places=3)
    for name, one in zip(("base", "x", "y"), (base, *models), strict=True):
        (tmp_path / name).mkdir()
        save_file(one, tmp_path / name / "model.safetensors")
    (tmp_path / "r.yaml").write_text(
        "name: stage\nmerge_method: ties\nbase_model: base\nmodels: [{model: x}, {model: y}]\n"
        "parameters: {density: 0.3, trim: global}\n---\nmerge_method: linear\nmodels: [{model: stage}]\n"
    )
    itf.run(tmp_path / "r.yaml", tmp_path / "two", progress=False)
    paths = [str(tmp_path / name) for name in ("x", "y")]
    options: dict[str, Any] = {"base": str(tmp_path / "base"), "density": 0.3, "trim": "global"}
    one = itf.merge("ties", paths, out=tmp_path / "one", **options)
    weights = (one / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == weights
    about = json.loads((one / "interfuse.json").read_text())
    assert about["recipes"][0]["parameters"] == {"density": 0.3, "trim": "global"}

    def killed(*given: Any, **more: Any) -> Any:
        done = more["done"]
        seen: list[str] = []

        def note(output: Any, merging: Any) -> None:
            done(output, merging)
            seen.append(output.name)
            if len(seen) == 2:
                raise KeyboardInterrupt

        return execute(*given, **(more | {"done": note}))

    monkeypatch.setattr("interfuse.engine.output.folder.execute", killed)
    with pytest.raises(KeyboardInterrupt):
        itf.merge("ties", paths, out=tmp_path / "again", threads=1, **options)
    monkeypatch.undo()
    itf.merge("ties", paths, out=tmp_path / "again", resume=True, **options)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_what_a_trim_may_be() -> None:
    base, models = tensors(9, 1, places=3)
    with pytest.raises(itf.OptionError, match=r"parameters\.trim: got 'model'; allowed: 'tensor' or 'global'"):
        itf.merge("ties", models, base=base, trim="model")
    with pytest.raises(itf.OptionError, match="breadcrumbs has no such option"):
        itf.merge("breadcrumbs", models, base=base, trim="global")

"""The torch form of merges against the CPU engine: equal bits, but for the last place where sums over a tensor come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import interfuse as itf
from interfuse.checkpoints.numbers import narrow
from interfuse.checkpoints.source import open_checkpoint
from interfuse.checkpoints.tensors import to_array
from interfuse.checkpoints.writer import MemoryWriter
from interfuse.engine import on_device, torch_form
from interfuse.engine.chain import plan_recipe
from interfuse.engine.local import execute
from interfuse.engine.rules import keys_of
from interfuse.methods.sparse import ties
from interfuse.recipe import Recipe

SHAPES = {
    "layers.0.weight": (20, 12),
    "layers.1.weight": (7, 40),
    "bias": (33,),
    "conv": (4, 3, 2, 2),
    "one": (),
    "none": (0, 3),
}
State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]

#: Method, options, and by how many units in the last place its results may differ: 0 where the arithmetic is by entry.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {}, 0),
    ("linear", {"normalize": False, "weight": [0.3, -0.2, 0.9]}, 0),
    ("task_arithmetic", {"lambda": 0.7}, 0),
    ("ema", {"decay": 0.3}, 0),
    ("lines", {"alpha": 0.3, "beta": 0.5}, 0),
    ("ties", {"density": 0.4}, 0),
    ("ties", {"density": 0.4, "trim": "global"}, 0),
    ("ties", {"density": 0.0}, 0),
    ("ties", {"density": 0.3, "rescale": True}, 1),
    ("dare_linear", {"density": 0.4}, 0),
    ("dare_ties", {"density": 0.6, "normalize": True}, 0),
    ("dare_ties", {"density": 0.6, "rescale": "l1"}, 1),
    ("della", {"density": 0.5}, 0),
    ("della", {"density": 0.15}, 0),
    ("della_linear", {"density": 0.6, "epsilon": 0.1, "rescale": False}, 0),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}, 0),
    ("breadcrumbs_ties", {"density": 0.8, "gamma": 0.3}, 0),
    ("sce", {"select_topk": 0.4}, 1),
    ("sce", {}, 1),
    ("model_stock", {}, 1),
    ("model_stock", {"filter_wise": True}, 1),
    ("multislerp", {}, 1),
    ("karcher", {}, 1),
    ("nan", {}, 1),
    ("tsv_m", {}, 64),
    ("iso_c", {}, 64),
    ("knots", {"combine": "dare_ties"}, 64),
    ("wudi", {}, 64),
    ("magmax", {}, 0),
]


def states(dtype: torch.dtype, seed: int = 0, models: int = 3) -> tuple[State, dict[str, State]]:
    """A base and models, with steps of a grid among the changes, so that some magnitudes are equal."""
    random = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    named: dict[str, State] = {}
    for name in "abc"[:models]:
        changes = {key: torch.randn(shape, generator=random) * 0.1 for key, shape in SHAPES.items()}
        changes = {key: torch.where(value.abs() < 0.05, (value * 64).round() / 64, value) for key, value in changes.items()}
        named[name] = {key: (base[key] + value).to(dtype) for key, value in changes.items()}
    return base, named


def both(
    method: str, options: dict[str, Any], base: State | None, models: dict[str, State], dtype: str | None = None
) -> tuple[Arrays, Arrays]:
    """The merge by the CPU's engine, and the same plan in torch's form on the device cpu."""
    each = [{"model": name, "parameters": {}} for name in models]
    shared = dict(options)
    for entry, weight in zip(each, shared.pop("weight", [1.0, 0.5, 0.75]), strict=False):
        entry["parameters"] = {"weight": weight}
    content: dict[str, Any] = {"merge_method": method, "models": each, "parameters": shared, "seed": 3}
    content |= {} if base is None else {"base_model": "base"}
    content |= {} if dtype is None else {"out_dtype": dtype}
    held = {name: open_checkpoint(state) for name, state in ({} if base is None else {"base": base}).items()}
    held |= {name: open_checkpoint(state) for name, state in models.items()}
    plan, sources = plan_recipe(Recipe.model_validate(content), held)
    found = []
    for device in (None, "cpu"):
        writer = MemoryWriter(plan.specs)
        merging = execute(plan, sources, writer, device=device, progress=False)
        found.append(({name: writer.tensors[name] for name in plan.specs}, merging.read, merging.written))
    assert found[0][1] == found[1][1], "the inputs' hashes"
    if all((found[0][0][name].tobytes() == found[1][0][name].tobytes()) for name in plan.specs):
        assert found[0][2] == found[1][2], "the outputs' hashes"
    return found[0][0], found[1][0]


def units(got: np.ndarray, expected: np.ndarray) -> int:
    """By how many numbers of their type the two differ at most."""
    size: Any = {2: np.int16, 4: np.int32, 8: np.int64}[got.dtype.itemsize]
    a, b = (np.where((bits := x.view(size)) < 0, np.iinfo(size).min - bits, bits).astype(np.int64) for x in (got, expected))
    return int(abs(a - b).max()) if a.size else 0


@pytest.mark.parametrize(("method", "options", "places"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_both_forms_are_one(method: str, options: dict[str, Any], places: int, dtype: torch.dtype) -> None:
    base, models = states(dtype)
    expected, got = both(method, options, base, models)
    # Decompositions are another library's; sums over a tensor in float64 are others in their last place.
    loose = {0: 0.0, 1: 1e-14 if dtype == torch.float64 else 0.0}.get(places, 1e-5 if dtype.itemsize > 2 else 1e-2)
    for name in SHAPES:
        if loose:
            a, b = to_float(got[name], dtype), to_float(expected[name], dtype)
            np.testing.assert_allclose(a, b, rtol=0, atol=loose * float(abs(b).max(initial=1e-3)), err_msg=name)
        else:
            assert units(got[name], expected[name]) <= places, name


def to_float(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == torch.bfloat16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float64)


@pytest.mark.parametrize(("method", "options"), [("slerp", {"t": 0.3}), ("expo", {}), ("nuslerp", {"nuslerp_flatten": False})])
def test_methods_of_one_or_two_models(method: str, options: dict[str, Any]) -> None:
    base, models = states(torch.float32, models=2 if method == "nuslerp" else 1)
    expected, got = both(method, options, base, models)
    assert all(units(got[name], expected[name]) <= 1 for name in SHAPES)


def test_models_without_a_base_and_another_type_of_output() -> None:
    _, models = states(torch.float64)
    for method in ("linear", "karcher", "nan"):
        expected, got = both(method, {}, None, models, dtype="bfloat16")
        assert all(units(got[name], expected[name]) <= (0 if method == "linear" else 1) for name in SHAPES), method


def test_equal_models_give_that_model_and_integers_come_through() -> None:
    base, models = states(torch.float32, models=1)
    for one in (base, models["a"]):
        one["steps"] = torch.arange(3)
    twice = {"a": models["a"], "b": models["a"]}
    _, got = both("linear", {"weight": [0.3, 0.6]}, None, twice)
    assert all(got[name].tobytes() == to_array(value).tobytes() for name, value in models["a"].items())


def test_chance_is_the_kernels_own_whatever_the_index() -> None:
    key = keys_of(7, "layers.3.weight", 1)[0]
    first = torch_form.chances_drawn(2000, key, "cpu").numpy()
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(torch_form.chances_drawn(500, key, "cpu", 1500).numpy(), first[1500:])
    for start in (0, 2**31 - 5, 2**32 - 3, 2**33 + 11):
        got = torch_form.chances_drawn(9, key, "cpu", start).numpy()
        np.testing.assert_array_equal(got, [drawn(start + i, key) for i in range(9)])


def drawn(index: int, key: np.ndarray) -> np.float32:
    """The kernels' definition, in whole numbers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    by = mix((mix(((index >> 32) + int(key[0])) % 2**32) + int(key[1])) % 2**32)
    return np.float32(mix((index % 2**32) ^ by) >> 8) * np.float32(2**-24)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0, -3.0]), min_size=1, max_size=30), st.integers(-1, 32))
def test_the_largest_are_those_of_a_stable_sort(values: list[float], keep: int) -> None:
    got = torch_form._largest(torch.tensor(values).abs(), keep).tolist()
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: max(keep, 0)]
    assert got == [i in order for i in range(len(values))]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_numbers_are_rounded_once(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [random.standard_normal(5000), random.standard_normal(500) * 1e-6, random.standard_normal(500) * 1e5]
    )
    values[:2000] = values[:2000].astype(np.float16) * (1 + 2.0**-11) * (1 + 2.0**-40)  # near ties
    for wide in (np.float64, np.float32):
        got = to_array(torch_form.rounded(torch.from_numpy(values.astype(wide)), dtype))
        np.testing.assert_array_equal(got, narrow(values.astype(wide), dtype))


def test_a_merge_has_gradients_by_its_coefficients() -> None:
    torch.manual_seed(0)
    base, *models = torch.randn(4, 3, 5, dtype=torch.float64).unbind()
    coefficients = torch.tensor([0.3, -0.2, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: torch_form.added(base, models, c), coefficients)
    plain = base + sum(c * (model - base) for c, model in zip([0.3, -0.2, 0.6], models, strict=True))
    torch.testing.assert_close(torch_form.added(base, models, coefficients).detach(), plain)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    torch_form.added(base, models, zero).sum().backward()
    assert zero.grad is not None
    torch.testing.assert_close(zero.grad, torch.stack([(model - base).sum() for model in models]))


def test_a_rule_has_gradients_by_weights_and_scale_and_models_have_them_too() -> None:
    torch.manual_seed(1)
    base, *models = torch.randn(4, 40, dtype=torch.float64).unbind()
    rule, keys = ties([1.0, 1.0, 1.0], density=(0.6, 0.6, 0.6)), keys_of(0, "w", 3)
    weights = torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    run = lambda w, s: torch_form.ruled(rule, base, models, keys=keys, weights=w, scale=s)
    assert torch.autograd.gradcheck(run, (weights, scale))
    model = models[0].clone().requires_grad_()
    torch_form.ruled(rule, base, [model, *models[1:]], keys=keys).sum().backward()
    assert model.grad is not None
    assert 0 < int((model.grad != 0).sum()) < 40


def test_what_isnt_finite_is_told_and_where_it_is() -> None:
    base, models = states(torch.float32)
    models["b"]["bias"][3] = torch.nan
    for method, options in (("linear", {}), ("ties", {"density": 0.1}), ("iso_c", {})):
        with pytest.raises(itf.CheckpointError, match=r"b: tensor 'bias'|mapping: tensor 'bias': holds NaN"):
            both(method, options, base, models)
    huge = {"a": {"w": torch.full((4,), 3e38)}, "b": {"w": torch.full((4,), -3e38)}}
    expected, got = both("linear", {"weight": [1.0, 1.0]}, None, huge)
    assert got["w"].tobytes() == expected["w"].tobytes() == bytes(16)


def test_files_go_through_a_journal_and_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = states(torch.bfloat16)
    for name, state in {"base": base, **models}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    paths = [tmp_path / name for name in models]
    plain = itf.merge("dare_ties", paths, base=tmp_path / "base", out=tmp_path / "plain", density=0.5)
    asked: list[Any] = []

    def here(device: str | None, models: Any = ()) -> str | None:
        asked.append(device)
        return "cpu"

    monkeypatch.setattr("interfuse.engine.merge.device_for", here)
    other = itf.merge("dare_ties", paths, base=tmp_path / "base", out=tmp_path / "other", density=0.5, device="cuda")
    assert asked == ["cuda"]
    first, second = (load_file(Path(out) / "model.safetensors") for out in (plain, other))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_methods_of_blocks_are_the_cpus() -> None:
    base, models = states(torch.float32)
    plan, _ = plan_recipe(
        Recipe.model_validate({"merge_method": "emr", "base_model": "base", "models": list(models)}),
        {"base": open_checkpoint(base)} | {name: open_checkpoint(state) for name, state in models.items()},
    )
    assert not any(on_device.on_device(output) for output in plan.outputs)


def test_a_device_that_isnt_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, models = states(torch.float32)
    with pytest.raises(itf.OptionError, match="device: there is no 'cuda' here; cpu"):
        itf.merge("linear", models, device="cuda")
    with pytest.raises(itf.OptionError, match="device: got 'gpu'; cpu or cuda"):
        itf.merge("linear", models, device="gpu")
    with pytest.raises(itf.OptionError, match="device: there is no 'meta' here; cpu or cuda"):
        itf.merge("linear", models, device="meta")
    assert on_device.device_for("cpu") is None
    assert on_device.device_for(None, [base, torch.nn.Linear(2, 2), "path", {}]) is None

"""Merging: the formulas in float64 against what comes out, in every form that goes in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from interfuse.checkpoints.source import BLOCK, open_checkpoint
from interfuse.engine.merge import merge
from interfuse.errors import CheckpointError, ModelError, OptionError

ORDINARY = st.floats(-1e3, 1e3, width=32)
WEIGHT = st.floats(-2, 2, width=32)


def blocks_of(count: int) -> st.SearchStrategy[list[np.ndarray]]:
    return st.lists(arrays(np.float32, (2, 3), elements=ORDINARY), min_size=count, max_size=count)


def one(result: Mapping[str, Any]) -> Any:
    assert list(result) == ["t"]
    return result["t"]


def mappings(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"t": value} for value in values]


def by_name(scale: float) -> dict[str, Any]:
    """The option that Python can't write as a keyword."""
    return {"lambda": scale}


def slow(base: np.ndarray | None, models: Sequence[np.ndarray], weights: Sequence[float], scale: float = 1) -> np.ndarray:
    """The formulas, in float64, one element at a time: linear without a base, task arithmetic with one."""
    result = np.empty(models[0].shape)
    for at in np.ndindex(models[0].shape):
        start = 0.0 if base is None else float(base[at])
        moved = sum(w * (float(t[at]) - start) for w, t in zip(weights, models, strict=True))
        result[at] = moved / sum(weights) if base is None else start + scale * moved
    return result


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    module(torch.randn(8, 4))
    return module


@settings(deadline=None)  # the first call compiles
@given(blocks_of(3), st.lists(st.floats(0.125, 2, width=32), min_size=3, max_size=3))
def test_linear_is_the_formula(models: list[np.ndarray], weights: list[float]) -> None:
    got = one(merge("linear", mappings(models), weights=weights))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow(None, models, weights), rtol=1e-5, atol=1e-3)


@settings(deadline=None)  # the first call compiles
@given(blocks_of(3), st.lists(WEIGHT, min_size=2, max_size=2), WEIGHT)
def test_task_arithmetic_is_the_formula(models: list[np.ndarray], weights: list[float], scale: float) -> None:
    base, *rest = models
    got = one(merge("task_arithmetic", mappings(rest), base={"t": base}, weights=weights, **by_name(scale)))
    np.testing.assert_allclose(got, slow(base, rest, weights, scale), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@settings(deadline=None)  # the first call compiles
@given(values=arrays(np.float32, 5, elements=st.floats(-1e3, 1e3, width=32)), weights=st.lists(WEIGHT, min_size=3, max_size=3))
def test_equal_models_give_themselves_to_the_bit(dtype: str, values: np.ndarray, weights: list[float]) -> None:
    tensor = torch.cat([torch.from_numpy(values), torch.tensor([0.0, -0.0])]).to(getattr(torch, dtype))
    models = mappings([tensor] * 3)
    results = [one(merge("task_arithmetic", models, base={"t": tensor}, weights=weights))]
    if abs(sum(weights)) > 0.01:
        results.append(one(merge("linear", models, weights=weights)))
    for got in results:
        assert got.dtype == tensor.dtype
        assert got.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


@settings(deadline=None)  # the first call compiles
@given(blocks_of(3), st.permutations(range(3)))
def test_the_order_of_equally_weighted_models_does_not_matter(models: list[np.ndarray], order: list[int]) -> None:
    got = one(merge("linear", mappings([models[i] for i in order])))
    np.testing.assert_allclose(got, one(merge("linear", mappings(models))), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    base, a, b = (torch.randn(50, generator=torch.Generator().manual_seed(i)).mul(10**i).to(dtype) for i in range(3))
    assert torch.equal(one(merge("linear", mappings([a, b]), weights=[1, 0])), a)
    assert torch.equal(one(merge("linear", mappings([a, b]), weights=[0, 7])), b)
    assert torch.equal(one(merge("task_arithmetic", mappings([a, b]), base={"t": base}, lambda_=0)), base)
    assert torch.equal(one(merge("task_arithmetic", mappings([a]), base={"t": base})), a)


def test_near_an_end_the_result_is_that_end() -> None:
    a, b = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).add(0.1) for i in range(2))
    for models, weights in ([a, b], [1, 1e-16]), ([b, a], [1e-16, 1]):
        assert torch.equal(one(merge("linear", mappings(models), weights=weights)), a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide_and_rounded_once(dtype: torch.dtype) -> None:
    models = [torch.randn(4096, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]
    exact = torch.stack([model.double() for model in models]).mean(0)
    got = one(merge("linear", mappings(models)))
    expected = exact.to(dtype)
    # float32 may fall on the other side of a tie; nowhere else may it differ from one rounding of the exact mean.
    assert (got != expected).float().mean() < 0.02
    assert ((got.double() - exact).abs() <= (expected.double() - exact).abs() * (1 + 1e-3) + 1e-9).all()


def test_float64_is_summed_in_float64() -> None:
    a, b = np.array([1.0, 1e-12]), np.array([1.0 + 1e-12, 3e-12])
    np.testing.assert_allclose(one(merge("linear", mappings([a, b]))), (a + b) / 2, rtol=1e-15)
    np.testing.assert_allclose(one(merge("linear", mappings([a, b]), normalize=False)), a + b, rtol=1e-15)


def test_types_may_differ_and_the_first_decides() -> None:
    a, b = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0 + 2**-7])
    got = one(merge("linear", mappings([a, b]), weights=[1, 3]))
    assert got.dtype == torch.bfloat16
    assert got.item() == 1.0 + 2**-7
    assert one(merge("linear", mappings([b, a]), weights=[3, 1])).item() == 1 + 3 * 2**-9
    assert one(merge("linear", mappings([b, a]), dtype=torch.float16)).dtype == torch.float16


def test_tensors_longer_than_a_block_are_whole() -> None:
    a = np.arange(BLOCK * 2 + 5, dtype=np.float32)
    np.testing.assert_array_equal(one(merge("linear", mappings([a, a + 2]))), a + 1)
    zero = one(merge("linear", mappings([a]), weights=[0], normalize=False))
    assert zero.shape == a.shape
    assert not zero.any()


def test_empty_and_scalar_tensors_are_merged() -> None:
    got = merge("linear", [{"e": np.zeros((0, 3), np.float32), "s": np.array(x, np.float32)} for x in (1, 3)])
    assert got["e"].shape == (0, 3)
    assert got["s"] == np.float32(2)


def test_integers_must_agree_and_nothing_is_merged_otherwise() -> None:
    same: dict[str, Any] = {"t": torch.ones(2), "ids": torch.arange(3), "mask": torch.tensor([True, False])}
    got = merge("linear", [same, same])
    assert torch.equal(got["ids"], torch.arange(3))
    assert torch.equal(got["mask"], same["mask"])
    other = {**same, "ids": torch.tensor([0, 1, 5]), "mask": torch.tensor([False, True])}
    with pytest.raises(CheckpointError) as caught:
        merge("linear", {"a": same, "b": other})
    assert [str(problem) for problem in caught.value.problems] == [
        f"b (dict): tensor {found} values; integers can't be averaged: they must be those of a (dict), "
        "or name the tensor under `keep`"
        for found in ("'ids' differs in 1 of 3", "'mask' differs in 2 of 2")
    ]


def test_batch_norm_counts_take_the_largest() -> None:
    states = [{"bn.num_batches_tracked": torch.tensor(n)} for n in (3, 9, 5)]
    assert merge("linear", states)["bn.num_batches_tracked"].item() == 9


@pytest.mark.parametrize(("a", "b"), [(float("nan"), 1.0), (float("inf"), 1.0), (float("inf"), float("-inf"))])
def test_nan_and_infinity_are_reported_unless_allowed(a: float, b: float) -> None:
    models = [{"ok": torch.ones(2), "bad": torch.tensor([1.0, x])} for x in (a, b)]
    with pytest.raises(CheckpointError, match=r"models\[0\] \(dict\): tensor 'bad': holds NaN or infinite values: 1;"):
        merge("linear", models)
    got = merge("linear", models, allow_nonfinite=True)["bad"]
    np.testing.assert_array_equal(got.numpy(), [1.0, a / 2 + b / 2])


def test_a_mask_of_infinities_stays_one_where_allowed() -> None:
    mask = torch.tensor([0.0, float("-inf")])
    assert torch.equal(one(merge("linear", mappings([mask] * 3), allow_nonfinite=True)), mask)


def test_models_without_a_share_change_nothing() -> None:
    models = mappings([torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 3.0])])
    assert merge("linear", models, weights=[0, 2])["t"].tolist() == [2.0, 3.0]
    with pytest.raises(CheckpointError, match="holds NaN or infinite values: 1;"):
        merge("linear", models, weights=[1e-9, 2])


def test_a_difference_that_overflows_is_no_infinity() -> None:
    large = np.array([3e38], np.float32)
    assert one(merge("linear", mappings([large, -large])))[0] == 0


def test_a_result_beyond_the_type_is_reported() -> None:
    models = mappings([torch.tensor([60000.0]).half()] * 2)
    with pytest.raises(CheckpointError, match="tensor 't': the result holds NaN or infinite values: 1;"):
        merge("linear", models, normalize=False)


def test_modules_give_a_new_module_and_are_not_changed() -> None:
    a, b = net(1), net(2)
    before = [{name: tensor.clone() for name, tensor in m.state_dict().items()} for m in (a, b)]
    a.get_parameter("0.weight").requires_grad = False
    a.get_parameter("2.weight").grad = torch.ones(2, 3)
    a.eval()
    got = merge("linear", [a, b], weights=[1, 3])
    assert isinstance(got, torch.nn.Sequential)
    assert not got.training
    assert [p.requires_grad for p in got.parameters()] == [False, True, True, True, True, True]
    assert all(parameter.grad is None for parameter in got.parameters())
    for name, tensor in got.state_dict().items():
        if tensor.is_floating_point():
            expected = slow(None, [state[name].numpy() for state in before], [1, 3])
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-6)
    for module, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(module.parameters(), got.parameters(), strict=True))


def test_a_merged_module_is_a_copy_of_the_base() -> None:
    a, base = net(1), net(2).eval()
    got = merge("task_arithmetic", [a.train()], base=base, lambda_=0.5)
    assert not got.training
    expected = slow(base[0].weight.detach().numpy(), [a[0].weight.detach().numpy()], [1], 0.5)  # type: ignore[index]
    np.testing.assert_allclose(got[0].weight.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


class Tied(torch.nn.Module):
    def __init__(self, seed: int, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.register_buffer("scale", torch.full((2,), 0.1), persistent=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_stay_tied(dtype: str | None) -> None:
    a, b = Tied(1), Tied(2)
    got = merge("linear", [a, b], dtype=dtype)
    assert got.head.weight is got.embed.weight
    assert got.embed.weight.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert got.scale.dtype == torch.float32
    expected = ((a.embed.weight + b.embed.weight) / 2).detach().to(got.embed.weight.dtype)
    torch.testing.assert_close(got.embed.weight.detach(), expected)


def test_weights_tied_in_one_model_alone_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"tensor 'head.weight': is tied to 'embed.weight' in the result"):
        merge("linear", [Tied(1), Tied(2, tie=False)])
    assert merge("linear", [Tied(2, tie=False), Tied(1)]).head.weight is not None


def test_a_module_s_extra_state_is_kept() -> None:
    class Extra(torch.nn.Linear):
        note = "a"

        def get_extra_state(self) -> str:
            return self.note

        def set_extra_state(self, state: str) -> None:
            self.note = state

    a, b = Extra(2, 2), Extra(2, 2)
    a.note, b.note = "from a", "from b"
    got = merge("linear", [a, b])
    assert got.note == "from a"
    torch.testing.assert_close(got.weight, (a.weight + b.weight) / 2)


def test_different_architectures_list_every_mismatch() -> None:
    other = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    with pytest.raises(ModelError) as caught:
        merge("linear", {"small": net(), "large": other})
    assert [(problem.path, problem.wrong) for problem in caught.value.problems] == [
        ("large (Sequential)", "tensor '0.weight' is F32[5, 4]"),
        ("large (Sequential)", "tensor '0.bias' is F32[5]"),
        ("large (Sequential)", "tensor '1.weight' is F32[5]"),
        ("large (Sequential)", "tensor '1.bias' is F32[5]"),
        ("large (Sequential)", "tensor '1.running_mean' is F32[5]"),
        ("large (Sequential)", "2 more tensors differ in shape or type"),
    ]
    shallow = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match=r"has 2 layers in .*, and .*small.* has 3"):
        merge("linear", {"small": net(), "shallow": shallow})


def test_what_does_not_fit_is_dropped_or_kept_where_that_is_asked_for() -> None:
    one, two = (
        {"w": torch.ones(2), "ids": torch.tensor([1])},
        {"w": torch.zeros(2), "ids": torch.tensor([2]), "new": torch.ones(3)},
    )
    with pytest.raises(CheckpointError, match=r"'new' is extra.*`drop` or `keep`"):
        merge("linear", [one, two], keep=["ids"])
    both = merge("linear", [one, two], keep=["ids", "new"])
    assert {name: tensor.tolist() for name, tensor in both.items()} == {"w": [0.5, 0.5], "ids": [1], "new": [1, 1, 1]}
    assert list(merge("linear", [one, two], drop=["ids", "new"])) == ["w"]
    with pytest.raises(CheckpointError, match=r"drop\[0\]: 'old' matches no tensor"):
        merge("linear", [one, one], drop=["old"])
    with pytest.raises(OptionError, match=r"keep: got 'ids'; a list"):
        merge("linear", [one, one], keep="ids")


@pytest.mark.parametrize("make", [lambda seed: net(seed), lambda seed: dict(net(seed).state_dict())])
def test_patterns_that_leave_or_match_nothing_are_refused_beside_all_else(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **options: Any) -> None:
        raise AssertionError("no tensor may be merged")

    monkeypatch.setattr("interfuse.engine.merge.execute", never)
    with pytest.raises((CheckpointError, ModelError)) as caught:
        merge("linear", [make(1), make(2)], drop=["*"])
    assert str(caught.value) == "drop: leaves no tensor; name fewer: what is dropped isn't in the result"
    with pytest.raises((CheckpointError, ModelError)) as caught:
        merge("linear", [make(1), make(2)], drop=["0.*", "old"], weights=[1, 2, 3], dtype="float31", normalise=True, out="o")
    assert [problem.path for problem in caught.value.problems] == [
        "out",
        "weights",
        "parameters.normalise",
        "drop[1]",
    ]
    with pytest.raises((CheckpointError, ModelError)) as caught:
        merge("linear", [make(1), make(2)], drop=["*"], dtype="float31")
    assert [problem.path for problem in caught.value.problems] == ["drop", "out_dtype"]
    with pytest.raises(OptionError, match=re.escape("drop[0]: got '/(/'")):
        merge("linear", [make(1), make(2)], drop=["/(/"])


def test_a_numpy_scalar_is_a_tensor_without_dimensions() -> None:
    models = [{"s": np.float32(x), "n": np.int64(7), "on": np.True_} for x in (1, 3)]
    got = merge("linear", models)
    assert [(value.shape, value.dtype) for value in got.values()] == [((), "float32"), ((), "int64"), ((), "bool")]
    assert (got["s"], got["n"], got["on"]) == (2, 7, True)
    with pytest.raises(CheckpointError, match="tensor 's' is a float, not a tensor"):
        merge("linear", [{"s": 1.0}, {"s": 3.0}])
    with pytest.raises(OptionError, match="NumPy has no bfloat16"):
        merge("linear", models, dtype="bfloat16")


def test_a_module_has_no_place_for_what_another_has_beyond_it() -> None:
    small, large = torch.nn.Sequential(torch.nn.Linear(1, 1)), torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"'1\.weight': has no place in the result; name it under `drop`"):
        merge("linear", [small, large], keep=["1.*"])
    assert list(merge("linear", [small, large], drop=["1.*"]).state_dict()) == ["0.weight", "0.bias"]


def test_data_parallel_names_are_resolved() -> None:
    a, b = net(1), torch.nn.DataParallel(net(2))
    got = merge("linear", [a, b])
    torch.testing.assert_close(got[0].weight, (a[0].weight + b.module[0].weight) / 2)  # type: ignore[index]


def test_one_number_weighs_every_model() -> None:
    models = mappings([np.array([1, 2], np.float32), np.array([3, 5], np.float32)])
    base = {"t": np.array([0, 1], np.float32)}
    every = merge("task_arithmetic", models, base=base, weights=0.25)
    np.testing.assert_array_equal(one(every), one(merge("task_arithmetic", models, base=base, weights=[0.25, 0.25])))
    np.testing.assert_array_equal(one(every), [1, 2.25])
    for wrong in ("0.5", object()):
        with pytest.raises(OptionError, match=r"weights: got .*a number for all, one a model"):
            merge("task_arithmetic", models, base=base, weights=wrong)  # type: ignore[arg-type]


def test_a_base_may_be_listed_among_the_models() -> None:
    base, first, second = [net(seed) for seed in range(3)]
    pairs = [
        (merge("slerp", [base, first], base=base, t=0.3), merge("slerp", [first], base=base, t=0.3)),
        (
            merge("task_arithmetic", [base, first, second], base=base, weights=[7, 0.5, 2]),
            merge("task_arithmetic", [first, second], base=base, weights=[0.5, 2]),
        ),
    ]
    pairs += [(merge("ties", [base] * count, base=base, density=1.0), base) for count in (1, 3)]  # no list of others
    for listed, alone in pairs:
        for name, value in alone.state_dict().items():
            assert torch.equal(listed.state_dict()[name], value), name


def test_weights_go_by_name() -> None:
    models = {"a": {"t": np.zeros(1, np.float32)}, "b": {"t": np.ones(1, np.float32)}}
    assert one(merge("linear", models, weights={"b": 3}))[0] == 0.75
    with pytest.raises(OptionError, match=re.escape("weights.c: no model has this name; allowed: a, b")):
        merge("linear", models, weights={"c": 3})
    with pytest.raises(OptionError, match="weights: a mapping, but the models have no names"):
        merge("linear", list(models.values()), weights={"a": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": "ab"}, "models: got 'ab'; give a list of models"),
        ({"models": []}, "models: there are none"),
        ({"models": torch.nn.Sequential(torch.nn.Linear(1, 1))}, "models: got a Sequential; give a list of models"),
        ({"models": None}, "models: got a NoneType; give a list of models"),
        ({"models": [3, {}]}, "models[0]: is a int; give modules, mappings of tensors, or paths"),
        ({"models": ["x", {}], "out": "o"}, "models[1]: is a mapping, models[0] a path"),
        ({"models": ["x"], "base": {}, "out": "o"}, "base: is a mapping, models[0] a path"),
        ({"models": ["x"]}, "out: missing; models given as paths are merged into a folder: give out=FOLDER"),
        ({"models": [{"t": np.ones(1)}], "out": "o"}, "out: got 'o'; a merge of mappings is returned: leave it out"),
        ({"models": [{"t": np.ones(1)}], "dtype": "bfloat16"}, "dtype: NumPy has no bfloat16"),
        (
            {"models": [{"t": np.ones(1)}], "normalise": False},
            "parameters.normalise: linear has no such option; did you mean 'normalize'?",
        ),
    ],
)
def test_a_bad_request_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        merge("linear", **arguments)


def test_models_may_be_any_row_of_them() -> None:
    networks = [net(seed) for seed in range(2)]
    wanted = merge("linear", networks).state_dict()
    rows: list[Any] = [iter(networks), tuple(networks), torch.nn.ModuleList(networks)]
    for row in rows:
        found = merge("linear", row).state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_names_that_are_no_texts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="tensor 0 has a name of type int; name tensors by texts"):
        merge("linear", [{0: np.ones(1)}, {0: np.ones(1)}])


def folder_of(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    path.mkdir()
    save_file(
        {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in net(seed).state_dict().items()},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(
        json.dumps({"dtype": "float32", "name": path.name, "text_config": {"torch_dtype": "float32"}})
    )
    return path


def test_folders_give_a_folder_with_side_files_and_provenance(tmp_path: Path) -> None:
    a, b, base = (folder_of(tmp_path / name, seed) for seed, name in enumerate(["a", "b", "base"]))
    (base / "tokenizer.json").write_text("{}")
    for name in ("README.md", "training_args.bin", "old.safetensors.index.json", ".hidden", "interfuse.json"):
        (base / name).write_text("x")
    (base / "checkpoint-5").mkdir()
    out = merge("task_arithmetic", [a, str(b)], base=base, out=tmp_path / "out", weights=[0.5, 2], **by_name(0.5))
    assert out == tmp_path / "out"
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "interfuse.json", "model.safetensors", "tokenizer.json"]
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    states = [load_file(folder / "model.safetensors") for folder in (base, a, b)]
    in_memory = merge("task_arithmetic", states[1:], base=states[0], weights=[0.5, 2], **by_name(0.5))
    got = load_file(out / "model.safetensors")
    assert got.keys() == in_memory.keys()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in got.items())

    record = json.loads((out / "interfuse.json").read_text())
    assert (record["kind"], record["method"]) == ("merge", "task_arithmetic")
    assert record["recipes"][0]["parameters"] == {"lambda": 0.5}
    assert [model["parameters"]["weight"] for model in record["recipes"][0]["models"]] == [0.5, 2]
    assert [source["model"] for source in record["sources"]] == [str(base), str(a), str(b)]
    assert re.fullmatch("[0-9a-f]{64}", record["plan"])
    hashes = [open_checkpoint(folder).hash() for folder in (base, a, b)]
    assert [source["xxh3"] for source in record["sources"]] == hashes
    assert record["output"] == open_checkpoint(out).hash()
    assert record["papers"] == ["https://arxiv.org/abs/2212.04089"]
    assert record["left_out"] == ["checkpoint-5"]


def test_dtype_is_written_into_the_config(tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", 1), folder_of(tmp_path / "b", 2)
    out = merge("linear", [a, b], out=tmp_path / "out", dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "name": "a", "text_config": {"torch_dtype": "bfloat16"}}
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.int64}


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", 1), folder_of(tmp_path / "b", 2)
    digests = []
    for run in range(2):
        inputs, out = [str(a), str(b)], str(tmp_path / f"o{run}")
        code = f"from interfuse.engine.merge import merge; merge('linear', {inputs!r}, out={out!r})"
        code += "; import sys; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": str(run)})
        files = sorted((tmp_path / f"o{run}").iterdir())
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def test_single_files_are_merged_without_their_neighbours(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "diary.txt").write_text("x")
    for i, name in enumerate(["a.safetensors", "b.pt"]):
        state = {"t": torch.full((3,), float(i))}
        (save_file if name.endswith("s") else torch.save)(state, tmp_path / "in" / name)
    out = merge("linear", [tmp_path / "in" / "a.safetensors", tmp_path / "in" / "b.pt"], out=tmp_path / "out")
    assert sorted(os.listdir(out)) == ["README.md", "interfuse.json", "model.safetensors"]
    assert load_file(out / "model.safetensors")["t"].tolist() == [0.5] * 3


def test_a_failed_merge_leaves_nothing(tmp_path: Path) -> None:
    for name, value, step in [("a", 1.0, 1), ("b", float("nan"), 1), ("c", 1.0, 2)]:
        save_file({"t": torch.tensor([value]), "step": torch.tensor(step)}, tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    for models, message in [
        ([a, b], "b.safetensors: tensor 't': holds NaN or infinite values: 1"),
        ([a, c], "tensor 'step' differs in 1 of 1 values"),
        ([a, tmp_path / "gone", tmp_path / "lost"], "gone: no such file or folder(.|\n)*lost: no such file or folder"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            merge("linear", models, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", 1), folder_of(tmp_path / "b", 2)
    for out in (a, tmp_path):
        with pytest.raises(CheckpointError, match="the output would replace the input"):
            merge("linear", [a, b / "model.safetensors"], out=out, overwrite=True)
    out = merge("linear", [a, b], out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="is there already"):
        merge("linear", [a, b], out=out)
    (out / "stale").write_text("x")
    merge("linear", [a, b], out=out, overwrite=True)
    assert "stale" not in os.listdir(out)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_transformers_loads_a_merge(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "bert":
        config = transformers.BertConfig(**small, intermediate_size=16, max_position_embeddings=12)
        make, auto = transformers.BertModel, transformers.AutoModel
    else:  # its head is tied to its embedding, and stored once
        config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=12)
        make, auto = transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM
    folders, models = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(make(config).eval())
        folders.append(tmp_path / str(seed))
        models[-1].save_pretrained(folders[-1])
    out = merge("task_arithmetic", folders[1:], base=folders[0], out=tmp_path / "out", lambda_=0.3)
    got = auto.from_pretrained(out).eval()
    expected = merge("task_arithmetic", models[1:], base=models[0], lambda_=0.3)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(got(ids)[0], expected(ids)[0])
        assert not torch.allclose(got(ids)[0], models[0](ids)[0], atol=1e-4)
    if architecture == "gpt2":
        assert got.lm_head.weight is got.transformer.wte.weight
        assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    peaks = []
    for megabytes in (8, 96):
        paths = [str(tmp_path / f"{megabytes}-{i}.safetensors") for i in range(2)]
        for path in paths:
            save_file({"t": torch.zeros(megabytes * 2**18)}, path)
        code = (
            "import threading, time\n"
            "from interfuse.engine.merge import merge\n"
            "def own(): return int(next(x for x in open('/proc/self/status') if x.startswith('RssAnon')).split()[1])\n"
            "peak, over = [0], threading.Event()\n"
            "def watch():\n    while not over.is_set(): peak[0] = max(peak[0], own()); time.sleep(0.001)\n"
            "watcher = threading.Thread(target=watch); watcher.start()\n"
            f"merge('linear', {paths!r}, out={str(tmp_path / str(megabytes))!r})\n"
            "over.set(); watcher.join(); print(peak[0])"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 10

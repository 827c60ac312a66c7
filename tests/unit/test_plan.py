"""Plans: decided from headers alone, frozen, and with every problem at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interfuse.checkpoints.source import Checkpoint, TensorSpec, open_checkpoint
from interfuse.errors import CheckpointError, OptionError
from interfuse.plan import Input, Output, plan_merge


def header(specs: Mapping[str, tuple[str, tuple[int, ...]]], name: str = "m") -> Checkpoint:
    """A checkpoint whose data can't be read: what uses it reads headers alone."""

    def forbidden() -> np.ndarray:
        raise AssertionError("a plan reads no data")

    made = {key: TensorSpec(dtype, shape) for key, (dtype, shape) in specs.items()}
    return Checkpoint(name, made, None, dict.fromkeys(made, forbidden))


ONE: dict[str, tuple[str, tuple[int, ...]]] = {"w": ("F32", (2, 3)), "n": ("I64", ())}


def test_a_plan_lists_each_output_with_its_inputs() -> None:
    plan = plan_merge("task_arithmetic", [header(ONE, "a"), header(ONE, "b")], header(ONE, "c"), {"lambda": 0.5}, [1, 3])
    assert plan.outputs == (
        Output("w", TensorSpec("F32", (2, 3)), "sum", (Input(0, "w", -1.0), Input(1, "w", 0.5), Input(2, "w", 1.5)), 1.0),
        Output("n", TensorSpec("I64", ()), "same", (Input(0, "n"), Input(1, "n"), Input(2, "n"))),
    )
    assert plan.specs == {"w": TensorSpec("F32", (2, 3)), "n": TensorSpec("I64", ())}
    assert str(plan) == (
        "task_arithmetic(lambda=0.5, normalize=False)\nbase: c\nmodels[0]: a weight=1\nmodels[1]: b weight=3\n"
        "w F32[2, 3] = -1 base + 0.5 models[0] + 1.5 models[1]\nn I64[] = same"
    )


def test_a_plan_is_frozen_and_hashable() -> None:
    plan = plan_merge("linear", [header(ONE)])
    assert hash(plan) == hash(plan_merge("linear", [header(ONE)]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.method = "x"  # type: ignore[misc]


def test_the_digest_depends_on_numbers_and_not_on_paths() -> None:
    def digest(names: str = "ab", weights: tuple[float, ...] = (1, 2), dtype: str | None = None, **options: Any) -> str:
        return plan_merge("linear", [header(ONE, name) for name in names], None, options, weights, dtype).digest()

    assert digest("ab") == digest("xy")
    others = [digest(weights=(1, 3)), digest(dtype="float16"), digest(normalize=False), digest("abc", (1, 2, 1))]
    assert len({digest(), *others}) == 5
    assert digest()[:12] == "c889fb23e839"  # in this process and in any other


def test_models_without_a_share_are_not_read() -> None:
    plan = plan_merge("linear", [header(ONE), header(ONE)], header(ONE), weights=[0, 2])
    assert plan.outputs[0].inputs == (Input(2, "w", 1.0),)


def test_types_names_and_order_are_those_of_the_base_or_the_first() -> None:
    first = header({"b": ("BF16", (2,)), "a": ("F32", (2,))})
    second = header({"a": ("F16", (2,)), "b": ("F32", (2,))})
    assert list(plan_merge("linear", [first, second]).specs.items()) == [
        ("b", TensorSpec("BF16", (2,))),
        ("a", TensorSpec("F32", (2,))),
    ]
    assert list(plan_merge("linear", [first], second).specs) == ["a", "b"]


@pytest.mark.parametrize("dtype", ["bfloat16", "BF16", "torch.bfloat16"])
def test_dtype_changes_floats_alone(dtype: str) -> None:
    specs = plan_merge("linear", [header(ONE)], dtype=dtype).specs
    assert (specs["w"].dtype, specs["n"].dtype) == ("BF16", "I64")


@pytest.mark.parametrize(
    ("ours", "theirs", "note"),
    [
        ("", "module.", "the prefix 'module.' of its names is left out"),
        ("model.", "", "its names are read with the prefix 'model.'"),
        ("model.", "_orig_mod.module.", "the prefix '_orig_mod.module.' of its names is read as 'model.'"),
    ],
)
def test_a_constant_prefix_is_resolved_and_noted(ours: str, theirs: str, note: str) -> None:
    models = [header({prefix + name: spec for name, spec in ONE.items()}) for prefix in (ours, theirs)]
    plan = plan_merge("linear", models)
    assert plan.notes == (f"models[1] (m): {note}",)
    assert plan.outputs[0].name == f"{ours}w"
    assert [read.name for read in plan.outputs[0].inputs] == [f"{ours}w", f"{theirs}w"]


def test_a_prefix_does_not_hide_what_differs() -> None:
    other = header({"module.w": ("F32", (2, 4)), "module.x": ("F32", (1,))})
    with pytest.raises(CheckpointError) as caught:
        plan_merge("linear", [header(ONE), other])
    assert [problem.wrong for problem in caught.value.problems] == [
        "tensor 'module.w' is F32[2, 4]",
        "tensor 'n' is missing",
        "tensor 'module.x' is extra",
    ]


def test_a_prefix_on_one_side_is_resolved_beside_a_head() -> None:
    body: dict[str, tuple[str, tuple[int, ...]]] = {f"layer.{i}.w": ("F32", (2,)) for i in range(3)}
    inner = {f"bert.{name}": spec for name, spec in body.items()}
    headed = header(inner | {"cls.w": ("F32", (4,))})
    for models, left in (((header(body), headed), "'cls.w' is extra"), ((headed, header(body)), "'cls.w' is missing")):
        with pytest.raises(CheckpointError) as caught:
            plan_merge("linear", models)
        assert [problem.wrong for problem in caught.value.problems] == [f"tensor {left}"]
    plan = plan_merge("linear", [header(body), header(inner)])
    assert plan.notes == ("models[1] (m): the prefix 'bert.' of its names is left out",)
    assert [read.name for read in plan.outputs[2].inputs] == ["layer.2.w", "bert.layer.2.w"]


def test_many_missing_and_extra_tensors_are_one_line_each() -> None:
    one, other = ({f"{name}.{i}": ("F32", (2,)) for i in range(7)} for name in "ab")
    with pytest.raises(CheckpointError) as caught:
        plan_merge("linear", [header(one), header(other)])
    assert [problem.wrong for problem in caught.value.problems] == [
        "7 tensors are missing: 'a.0', 'a.1', 'a.2', 'a.3', 'a.4' and 2 more",
        "7 tensors are extra: 'b.0', 'b.1', 'b.2', 'b.3', 'b.4' and 2 more",
    ]


def test_many_shapes_that_differ_are_counted() -> None:
    one, other = ({f"w{i}": ("F32", (size,)) for i in range(7)} for size in (2, 3))
    with pytest.raises(CheckpointError, match="2 more tensors differ in shape or type") as caught:
        plan_merge("linear", [header(one), header(other)])
    assert len(caught.value.problems) == 6


def test_other_prefixes_are_differences() -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'fc\.w' is missing"):
        plan_merge("linear", [header({"fc.w": ("F32", (2,))}), header({"head.w": ("F32", (2,))})])


def test_every_problem_comes_at_once() -> None:
    other = header({"w": ("F32", (3, 2)), "n": ("F32", ()), "x": ("F32", ())}, "other")
    with pytest.raises(CheckpointError) as caught:
        plan_merge("task_arithmetic", [header(ONE), other], None, {"lamda": 1}, [1, float("nan")], "floot")
    assert [str(problem) for problem in caught.value.problems] == [
        "weights[1]: got nan; a finite number",
        "dtype: got 'floot'; did you mean 'float64', 'float32', 'float16' or 'bfloat16'?",
        "base: task_arithmetic needs one, and there is none; give the models' common ancestor",
        "parameters.lamda: unknown option; did you mean 'lambda'?",
        "models[1] (other): tensor 'w' is F32[3, 2]; models[0] (m) has F32[2, 3]",
        "models[1] (other): tensor 'n' is F32[]; models[0] (m) has I64[]",
        "models[1] (other): tensor 'x' is extra; models[0] (m) has none: give models of one architecture",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "liner"}, "method: no weights method is named 'liner'; did you mean 'linear'?"),
        ({"weights": [1]}, "weights: 1 for 2 models; give one a model"),
        ({"weights": [1, "x"]}, "weights[1]: got 'x'; a finite number"),
        ({"weights": [1, True]}, "weights[1]: got True; a finite number"),
        ({"weights": [1, -1]}, "weights: 1.0, -1.0 sum to 0"),
        ({"checkpoints": []}, "models: there are none; give at least one"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
    ],
)
def test_a_bad_request_is_an_option_error(change: dict[str, Any], message: str) -> None:
    request = {"method": "linear", "checkpoints": [header(ONE), header(ONE)], **change}
    with pytest.raises(OptionError, match=re.escape(message)):
        plan_merge(**request)


@pytest.mark.parametrize(
    ("weights", "options"), [([1e300], {"lambda": 1e300}), ([1e308, 1e308], {}), ([5e-324, 5e-324], {"lambda": 1e308})]
)
def test_coefficients_must_be_finite(weights: list[float], options: dict[str, float]) -> None:
    models = [header(ONE)] * len(weights)
    if weights[0] < 1:  # small ones do no harm
        assert plan_merge("task_arithmetic", models, header(ONE), options, weights).outputs[0].total == 1
        return
    with pytest.raises(OptionError, match="weights: give coefficients too large to compute with"):
        plan_merge("task_arithmetic", models, header(ONE), options, weights)


def test_types_without_arithmetic_are_refused() -> None:
    quantized = header({"w": ("F8_E4M3", (2,))})
    with pytest.raises(CheckpointError, match=re.escape("tensor 'w' is F8_E4M3[2]; convert it to one of float64")):
        plan_merge("linear", [quantized, quantized])


def test_an_empty_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no tensor"):
        plan_merge("linear", [header({}), header({})])


def test_batch_norm_counts_take_the_largest_and_its_statistics_are_noted() -> None:
    norm = header({"bn.running_var": ("F32", (2,)), "bn.num_batches_tracked": ("I64", ())})
    plan = plan_merge("linear", [norm, norm])
    assert plan.outputs[1].rule == "largest"
    assert plan.notes == ("BatchNorm statistics are merged like weights; re-estimating them on data is usually better",)


def test_a_plan_of_files_reads_no_data(tmp_path: Path) -> None:
    from interfuse.checkpoints.writer import TensorWriter

    with TensorWriter(tmp_path / "m.safetensors", {"w": TensorSpec("F32", (3,))}) as writer:
        writer.append("w", np.ones(3, np.float32))
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").unlink()
    assert plan_merge("linear", [checkpoint]).specs == {"w": TensorSpec("F32", (3,))}

"""Plans: decided from headers alone, frozen, and with every problem at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interfuse.checkpoints.source import Checkpoint, TensorSpec, open_checkpoint
from interfuse.errors import CheckpointError, OptionError, UserError
from interfuse.methods.forms import Combination, Rule
from interfuse.plan import Input, Plan, plan_merge
from interfuse.recipe import Recipe
from interfuse.recipe.pieces import references

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
ONE: Specs = {"w": ("F32", (2, 3)), "n": ("I64", ())}


class Forbidden:
    """A place whose data can't be read: a plan reads headers alone."""

    def block(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("a plan reads no data")


def header(specs: Specs, name: str = "m") -> Checkpoint:
    made = {key: TensorSpec(dtype, shape) for key, (dtype, shape) in specs.items()}
    return Checkpoint(name, made, None, dict.fromkeys(made, Forbidden()))


def planned(method: str, models: Sequence[Checkpoint], base: Checkpoint | None = None, **recipe: Any) -> Plan:
    """The plan of a recipe whose models are called a, b, c, ... and whose base is called base."""
    given = {chr(ord("a") + i): model for i, model in enumerate(models)} | ({"base": base} if base else {})
    weights = recipe.pop("weights", None)
    entries = [
        {"model": name, "parameters": {} if weights is None else {"weight": weights[i]}}
        for i, name in enumerate(name for name in given if name != "base")
    ]
    content = {"merge_method": method, "models": entries, **({"base_model": "base"} if base else {}), **recipe}
    read = Recipe.model_validate(content)
    return plan_merge(read, {reference: given[reference.path] for reference in references(read)})


def test_a_plan_lists_each_output_with_its_inputs() -> None:
    plan = planned(
        "task_arithmetic", [header(ONE, "x"), header(ONE, "y")], header(ONE, "z"), weights=[1, 3], parameters={"lambda": 0.5}
    )
    w, n = plan.outputs
    assert (w.name, w.spec, w.how, w.base, w.inputs) == (
        "w", TensorSpec("F32", (2, 3)), "merge", Input(0, "w"), (Input(1, "w"), Input(2, "w")),
    )  # fmt: skip
    assert w.call is not None
    assert w.call.made == Combination(-1.0, (0.5, 1.5), 1.0)
    assert (n.how, n.reads) == ("same", (Input(0, "n"), Input(1, "n"), Input(2, "n")))
    assert plan.specs == {"w": TensorSpec("F32", (2, 3)), "n": TensorSpec("I64", ())}
    assert str(plan) == (
        "task_arithmetic, seed 0\nsource 0: z (lead)\nsource 1: x\nsource 2: y\n"
        "w F32[2, 3] = task_arithmetic, weight [1, 3], lambda 0.5, normalize False of 0:w, 1:w, 2:w\n"
        "n I64[] = same of 0:n, 1:n, 2:n"
    )


def test_tensors_with_the_same_numbers_share_one_call_and_others_do_not() -> None:
    specs: Specs = {f"model.layers.{i}.w": ("F32", (2,)) for i in range(3)} | {"model.norm.weight": ("F32", (2,))}
    models = [header(specs), header(specs)]
    flat = planned("ties", models, header(specs), parameters={"density": 0.5})
    assert len({id(output.call) for output in flat.outputs}) == 1
    ramped = planned("ties", models, header(specs), parameters={"density": [0, 1]})
    rules = [output.call.made for output in ramped.outputs if output.call]
    assert [rule.trim.density for rule in rules if isinstance(rule, Rule)] == [(0, 0), (0.5, 0.5), (1, 1), (1, 1)]


def test_a_plan_is_frozen_and_hashable() -> None:
    plan = planned("linear", [header(ONE)])
    assert hash(plan) == hash(planned("linear", [header(ONE)]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.method = "x"  # type: ignore[misc]


def test_the_digest_depends_on_numbers_and_not_on_paths() -> None:
    def digest(names: str = "ab", weights: tuple[float, ...] = (1, 2), **recipe: Any) -> str:
        return planned("linear", [header(ONE, name) for name in names], None, weights=weights, **recipe).digest()

    assert digest("ab") == digest("xy")
    changed: list[Any] = [{"out_dtype": "float16"}, {"parameters": {"normalize": False}}, {"seed": 1}]
    others = [digest(weights=(1, 3)), digest("abc", (1, 2, 1)), *(digest(**change) for change in changed)]
    assert len({digest(), *others}) == 6
    assert digest()[:12] == "7e138a7e78c6"  # in this process and in any other


def test_types_names_and_order_are_those_of_the_base_or_the_first() -> None:
    first = header({"b": ("BF16", (2,)), "a": ("F32", (2,))})
    second = header({"a": ("F16", (2,)), "b": ("F32", (2,))})
    assert list(planned("linear", [first, second]).specs.items()) == [
        ("b", TensorSpec("BF16", (2,))),
        ("a", TensorSpec("F32", (2,))),
    ]
    assert list(planned("linear", [first], second).specs) == ["a", "b"]


@pytest.mark.parametrize("dtype", ["bfloat16", "BF16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_dtype_changes_floats_alone(dtype: str, key: str) -> None:
    specs = planned("linear", [header(ONE)], None, **{key: dtype}).specs
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
    plan = planned("linear", models)
    assert plan.notes == (f"models[1] (b): {note}",)
    assert plan.outputs[0].name == f"{ours}w"
    assert [read.name for read in plan.outputs[0].inputs] == [f"{ours}w", f"{theirs}w"]


def test_a_prefix_does_not_hide_what_differs() -> None:
    other = header({"module.w": ("F32", (2, 4)), "module.x": ("F32", (1,))})
    with pytest.raises(CheckpointError, match=r"tensor 'n' is missing(.|\n)*tensor 'x' is extra"):
        planned("linear", [header(ONE), other])


def test_a_prefix_on_one_side_is_resolved_beside_a_head() -> None:
    body: Specs = {f"layer.{i}.w": ("F32", (2,)) for i in range(3)}
    inner: Specs = {f"bert.{name}": spec for name, spec in body.items()}
    headed = header({**inner, "cls.w": ("F32", (4,))})
    for models, left in (((header(body), headed), "'cls.w' is extra"), ((headed, header(body)), "'cls.w' is missing")):
        with pytest.raises(CheckpointError) as caught:
            planned("linear", models)
        assert [problem.wrong for problem in caught.value.problems] == [f"tensor {left}"]
    plan = planned("linear", [header(body), header(inner)])
    assert plan.notes == ("models[1] (b): the prefix 'bert.' of its names is left out",)
    assert [read.name for read in plan.outputs[2].inputs] == ["layer.2.w", "bert.layer.2.w"]


def test_other_prefixes_are_differences() -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'fc\.w' is missing"):
        planned("linear", [header({"fc.w": ("F32", (2,))}), header({"head.w": ("F32", (2,))})])


def test_many_missing_and_extra_tensors_are_one_line_each() -> None:
    one, other = (header({f"{name}.w{i}": ("F32", (2,)) for i in range(7)}) for name in "ab")
    with pytest.raises(CheckpointError) as caught:
        planned("linear", [one, other])
    assert [problem.wrong for problem in caught.value.problems] == [
        "7 tensors are missing: 'a.w0', 'a.w1', 'a.w2', 'a.w3', 'a.w4' and 2 more",
        "7 tensors are extra: 'b.w0', 'b.w1', 'b.w2', 'b.w3', 'b.w4' and 2 more",
    ]


def test_every_problem_comes_at_once() -> None:
    specs: Specs = {**ONE, "v": ("F32", (2,))}
    other = header({"w": ("F32", (3, 2)), "n": ("F32", ()), "v": ("F32", (2,)), "x": ("F32", ())}, "other")
    with pytest.raises(CheckpointError) as caught:
        planned("linear", [header(specs), other], weights=[1.0, -1.0], dtype="floot")
    assert sorted(str(problem).partition(";")[0] for problem in caught.value.problems) == [
        "dtype: got 'floot'",
        "models[1] (b): tensor 'x' is extra",
        "other: tensor 'n' is F32[]",
        "other: tensor 'w' is F32[3, 2]",
        "weights: 1.0, -1.0 sum to 0",
    ]


def test_many_shapes_that_differ_are_counted() -> None:
    one, other = (header({f"t{i}": ("F32", (size,)) for i in range(12)}, f"of {size}") for size in (1, 2))
    with pytest.raises(CheckpointError) as caught:
        planned("linear", [one, other])
    assert [problem.wrong for problem in caught.value.problems][4:] == [
        "tensor 't4' is F32[2]",
        "7 more tensors differ in shape or type",
    ]
    assert {problem.path for problem in caught.value.problems} == {"of 2"}


def test_a_float_and_an_integer_do_not_mix() -> None:
    with pytest.raises(CheckpointError, match=re.escape("tensor 'n' is F32[]; m has I64[]")):
        planned("linear", [header(ONE), header({"w": ("F32", (2, 3)), "n": ("F32", ())})])


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("liner", {}, "no weights method is named 'liner'; did you mean 'linear', 'lines'"),
        ("linear", {"weights": [1.0, -1.0]}, "1.0, -1.0 sum to 0"),
        ("linear", {"dtype": "int8"}, "dtype: got 'int8'"),
        ("linear", {"out_dtype": "int8"}, "out_dtype: got 'int8'"),
        ("task_arithmetic", {}, "base_model: missing; task_arithmetic needs a base"),
        ("linear", {"weights": [1e308, 1e308], "parameters": {"normalize": False}}, "coefficients too large"),
        ("linear", {"weights": [1e308, 1e308]}, "weights: give coefficients too large to compute with"),
    ],
)
def test_a_bad_request_is_an_option_error(method: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        planned(method, [header(ONE), header(ONE)], **change)


def test_small_coefficients_do_no_harm() -> None:
    plan = planned("task_arithmetic", [header(ONE)], header(ONE), weights=[5e-324], parameters={"lambda": 1e308})
    call = plan.outputs[0].call
    assert call is not None
    assert isinstance(call.made, Combination)
    assert call.made.total == 1


def test_a_wrong_number_of_models_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="models: got 1; nuslerp takes exactly two models"):
        planned("nuslerp", [header(ONE)])


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_a_method_of_blocks_is_asked_before_anything_is_written(method: str) -> None:
    parameters = {"t": 0.1} if method == "nearswap" else {}
    with pytest.raises(OptionError, match=r"models: got 2"):
        planned(method, [header(ONE), header(ONE)], header(ONE), parameters=parameters)


def test_della_refuses_chances_beyond_one() -> None:
    parameters = {"density": 0.9, "epsilon": 0.2}
    with pytest.raises(UserError, match=r"parameters.epsilon: got 0.2 beside density 0.9 for model 0; at most 0.1"):
        planned("della", [header(ONE)], header(ONE), parameters=parameters)


def test_types_without_arithmetic_are_refused() -> None:
    with pytest.raises(CheckpointError, match=re.escape("tensor 'q' is F8_E4M3[2]; convert it to one of float64")):
        planned("linear", [header({"q": ("F8_E4M3", (2,))})])


def test_an_empty_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds no tensor"):
        planned("linear", [header({})])


def test_batch_norm_counts_take_the_largest_and_its_statistics_are_noted() -> None:
    specs: Specs = {"bn.num_batches_tracked": ("I64", ()), "bn.running_var": ("F32", (2,))}
    plan = planned("linear", [header(specs), header(specs)])
    assert [output.how for output in plan.outputs] == ["largest", "merge"]
    assert "BatchNorm statistics are merged like weights" in plan.notes[0]


def test_a_plan_of_files_reads_no_data(tmp_path: Path) -> None:
    from interfuse.checkpoints.writer import TensorWriter

    with TensorWriter(tmp_path / "m.safetensors", {"w": TensorSpec("F32", (3,))}) as writer:
        writer.append("w", np.ones(3, np.float32))
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").unlink()
    assert planned("linear", [checkpoint]).specs == {"w": TensorSpec("F32", (3,))}

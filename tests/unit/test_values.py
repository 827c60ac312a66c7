"""Parameters of one tensor: ramps, filters, levels, and what is malformed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse import merge
from interfuse.recipe import load_recipe
from interfuse.recipe.values import Scopes, matcher, plain, ramp, scalars, setting_problems

NAME = "model.layers.3.self_attn.q_proj.weight"


def resolve(option: str, levels: list[dict[str, Any]], name: str, t: float, default: Any = None) -> Any:
    return Scopes(*levels).resolve(option, name, t, default)


def test_a_ramp_is_linear_between_its_knots() -> None:
    assert [ramp((0, 0.5, 1), t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.25, 0.5, 0.75, 1]
    assert [ramp((1, 0, 4), t) for t in (0, 0.25, 0.5, 0.75, 1)] == [1, 0.5, 0, 2, 4]
    assert ramp((0.7,), 0.3) == 0.7
    assert ramp((0.1, 0.1), 1 / 3) == 0.1  # equal knots give themselves, to the last bit


def test_numpy_numbers_are_numbers() -> None:
    """In a recipe that is a mapping, and as an option of `merge`."""
    got = plain({"a": np.float32(0.5), "b": [np.int64(3), {"c": np.bool_(True)}], "d": np.array([1.0, 2.0]), "e": "x"})
    assert got == {"a": 0.5, "b": [3, {"c": True}], "d": [1.0, 2.0], "e": "x"}
    assert [type(value) for value in (got["a"], got["b"][0], got["b"][1]["c"])] == [float, int, bool]
    entry = {"model": "a/b", "parameters": {"weight": np.float32(0.5)}}
    recipe = load_recipe({"merge_method": "linear", "models": [entry], "seed": np.int64(3)})
    assert (recipe.models[0].parameters["weight"], recipe.seed) == (0.5, 3)
    models = [{"t": np.array([2.0], np.float32)}, {"t": np.array([4.0], np.float32)}]
    options: Any = {"density": np.float32(1), "lambda": np.float64(0.5), "weights": np.array([1, 1]), "seed": np.int64(1)}
    merged = merge("ties", models, base={"t": np.zeros(1, np.float32)}, **options)
    assert merged["t"] == [1.5]


def test_a_ramp_of_words_takes_steps() -> None:
    assert [ramp((True, False), t) for t in (0, 0.99, 1)] == [True, True, False]
    assert ramp(("a", "b", "c"), 0.5) == "b"


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_a_ramp_stays_between_its_knots(knots: list[float], t: float) -> None:
    value = ramp(tuple(knots), t)
    assert isinstance(value, int | float)
    assert min(knots) - 1e-9 <= value <= max(knots) + 1e-9


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("self_attn", True),
        ("layers.3.", True),
        ("mlp", False),
        ("*", True),
        ("*q_proj*", True),
        ("q_proj*", False),
        ("model.layers.?.*", True),
        ("/q_proj|k_proj/", True),
        ("/^q_proj/", False),
        (r"/layers\.[0-4]\./", True),
        ("/", False),
    ],
)
def test_a_filter_is_a_substring_a_glob_or_an_expression(pattern: str, matches: bool) -> None:
    assert matcher(pattern)(NAME) is matches


def test_the_first_match_wins_and_no_match_falls_through() -> None:
    source = {"weight": [{"filter": "mlp", "value": 1}, {"filter": "self_attn", "value": [0, 1]}]}
    top = {"weight": [{"filter": "q_proj", "value": 9}, {"value": 5}], "density": 0.5}
    assert resolve("weight", [source, {}, top], NAME, 0.5) == 0.5
    assert resolve("weight", [source, {}, top], "model.layers.0.mlp.up", 0.5) == 1
    assert resolve("weight", [source, {}, top], "model.norm.weight", 0.5) == 5
    assert resolve("density", [source, {}, top], NAME, 0.5) == 0.5
    assert resolve("gamma", [source, {}, top], NAME, 0.5, default=0.01) == 0.01


def test_a_falsy_value_is_a_value() -> None:
    assert resolve("weight", [{"weight": 0}, {"weight": 1}], NAME, 0) == 0
    assert resolve("rescale", [{"rescale": False}, {"rescale": True}], NAME, 0) is False


@pytest.mark.parametrize(
    ("setting", "path", "said"),
    [
        ([], "p", "at least one value"),
        (None, "p", "got None"),
        (float("nan"), "p", "got nan"),
        ([0, None], "p[1]", "got None"),
        ([0, "x"], "p", "values of one kind, not numbers and texts"),
        ([0, True], "p", "numbers and booleans"),
        ([[0, 1]], "p[0]", r"got [0, 1]"),
        ({"filter": "x"}, "p.value", "missing"),
        ({"filter": 3, "value": 1}, "p.filter", "got 3"),
        ({"filter": "", "value": 1}, "p.filter", "got ''"),
        ({"filter": "/(/", "value": 1}, "p.filter", "got '/(/'"),
        ({"filtre": "x", "value": 1}, "p.filtre", "did you mean 'filter'?"),
        ([{"filter": "x", "value": []}], "p[0].value", "got []"),
        ([{"filter": "x", "value": 1}, 0.5], "p[1]", "got 0.5; an entry is {filter, value}"),
        ([0.5, {"filter": "x", "value": 1}], "p[0]", "got 0.5"),
        ([{"value": 1}, {"filter": "x", "value": 1}], "p[1]", "never reached: p[0] matches every tensor"),
        ([{"value": {"a": 1}}], "p[0].value", "got {'a': 1}"),
    ],
)
def test_what_a_setting_refuses(setting: Any, path: str, said: str) -> None:
    found = {p.path: f"{p.wrong}; {p.allowed}" for p in setting_problems(setting, "p")}
    assert list(found) == [path]
    assert said in found[path]


@pytest.mark.parametrize(
    "setting", [0, 1.5, True, "max", [0, 1], [True, False], {"filter": None, "value": [1, 2]}, [{"filter": "a", "value": 1}]]
)
def test_sound_settings_have_no_problem(setting: Any) -> None:
    assert setting_problems(setting, "p") == []


def test_every_scalar_has_its_path() -> None:
    setting = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    assert list(scalars(setting, "p")) == [("p[0].value[0]", 0, True), ("p[0].value[1]", 1, True), ("p[1].value", 0.5, False)]
    assert list(scalars({"value": 2}, "p")) == [("p.value", 2, False)]
    assert list(scalars(["a", "b"], "p")) == [("p[0]", "a", False), ("p[1]", "b", False)]


def test_reading_is_fast() -> None:
    weight = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "*mlp*", "value": 0.3}, {"value": 1}]
    scopes = Scopes({"weight": weight}, {"density": 0.5, "lambda": [0.1, 0.9]})
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(100_000)]
    began = time.process_time()
    for name in names:
        for option in ("weight", "density", "lambda", "gamma"):
            scopes.resolve(option, name, 0.5, 0.0)
    assert time.process_time() - began < 2  # 0.3 s on an idle core; quadratic work would take hours

"""Plans in few words, and what they would take: names rolled up, values that turn, memory that doesn't grow with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.source import Checkpoint
from interfuse.engine.chain import LARGE, Planned
from interfuse.engine.estimate import _START, Estimate, estimate, room_for
from interfuse.plan import plan_merge
from interfuse.recipe import Recipe
from interfuse.recipe.pieces import references
from interfuse.report.outline import outline
from interfuse.report.plan import text
from interfuse.report.rollup import filled, spans, template, turns


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], "h.{0-2}.w"),
        (["h.10.w", "h.2.w", "h.3.w"], "h.{2-3,10}.w"),
        (["0.w", "1.w"], "{0-1}.w"),
        (["h.0.e.7.w", "h.1.e.7.w"], "h.{0-1}.e.7.w"),
        (["layer4.w"], "layer4.w"),
        (["a.{}.w"], "a.{}.w"),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: Sequence[str], said: str) -> None:
    found = list(map(template, names))
    assert len({name for name, _ in found}) == 1
    assert filled(found[0][0], [numbers for _, numbers in found]) == said


def test_numbers_and_values_in_few_words() -> None:
    assert spans([]) == ""
    assert spans([5, 1, 2, 2]) == "1-2,5"
    assert turns([1, 1.0]) == [1]
    assert turns([0, 0.5, 1, 1, 0.25, 0]) == [0, 1, 0]
    assert turns([3, 2, 1]) == [3, 1]
    assert turns(["a", "b", "a"]) == ["a", "b"]
    assert turns([True, False, True]) == [True, False]


def planned(method: str, shape: tuple[int, ...], tensors: int = 2, **recipe: Any) -> Planned:
    specs = {f"layers.{i}.w": TensorSpec("BF16", shape) for i in range(tensors)}
    given = {name: Checkpoint(name, specs, None, {}) for name in ("base", "a", "b")}
    read = Recipe.model_validate({"merge_method": method, "base_model": "base", "models": ["a", "b"], **recipe})
    checkpoints = {reference: given[str(reference)] for reference in references(read)}
    return Planned(read.name, plan_merge(read, checkpoints), list(checkpoints.values()))


def taken(*stages: Planned, threads: int = 2) -> Estimate:
    return estimate(stages, threads)


def test_memory_grows_with_matrices_and_threads_and_not_with_other_tensors() -> None:
    small, large = (taken(planned("ties", (side, side))) for side in (2048, 32768))
    assert large.memory == small.memory < 150_000_000
    assert large.seconds > 50 * (small.seconds - _START)
    one, four = (taken(planned("tsv_m", (2048, 2048)), threads=threads) for threads in (1, 4))
    assert four.memory - one.memory == 3 * (4 * 3 + 4) * 4 * 2048**2
    assert one.seconds - _START == pytest.approx(4 * (four.seconds - _START))


def test_large_tensors_of_earlier_recipes_take_room_on_the_disk_while_it_runs() -> None:
    first, last = planned("linear", (LARGE, 1), name="first"), planned("linear", (4, 4))
    assert room_for([last]) == 2 * (32 + 1000)
    assert room_for([first, last]) == room_for([last]) + 2 * 2 * LARGE
    assert room_for([]) == 0


def test_a_method_of_matrices_takes_the_mean_of_others_and_says_so() -> None:
    specs = {"w": TensorSpec("F32", (4, 4)), "b": TensorSpec("F32", (4,))}
    given = {name: Checkpoint(name, specs, None, {}) for name in ("base", "a")}
    read = Recipe.model_validate({"merge_method": "iso_c", "base_model": "base", "models": ["a"]})
    checkpoints = {reference: given[str(reference)] for reference in references(read)}
    lines = text(outline([(None, plan_merge(read, checkpoints), list(checkpoints.values()))])).splitlines()
    rows = [line.split("F32")[1].strip() for line in lines if " x " in line]
    assert rows == ["iso_c                base + 1", "iso_c, as the mean   base + 1"]


def test_ramps_are_read_in_the_order_of_numbers_not_of_files() -> None:
    order = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    specs = {f"layers.{i}.w": TensorSpec("F32", (2,)) for i in order}
    given = {name: Checkpoint(name, specs, None, {}) for name in ("a", "b")}
    entries = [{"model": "a", "parameters": {"weight": [0, 1]}}, {"model": "b", "parameters": {"weight": 1}}]
    read = Recipe.model_validate({"merge_method": "linear", "models": entries})
    checkpoints = {reference: given[str(reference)] for reference in references(read)}
    (row,) = outline([(None, plan_merge(read, checkpoints), list(checkpoints.values()))])["recipes"][0]["tensors"]
    assert (row["names"], row["count"]) == ("layers.{0-11}.w", 12)
    assert row["weight"] == [{"from_to": [0, 1]}, 1]

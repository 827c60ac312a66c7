"""The output's config: counts of layers, lists with an entry a layer, vocabulary and type."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from interfuse.checkpoints.config import changed, output_config

HEAD = "model.layers."


def run(
    config: dict[str, Any], picks: list[tuple[int, int]], *others: dict[str, Any], head: str = HEAD, before: int = 4
) -> tuple[dict[str, Any], list[str]]:
    return output_config([config, *others], 0, {head: picks}, {head: before})


def test_a_stack_as_it_was_leaves_the_config_alone() -> None:
    config = {"num_hidden_layers": 61, "layer_types": ["a"] * 61}  # and a 62nd layer in the file, for speculation
    picks = [(0, i) for i in range(62)]
    assert run(config, picks, before=62) == (config, [])


def test_the_count_and_every_list_with_an_entry_a_layer_are_rebuilt() -> None:
    config = {
        "architectures": ["X"],
        "num_hidden_layers": 4,
        "layer_types": ["s", "s", "s", "f"],
        "heads": [1, 2, 3, 4],
        "factor": [7, 7, 7, 7],
        "mrope_section": [1, 2, 3, 4],
        "mlp_only_layers": [0, 3],
        "sliding_window_pattern": 4,
    }
    other = {"num_hidden_layers": 4, "layer_types": ["o0", "o1", "o2", "o3"], "heads": [5, 6, 7, 8], "mlp_only_layers": [1]}
    before = copy.deepcopy(config)
    found, notes = run(config, [(0, 0), (0, 3), (1, 1), (1, 2), (0, 3)], other)
    assert config == before
    assert found == before | {
        "num_hidden_layers": 5,
        "layer_types": ["s", "f", "o1", "o2", "f"],
        "heads": [1, 4, 6, 7, 4],
        "mlp_only_layers": [0, 1, 2, 4],
    }
    assert notes == [
        "model.layers: 5 layers instead of 4 (num_hidden_layers)",
        "layer_types: an entry for each new layer",
        "heads: an entry for each new layer",
        "mlp_only_layers: the layers' new numbers",
        "sliding_window_pattern is 4, which may not hold for the new layers: check it",
    ]


def test_as_many_layers_as_before_are_no_news() -> None:
    assert run({"num_hidden_layers": 2}, [(0, 0), (1, 0)], {"num_hidden_layers": 2}, before=2) == ({"num_hidden_layers": 2}, [])
    assert run({"hidden_size": 8}, [(0, 0), (1, 0)], {}, before=2) == ({"hidden_size": 8}, [])


def test_equal_entries_of_a_list_named_for_layers_are_cut_too() -> None:
    found, _ = run({"num_hidden_layers": 2, "layer_types": ["f", "f"], "size": [1, 2]}, [(0, 1)], before=2)
    assert found == {"num_hidden_layers": 1, "layer_types": ["f"], "size": [1, 2]}


def test_a_list_that_one_model_lacks_is_said() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    found, notes = run(config, [(0, 0), (1, 0)], {"num_hidden_layers": 2}, before=2)
    assert found["layer_types"] == ["a", "b"]
    assert notes[-1] == "layer_types has an entry a layer, and not in every model: check it"


@pytest.mark.parametrize(
    ("config", "head", "changed"),
    [
        ({"n_layer": 4}, "h.", {"n_layer": 1}),
        ({"num_hidden_layers": 4}, "encoder.layer.", {"num_hidden_layers": 1}),
        ({"num_hidden_layers": 4}, "model.decoder.layers.", {"num_hidden_layers": 1}),
        ({"num_layers": 4, "num_decoder_layers": 4}, "encoder.block.", {"num_layers": 1}),
        ({"num_layers": 4, "num_decoder_layers": 4}, "decoder.block.", {"num_decoder_layers": 1}),
        (
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            "model.encoder.layers.",
            {"encoder_layers": 1, "num_hidden_layers": 1},
        ),
        (
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            "model.decoder.layers.",
            {"decoder_layers": 1},
        ),
    ],
)
def test_the_key_that_counts_is_found_by_the_stacks_name(config: dict[str, int], head: str, changed: dict[str, int]) -> None:
    assert run(config, [(0, 0)], head=head)[0] == config | changed


def test_sections_are_found_by_the_stacks_name() -> None:
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4, "num_hidden_layers": 4}}
    text, _ = run(config, [(0, 0)])
    assert text == {"text_config": {"num_hidden_layers": 1}, "vision_config": config["vision_config"]}
    vision, _ = run(config, [(0, 0)], head="visual.blocks.")
    assert vision == {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 1, "num_hidden_layers": 1}}


def test_a_stack_without_a_count_is_said() -> None:
    found, notes = run({"hidden_size": 8}, [(0, 0)])
    assert found == {"hidden_size": 8}
    assert notes == ["config.json has no number of layers for model.layers, which has 1 now"]
    _, notes = run({"num_hidden_layers": 3}, [(0, 0)])
    assert notes[0] == "config.json counts 3 layers in model.layers, and the weights have 4"


def test_vocabulary_and_type() -> None:
    config = {"vocab_size": 10, "dtype": "float32", "text_config": {"vocab_size": 10, "torch_dtype": "float32"}}
    found, notes = output_config([config], 0, {}, {}, vocabulary=(10, 12), dtype="torch.bfloat16")
    assert found == {"vocab_size": 12, "dtype": "bfloat16", "text_config": {"vocab_size": 12, "torch_dtype": "bfloat16"}}
    assert notes == ["vocab_size is 12, 10 before"] * 2
    assert output_config([None], 0, {}, {}, dtype="float16") == ({"torch_dtype": "float16"}, [])


@pytest.mark.parametrize(
    ("config", "made"),
    [
        ({"vocab_size": 2}, {"vocab_size": 8}),
        ({"vocab_size": 1}, {"vocab_size": 8}),
        ({"text": {"vocab_size": 2}, "image": {"vocab_size": 9}}, {"text": {"vocab_size": 8}, "image": {"vocab_size": 9}}),
        ({"a": {"b": {"vocab_size": 2}}}, {"a": {"b": {"vocab_size": 8}}}),
        ({"width": 3}, {"width": 3, "vocab_size": 8}),
    ],
)
def test_the_vocabulary_s_size_wherever_it_is(config: dict[str, Any], made: dict[str, Any]) -> None:
    assert output_config([config], 0, {}, {}, vocabulary=(2, 8))[0] == made
    assert output_config([{"width": 3}], 0, {}, {}, vocabulary=(8, 8)) == ({"width": 3}, [])


def test_entries_are_changed_where_they_are() -> None:
    config = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
    assert changed(config, {"a": 5, "b": {"c": None}}) == {"a": 5, "b": {"d": 3}, "e": None}
    assert config["b"] == {"c": 2, "d": 3}

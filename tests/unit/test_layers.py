"""Layers from names: real naming schemes, nested numbers, both sides, and depth."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interfuse.checkpoints.layers import Place, config_counts, find_layers, side


def stacks(names: list[str]) -> dict[str, int]:
    return {stack.head: stack.count for stack in find_layers(names).stacks}


LLAMA = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}" for i in (10, 11, *range(10)) for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    "model.norm.weight",
]


def test_a_language_model_has_one_stack_whatever_the_stored_order() -> None:
    found = find_layers(LLAMA)
    assert stacks(LLAMA) == {"model.layers.": 12}
    assert list(found.places) == LLAMA
    place = found.places["model.layers.10.mlp.up_proj.weight"]
    assert (place.layer, place.tail, place.side) == (10, ".mlp.up_proj.weight", None)
    assert place.depth() == 10 / 11
    assert found.places["lm_head.weight"] == Place(None, 0, "lm_head.weight", "after")
    assert found.places["model.embed_tokens.weight"].side == "before"
    assert found.tails["model.layers."][2] == {
        ".self_attn.q_proj.weight": "model.layers.2.self_attn.q_proj.weight",
        ".mlp.up_proj.weight": "model.layers.2.mlp.up_proj.weight",
    }


def test_depth_is_1_after_the_layers_and_0_there_as_mergekit_has_it() -> None:
    places = find_layers(LLAMA).places
    assert [places[name].depth() for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [0, 1, 1]
    assert places["model.norm.weight"].depth(compat=True) == 0
    assert [places[f"model.layers.{i}.mlp.up_proj.weight"].depth(compat=True) for i in (0, 11)] == [0, 1]
    assert find_layers(["h.0.ln_1.weight"]).places["h.0.ln_1.weight"].depth() == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.experts.1.w1"], {"model.layers.": 1}),
        ([f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(3) for e in range(8)], {"model.layers.": 3}),
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "fc.weight"], {"layer": 2}),
        (["features.0.0.w", "features.1.conv.0.w", "features.1.conv.1.w", "classifier.1.w"], {"features.": 2}),
        (["features.0.w", "features.3.w", "features.6.b", "classifier.0.w", "classifier.3.w"], {"features.": 3}),
        (["0.weight", "2.weight", "4.weight"], {"": 3}),
        (["0.bert.encoder.layer.0.w", "0.bert.encoder.layer.1.w"], {"0.bert.encoder.layer.": 2}),
        (["encoder.block.0.layer.0.q", "encoder.block.0.layer.1.w", "block.0.layer.0.q"], {"encoder.block.": 1, "block.": 1}),
        (["vision.layers.0.w", "vision.layers.1.w", "lm.layers.0.w"], {"vision.layers.": 2, "lm.layers.": 1}),
        (["stem.0.weight", "stem.1.weight", "stages.0.blocks.0.w", "stages.0.blocks.1.w"], {"stages.": 1}),
        (["down_blocks.0.resnets.0.w", "down_blocks.0.resnets.1.w", "down_blocks.1.resnets.0.w"], {"down_blocks.": 2}),
        (["model.layers.1.w", "model.layers.2.w"], {}),  # half a model, cut for a pipeline: where it begins isn't known
        (["fc1.weight", "fc2.weight", "conv1.weight"], {}),
        (["mix.0.weight"], {}),
        ([], {}),
    ],
)  # fmt: skip
def test_the_outermost_number_that_repeats_counts_the_layers(names: list[str], expected: dict[str, int]) -> None:
    assert stacks(names) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("embeddings.LayerNorm.weight", "bert.embeddings.word_embeddings.weight", "model.embed_tokens.weight", "wte.weight"),
        *("transformer.wpe.weight", "shared.weight", "conv1.weight", "bn1.running_mean", "vit.embeddings.cls_token"),
        *("vision_model.pre_layrnorm.weight", "patch_embed.proj.weight", "pos_embed", "word_embeddings_layernorm.weight"),
        *("visual.ln_pre.weight", "encoder.layernorm_embedding.weight", "features.conv_stem.weight", "conv_in.weight"),
    ],
)
def test_before_the_layers(name: str) -> None:
    assert side(name) == "before"


@pytest.mark.parametrize(
    "name",
    [
        *("lm_head.weight", "model.norm.weight", "ln_f.bias", "transformer.ln_f.weight", "fc.weight", "classifier.3.weight"),
        *("bert.pooler.dense.weight", "cls.predictions.decoder.weight", "score.weight", "embed_out.weight", "heads.head.bias"),
        *("vision_model.post_layernorm.weight", "text_projection.weight", "final_layer_norm.weight", "qa_outputs.bias"),
        *("decoder.final_layer_norm.weight", "vit.layernorm.weight", "model.decoder.layer_norm.weight", "logit_scale"),
    ],
)
def test_after_the_layers(name: str) -> None:
    assert side(name) == "after"


def test_counts_in_a_config_have_their_path() -> None:
    config = {"num_hidden_layers": 2, "vision_config": {"depth": 3, "depths": [1]}, "depth": True, "extra": {"n_layer": 1}}
    assert config_counts(config) == {("num_hidden_layers",): 2, ("vision_config", "depth"): 3}
    assert config_counts(None) == {}


@given(st.lists(st.sampled_from([*LLAMA, "a.0", "a.1", "b0.0", "b1.0", "0", "1.0", "x"]), unique=True))
@settings(deadline=None, max_examples=50)
def test_every_name_is_its_stack_layer_and_tail_again(names: list[str]) -> None:
    for name, place in find_layers(names).places.items():
        rebuilt = place.tail if place.stack is None else f"{place.stack.head}{place.stack.numbers[place.layer]}{place.tail}"
        assert rebuilt == name
        assert 0 <= place.depth() <= 1


def test_it_is_linear() -> None:
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.w1.weight" for i in range(100_000)]
    began = time.process_time()
    assert stacks(names) == {"model.layers.": 1000}
    assert time.process_time() - began < 5  # 0.4 s on an idle core

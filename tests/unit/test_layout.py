"""Layouts: which tensors meet, at which depth, under which parameters; and what doesn't fit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from interfuse.checkpoints.header import TensorSpec
from interfuse.layout import Header, Layout, Slot, layout
from interfuse.recipe.pieces import references
from interfuse.recipe.references import Reference
from interfuse.recipe.schema import Recipe

SPEC = TensorSpec("F32", (4, 4))


def net(layers: int, *more: str, prefix: str = "", head: bool = True) -> list[str]:
    inner = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("attn", "mlp")]
    names = ["model.embed_tokens.weight", *inner, "model.norm.weight", *(["lm_head.weight"] if head else []), *more]
    return [prefix + name for name in names]


def header(names: Iterable[str], config: Mapping[str, Any] | None = None) -> Header:
    return Header(dict.fromkeys(names, SPEC), config)


def laid(recipe: dict[str, Any], headers: Mapping[str, Header], **options: Any) -> Layout:
    parsed = Recipe.model_validate({"merge_method": "linear"} | recipe)
    return layout(parsed, {ref: headers[str(ref)] for ref in references(parsed)}, **options)


def sound(recipe: dict[str, Any], headers: Mapping[str, Header], **options: Any) -> dict[str, Slot]:
    found = laid(recipe, headers, **options)
    assert found.problems == ()
    slots = {slot.name: slot for slot in found.slots}
    assert len(slots) == len(found.slots)
    return slots


def wrong(recipe: dict[str, Any], headers: Mapping[str, Header]) -> list[str]:
    return [str(problem) for problem in laid(recipe, headers).problems]


def span(model: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, end]} | more


def test_models_meet_by_name_in_the_bases_order() -> None:
    heads = {"a": header(reversed(net(3))), "b": header(net(3)), "base": header(net(3))}
    recipe = {
        "base_model": "base",
        "models": ["a", {"model": "b", "parameters": {"weight": [0, 1]}}],
        "parameters": {"weight": 5},
    }
    slots = sound(recipe, heads)
    assert list(slots) == net(3)
    slot = slots["model.layers.1.mlp.weight"]
    assert (slot.names, slot.base, slot.t) == ((slot.name, slot.name), slot.name, 0.5)
    assert slot.group.sources == (Reference("a"), Reference("b"))
    assert (slot.group.base, slot.group.base_at, slot.group.copied) == (Reference("base"), None, False)
    weights = [scope.resolve("weight", name, slot.t) for scope, name in zip(slot.group.scopes, slot.names, strict=True)]
    assert weights == [5, 0.5]
    assert slot.group.shared.resolve("weight", slot.name, slot.t) == 5
    assert [slots[name].t for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [0, 1, 1]


def test_compat_has_depth_0_after_the_layers() -> None:
    slots = sound({"models": ["a"]}, {"a": header(net(2))}, compat=True)
    assert [slots[name].t for name in ("lm_head.weight", "model.layers.1.mlp.weight")] == [0, 1]


def test_a_base_among_the_models_is_found() -> None:
    heads = {"a": header(net(2)), "b": header(net(2))}
    slot = sound({"base_model": "b", "models": ["a", "b"]}, heads)["lm_head.weight"]
    assert (slot.group.base_at, slot.names, slot.base) == (1, ("lm_head.weight",) * 2, "lm_head.weight")
    assert sound({"models": ["a", "b"]}, heads)["lm_head.weight"].base is None


def test_prefixes_are_resolved_and_noted() -> None:
    heads = {"a": header(net(2)), "b": header(net(2, prefix="module.")), "c": header(n.removeprefix("model.") for n in net(2))}
    found = laid({"models": ["a", "b", "c"]}, heads)
    assert found.problems == ()
    assert found.notes == (
        "models[1] (b): the prefix 'module.' of its names is left out",
        "models[2] (c): its names are read with the prefix 'model.'",
    )
    slot = next(slot for slot in found.slots if slot.name == "model.norm.weight")
    assert slot.names == ("model.norm.weight", "module.model.norm.weight", "norm.weight")


def test_what_one_model_lacks_or_has_beyond_the_others_is_listed() -> None:
    heads = {"a": header(net(2)), "b": header([*net(2)[1:], "score.weight"])}
    assert wrong({"models": ["a", "b"]}, heads) == [
        "models[1] (b): tensor 'model.embed_tokens.weight' is missing; unlike models[0] (a): give models of one architecture, "
        "or name the tensors under `drop` or `keep`",
        "models[1] (b): tensor 'score.weight' is extra; models[0] (a) has none: give models of one architecture, "
        "or name the tensors under `drop` or `keep`",
    ]


def test_models_of_another_depth_are_one_problem() -> None:
    heads = {"a": header(net(6)), "b": header(net(3))}
    assert wrong({"models": ["a", "b"]}, heads) == [
        "models[1] (b): has 3 layers in model.layers, and models[0] (a) has 6; give models of one depth, or ranges of their "
        "layers as `slices`"
    ]


def test_drop_and_keep() -> None:
    heads = {
        "a": header([*net(2), "score.weight", "position_ids"]),
        "b": header([*net(2), "position_ids", "a.bias"]),
    }
    recipe = {"models": ["a", "b"], "drop": ["position_ids"], "keep": ["score", "a.bias", "*embed*"]}
    slots = sound(recipe, heads)
    assert list(slots) == [*net(2), "score.weight", "a.bias"]
    kept = {name: slot.group.sources for name, slot in slots.items() if slot.group.copied}
    a, b = (Reference("a"),), (Reference("b"),)
    assert kept == {"model.embed_tokens.weight": a, "score.weight": a, "a.bias": b}
    assert wrong(recipe | {"drop": ["position_ids", "nothing"]}, heads) == [
        "drop[1]: 'nothing' matches no tensor; correct it or remove it"
    ]


def test_kept_tensors_come_from_the_base() -> None:
    heads = {"a": header(net(2)), "base": header(net(2))}
    slot = sound({"models": ["a"], "base_model": "base", "keep": ["lm_head"]}, heads)["lm_head.weight"]
    assert (slot.group.copied, slot.group.sources) == (True, (Reference("base"),))


def test_a_kept_tensor_that_is_tied_is_read_from_no_other_model() -> None:
    heads = {"a": header(net(2, head=False), {"model_type": "llama"}), "base": header(net(2), {"model_type": "llama"})}
    found = laid({"models": ["a"], "base_model": "base", "keep": ["lm_head"]}, heads)
    slot = next(slot for slot in found.slots if slot.name == "lm_head.weight")
    assert (found.problems, found.notes, slot.group.sources) == ((), (), (Reference("base"),))


def test_a_tied_output_layer_may_be_in_one_file_alone() -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    full, small = header(net(2), config), header(net(2, head=False), config)
    slots = sound({"models": ["full", "small"]}, {"full": full, "small": small})
    assert slots["lm_head.weight"].names == ("lm_head.weight", "model.embed_tokens.weight")
    found = laid({"models": ["small", "full"]}, {"full": full, "small": small})
    assert found.problems == ()
    assert "lm_head.weight" not in [slot.name for slot in found.slots]
    assert found.notes == ("models[1] (full): 'lm_head.weight' is tied to the embedding and left out",)
    untied = header(net(2), {"model_type": "llama", "tie_word_embeddings": False})
    assert "tensor 'lm_head.weight' is extra" in wrong({"models": ["small", "x"]}, {"small": small, "x": untied})[0]


def test_slices_are_stacked_and_numbered_on() -> None:
    heads = {"a": header(net(4)), "b": header(net(6))}
    recipe = {
        "slices": [
            {"sources": [span("a", 0, 2)]},
            {"sources": [span("b", 3, 6, parameters={"scale": 2}), span("a", 1, 4)], "parameters": {"scale": 3}},
        ]
    }
    found = laid(recipe, heads)
    assert found.problems == ()
    assert [slot.name for slot in found.slots] == net(5)
    slots = {slot.name: slot for slot in found.slots}
    assert slots["model.layers.2.mlp.weight"].names == ("model.layers.3.mlp.weight", "model.layers.1.mlp.weight")
    assert [slots[f"model.layers.{i}.attn.weight"].t for i in range(5)] == [0, 1, 0, 0.5, 1]
    assert slots["model.embed_tokens.weight"].group.sources == (Reference("a"),)
    assert slots["lm_head.weight"].group.sources == (Reference("b"), Reference("a"))
    group = slots["model.norm.weight"].group
    assert [scope.resolve("scale", "x", 0) for scope in group.scopes] == [2, 3]
    a, b = Reference("a"), Reference("b")
    assert found.layers == {"model.layers.": ((a, 0), (a, 1), (b, 3), (b, 4), (b, 5))}
    assert {head: len(picks) for head, picks in found.layers.items()} == {"model.layers.": 5}


def test_a_single_layer_has_depth_1() -> None:
    slots = sound({"slices": [{"sources": [span("a", 2, 3)]}]}, {"a": header(net(4))})
    assert slots["model.layers.0.mlp.weight"].t == 1
    assert slots["model.layers.0.mlp.weight"].names == ("model.layers.2.mlp.weight",)


def test_a_slices_base_is_its_own_the_sources_or_the_recipes() -> None:
    heads = {name: header(net(4)) for name in "abc"}
    own = {"base_model": "a", "slices": [{"sources": [span("b", 1, 3)], "base_model": "c"}, {"sources": [span("a", 0, 1)]}]}
    slots = sound(own, heads)
    first, second = slots["model.layers.0.mlp.weight"], slots["model.layers.2.mlp.weight"]
    assert (first.group.base, first.group.base_at, first.base) == (Reference("c"), None, "model.layers.1.mlp.weight")
    assert (second.group.base, second.group.base_at, second.base) == (Reference("a"), 0, "model.layers.0.mlp.weight")
    uneven = {"base_model": "c", "slices": [{"sources": [span("a", 0, 2), span("b", 2, 4)]}]}
    assert wrong(uneven, heads) == [
        "slices[0].sources: the base isn't among the sources, which have the layers [0, 2] and [2, 4]; "
        "give the base as a source with a layer_range"
    ]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([span("a", 0, 5)], "slices[0].sources[0].layer_range: got [0, 5], and a has 4 layers; at most [0, 4]"),
        ([span("a", 2, 2)], "slices[0].sources[0].layer_range: got [2, 2]; the first layer and the one after the last"),
        ([span("a", 0, 2), span("b", 0, 3)], "slices[0].sources: have [2, 3] layers; as many in each source of a slice"),
        ([span("flat", 0, 1)], "slices[0].sources[0] (flat): no layers are found in it; give `models`"),
        (
            [span("two", 0, 1)],
            "slices[0].sources[0] (two): has 2 stacks of layers: encoder.layers, decoder.layers; give `modules`",
        ),
        ([span("holes", 0, 1)], "slices[0].sources[0] (holes): its layers have the numbers 0, 3; give `models`"),
        ([span("a", 0, 1), span("other", 0, 1)], "slices[0].sources[1] (other): has no layers named model.layers"),
    ],
)
def test_what_slices_refuse(sources: list[dict[str, Any]], said: str) -> None:
    heads = {
        "a": header(net(4)),
        "b": header(net(4)),
        "flat": header(["x.weight", "y.weight"]),
        "two": header([f"{part}.layers.{i}.w" for part in ("encoder", "decoder") for i in range(2)]),
        "holes": header(["features.0.weight", "features.3.weight"]),
        "other": header([f"h.{i}.w" for i in range(2)]),
    }
    found = wrong({"slices": [{"sources": sources}]}, heads)
    assert said in found[0]


def test_layers_that_differ_within_a_model_are_listed() -> None:
    heads = {"a": header(net(2, "model.layers.1.extra.weight"))}
    recipe = {"slices": [{"sources": [span("a", 0, 1), span("a", 1, 2)]}]}
    assert "slices[0].sources[1] (a): tensor 'model.layers.1.extra.weight' is extra" in wrong(recipe, heads)[0]


VISION = [
    *("visual.patch_embed.proj.weight", *(f"visual.blocks.{i}.w" for i in range(3)), "visual.merger.mlp.0.weight"),
    *net(2),
]


def test_modules_are_merged_on_their_own_and_the_rest_is_taken_from_the_base() -> None:
    heads = {"a": header(VISION), "b": header(VISION), "base": header(VISION)}
    recipe = {
        "base_model": "base",
        "modules": {
            "text_decoder": {"slices": [{"sources": [span("a", 0, 2)]}, {"sources": [span("b", 1, 2)]}]},
            "vision_tower": {"models": ["b"], "parameters": {"weight": 2}},
        },
        "parameters": {"weight": 1},
    }
    found = laid(recipe, heads)
    assert found.problems == ()
    slots = {slot.name: slot for slot in found.slots}
    assert sorted(slots) == sorted([*VISION, "model.layers.2.attn.weight", "model.layers.2.mlp.weight"])
    assert slots["model.layers.2.mlp.weight"].group.sources == (Reference("b"),)
    tower = slots["visual.blocks.1.w"]
    assert (tower.group.sources, tower.t) == ((Reference("b"),), 0.5)
    assert tower.group.scopes[0].resolve("weight", tower.name, 0) == 2
    merger = slots["visual.merger.mlp.0.weight"]
    assert (merger.group.copied, merger.group.sources) == (True, (Reference("base"),))
    assert found.notes == ("1 tensors are in none of the modules; they are taken from base",)
    assert {head: len(picks) for head, picks in found.layers.items()} == {"model.layers.": 3, "visual.blocks.": 3}


def test_modules_are_found_by_prefix_or_by_the_last_part_of_one() -> None:
    names = [f"model.{part}.layers.{i}.w" for part in ("encoder", "decoder") for i in range(2)]
    heads = {"a": header(names), "b": header(names)}
    for encoder in ("encoder", "model.encoder"):
        slots = sound({"modules": {encoder: {"models": ["b"]}, "default": {"models": ["a"]}}}, heads)
        sources = {name: slot.group.sources[0].path for name, slot in slots.items()}
        assert sources == {name: "b" if "encoder" in name else "a" for name in names}
    assert "modules.encodr: no tensor is in it; did you mean" in wrong({"modules": {"encodr": {"models": ["b"]}}}, heads)[0]
    overlap = {"modules": {"model": {"models": ["a"]}, "encoder": {"models": ["b"]}}}
    assert "modules.encoder: 'model.encoder.layers.0.w' is in model too" in wrong(overlap, heads)[0]


@pytest.mark.parametrize("part", ["unet", "unet/", "unet/mid", "mid"])
def test_a_module_may_be_a_sub_folder(part: str) -> None:
    names = ["unet/mid.0.w", "unet/mid.1.w", "vae/top.0.w"]
    slots = sound({"modules": {part: {"models": ["b"]}, "default": {"models": ["a"]}}}, {n: header(names) for n in "ab"})
    assert [name for name, slot in slots.items() if slot.group.sources == (Reference("b"),)] == names[:2]


def test_a_module_may_be_one_layer() -> None:
    heads = {"a": header(net(12)), "b": header(net(12))}
    slots = sound({"modules": {"model.layers.1": {"models": ["b"]}, "default": {"models": ["a"]}}}, heads)
    assert {name for name, slot in slots.items() if slot.group.sources == (Reference("b"),)} == {
        "model.layers.1.attn.weight",
        "model.layers.1.mlp.weight",
    }
    assert slots["model.layers.1.mlp.weight"].t == 1 / 11


def test_filters_that_match_nothing_are_noted() -> None:
    heads = {"a": header(net(2)), "b": header(net(2, prefix="model."))}
    weight = [{"filter": "slef_attn", "value": 1}, {"filter": "model.model.*", "value": 2}, {"filter": "mlp", "value": 3}]
    models = ["a", {"model": "b", "parameters": {"weight": weight}}]
    found = laid({"models": models, "parameters": {"normalize": {"filter": "/attm$/", "value": True}}}, heads)
    assert found.problems == ()
    assert found.notes[1:] == (
        "models[1].parameters.weight[0].filter: 'slef_attn' matches no tensor",
        "parameters.normalize.filter: '/attm$/' matches no tensor",
    )


def test_an_empty_model_is_said() -> None:
    assert wrong({"models": ["a"]}, {"a": header([])})[0] == "models[0]: a holds no tensor; give a checkpoint with weights"


def test_it_is_linear() -> None:
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.w1.weight" for i in range(100_000)]
    heads = {name: header(names) for name in "abcd"}
    recipe = Recipe.model_validate({"merge_method": "linear", "base_model": "d", "models": list("abc")})
    given = {ref: heads[str(ref)] for ref in references(recipe)}
    began = time.process_time()
    assert len(layout(recipe, given).slots) == 100_000
    assert time.process_time() - began < 8  # 0.6 s on an idle core

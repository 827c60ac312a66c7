"""Vocabularies: each output row comes from where the rules say, block by block, and what doesn't fit is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.places import LocalFile, Stored
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.checkpoints.tensors import to_tensor
from interfuse.checkpoints.tokenizers import embedding
from interfuse.checkpoints.tokenizers.choice import TokenRule, read_choice, reference_text
from interfuse.checkpoints.tokenizers.embedding import Fill, embedding_rows, vocabulary_tensors, with_vocabulary
from interfuse.checkpoints.tokenizers.vocabulary import Vocabulary, vocabulary
from interfuse.errors import CheckpointError, RecipeError

WORDS = {"base": ["a", "b", "c"], "one": ["a", "c", "x", "y"], "two": ["c", "b", "y", "z"]}


def put(folder: Path, words: Sequence[str], added: Sequence[str] = (), **config: Any) -> Path:
    folder.mkdir()
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.add_tokens(list(added))
    made.save(str(folder / "tokenizer.json"))
    for name, values in config.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path | None]:
    return {name: put(tmp_path / name, words) for name, words in WORDS.items()}


SIZES = {"base": 4, "one": 5, "two": 5}


def embeddings(sizes: Mapping[str, int] = SIZES, dtype: torch.dtype = torch.float32) -> dict[str, Checkpoint]:
    """One tensor a model: row `i` of the first is 1i, 1i; of the second 2i, 2i; of the third 3i, 3i."""
    made = {}
    for number, (name, size) in enumerate(sizes.items(), 1):
        weight = torch.arange(size, dtype=torch.float32)[:, None].expand(size, 2) * 1.0 + 10 * number
        made[name] = replace(open_checkpoint({"embed_tokens.weight": weight.to(dtype)}), name=name)
    return made


def column(found: Vocabulary, model: str, checkpoints: dict[str, Checkpoint] | None = None) -> list[float]:
    """The output's embedding of a model, one number a row."""
    checkpoints = checkpoints or embeddings()
    fill = Fill(found.donors, found.zero, checkpoints)
    out = with_vocabulary(checkpoints[model], found.rows[model], fill, ["embed_tokens.weight"])
    spec = out.specs["embed_tokens.weight"]
    values = to_tensor(out.read("embed_tokens.weight"), spec.dtype).float().numpy()
    assert values.shape == spec.shape == (found.size, 2)
    assert (values[:, 0] == values[:, 1]).all()
    return values[:, 0].tolist()


# Rows


def test_base_gives_each_model_the_base_s_tokens(folders: dict[str, Path | None]) -> None:
    found = vocabulary("base", folders, "base", SIZES)
    assert found.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert found.files == {"tokenizer.json": (folders["base"] or Path()).joinpath("tokenizer.json").read_bytes()}
    assert column(found, "base") == [10, 11, 12, 13]
    assert column(found, "one") == [20, 21, 12, 22]  # b is the base's
    assert column(found, "two") == [30, 11, 32, 31]  # a is the base's
    assert found.notes == (
        "the output has 4 tokens in 4 rows",
        "one: 5 rows become 4: 3 its own, 1 from base (e.g. 'b')",
        "one: 2 of its tokens aren't in the output, e.g. 'x'",
        "two: 5 rows become 4: 3 its own, 1 from base (e.g. 'a')",
        "two: 2 of its tokens aren't in the output, e.g. 'y'",
    )


def test_union_fills_from_the_base_the_sole_owner_or_the_owners_mean(folders: dict[str, Path | None]) -> None:
    found = vocabulary("union", folders, "base", SIZES)
    assert list(found.tokens) == ["<unk>", "a", "b", "c", "x", "y", "z"]
    assert column(found, "base") == [10, 11, 12, 13, 23, (24 + 33) / 2, 34]
    assert column(found, "one") == [20, 21, 12, 22, 23, 24, 34]
    assert column(found, "two") == [30, 11, 32, 31, 23, 33, 34]
    assert found.notes == (
        "the output has 7 tokens in 7 rows",
        "base: 4 rows become 7: 4 its own, 1 from one (e.g. 'x'), 1 the mean of one and two (e.g. 'y'), 1 from two (e.g. 'z')",
        "one: 5 rows become 7: 5 its own, 1 from base (e.g. 'b'), 1 from two (e.g. 'z')",
        "two: 5 rows become 7: 5 its own, 1 from base (e.g. 'a'), 1 from one (e.g. 'x')",
    )


def test_what_becomes_of_rows_is_said_by_where_they_come_from(folders: dict[str, Path | None]) -> None:
    tokens = {"a": {"force": True, "source": {"kind": "zero"}}, "new": {}}
    found = vocabulary({"source": "base", "tokens": tokens, "pad_to_multiple_of": 7}, folders, "base", SIZES)
    assert found.notes[:2] == (
        "the output has 5 tokens in 7 rows",
        "base: 4 rows become 7: 3 its own, 1 zeros (e.g. 'a'), 3 the mean of its others (e.g. 'new')",
    )
    other = vocabulary(
        {"source": "one", "pad_to_multiple_of": 1}, {"base": folders["base"], "one": folders["one"]}, None, SIZES
    )
    gone = "base: 1 of its tokens aren't in the output, e.g. 'b'"
    assert other.notes[1:3] == ("base: 4 rows become 5: 3 its own, 2 from one (e.g. 'x')", gone)
    fewer = vocabulary("base", {"base": folders["base"]}, None, {"base": 9})
    assert fewer.notes == ("the output has 4 tokens in 9 rows",)
    cut = vocabulary({"source": "base", "pad_to_multiple_of": 1}, {"base": folders["base"]}, None, {"base": 9})
    assert cut.notes == ("the output has 4 tokens in 4 rows", "base: 9 rows become 4: 4 its own")


def test_without_a_base_the_first_gives_the_tokenizer_and_the_owners_the_rows(folders: dict[str, Path | None]) -> None:
    found = vocabulary("base", folders, None, SIZES)
    assert list(found.tokens) == ["<unk>", "a", "b", "c"]
    assert column(found, "one") == [20, 21, (12 + 32) / 2, 22]


def test_a_model_s_tokenizer_by_name_and_by_folder(folders: dict[str, Path | None], tmp_path: Path) -> None:
    for ref in ("one", str(folders["one"]), f"{tmp_path}/two/../one", {"model": {"path": "one"}}):
        found = vocabulary({"source": ref}, folders, "base", SIZES)
        assert list(found.tokens) == ["<unk>", "a", "c", "x", "y"]
        assert column(found, "base") == [10, 11, 13, 23, (24 + 33) / 2]


def test_a_tokenizer_from_elsewhere(folders: dict[str, Path | None], tmp_path: Path) -> None:
    other = put(tmp_path / "other", ["z", "new"], config={"vocab_size": 6})
    found = vocabulary(str(other), folders, "base", SIZES)
    bare = "every model: 1 of the output's tokens have no row anywhere and get the mean of the others, e.g. 'new'"
    assert bare in found.notes
    assert found.tokens == {"<unk>": 0, "z": 1, "new": 2}
    assert found.size == 6  # as its config says: three rows of padding
    assert column(found, "base") == [10, 34, 22, 22, 22, 22]
    assert (
        "every model: 1 of the output's tokens have no row anywhere and get the mean of the others, e.g. 'new'" in found.notes
    )


def test_rules_for_tokens_are_mergekit_s(folders: dict[str, Path | None]) -> None:
    tokens = {
        "a": {"source": "one", "force": True},
        "b": {"source": {"kind": "zero"}},
        "c": {"source": {"kind": "model_token", "model": "two", "token": "z"}, "force": True},
        "<unk>": {"source": {"kind": "model_token", "model": "one", "token_id": 4}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "base", "token": "a"}},
        "<nul>": {"source": {"kind": "zero"}, "force": True},
    }
    found = vocabulary({"source": "base", "tokens": tokens}, folders, "base", SIZES)
    assert list(found.tokens) == ["<unk>", "a", "b", "c", "<new>", "<nul>"]
    assert column(found, "base") == [24, 21, 12, 34, 11, 0]
    assert column(found, "one") == [24, 21, 0, 34, 11, 0]
    assert column(found, "two") == [24, 21, 32, 34, 11, 0]
    assert Tokenizer.from_str(found.files["tokenizer.json"].decode()).get_vocab() == found.tokens


def test_a_forced_token_without_source_is_the_default_everywhere(folders: dict[str, Path | None]) -> None:
    found = vocabulary({"source": "base", "tokens": {"c": {"force": True}, "b": {}}}, folders, "base", SIZES)
    assert [column(found, model)[3] for model in SIZES] == [13, 13, 13]
    bare = vocabulary({"source": "base", "tokens": {"c": {"force": True}}}, folders, None, SIZES)
    assert [column(bare, model)[3] for model in SIZES] == [22, 22, 22]


def test_a_token_that_nobody_has_is_the_mean_of_the_others(folders: dict[str, Path | None]) -> None:
    found = vocabulary({"source": "base", "tokens": {"<new>": {}}}, folders, "base", SIZES)
    assert column(found, "base") == [10, 11, 12, 13, 11.5]
    assert column(found, "one") == [20, 21, 12, 22, 18.75]


def test_padding_to_a_multiple_is_the_mean_as_in_mergekit(folders: dict[str, Path | None]) -> None:
    found = vocabulary({"source": "base", "pad_to_multiple_of": 6}, folders, "base", SIZES)
    assert found.size == 6
    assert column(found, "base") == [10, 11, 12, 13, 11.5, 11.5]


def test_padding_rows_that_models_have_are_kept(tmp_path: Path) -> None:
    sizes = {"base": 6, "one": 6, "two": 5}
    folders: dict[str, Path | None] = {name: put(tmp_path / name, ["a", "b"]) for name in sizes}
    found = vocabulary("base", folders, "base", sizes)
    checkpoints = embeddings(sizes)
    assert found.size == 6
    assert (found.rows["base"] == np.arange(6)).all()
    assert column(found, "one", checkpoints) == [20, 21, 22, 23, 24, 25]
    assert column(found, "two", checkpoints) == [30, 31, 32, 33, 34, 15]
    cut = vocabulary({"source": "base", "pad_to_multiple_of": 1}, folders, "base", sizes)  # mergekit's size
    assert column(cut, "one", checkpoints) == [20, 21, 22]
    assert column(vocabulary({"pad_to_multiple_of": 4}, folders, "base", sizes), "one", checkpoints) == [20, 21, 22, 23]


def test_new_tokens_take_the_place_of_padding(tmp_path: Path) -> None:
    folders: dict[str, Path | None] = {"base": put(tmp_path / "base", ["a"]), "one": put(tmp_path / "one", ["a"], ["<x>"])}
    found = vocabulary("union", folders, "base", {"base": 4, "one": 4})
    assert found.tokens["<x>"] == 2
    assert column(found, "base", embeddings({"base": 4, "one": 4})) == [10, 11, 22, 13]


def test_a_token_beyond_the_embedding_has_no_row(tmp_path: Path) -> None:
    folders: dict[str, Path | None] = {"base": put(tmp_path / "base", ["a"], ["<pad>"]), "one": put(tmp_path / "one", ["a"])}
    sizes = {"base": 2, "one": 2}
    found = vocabulary("base", folders, "base", sizes)
    assert found.size == 3
    assert column(found, "base", embeddings(sizes)) == [10, 11, 10.5]
    assert "base: 1 of its tokens have no row in its embedding, e.g. '<pad>'" in found.notes


def test_a_model_without_tokenizer_has_the_base_s(folders: dict[str, Path | None]) -> None:
    for folder in (None, (folders["two"] or Path()).parent):
        found = vocabulary("one", {**folders, "two": folder}, "base", {**SIZES, "two": 4})
        assert "two has no tokenizer files: taken to have the tokens of base" in found.notes
        assert column(found, "two", embeddings({**SIZES, "two": 4})) == [30, 31, 33, 23, 24]


def test_equal_vocabularies_change_nothing(tmp_path: Path) -> None:
    folders: dict[str, Path | None] = {name: put(tmp_path / name, ["a", "b"], config={"vocab_size": 3}) for name in "xyz"}
    found = vocabulary("union", folders, None, dict.fromkeys("xyz", 3))
    assert (found.changes, found.notes) == ({}, ("the output has 3 tokens in 3 rows",))
    checkpoint = open_checkpoint({"embed_tokens.weight": np.zeros((3, 2), np.float32)})
    fill = Fill(found.donors, found.zero, {})
    assert with_vocabulary(checkpoint, found.rows["y"], fill, ["embed_tokens.weight"]) is checkpoint


# What config files must say


def test_ids_follow_the_tokenizer(tmp_path: Path) -> None:
    base = put(
        tmp_path / "base",
        ["<s>", "</s>", "a", "<pad>"],
        config={
            "vocab_size": 5,
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "pad_token_id": 4,
            "sep_token_id": 99,
            "unk_token_id": None,
        },
        generation_config={"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "mask_token_id": [4]},
    )
    other = put(
        tmp_path / "other",
        ["a", "<end>", "</s>", "<s>"],
        config={"bos_token_id": 4},
        tokenizer_config={"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    found = vocabulary("other", {"base": base, "other": other}, "base", {"base": 5, "other": 5})
    assert found.changes == {
        "config.json": {"bos_token_id": 4, "eos_token_id": 2, "pad_token_id": None},
        "generation_config.json": {"bos_token_id": 4, "decoder_start_token_id": 1, "mask_token_id": None},
    }
    assert [note for note in found.notes if note.startswith(("config", "gen"))] == [
        "config.json: pad_token_id was 4, a token that the output hasn't",
        "generation_config.json: mask_token_id was [4], a token that the output hasn't",
    ]


def test_lists_of_ids_keep_what_there_is(tmp_path: Path) -> None:
    base = put(tmp_path / "base", ["x", "y"], config={"eos_token_id": [1, 2]})
    other = put(tmp_path / "other", ["y"])
    assert vocabulary(str(other), {"base": base}, "base", {"base": 3}).changes["config.json"]["eos_token_id"] == [1]


# Refusals


def test_everything_wrong_with_a_recipe_s_tokenizer_is_said_at_once(folders: dict[str, Path | None]) -> None:
    choice = {
        "sauce": "base",
        "source": "nowhere",
        "pad_to_multiple_of": 0,
        "tokens": {
            1: {},
            "a": "one",
            "b": {"source": "three", "forced": True, "force": 1},
            "c": {"source": {"kind": "none"}},
            "d": {"source": {"kind": "zero", "model": "one"}},
            "e": {"source": {"kind": "model_token", "model": "on", "token": "a", "token_id": 1}},
            "f": {"source": {"kind": "model_token", "model": "one", "token": 3}},
            "g": {"source": {"kind": "model_token", "model": "one", "token_id": -1}},
            "h": {"source": {"kind": "model_token", "token_ids": 1}},
        },
    }
    with pytest.raises(RecipeError) as caught:
        read_choice(choice, folders)
    assert [str(problem) for problem in caught.value.problems] == [
        "tokenizer.sauce: unknown key; did you mean 'source'?",
        "tokenizer.pad_to_multiple_of: got 0; allowed: an integer, 1 or more",
        "tokenizer.tokens.1: the token 1 isn't a text; write it in quotes",
        "tokenizer.tokens.a: got 'one'; allowed: {source: MODEL | {kind: ...}, force: true | false}",
        "tokenizer.tokens.b.forced: unknown key; did you mean 'force' or 'source'?",
        "tokenizer.tokens.b.force: got 1; allowed: true or false",
        "tokenizer.tokens.b.source: 'three' isn't a model of this recipe; allowed: base, one, two",
        "tokenizer.tokens.c.source.kind: got 'none'; allowed: zero, model_token",
        "tokenizer.tokens.d.source.model: unknown key; allowed: kind",
        "tokenizer.tokens.e.source.model: 'on' isn't a model of this recipe; did you mean 'one'?",
        "tokenizer.tokens.e.source: has token and token_id; give one of token, token_id",
        "tokenizer.tokens.f.source.token: got 3; allowed: a text",
        "tokenizer.tokens.g.source.token_id: got -1; allowed: an integer, 0 or more",
        "tokenizer.tokens.h.source.token_ids: unknown key; did you mean 'token_id' or 'token'?",
        "tokenizer.tokens.h.source.model: None isn't a model of this recipe; allowed: base, one, two",
        "tokenizer.tokens.h.source: has neither token nor token_id; give one of token, token_id",
        "tokenizer.source: got 'nowhere'; allowed: base, union, or a model's folder",
    ]


@pytest.mark.parametrize("choice", [3, None, "", {"model": {}}])
def test_a_source_that_is_nothing_is_refused(folders: dict[str, Path | None], choice: Any) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.source: got .*; allowed: base, union, or a model's folder"):
        read_choice({"source": choice}, folders)
    if not isinstance(choice, Mapping):
        with pytest.raises(RecipeError, match=rf"tokenizer_source: got {choice!r}; allowed: base, union"):
            read_choice(choice, folders)


def test_tokens_must_be_a_mapping(folders: dict[str, Path | None]) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.tokens: got \['a'\]; allowed: a mapping of tokens to"):
        read_choice({"tokens": ["a"]}, folders)


def test_choices_left_out(folders: dict[str, Path | None]) -> None:
    assert read_choice({}, folders) == ("union", None, {}, None, "union")
    assert read_choice({"tokens": None, "source": "base"}, folders) == ("base", None, {}, None, "base")
    assert read_choice({"tokens": {"a": {"source": None}}}, folders).rules == {"a": TokenRule()}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("org/model@v1", "org/model@v1"),
        ({"model": "m"}, "m"),
        ({"model": {"path": "m", "revision": "r"}, "lora": {"path": "l"}}, "m@r+l"),
        ({"model": {"path": "m"}, "lora": None}, "m"),
        ({"model": {"paths": "m"}}, None),
        ({"model": "m", "other": 1}, None),
        ({"lora": "m"}, None),
        (3, None),
    ],
)
def test_references_as_text(value: Any, text: str | None) -> None:
    assert reference_text(value) == text


def test_tokens_that_a_source_lacks_are_refused_together(folders: dict[str, Path | None]) -> None:
    tokens = {
        "a": {"source": "two"},
        "b": {"source": {"kind": "model_token", "model": "one", "token": "zz"}},
        "c": {"source": {"kind": "model_token", "model": "one", "token_id": 5}},
    }
    with pytest.raises(RecipeError) as caught:
        vocabulary({"source": "base", "tokens": tokens}, folders, "base", SIZES)
    assert [str(problem) for problem in caught.value.problems] == [
        "tokenizer.tokens.a.source: two has no row for token 'a'; name one of its tokens",
        "tokenizer.tokens.b.source: one has no row for token 'zz'; name one of its tokens",
        "tokenizer.tokens.c.source: got token_id 5; allowed: below 5",
    ]


def test_models_whose_tokens_are_not_known_are_refused_together(folders: dict[str, Path | None], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^two: has no tokenizer files, and 5 rows where base has 4; put its tokenizer"):
        vocabulary("base", {**folders, "two": None}, "base", SIZES)
    (tmp_path / "one" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^one/tokenizer.json: isn't JSON[^\n]*\nbase: has no tokenizer files; put its"):
        vocabulary("base", {**folders, "base": None}, "base", SIZES)


def test_a_source_without_tokenizer_is_refused(folders: dict[str, Path | None], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer files; name a folder that has, base or union"):
        vocabulary(str(tmp_path), folders, "base", SIZES)


# Which tensors


def specs(**shapes: Sequence[int]) -> dict[str, TensorSpec]:
    return {name.replace("__", "."): TensorSpec("F32", tuple(shape)) for name, shape in shapes.items()}


def test_tensors_are_found_by_name_and_shape() -> None:
    bert = specs(
        bert__embeddings__word_embeddings__weight=(9, 4),
        bert__embeddings__position_embeddings__weight=(9, 4),
        bert__encoder__layer__0__output__dense__weight=(9, 9),
        cls__predictions__bias=(9,),
        cls__predictions__transform__dense__weight=(9, 9),
        cls__predictions__decoder__weight=(9, 4),
        cls__predictions__decoder__bias=(9,),
    )
    assert vocabulary_tensors(bert, 9) == (
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    )
    llama = specs(
        model__embed_tokens__weight=(9, 4),
        model__layers__0__mlp__up_proj__weight=(9, 4),
        model__layers__1__shared_head__head__weight=(9, 4),
        lm_head__weight=(9, 4),
        lm_head__bias=(9,),
        model__norm__weight=(9,),
    )
    assert vocabulary_tensors(llama, 9) == (
        "model.embed_tokens.weight",
        "model.layers.1.shared_head.head.weight",
        "lm_head.weight",
        "lm_head.bias",
    )
    bart = specs(model__shared__weight=(9, 4), final_logits_bias=(1, 9), model__encoder__layers__0__fc1__weight=(8, 4))
    assert vocabulary_tensors(bart, 9) == ("model.shared.weight", "final_logits_bias")


def test_an_unknown_name_counts_where_nothing_else_is_that_wide() -> None:
    mine = specs(table__weight=(9, 4), layers__0__w=(8, 4), scale=())
    assert vocabulary_tensors(mine, 9) == ("table.weight",)
    assert vocabulary_tensors({**mine, **specs(layers__1__w=(4, 9))}, 9) == ()


def test_an_embedding_of_another_size_is_refused() -> None:
    mine = specs(encoder__embed_tokens__weight=(9, 4), decoder__embed_tokens__weight=(8, 4), lm_head__bias=(8,))
    with pytest.raises(CheckpointError) as caught:
        vocabulary_tensors(mine, 9, "marian")
    assert [str(problem) for problem in caught.value.problems] == [
        "marian: decoder.embed_tokens.weight has 8 rows, the vocabulary 9; leave the tokenizer as it is for this model",
        "marian: lm_head.bias has 8 rows, the vocabulary 9; leave the tokenizer as it is for this model",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "tok_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",
    ],
)
def test_embeddings_of_the_common_families_give_the_rows(name: str) -> None:
    assert embedding_rows({"norm.weight": TensorSpec("F32", (3,)), name: TensorSpec("BF16", (9, 4))}) == 9


def test_what_has_no_embedding_has_no_rows() -> None:
    assert embedding_rows(specs(conv__weight=(9, 4), embed_positions__weight=(9, 4))) is None


# Gathering


def bits(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return to_tensor(checkpoint.read(name), checkpoint.specs[name].dtype)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_block_is_what_the_whole_gathering_gives(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    size, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    counts = {"a": data.draw(st.integers(2, 7)), "b": data.draw(st.integers(2, 7))}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weights = {key: torch.randn(count, width, generator=generator).to(dtype) for key, count in counts.items()}
    rows, donors = (
        {k: np.array(data.draw(st.lists(st.integers(-1, n - 1), min_size=size, max_size=size))) for k, n in counts.items()}
        for _ in range(2)
    )
    zero = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    tied = {"embed_tokens.weight", "lm_head.weight"}
    models_ = {key: replace(open_checkpoint(dict.fromkeys(tied, value)), name=key) for key, value in weights.items()}
    with mock.patch.object(embedding, "BLOCK", data.draw(st.sampled_from([1, 2**20]))):  # reading run by run, or at once
        out = with_vocabulary(models_["a"], rows["a"], Fill(donors, zero, models_), sorted(tied))
        name = data.draw(st.sampled_from(sorted(tied)))
        start = data.draw(st.integers(0, size * width))
        stop = data.draw(st.integers(start, size * width))
        block = to_tensor(out.block(name, start, stop), out.specs[name].dtype)
    expected = gathered(weights, rows["a"], donors, zero).to(dtype).reshape(-1)[start:stop]
    assert out.specs[name].shape == (size, width)
    assert torch.allclose(
        block.double(), expected.double(), rtol=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5, atol=1e-4
    )


def gathered(
    weights: dict[str, torch.Tensor], rows: np.ndarray, donors: dict[str, np.ndarray], zero: np.ndarray
) -> torch.Tensor:
    """The rule, slowly: own row, zeros, the donors' mean, the mean of all rows that are one of these."""
    wide = {key: value.double() for key, value in weights.items()}
    out, bare = [], []
    for place, row in enumerate(rows):
        given_by = [wide[key][theirs[place]] for key, theirs in donors.items() if theirs[place] >= 0]
        if row >= 0:
            out.append(wide["a"][row])
        elif zero[place] or not given_by:
            out.append(torch.zeros_like(wide["a"][0]))
            bare += [] if zero[place] else [place]
        else:
            out.append(torch.stack(given_by).mean(0))
    result = torch.stack(out)
    kept = [place for place in range(len(rows)) if place not in bare]
    result[bare] = result[kept].mean(0) if kept else torch.zeros_like(result[0])
    return result


def test_rows_are_copied_bit_by_bit_even_those_of_a_donor() -> None:
    odd = torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-40]], dtype=torch.bfloat16)
    state = {"a": torch.zeros(2, 2, dtype=torch.bfloat16), "b": odd}
    models_ = {key: open_checkpoint({"w": value}) for key, value in state.items()}
    fill = Fill({"a": np.array([-1, -1]), "b": np.array([1, 0])}, np.zeros(2, np.bool_), models_)
    out = with_vocabulary(models_["a"], np.array([-1, -1]), fill, ["w"])
    assert torch.equal(bits(out, "w").view(torch.int16), odd.flip(0).view(torch.int16))
    own = with_vocabulary(models_["b"], np.array([1, 1]), fill, ["w"])
    assert torch.equal(bits(own, "w").view(torch.int16), odd[[1, 1]].view(torch.int16))


def test_a_donor_of_another_type_is_rounded_once() -> None:
    values = torch.tensor([[1 / 3, 1e-8], [0.1, 7.0]])
    models_ = {"a": open_checkpoint({"w": torch.zeros(2, 2, dtype=torch.float16)}), "b": open_checkpoint({"w": values})}
    fill = Fill({"a": np.array([-1, -1]), "b": np.array([0, 1])}, np.zeros(2, np.bool_), models_)
    assert torch.equal(bits(with_vocabulary(models_["a"], np.array([-1, -1]), fill, ["w"]), "w"), values.half())


def test_biases_and_other_tensors() -> None:
    state = {
        "head.bias": torch.arange(3.0),
        "logits_bias": torch.arange(3.0)[None],
        "norm": torch.ones(3),
        "ids": torch.arange(3),
    }
    checkpoint = replace(open_checkpoint(state), declared={"norm": "BF16"})
    fill = Fill({"a": np.array([-1, -1])}, np.array([False, True]), {"a": checkpoint})
    out = with_vocabulary(checkpoint, np.array([2, -1]), fill, ["head.bias", "logits_bias"])
    assert bits(out, "head.bias").tolist() == [2, 0]
    assert bits(out, "logits_bias").tolist() == [[2, 0]]
    assert list(out.specs) == list(state)
    assert out.places["norm"] is checkpoint.places["norm"]
    assert out.declared == {"norm": "BF16"}
    turned = with_vocabulary(checkpoint, np.array([2, 0]), fill, ["ids"])
    assert bits(turned, "ids").tolist() == [2, 0]


def test_threads_get_the_same_bits_and_the_mean_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint({"w": weight})
    rows = np.concatenate([np.random.default_rng(0).permutation(300), np.full(40, -1)])
    fill = Fill({"a": np.full(340, -1)}, np.zeros(340, np.bool_), {"a": checkpoint})
    passes = []
    formed = embedding.Remapped._sourced

    def counted(place: embedding.Remapped, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        passes.append(first)
        return formed(place, first, last)

    monkeypatch.setattr(embedding.Remapped, "_sourced", counted)
    out = with_vocabulary(checkpoint, rows, fill, ["w"])
    starts = range(0, 340 * 8, 100)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda start: out.block("w", start, min(start + 100, 340 * 8)), starts))
    together = np.concatenate(blocks).reshape(340, 8)
    assert np.array_equal(together[:300], weight.numpy()[rows[:300]])
    assert np.allclose(together[300:], weight.double().mean(0).numpy(), atol=1e-6)
    assert len(passes) == 1


def test_a_block_reads_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the tensor's size is asked for: neat runs of rows, each of the size of the block."""

    class Watched:
        asked: list[int]

        def block(self, start: int, stop: int) -> np.ndarray:
            self.asked.append(stop - start)
            return np.zeros(stop - start, np.float32)

    monkeypatch.setattr(embedding, "BLOCK", 64)
    place = Watched()
    place.asked = []
    checkpoint = Checkpoint("m", {"w": TensorSpec("F32", (10**6, 16))}, None, {"w": place})
    rows = np.arange(10**6)[::-1].copy()
    rows[: 10**5] = np.arange(10**5)
    fill = Fill({"m": np.full(10**6, -1)}, np.zeros(10**6, np.bool_), {"m": checkpoint})
    out = with_vocabulary(checkpoint, rows, fill, ["w"])
    assert out.block("w", 16 * 1000, 16 * 1004).shape == (64,)
    assert place.asked == [64]  # rows in sequence: one read
    assert out.block("w", 16 * 500_000 - 3, 16 * 500_002).shape == (35,)
    assert place.asked == [64, 16, 16, 16]


@pytest.mark.parametrize("offset", [0, 4, 3])
def test_rows_of_a_mapped_file_wherever_it_begins(tmp_path: Path, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BLOCK", 16)
    weight = np.arange(40, dtype=np.float32).reshape(10, 4)
    (tmp_path / "w").write_bytes(b"x" * offset + weight.tobytes())
    spec = TensorSpec("F32", (10, 4))
    checkpoint = Checkpoint("m", {"w": spec}, None, {"w": Stored(LocalFile(tmp_path / "w"), offset, spec)})
    rows = np.array([9, 3, 4, 5, 0, -1])
    out = with_vocabulary(checkpoint, rows, Fill({"m": np.full(6, 2)}, np.zeros(6, np.bool_), {"m": checkpoint}), ["w"])
    assert np.array_equal(out.read("w"), weight[[9, 3, 4, 5, 0, 2]])


@pytest.mark.parametrize(
    ("state", "rows", "said"),
    [
        ({}, [0], "^m: has no tensor 'w'"),
        ({"w": torch.zeros(())}, [0], r"^m: tensor 'w' is F32\[\], without rows"),
        ({"w": torch.zeros(2, 0)}, [0], r"^m: tensor 'w' is F32\[2, 0\], without rows"),
        ({"w": torch.zeros(2, 3)}, [0, 2], "^m: tensor 'w' has 2 rows, not the 3 asked for"),
        ({"w": torch.zeros(2, 3).to(torch.int8)}, [0, -1], "^m: tensor 'w' is I8: missing rows can't be filled; give it in"),
        ({"w": torch.zeros(2, 4)}, [0, -1], r"^d: tensor 'w' is F32\[2, 3\], that of m F32\[2, 4\]; rows must fit"),
    ],
)
def test_rows_that_cannot_be_gathered_are_refused(state: dict[str, torch.Tensor], rows: list[int], said: str) -> None:
    checkpoint = replace(open_checkpoint(state), name="m")
    donor = replace(open_checkpoint({"w": torch.zeros(2, 3)}), name="d")
    fill = Fill({"d": np.array([0, 1])}, np.zeros(2, np.bool_), {"d": donor})
    with pytest.raises(CheckpointError, match=said):
        with_vocabulary(checkpoint, np.array(rows), fill, ["w"])


def test_a_donor_without_the_tensor_is_refused() -> None:
    checkpoint = replace(open_checkpoint({"lm_head.weight": torch.zeros(2, 3)}), name="m")
    fill = Fill({"d": np.array([0, 1])}, np.zeros(2, np.bool_), {"d": open_checkpoint({})})
    with pytest.raises(CheckpointError, match=r"^d: has no tensor 'lm_head.weight', whose rows m needs; tie or untie both"):
        with_vocabulary(checkpoint, np.array([0, -1]), fill, ["lm_head.weight"])

"""Merges of models with other tokenizers, from recipe to output as Transformers loads it; each row against a slow rule."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds

import interfuse
from interfuse.cli import main
from interfuse.errors import CheckpointError, OptionError, RecipeError, UserError

transformers = pytest.importorskip("transformers")

COMMON = "the cat sat on the mat and the dog ran to the man"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 8
Rows = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The libraries' own warnings aren't what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokenizer(
    texts: Sequence[str], size: int, added: Sequence[str] = (), end: str = "</s>", template: str | None = None
) -> Any:
    """A byte-level BPE of that many tokens, special ones among them, and more that are added."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    found.add_tokens(list(added), special_tokens=True)
    found.eos_token = end
    found.chat_template = template
    return found


def put(folder: Path, words: Any, seed: int, *, rows: int | None = None, tied: bool = False, **saved: Any) -> Path:
    """A tiny Llama and its tokenizer in a folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "tie_word_embeddings": tied}
    config = transformers.LlamaConfig(vocab_size=rows or len(words), max_position_embeddings=64, **sizes, **tokens)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, **saved)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; one with two more special tokens; two with more merges, another end, and seven rows of padding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("zoo")
        put(folder / "base", tokenizer([COMMON] * 3, 280), 0)
        chat = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"
        put(folder / "one", tokenizer([COMMON] * 3, 280, ["<|im_start|>", "<|im_end|>"], template=chat), 1)
        more = [*[COMMON] * 3, *["lower newest widest " * 2] * 3]
        put(folder / "two", tokenizer(more, 300, ["<|end|>"], end="<|end|>"), 2, rows=304)
    return folder


def recipe(zoo: Path, *models: str, base: str | None = "base", method: str = "linear", **keys: Any) -> dict[str, Any]:
    found = {"merge_method": method, "models": [{"model": str(zoo / name)} for name in models], **keys}
    return found if base is None else {"base_model": str(zoo / base), **found}


def run(zoo: Path, out: Path, *models: str, **keys: Any) -> Path:
    interfuse.run(recipe(zoo, *models, **keys), out, progress=False)
    return out


def tokens(folder: Path) -> dict[str, int]:
    return dict(transformers.AutoTokenizer.from_pretrained(folder).get_vocab())


def stored(folder: Path, name: str) -> np.ndarray:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            if name in list(opened.keys()):
                return np.asarray(opened.get_tensor(name))
    raise AssertionError(f"no {name} in {folder}")


def reference(zoo: Path, names: Sequence[str], base: str | None, ids: Mapping[str, int], size: int, tensor: str) -> Rows:
    """The rows of each model in the output's order, as docs/tokenizers.md says, one token at a time in float64."""
    weights = {name: stored(zoo / name, tensor).astype(np.float64) for name in names}
    known = {name: dict(tokens(zoo / name)) for name in names}
    for name, there in known.items():  # a padding row is a token named by its number
        there |= {f"row {i}": i for i in range(len(weights[name])) if i not in there.values()}
    wanted = dict(ids) | {f"row {i}": i for i in range(size) if i not in ids.values()}
    found: Rows = {}
    for name in names:
        out = np.full((size, WIDTH), np.nan)
        for token, place in wanted.items():
            having = [other for other in names if token in known[other]]
            if name in having:
                out[place] = weights[name][known[name][token]]
            elif base in having:
                out[place] = weights[base][known[base][token]]
            elif having:
                out[place] = np.mean([weights[other][known[other][token]] for other in having], axis=0)
        bare = np.isnan(out).any(axis=1)
        out[bare] = out[~bare].mean(axis=0)
        found[name] = out
    return found


def check_rows(zoo: Path, out: Path, merged: Sequence[str], base: str | None, names: Sequence[str]) -> None:
    """The output's embedding and head are the plain mean of the models', each in the output's vocabulary."""
    for tensor in (EMBEDDING, HEAD):
        made = stored(out, tensor)
        rows = reference(zoo, names, base, tokens(out), len(made), tensor)
        expected = np.mean([rows[name] for name in merged], axis=0)
        assert np.allclose(made, expected, rtol=0, atol=1e-6), tensor


def check_loads(out: Path) -> Any:
    """The output as Transformers loads it: nothing missing, as many rows as the config says, and it runs."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size >= len(words)
    assert torch.isfinite(model(**words("the cat sat", return_tensors="pt")).logits).all()
    return model


def check_words(zoo: Path, out: Path, *names: str) -> None:
    """Every token of these models is one of the output's, and texts come back."""
    made = transformers.AutoTokenizer.from_pretrained(out)
    for name in names:
        theirs = transformers.AutoTokenizer.from_pretrained(zoo / name)
        assert theirs.get_vocab().keys() <= made.get_vocab().keys()
        for token, place in theirs.get_vocab().items():
            text = theirs.decode([place])
            if "\N{REPLACEMENT CHARACTER}" not in text:  # half a character isn't a text
                assert made.convert_ids_to_tokens(made(text, add_special_tokens=False)["input_ids"]) == [token]
        for text in (COMMON, "lower newest <|end|> widest<|im_start|>", "Größe 你好\n\tx"):
            assert made.decode(made(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"]) == text


# Sources


def test_union_has_the_tokens_of_all_and_each_row_from_where_the_rules_say(zoo: Path, tmp_path: Path) -> None:
    out = run(zoo, tmp_path / "out", "one", "two", tokenizer_source="union")
    check_words(zoo, out, "base", "one", "two")
    check_rows(zoo, out, ["one", "two"], "base", ["base", "one", "two"])
    model = check_loads(out)
    mine = tokens(zoo / "base")
    assert {token: place for token, place in tokens(out).items() if token in mine} == mine
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokens(out)), 1)
    layer = "model.layers.1.mlp.up_proj.weight"
    assert np.allclose(stored(out, layer), (stored(zoo / "one", layer) + stored(zoo / "two", layer)) / 2, atol=1e-7)


def test_without_a_base_the_first_model_leads_and_the_owners_give_the_rows(zoo: Path, tmp_path: Path) -> None:
    out = run(zoo, tmp_path / "out", "one", "base", "two", base=None, tokenizer_source="union")
    assert [token for token, place in sorted(tokens(out).items(), key=lambda item: item[1])][:282] == [
        token for token, _ in sorted(tokens(zoo / "one").items(), key=lambda item: item[1])
    ]
    check_rows(zoo, out, ["one", "base", "two"], None, ["one", "base", "two"])
    check_loads(out)


def test_base_keeps_the_base_s_files_and_rows(zoo: Path, tmp_path: Path) -> None:
    out = run(zoo, tmp_path / "out", "one", "two", tokenizer_source="base")
    assert (out / "tokenizer.json").read_bytes() == (zoo / "base" / "tokenizer.json").read_bytes()
    check_rows(zoo, out, ["one", "two"], "base", ["base", "one", "two"])
    assert check_loads(out).config.vocab_size == 280


def test_base_is_the_first_model_s_tokenizer_where_there_is_no_base(zoo: Path, tmp_path: Path) -> None:
    written: list[dict[str, Any]] = [{"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}]
    for number, keys in enumerate(written):
        out = run(zoo, tmp_path / str(number), "one", "two", base=None, **keys)
        assert (out / "tokenizer.json").read_bytes() == (zoo / "one" / "tokenizer.json").read_bytes()
        check_rows(zoo, out, ["one", "two"], None, ["one", "two"])


def test_a_model_s_tokenizer_brings_its_rows_padding_and_ids(zoo: Path, tmp_path: Path) -> None:
    out = run(zoo, tmp_path / "out", "one", "two", tokenizer_source=str(zoo / "two"))
    assert (out / "tokenizer.json").read_bytes() == (zoo / "two" / "tokenizer.json").read_bytes()
    check_rows(zoo, out, ["one", "two"], "base", ["base", "one", "two"])
    model, end = check_loads(out), tokens(zoo / "two")["<|end|>"]
    assert (model.config.vocab_size, model.config.eos_token_id) == (304, end)
    assert model.generation_config.eos_token_id == end


def test_a_tokenizer_of_a_folder_that_isn_t_merged(zoo: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    tokenizer([COMMON] * 3, 280, ["<|im_start|>", "<new>"]).save_pretrained(alone)
    out = run(zoo, tmp_path / "out", "one", "base", tokenizer_source=str(alone))
    assert tokens(out) == tokens(alone)
    check_rows(zoo, out, ["one", "base"], "base", ["base", "one"])
    check_loads(out)


@pytest.mark.parametrize(("multiple", "rows"), [(64, 320), (1, 299), (299, 299)])
def test_rows_are_padded_to_a_multiple(zoo: Path, tmp_path: Path, multiple: int, rows: int) -> None:
    keys = {"tokenizer": {"source": "union", "pad_to_multiple_of": multiple}}
    out = run(zoo, tmp_path / "out", "one", "two", **keys)
    assert check_loads(out).config.vocab_size == rows
    check_rows(zoo, out, ["one", "two"], "base", ["base", "one", "two"])


def test_single_tokens_as_they_are_asked_for(zoo: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "<|im_start|>": {"source": str(zoo / "two"), "force": True},
        "<|end|>": {"source": str(zoo / "two"), "force": True},
        "<made>": {"source": {"kind": "model_token", "model": str(zoo / "one"), "token": "<s>"}},
        "<fifth>": {"source": {"kind": "model_token", "model": str(zoo / "one"), "token_id": 5}},
        "<nothing>": {"source": {"kind": "zero"}},
        "<bare>": {},
    }
    with pytest.raises(RecipeError, match=r"tokens.<\|im_start\|>.source: .*two has no row for token '<\|im_start\|>'"):
        run(zoo, tmp_path / "out", "one", "two", tokenizer={"tokens": asked})
    del asked["<|im_start|>"]
    out = run(zoo, tmp_path / "out", "one", "two", tokenizer={"tokens": asked})
    ids, made, one = tokens(out), stored(out, EMBEDDING), stored(zoo / "one", EMBEDDING)
    two = stored(zoo / "two", EMBEDDING)[tokens(zoo / "two")["<|end|>"]]
    assert np.array_equal(made[ids["<|end|>"]], two)
    assert np.array_equal(made[ids["<made>"]], one[0])
    assert np.array_equal(made[ids["<fifth>"]], one[5])
    assert not made[ids["<nothing>"]].any()
    others = [place for token, place in ids.items() if token not in asked]
    assert np.allclose(made[ids["<bare>"]], made[[*others, *(ids[t] for t in asked if t != "<bare>")]].mean(0), atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.convert_ids_to_tokens(words("the<made>cat")["input_ids"])[1] == "<made>"
    check_loads(out)


# Templates


def test_chat_templates_are_written_and_used(zoo: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    own = run(zoo, tmp_path / "own", "one", "two", tokenizer_source="union", chat_template="auto")
    assert transformers.AutoTokenizer.from_pretrained(own).apply_chat_template(chat, tokenize=False) == "<|im_start|>hi"
    named = run(zoo, tmp_path / "named", "one", "two", tokenizer_source="union", chat_template="chatml")
    words = transformers.AutoTokenizer.from_pretrained(named)
    text = words.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert words(text)["input_ids"][0] == tokens(named)["<|im_start|>"]
    alone = run(zoo, tmp_path / "alone", "base", "base", chat_template="{{ messages[0].content + eos_token }}")
    assert transformers.AutoTokenizer.from_pretrained(alone).apply_chat_template(chat, tokenize=False) == "hi</s>"
    assert (alone / "tokenizer.json").read_bytes() == (zoo / "base" / "tokenizer.json").read_bytes()


def test_a_template_of_the_lead_s_goes_with_its_tokenizer(zoo: Path, tmp_path: Path) -> None:
    out = run(zoo, tmp_path / "out", "one", "base", base="one", tokenizer_source=str(zoo / "base"))
    assert (zoo / "one" / "chat_template.jinja").is_file()
    assert not (out / "chat_template.jinja").exists()


def test_a_template_needs_a_tokenizer(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(RecipeError, match=r"chat_template: .*/bare has no tokenizer files that it could go with; leave it out"):
        run(tmp_path, tmp_path / "out", "bare", "bare", base=None, chat_template="chatml")


# Forms of models


def test_tied_embeddings_stay_tied(zoo: Path, tmp_path: Path) -> None:
    put(tmp_path / "base", tokenizer([COMMON] * 3, 280), 3, tied=True)
    put(tmp_path / "more", tokenizer([COMMON] * 3, 280, ["<|x|>"]), 4, tied=True)
    put(tmp_path / "apart", tokenizer([COMMON] * 3, 280, ["<|y|>"]), 5)
    out = run(tmp_path, tmp_path / "out", "more", "base", tokenizer_source="union")
    made = stored(out, EMBEDDING)
    assert HEAD not in load_file(out / "model.safetensors")
    expected = reference(tmp_path, ["base", "more"], "base", tokens(out), len(made), EMBEDDING)
    assert np.allclose(made, (expected["base"] + expected["more"]) / 2, atol=1e-6)
    model = check_loads(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = run(tmp_path, tmp_path / "untied", "more", "apart", base="apart", tokenizer_source="union")
    head = reference(tmp_path, ["apart"], "apart", tokens(untied), 282, HEAD)["apart"]
    row, new = tokens(tmp_path / "more")["<|x|>"], tokens(untied)["<|x|>"]
    head[new] = stored(tmp_path / "more", EMBEDDING)[row]  # which is that model's head too
    merged = stored(untied, HEAD)
    assert np.allclose(merged[new], head[new], atol=1e-6)
    assert np.allclose(merged[5], (head[5] + stored(tmp_path / "more", EMBEDDING)[5]) / 2, atol=1e-6)
    check_loads(untied)


def test_shards_and_names_with_a_prefix(zoo: Path, tmp_path: Path) -> None:
    expected = run(zoo, tmp_path / "expected", "one", "two", tokenizer_source="union")
    for name in ("base", "one", "two"):
        shutil.copytree(zoo / name, tmp_path / name)
    (tmp_path / "two" / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(zoo / "two").save_pretrained(tmp_path / "two", max_shard_size="4KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    wrapped = {f"module.{name}": array for name, array in load_file(zoo / "one" / "model.safetensors").items()}
    save_file(wrapped, tmp_path / "one" / "model.safetensors")
    out = run(tmp_path, tmp_path / "out", "one", "two", tokenizer_source="union")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_layers_stacked_from_models_of_other_tokens(zoo: Path, tmp_path: Path) -> None:
    parts = [{"sources": [{"model": str(zoo / name), "layer_range": [0, 2]}]} for name in ("one", "two")]
    interfuse.run(
        {"merge_method": "passthrough", "slices": parts, "tokenizer_source": "union"}, tmp_path / "out", progress=False
    )
    out = tmp_path / "out"
    ids = tokens(out)
    for tensor, name in ((EMBEDDING, "one"), (HEAD, "two")):
        rows = reference(zoo, ["one", "two"], None, ids, 299, tensor)[name]
        assert np.allclose(stored(out, tensor), rows, atol=1e-6)
    assert check_loads(out).config.num_hidden_layers == 4


def test_an_adapter_that_adds_tokens(zoo: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    words = tokenizer([COMMON] * 3, 280, ["<|tool|>", "<|done|>"])
    for tied in (False, True):
        base = put(tmp_path / f"base{tied}", tokenizer([COMMON] * 3, 280), 6, tied=tied)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(words))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"adapter{tied}")  # peft saves what was resized whole
        words.save_pretrained(tmp_path / f"adapter{tied}")
        merged = adapted.merge_and_unload()
        ref = f"{base}+{tmp_path / f'adapter{tied}'}"
        keys: dict[str, Any] = {"merge_method": "linear", "models": [{"model": ref}]}
        interfuse.run(keys, tmp_path / f"alone{tied}", progress=False)
        alone = check_loads(tmp_path / f"alone{tied}")
        assert alone.config.vocab_size == 282
        assert tokens(tmp_path / f"alone{tied}") == words.get_vocab()
        for name, value in merged.state_dict().items():
            assert torch.allclose(alone.state_dict()[name], value, atol=1e-6), name
        keys = {**keys, "base_model": str(base), "models": [*keys["models"], {"model": str(base)}], "tokenizer_source": "union"}
        interfuse.run(keys, tmp_path / f"out{tied}", progress=False)
        out = tmp_path / f"out{tied}"
        assert tokens(out) == words.get_vocab()
        mine, theirs = stored(base, EMBEDDING), merged.get_input_embeddings().weight.detach().numpy()
        expected = np.concatenate([(mine + theirs[:280]) / 2, theirs[280:]])
        assert np.allclose(stored(out, EMBEDDING), expected, atol=1e-6)
        check_loads(out)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (
            {EMBEDDING: 282},
            r"model.embed_tokens.weight' has 282 rows, and 'lm_head.weight' 280; save all embeddings and heads in one",
        ),
        ({EMBEDDING: 282, HEAD: 281}, r"has 282 rows, and 'lm_head.weight' 281"),
        (
            {EMBEDDING: 282, "lm_head.bias": 282},
            r"'base_model.model.lm_head.bias' changes 'lm_head.bias', which the model doesn't have",
        ),
    ],
)
def test_an_adapter_whose_rows_do_not_fit_each_other(zoo: Path, tmp_path: Path, saved: dict[str, int], said: str) -> None:
    stored_rows = {f"base_model.model.{name}": np.ones((rows, WIDTH), np.float32) for name, rows in saved.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["embed_tokens", "lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored_rows, tmp_path / "adapter_model.safetensors")
    keys = {"merge_method": "linear", "models": [f"{zoo / 'base'}+{tmp_path}"]}
    with pytest.raises(CheckpointError, match=said):
        interfuse.run(keys, tmp_path / "out", dry_run=True)


def test_a_head_that_an_adapter_unties_is_refused(zoo: Path, tmp_path: Path) -> None:
    put(tmp_path / "base", tokenizer([COMMON] * 3, 280), 3, tied=True)
    rows = np.ones((281, WIDTH), np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["embed_tokens", "lm_head"]}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    keys = {"merge_method": "linear", "models": [f"{tmp_path / 'base'}+{tmp_path / 'lora'}"]}
    for factor, refused in ((1, False), (2, True)):
        both = {f"base_model.model.{EMBEDDING}": rows, f"base_model.model.{HEAD}": rows * np.float32(factor)}
        save_file(both, tmp_path / "lora" / "adapter_model.safetensors")
        if not refused:
            interfuse.run(keys, tmp_path / "out", progress=False)
            assert check_loads(tmp_path / "out").config.vocab_size == 281
            continue
        with pytest.raises(CheckpointError, match=r"changes 'lm_head.weight', which the model doesn't have"):
            interfuse.run(keys, tmp_path / "out", dry_run=True)


# Chains, and the function


def test_later_recipes_see_the_vocabulary_that_earlier_ones_made(zoo: Path, tmp_path: Path) -> None:
    first = recipe(zoo, "base", "one", name="first", tokenizer={"tokens": {"<mine>": {}}}, chat_template="chatml")
    steps = tmp_path / "steps"
    interfuse.run({key: value for key, value in first.items() if key != "name"}, steps / "first", progress=False)
    shutil.copytree(zoo / "two", steps / "two")
    for keys in ({"tokenizer_source": "union"}, {"tokenizer_source": "base"}, {"tokenizer_source": str(zoo / "two")}):
        models = [{"model": "first"}, {"model": str(zoo / "two")}]
        later = {"merge_method": "linear", "base_model": "first", "models": models, **keys}
        interfuse.run([first, later], tmp_path / "out", overwrite=True, progress=False)
        asked = {"tokenizer_source": str(steps / "two")} if len(keys["tokenizer_source"]) > 5 else keys
        run(steps, tmp_path / "twice", "first", "two", base="first", **asked)
        for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
            files = [folder / name for folder in (tmp_path / "out", tmp_path / "twice")]
            assert files[0].exists() == files[1].exists(), name
            assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes(), name
        shutil.rmtree(tmp_path / "twice")
        check_loads(tmp_path / "out")


def test_a_later_recipe_without_the_keys_keeps_the_stage_s_words(zoo: Path, tmp_path: Path) -> None:
    first = recipe(zoo, "base", "one", name="first", tokenizer_source="union", chat_template="chatml")
    later = {"merge_method": "passthrough", "models": [{"model": "first"}], "parameters": {"scale": 1}}
    interfuse.run([first, later], tmp_path / "out", progress=False)
    assert "<|im_end|>" in tokens(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert check_loads(tmp_path / "out").config.vocab_size == 282


def test_a_later_recipe_takes_the_words_of_a_stage_that_it_doesn_t_merge(zoo: Path, tmp_path: Path) -> None:
    first = recipe(zoo, "base", "one", name="first", tokenizer_source="union")
    second = {"merge_method": "linear", "models": [{"model": "first"}, {"model": "first"}], "name": "second"}
    models = [{"model": str(zoo / "two")}, {"model": str(zoo / "base")}]
    third = {"merge_method": "linear", "models": models, "tokenizer_source": "second"}
    interfuse.run([first, second, {**third, "models": [*models, {"model": "second"}]}], tmp_path / "a", progress=False)
    assert tokens(tmp_path / "a").keys() == tokens(zoo / "one").keys()


def test_a_stage_s_layers_are_in_the_config_that_later_recipes_see(zoo: Path, tmp_path: Path) -> None:
    parts = [{"sources": [{"model": str(zoo / "base"), "layer_range": [0, 2]}]} for _ in range(2)]
    first = {"merge_method": "passthrough", "name": "deep", "slices": parts}
    later = {"merge_method": "passthrough", "models": [{"model": "deep"}]}
    interfuse.run([first, later], tmp_path / "out", progress=False)
    assert check_loads(tmp_path / "out").config.num_hidden_layers == 4


def test_the_function_does_as_the_recipe(zoo: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}, "chat_template": "chatml"}
    expected = run(zoo, tmp_path / "expected", "one", "two", **keys)
    paths = [zoo / "one", zoo / "two"]
    out = interfuse.merge("linear", paths, base=zoo / "base", out=tmp_path / "out", **keys)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    one = interfuse.merge("linear", paths, base=zoo / "base", tokenizer=zoo / "one", out=tmp_path / "one")
    assert tokens(one) == tokens(zoo / "one")
    with pytest.raises(OptionError, match=r"tokenizer: got 'union'; mappings have no tokenizer: leave it out"):
        interfuse.merge("linear", [{"w": np.zeros(2)}] * 2, tokenizer="union")


# Planning


def test_networks_that_code_builds_have_no_tokenizer_to_unite(zoo: Path, tmp_path: Path) -> None:
    models = [{"model": "python:nets:small"}, {"model": "python:nets:small"}]
    keys: dict[str, Any] = {"merge_method": "linear", "models": models, "tokenizer_source": "union", "chat_template": "auto"}
    said = r"chat_template: the models are built by code.*\ntokenizer_source: the models are built by code.*; give folders"
    with pytest.raises(RecipeError, match=said):
        interfuse.run(keys, tmp_path / "out", trust_code=True)


def test_tasks_that_read_the_base_as_it_is_need_its_rows(zoo: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "emr", "parameters": {"output": "per_task"}}
    with pytest.raises(
        RecipeError, match=r"parameters.output: per_task reads .*base as it is, and the tokenizer gives it other"
    ):
        run(zoo, tmp_path / "out", "one", tokenizer_source="union", **keys)
    out = run(zoo, tmp_path / "out", "one", "two", tokenizer_source="base", **keys)
    interfuse.run({"merge_method": "linear", "models": [f"{out}#two"]}, tmp_path / "task", progress=False)
    assert check_loads(tmp_path / "task").config.vocab_size == 280
    assert tokens(tmp_path / "task") == tokens(zoo / "base")


def test_texts_are_read_by_the_merge_s_own_tokenizer(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "good new film,yes\nbad,no\n" * 4)
    for name, words in {"p": ["good", "bad", "film"], "q": ["new", "good", "bad", "film"]}.items():
        classifier(tmp_path / name, words)
    data = {"test": str(tmp_path / "t.csv")}
    asked = recipe(tmp_path, "p", "q", base=None, tokenizer_source="union", data=data)
    found = interfuse.run(asked, tmp_path / "out", progress=False)
    assert tokens(tmp_path / "out").keys() - tokens(tmp_path / "p").keys() == {"new"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = model(**words(["good new film", "bad"], return_tensors="pt", padding=True)).logits.argmax(-1)
    right = float((said == torch.tensor([1, 0])).float().mean())  # classes in the order of their names: no, yes
    assert found.test is not None
    assert found.test["value"] == pytest.approx(right)
    from interfuse.pipeline import compare_runs

    compared = compare_runs([str(tmp_path / "out")], str(tmp_path / "t.csv"), progress=False)
    assert compared["out"].score.value == pytest.approx(right)


def classifier(folder: Path, words: Sequence[str]) -> None:
    """A tiny BERT that tells classes, whose tokens are whole words."""
    ids = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    made = Tokenizer(kinds.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(len(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 2}
    config = transformers.BertConfig(vocab_size=len(ids), **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


def test_other_tokens_without_a_tokenizer_are_refused_with_the_way_out(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        run(zoo, tmp_path / "out", "one")
    said = "base has F32[280, 8]: other tokens; tokenizer_source: union gives all models the same"
    assert [str(problem).endswith(said) for problem in caught.value.problems] == [True, True]


def test_rows_of_other_tokens_that_meet_by_number_are_noted(zoo: Path, tmp_path: Path) -> None:
    for name, words in {"p": ["a", "b", "c"], "q": ["a", "c", "b"], "r": ["a", "b", "c"]}.items():
        classifier(tmp_path / name, words)
    file = tmp_path / "r" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # the same tokens, written otherwise
    found = interfuse.run(recipe(tmp_path, "q", "r", base="p"), tmp_path / "out", dry_run=True)
    start, end = f"{tmp_path / 'q'}: 2 tokens have other rows than in {tmp_path / 'p'}, e.g. 'c'", "union by token"
    assert [note.startswith(start) and note.endswith(end) for note in found.notes] == [True]
    file.write_text("{")
    assert interfuse.run(recipe(tmp_path, "r", base="p"), tmp_path / "out", dry_run=True).notes == ()


def test_everything_wrong_is_said_at_once_and_nothing_is_written(zoo: Path, tmp_path: Path) -> None:
    for name in ("base", "one"):
        shutil.copytree(zoo / name, tmp_path / name)
    weights = load_file(tmp_path / "one" / "model.safetensors")
    weights["model.norm.weight"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "one" / "model.safetensors")
    keys = {"tokenizer": {"tokens": {"a": {"source": str(zoo / "two")}}}, "chat_template": "chatlm", "dtype": "float16"}
    with pytest.raises(UserError) as caught:
        run(tmp_path, tmp_path / "out", "one", **keys)
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 3
    assert "tokenizer.tokens.a.source" in found[0]
    assert "isn't a model of this recipe" in found[0]
    assert found[1] == "chat_template: got 'chatlm'; did you mean 'chatml'?; or a Jinja template"
    assert "tensor 'model.norm.weight' is F32[3]" in found[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer.json: isn't JSON"),
        (lambda folder: _drop(folder, EMBEDDING, HEAD), r"one: no embedding of tokens is found in it"),
        (
            lambda folder: _drop(folder, HEAD, put=np.zeros((9, WIDTH), np.float32)),
            r"lm_head.weight has 9 rows, the vocabulary 282",
        ),
    ],
)
def test_a_model_that_can_t_have_the_vocabulary(zoo: Path, tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    for name in ("base", "one"):
        shutil.copytree(zoo / name, tmp_path / name)
    damage(tmp_path / "one")
    with pytest.raises(CheckpointError, match=said):
        run(tmp_path, tmp_path / "out", "one", tokenizer_source="union")


def _drop(folder: Path, *names: str, put: np.ndarray | None = None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
        weights |= {} if put is None else {name: put}
    save_file(weights, folder / "model.safetensors")


def test_a_dry_run_says_what_becomes_of_the_vocabulary(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = recipe(zoo, "one", "two", tokenizer={"source": "union", "pad_to_multiple_of": 10})
    (tmp_path / "r.yaml").write_text(json.dumps(lines))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--dry-run", "--json"])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "the output has 299 tokens in 300 rows" in said
    for line in ("base: 280 rows become 300: 280 its own", "two: 304 rows become 300: 298 its own"):
        assert line in said
    assert "lm_head.weight, model.embed_tokens.weight" in said
    assert not (tmp_path / "out").exists()


# Bytes


def test_the_same_bytes_each_time_and_after_an_interruption(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}, "chat_template": "auto"}
    asked = recipe(zoo, "one", "two", method="ties", parameters={"density": 0.5}, **keys)
    interfuse.run(asked, tmp_path / "a", threads=1, progress=False)
    interfuse.run(asked, tmp_path / "b", threads=3, progress=False)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("interfuse.engine.output.folder._checked", stop)
    with pytest.raises(KeyboardInterrupt):
        interfuse.run(asked, tmp_path / "c", progress=False)
    monkeypatch.undo()
    lines = (tmp_path / ".c.interfuse-part" / "journal.jsonl").read_text()
    interfuse.run(asked, tmp_path / "c", resume=True, progress=False)
    assert len(lines.splitlines()) == 22
    expected = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name in OUTPUT}
    assert set(expected) == OUTPUT
    for name in "bc":
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name in OUTPUT} == expected
    plans = [json.loads((tmp_path / name / "interfuse.json").read_text())["plan"] for name in "abc"]
    assert plans[0] == plans[1] == plans[2]


OUTPUT = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"}


def digest(asked: Any) -> str:
    from interfuse.engine.chain import plan_recipes
    from interfuse.pipeline.steps import check

    return plan_recipes(check(asked))[-1].plan.digest()


def test_the_plan_s_digest_has_the_vocabulary_and_the_earlier_recipes(zoo: Path) -> None:
    padded = {"tokenizer": {"pad_to_multiple_of": 64}}
    sources: list[dict[str, Any]] = [{"tokenizer_source": "union"}, {"tokenizer_source": "base"}, padded]
    asked = [recipe(zoo, "base", "one", **keys) for keys in sources]
    asked.append(recipe(zoo, "base", "one", tokenizer={"tokens": {"the": {"force": True}}}))
    assert len({digest(one) for one in asked}) == 4
    later = {"merge_method": "passthrough", "models": [{"model": "first"}]}
    chains = [[{**recipe(zoo, "base", "base", parameters={"weight": w}), "name": "first"}, later] for w in (1, 2)]
    assert digest(chains[0]) != digest(chains[1])
    assert digest(chains[0]) == digest(chains[0])


def test_merges_load_only_what_the_keys_need(zoo: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json, interfuse; interfuse.run(json.loads(sys.argv[1]), sys.argv[2], progress=False);"
        "print([name in sys.modules for name in ('torch', 'transformers', 'tokenizers', 'interfuse.engine.wording')])"
    )
    keys: dict[str, Any] = {"none": {}, "base": {"tokenizer_source": "base"}, "union": {"tokenizer_source": "union"}}
    said = {}
    for name, more in keys.items():
        asked = json.dumps(recipe(zoo, "base", "one" if more else "base", **more))
        done = subprocess.run(
            [sys.executable, "-c", code, asked, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        said[name] = done.stdout.strip().splitlines()[-1]
    assert said == {
        "none": "[False, False, False, False]",
        "base": "[False, False, False, True]",
        "union": "[False, False, True, True]",
    }

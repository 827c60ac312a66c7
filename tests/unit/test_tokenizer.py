"""Tokenizers as data: ids as the libraries give them, tokens added, several made one and really working, chat templates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from interfuse.checkpoints.tokenizers import union as union_module
from interfuse.checkpoints.tokenizers.chat import FORMATS, template_of, with_chat_template
from interfuse.checkpoints.tokenizers.tokenizer import Tokenizer as Data
from interfuse.checkpoints.tokenizers.tokenizer import read_tokenizer, tokenizer_files, with_tokens
from interfuse.checkpoints.tokenizers.union import union
from interfuse.errors import CheckpointError, MissingExtra, RecipeError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bpe(merges: Sequence[tuple[str, str]], letters: str = LETTERS) -> Tokenizer:
    vocab = {"<unk>": 0}
    for token in [*letters, *(a + b for a, b in merges)]:
        vocab.setdefault(token, len(vocab))
    made = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def wordpiece(words: Sequence[str], lower: bool = True) -> Tokenizer:
    vocab = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return made


def unigram(pieces: Sequence[tuple[str, float]]) -> Tokenizer:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def words(*vocab: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: place for place, token in enumerate(["<unk>", *vocab])}, unk_token="<unk>"))


def put(folder: Path, made: Tokenizer, config: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Data]:
    def make(made: Tokenizer, config: Any = None, name: str = "") -> Data:
        name = name or f"model{len(list(tmp_path.iterdir()))}"
        found = read_tokenizer(put(tmp_path / name, made, config), name)
        assert found is not None
        return found

    return make


def running(made: Data) -> Tokenizer:
    return Tokenizer.from_str(made.files["tokenizer.json"].decode())


def cut(made: Data, text: str) -> list[str]:
    return running(made).encode(text, add_special_tokens=False).tokens


# Reading


def test_ids_are_those_of_the_library_whatever_the_kind(data: Callable[..., Data]) -> None:
    for made in (bpe([("a", "b")]), wordpiece(["un", "##do"]), unigram([("▁a", -1.0), ("b", -2.0)]), words("hello")):
        made.add_tokens(["<x>", AddedToken("<y>", single_word=True)])
        read = data(made)
        assert read.tokens == made.get_vocab(with_added_tokens=True)
        assert read.core == made.get_vocab(with_added_tokens=False)
        assert read.files["tokenizer.json"]


def test_an_added_token_s_own_id_counts_for_its_order_only(tmp_path: Path) -> None:
    made = words("a")
    made.add_tokens(["<x>", "<y>"])
    text = json.loads(made.to_str())
    text["added_tokens"][1]["id"] = 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert read.tokens == Tokenizer.from_str(json.dumps(text)).get_vocab() == {"<unk>": 0, "a": 1, "<x>": 2, "<y>": 3}


def test_tokens_that_only_the_config_names_have_the_ids_that_transformers_gives_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": {"__type": "AddedToken", "content": "[PAD]", "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<q>"],
    }
    folder = put(tmp_path / "m", words("a", "b"), config)
    read = read_tokenizer(folder)
    assert read is not None
    assert read.tokens == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert read.tokens["</s>"] == 3
    assert (read.role("pad_token"), read.role("eos_token"), read.role("cls_token")) == ("[PAD]", "</s>", None)


def test_special_tokens_of_the_older_map_are_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", words("a"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "[MASK]"}))
    read = read_tokenizer(folder)
    assert read is not None
    assert read.tokens["[MASK]"] == 2


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None


def test_an_older_form_is_converted_and_its_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n##s\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert (read.kind, read.tokens["hello"], read.tokens["##s"]) == ("WordPiece", 5, 6)
    assert list(read.files) == ["vocab.txt"]
    more = with_tokens(read, [{"content": "<new>"}])
    assert "vocab.txt" not in more.files
    assert cut(more, "hellos<new>") == ["hello", "##s", "<new>"]


def test_an_older_form_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json, and transformers can't read its tokenizer \("):
        read_tokenizer(tmp_path)


def test_a_list_of_tokens_alone_can_be_kept_but_not_changed(tmp_path: Path) -> None:
    """A chemist's tokenizer: a vocab.txt, and a config that says nothing that transformers knows."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, more in zip(folders, ("", "", "Br\n"), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "vocab.txt").write_bytes(b"[PAD]\r\n[UNK]\nC\n" + more.encode())
    first, second, third = (found for folder in folders if (found := read_tokenizer(folder, folder.name)))
    assert first.tokens == {"[PAD]": 0, "[UNK]": 1, "C": 2}
    assert union([first, second])[0].files == {"vocab.txt": b"[PAD]\r\n[UNK]\nC\n"}
    with pytest.raises(CheckpointError, match=r"^c: its tokenizer can't be united with that of a: a has a list of tokens only"):
        union([first, third])
    with pytest.raises(CheckpointError, match=r"^a: has only a vocab.txt, and transformers .*: no token can be added; save it"):
        with_tokens(first, [{"content": "<x>"}])


def test_a_conversion_without_tokenizer_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Slow:
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Slow:
            return cls()

        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "vocab.json").write_text("{}")

    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr(transformers, "AutoTokenizer", Slow)
    with pytest.raises(CheckpointError, match=r"can't be written as a tokenizer.json; use another source"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"m/tokenizer.json: isn't JSON: .*; get the file again"),
        ("[1]", r"m/tokenizer.json: holds a list; a JSON object"),
        ("{}", "has no model with a vocab"),
        ('{"model": {"type": "Other", "vocab": {}}}', "has a model of type 'Other', not one of BPE, WordPiece, Unigram"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}}}', "has a vocab that a BPE can't have"),
        ('{"model": {"type": "BPE", "vocab": [["a", 0.0]]}}', "has a vocab that a BPE can't have"),
        ('{"model": {"type": "Unigram", "vocab": ["a"]}}', "has a vocab that a Unigram can't have"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "has added_tokens without content"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path, "m")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: can't be read: Permission denied"):
        tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"vocab": [["a", 0.0]]}, "Unigram"),
        ({"vocab": {"a": 0}, "merges": []}, "BPE"),
        ({"vocab": {"a": 0}, "continuing_subword_prefix": "##"}, "WordPiece"),
        ({"vocab": {"a": 0}}, "WordLevel"),
    ],
)
def test_early_files_do_not_say_their_kind(tmp_path: Path, model: Any, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert read.kind == kind


# Adding tokens


def test_added_tokens_follow_the_highest_id_and_are_found_in_text(data: Callable[..., Data]) -> None:
    for made in (bpe([("a", "b")]), wordpiece(["ab"]), unigram([("▁ab", -1.0)]), words("ab")):
        before = data(made)
        after = with_tokens(before, [{"content": "<n>", "special": True}, {"content": "<n>"}, {"content": "<o>"}])
        top = max(before.tokens.values())
        assert after.tokens == {**before.tokens, "<n>": top + 1, "<o>": top + 2}
        assert running(after).get_vocab() == after.tokens
        assert [token for token in cut(after, "ab<o>ab") if token == "<o>"] == ["<o>"]


def test_a_token_that_is_there_becomes_an_added_one_under_its_id(data: Callable[..., Data]) -> None:
    before = data(words("a", "b", "<s>"))
    after = with_tokens(before, [{"content": "<s>", "special": True}])
    assert after.tokens == before.tokens
    assert after.data["added_tokens"][0] | {"id": 3} == after.data["added_tokens"][0]


def test_the_library_s_own_numbering_is_led_round_gaps(tmp_path: Path) -> None:
    """Ids 0, 1 and 5: the library would give an added token the id 3, in the middle."""
    text = json.loads(words("a").to_str())
    text["model"]["vocab"]["b"] = 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    read = read_tokenizer(tmp_path)
    assert read is not None
    after = with_tokens(read, [{"content": "<x>"}])
    assert after.tokens["<x>"] == 6
    assert running(after).get_vocab() == after.tokens


def test_the_config_lists_added_tokens_where_it_did_before(data: Callable[..., Data]) -> None:
    config = {"added_tokens_decoder": {"2": {"content": "<p>", "special": True}}}
    after = with_tokens(data(words("a"), config), [{"content": "<x>", "lstrip": True}])
    listed = json.loads(after.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {place: entry["content"] for place, entry in listed.items()} == {"2": "<p>", "3": "<x>"}
    assert listed["3"]["lstrip"] is True
    plain = with_tokens(data(words("a"), {}), [{"content": "<x>"}])
    assert "added_tokens_decoder" not in json.loads(plain.files["tokenizer_config.json"])


@pytest.mark.parametrize("name", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_loads_what_was_extended_with_the_same_ids(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": name, "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config |= {} if name != "BertTokenizer" else {"mask_token": "[MASK]"}
    read = read_tokenizer(put(tmp_path / "a", wordpiece(["play", "##ing"]), config))
    other = read_tokenizer(put(tmp_path / "b", wordpiece(["play", "##ed"]), config))
    assert read is not None
    assert other is not None
    made, _ = union([read, other])
    made = with_tokens(made, [{"content": "<new>"}])
    out = tmp_path / "out"
    out.mkdir()
    for file, content in made.files.items():
        (out / file).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == made.tokens
    assert loaded.tokenize("Playing played <new>") == ["play", "##ing", "play", "##ed", "<new>"]


# Union


def test_equal_tokenizers_are_one(data: Callable[..., Data]) -> None:
    first, second = data(bpe([("a", "b")])), data(bpe([("a", "b")]))
    made, notes = union([first, second])
    assert made is first
    assert notes == []


def test_added_tokens_always_unite_in_order_with_their_flags(data: Callable[..., Data]) -> None:
    first, second, third = bpe([("a", "b")]), bpe([("a", "b")]), bpe([("a", "b")])
    first.add_special_tokens(["<s>"])
    second.add_tokens([AddedToken("<two>", rstrip=True), "<s>"])
    third.add_special_tokens(["<three>"])
    parents = [data(first, name="x"), data(second, name="y"), data(third, {"pad_token": "<pad>"}, "z")]
    made, notes = union(parents)
    top = parents[0].tokens["<s>"]
    assert made.tokens == {**parents[0].tokens, "<two>": top + 1, "<three>": top + 2, "<pad>": top + 3}
    assert running(made).get_vocab() == made.tokens
    assert cut(made, "ab<three>ab<two>") == ["ab", "<three>", "ab", "<two>"]
    flags = {entry["content"]: entry for entry in made.data["added_tokens"]}
    assert (flags["<two>"]["rstrip"], flags["<three>"]["special"], flags["<s>"]["special"]) == (True, True, True)
    assert notes == ["y: 1 added tokens have other flags than in x, e.g. '<s>'"]


def test_wordpiece_unites_and_says_what_is_cut_otherwise(data: Callable[..., Data]) -> None:
    first, second = data(wordpiece(["play", "##ing"]), name="a"), data(wordpiece(["playing", "play", "##ed"]), name="b")
    made, notes = union([first, second])
    assert list(made.tokens) == [*first.tokens, "playing", "##ed"]
    assert running(made).get_vocab() == made.tokens
    assert cut(made, "Played playing") == ["play", "##ed", "playing"]
    assert notes == []


def test_word_level_unites(data: Callable[..., Data]) -> None:
    made, _ = union([data(words("a", "b")), data(words("c", "a"))])
    assert made.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert cut(made, "c") == ["c"]


def test_a_tokenizer_without_its_unknown_token_is_tried_on_what_it_can_cut(data: Callable[..., Data]) -> None:
    first, second = ({token: place for place, token in enumerate(vocab)} for vocab in (["<unk>", "a"], ["a", "b"]))
    parents = [data(Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))) for vocab in (second, first)]
    made, notes = union(parents)
    assert made.tokens == {"a": 0, "b": 1, "<unk>": 2}
    assert notes == []


def test_added_tokens_keep_their_ids_when_words_come_after_them(data: Callable[..., Data]) -> None:
    first = words("a")
    first.add_special_tokens(["<s>"])
    made, _ = union([data(first), data(words("a", "b"))])
    assert made.tokens == {"<unk>": 0, "a": 1, "<s>": 2, "b": 3}
    assert running(made).get_vocab() == made.tokens


def test_merges_that_go_on_where_the_others_end_unite(data: Callable[..., Data]) -> None:
    first, second = data(bpe([("t", "h"), ("th", "e")])), data(bpe([("t", "h"), ("th", "e"), ("i", "n"), ("in", "g")]))
    made, _ = union([first, second])
    assert made.data["model"]["merges"] == [["t", "h"], ["th", "e"], ["i", "n"], ["in", "g"]]
    for parent in (first, second):
        assert all(cut(made, token) == [token] for token in parent.core if token != "<unk>")
    assert cut(made, "thething") == ["the", "th", "ing"]


def test_merges_in_between_unite_where_appending_would_not_do(data: Callable[..., Data]) -> None:
    """`b c` must come before `a b`, or `abc` can't be made."""
    first = bpe([("a", "b")], "abcx")
    second = bpe([("b", "c"), ("a", "bc"), ("a", "b")], "abcx")
    made, notes = union([data(first, name="a"), data(second, name="b")])
    assert made.data["model"]["merges"] == [["b", "c"], ["a", "bc"], ["a", "b"]]
    assert cut(made, "abc") == ["abc"]
    assert cut(made, "ab") == ["ab"]
    assert notes == []


def test_merges_that_cannot_be_reconciled_are_refused_with_an_example(data: Callable[..., Data]) -> None:
    first = data(bpe([("a", "b"), ("b", "c")], "abc"), name="first")
    second = data(bpe([("b", "c"), ("a", "bc"), ("a", "b")], "abc"), name="second")
    said = (
        r"^second: its tokenizer can't be united with that of first: token 'abc' of second would be cut into "
        r"\['ab', 'c'\]; use tokenizer_source: base"
    )
    with pytest.raises(CheckpointError, match=said):
        union([first, second])


def test_every_tokenizer_that_does_not_fit_is_named(data: Callable[..., Data]) -> None:
    first, second = data(wordpiece(["a"]), name="one"), data(bpe([]), name="two")
    third = data(wordpiece(["a", "B"], lower=False), name="three")
    with pytest.raises(CheckpointError) as caught:
        union([first, second, third])
    assert [str(problem).partition("; ")[0] for problem in caught.value.problems] == [
        "two: its tokenizer can't be united with that of one: one is a WordPiece, the other a BPE",
        "three: its tokenizer can't be united with that of one: they differ in normalizer, and 'B' is a token of one only",
    ]


def test_a_model_s_own_settings_and_the_unknown_piece_must_be_equal(data: Callable[..., Data]) -> None:
    first, second = words("a"), Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match=r"they differ in the model's unk_token, and '\[UNK\]' is a token of one only"):
        union([data(first), data(second)])
    other = Tokenizer(models.Unigram([("<oov>", 0.0), ("a", -1.0)], 0, False))
    with pytest.raises(CheckpointError, match="they differ in the unknown token, and '<oov>' is a token of one only"):
        union([data(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))), data(other)])


def test_unigram_scores_are_brought_to_one_scale(data: Callable[..., Data]) -> None:
    shared = [("▁", -3.0), ("a", -4.0), ("b", -4.0)]
    first = unigram(shared)
    first.add_special_tokens(["<s>"])
    second = unigram([(piece, score - 2) for piece, score in shared] + [("▁ab", -7.0)])
    made, _ = union([data(first), data(second)])
    scores = dict(made.data["model"]["vocab"])
    assert scores["▁ab"] == -5.0
    assert scores["a"] == -4.0
    assert cut(made, "ab ba<s>") == ["▁ab", "▁", "b", "a", "<s>"]
    assert running(made).get_vocab() == made.tokens


def test_unigram_scores_that_put_a_piece_out_of_reach_are_refused(data: Callable[..., Data]) -> None:
    first = unigram([("▁", -1.0), ("a", -1.0), ("b", -1.0)])
    second = unigram([("▁", -1.0), ("a", -1.0), ("b", -9.0), ("ab", -7.0)])
    with pytest.raises(CheckpointError, match=r"token 'ab' of .* would be cut into \['a', 'b'\]"):
        union([data(first), data(second)])


def test_pieces_with_other_scores_are_tried_too(data: Callable[..., Data]) -> None:
    first = unigram([("a", -1.0), ("b", -1.0), ("ab", -9.0)])
    second = unigram([("a", -5.0), ("b", -5.0), ("ab", -2.0)])
    with pytest.raises(CheckpointError, match=r"token 'ab' of .* would be cut into \['a', 'b'\]"):
        union([data(first), data(second)])


def test_text_that_would_not_come_back_is_refused(data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = data(wordpiece(["ab", "c"]), name="a"), data(wordpiece(["ab", "c", "d"]), name="b")
    second.data["decoder"]["cleanup"] = False
    monkeypatch.setattr(union_module, "_parts_that_differ", lambda a, b: [])
    monkeypatch.setattr(union_module, "_samples", lambda tokenizer, running: ["ab c ."])
    for parent in (first, second):
        parent.data["model"]["vocab"]["."] = len(parent.data["model"]["vocab"])
    with pytest.raises(CheckpointError, match=r"'ab c \.' comes back from b as 'ab c \.', and would as 'ab c\.'"):
        union([first, second])


def test_texts_cut_otherwise_are_counted(data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union_module, "TEXTS", ("undone",))
    first, second = data(wordpiece(["un", "##done"]), name="a"), data(wordpiece(["undone"]), name="b")
    _, notes = union([first, second])
    assert notes == ["1 of 7 sample texts are cut otherwise than by a, e.g. 'undone' at 'un' -> 'undone'"]


def test_parts_that_differ_are_told_by_their_texts_where_only_added_tokens_are_new(data: Callable[..., Data]) -> None:
    first, second = wordpiece(["the", "dog"]), wordpiece(["the", "dog"], lower=False)
    second.add_tokens(["<x>"])
    made, notes = union([data(first, name="one"), data(second, name="two")])
    assert "<x>" in made.tokens
    assert len(notes) == 1
    assert "sample texts are cut otherwise than by two, e.g." in notes[0]


def test_a_numbering_that_the_library_does_not_follow_is_refused(
    data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = words("a"), words("a")
    second.add_tokens(["<x>"])
    parents = [data(first, name="one"), data(second)]
    monkeypatch.setattr(union_module, "_misnumbered", lambda made: "token '<x>' has id 7, not 2")
    with pytest.raises(CheckpointError, match="one: its tokenizer can't be extended: token '<x>' has id 7, not 2; use tok"):
        union(parents)


def test_a_tokenizer_that_the_library_refuses_is_an_error(data: Callable[..., Data]) -> None:
    first, second = data(bpe([("a", "b")]), name="one"), data(bpe([("a", "b"), ("b", "c")]), name="two")
    second.data["model"]["merges"].append(["q", "nowhere"])
    with pytest.raises(CheckpointError, match=r"two: its tokenizer doesn't load: .*; get the file again"):
        union([first, second])


def test_a_union_needs_the_library_that_tries_it(data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [data(words("a")), data(words("b"))]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"tokenizers isn't installed: pip install 'interfuse\[hub\]'"):
        union(parents)


# Chat templates


def render(template: str, **more: Any) -> str:
    """As transformers does."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return environment.from_string(template).render(messages=messages, bos_token="<s>", eos_token="</s>", **more)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        ),
        ("exaone", "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]"),
    ],
)
def test_named_formats_render_as_their_makers_publish_them(name: str, text: str) -> None:
    assert render(FORMATS[name], add_generation_prompt=True) == text
    short = render(FORMATS[name], add_generation_prompt=False)
    assert text.startswith(short)
    assert (short == text) == (name == "mistral")


def test_a_template_is_written_as_a_file_and_leaves_the_config() -> None:
    config = {"chat_template": "old", "pad_token": "<|im_start|>"}
    files = {
        "tokenizer_config.json": json.dumps(config).encode(),
        "additional_chat_templates/tools.jinja": b"old",
        "tokenizer.json": b"{}",
    }
    after, notes = with_chat_template(files, "chatml", [])
    assert list(after) == ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
    assert json.loads(after["tokenizer_config.json"]) == {"pad_token": "<|im_start|>"}
    assert after["chat_template.jinja"].decode() == FORMATS["chatml"]
    assert notes == ()
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "old"


def test_a_format_whose_mark_is_no_token_is_noted() -> None:
    _, notes = with_chat_template({"tokenizer.json": b"{}"}, "llama3", [])
    assert notes == ("chat_template: the tokenizer has no token '<|start_header_id|>', which llama3 begins a turn with",)


def test_auto_takes_the_most_common_and_the_first_of_equals() -> None:
    after, notes = with_chat_template({}, "auto", ["{{ b }}", None, " {{ a }}\n", "{{ a }}"])
    assert after == {"chat_template.jinja": b"{{ a }}"}
    assert notes == ("chat_template: that of 2 of 4 models",)
    assert with_chat_template({}, "auto", ["{{ b }}", "{{ a }}"])[0] == {"chat_template.jinja": b"{{ b }}"}
    assert with_chat_template({"a": b""}, "auto", [None, " "]) == (
        {"a": b""},
        ("chat_template: no model has one, so none is written",),
    )


def test_a_jinja_text_is_the_template() -> None:
    text = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert with_chat_template({}, text, [])[0] == {"chat_template.jinja": text.encode()}


@pytest.mark.parametrize(
    ("choice", "said"), [("chatlm", "did you mean 'chatml'"), ("{{ x }}", "allowed: auto, chatml"), (3, "")]
)
def test_other_choices_are_refused(choice: Any, said: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"chat_template: got {choice!r}; .*{said}.*; or a Jinja template".replace("{", r"\{")
    ):
        with_chat_template({}, choice, [])


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"chat_template.jinja": b" x\n", "tokenizer_config.json": b'{"chat_template": "y"}'}, "x"),
        ({"tokenizer_config.json": b'{"chat_template": "y"}'}, "y"),
        ({"tokenizer_config.json": b'{"chat_template": {"default": "y", "tools": "z"}}'}, "y"),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": "y"}, 3]}'}, "y"),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "tools", "template": "y"}]}'}, None),
        ({"tokenizer_config.json": b'{"chat_template": ""}'}, None),
    ],
)
def test_a_model_s_template_is_found_in_every_form(files: dict[str, bytes], template: str | None) -> None:
    assert template_of(files) == template


def test_transformers_reads_the_template_that_was_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = put(tmp_path / "m", words("a"), {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "old"})
    after, _ = with_chat_template(tokenizer_files(folder), "exaone", [])
    for name, content in after.items():
        (folder / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template.strip() == FORMATS["exaone"].strip()
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "[|user|]a\n[|assistant|]"

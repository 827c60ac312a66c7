"""One tokenizer that has the tokens of several, or a reason why there can't be one. Not a way to translate between them.

Added tokens always unite. What the models cut text into unites where the rest of the tokenizers is equal: vocabularies of
WordPiece and WordLevel; pieces of Unigram with scores brought to the first one's scale; merges of BPE in an order that
keeps every token within reach. The result is tried: each token that a tokenizer makes of its own text must still be made,
and sample texts must come back as they did. BPE: Sennrich et al., 1508.07909; Unigram: Kudo, 1804.10959.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from interfuse.checkpoints.tokenizers.tokenizer import Tokenizer, rewritten, with_core, with_tokens
from interfuse.errors import CheckpointError, Problem
from interfuse.extras import require

_WAY_OUT = "use tokenizer_source: base, or the model whose tokenizer is to be kept"
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_LEARNED = ("vocab", "merges", "unk_id")  # of a model's entries those that may differ
_WORDS = 200  # tokens of each tokenizer that are tried as text
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 3.14159, isn't it? (Yes: 100%.) e-mail: a_b@c.org",
    "def f(x):\n    return [x ** 2, 'a\\tb']\n",
    "Größe, façade, señor, naïve; Привет, мир! Ж",
    "你好世界。こんにちは 안녕하세요 مرحبا नमस्ते 🙂",
    " two  spaces   and a tab\t",
)


def union(tokenizers: Sequence[Tokenizer]) -> tuple[Tokenizer, list[str]]:
    """The first tokenizer with all tokens of the others, and notes on what isn't as it was. Ids of the first are kept.

    Those that can't be united are a `CheckpointError` each, with both names and an example.
    """
    result, notes, problems = tokenizers[0], [], []
    united = [tokenizers[0]]
    for other in tokenizers[1:]:
        if other.data == tokenizers[0].data and other.tokens == tokenizers[0].tokens:
            continue
        bare = next((one.name for one in (tokenizers[0], other) if one.bare), None)
        found, wrong = (None, f"{bare} has a list of tokens only") if bare else _with_core_of(result, other, united)
        if found is None:
            problems.append(
                Problem(other.name, f"its tokenizer can't be united with that of {united[0].name}: {wrong}", _WAY_OUT)
            )
            continue
        result = found
        united.append(other)
        notes += [wrong] if wrong else []
    if problems:
        raise CheckpointError(*problems)
    for other in united[1:]:
        notes += _flags_that_differ(result, other)
        result = with_tokens(result, _new(result, other))
    if result.tokens != tokenizers[0].tokens:
        wrong = _misnumbered(result)
        if wrong:
            raise CheckpointError(Problem(result.name, f"its tokenizer can't be extended: {wrong}", _WAY_OUT))
    return result, notes + [note for other in united for note in _cut_otherwise(result, other)]


def _new(result: Tokenizer, other: Tokenizer) -> list[dict[str, Any]]:
    """The added tokens of `other`, those that only its config names included, in order of their ids."""
    listed = {entry["content"]: entry for entry in other.data.get("added_tokens") or []}
    core = other.core
    named = {token: {"content": token, "special": True} for token in other.tokens if token not in core}
    mine = {entry["content"] for entry in result.data.get("added_tokens") or []}
    found = {**named, **listed}
    return [found[token] for token in sorted(found, key=lambda token: other.tokens[token]) if token not in mine]


def _flags_that_differ(result: Tokenizer, other: Tokenizer) -> list[str]:
    mine = {entry["content"]: entry for entry in result.data.get("added_tokens") or []}
    differing = [
        entry["content"]
        for entry in other.data.get("added_tokens") or []
        if entry["content"] in mine and {**entry, "id": 0} != {**mine[entry["content"]], "id": 0}
    ]
    if not differing:
        return []
    return [f"{other.name}: {len(differing)} added tokens have other flags than in {result.name}, e.g. {differing[0]!r}"]


def _with_core_of(result: Tokenizer, other: Tokenizer, before: Sequence[Tokenizer]) -> tuple[Tokenizer | None, str]:
    """`result` with what `other`'s model makes of text; or None, and why not."""
    if result.kind != other.kind:
        return None, f"one is a {result.kind}, the other a {other.kind}"
    learned = other.core.keys() - result.core.keys() - _only_added(other)
    if not learned and _order(other).items() <= _order(result).items():
        return result, ""
    differing = _parts_that_differ(result, other)
    if differing:
        example = min(learned, key=lambda token: other.tokens[token]) if learned else None
        more = f", and {example!r} is a token of one only" if example is not None else ""
        return None, f"they differ in {', '.join(differing)}{more}"
    wrong = ""
    for candidate in _candidates(result, other):
        complaint = next((said for parent in [*before, other] if (said := _lost(candidate, parent))), "")
        if not complaint:
            return candidate, ""
        wrong = wrong or complaint
    return None, wrong


def _only_added(tokenizer: Tokenizer) -> set[str]:
    """Tokens of the core that are added tokens: they unite as such."""
    return {entry["content"] for entry in tokenizer.data.get("added_tokens") or []}


def _parts_that_differ(a: Tokenizer, b: Tokenizer) -> list[str]:
    """The parts of two tokenizers, vocabulary aside, that aren't equal as the library understands them."""
    first, second = (json.loads(_running(tokenizer).to_str()) for tokenizer in (a, b))
    differing = [part for part in _PARTS if first[part] != second[part]]
    names = dict.fromkeys([*first["model"], *second["model"]])
    differing += [f"the model's {n}" for n in names if n not in _LEARNED and first["model"].get(n) != second["model"].get(n)]
    unknown = [_unknown(tokenizer) for tokenizer in (a, b)]
    return differing + (["the unknown token"] if a.kind == "Unigram" and unknown[0] != unknown[1] else [])


def _unknown(tokenizer: Tokenizer) -> str | None:
    model = tokenizer.data["model"]
    if tokenizer.kind != "Unigram":
        return model.get("unk_token")
    place = model.get("unk_id")
    return None if place is None else model["vocab"][place][0]


def _candidates(result: Tokenizer, other: Tokenizer) -> Iterator[Tokenizer]:
    """Tokenizers with both cores: for BPE with merges in either of two orders."""
    core, taken = other.core, _only_added(other) | result.tokens.keys()
    learned = [token for token in sorted(core, key=core.__getitem__) if token not in taken]
    first = max(result.tokens.values(), default=-1) + 1
    tokens = {**result.tokens, **{token: first + place for place, token in enumerate(learned)}}
    scores = _rescaled(result, other) if result.kind == "Unigram" else None
    # Every added token goes into the core too: the library numbers the others by the size of the core.
    model = {**result.data["model"], "vocab": with_core(result.data["model"], tokens, scores)}
    orders = [None] if result.kind != "BPE" else list(_orders(_merges(result), _merges(other)))
    for merges in orders:
        data = copy.copy(result.data)
        data["model"] = model if merges is None else {**model, "merges": [list(pair) for pair in merges]}
        yield rewritten(result, data, tokens)


def _order(tokenizer: Tokenizer) -> dict[Any, Any]:
    """What decides between ways to cut a text: merges with their rank, pieces with their score, nothing for whole words."""
    if tokenizer.kind == "Unigram":
        return dict(tokenizer.data["model"]["vocab"])
    return {pair: rank for rank, pair in enumerate(_merges(tokenizer))}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    pairs = tokenizer.data["model"].get("merges") or []
    split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
    return [(left, right) for left, right in split]


def _orders(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Two orders of all merges: the second's own after all of the first's; or each after the shared one that it followed."""
    known, also = set(first), set(second)
    yield first + [pair for pair in second if pair not in known]
    shared = [pair for pair in first if pair in also]
    if shared != [pair for pair in second if pair in known]:
        return
    follows: dict[tuple[str, str] | None, list[tuple[str, str]]] = {}
    last: tuple[str, str] | None = None
    for pair in second:
        if pair in known:
            last = pair
        else:
            follows.setdefault(last, []).append(pair)
    order = list(follows.get(None, []))
    for pair in first:
        order += [pair, *follows.get(pair, [])]
    yield order


def _rescaled(result: Tokenizer, other: Tokenizer) -> dict[str, float]:
    """The other's scores, moved by the median difference of the pieces that both have."""
    mine, theirs = dict(result.data["model"]["vocab"]), dict(other.data["model"]["vocab"])
    differences = [mine[piece] - score for piece, score in theirs.items() if piece in mine]
    shift = statistics.median(differences) if differences else 0.0
    return {piece: score + shift for piece, score in theirs.items()}


def _running(tokenizer: Tokenizer) -> Any:
    """The tokenizer of the tokenizers library; one that it refuses is a `CheckpointError`."""
    library = require("tokenizers")
    try:
        return library.Tokenizer.from_str(json.dumps(tokenizer.data))
    except Exception as error:  # the library raises bare exceptions
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(Problem(tokenizer.name, f"its tokenizer doesn't load: {reason}", "get the file again")) from None


def _misnumbered(tokenizer: Tokenizer) -> str:
    """A token whose id in the tokenizers library isn't the one that was planned."""
    ids = _running(tokenizer).get_vocab(with_added_tokens=True)
    return next((f"token {t!r} has id {ids.get(t)}, not {i}" for t, i in tokenizer.tokens.items() if ids.get(t) != i), "")


def _lost(result: Tokenizer, parent: Tokenizer) -> str:
    """The first token of `parent` that `result` makes no more, or the first text that it doesn't give back; or nothing."""
    new, old = _running(result), _running(parent)
    made, making = old.model, new.model
    for token, place in parent.core.items():
        if _pieces(made, token) != [(place, token)]:
            continue
        found = [piece for _, piece in _pieces(making, token)]
        if found != [token]:
            return f"token {token!r} of {parent.name} would be cut into {found}"
    unknown = _unknown(parent)
    for text in _samples(parent, old):
        places, pieces = _cut(old, text)
        if not pieces or unknown in pieces:
            continue
        was = old.decode(places, skip_special_tokens=False)
        now = new.decode(_cut(new, text)[0], skip_special_tokens=False)
        if was != now:
            return f"{text!r} comes back from {parent.name} as {was!r}, and would as {now!r}"
    return ""


def _pieces(model: Any, text: str) -> list[tuple[int, str]]:
    try:
        return [(piece.id, piece.value) for piece in model.tokenize(text)]
    except Exception:  # a text that has no pieces in this model, and no unknown token
        return []


def _cut(running: Any, text: str) -> tuple[list[int], list[str]]:
    """The ids and tokens of a text; none where the tokenizer can't cut it."""
    try:
        found = running.encode(text, add_special_tokens=False)
    except Exception:  # a character that has no token, and no unknown token
        return [], []
    return found.ids, found.tokens


def _samples(tokenizer: Tokenizer, running: Any) -> list[str]:
    """Texts to try: a few sentences, and words of the tokenizer's own."""
    places = sorted(tokenizer.core.values())
    words = [running.decode([place], skip_special_tokens=False) for place in places[:: max(1, len(places) // _WORDS)]]
    return [*TEXTS, *(word for word in words if word and "\N{REPLACEMENT CHARACTER}" not in word)]


def _cut_otherwise(result: Tokenizer, parent: Tokenizer) -> list[str]:
    """A note, where texts are cut into other tokens than the parent's model has learned from."""
    if result.data == parent.data:
        return []
    new, old = _running(result), _running(parent)
    texts = _samples(parent, old)
    cuts = [[_cut(running, text)[1] for running in (old, new)] for text in texts]
    differing = [(text, was, now) for text, (was, now) in zip(texts, cuts, strict=True) if was and was != now]
    if not differing:
        return []
    text, was, now = differing[0]
    example = next(((a, b) for a, b in zip(was, now, strict=False) if a != b), (was[-1:], now[-1:]))
    share = f"{len(differing)} of {len(texts)} sample texts are cut otherwise than by {parent.name}"
    return [f"{share}, e.g. {text!r} at {example[0]!r} -> {example[1]!r}"]

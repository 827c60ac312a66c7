"""A model folder's tokenizer as data: its tokens with their ids, and its files with tokens added. Not a tokenizer that runs.

tokenizer.json is read as the JSON it is, so that nothing heavy is loaded; only a folder without one is converted, by
transformers. The ids are those that the libraries give on loading: what tokenizer.json lists, then what
tokenizer_config.json adds. Format: https://huggingface.co/docs/tokenizers, https://huggingface.co/docs/transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interfuse.errors import CheckpointError, Problem
from interfuse.extras import require

MAIN = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"

#: Files that hold a vocabulary in an older form; beside a tokenizer.json that was changed they would contradict it.
_OLDER = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_LIST = "vocab.txt"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")

#: Where a model's small files are: its folder, or the files themselves by their path within it.
Home = Path | Mapping[str, bytes]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer: `name` for messages, `files` as they are to be written, `data` and `config` the two JSON files' values.

    `tokens` has each token's id, those included that transformers adds when it loads the folder. `bare` is one of which only
    the list of tokens is known, not how it cuts text: it can be kept, but not changed.
    """

    name: str
    files: dict[str, bytes]
    data: dict[str, Any]
    config: dict[str, Any]
    tokens: dict[str, int]
    bare: bool = False

    @property
    def kind(self) -> str:
        """`"BPE"`, `"WordPiece"`, `"Unigram"` or `"WordLevel"`."""
        return self.data["model"]["type"]

    @property
    def core(self) -> dict[str, int]:
        """The tokens that the model itself can make of text, without those that are added to it."""
        return core_of(self.data)

    def role(self, role: str) -> str | None:
        """The token that has a role (`"bos_token"`, ...), if any has."""
        return _content(self.config.get(role))


def tokenizer_files(home: Home) -> dict[str, bytes]:
    """The files of a model that belong to its tokenizer, by their path in its folder; chat templates included."""
    names = [MAIN, CONFIG, "special_tokens_map.json", *_OLDER, TEMPLATE]
    if isinstance(home, Mapping):
        return {name: home[name] for name in [*names, *home] if name in home and (name in names or _is_template(name))}
    paths = [home / name for name in names] + sorted((home / TEMPLATES).glob("*.jinja"))
    try:
        return {path.relative_to(home).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise CheckpointError(Problem(str(error.filename), f"can't be read: {error.strerror}")) from None


def has_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether there is a vocabulary among a model's files, not only what goes with one."""
    return MAIN in files or any(name in files for name in _OLDER if name != "added_tokens.json")


def read_json(home: Home, name: str, where: str) -> dict[str, Any]:
    """The JSON object in one of a model's files, empty where there is no such file; `where` is what to call the model."""
    if isinstance(home, Mapping):
        return decode(home, name, where)
    path = home / name
    return decode({name: path.read_bytes()} if path.is_file() else {}, name, where)


def read_tokenizer(home: Home, name: str | None = None) -> Tokenizer | None:
    """A model's tokenizer, or None where there is none; one that can't be read is a `CheckpointError`."""
    files = tokenizer_files(home)
    name = name or str(home)
    if MAIN in files:
        return _tokenizer(name, files, files)
    if not has_tokenizer(files):
        return None
    try:
        return _tokenizer(name, files, _converted(home, name))
    except CheckpointError:
        if _LIST not in files:
            raise
    return replace(_tokenizer(name, files, {**files, MAIN: _listed(files[_LIST])}), bare=True)


def with_tokens(tokenizer: Tokenizer, added: Iterable[Mapping[str, Any]]) -> Tokenizer:
    """The tokenizer with further added tokens, each an entry as in tokenizer.json (`content` and its flags, no `id`).

    Ids that exist stay; new ones follow the highest. A token that it has becomes an added one, under its own id.
    """
    tokens = dict(tokenizer.tokens)
    data = {**tokenizer.data, "model": dict(tokenizer.data["model"]), "added_tokens": list(_added(tokenizer.data))}
    listed = {entry["content"] for entry in data["added_tokens"]}
    core = core_of(data)
    implied = [{**_PLAIN, "special": True, "content": token} for token in tokens if token not in core]
    for entry in [*(entry for entry in implied if entry["content"] not in listed), *added]:
        token = entry["content"]
        if token in listed:
            continue
        listed.add(token)
        tokens.setdefault(token, max(tokens.values(), default=-1) + 1)
        data["added_tokens"].append({"id": tokens[token], **_PLAIN, **{k: v for k, v in entry.items() if k != "id"}})
    data["added_tokens"].sort(key=lambda entry: tokens[entry["content"]])
    if _as_loaded(data) != tokens:  # the library numbers added tokens by itself, unless the model's vocabulary has them
        data["model"]["vocab"] = with_core(data["model"], tokens)
    return rewritten(tokenizer, data, tokens)


def rewritten(tokenizer: Tokenizer, data: dict[str, Any], tokens: dict[str, int]) -> Tokenizer:
    """The tokenizer with another tokenizer.json, without the older files that say something else."""
    if tokenizer.bare:
        wrong = f"has only a {_LIST}, and transformers doesn't know for what tokenizer: no token can be added"
        raise CheckpointError(Problem(tokenizer.name, wrong, f"save it with a {MAIN}"))
    config = dict(tokenizer.config)
    if "added_tokens_decoder" in config:
        entries = [(str(e["id"]), {k: v for k, v in e.items() if k != "id"}) for e in _added(data)]
        config["added_tokens_decoder"] = dict(entries)
    files = {name: content for name, content in tokenizer.files.items() if name not in _OLDER}
    files |= {MAIN: encode(data), CONFIG: encode(config)}
    return replace(tokenizer, files=files, data=data, config=config, tokens=tokens)


def with_core(model: Mapping[str, Any], tokens: Mapping[str, int], scores: Mapping[str, float] | None = None) -> Any:
    """The model's `vocab` with all of `tokens` in it under their ids. A Unigram's new pieces have `scores`, or none to win."""
    if model["type"] != "Unigram":
        return dict(sorted(tokens.items(), key=lambda item: item[1]))
    known = {**(scores or {}), **dict(model["vocab"])}
    lowest = min(known.values(), default=0.0)  # any will do: an added token is cut out before the pieces compete
    names = {place: token for token, place in tokens.items()}
    size = max(names, default=-1) + 1
    unused = (f"<unused row {place}>" for place in range(size))
    return [[names.get(place, filler), known.get(names.get(place, filler), lowest)] for place, filler in enumerate(unused)]


def core_of(data: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the `model` in a tokenizer.json."""
    vocab = data["model"]["vocab"]
    return {piece: place for place, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def encode(value: Any) -> bytes:
    """JSON as these files have it."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "surrogatepass")


def decode(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object in one of the files, empty where there is no such file; anything else is a `CheckpointError`."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(f"{where}/{name}", f"isn't JSON: {error}", "get the file again")) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem(f"{where}/{name}", f"holds a {type(value).__name__}", "a JSON object is expected"))
    return value


def _tokenizer(name: str, files: dict[str, bytes], sources: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that is in `sources`, to be written as `files`: its own, or those it was converted from."""
    data, config = decode(sources, MAIN, name), decode(sources, CONFIG, name)
    for key, value in decode(sources, "special_tokens_map.json", name).items():
        config.setdefault(key, value)
    wrong = _damage(data)
    if wrong:
        raise CheckpointError(Problem(f"{name}/{MAIN}", wrong, "get the file again"))
    data["model"]["type"] = _kind(data["model"])
    tokens = _as_loaded(data)
    for token in _from_config(config):
        tokens.setdefault(token, max(tokens.values(), default=-1) + 1)
    return Tokenizer(name, files, data, config, tokens)


def _damage(data: Mapping[str, Any]) -> str:
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        return "has no model with a vocab"
    if _kind(model) not in _KINDS:
        return f"has a model of type {model.get('type')!r}, not one of {', '.join(_KINDS)}"
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        good = all(type(place) is int and place >= 0 for place in vocab.values())
    else:
        good = all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in vocab)
    if not good or isinstance(vocab, list) != (_kind(model) == "Unigram"):
        return f"has a vocab that a {_kind(model)} can't have"
    if not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in _added(data)):
        return "has added_tokens without content"
    return ""


def _kind(model: Mapping[str, Any]) -> str:
    """The type of a model; early files don't say it."""
    if "type" in model:
        return str(model["type"])
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _added(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return data.get("added_tokens") or []


def _as_loaded(data: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id as the tokenizers library gives it: an added token's own `id` counts for its order only."""
    tokens = dict(core_of(data))
    size, highest = len(tokens), -1
    for entry in sorted(_added(data), key=lambda entry: entry.get("id", 0)):
        token = entry["content"]
        if token not in tokens:
            tokens[token] = highest + 1 if highest >= size else size
        highest = max(highest, tokens[token])
    return tokens


def _from_config(config: Mapping[str, Any]) -> list[str]:
    """Tokens that tokenizer_config.json names, in the order in which transformers adds those that are missing."""
    listed = config.get("added_tokens_decoder")
    entries = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    values = [value for _, value in entries] + [config.get(role) for role in _ROLES]
    for name in _LISTS:
        more = config.get(name) or []
        values += list(more.values()) if isinstance(more, dict) else list(more)
    found = [_content(value) for value in values]
    return [token for token in dict.fromkeys(found) if token]


def _content(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _listed(content: bytes) -> bytes:
    """A tokenizer.json for the lines of a vocab.txt."""
    lines = content.decode("utf-8", "replace").split("\n")
    vocab = {line.rstrip("\r"): place for place, line in enumerate(lines) if line}
    return encode({"model": {"type": "WordPiece", "vocab": vocab}})


def _is_template(name: str) -> bool:
    return name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")


def _converted(home: Home, name: str) -> dict[str, bytes]:
    """The files that transformers makes of a tokenizer in an older form; no code from its folder runs."""
    if isinstance(home, Mapping):
        with tempfile.TemporaryDirectory() as put:
            for file, content in home.items():
                (Path(put) / file).parent.mkdir(exist_ok=True)
                (Path(put) / file).write_bytes(content)
            return _converted(Path(put), name)
    transformers = require("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(home), local_files_only=True)
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            files = tokenizer_files(Path(made))
    except Exception as error:  # whatever a damaged or unknown vocabulary makes its library raise
        reason = str(error).strip().partition("\n")[0][:200]
        wrong = f"has no {MAIN}, and transformers can't read its tokenizer ({type(error).__name__}: {reason})"
        raise CheckpointError(Problem(name, wrong, f"save it with a {MAIN}")) from None
    if MAIN not in files:
        raise CheckpointError(Problem(name, f"has a tokenizer that can't be written as a {MAIN}", "use another source"))
    return files

"""A folder or file behind a URL (https, s3, gs, ssh, memory, ...: whatever fsspec has) as a `Store`. Reads no tensors.

Files are kept in the user's cache folder, under a name made of the URL and of what the server says of each file's version,
so that a model that changes is fetched again. A web server needn't list its folders: usual names are tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from interfuse.checkpoints.folders import INDEX, MODULES, PIPELINE, SAFE, TORCH, weight_map
from interfuse.checkpoints.remote.store import Store
from interfuse.errors import CheckpointError, MissingExtra, Problem
from interfuse.extras import require
from interfuse.progress import track

_CHUNK = 2**22
_AT_ONCE = 8
#: What a server may say of a file's version.
_VERSION = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created", "md5Hash", "generation")
#: Files that a model may have, for servers that don't list them.
_USUAL = (
    *("config.json", PIPELINE, MODULES, "model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin"),
    *(f"pytorch_model.bin{INDEX}", "diffusion_pytorch_model.safetensors", "adapter_config.json", "adapter_model.safetensors"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "config_sentence_transformers.json", "README.md"),
)


def is_url(path: str) -> bool:
    """Whether it is a URL: `https://...`, `s3://...`."""
    return "://" in path


def url_store(url: str) -> tuple[Store | Path, str | None]:
    """The folder that a URL is or is in, and the file that it names, if it names one; a path where it's on this machine."""
    try:
        fsspec = require("fsspec")
    except MissingExtra:
        wrong = "a URL takes fsspec, which isn't installed"
        raise CheckpointError(Problem(url, wrong, "pip install 'interfuse[hub]', or give a path on this machine")) from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the protocol's own library, or no such protocol
        raise CheckpointError(Problem(url, f"can't be opened: {error}", "install what it takes, or give a path")) from None
    if "file" in _protocols(system):
        return Path(path), None
    base, file = _parted(path)
    found = _listed(system, base, url, file)
    files = _Files(system, base, found, url, Path())
    wanted = [name for name in found if file is None or name == file or _beside(file, name, files)]
    version = [[name, found[name].get("size"), *(str(found[name].get(key, "")) for key in _VERSION)] for name in sorted(wanted)]
    key = hashlib.sha256(json.dumps([url, version]).encode()).hexdigest()[:32]
    files.folder = cache_folder() / key
    return Store(url, url, files.folder, {name: found[name].get("size") for name in wanted}, files.read, files.get), file


def cache_folder() -> Path:
    """Where what comes from URLs is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interfuse" / "remote"


class _Files:
    """The files of one folder. A class, for what reading and fetching have in common."""

    def __init__(self, system: Any, base: str, found: Mapping[str, Any], url: str, folder: Path):
        self.system, self.base, self.found, self.url, self.folder = system, base, found, url, folder

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes of a file, by a request for just these."""
        here = self.folder / file
        with _told(f"{self.url}: {file}"):
            opened = here.open("rb") if here.is_file() else self._open(file, cache_type="none")
            with opened:
                opened.seek(start)
                content: bytes = opened.read(stop - start)
        return content

    def get(self, files: Sequence[str], shown: bool) -> None:
        """Fetch files into the cache, each whole or not at all."""
        missing = [file for file in files if not (self.folder / file).is_file()]
        total = sum(self.found[file].get("size") or 0 for file in missing) // _CHUNK + len(missing)
        for _ in track(self._chunks(missing), "downloading (4 MiB each)", total, shown=shown):
            pass

    def _chunks(self, files: Sequence[str]) -> Iterator[int]:
        for file in files:
            target = self.folder / file
            part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
            with _told(f"{self.url}: {file}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with self._open(file, block_size=_CHUNK) as opened, part.open("xb") as kept:
                        while block := opened.read(_CHUNK):
                            yield kept.write(block)
                    os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)

    def _open(self, file: str, **options: Any) -> Any:
        path = self.found[file]["name"]
        return self.system.open(path, "rb", **options)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What a file system raises, as a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(Problem(name, "isn't there", "check the URL")) from None
    except Exception as error:  # each file system has errors of its own
        reason = str(error).strip().partition("\n")[0][:200]
        wrong = f"can't be read ({type(error).__name__}{': ' + reason if reason else ''})"
        raise CheckpointError(Problem(name, wrong, "check the URL and its access rights, or give a path here")) from None


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _parted(path: str) -> tuple[str, str | None]:
    """The folder, and the file that a path names, told by its ending."""
    base, _, last = path.rstrip("/").rpartition("/")
    named = last.partition("?")[0]
    return (base, last) if named.endswith((SAFE, INDEX, *TORCH)) else (path.rstrip("/"), None)


def _beside(file: str, name: str, files: _Files) -> bool:
    """Whether a file is a shard of the index that was named."""
    return file.endswith(INDEX) and name in weight_map(f"{files.url}", files.read(file, 0, 2**30).decode()).values()


def _listed(system: Any, base: str, url: str, file: str | None) -> dict[str, Any]:
    """What is known of each file in the folder and directly in its sub-folders; of one file alone, if that is named."""
    with _told(url):
        if file is not None and not file.endswith(INDEX):
            return {file: system.info(f"{base}/{file}")}
        if "http" in _protocols(system):
            found = _of_web(system, base)
        else:
            entries = system.find(base, maxdepth=2, detail=True)
            found = {name[len(base.rstrip("/")) + 1 :]: entry for name, entry in entries.items()}
    if not found or (file is not None and file not in found):
        raise CheckpointError(Problem(url, "no such file or folder there", "check the URL, or name a file of weights in it"))
    return found


def _of_web(system: Any, base: str) -> dict[str, Any]:
    """What a web server lists in a folder, or else has of the usual names; each is asked for its size and version."""
    paths: list[str] = []
    with contextlib.suppress(FileNotFoundError, OSError):
        entries = system.ls(base + "/", detail=True)
        paths = [entry["name"] for entry in entries if entry["type"] == "file"]
        for sub in [entry["name"] for entry in entries if entry["type"] == "directory"]:
            paths += [entry["name"] for entry in system.ls(sub, detail=True) if entry["type"] == "file"]
    names = [path[len(base) + 1 :] for path in paths if path.startswith(base + "/") and "?" not in path]
    names = [name for name in names if ".." not in name.split("/")]
    if not any(name.endswith((SAFE, INDEX, *TORCH)) for name in names):
        names = [*dict.fromkeys([*names, *_USUAL])]

    def info(name: str) -> Any:
        try:
            return system.info(f"{base}/{name}")
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(names, pool.map(info, names), strict=True))
        found = {name: answer for name, answer in answers.items() if answer is not None}
        shards = [s for n in found if n.endswith(INDEX) for s in _shards_of(system, f"{base}/{n}") if s not in found]
        found |= {name: answer for name, answer in zip(shards, pool.map(info, shards), strict=True) if answer is not None}
    return found


def _shards_of(system: Any, path: str) -> list[str]:
    """The files that an index tells of, for servers that don't list them."""
    return list(dict.fromkeys(weight_map(path, system.cat_file(path).decode()).values()))

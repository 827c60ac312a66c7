"""A model on a hub as a `Store`: its revision resolved to a commit once, files in the hub's own cache. Reads no tensors.

Without a network, what an earlier run left in the cache is used. What a hub's client raises becomes a `CheckpointError` that
names the model and the way out.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from interfuse.checkpoints.remote.store import Store
from interfuse.errors import CheckpointError, MissingExtra, Problem
from interfuse.extras import require

_PATIENCE = 20.0  # seconds without an answer
_AT_ONCE = 4
_LOCAL = "give a folder or file on this machine"
_AWAY = {"ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "Timeout", "TimeoutError"}
_TOKEN = "set HF_TOKEN, or run `hf auth login`"


def is_hub_id(path: str, revision: str | None) -> bool:
    """Whether what isn't on this machine could be a hub id: `owner/name`, or any name with a revision."""
    return revision is not None or (not path.startswith(("/", ".", "~")) and path.count("/") == 1 and "://" not in path)


def hub_store(repo: str, revision: str | None) -> Store | Path:
    """The model's folder on the hub, or that in the cache where the hub can't be reached."""
    name = repo if revision is None else f"{repo}@{revision}"
    hub = _client(name)
    api = hub.HfApi()
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)
    except Exception as error:  # what a hub's client raises is its own affair
        cached = None if _kinds(error) & {"RevisionNotFoundError", "HFValidationError"} else _cached(repo, revision)
        if cached is None:
            raise CheckpointError(_problem(name, error)) from None
        return cached
    sizes = {item.rfilename: item.size for item in info.siblings or ()}
    folder = _snapshots(repo) / str(info.sha)
    files = _Files(hub, api, repo, str(info.sha), folder, name)
    first = next((file for file in ("config.json", "README.md", ".gitattributes") if file in sizes), None)
    if first is not None and revision != info.sha:  # its name in the cache is what a run without a network looks for
        files.fetch(first, revision)
    return Store(name, f"{repo}@{info.sha}", folder, sizes, files.read, files.get)


def fetched(ref: str, *, revision: str | None = None, **options: Any) -> Path:
    """The folder in the hub's cache with the descriptions and the safetensors of a model that was saved there: no code.

    ref: `owner/name` or `owner/name@revision`. options: `token`, `cache_dir`, `force_download` and `local_files_only`, as
    the hub's client has them. Raises `CheckpointError` for what is no such id, or can't be fetched.
    """
    repo, _, at = ref.partition("@")
    revision = revision or at or None
    name = repo if revision is None else f"{repo}@{revision}"
    if not is_hub_id(repo, revision):
        raise CheckpointError(Problem(ref, "no such folder", "one that save, merge or run wrote, or a hub id"))
    hub = _client(name)
    try:
        with _bars(True):
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*.safetensors"], **options))
    except Exception as error:  # what a hub's client raises is its own affair
        raise CheckpointError(_problem(name, error)) from None


def _client(name: str) -> ModuleType:
    try:
        return require("huggingface_hub")
    except MissingExtra:
        wrong = "is no file or folder here, and a hub id takes huggingface_hub, which isn't installed"
        raise CheckpointError(Problem(name, wrong, f"pip install 'interfuse[hub]', or {_LOCAL}")) from None


class _Files:
    """The files of one commit. A class, for what reading and fetching have in common."""

    def __init__(self, hub: ModuleType, api: Any, repo: str, commit: str, folder: Path, name: str):
        self.hub, self.api, self.repo, self.commit, self.folder, self.name = hub, api, repo, commit, folder, name
        self.utils = require("huggingface_hub.utils")

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes of a file, from the cache or by a request for just these."""
        here = self.folder / file
        if here.is_file():
            with here.open("rb") as opened:
                opened.seek(start)
                return opened.read(stop - start)
        url = self.hub.hf_hub_url(self.repo, file, revision=self.commit, endpoint=self.api.endpoint)
        headers = self.utils.build_hf_headers(token=self.api.token)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = self.utils.get_session().get(url, headers=headers, timeout=_PATIENCE)
            self.utils.hf_raise_for_status(response)
        except Exception as error:
            raise CheckpointError(_problem(f"{self.name}/{file}", error)) from None
        content: bytes = response.content
        return content[: stop - start] if response.status_code == 206 else content[start:stop]

    def get(self, files: Sequence[str], shown: bool) -> None:
        """Fetch files into the cache."""
        missing = [file for file in files if not (self.folder / file).is_file()]
        if not missing:
            return
        with _bars(shown), ThreadPoolExecutor(_AT_ONCE) as pool:
            problems = [problem for problem in pool.map(self._try, missing) if problem is not None]
        if problems:
            raise CheckpointError(*problems)

    def _try(self, file: str) -> Problem | None:
        try:
            self.api.hf_hub_download(self.repo, file, revision=self.commit)
        except Exception as error:
            return _problem(f"{self.name}/{file}", error)
        return None

    def fetch(self, file: str, revision: str | None) -> None:
        """Fetch one file by the name of its revision; if that fails, the file will be asked for again."""
        with _bars(False), contextlib.suppress(Exception):
            self.api.hf_hub_download(self.repo, file, revision=revision)


def _snapshots(repo: str) -> Path:
    return Path(require("huggingface_hub.constants").HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder in the cache of a revision that was fetched before."""
    snapshots = _snapshots(repo)
    ref = snapshots.parent / "refs" / (revision or "main")
    folder = snapshots / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision or "main")
    return folder if folder.is_dir() else None


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Off a terminal, and for small files, without the hub's own progress bars."""
    utils = require("huggingface_hub.utils")
    if (shown and sys.stderr.isatty()) or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _problem(name: str, error: Exception) -> Problem:
    """What a hub's client raised, in our words."""
    kinds, code = _kinds(error), getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds:
        return Problem(name, "is gated on the hub", f"ask for access on its page, and {_TOKEN}")
    if "RepositoryNotFoundError" in kinds or code in (401, 403):
        wrong = "is no file or folder here, and no model on the hub that you may read"
        return Problem(name, wrong, f"check the name, {_LOCAL}, or for a private model {_TOKEN}")
    if "RevisionNotFoundError" in kinds:
        return Problem(name, "has no such revision on the hub", "give a branch, tag or commit that it has")
    if "HFValidationError" in kinds:
        return Problem(name, "is no file or folder here, and can't be a hub id", f"{_LOCAL}, or owner/name")
    reason = str(error).strip().partition("\n")[0][:200]
    if code is None and kinds & _AWAY:
        wrong = f"is no file or folder here, nor in the hub's cache, and the hub can't be reached ({reason})"
        return Problem(name, wrong, f"{_LOCAL}, or run again with a network")
    return Problem(name, f"can't be fetched from the hub ({type(error).__name__}: {reason})", f"{_LOCAL}, or try again later")

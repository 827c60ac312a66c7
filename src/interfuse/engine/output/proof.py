"""That the output loads, where its library is installed: before it is written, and beside the work where that takes a library.

An output with a parent's tensor names, shapes and config loads if the parent does: nothing needs to run. Others
(frankenmerges, other vocabularies, mixtures) are loaded by transformers from their header alone (`loading`). A misfit that
the parent has as well is a note, any other an error, and then there is no output. What can't be told is said in the record.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import interfuse
from interfuse.checkpoints.folders import MODULES, PIPELINE
from interfuse.checkpoints.header import TensorSpec, encode_header
from interfuse.checkpoints.source import Checkpoint
from interfuse.engine.output.loading import CANT
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import config_of

_SHOWN = 5
_LIMIT = 600.0  # seconds
_DTYPES = ("dtype", "torch_dtype")


class Proof:
    """What is known of an output's loading: at once, or when a process says it. A class, for that process."""

    def __init__(self, name: str, said: str, process: subprocess.Popen[str] | None = None):
        self._name, self.said, self._process = name, said, process
        self.notes: list[str] = []
        self._lock = threading.Lock()

    def look(self) -> None:
        """Nothing while the process runs or if all is well; a `CheckpointError` if the output doesn't load."""
        process = self._process
        if process is not None and process.poll() is not None:
            self.finish()

    def finish(self) -> None:
        """`look`, once the process has ended; `said` is then what the record says."""
        with self._lock:  # threads that merge look all at once
            process, self._process = self._process, None
            if process is None:
                return
            try:
                text, _ = process.communicate(timeout=_LIMIT)
                output, lead = json.loads(text.strip().rpartition("\n")[2])
            except (ValueError, subprocess.TimeoutExpired):
                process.kill()
                process.communicate()
                self.said = f"not checked: transformers ended with status {process.returncode}"
            else:
                self.said, self.notes = judged(self._name, output, lead)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def proof(
    specs: Mapping[str, TensorSpec], lead: Checkpoint, beside: Mapping[str, bytes | None], parents: Sequence[Checkpoint] = ()
) -> Iterator[Proof]:
    """The proof for an output with these tensors, whose side files are the lead's but for those `beside`.

    An output with a parent's names, shapes and config is as that parent is.
    """
    config = config_of(lead)
    made = config if beside.get("config.json") is None else json.loads(beside["config.json"] or b"")
    reason = _by_equality(specs, lead, beside, parents) or _not_told(made)
    if reason or config is None:
        yield Proof(lead.name, reason or "not checked: the model it follows has no config.json")
        return
    with tempfile.TemporaryDirectory(prefix="interfuse-") as folder:
        process = _started(Path(folder), [(made, specs), (config, lead.specs)])
        found = Proof(lead.name, "", process)
        try:
            yield found
        finally:
            found.stop()


def _by_equality(
    specs: Mapping[str, TensorSpec], lead: Checkpoint, beside: Mapping[str, bytes | None], parents: Sequence[Checkpoint]
) -> str:
    """What is said of an output that is as a model of the lead's, or a parent, but for values and types; else nothing."""
    for model in [model for parent in (lead, *parents) for model in _models(parent)]:
        same = specs.keys() == model.specs.keys() and all(spec.shape == model.specs[n].shape for n, spec in specs.items())
        if same and all(_config(lead, inner, beside) == _untyped(config_of(model, inner)) for inner in ("", *lead.stems)):
            return f"as {model.name} does: tensor names, shapes and config are the same"
    return ""


def _models(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The models that a checkpoint is or is computed from."""
    return [model for part in checkpoint.within for model in _models(part)] if checkpoint.within else [checkpoint]


def _config(lead: Checkpoint, inner: str, beside: Mapping[str, bytes | None]) -> Any:
    """The output's config, or that in a sub-folder, without the types of numbers in it."""
    content = beside.get(f"{inner}config.json")
    return _untyped(config_of(lead, inner) if content is None else json.loads(content))


def _untyped(config: Any) -> Any:
    """A config without the types of numbers in it."""
    if not isinstance(config, dict):
        return config
    return {key: _untyped(value) for key, value in config.items() if key not in _DTYPES}


def _not_told(config: dict[str, Any] | None) -> str:
    """Why it can't be told whether a model with this config loads; nothing if it can."""
    if config is None:
        return "not checked: there is no config.json"
    names = config.get("architectures")
    named = isinstance(names, list) and len(names) > 0 and isinstance(names[0], str) and names[0].isidentifier()
    if not named or not isinstance(config.get("model_type"), str):
        return "not checked: config.json doesn't say which of transformers' classes it is for"
    if "auto_map" in config:
        return "not checked: its code is in its folder, and isn't run"
    return "" if available() else "not checked: transformers isn't installed"


def available() -> bool:
    """Whether transformers is installed; it isn't imported."""
    return importlib.util.find_spec("transformers") is not None


def _started(folder: Path, models: list[tuple[Any, Mapping[str, TensorSpec]]]) -> subprocess.Popen[str]:
    """The process that loads folders with these configs and headers."""
    for i, (config, specs) in enumerate(models):
        place = folder / str(i)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        head, _ = encode_header(specs, {"format": "pt"})
        with (place / "model.safetensors").open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
    paths = [str(Path(interfuse.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "interfuse.engine.output.loading", *(str(folder / str(i)) for i in range(len(models)))],
        cwd=folder, env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def judged(name: str, output: Mapping[str, Any], lead: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What the record says of the output's loading, and notes; a `CheckpointError` for a misfit that the lead hasn't.

    Both are what `loading.load` gives.
    """
    by = output["by"]
    if CANT in output:
        return f"not checked: {output[CANT]}", []
    if "error" in output:
        if "error" in lead or CANT in lead:
            return f"not checked: {by} doesn't load {name} either ({output['error']})", []
        wrong = f"{by} loads {name}, and wouldn't load the result ({output['error']})"
        raise CheckpointError(Problem("the result", wrong, "check the recipe's layers and tokenizer"))
    problems, notes = [], []
    for what in ("missing", "unexpected", "mismatched"):
        known = {_numberless(found) for found in lead.get(what, ())}
        new = [found for found in output[what] if _numberless(found) not in known]
        if new and "error" not in lead and "can't" not in lead:
            shown = ", ".join(new[:_SHOWN]) + (f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else "")
            allowed = "name them under `drop`" if what == "unexpected" else "check the recipe's layers, tokenizer and `drop`"
            problems.append(Problem("the result", f"{by} finds {what} tensors in it: {shown}", allowed))
        elif output[what]:
            notes.append(f"{by} finds {len(output[what])} {what} tensors in the result, as in {name}: {output[what][0]}, ...")
    if problems:
        raise CheckpointError(*problems)
    return f"by {by}, from its header", notes


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def missing_parts(folder: Path) -> list[str]:
    """Notes on parts that a folder's list names (a pipeline's, or a stack's modules) and that aren't in it."""
    found: list[Any] = []
    if (folder / PIPELINE).is_file():
        parts = json.loads((folder / PIPELINE).read_text(encoding="utf-8")).items()
        found = [key for key, value in parts if isinstance(value, list) and value and value[0] is not None]
    elif (folder / MODULES).is_file():
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))  # Normalize's folder is empty, and no hub keeps it
        found = [m["path"] for m in modules if m.get("path") and not str(m.get("type")).endswith(".Normalize")]
    return [f"{part} is listed, and wasn't there to come along" for part in found if not (folder / str(part)).is_dir()]

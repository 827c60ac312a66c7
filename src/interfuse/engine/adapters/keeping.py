"""What an adapter can hold of each tensor of a model: factors, the whole tensor, or nothing. Read off names and shapes.

peft saves whole modules, found by how their names end, and the biases apart; a module that has factors can't be saved too.
These rules are here. No tensor is read but to ask, through a function, whether it has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from interfuse.checkpoints.numbers import STORED_FLOATS
from interfuse.checkpoints.source import Checkpoint
from interfuse.errors import CheckpointError, Problem

How = Literal["lora", "whole", "skip"]

#: The last parts of names that embeddings have: their weight is [vocabulary, width], and looked up, not multiplied.
_EMBEDDING = re.compile(
    r"(\w+_)?embed(ding)?s?(_(tokens|positions|in|keys))?|wte|wpe|shared|relative_attention_bias|bias_embedding"
)
#: Model types whose layers store matrices as [in, out], and the last parts of those matrices' names.
_TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.q_attn.weight")


@dataclass
class Parts:
    """How each tensor is kept. `saved` are peft's `modules_to_save`, `biases` those saved apart from their modules."""

    how: dict[str, How]
    modules: Collection[str]
    embeddings: set[str] = field(default_factory=set)
    transposed: set[str] = field(default_factory=set)
    saved: list[str] = field(default_factory=list)
    biases: set[str] = field(default_factory=set)

    def stored_name(self, name: str) -> str:
        """The name of a whole tensor in the adapter: the bias of a module with factors is inside peft's layer."""
        module, _, last = name.rpartition(".")
        return f"{module}.base_layer.{last}" if self.how.get(f"{module}.weight") == "lora" else name

    def targets(self, modules: Sequence[str]) -> list[str]:
        """peft's `target_modules`: last parts of names, where all modules that end so have factors; else full names."""
        chosen = set(modules)
        ends: dict[str, list[str]] = {}
        for module in self.modules:
            ends.setdefault(module.rpartition(".")[2], []).append(module)
        short = {end for end, named in ends.items() if chosen.issuperset(named)}
        ended = ((module, module.rpartition(".")[2]) for module in modules)
        return list(dict.fromkeys(end if end in short else module for module, end in ended))


def sort_parts(
    base: Checkpoint,
    names: Sequence[str],
    differs: Callable[[str], bool],
    embeddings: How,
    others: How,
    transposed: Sequence[str] | None,
) -> Parts:
    """How each of `names` is kept: matrices as factors, embeddings and others as asked; what hasn't changed isn't there.

    What can't be saved as asked is a `CheckpointError` that names it all. `transposed` as in `extract_lora`.
    """
    parts = Parts({}, _modules(base.specs))
    patterns = _transposed(base) if transposed is None else transposed
    whole = []
    for name in names:
        spec, (module, _, last) = base.specs[name], name.rpartition(".")
        matrix = len(spec.shape) == 2 and last == "weight" and spec.dtype in STORED_FLOATS and bool(spec.count)
        embedding = matrix and _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None
        how: How = embeddings if embedding else "lora" if matrix else others
        if embedding:
            parts.embeddings.add(name)
        elif matrix and any(fnmatchcase(name, pattern) for pattern in patterns):
            parts.transposed.add(name)
        if differs(name):
            parts.how[name] = how
            if how == "whole":
                whole.append(name)
    _save_modules(parts, base, names, whole)
    return parts


def _save_modules(parts: Parts, base: Checkpoint, names: Sequence[str], whole: Sequence[str]) -> None:
    """Find the modules to save for these tensors, and put all that is in them down as whole."""
    problems = []
    modules: dict[str, None] = {}
    for name in whole:
        module, _, last = name.rpartition(".")
        if last == "bias":
            parts.biases.add(name)
        elif not module:
            problems.append(Problem(base.name, f"{name!r} is in no module that peft could save", "exclude it, or skip others"))
        else:
            modules[module] = None
    # peft takes every module whose name ends so, dot or none.
    modules = dict.fromkeys(found for found in parts.modules if found.endswith(tuple(modules))) if modules else {}
    parts.saved = [module for module in modules if not any(above in modules for above in _above(module))]
    within = dict.fromkeys(parts.saved)
    given = set(names)
    for name in base.specs:
        if any(above in within for above in _above(name)):
            parts.biases.discard(name)
            if name not in given:
                wrong = f"{name!r} is excluded, and peft saves its module whole"
                problems.append(Problem(base.name, wrong, "exclude the module, or skip embeddings or others"))
            parts.how[name] = "whole"
    if problems:
        raise CheckpointError(*problems)
    parts.how = {name: parts.how[name] for name in base.specs if name in parts.how}


def _modules(names: Collection[str]) -> dict[str, None]:
    """Every module that a tensor is in, directly or not."""
    return dict.fromkeys(module for name in names for module in reversed(_above(name)))


def _above(name: str) -> list[str]:
    """The modules that a tensor or module is in, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _transposed(base: Checkpoint) -> Sequence[str]:
    path = base.folder / "config.json" if base.folder else None
    if path is None or not path.is_file():
        return ()
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(Problem(str(path), "isn't JSON", "get the file again")) from None
    found = config.get("model_type") if isinstance(config, dict) else None
    return _TRANSPOSED if found in _TRANSPOSED_TYPES else ()

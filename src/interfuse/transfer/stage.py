"""One stage of `Stages`, as it is asked for: what is copied, whether the network grows, what is trained. It does nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stage:
    """One step of `Stages`.

    name: for the record; left out, "stage 1", "stage 2", ...
    copied: what is copied first, by the name of the model that it comes from: globs of tensors, or options of
        `transplant` (rules, depth, adapt, ...; {} is all that fits by name).
    grow: a function from the network to a larger one, such as `lambda net: itf.grow(net, deeper=["blocks.3"], example=x)`.
    train: globs of the parameters that are trained, or "head"; None is all of them, an empty list trains nothing.
    data: (train, validation) in place of the data of all stages.
    options: of `fit`: epochs, learning_rate, layer_decay, patience, lora, precision, ...
    """

    name: str = ""
    copied: Mapping[str, str | Sequence[str] | Mapping[str, Any]] = field(default_factory=dict)
    grow: Callable[[nn.Module], nn.Module] | None = None
    train: Sequence[str] | str | None = None
    data: tuple[Any, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def copies(self) -> dict[str, dict[str, Any]]:
        """`copied` as options of `transplant`."""
        alone = lambda globs: {"rules": {**{g: g for g in ([globs] if isinstance(globs, str) else globs)}, "*": None}}
        return {name: dict(how) if isinstance(how, Mapping) else alone(how) for name, how in self.copied.items()}

    def written(self) -> dict[str, Any]:
        """What of a stage can be written down, to know it again."""
        options = {name: _said(value) for name, value in self.options.items()}
        return {
            "name": self.name,
            "copied": _said(dict(self.copied)),
            "train": self.train,
            "grows": self.grow is not None,
            **options,
        }


def _said(value: Any) -> str:
    """A value in words that are the same in another process: a function or object without its address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))

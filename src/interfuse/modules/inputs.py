"""How a network is called, and what it gives back: the one place that knows the shapes that inputs and outputs come in.

Inputs are a tensor, a tuple of positional arguments, or a mapping of keyword arguments (a tokenizer's batch). A network
made of networks (`Composite`) takes them as one value, and also a mapping from model name to that model's own inputs, with
marks of which examples lack them (`Marked`). This module doesn't pool features (`taps` does) or read data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interfuse.errors import DataError, ModelError, Problem, nearest
from interfuse.modules.pretrained import Pretrained

#: Where a batch that is a mapping keeps its targets.
TARGET_KEYS = ("labels", "label", "targets", "target")
#: Where a batch that is a mapping says which examples have an input: {model name: booleans (batch,)}.
PRESENT = "present"


class Composite(Pretrained):
    """A network made of networks: `forward(inputs)` takes the inputs as one value and hands each member its own."""

    names: tuple[str, ...]

    @property
    def held(self) -> int:
        """Bytes that it keeps beside its parameters and buffers."""
        return 0


class Marked(NamedTuple):
    """One model's inputs, of which some examples may hold nothing: `present` is (batch,), False where they don't count."""

    inputs: Any
    present: Tensor


def call(model: nn.Module, inputs: Any, name: str = "model") -> Any:
    """Call `model` on `inputs`. Keywords that it doesn't know are left out; inputs it needs and lacks are a `ModelError`."""
    if isinstance(model, Composite):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**_keywords(model, inputs, name))
    arguments = inputs if isinstance(inputs, tuple | list) else (inputs,)
    try:
        return model(*arguments)
    except TypeError as error:
        if problem := _misfit(model, arguments, name):
            raise ModelError(problem) from error
        raise


def _misfit(model: nn.Module, arguments: Sequence[Any], name: str) -> Problem | None:
    """How the number of arguments doesn't fit `forward`; None where it does, or where its signature isn't known."""
    try:
        signature = inspect.signature(model.forward)
        signature.bind(*arguments)
    except TypeError:
        wrong = f"takes the inputs {list(signature.parameters)}, but gets {len(arguments)} by position"
        return Problem(name, wrong, "give a tuple of them, a mapping by keyword, or each model its own: {model name: inputs}")
    except ValueError:
        return None
    return None


def _keywords(model: nn.Module, inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {k: v for k, v in inputs.items() if takes_all or k in parameters}
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and key not in known
    ]
    if needed or not known:
        raise ModelError(
            Problem(
                name,
                f"needs the inputs {needed or list(parameters)}, but the batch holds {list(inputs)}",
                "give them by keyword, or give each model its own: {model name: inputs}",
            )
        )
    return known


def inputs_by_model(names: Sequence[str], inputs: Any, reads: Sequence[str] = (), *, missing: bool = False) -> list[Any]:
    """Each model's own inputs, in the order of `names`: all of them get `inputs`, unless it maps names to inputs.

    In such a mapping every model must be named; None says that this model's input is missing. `reads` are the names of what
    each model reads, by which a mapping may also go. With `missing` a model that isn't named has no input, and one whose
    input some examples lack, by the batch's `present`, gets it as `Marked`.
    """
    inputs, marks = _marks(inputs)
    reads = reads or names
    if isinstance(inputs, Mapping) and any(key in (*names, *reads) for key in inputs):
        own = _named(names, reads, inputs, missing=missing)
    else:
        own = [inputs] * len(names)
    return own if marks is None else _marked(names, reads, own, marks, missing=missing)


def _named(names: Sequence[str], reads: Sequence[str], inputs: Mapping[str, Any], *, missing: bool) -> list[Any]:
    """Each model's entry in a mapping, by its own name, else by that of what it reads."""
    known = list(dict.fromkeys((*names, *reads)))
    keys = [name if name in inputs else read for name, read in zip(names, reads, strict=True)]
    unknown = [
        Problem(f"inputs[{key!r}]", "no model has this name", nearest(str(key), known)) for key in inputs if key not in known
    ]  # fmt: skip
    absent = [key for key in dict.fromkeys(keys) if key not in inputs] if unknown or not missing else []
    allowed = "give this model its inputs, or None where there are none"
    problems = [*(Problem(f"inputs[{key!r}]", "missing", allowed) for key in absent), *unknown]
    if problems:
        raise ModelError(*problems)
    own = [inputs.get(key) for key in keys]
    if all(value is None for value in own):
        raise ModelError(Problem("inputs", "every model's input is None", "give at least one model its inputs"))
    return own


def _marks(inputs: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """The inputs without their marks, and these."""
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get(PRESENT), Mapping):
        return inputs, None
    return {key: value for key, value in inputs.items() if key != PRESENT}, inputs[PRESENT]


def _marked(
    names: Sequence[str], reads: Sequence[str], own: list[Any], marks: Mapping[str, Any], *, missing: bool
) -> list[Any]:  # fmt: skip
    """Each model's inputs with its marks, by its own name or that of what it reads."""
    known = [*names, *reads]
    problems = [
        Problem(f"inputs[{PRESENT!r}][{key!r}]", "no model has this name", nearest(str(key), known))
        for key in marks
        if key not in known
    ]
    found: list[Any] = []
    for name, read, value in zip(names, reads, own, strict=True):
        key = name if name in marks else read
        if value is None or key not in marks:
            found.append(value)
            continue
        there, count = torch.as_tensor(marks[key]), batch_size(value)
        if there.dtype != torch.bool or there.shape != (count,):
            wrong = f"got {there.dtype} of shape {tuple(there.shape)}".replace("torch.", "")
            problems.append(Problem(f"inputs[{PRESENT!r}][{key!r}]", wrong, f"booleans ({count},), one an example"))
        elif missing:
            found.append(Marked(value, there))
        elif there.all():
            found.append(value)
        else:
            wrong = f"the input of {name} is missing in {int((~there).sum())} of {count} examples"
            problems.append(Problem(f"inputs[{PRESENT!r}]", wrong, "a ModelFusion, which can do without; or whole examples"))
    if problems:
        raise ModelError(*dict.fromkeys(problems))
    return found


def lacks(model: nn.Module, inputs: Any) -> bool:
    """Whether keyword inputs hold nothing that `model` knows by name: its input is missing from the batch."""
    given = inputs.inputs if isinstance(inputs, Marked) else inputs
    if not isinstance(given, Mapping) or isinstance(model, Composite):
        return False
    parameters = inspect.signature(model.forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return bool(known) and all(given.get(name) is None for name in known)


def prediction(output: Any, name: str = "model") -> Tensor:
    """The prediction in what a network returns: a tensor, `.logits`, `["logits"]`, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
        for key in ("logits", "prediction", "predictions", "output", "out"):
            if key in tensors:
                return tensors[key]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
    elif isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    elif isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    found = list(output) if isinstance(output, Mapping) else type(output).__name__
    raise ModelError(Problem(name, f"its output {found} holds no prediction", "return a tensor, or a mapping with 'logits'"))


class Called(nn.Module):
    """A network's prediction for inputs in whichever form: what `torch.func.functional_call` calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Any) -> Tensor:
        """-> the network's `prediction`."""
        return prediction(call(self.network, inputs))


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch as (inputs, targets): a pair, (a, b, ..., targets), a mapping with "labels", or inputs alone.

    Of a tuple the last entry is the targets; a tuple of one is inputs alone.
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, _targets(batch[key])
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) > 0:
        if len(batch) == 1:
            return batch[0], None
        return batch[0] if len(batch) == 2 else tuple(batch[:-1]), _targets(batch[-1])
    return batch, None


def _targets(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value)


def move(inputs: Any, device: torch.device | str) -> Any:
    """`inputs` with every tensor on `device`; the structure stays."""
    return with_each(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def with_each(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """`inputs` with `function` of each tensor in its place; the structure stays, mappings become dicts."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: with_each(value, function) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        values = [with_each(value, function) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    return inputs


def tensors_of(inputs: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in `inputs` with its path, in a fixed order."""
    if isinstance(inputs, Tensor):
        return [(path, inputs)]
    if isinstance(inputs, Mapping):
        return [found for key in inputs for found in tensors_of(inputs[key], f"{path}.{key}")]
    if isinstance(inputs, tuple | list):
        return [found for i, value in enumerate(inputs) for found in tensors_of(value, f"{path}[{i}]")]
    return []


def batch_size(inputs: Any) -> int:
    """How many examples `inputs` holds: the first dimension of its first tensor that has one."""
    for _, tensor in tensors_of(inputs):
        if tensor.ndim:
            return tensor.shape[0]
    raise DataError(
        Problem("inputs", f"no tensor with a batch dimension in {type(inputs).__name__}", "give tensors (batch, ...)")
    )

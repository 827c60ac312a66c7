"""Whether each network can read the data: tried on two examples before anything that takes long. Nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from interfuse.data import Data
from interfuse.errors import DataError, ModelError, Problem, UserError
from interfuse.inference.batches import first
from interfuse.modules.inputs import Marked, call, inputs_by_model, split_batch, tensors_of
from interfuse.modules.taps import quiet


def try_networks(networks: Mapping[str, nn.Module], data: Data) -> None:
    """Run every network once on the first two examples; a `ModelError` with each one that can't read them."""
    inputs, _ = split_batch(first(data.loader(2)))
    own = [x.inputs if isinstance(x, Marked) else x for x in inputs_by_model(list(networks), inputs, missing=True)]
    problems: list[Problem] = []
    for i, ((name, network), given) in enumerate(zip(networks.items(), own, strict=True)):
        try:
            with quiet(network), torch.no_grad():
                call(network, given, name)
        except UserError as error:
            problems += [Problem(f"models[{i}] ({name})", problem.wrong, problem.allowed) for problem in error.problems]
        except Exception as error:  # whatever the network's own code raises
            wrong = f"can't read the data, {_shapes(given)}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            problems.append(Problem(f"models[{i}] ({name})", wrong, "data of the shape that the network was made for"))
    if problems:
        raise ModelError(*problems)


def check_whole(sets: Mapping[str, Data]) -> None:
    """Raise a `DataError` where inputs are missing from some examples: only a fusion of features does without them."""
    problems = [
        Problem(
            f"data.{key}", f"{name} is missing in {count} of {len(data)} examples", "a fusion of features, or whole examples"
        )
        for key, data in sets.items()
        for name, count in data.missing.items()
    ]
    if problems:
        raise DataError(*problems)


def _shapes(inputs: Any) -> str:
    """`float32 [2, 1, 28, 28]`, or each part with its name."""
    found = [
        f"{path.lstrip('.')} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}".strip()
        for path, tensor in tensors_of(inputs)
    ]
    return ", ".join(found) or f"a {type(inputs).__name__}"

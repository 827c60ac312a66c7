"""`export`: a network as a program that runs without its Python code, ONNX or torch.export, proved to compute the same.

A fused network is traced whole, its members and their taps included, to a graph from input tensors to predictions, for
batches of any size. The written program is run beside the network before it's put in place. Saving networks to go on with is
`saving`'s; this is for serving them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interfuse.errors import CheckpointError, DataError, ModelError, OptionError, Problem, UserError
from interfuse.extras import require, silenced
from interfuse.modules.fused import ModelFusion
from interfuse.modules.inputs import call, prediction, tensors_of, with_each
from interfuse.modules.taps import quiet

#: The suffix of a file -> what is written to it.
FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}


@dataclass(frozen=True)
class ExportRecord:
    """What was written: the file, its format and bytes, the names of its inputs in order, and how far its outputs are off."""

    path: Path
    format: str
    inputs: tuple[str, ...]
    difference: float
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return {**asdict(self), "path": str(self.path), "inputs": list(self.inputs)}

    def __str__(self) -> str:
        inputs = ", ".join(self.inputs)
        return (
            f"{self.path}: {self.format}, {self.nbytes / 1e6:.1f} MB, inputs {inputs}; outputs differ by {self.difference:.1g}"
        )


def export(
    model: nn.Module, path: str | Path, example: Any, *, tolerance: float = 1e-4, overwrite: bool = False
) -> ExportRecord:
    """Write `model` in evaluation mode to a file that runs without its code: `.onnx` for ONNX, `.pt2` for torch.export.

    example: inputs as the model takes them (a tensor, a tuple, a mapping by keyword, or by member), two examples or more.
        Their tensors become the program's inputs, named `input`, or by keyword and member; the output is the prediction.
        The first axis of each may have any size afterwards, and so may the second one of tokens (whole numbers) where the
        network lets it; other axes have the example's.
    tolerance: how far outputs of the written program may be from the model's, as a part of the largest output (or of 1). It
        is run on the example and on batches of other sizes.
    Raises `OptionError`, `DataError`, or `ModelError` where the network can't be traced or the program computes something
    else, and `CheckpointError` where the file exists and isn't to be overwritten. No file is left by a failure.
    """
    path = Path(path)
    _check(path, tolerance, overwrite)
    given = dict(tensors_of(example))
    _check_example(given)
    names = _names(list(given))
    with quiet(model):
        if isinstance(model, ModelFusion):
            model.build(example)
        whole = _Flat(model, example)
        program = _traced(whole, tuple(given.values()))
        part = path.with_name(f".{path.name}.part{path.suffix}")
        try:
            with silenced("torch.onnx"):
                _WRITERS[path.suffix](program, part, names)
                found = max(_difference(whole, part, names, batch) for batch in _batches(program, list(given.values())))
            if not found <= tolerance:
                wrong = f"the {FORMATS[path.suffix]} program's outputs are off by {found:.2g} of the largest"
                raise ModelError(Problem("model", wrong, f"at most {tolerance}; a network without chance and in float32"))
            nbytes = part.stat().st_size
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return ExportRecord(path, FORMATS[path.suffix], tuple(names), found, nbytes)


class _Flat(nn.Module):
    """A model that takes its tensors one by one, in the order in which they stand in `example`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self, *tensors: Tensor) -> Tensor:
        """The prediction."""
        left = iter(tensors)
        return prediction(call(self.model, with_each(self.example, lambda _: next(left))))


def _check(path: Path, tolerance: float, overwrite: bool) -> None:
    problems = []
    if path.suffix not in FORMATS:
        allowed = " or ".join(f"{suffix} for {name}" for suffix, name in FORMATS.items())
        problems.append(Problem("path", f"{path.name} has no suffix that names a format", allowed))
    if not 0 < tolerance < 1:
        problems.append(Problem("tolerance", f"got {tolerance!r}", "a number between 0 and 1"))
    if problems:
        raise OptionError(*problems)
    if path.exists() and not overwrite:
        raise CheckpointError(Problem(str(path), "is there already", "overwrite=True, or another name"))
    if not path.parent.is_dir():
        raise CheckpointError(Problem(str(path.parent), "is no folder", "make it first"))
    if path.suffix == ".onnx":
        require("onnxscript")
        require("onnxruntime")


def _check_example(given: dict[str, Tensor]) -> None:
    problems = []
    if not given:
        problems.append(Problem("example", "holds no tensors", "inputs as the model takes them"))
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in given.values()}
    if given and (len(sizes) > 1 or min(sizes) < 2):
        found = ", ".join(f"{path or 'input'} {tuple(tensor.shape)}" for path, tensor in given.items())
        problems.append(Problem("example", f"got {found}", "the same number of examples in each, two or more"))
    if problems:
        raise DataError(*problems)


def _names(paths: Sequence[str]) -> list[str]:
    """Input names of letters, digits and underscores, each once."""
    names: list[str] = []
    for path in paths:
        plain = re.sub(r"\W+", "_", path).strip("_") or "input"
        plain = f"input_{plain}" if plain[0].isdigit() else plain
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}_{number}", number + 1
        names.append(name)
    return names


def _traced(whole: _Flat, tensors: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    any_size, if_it_can = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    axes = tuple({0: any_size} | ({1: if_it_can} if _is_tokens(tensor) else {}) for tensor in tensors)
    try:
        with silenced("torch.onnx"):
            whole(*tensors)  # what is wrong with the example is said by the network, not by the tracer
            with redirect_stderr(io.StringIO()):  # where torch prints the graph that it had until an error
                return torch.export.export(whole, tensors, dynamic_shapes=(axes,), strict=False)
    except UserError:
        raise
    except Exception as error:  # whatever torch finds in the network's code
        wrong = f"can't be traced: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        allowed = "a network whose forward pass doesn't depend on its inputs' values, nor on how many they are"
        raise ModelError(Problem("model", wrong, allowed)) from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> None:
    written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=list(names), output_names=["prediction"])
    assert written is not None
    written.save(path)


def _write_torch(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> None:
    torch.export.save(program, path)


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_torch}


def _is_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point() and tensor.shape[1] > 2


def _batches(program: torch.export.ExportedProgram, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The example; one example more than it has; and, where the length of texts may be any, a token less."""
    order = torch.tensor([*range(len(tensors[0])), 0])
    found = [tuple(tensors), tuple(tensor[order.to(tensor.device)] for tensor in tensors)]
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-len(tensors) :]
    tokens = [(t.shape[1], str(v.shape[1]).isdigit()) for t, v in zip(tensors, given, strict=True) if _is_tokens(t)]
    free = {length for length, _ in tokens} - {length for length, fixed in tokens if fixed}
    if free:
        found.append(tuple(t[:, :-1].contiguous() if _is_tokens(t) and t.shape[1] in free else t for t in tensors))
    return found


def _difference(whole: _Flat, path: Path, names: Sequence[str], batch: tuple[Tensor, ...]) -> float:
    """The largest distance between the model's and the written program's outputs, as a part of the largest output or of 1."""
    expected = whole(*batch).detach().double().cpu()
    try:
        if path.suffix == ".onnx":
            session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
            given = {name: tensor.cpu().numpy() for name, tensor in zip(names, batch, strict=True)}
            got = torch.from_numpy(session.run(None, given)[0])
        else:
            got = torch.export.load(path).module()(*batch)
    except Exception as error:  # the program was made for the example's size alone, or its reader lacks an operation
        wrong = f"the written program doesn't run on {len(batch[0])} examples: {str(error).strip().partition(chr(10))[0]}"
        raise ModelError(Problem("model", wrong, "a network that treats each example alike")) from error
    if got.shape != expected.shape:
        return float("inf")
    got, finite = got.double().cpu(), expected[expected.isfinite()].abs()
    distance = torch.where(got == expected, 0.0, (got - expected).abs())  # equal infinities: classes without any chance
    return float(distance.max() / max(1.0, float(finite.max()) if finite.numel() else 1.0))

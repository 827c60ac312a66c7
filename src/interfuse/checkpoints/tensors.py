"""Torch tensors and torch's own files as arrays. The only file of this package that imports torch, and only when called.

Not a loader of arbitrary pickles: files are read with `weights_only=True`, without exception.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interfuse.checkpoints.header import TensorSpec
from interfuse.checkpoints.places import LocalFile, Stored, Strided
from interfuse.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_SAFE_NAMES = {f"torch.{theirs}": ours for ours, theirs in _TORCH_NAMES.items()}
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_ZIP_HEAD = 30  # bytes before a record's name
#: How torch names what it refuses to load.
_NO_TENSOR = re.compile(r"GLOBAL (\S+)")


def spec_of(tensor: Any) -> TensorSpec:
    """The type and shape of a dense torch tensor that has data, or a `CheckpointError`."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(Problem("", f"is a {type(tensor).__name__}, not a tensor"))
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise CheckpointError(Problem("", "has no data yet", "load or initialise the model first"))
    if str(tensor.dtype) not in _SAFE_NAMES or tensor.layout != torch.strided:
        raise CheckpointError(Problem("", f"has dtype {tensor.dtype} and layout {tensor.layout}", "make it dense"))
    return TensorSpec(_SAFE_NAMES[str(tensor.dtype)], tuple(tensor.shape))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's storage type and bytes as an array; shares memory where the tensor lies contiguous on the CPU."""
    import torch

    spec = spec_of(tensor)
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    # NumPy has no bfloat16 or float8, and a view of bytes works for every type: zero-dimensional ones must be flat.
    return plain.reshape(-1).view(torch.uint8).numpy().view(spec.storage).reshape(spec.shape)


def to_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """An array in the storage type of `dtype` (`"BF16"`, ...) as a torch tensor that shares its memory."""
    import torch

    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(getattr(torch, _TORCH_NAMES[dtype])).reshape(array.shape)


def load_file(file: LocalFile) -> Mapping[str, Any]:
    """The state dict in a torch file: a place in the file for each tensor that can be read there, else what torch loads.

    A zip file (torch's form since 1.6) has each storage as a record of its own, uncompressed, so that its tensors are read
    when they are asked for, as those of a .safetensors file are. Older files, compressed ones and those of big-endian
    machines are loaded whole. Nothing is mapped. Anything unsafe is a `CheckpointError`.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # what is wrong with the file is said when it's loaded
        records = _records(file.path)
        state = _state_dict(file.path, _load(file.path, "meta")) if records else {}
        found = {name: _placed(value, file, records) for name, value in state.items()}
    if found and all(value is not None for value in found.values()):
        return found
    try:
        content = _load(file.path, "cpu")
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(Problem(str(file.path), *_refusal(error))) from None
    placed = {name: value for name, value in found.items() if value is not None}
    return {**_state_dict(file.path, content), **placed}


def _refusal(error: Exception) -> tuple[str, str]:
    """What is wrong with a file that torch doesn't load, and the way out: torch's own is to run what is in the file."""
    beside = _NO_TENSOR.search(str(error))
    if beside is not None:
        wrong = f"can't be read as plain weights: it holds {beside[1]}, and reading that would run code"
        return wrong, "save its state_dict as .safetensors"
    if isinstance(error, pickle.UnpicklingError):
        wrong = "can't be read as plain weights: it's damaged, or no file of torch's"
        return wrong, "get the file again, or save its state_dict as .safetensors"
    reason = str(error).strip().partition("\n")[0].partition(". ")[0][:200]
    return f"can't be read as plain weights ({type(error).__name__}: {reason})", "get the file again"


def _load(path: Path, device: str) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a newer pickle protocol: what can't be read is an error
        return torch.load(path, map_location=device, weights_only=True)


def _state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    """The state dict that a torch file holds, or holds under one of the usual names."""
    if not isinstance(content, Mapping):
        raise CheckpointError(Problem(str(path), f"holds a {type(content).__name__}", "give a file with a state_dict"))
    for key in _STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _records(path: Path) -> dict[int, int]:
    """The byte where each uncompressed record of a zip file begins, and its size; none if numbers are big-endian there."""
    found: dict[int, int] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for item in archive.infolist():
            if item.filename.endswith("/byteorder") and archive.read(item) != b"little":
                return {}
            if item.compress_type == zipfile.ZIP_STORED:
                head = os.pread(file.fileno(), _ZIP_HEAD, item.header_offset)
                lengths = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))  # of its name and of what follows
                found[item.header_offset + _ZIP_HEAD + sum(lengths)] = item.file_size
    return found


def _placed(value: Any, file: LocalFile, records: Mapping[int, int]) -> Any:
    """Where a tensor without data lies in the file; None where that can't be told, and what isn't a tensor as it is."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    dtype, begin = _SAFE_NAMES.get(str(value.dtype)), getattr(value.untyped_storage(), "_checkpoint_offset", -1)
    if dtype is None or begin not in records or value.is_conj() or value.is_neg():
        return None
    spec, strides, first = TensorSpec(dtype, tuple(value.shape)), value.stride(), int(value.storage_offset())
    reach = sum((n - 1) * step for n, step in zip(spec.shape, strides, strict=True)) + 1 if spec.count else 0
    if (first + reach) * spec.storage.itemsize > records[begin]:
        return None
    place = Stored(file, begin + first * spec.storage.itemsize, TensorSpec(dtype, (reach,)))
    if value.is_contiguous():
        return place._replace(spec=spec)
    return Strided(place, spec, strides)

"""Torch tensors and torch's own files as arrays. The only file of this package that imports torch, and only when called.

Not a loader of arbitrary pickles: files are read with `weights_only=True`, without exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interfuse.checkpoints.header import TensorSpec
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


def load_file(path: Path) -> Mapping[str, Any]:
    """The state dict in a torch file, mapped where the file's format allows; anything unsafe is a `CheckpointError`."""
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 can't be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).strip().partition("\n")[0][:200]
        wrong = f"can't be read as plain weights ({type(error).__name__}: {reason})"
        raise CheckpointError(Problem(str(path), wrong, "save its state_dict as .safetensors")) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(Problem(str(path), f"holds a {type(content).__name__}", "give a file with a state_dict"))
    for key in _STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content

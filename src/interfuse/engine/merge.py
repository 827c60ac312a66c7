"""`merge`: models of one architecture in, one out, in the form in which they came. The edge round plan and engine.

Modules and mappings are merged in memory, paths from file to file. No arithmetic here, and no loading of models.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import interfuse
from interfuse import registry
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.checkpoints.writer import MemoryWriter, TensorWriter, whole_folder
from interfuse.engine.local import check_data, execute
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem, UserError, nearest
from interfuse.plan import FLOATS, Plan, plan_merge

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".index.json")
#: What speaks of the copied model alone: its card, and how it was itself made.
_ITS_OWN = ("README.md", "interfuse.json")
_LARGEST_SIDE_FILE = 64 * 2**20


def merge(
    method: str,
    models: Sequence[Any] | Mapping[str, Any],
    *,
    base: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    dtype: str | torch.dtype | None = None,
    allow_nonfinite: bool = False,
    **options: Any,
) -> Any:
    """Merge models of one architecture by a weight method (`interfuse methods` lists them).

    `models` and `base` are all modules, all mappings name -> tensor, or all paths of checkpoints. Modules give a new
    module: a copy of the base, or else of the first, with merged parameters and persistent buffers; what's tied stays
    tied, and the inputs are unchanged. Mappings give a dict. Paths need `out` and give its Path: a new folder with
    `model.safetensors`, the base's (or first's) config, tokenizer and other small files, and `interfuse.json`, which says
    how it was made; `overwrite` lets it replace a folder.

    `weights` is one number a model (1 each; a mapping goes by the models' names), `dtype` the type of the result's
    floating-point tensors (that of the base or first), `options` the method's own; an option named `lambda` is also
    taken as `lambda_`. NaN or infinity in the result is an error unless `allow_nonfinite`. Raises `OptionError`,
    `CheckpointError` or, for modules, `ModelError`, with every mismatch, and then nothing is written.
    """
    if isinstance(models, (str, Path)):
        raise OptionError(Problem("models", f"got {str(models)!r}", "give a list of models"))
    names = list(models) if isinstance(models, Mapping) else None
    refs = list(models.values()) if isinstance(models, Mapping) else list(models)
    kind = _kind(refs, base)
    if kind == "path" and out is None:
        raise OptionError(Problem("out", "missing", "models given as paths are merged into a folder: give out=FOLDER"))
    if kind != "path" and out is not None:
        raise OptionError(Problem("out", f"got {str(out)!r}", f"a merge of {kind}s is returned: leave it out"))
    chosen = _weights(weights, names)
    type_name = None if dtype is None else str(dtype)
    try:
        sources = _open(base, refs, None if kind == "path" else names)
        plan = plan_merge(method, [s for s in sources[1:] if s], sources[0], options, chosen, type_name)
        if kind == "path":
            assert out is not None
            return _merge_files(plan, sources, refs if base is None else [base, *refs], Path(out), overwrite, allow_nonfinite)
        check_data(plan, sources)
        writer = MemoryWriter(plan.specs)
        execute(plan, sources, writer.append, allow_nonfinite=allow_nonfinite)
    except CheckpointError as error:
        if kind == "module":
            raise ModelError(*error.problems) from None
        raise
    reference = refs[0] if base is None else base
    return (_as_module if kind == "module" else _as_mapping)(reference, writer.tensors, plan)


def _kind(refs: Sequence[Any], base: Any) -> str:
    """`path`, `mapping` or `module`: what all of these are."""
    if not refs:
        raise OptionError(Problem("models", "there are none", "give at least one"))
    places = {f"models[{i}]": ref for i, ref in enumerate(refs)} | ({} if base is None else {"base": base})
    kinds = {place: _kind_of(ref) for place, ref in places.items()}
    wrong = [
        Problem(place, f"is a {type(places[place]).__name__}", "give modules, mappings of tensors, or paths")
        for place, kind in kinds.items()
        if not kind
    ]
    mixed = [
        Problem(place, f"is a {kind}, models[0] a {kinds['models[0]']}", "give all in one form")
        for place, kind in kinds.items()
        if kind != kinds["models[0]"]
    ]
    if wrong or mixed:
        raise OptionError(*(wrong or mixed))
    return kinds["models[0]"]


def _kind_of(ref: Any) -> str:
    if isinstance(ref, (str, Path)):
        return "path"
    if isinstance(ref, Mapping):
        return "mapping"
    torch = sys.modules.get("torch")  # without it there can be no module, and a merge of files doesn't need it
    return "module" if torch and isinstance(ref, torch.nn.Module) else ""


def _weights(weights: Sequence[float] | Mapping[str, float] | None, names: list[str] | None) -> list[float] | None:
    if not isinstance(weights, Mapping):
        return None if weights is None else list(weights)
    if names is None:
        raise OptionError(Problem("weights", "a mapping, but the models have no names", "give models= as a mapping too"))
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise OptionError(*(Problem(f"weights.{name}", "no model has this name", nearest(name, names)) for name in unknown))
    return [weights.get(name, 1.0) for name in names]


def _open(base: Any, refs: Sequence[Any], names: list[str] | None) -> list[Checkpoint | None]:
    """The base, or None, and the models, opened; or everything that is wrong with any of them."""
    opened: list[Checkpoint | None] = []
    problems: list[Problem] = []
    for i, ref in enumerate([base, *refs]):
        try:
            checkpoint = None if ref is None else open_checkpoint(ref)
        except UserError as error:
            problems += error.problems
            continue
        if checkpoint and names and i:
            checkpoint = replace(checkpoint, name=names[i - 1])
        opened.append(checkpoint)
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return opened


def _as_module(reference: torch.nn.Module, arrays: Mapping[str, np.ndarray], plan: Plan) -> torch.nn.Module:
    """A copy of `reference` with the merged values."""
    from interfuse.checkpoints.tensors import to_tensor

    result = copy.deepcopy(reference)
    state = result.state_dict(keep_vars=True)
    _check_ties(state, arrays)
    merged = {name: to_tensor(array, plan.specs[name].dtype) for name, array in arrays.items()}
    for name, tensor in merged.items():
        if state[name].dtype != tensor.dtype:  # changed in place: a parameter stays the same object, and so tied
            state[name].data = state[name].data.to(tensor.dtype)
    result.load_state_dict({**state, **merged})
    return result


def _check_ties(state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Names that share one tensor in the result must have been given the same values."""
    first: dict[Any, str] = {}
    problems = []
    for name, array in arrays.items():
        tensor = state[name]
        if not array.size:
            continue
        tied = first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if tied != name and array.tobytes() != arrays[tied].tobytes():
            wrong = f"is tied to {tied!r} in the result, and the models give the two different values"
            problems.append(Problem(f"tensor {name!r}", wrong, "tie them in all models or in none"))
    if problems:
        raise ModelError(*problems)


def _as_mapping(reference: Mapping[str, Any], arrays: Mapping[str, np.ndarray], plan: Plan) -> dict[str, Any]:
    """Tensors where the reference has tensors, on their device, and arrays where it has arrays."""
    result: dict[str, Any] = {}
    for name, array in arrays.items():
        dtype = plan.specs[name].dtype
        if not isinstance(reference[name], np.ndarray):
            from interfuse.checkpoints.tensors import to_tensor

            result[name] = to_tensor(array, dtype).to(reference[name].device)
        elif dtype == "BF16":
            raise OptionError(Problem("dtype", "NumPy has no bfloat16", "give torch tensors, or another dtype"))
        else:
            result[name] = array
    return result


def _merge_files(
    plan: Plan, sources: Sequence[Checkpoint | None], inputs: Sequence[str | Path], out: Path, overwrite: bool, allow: bool
) -> Path:
    with whole_folder(out, overwrite=overwrite, inputs=inputs) as folder:
        check_data(plan, sources)
        with TensorWriter(folder / "model.safetensors", plan.specs, {"format": "pt"}) as writer:
            execute(plan, sources, writer.append, allow_nonfinite=allow)
        reference = sources[0] or sources[1]
        left_out = _copy_side_files(reference.folder, folder) if reference and reference.folder else []
        if reference and any(spec.dtype != reference.specs[name].dtype for name, spec in plan.specs.items()):
            _set_dtype(folder / "config.json", plan)
        record = {**provenance(plan, sources), "left_out": left_out}
        (folder / "interfuse.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def _copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy config, tokenizer and the like; the names of what was left behind, weights aside."""
    left_out = []
    for item in sorted(source.iterdir()):
        if item.name.startswith(".") or item.name.endswith(_WEIGHTS) or item.name in _ITS_OWN:
            continue
        if not item.is_file() or item.stat().st_size > _LARGEST_SIDE_FILE:
            left_out.append(item.name)
            continue
        shutil.copyfile(item, folder / item.name)
    return left_out


def _set_dtype(path: Path, plan: Plan) -> None:
    """Say the new type in a transformers config that names one: it's the type in which the model is loaded."""
    stored = {output.spec.dtype for output in plan.outputs if output.rule == "sum"}
    if len(stored) != 1 or not path.is_file():
        return
    name = next(name for name, dtype in FLOATS.items() if dtype in stored)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise CheckpointError(Problem(str(path), "isn't JSON", "get the file again")) from None
    if _replace_dtype(config, name):
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_dtype(config: Any, name: str) -> bool:
    if not isinstance(config, dict):
        return False
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value in FLOATS and value != name:
            config[key] = name
            changed = True
        changed |= _replace_dtype(value, name)
    return changed


def provenance(plan: Plan, sources: Sequence[Checkpoint | None]) -> dict[str, Any]:
    """What `interfuse.json` says: enough to run the merge again, and to know that it was these models."""
    method = registry.find(plan.method, "weights")
    hashes = [{"model": source.name, "xxh3": source.hash()} if source else None for source in sources]
    return {
        "kind": "merge",
        "method": plan.method,
        "options": dict(plan.options),
        "base": hashes[0],
        "models": [{**(entry or {}), "weight": w} for entry, w in zip(hashes[1:], plan.weights, strict=True)],
        "dtypes": sorted({output.spec.dtype for output in plan.outputs}),
        "plan": plan.digest(),
        "notes": list(plan.notes),
        "papers": [method.paper] if method.paper else [],
        "versions": {
            "interfuse": interfuse.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }

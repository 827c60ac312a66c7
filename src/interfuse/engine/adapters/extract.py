"""A LoRA adapter out of a fine-tuned model and its base: the leading singular vectors of each matrix's change.

One tensor is in memory at a time, and its change once in float32. What a product of thin matrices can't stand for (norms,
convolutions, embeddings) is saved whole or left out, as asked, and never in silence. Which weights are matrices is read off
their names and shapes. Not a way to make fine-tunes smaller without loss: what is lost is measured and reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from interfuse.checkpoints.adapters.writer import AdapterWriter, lora_config
from interfuse.checkpoints.names import listed
from interfuse.checkpoints.numbers import FLOATS, STORED_FLOATS, float_named, narrow, widen
from interfuse.checkpoints.source import BLOCK, Checkpoint, open_checkpoint
from interfuse.checkpoints.writer import whole_folder
from interfuse.engine.adapters.keeping import How, Parts, sort_parts
from interfuse.engine.opening import open_references
from interfuse.errors import CheckpointError, OptionError, Problem, nearest
from interfuse.methods.decompose import directions
from interfuse.progress import track
from interfuse.recipe.references import Reference

#: Below this share of the shorter side, the leading singular vectors are found without the others.
_FEW = 0.25
_MORE = 10  # vectors beyond those asked for, and
_ROUNDS = 6  # multiplications by the matrix and its transpose: what makes them near the true ones


class Extracted(NamedTuple):
    """What became of one changed tensor: how it's kept, its rank, and the share of the change's norm that is lost."""

    name: str
    how: How
    rank: int
    error: float

    @property
    def kept(self) -> float:
        """The share of the change's energy, its squared norm, that is kept."""
        return 1.0 - self.error**2


class Extraction(NamedTuple):
    """The adapter's folder, what became of each changed tensor, and the share of all changes' norm that is lost."""

    folder: Path
    tensors: tuple[Extracted, ...]
    error: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        tensors = [{**item._asdict(), "kept": item.kept} for item in self.tensors]
        return {"out": str(self.folder), "kept": 1.0 - self.error**2, "error": self.error, "tensors": tensors}

    def text(self) -> str:
        """A line a tensor, with the share of its change's energy that is kept, and one for all."""
        width = max((len(item.name) for item in self.tensors), default=0)
        lines = [
            f"{item.name:<{width}}  {f'rank {item.rank}' if item.how == 'lora' else item.how:>9}  {item.kept:9.4%} kept"
            for item in self.tensors
        ]
        return "\n".join([*lines, f"{self.folder}: {1.0 - self.error**2:.4%} of the changes' energy kept"])


def extract_lora(
    model: Any,
    base: Any,
    out: str | Path,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Literal["whole", "lora", "skip"] = "whole",
    others: Literal["whole", "skip"] = "whole",
    transposed: Sequence[str] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Extraction:
    """Write the peft LoRA adapter `out` that brings `base` as near to `model` as factors of that rank can.

    Each matrix gets at most `rank` (None: as many as it has), and no more than reach `energy`, a share in (0, 1] of the
    squared norm of its change. `alpha` is peft's `lora_alpha` (None: the rank, so that the scale is 1); the factors are
    made for it, and their product is the same. `include` and `exclude` have patterns (`*`, `?`): tensors that fit none of
    the first (if there are any), or one of the second, stay as in the base, and the two models may differ in them. Changed
    `embeddings` and `others` (norms, biases, convolutions) are saved `whole` or left out (`skip`); embeddings may be given
    factors (`lora`). `transposed` has patterns of matrices that are stored `[in, out]` (None: found for GPT-2 from its
    config). `dtype` is the factors' type. Models that don't fit each other, or an option out of range, is a
    `CheckpointError` or `OptionError`, and nothing is written.
    """
    stored = _check_options(rank, energy, alpha, dtype, embeddings, others)
    tuned, before = _open(model, base)
    names = _names(tuned, before, include, exclude)
    changed = {name for name in track(names, "comparing", len(names)) if _differs(tuned, before, name)}
    parts = sort_parts(before, names, changed.__contains__, embeddings, others, transposed)
    if not parts.how:
        raise CheckpointError(Problem(tuned.name, f"no tensor differs from {before.name}'s", "give a fine-tuned model"))
    options = {
        "rank": rank,
        "energy": energy,
        "alpha": alpha,
        "include": list(include),
        "exclude": list(exclude),
        "embeddings": embeddings,
        "others": others,
        "transposed": transposed and list(transposed),
        "dtype": dtype,
    }
    done = []
    inputs = [ref for ref in (model, base) if isinstance(ref, str | Path)]
    with whole_folder(out, overwrite=overwrite, inputs=inputs) as folder, AdapterWriter(folder) as writer:
        squares: list[tuple[float, float]] = []
        for name, how in track(parts.how.items(), "extracting", len(parts.how)):
            lost, norm, kept = _write(writer, tuned, before, name, parts, rank, energy, alpha, stored)
            if norm:
                squares.append((lost, norm))
                done.append(Extracted(name, how, kept, math.sqrt(lost / norm)))
        error = math.sqrt(sum(lost for lost, _ in squares) / sum(norm for _, norm in squares)) if squares else 0.0
        config = lora_config(
            writer.ranks,
            alpha=alpha,
            targets=parts.targets(list(writer.ranks)),
            saved=parts.saved,
            bias="all" if parts.biases else "none",
            base=str(base) if isinstance(base, str | Path) else None,
            fan_in_fan_out=any(name in parts.transposed for name in parts.how),
        )
        writer.finish(config, _record((tuned, before), (model, base), options, error, done))
    return Extraction(Path(out), tuple(done), error)


def _record(
    opened: Sequence[Checkpoint], refs: Sequence[Any], options: Mapping[str, Any], error: float, done: Sequence[Extracted]
) -> dict[str, Any]:
    """What `interfuse.json` says of an extraction: paths are absolute, so that it can be made again from anywhere."""
    names = [
        str(Reference.parse(str(ref)).absolute(Path.cwd())) if isinstance(ref, str | Path) else source.name
        for ref, source in zip(refs, opened, strict=True)
    ]
    return {
        "kind": "extracted adapter",
        "options": options,
        "sources": [
            {"model": name, **source.origins(), "xxh3": source.hash()} for name, source in zip(names, opened, strict=True)
        ],
        "error": error,
        "changes": [item._asdict() for item in done],
    }


def _open(model: Any, base: Any) -> tuple[Checkpoint, Checkpoint]:
    """Both models; what is wrong with either is one error."""
    named = {ref: Reference.parse(str(ref)) for ref in (model, base) if isinstance(ref, str | Path)}
    opened = open_references(list(named.values()))
    tuned, before = (opened[named[ref]] if isinstance(ref, str | Path) else open_checkpoint(ref) for ref in (model, base))
    return tuned, before


def _check_options(
    rank: int | None, energy: float | None, alpha: float | None, dtype: str, embeddings: str, others: str
) -> str:
    """The stored type, or an `OptionError` with all that is out of range."""
    problems = []
    stored = float_named(str(dtype))
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(Problem("rank", f"got {rank!r}", "a whole number from 1 on, or none"))
    if energy is not None and not 0 < energy <= 1:
        problems.append(Problem("energy", f"got {energy!r}", "above 0 and at most 1"))
    if alpha is not None and not 0 < alpha < math.inf:
        problems.append(Problem("alpha", f"got {alpha!r}", "above 0"))
    if stored is None:
        problems.append(Problem("dtype", f"got {dtype!r}", nearest(str(dtype), FLOATS)))
    if embeddings not in ("whole", "lora", "skip"):
        problems.append(Problem("embeddings", f"got {embeddings!r}", "allowed: whole, lora, skip"))
    if others not in ("whole", "skip"):
        problems.append(Problem("others", f"got {others!r}", "allowed: whole, skip"))
    if problems or stored is None:
        raise OptionError(*problems)
    return stored


def _names(tuned: Checkpoint, before: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The tensors that count, in the base's order, or a `CheckpointError` with all in which the two don't fit."""

    def wanted(name: str) -> bool:
        within = not include or any(fnmatchcase(name, pattern) for pattern in include)
        return within and not any(fnmatchcase(name, pattern) for pattern in exclude)

    problems = [
        Problem(key, f"{pattern!r} fits no tensor", "see the names in the models' files")
        for key, patterns in (("include", include), ("exclude", exclude))
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in (*before.specs, *tuned.specs))
    ]
    for one, other in ((tuned, before), (before, tuned)):
        missing = [name for name in other.specs if name not in one.specs and wanted(name)]
        allowed = f"unlike {other.name}: give the model's own base, or `exclude` what differs"
        problems += [Problem(one.name, wrong, allowed) for wrong in listed(missing, "missing")]
    names = [name for name in before.specs if name in tuned.specs and wanted(name)]
    for name in names:
        ours, theirs = tuned.specs[name], before.specs[name]
        if ours.shape != theirs.shape or (ours != theirs and not {ours.dtype, theirs.dtype} <= set(STORED_FLOATS)):
            problems.append(
                Problem(tuned.name, f"{name!r} is {ours}, the base's is {theirs}", "give its own base, or exclude it")
            )
    if problems:
        raise CheckpointError(*problems)
    return names


def _deltas(tuned: Checkpoint, before: Checkpoint, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Where each block begins, and the change in it: float32, float64 where a model is; integers as 0 or 1."""
    ours, theirs = tuned.specs[name], before.specs[name]
    kind = np.float64 if "F64" in (ours.dtype, theirs.dtype) else np.float32
    start = 0
    for after, first in zip(tuned.blocks(name), before.blocks(name), strict=True):
        if ours.dtype in STORED_FLOATS:
            out, other = np.empty((2, len(after)), kind)
            widen(after, ours.dtype, out)
            widen(first, theirs.dtype, other)
            out -= other
        else:
            out = (after != first).astype(np.float32)
        yield start, out
        start += len(after)


def _differs(tuned: Checkpoint, before: Checkpoint, name: str) -> bool:
    return any(delta.any() for _, delta in _deltas(tuned, before, name))


def _write(
    writer: AdapterWriter,
    tuned: Checkpoint,
    before: Checkpoint,
    name: str,
    parts: Parts,
    rank: int | None,
    energy: float | None,
    alpha: float | None,
    dtype: str,
) -> tuple[float, float, int]:
    """Write one tensor as it's to be kept: the squared norms of what is lost and of the change, and the rank."""
    how, spec = parts.how[name], before.specs[name]
    if how != "lora":
        norm = _squared(tuned, before, name)
        if how == "whole":
            writer.stored(parts.stored_name(name), tuned.read(name), tuned.specs[name].dtype)
        return (norm if how == "skip" else 0.0), norm, 0
    kind = np.float64 if "F64" in (tuned.specs[name].dtype, spec.dtype) else np.float32
    delta: np.ndarray = np.empty(spec.shape, kind)
    for start, block in _deltas(tuned, before, name):
        delta.reshape(-1)[start : start + len(block)] = block
    norm = _norm(delta)
    if not math.isfinite(norm):
        wrong = f"{name!r} has values that aren't finite, here or in {before.name}"
        raise CheckpointError(Problem(tuned.name, wrong, "exclude it, or repair the model"))
    module = name.removesuffix(".weight")
    embedding = name in parts.embeddings
    change = delta.T if embedding or name in parts.transposed else delta
    up, down = leading(change, norm, rank, energy)
    scale = 1.0 if alpha is None else alpha / len(down)
    up, down = _rounded((up / math.sqrt(scale), down / math.sqrt(scale)), dtype)
    writer.pair(module, up, down, dtype, embedding=embedding)
    return _lost(change, scale * up, down), norm, len(down)


def leading(change: np.ndarray, norm: float, rank: int | None, energy: float | None) -> tuple[np.ndarray, np.ndarray]:
    """B and A of the change's leading singular vectors, each with the roots of the values, in float64."""
    side = min(change.shape)
    if rank is not None and rank + _MORE < _FEW * side:
        left, values, right = _few(change, rank)
    else:
        left, values, right = directions(change, rank)
    if energy is not None:
        reached = np.cumsum(values**2) >= energy * norm * (1 - 1e-9)
        count = int(np.argmax(reached)) + 1 if reached.any() else len(values)
        left, values, right = left[:, :count], values[:count], right[:count]
    roots = np.sqrt(values)
    return left * roots, roots[:, None] * right


def _few(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `rank` leading singular vectors by subspace iteration, https://arxiv.org/abs/0909.4061; the same at each call."""
    random = np.random.Generator(np.random.Philox(0))
    basis = random.standard_normal((change.shape[1], rank + _MORE)).astype(change.dtype)
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(change.T @ np.linalg.qr(change @ basis)[0])[0]
    left = np.linalg.qr(change @ basis)[0].astype(np.float64)
    u, values, right = np.linalg.svd(left.T @ change, full_matrices=False)
    keep = min(rank, int(np.count_nonzero(values > 1e-7 * values[:1])))
    return (left @ u)[:, :keep], values[:keep], right[:keep]


def _rounded(factors: tuple[np.ndarray, np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors as they will be read again."""
    rounded = []
    for factor in factors:
        out: np.ndarray = np.empty(factor.shape)
        widen(narrow(np.ascontiguousarray(factor), dtype), dtype, out)
        rounded.append(out)
    return rounded[0], rounded[1]


def _lost(change: np.ndarray, up: np.ndarray, down: np.ndarray) -> float:
    """The squared norm of what the product leaves out."""
    step = max(1, BLOCK // change.shape[1])
    total = 0.0
    for row in range(0, len(change), step):
        total += _norm(change[row : row + step] - up[row : row + step] @ down)
    return total


def _squared(tuned: Checkpoint, before: Checkpoint, name: str) -> float:
    return sum(_norm(delta) for _, delta in _deltas(tuned, before, name))


def _norm(array: np.ndarray) -> float:
    """The squared norm, in float64, a block at a time."""
    flat = array.reshape(-1)
    blocks = (flat[start : start + BLOCK].astype(np.float64) for start in range(0, flat.size, BLOCK))
    return math.fsum(float(block @ block) for block in blocks)

"""`moe`: a recipe and dense models in, a folder with a mixture of experts out, which appears whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from interfuse.checkpoints.numbers import widen
from interfuse.checkpoints.places import Resident
from interfuse.checkpoints.source import Checkpoint
from interfuse.checkpoints.writer import check_output, whole_folder
from interfuse.engine.opening import Commits, fetch, open_references
from interfuse.engine.output.card import Made, write_card
from interfuse.engine.output.folder import merge_into
from interfuse.errors import OptionError, Problem, UserError
from interfuse.mixture.gates import gate_vectors
from interfuse.mixture.layouts import PARTS
from interfuse.mixture.noise import with_noise
from interfuse.mixture.planning import MixturePlan, described, plan_mixture
from interfuse.mixture.recipe import Expert, MixtureRecipe, load_mixture
from interfuse.recipe.references import Reference

KIND = "mixture"


@dataclass(frozen=True)
class Mixture:
    """What was made: the folder (None in a dry run), its layout, the models, and what was, or would be, done as text."""

    out: Path | None
    layout: str
    base: str
    experts: tuple[str, ...]
    seed: int
    plan: str
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return {**self.__dict__, "out": None if self.out is None else str(self.out)}

    def text(self) -> str:
        """The record in a few lines."""
        if self.out is None:
            return f"{self.plan}\nnothing was written (dry run)"
        made = f"{self.out}: {self.layout} of {len(self.experts)} experts, in {self.seconds:.1f} s"
        return "\n".join([made, *(f"note: {note}" for note in self.notes)])


def moe(
    recipe: str | Path | Mapping[str, Any] | MixtureRecipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Mixture:
    """Put dense models together into a mixture of experts, the folder `out`, as the recipe says (docs/moe.md).

    recipe: a YAML file as mergekit-moe's are, or a mapping. out: appears whole or not at all; one that is there needs
    `overwrite`. seed: in place of the recipe's. threads: how many copy tensors. device: where the base reads prompts, cpu or
    cuda; left out, cuda if there is one. dry_run: check all, write nothing.

    Raises `UserError` with every problem, before anything is written.
    """
    started = time.monotonic()
    read, mixture, sources = _decided(recipe, out, seed, device, overwrite=overwrite)
    record = Mixture(
        None if dry_run else Path(out),
        mixture.layout.architecture,
        mixture.models[0],
        mixture.models[1 : 1 + mixture.experts],
        read.seed,
        described(mixture, read),
        mixture.plan.notes,
        time.monotonic() - started,
    )
    inputs = [path for ref in references_of(read) for path in (ref.path, ref.lora) if path is not None and Path(path).exists()]
    nbytes = sum(spec.nbytes for spec in mixture.plan.specs.values())
    if dry_run:
        check_output(out, overwrite=overwrite, inputs=inputs, nbytes=nbytes)
        return record
    with whole_folder(out, overwrite=overwrite, inputs=inputs, nbytes=nbytes) as folder:
        make_into(read, mixture, sources, folder, threads=threads, device=device, progress=progress)
    return replace(record, seconds=time.monotonic() - started)


def _decided(
    recipe: Any, out: str | Path, seed: int | None, device: str | None, *, overwrite: bool
) -> tuple[MixtureRecipe, MixturePlan, list[Checkpoint]]:
    """The recipe with that seed, its plan and its models; where anything is wrong, what is with the rest is told beside."""
    errors: list[UserError] = []

    @contextmanager
    def gathered() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            errors.append(error)

    with gathered():
        _check_device(device)
    with gathered():
        read = load_mixture(recipe)
        read = read if seed is None else read.model_copy(update={"seed": seed})
        mixture, sources = opened(read)
    if not errors:
        return read, mixture, sources
    with gathered():
        check_output(out, overwrite=overwrite)
    from interfuse.engine.wording import together

    raise together(errors)


def opened(recipe: MixtureRecipe, commits: Commits | None = None) -> tuple[MixturePlan, list[Checkpoint]]:
    """The plan, and the models that it reads: all of `plan.sources` but the one in memory. `commits`: see `open_references`."""
    references = references_of(recipe)
    found = open_references(list(dict.fromkeys(references)), commits=commits)
    base, *others = (found[reference] for reference in references)
    given = [*recipe.experts, *([] if recipe.shared is None else [recipe.shared])]
    sources = [
        _noisy(checkpoint, expert, recipe.seed, i) for i, (checkpoint, expert) in enumerate(zip(others, given, strict=True))
    ]
    count = len(recipe.experts)
    plan = plan_mixture(recipe, base, sources[:count], sources[count] if recipe.shared is not None else None)
    return plan, [base, *sources]


def make_into(
    recipe: MixtureRecipe,
    mixture: MixturePlan,
    sources: Sequence[Checkpoint],
    folder: Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the mixture into `folder`, which is there; what `interfuse.json` then says."""
    router = mixture.made[mixture.routers[0]].shape
    fetch(mixture.plan, [*sources, _in_memory(mixture, sources[0], None)], shown=progress)
    gates = gate_vectors(recipe, sources[0], len(mixture.routers), router[1], device=device, progress=progress)
    made = _in_memory(mixture, sources[0], gates)
    written = recipe.model_dump(mode="json", exclude_defaults=True)
    config = {key: value for key, value in mixture.config.items() if key not in ("transformers_version", "_name_or_path")}
    record = merge_into(
        mixture.plan, [*sources, made], folder, recipes=[written], threads=threads, progress=progress, config=config
    )
    record |= {
        "kind": KIND,
        "method": mixture.layout.model_type,
        "sources": record["sources"][: len(sources)],
        "papers": [mixture.layout.paper],
    }
    _write_json(folder / "interfuse.json", record)
    text = yaml.safe_dump(written | {"seed": recipe.seed}, sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    _write_card(folder, mixture, text, sources)
    return record


def references_of(recipe: MixtureRecipe) -> list[Reference]:
    """The base, the experts and the shared expert."""
    experts = [*recipe.experts, *([] if recipe.shared is None else [recipe.shared])]
    return [Reference.parse(ref) for ref in (recipe.base_model, *(expert.source_model for expert in experts))]


def _noisy(checkpoint: Checkpoint, expert: Expert, seed: int, number: int) -> Checkpoint:
    if not expert.noise_scale:
        return checkpoint
    names = [name for name in checkpoint.specs if name.endswith(tuple(f".mlp.{part}.weight" for part in PARTS))]
    return with_noise(checkpoint, names, expert.noise_scale, seed, number)


def _in_memory(mixture: MixturePlan, base: Checkpoint, gates: np.ndarray | None) -> Checkpoint:
    """The tensors that no file holds: routers, the shared expert's gate, and else zeros or the base's first rows."""
    values = {name: _neutral(base, name, spec.shape) for name, spec in mixture.made.items()}
    if gates is not None:
        values |= {name: _value(gates[layer, : mixture.experts]) for layer, name in enumerate(mixture.routers)}
    if gates is not None and gates.shape[1] > mixture.experts:
        values |= {name: _value(gates[layer, mixture.experts :]) for layer, name in enumerate(mixture.gates)}
    return Checkpoint("made here", dict(mixture.made), None, {name: Resident(value) for name, value in values.items()})


def _value(array: np.ndarray) -> Callable[[], np.ndarray]:
    kept = np.ascontiguousarray(array, np.float32)
    return lambda: kept


def _neutral(base: Checkpoint, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Zeros; but a shared expert's first matrices are the base's first rows, so that training can begin from there."""
    head, _, last = name.partition(".mlp.shared_expert.")
    dense = f"{head}.mlp.{last}"

    def value() -> np.ndarray:
        out: np.ndarray = np.zeros(shape, np.float32)
        if last in ("gate_proj.weight", "up_proj.weight"):
            widen(base.block(dense, 0, out.size), base.specs[dense].dtype, out.reshape(-1))
        return out

    return value


def _check_device(device: str | None) -> None:
    if device not in (None, "cpu", "cuda"):
        raise OptionError(Problem("device", f"got {device!r}", "cpu or cuda"))
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise OptionError(Problem("device", "got 'cuda', and there is none here", "cpu"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_card(folder: Path, mixture: MixturePlan, recipe: str, sources: Sequence[Checkpoint]) -> None:
    roles = ["base", *(f"expert {i}" for i in range(mixture.experts)), "shared expert"]
    made = [Made(role, source.name, source.folder) for role, source in zip(roles, sources, strict=False)]
    title = f"{mixture.layout.architecture} of {mixture.experts} experts"
    write_card(folder, title, made, recipe, papers=[mixture.layout.paper], tags=["moe"])

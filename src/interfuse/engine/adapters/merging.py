"""LoRA adapters merged with each other, without their base, module by module.

An adapter's change of a weight is s B A. What comes out is an adapter again; how a module's factors are merged is
`adapter_methods`' part. To merge models that have adapters (with DoRA, or by other methods), open them with
`checkpoints.adapters.lora.with_adapter` and merge those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from interfuse.checkpoints.adapters.pairs import CONFIG, Adapter, Pair, open_adapter
from interfuse.checkpoints.adapters.writer import AdapterWriter, lora_config
from interfuse.checkpoints.hashes import hash_file
from interfuse.checkpoints.numbers import FLOATS, STORED_FLOATS, float_named, widen
from interfuse.checkpoints.writer import settle, whole_folder
from interfuse.engine.adapters.methods import Factors
from interfuse.engine.output.finished import finished_adapter
from interfuse.errors import CheckpointError, OptionError, Problem, UserError, nearest
from interfuse.methods.forms import normalized
from interfuse.progress import track
from interfuse.registry import Method, find


class Prepared(NamedTuple):
    """A merge of adapters that can be done: its method with its options, the adapters, and a number for each."""

    method: Method
    options: Mapping[str, Any]
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    coefficients: Sequence[float]
    dtype: str | None


def merge_adapters(
    method: str,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Path:
    """Merge peft LoRA adapters of one base into a new one, the folder `out`, without the base.

    `method` is `linear` (exact, its rank the sum of ranks), `svd` (that, truncated to `rank`), `knots`, `ties`,
    `dare_linear` or `dare_ties`; `weights` is one number an adapter (1 each), `dtype` the stored type (each module's in the
    first adapter that has it), `options` the method's. A module that an adapter doesn't change counts as a change of zero;
    tensors saved whole are averaged, and must be in all. `resume` goes on where a run that was killed was, to the same bytes,
    and leaves what one had finished, of the same adapters, as it is. DoRA, or anything that doesn't fit, is a
    `CheckpointError` with all of it; nothing is written then.
    """
    prepared = prepare(method, adapters, weights=weights, dtype=dtype, **options)
    if resume and finished_adapter(Path(out), asked(prepared)) is not None:
        settle(out)
        return Path(out)
    with whole_folder(out, overwrite=overwrite, inputs=list(adapters), resume=resume) as folder:
        write(prepared, folder, resume=resume)
    return Path(out)


def prepare(
    method: str,
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Prepared:
    """What `merge_adapters` does before it writes: every error is raised here."""
    found = find(method, "adapters")
    chosen = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    checked = _options(found, options, len(adapters))
    _dtype(dtype)
    if len(chosen) != len(adapters) or not adapters:
        raise OptionError(Problem("weights", f"got {len(chosen)} for {len(adapters)} adapters", "give one an adapter"))
    opened = _open(adapters)
    coefficients = normalized(chosen) if checked["normalize"] else tuple(chosen)  # raises where they sum to zero
    _check(opened, coefficients)
    return Prepared(found, checked, opened, chosen, coefficients, dtype)


def asked(prepared: Prepared) -> dict[str, Any]:
    """What the adapter's `interfuse.json` says of how it's made: all that determines it."""
    return {
        "kind": "adapter merge",
        "method": prepared.method.name,
        "options": {name.rstrip("_"): value for name, value in prepared.options.items()},
        "dtype": prepared.dtype,
        "weights": list(prepared.weights),
        "sources": [
            {"model": str(one.folder.resolve()), "xxh3": one.weights.hash(), "config": hash_file(one.folder / CONFIG)}
            for one in prepared.adapters
        ],
        "papers": [prepared.method.paper],
    }


def write(prepared: Prepared, folder: Path, *, resume: bool = False, progress: bool = False) -> dict[str, Any]:
    """Write the merged adapter into `folder`, which is there; what its `interfuse.json` is about.

    With `resume` the folder may be what a run that was killed has left.
    """
    method, opened, coefficients = prepared.method, prepared.adapters, prepared.coefficients
    stored = _dtype(prepared.dtype)
    record = asked(prepared)
    with AdapterWriter(folder, json.dumps(record), resume=resume) as writer:
        modules = _modules(opened)
        for module in track(modules, "merging", len(modules), shown=progress):
            if module not in writer.done:
                _merge_module(writer, opened, module, method.make, prepared.weights, prepared.options, stored)
        scale = float(prepared.options.get("lambda_", 1.0))
        lora_bias = _merge_biases(writer, opened, [scale * share for share in coefficients], stored)
        _merge_whole(writer, opened, coefficients, stored)
        writer.finish(_config(opened, writer.ranks, lora_bias), record)
    return record


def _options(method: Method, options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The method's options by argument; those with one value an adapter as a tuple of so many."""
    each = {name: value for name, value in options.items() if name in method.each and isinstance(value, list | tuple)}
    wrong = [
        Problem(f"options.{name}", f"got {len(value)} values for {count} adapters", "give one an adapter, or one for all")
        for name, value in each.items()
        if len(value) != count
    ]
    if wrong:
        raise OptionError(*wrong)
    rows = [method.check({**options, **{name: value[i] for name, value in each.items()}}, "options") for i in range(count)]
    if not rows:
        return method.check(dict(options), "options")
    return {name: tuple(row[name] for row in rows) if name in method.each else value for name, value in rows[0].items()}


def _dtype(dtype: str | None) -> str | None:
    stored = None if dtype is None else float_named(str(dtype))
    if dtype is not None and stored is None:
        raise OptionError(Problem("dtype", f"got {dtype!r}", nearest(str(dtype), FLOATS)))
    return stored


def _open(adapters: Sequence[str | Path]) -> list[Adapter]:
    opened: list[Adapter] = []
    problems: list[Problem] = []
    for folder in adapters:
        try:
            opened.append(open_adapter(folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return opened


def _modules(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.pairs))


def _check(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> None:
    """Everything that keeps these from being merged without their base."""
    problems = [
        Problem(adapter.name, f"{pair.module!r} has a magnitude (DoRA)", "merge the models that have these adapters")
        for adapter in adapters
        for pair in adapter.pairs.values()
        if pair.magnitude is not None
    ]
    first = adapters[0]
    for adapter in adapters[1:]:
        if first.pairs and adapter.pairs and not adapter.pairs.keys() & first.pairs.keys():
            wrong = f"changes none of {first.name}'s modules: {next(iter(adapter.pairs))!r}, not {next(iter(first.pairs))!r}"
            problems.append(Problem(adapter.name, wrong, "give adapters of one base"))
        if bool(adapter.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            wrong = f"fan_in_fan_out is {adapter.config.get('fan_in_fan_out')}, {first.name}'s isn't"
            problems.append(Problem(adapter.name, wrong, "give adapters of one base"))
    for module in _modules(adapters):
        shapes = {adapter.name: _shape(adapter, module) for adapter in adapters if module in adapter.pairs}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{shape[1:]} ({shape[0]}) in {name}" for name, shape in shapes.items())
            problems.append(Problem("adapters", f"{module!r} is {said}", "give adapters of one base"))
    problems += _check_whole(adapters, coefficients)
    if problems:
        raise CheckpointError(*problems)


def _check_whole(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> list[Problem]:
    problems = []
    merge = "merge the models that have these adapters"
    for target in _targets(adapters):
        having = [adapter for adapter in adapters if target in adapter.whole]
        specs = [adapter.weights.specs[adapter.whole[target]] for adapter in having]
        floating = all(spec.dtype in STORED_FLOATS for spec in specs)
        if len(having) < len(adapters):
            wrong = f"{target!r} is saved whole by {', '.join(adapter.name for adapter in having)} alone"
            problems.append(Problem("adapters", f"{wrong}, and without the base it isn't known in the others", merge))
        elif len({spec.shape for spec in specs}) > 1 or (not floating and len(set(specs)) > 1):
            wrong = f"{target!r} is {', '.join(map(str, specs))}"
            problems.append(Problem("adapters", wrong, "give adapters of one base"))
        elif not floating and len({adapter.weights.read(adapter.whole[target]).tobytes() for adapter in having}) > 1:
            problems.append(Problem("adapters", f"the integers of {target!r} differ", merge))
        elif abs(sum(coefficients) - 1) > 1e-9:
            wrong = f"{target!r} is saved whole, and the weights sum to {sum(coefficients):g}"
            problems.append(Problem("adapters", wrong, "weights must sum to 1, or normalize be true"))
    return problems


def _shape(adapter: Adapter, module: str) -> tuple[Any, ...]:
    pair = adapter.pairs[module]
    up, down = adapter.weights.specs[pair.up].shape, adapter.weights.specs[pair.down].shape
    return (pair.kind, up[0], *down[1:])


def _targets(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(target for adapter in adapters for target in adapter.whole))


def _wide(adapter: Adapter, key: str) -> np.ndarray:
    spec = adapter.weights.specs[key]
    out: np.ndarray = np.empty(spec.shape)
    widen(adapter.weights.read(key), spec.dtype, out)
    return out


def _factors(adapter: Adapter, pair: Pair | None, shape: tuple[int, ...]) -> Factors:
    if pair is None:
        return Factors(np.zeros((shape[0], 0)), np.zeros((0, int(np.prod(shape[1:])))))
    up, down = _wide(adapter, pair.up), _wide(adapter, pair.down)
    return Factors(pair.scale * up.reshape(shape[0], -1), down.reshape(len(down), -1))


def _merge_module(
    writer: AdapterWriter,
    adapters: Sequence[Adapter],
    module: str,
    make: Callable[..., Factors],
    weights: Sequence[float],
    options: Mapping[str, Any],
    dtype: str | None,
) -> None:
    owner = next(adapter for adapter in adapters if module in adapter.pairs)
    kind, *shape = _shape(owner, module)
    pair = owner.pairs[module]
    factors = [_factors(adapter, adapter.pairs.get(module), tuple(shape)) for adapter in adapters]
    if "seed" in options:  # other entries are dropped in every module
        drawn = xxhash.xxh3_64_intdigest(f"{options['seed']} {module}".encode())
        options = {**options, "seed": drawn}
    up, down = make(factors, weights, **options)
    ones = [1] * (len(owner.weights.specs[pair.up].shape) - 2)
    up, down = up.reshape(*up.shape, *ones), down.reshape(len(down), *shape[1:])
    writer.pair(module, up, down, dtype or owner.weights.specs[pair.up].dtype, embedding=kind == "embedding")


def _merge_biases(writer: AdapterWriter, adapters: Sequence[Adapter], weights: Sequence[float], dtype: str | None) -> bool:
    """What is added to biases, summed; peft then expects it of every module, zero or not. Whether there is any."""
    if not any(pair.bias for adapter in adapters for pair in adapter.pairs.values()):
        return False
    for module in _modules(adapters):
        owner = next(adapter for adapter in adapters if module in adapter.pairs)
        kind, size, *_ = _shape(owner, module)
        if kind == "embedding" or f"{module}.lora_B.bias" in writer.done:
            continue
        total = np.zeros(size)
        for adapter, weight in zip(adapters, weights, strict=True):
            pair = adapter.pairs.get(module)
            if pair is not None and pair.bias is not None:
                total += weight * pair.scale * _wide(adapter, pair.bias)
        writer.tensor(f"{module}.lora_B.bias", total, dtype or owner.weights.specs[owner.pairs[module].up].dtype)
    return True


def _merge_whole(writer: AdapterWriter, adapters: Sequence[Adapter], weights: Sequence[float], dtype: str | None) -> None:
    """The average of tensors that all adapters save whole."""
    modules = dict.fromkeys(_modules(adapters))
    for target in _targets(adapters):
        module, _, last = target.rpartition(".")
        name = f"{module}.base_layer.{last}" if module in modules else target
        if name in writer.done:
            continue
        key = adapters[0].whole[target]
        spec = adapters[0].weights.specs[key]
        if spec.dtype not in STORED_FLOATS:
            writer.stored(name, adapters[0].weights.read(key), spec.dtype)
            continue
        first = _wide(adapters[0], key)
        total = first.copy()  # the first plus differences: equal tensors give themselves
        for adapter, weight in zip(adapters[1:], weights[1:], strict=True):
            total += weight * (_wide(adapter, adapter.whole[target]) - first)
        writer.tensor(name, total, dtype or spec.dtype)


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], lora_bias: bool) -> dict[str, Any]:
    configs = [adapter.config for adapter in adapters]
    saved = dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or ())
    biases = [config.get("bias", "none") for config in configs]
    return lora_config(
        ranks,
        targets=_target_modules(configs, list(ranks)),
        saved=list(saved),
        bias="all" if "all" in biases else "lora_only" if "lora_only" in biases else "none",
        lora_bias=lora_bias,
        base=next((config["base_model_name_or_path"] for config in configs if config.get("base_model_name_or_path")), None),
        task=next((config["task_type"] for config in configs if config.get("task_type")), None),
        fan_in_fan_out=bool(configs[0].get("fan_in_fan_out")),
    )


def _target_modules(configs: Sequence[Mapping[str, Any]], modules: list[str]) -> list[str]:
    """The inputs' short names where all they say is short names; the modules' full names otherwise."""
    named: dict[str, None] = {}
    for config in configs:
        targets = config.get("target_modules")
        if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
            return modules
        named |= dict.fromkeys(targets)
    return list(named)

"""`save` and `load`: a folder with `model.safetensors` and `interfuse.json`, and no pickle.

What was fused or trained here is always saved by value. Member networks that were loaded from a path or hub id are saved
by reference, with a hash of their weights, as long as the reference still gives these weights; they are saved by value where
they were trained, or where it is asked. Networks that came as Python objects are saved by value, without their code. A
Transformers network alone is saved as Transformers does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from interfuse.checkpoints.remote.hub import fetched
from interfuse.checkpoints.source import Checkpoint, open_checkpoint
from interfuse.checkpoints.tensors import spec_of, to_array, to_tensor
from interfuse.checkpoints.writer import TensorWriter, whole_folder
from interfuse.ensemble.network import Ensemble, Kind, make_room
from interfuse.errors import CheckpointError, ModelError, OptionError, Problem, UserError, nearest
from interfuse.models import CODE, fill, load_model, place, put, without_bar
from interfuse.modules.fused import ModelFusion
from interfuse.modules.taps import Tap
from interfuse.registry import problems_of
from interfuse.transfer.rebuilding import class_of, made_again, told, whole

FORMAT = 1
DESCRIPTION = "interfuse.json"
TENSORS = "model.safetensors"


class _Member(BaseModel):
    """What the description says of each member of a fusion or ensemble."""

    name: str
    reference: str | None
    stored: bool
    xxh3: str | None = None


class _Tap(BaseModel):
    path: str
    side: Literal["input", "output"]
    calls: int


class _Plain(BaseModel):
    """What `merge` and `run` say of weights is for people, and isn't needed to load them."""


class _Network(BaseModel):
    """What it says of any network: tensor -> the tensor that holds its values, for those that are tied; and of one made of
    networks its parts, and how they were joined."""

    shared: dict[str, str]
    parts: list[dict[str, str | None]] = []
    made: dict[str, Any] = {}


class _Ensemble(_Network):
    members: list[_Member]
    combine: Kind
    classes: list[list[str]] | None = None
    batched: bool | None = None


class _Fusion(_Network):
    members: list[_Member]
    fusion: str
    options: dict[str, Any]
    dim: int
    head: int | str | None
    pool: Literal["mean", "none"]
    residual: bool
    freeze: list[bool]
    taps: list[_Tap]
    widths: list[int]
    parents: list[bool]
    inputs: list[str] | None = None
    branch_dropout: float = 0.0
    missing: Literal["token", "none"] = "none"


_KINDS: dict[str, type[BaseModel]] = {
    "fusion": _Fusion,
    "ensemble": _Ensemble,
    "network": _Network,
    "weights": _Plain,
    "merge": _Plain,
    "transplant": _Plain,
}


def save(
    model: nn.Module, folder: str | Path, *, backbones: Literal["reference", "value"] = "reference", overwrite: bool = False
) -> Path:
    """Save a `ModelFusion`, an `Ensemble` or any network; the folder appears whole or not at all.

    backbones: "value" also stores the weights of frozen networks that were loaded from a path or hub id.
    Raises `CheckpointError` where the folder exists and isn't to be overwritten.
    """
    with whole_folder(folder, overwrite=overwrite, inputs=folders_used(model) if backbones == "reference" else ()) as part:
        write_model(model, part, backbones=backbones)
    return Path(folder)


def folders_used(model: nn.Module) -> list[str]:
    """The folders on this machine that a model's members were loaded from."""
    return [ref for ref in getattr(model, "references", ()) if ref is not None and Path(ref).exists()]


def write_model(
    model: nn.Module, folder: Path, *, backbones: Literal["reference", "value"] = "reference", elsewhere: bool = False
) -> None:
    """Write the files of `save` into a folder that exists.

    elsewhere: the folder is for other machines, too: folders on this one are no references, and aren't named.
    """
    if backbones not in ("reference", "value"):
        raise OptionError(Problem("backbones", f"got {backbones!r}", nearest(str(backbones), ["reference", "value"])))
    transformers = sys.modules.get("transformers")  # where it isn't loaded, the model isn't one of its
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        with without_bar(transformers):
            model.save_pretrained(folder)
        return
    description = _describe(model)
    for part in description.get("parts", []) if elsewhere else ():
        part["reference"] = None if part["reference"] in folders_used(model) else part["reference"]
    by_reference = []
    for k, member in enumerate(description.get("members", [])):
        if elsewhere and model.references[k] in folders_used(model):  # type: ignore[index, operator]
            member["reference"] = None
        network: nn.Module = model.backbones[k]  # type: ignore[index, assignment]
        if backbones == "reference" and _can_be_had_again(network, member["reference"]):
            member |= {"stored": False, "xxh3": open_checkpoint(network).hash()}
            by_reference.append(f"backbones.{k}.")
    tensors, description["shared"] = _distinct(model, tuple(by_reference))
    with TensorWriter(folder / TENSORS, {name: spec_of(t) for name, t in tensors.items()}, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.append(name, to_array(tensor))
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _can_be_had_again(network: nn.Module, reference: str | None) -> bool:
    """Whether the reference gives, bit for bit, the weights that the network has now. Code is never called to find out."""
    if reference is None or reference.startswith(CODE):
        return False
    try:
        return open_checkpoint(load_model(reference)).hash() == open_checkpoint(network).hash()
    except UserError:
        return False


def _describe(model: nn.Module) -> dict[str, Any]:
    """What has to be known, beside tensors, to make the model again."""
    from interfuse import __version__

    common = {"format": FORMAT, "interfuse": __version__, "torch": torch.__version__, "class": class_of(model)}
    if isinstance(model, ModelFusion):
        if not model.built:
            raise ModelError(Problem("model", "its widths aren't known yet", "give it `example`, or call it once"))
        return common | {
            "kind": "fusion",
            "members": _members(model),
            "fusion": model.kind,
            "options": model.options,
            "dim": model.dim,
            "head": model.classes if model.classes is not None or model.head is None else class_of(model.head),
            "pool": model.pool,
            "residual": model.residual,
            "freeze": list(model.freeze),
            "taps": [vars(tap) for tap in model.taps],
            "widths": list(model.widths),
            "parents": list(model.parents),
            "inputs": list(model.inputs),
            "branch_dropout": model.branch_dropout,
            "missing": model.missing,
        }
    if isinstance(model, Ensemble):
        about = {"kind": "ensemble", "members": _members(model), "combine": model.combine, "classes": model.spaces}
        return common | about | ({} if model.batched is None else {"batched": model.batched})
    return common | {"kind": "network", **told(model)}


def _members(model: ModelFusion | Ensemble) -> list[dict[str, Any]]:
    return [
        {"name": name, "class": class_of(network), "reference": whole(reference), "stored": True}
        for name, network, reference in zip(model.names, model.backbones, model.references, strict=True)
    ]


def _distinct(model: nn.Module, left_out: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors, each stored once, and name -> name for those that share another's memory."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(left_out):
            continue
        if not isinstance(tensor, Tensor):
            raise ModelError(Problem(name, f"its state is a {type(tensor).__name__}", "a state of tensors only"))
        at = place(tensor)
        if at in seen:
            shared[name] = seen[at]
        else:
            seen[at] = name
            tensors[name] = tensor
    return tensors, shared


def load(
    folder: str | Path,
    models: Sequence[nn.Module] | Mapping[str, nn.Module] | nn.Module | None = None,
    *,
    head: nn.Module | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Load what `save` wrote, in evaluation mode; every tensor has the bits that were saved.

    folder: on this machine, or the hub id of one that was pushed, `owner/name` or `owner/name@revision`.
    models: freshly built networks for the members that were saved without their code, as a list in order, or a dict by
        name; for a single network, that network. They are filled and become part of the result.
    head: a freshly built head, where the fusion was given one as a module.
    trust_code: allow members that are `python:` references.

    Raises `CheckpointError` or `ModelError` naming every network that is missing or doesn't fit.
    """
    if not Path(folder).is_dir():
        folder = fetched(str(folder))
    about = _description(Path(folder) / DESCRIPTION)
    if about["kind"] in ("weights", "merge", "transplant", "network"):
        return _single(Path(folder), about, models, trust_code)
    checkpoint = open_checkpoint(Path(folder) / TENSORS)
    members = _given(about["members"], models, trust_code)
    model: ModelFusion | Ensemble
    if about["kind"] == "ensemble":
        options = {key: about.get(key) for key in ("combine", "classes", "batched")}
        model = Ensemble(members, copy=False, **options)  # type: ignore[arg-type]
    else:
        model = _fusion(about, members, head)
    model.references = tuple(member["reference"] for member in about["members"])
    _fill(model, checkpoint, about["shared"], about["members"])
    return model.eval()


def _description(path: Path) -> dict[str, Any]:
    """What a folder's description says; a folder without one holds the weights of one network."""
    if not path.exists():
        return {"kind": "weights"}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kind, version = about["kind"], about.get("format", FORMAT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"can't be read: {error!r}", "a file that interfuse wrote")) from None
    if kind not in _KINDS or version != FORMAT:
        wrong = f"holds a {kind!r} in format {version}"
        raise CheckpointError(Problem(str(path), wrong, f"a newer interfuse; this one reads format {FORMAT}"))
    try:
        _KINDS[kind].model_validate(about, strict=True)
    except ValidationError as error:
        raise CheckpointError(*problems_of(error, str(path), list(about))) from None
    return about


def _single(folder: Path, about: dict[str, Any], models: Any, trust_code: bool) -> nn.Module:
    """The one network that a folder holds: the one given, filled, or what its config or its parts make, filled."""
    if about.get("parts") and not isinstance(models, nn.Module):
        models = made_again(about, _given(about["parts"], models, trust_code))
    if isinstance(models, nn.Module):
        if about["kind"] == "network":
            _fill(models, open_checkpoint(folder / TENSORS), about["shared"])
        else:
            fill(models, folder, exactly=True)
        return models.eval()
    if about["kind"] == "network" or not (folder / "config.json").exists():
        wrong = f"{folder} holds the weights of {about.get('class', 'a network')}, without its code"
        raise ModelError(Problem("models", wrong, "give such a network to fill"))
    return load_model(str(folder), exactly=True)


def _given(members: list[dict[str, Any]], models: Any, trust_code: bool) -> dict[str, nn.Module]:
    """A network for every member: the one given, or the one its reference names; every one that is missing at once."""
    names = [member["name"] for member in members]
    problems: list[Problem] = []
    if isinstance(models, Mapping):
        problems += [
            Problem(f"models[{n!r}]", "no member has this name", nearest(str(n), names)) for n in models if n not in names
        ]
        given = dict(models)
    else:
        listed = [] if models is None else [models] if isinstance(models, nn.Module) else list(models)
        if models is not None and len(listed) != len(names):
            problems.append(Problem("models", f"{len(listed)} given for {len(names)} members", f"in this order: {names}"))
        given = dict(zip(names, listed, strict=False))
    found: dict[str, nn.Module] = {}
    for member in members:
        name, reference = member["name"], member["reference"]
        try:
            if given.get(name) is not None:
                found[name] = given[name]
            elif reference is not None:
                found[name] = load_model(reference, trust_code=trust_code)
            elif models is None or isinstance(models, Mapping):
                problems.append(
                    Problem(
                        f"models[{name!r}]",
                        "missing",
                        f"it was saved without its code: give a {member.get('class', 'network')} (or use load_run)",
                    )
                )
        except UserError as error:
            problems += [Problem(f"models[{name!r}]", str(problem)) for problem in error.problems]
    if problems:
        raise ModelError(*problems)
    return found


def _fusion(about: dict[str, Any], members: dict[str, nn.Module], head: nn.Module | None) -> ModelFusion:
    if isinstance(about["head"], str) and head is None:
        raise ModelError(Problem("head", "missing", f"it was saved without its code: give a {about['head']}"))
    model = ModelFusion(
        members,
        about["fusion"],
        about["dim"],
        head if isinstance(about["head"], str) else about["head"],
        freeze=about["freeze"],
        pool=about["pool"],
        residual=about["residual"],
        copy=False,
        **{key: about[key] for key in ("inputs", "branch_dropout", "missing") if key in about},
        **about["options"],
    )
    model.make([Tap(**tap) for tap in about["taps"]], about["widths"], [model.classes if p else None for p in about["parents"]])
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, shared: Mapping[str, str], members: Sequence[dict[str, Any]] = ()) -> None:
    """Put the stored tensors into the model, after finding every one that is missing or doesn't fit."""
    make_room(model, {name: spec.shape for name, spec in checkpoint.specs.items()})
    outside = tuple(f"backbones.{k}." for k, member in enumerate(members) if not member["stored"])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(outside)}
    stored = {
        **checkpoint.specs,
        **{alias: checkpoint.specs[name] for alias, name in shared.items() if name in checkpoint.specs},
    }
    problems = _changed(model, members) + _torn(state, checkpoint, shared, members)
    for name in dict.fromkeys([*state, *stored]):
        if name not in stored:
            problems.append(Problem(_label(name, members), "wasn't saved", "give the network that was"))
        elif name not in state:
            problems.append(Problem(_label(name, members), "was saved, but the network has no such tensor"))
        elif tuple(stored[name].shape) != tuple(state[name].shape):
            wrong = f"the network has {tuple(state[name].shape)}"
            problems.append(Problem(_label(name, members), wrong, f"saved was {tuple(stored[name].shape)}"))
    if problems:
        raise CheckpointError(*problems)
    for name in state:
        put(model, name, to_tensor(checkpoint.read(shared.get(name, name)).copy(), stored[name].dtype))


def _torn(
    state: Mapping[str, Tensor], checkpoint: Checkpoint, shared: Mapping[str, str], members: Sequence[dict[str, Any]]
) -> list[Problem]:
    """Tensors that are one in the network given, but were saved with values of their own (a network given twice)."""
    first: dict[Any, str] = {}
    problems = []
    for name, tensor in state.items():
        held, source = first.setdefault(place(tensor), name), shared.get(name, name)
        other = shared.get(held, held)
        if source == other or not {source, other} <= checkpoint.specs.keys():
            continue
        if checkpoint.read(source).tobytes() != checkpoint.read(other).tobytes():
            wrong = f"is the same tensor as {_label(held, members)}, and was saved with other values"
            problems.append(Problem(_label(name, members), wrong, "give each member a network of its own"))
    return problems


def _changed(model: nn.Module, members: Sequence[dict[str, Any]]) -> list[Problem]:
    """Members saved by reference whose weights aren't what they were."""
    return [
        Problem(
            f"models[{member['name']!r}]", f"{member['reference']} has changed since this was saved", "give the same weights"
        )
        for member, network in zip(members, model.backbones if members else (), strict=True)  # type: ignore[arg-type]
        if not member["stored"] and open_checkpoint(network).hash() != member["xxh3"]
    ]


def _label(name: str, members: Sequence[dict[str, Any]]) -> str:
    """A tensor's name with its member's name in place of the number."""
    for k, member in enumerate(members):
        if name.startswith(f"backbones.{k}."):
            return f"models[{member['name']!r}].{name.removeprefix(f'backbones.{k}.')}"
    return name

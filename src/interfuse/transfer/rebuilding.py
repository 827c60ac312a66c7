"""Networks made of networks, told so that they can be made again: of which parts, and how these were joined.

A shared trunk, tied networks or a stitch is its parts' code and a few names; weights aren't looked at here (`saving` keeps
them, each once).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn

from interfuse.models import CODE
from interfuse.modules.cross_stitch import CrossStitch
from interfuse.modules.places import Layout
from interfuse.modules.stitched import Stitched, StitchRecord
from interfuse.modules.taps import Axes, Tap
from interfuse.transfer.sharing import SharedTrunk
from interfuse.transfer.trunk import Blocks, Trunk
from interfuse.transfer.tying import Tied, tie


def told(model: nn.Module) -> dict[str, Any]:
    """`parts` and `made`, as JSON; nothing for a network that isn't made of networks here."""
    if isinstance(model, SharedTrunk):
        made: dict[str, Any] = {"by": "share_trunk", "depth": model.depth, "blocks": list(model.blocks.names)}
        made |= {"path": model.blocks.path, "modules": model.shared.modules, "parameters": model.shared.parameters}
        return {"parts": _parts(model, model.experts), "made": made}
    if isinstance(model, Tied):
        return {"parts": _parts(model, model.networks), "made": {"by": "tie", "layers": model.layers}}
    if isinstance(model, Stitched):
        places = {"source": asdict(model.source), "target": asdict(model.target), "places": model.places}
        record = None if model.record is None else asdict(model.record)
        made = {"by": "stitch", "at": model.at, **places, "before": model.before, "record": record}
        return {"parts": _parts(model, model.backbones), "made": made}
    if isinstance(model, CrossStitch):
        made = {"by": "cross_stitch", "at": model.at, "per": model.per, "freeze": model.freeze, "before": model.before}
        made |= {"layouts": [[asdict(layout) for layout in row] for row in model.layouts]}
        made |= {"taps": [vars(tap) for tap in model.taps]}
        made |= {"widths": None if model.head is None else [model.head.in_features, model.head.out_features]}
        return {"parts": _parts(model, model.backbones), "made": made}
    return {}


def _parts(model: nn.Module, networks: nn.ModuleList) -> list[dict[str, Any]]:
    names: Any = model.names
    references: Any = model.references or (None,) * len(names)
    return [
        {"name": name, "class": class_of(network), "reference": whole(reference)}
        for name, network, reference in zip(names, networks, references, strict=True)
    ]


def made_again(about: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> nn.Module:
    """The network that `told` told of, of these parts, which become part of it where they can; its weights are whatever they
    are."""
    result: Any = _made(about["made"], parts)
    result.references = tuple(part["reference"] for part in about["parts"])
    return cast(nn.Module, result)


def _made(made: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> nn.Module:
    if made["by"] == "share_trunk":
        first = next(iter(parts.values()))
        trunk = Trunk(tuple(made["modules"]), tuple(made["parameters"]))
        blocks = Blocks(made["path"], tuple(made["blocks"]))
        return SharedTrunk(parts, trunk, first.state_dict(), depth=made["depth"], blocks=blocks)
    if made["by"] == "tie":
        return tie(parts, made["layers"], start="first", copy=False)
    if made["by"] == "cross_stitch":
        layouts = [list(map(_layout, row)) for row in made["layouts"]]
        return CrossStitch.made_of(parts, {**made, "layouts": layouts, "taps": [Tap(**tap) for tap in made["taps"]]})
    a, b = parts.values()
    at: Any = tuple(made["at"])
    ends = [_layout(made["source"]), _layout(made["target"])]
    places = None if made["places"] is None else tuple(made["places"])
    result = Stitched(a, b, at, *ends, places=places, before=made["before"], copy=False)
    result.record = None if made["record"] is None else StitchRecord(**{**made["record"], "at": at})
    return result


def _layout(about: Mapping[str, Any]) -> Layout:
    return Layout(tuple(about["places"]), about["width"], Axes(*about["axes"]))


def whole(reference: str | None) -> str | None:
    """A folder's path that holds wherever it is loaded from; hub ids and code stay as they are."""
    if reference is None or reference.startswith(CODE) or not Path(reference).exists():
        return reference
    return str(Path(reference).resolve())


def class_of(module: nn.Module) -> str:
    """The module's class, by its full name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"

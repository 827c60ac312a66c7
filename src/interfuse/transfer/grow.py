"""`grow`: a network made wider or deeper so that it computes what it did, exactly, at the moment of growing.

Wider replicates units and shares out their outgoing weights (Net2Wider, Chen et al. 2016, 1511.05641); deeper adds blocks
that are the identity (Net2Deeper there; copies of a residual block that add nothing yet, Wu et al. 2024, 2401.02415). What
the network computes is compared on an example before it's given back. Nothing is trained; training is what it's for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.modules.taps import quiet
from interfuse.transfer.deeper import deepen
from interfuse.transfer.probe import TOLERANCE, change, outputs
from interfuse.transfer.wider import Width, widen

_Model = TypeVar("_Model", bound=nn.Module)


def grow(
    model: _Model,
    wider: Mapping[str, Width] | None = None,
    deeper: Sequence[str] | None = None,
    *,
    example: Any,
    noise: float = 0.0,
    seed: int = 0,
) -> _Model:
    """A larger network, whose outputs in evaluation mode are those of `model`, which is unchanged.

    wider: path of a Linear or convolution -> its new number of outputs, or (number, path or paths of the modules that read
        it) where those can't be found. Between the two may be BatchNorm and whatever treats each channel alike.
    deeper: paths of modules that get an identity behind them: a residual block in an nn.ModuleList or nn.Sequential, whose
        copy has its last projections at zero; or an activation in an nn.Sequential that leaves its own outputs as they are
        (ReLU), which a Linear or 3-wide convolution, the identity, and another such activation follow.
    example: a batch of inputs, as the network takes them, on which everything is tried.
    noise: in [0, 1), by how much the shares of replicated units in the weights that read them differ; at 0 they are equal,
        and stay so in training unless something else (dropout) tells them apart. The outputs are the same.
    seed: that of the choice of units, and of the noise.

    Raises `OptionError` for options, `ModelError` where a part can't be grown, with every such part, or where the outputs
    would change by more than 1e-5 of the largest (or of 1).
    """
    _check(model, wider, deeper, noise)
    grown = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with quiet(model), quiet(grown):
        before, there = _outputs(model, example), set(grown.modules())
        problems = widen(grown, wider or {}, example, before, noise, generator)
        problems += deepen(grown, list(deeper or ()), example, before)
        changed = change(grown, example, before)
    if problems:
        raise ModelError(*problems)
    if not changed <= TOLERANCE:
        wrong = f"the outputs change by {changed:.2g} of the largest"
        raise ModelError(Problem("grow", wrong, "grow in float32 at least, and a network that gives the same twice"))
    for module in grown.modules():
        if module not in there:
            module.training = model.training
    return grown


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    try:
        found = outputs(model, example)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # whatever its code raises
        wrong = f"the network doesn't take it: {type(error).__name__}: {error}"
        raise ModelError(Problem("example", wrong, "a batch of inputs, as the network takes them")) from error
    if not found:
        raise ModelError(Problem("example", "the network gives no numbers for it", "a network that gives tensors of floats"))
    return found


def _check(model: nn.Module, wider: Mapping[str, Width] | None, deeper: Sequence[str] | None, noise: float) -> None:
    problems = [] if isinstance(model, nn.Module) else [Problem("model", f"got {model!r}", "a torch.nn.Module")]
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < 1:
        problems.append(Problem("noise", f"got {noise!r}", "at least 0 and below 1"))
    if not isinstance(wider, Mapping | None):
        problems.append(Problem("wider", f"got {wider!r}", "paths with their new widths, {path: width}"))
    if not isinstance(deeper, list | tuple | None):
        problems.append(Problem("deeper", f"got {deeper!r}", "a list of paths"))
    if not wider and not deeper:
        problems.append(Problem("grow", "nothing is named", "give wider={path: width} or deeper=[path]"))
    if problems:
        raise OptionError(*problems)
    known = list(dict(model.named_modules(remove_duplicate=False)))
    asked = [*(("wider", path) for path in wider or ()), *(("deeper", path) for path in dict.fromkeys(deeper or ()))]
    missing = [
        Problem(f"{key}[{path!r}]", f"no module at {path!r}", nearest(str(path), filter(None, known)))
        for key, path in asked
        if not path or path not in known
    ]
    if missing:
        raise ModelError(*missing)
    again = [path for path in dict.fromkeys(deeper or ()) if list(deeper or ()).count(path) > 1]
    if again:
        raise OptionError(*(Problem(f"deeper[{path!r}]", "stands twice", "grow again for another block") for path in again))

"""An ensemble: the predictions of several networks, averaged. The level outputs; nothing is trained.

    probabilities:  log( 1/M sum_k softmax(f_k(x)) )      logits:  1/M sum_k f_k(x)

(Deep ensembles, Lakshminarayanan et al. 2017, 1612.01474.) It costs all its members at inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from interfuse.errors import ModelError, OptionError, Problem, nearest
from interfuse.modules.inputs import Composite, call, inputs_by_model, prediction
from interfuse.modules.members import members
from interfuse.registry import register

COMBINE = ("probabilities", "logits")
_COMBINE = "What is averaged: probabilities, for classes; or the outputs as they are, for classes or numbers."


@register("ensemble", "outputs", paper="Lakshminarayanan et al. 2017, arXiv:1612.01474", needs="nothing")
class Ensemble(Composite):
    """The mean of several networks' predictions, (batch, classes), as logits: softmax gives the mean probabilities.

    `combine="logits"` averages the outputs as they are, as regression needs. Inputs are as for `ModelFusion`; a model whose
    inputs are None is left out of the mean. Networks are copied unless `copy=False`.
    Raises `ModelError` where the predictions' shapes differ, or where probabilities are asked of what isn't (batch, classes).
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        models: Sequence[nn.Module | str] | Mapping[str, nn.Module | str],
        copy: bool = True,
        *,
        combine: Annotated[Literal["probabilities", "logits"], Field(description=_COMBINE)] = "probabilities",
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            raise OptionError(Problem("combine", f"got {combine!r}", nearest(str(combine), COMBINE)))
        self.combine = combine
        self.names, self.backbones, self.references = members(models, copy=copy)

    def forward(self, inputs: Any) -> Tensor:
        """Inputs -> (batch, classes)."""
        own = inputs_by_model(self.names, inputs)
        outputs = {
            name: prediction(call(model, x, name), name)
            for name, model, x in zip(self.names, self.backbones, own, strict=True)
            if x is not None
        }
        if len({output.shape for output in outputs.values()}) > 1:
            found = ", ".join(f"{name} {tuple(output.shape)}" for name, output in outputs.items())
            raise ModelError(Problem("models", f"predictions of different shapes: {found}", "networks with the same classes"))
        stacked = torch.stack(list(outputs.values()))
        if self.combine == "logits":
            return stacked.mean(dim=0)
        if stacked.ndim != 3 or stacked.shape[-1] < 2:
            wrong = f"got {self.combine!r} for predictions {tuple(stacked.shape[1:])}"
            raise ModelError(Problem("combine", wrong, "networks that give (batch, 2 or more classes), or combine='logits'"))
        return stacked.log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(float(len(stacked))).log().to(stacked)

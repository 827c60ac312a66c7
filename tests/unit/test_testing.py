"""The shipped checks find what they are there for: each catches a fusion that breaks one promise, and passes a sound one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse import registry, testing
from interfuse.modules.average import Mean
from interfuse.modules.branches import Features, Fused, Present, Share
from interfuse.modules.concat import Concat
from interfuse.modules.gate import Gate


class Sound(Mean):
    """A third party's fusion."""


class NegativeWeights(Mean):
    def forward(self, features: Features, present: Present = None) -> Fused:
        fused, weights = super().forward(features, present)
        return fused, -weights


class UnusedParameter(Mean):
    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__(widths, dim, dropout=dropout)
        self.unused = nn.Parameter(torch.ones(dim))


class PrefersTheFirst(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return fused + h[:, 0] * mask[:, :1], weights


class IgnoresMasks(Mean):
    def forward(self, features: Features, present: Present = None) -> Fused:
        return super().forward(features, None)


class AlwaysDrops(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return nn.functional.dropout(fused), weights


class NeverDrops(Mean):
    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__(widths, dim)


class OnlySingle(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return fused @ torch.eye(fused.shape[-1]), weights


class DependsOnData(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return (fused if float(fused.detach().sum()) > 0 else fused * 1.0), weights


class FixedBatch(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        assert len(h) % testing.BATCH == 0 or len(h) < 3
        return super()._fuse(h, mask)


class HiddenState(Mean):
    def __init__(self, widths: Sequence[int], dim: int, *, dropout: Share = 0.0) -> None:
        super().__init__(widths, dim, dropout=dropout)
        self.scale = float(torch.rand(()))

    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return fused * self.scale, weights


class AcceptsAnything(Mean):
    def forward(self, features: Features, present: Present = None) -> Fused:
        return super().forward(list(features) + [None] * (len(self.branches) - len(features)), present)


class WrongShape(Mean):
    def _fuse(self, h: Tensor, mask: Tensor) -> Fused:
        fused, weights = super()._fuse(h, mask)
        return fused[..., :-1], weights


def fusion(monkeypatch: pytest.MonkeyPatch, make: Any) -> str:
    """Register for this test alone."""
    name = make.__name__
    monkeypatch.setitem(registry._METHODS, ("features", name), registry.Method(name, "features", make, "", ""))
    return name


def test_a_sound_fusion_of_a_third_party_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.check_fusion(fusion(monkeypatch, Sound))


@pytest.mark.parametrize(
    ("make", "check", "match"),
    [
        (WrongShape, testing.check_shapes, r"fused is \(5, 7\)"),
        (NegativeWeights, testing.check_weights, "negative weights"),
        (Gate, testing.check_weights, "not close"),
        (UnusedParameter, testing.check_gradients, "unused has no gradient"),
        (Concat, testing.check_gradients, "missing has a gradient of zero"),
        (PrefersTheFirst, testing.check_permutation, "not close"),
        (IgnoresMasks, testing.check_missing_model, "not close"),
        (IgnoresMasks, testing.check_missing_rows, "not close"),
        (IgnoresMasks, testing.check_missing_tokens, "nothing is there, and the weights are"),
        (AlwaysDrops, testing.check_modes, "evaluation differs from call to call"),
        (NeverDrops, testing.check_modes, "dropout does nothing in training"),
        (OnlySingle, testing.check_half_precision, "dtype"),
        (DependsOnData, testing.check_compile, "data-dependent"),
        (FixedBatch, testing.check_export, "Guard failed|AssertionError|specialized|size"),
        (HiddenState, testing.check_state, "isn't in its state_dict wholly"),
        (AcceptsAnything, testing.check_refusals, "accepted|'nothing'"),
    ],
)
def test_a_faulty_fusion_is_found(monkeypatch: pytest.MonkeyPatch, make: Any, check: testing.Check, match: str) -> None:
    with pytest.raises(Exception, match=match):  # an assertion, or what torch says of a module that can't be traced
        check(fusion(monkeypatch, make), testing.Claims())


def test_a_claim_that_isnt_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="token counts differ"):
        testing.check_unequal_tokens(fusion(monkeypatch, Sound), testing.Claims(unequal_tokens=True))
    with pytest.raises(AssertionError, match="'nothing', not 'token counts differ'"):
        testing.check_unequal_tokens("attention", testing.Claims())

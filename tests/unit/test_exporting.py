"""Fused networks as programs: the same outputs without their code, for batches of any size, through ONNX and torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import CheckpointError, DataError, ModelError, OptionError
from interfuse.exporting import export
from interfuse.registry import methods

SUFFIXES = [".onnx", ".pt2"]


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers)


class Words(nn.Module):
    """Reads tokens with a mask, of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        return self.out((self.embed(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1))


def run_written(path: Path, *tensors: Tensor) -> Tensor:
    """What the file alone gives."""
    if path.suffix == ".pt2":
        output: Tensor = torch.export.load(path).module()(*tensors)
        return output
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {slot.name: t.numpy() for slot, t in zip(session.get_inputs(), tensors, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


@pytest.mark.parametrize("fusion", sorted(method.name for method in methods("features")))
def test_every_fusion_is_exported(fusion: str, tmp_path: Path) -> None:
    model = itf.ModelFusion([cnn(0), cnn(1)], fusion=fusion, head=3)
    suffix = ".onnx" if fusion != "mean" else ".pt2"
    record = export(model, tmp_path / f"net{suffix}", torch.rand(3, 1, 8, 8))
    x = torch.rand(7, 1, 8, 8)
    assert record.difference <= 1e-4
    assert torch.allclose(run_written(record.path, x), model.eval()(x), atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_with_inputs_of_their_own(suffix: str, tmp_path: Path) -> None:
    model = itf.ModelFusion({"image": cnn(), "text": Words()}, fusion="gate", head=3)
    example: dict[str, Any] = {
        "image": torch.rand(3, 1, 8, 8),
        "text": {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)},
    }
    record = export(model, tmp_path / f"net{suffix}", example)
    assert record.inputs == ("image", "text_input_ids", "text_attention_mask")
    x, ids, mask = torch.rand(6, 1, 8, 8), torch.randint(0, 20, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    expected = model.eval()({"image": x, "text": {"input_ids": ids, "attention_mask": mask}})
    assert torch.allclose(run_written(record.path, x, ids, mask), expected, atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ensembles_and_merges(suffix: str, tmp_path: Path) -> None:
    x = torch.rand(5, 1, 8, 8)
    for name, model in (
        ("ensemble", itf.Ensemble([cnn(0), cnn(1)])),
        ("merge", itf.merge("linear", [cnn(0), cnn(1)])),
    ):
        record = export(model, tmp_path / f"{name}{suffix}", x[:2])
        assert torch.allclose(run_written(record.path, x), model.eval()(x), atol=1e-4)


def test_what_computes_something_else_is_not_written(tmp_path: Path) -> None:
    class Chance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + torch.randn(x.shape[0], 64)

    class ByValue(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    for model in (Chance(), ByValue()):
        with pytest.raises(ModelError, match="model"):
            export(model, tmp_path / "net.pt2", torch.rand(3, 1, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    x = torch.rand(3, 1, 8, 8)
    with pytest.raises(OptionError) as raised:
        export(cnn(), tmp_path / "net.bin", x, tolerance=2)
    assert {p.path for p in raised.value.problems} == {"path", "tolerance"}
    with pytest.raises(DataError, match="two or more"):
        export(cnn(), tmp_path / "net.pt2", x[:1])
    with pytest.raises(DataError, match="no tensors"):
        export(cnn(), tmp_path / "net.pt2", {})
    (tmp_path / "net.pt2").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="already"):
        export(cnn(), tmp_path / "net.pt2", x)
    assert (tmp_path / "net.pt2").read_bytes() == b"mine"
    export(cnn(), tmp_path / "net.pt2", x, overwrite=True)
    assert (tmp_path / "net.pt2").read_bytes() != b"mine"

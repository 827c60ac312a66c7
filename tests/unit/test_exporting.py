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


def linear(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, classes))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("combine", ["greedy", "vote"])
def test_ensembles_of_different_classes(combine: Any, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    members = [linear(2), linear(3), linear(2)]
    ensemble = itf.Ensemble(members, combine=combine, classes=[["a", "b"], ["b", "a", "c"], ["d", "a"]]).eval()
    targets = ensemble.log_probabilities([m(x) for m in members])[1].argmax(1)  # the second is always right
    ensemble.calibrate((x, targets), progress=False)
    record = export(ensemble, tmp_path / f"net{suffix}", x[:2])
    assert torch.allclose(run_written(record.path, x), ensemble(x), atol=1e-4)
    if combine == "greedy":  # what isn't drawn isn't in the program, and has a class of its own that has no chance
        assert ensemble.drawn == [0.0, 1.0, 0.0]
        assert ensemble(x)[:, 3].isinf().all()
        if suffix == ".pt2":
            assert sum("linear" in str(node.target) for node in torch.export.load(record.path).graph.nodes) == 1


@pytest.mark.parametrize("missing", ["token", "none"])
def test_a_fusion_without_one_of_its_inputs(missing: Any, tmp_path: Path) -> None:
    example: dict[str, Any] = {"image": torch.rand(3, 1, 8, 8), "row": torch.rand(3, 4)}
    model = itf.ModelFusion({"image": cnn(), "row": linear(3)}, "gate", head=3, example=example, missing=missing).eval()
    record = export(model, tmp_path / "net.pt2", {**example, "image": None})
    assert record.inputs == ("row",)
    x = torch.rand(7, 4)
    assert torch.allclose(run_written(record.path, x), model({"row": x}), atol=1e-4)


def test_texts_of_a_length_that_the_network_fixes(tmp_path: Path) -> None:
    class Recurrent(Words):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(8, 8, batch_first=True)  # the tracer writes its length down

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.out(self.layer(self.embed(input_ids))[0].mean(1))
            return result

    model = Recurrent().eval()
    ids, mask = torch.randint(0, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    record = export(model, tmp_path / "net.pt2", {"input_ids": ids[:2], "attention_mask": mask[:2]})
    assert torch.allclose(run_written(record.path, ids, mask), model(ids, mask), atol=1e-4)


def test_what_the_network_says_of_the_example_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model: needs the inputs \['attention_mask'\]"):
        export(Words(), tmp_path / "net.pt2", {"input_ids": torch.ones(2, 4, dtype=torch.long)})


def test_what_computes_something_else_is_not_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert capfd.readouterr() == ("", "")  # no graph beside the error


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

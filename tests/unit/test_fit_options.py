"""What `fit` trains and how fast: the head alone, LoRA factors, layer-wise rates, L2-SP; and statistics after a merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import CheckpointError, DataError, ModelError, OptionError
from interfuse.modules.fused import ModelFusion
from interfuse.training.fit import fit
from interfuse.training.loop import Loop, Rates
from interfuse.training.parameters import groups, heads, trained
from interfuse.training.statistics import reset_statistics

QUICK: dict[str, Any] = {"accelerator": "cpu", "progress": False, "cache": False, "epochs": 2, "batch_size": 16}


def data(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    return torch.eye(3, 4)[targets] + 0.3 * torch.randn(n, 4, generator=generator), targets


class Stop(lightning.Callback):
    """Ends a run after its first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


class Deep(nn.Module):
    """Three layers, something before and something after them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.classifier(x)


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_head_alone_is_trained() -> None:
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    fit(model, data(), train_only="head", **QUICK)
    assert changed(before, model) == {"classifier.weight", "classifier.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_the_head_of_a_fusion_is_its_own() -> None:
    model = ModelFusion([Deep(1), Deep(2)], head=3, freeze=False, example=data()[0])
    before = copy.deepcopy(model.state_dict())
    fit(model, data(), train_only=["head"], **QUICK)
    assert changed(before, model) - {"mix"} == {"head.weight", "head.bias"}  # `mix`: where it started


def test_a_network_without_a_head_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(1, 3, 4), nn.Flatten())
    with pytest.raises(OptionError, match="head"):
        fit(model, (data()[0].unsqueeze(1), data()[1]), train_only="head", **QUICK)


@pytest.mark.parametrize("lora", [2, {"r": 2, "lora_alpha": 4, "use_rslora": True}])
def test_lora_changes_weights_by_its_rank_and_leaves_the_same_network(lora: Any) -> None:
    model = Deep()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    fit(model, data(), lora=lora, learning_rate=0.05, **QUICK)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(p.requires_grad for p in model.parameters())
    layers = {f"layers.{i}.weight" for i in range(3)}
    assert changed(before, model) == layers | {"embed.weight", "classifier.weight", "classifier.bias"}
    for name in layers:
        values = torch.linalg.svdvals((model.state_dict()[name] - before[name]).double())
        assert values[1] > 1e-6 * values[0]
        assert values[2] < 1e-5 * values[0]


def test_lora_learns_and_what_it_learned_is_in_the_weights() -> None:
    model = Deep()
    record = fit(model, data(), data(30, 1), lora=2, learning_rate=0.05, **QUICK | {"epochs": 5})
    assert record.best["validation_loss"] < record.history[0]["validation_loss"]
    loss = nn.functional.cross_entropy(model(data(30, 1)[0]), data(30, 1)[1])
    assert loss.item() == pytest.approx(record.best["validation_loss"], rel=1e-4)


def test_lora_is_folded_in_after_an_error_too() -> None:
    model = Deep()
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), trained(model, data()[0], None, 2):
        raise RuntimeError("stop")
    assert list(model.state_dict()) == names


def test_lora_needs_layers_and_sound_options() -> None:
    with pytest.raises(ModelError, match="besides the head"):
        fit(nn.Linear(4, 3), data(), lora=2, **QUICK)
    for wrong in (0, True, {"rank": 3}, 1.5):
        with pytest.raises(OptionError, match="lora"):
            fit(Deep(), data(), lora=wrong, **QUICK)  # type: ignore[arg-type]


def test_layers_have_rates_that_fall_with_their_depth() -> None:
    model = Deep()
    rate = {id(p): group["lr"] for group in groups(model, 0.1, 0.5) for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters() if name.endswith("weight")}
    assert found == {
        "embed.weight": 0.1 * 0.5**4,
        "layers.0.weight": 0.1 * 0.5**3,
        "layers.1.weight": 0.1 * 0.5**2,
        "layers.2.weight": 0.1 * 0.5,
        "classifier.weight": 0.1,
    }


def test_networks_in_a_fusion_count_their_layers_apart() -> None:
    model = ModelFusion([Deep(1), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))], head=3, freeze=False)
    model.build(data()[0])
    rate = {id(p): group["lr"] for group in groups(model, 1.0, 0.5) for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert found["backbones.0.layers.2.weight"] == 0.5
    assert found["backbones.1.2.weight"] == 0.5
    assert found["head.weight"] == 1.0


def test_every_trained_parameter_is_in_one_group_and_no_other() -> None:
    model = Deep()
    model.embed.requires_grad_(False)
    for decay in (None, 0.9):
        given = [id(p) for group in groups(model, 0.1, decay) for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_l2_sp_holds_weights_to_their_start() -> None:
    distances = []
    for strength in (0.0, 1.0, 1000.0):
        model = Deep()
        start = copy.deepcopy(model)
        fit(model, data(), l2_sp=strength, weight_decay=0.0, **QUICK | {"epochs": 5})
        distances.append(
            sum((a - b).square().sum().item() for a, b in zip(model.parameters(), start.parameters(), strict=True))
        )
    assert distances[2] < distances[1] < distances[0]


def test_the_gradient_of_l2_sp_is_that_of_its_formula() -> None:
    from interfuse.training.loop import Loop, Rates
    from interfuse.training.losses import cross_entropy

    model, (x, y) = Deep(), data()
    loop = Loop(model, cross_entropy, None, Rates(0.1, l2_sp=3.0))
    loop.setup("fit")
    loop.log = lambda *args, **kwargs: None
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    loop.training_step((x, y), 0).backward()
    plain = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    for p, s, gradient in zip(model.parameters(), start, plain, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, gradient + 3.0 * (p.detach() - s), atol=1e-5)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({}, "last.ckpt was made without l2_sp, and doesn't hold the start .*; resume it with l2_sp=0, or train anew"),
        ({"l2_sp": 1.0, "train_only": "classifier.*"}, "holds the start of 2 tensors, which aren't the 10 that are trained"),
    ],
)
def test_a_checkpoint_without_the_start_is_not_resumed_with_l2_sp(tmp_path: Path, before: dict[str, Any], said: str) -> None:
    fit(Deep(), data(), checkpoints=tmp_path, callbacks=[Stop()], **QUICK | before)
    again = Deep(1)
    weights = {name: value.clone() for name, value in again.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        fit(again, data(), resume=tmp_path / "last.ckpt", l2_sp=1.0, **QUICK)
    assert not changed(weights, again)
    fit(again, data(), resume=tmp_path / "last.ckpt", **QUICK | {k: v for k, v in before.items() if k != "l2_sp"})


def test_a_resumed_run_is_held_to_the_first_start(tmp_path: Path) -> None:
    options = QUICK | {"l2_sp": 10.0, "weight_decay": 0.0}
    whole, halves = Deep(), Deep()
    fit(whole, data(), **options | {"epochs": 2})
    fit(halves, data(), checkpoints=tmp_path, callbacks=[Stop()], **options | {"epochs": 2})
    again = Deep()
    fit(again, data(), resume=tmp_path / "last.ckpt", **options | {"epochs": 2})
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bad_options_come_all_at_once() -> None:
    with pytest.raises(OptionError) as raised:
        fit(Deep(), data(), lora=-1, layer_decay=1.5, l2_sp=-1.0, **QUICK)
    assert {p.path for p in raised.value.problems} == {"lora", "layer_decay", "l2_sp"}


def test_heads_are_found() -> None:
    x = data()[0]
    assert heads(Deep(), x) == ["classifier"]
    assert heads(ModelFusion([Deep(), Deep(1)], head=3, example=x), x) == ["head"]
    assert heads(ModelFusion([Deep(), Deep(1)], example=x), x) == []


def test_statistics_are_those_of_the_data() -> None:
    model, (x, y) = normed(0), data(64)
    found = reset_statistics(model.eval(), [(x, y)])
    hidden = model[0](x).detach()
    assert found == 1
    assert not model.training
    assert torch.allclose(model.state_dict()["1.running_mean"], hidden.mean(0), atol=1e-5)
    assert torch.allclose(model.state_dict()["1.running_var"], hidden.var(0), rtol=1e-4)
    assert model[1].momentum == 0.1


def test_statistics_need_a_layer_that_has_them() -> None:
    with pytest.raises(ModelError, match="BatchNorm"):
        reset_statistics(Deep(), data())


def test_after_a_merge_they_are_estimated_first_and_once() -> None:
    merged = itf.merge("linear", [normed(1), normed(2)])
    before = merged[1].running_mean.clone()
    record = fit(merged, data(), **QUICK | {"epochs": 0})
    assert record.statistics == 1
    assert not torch.equal(merged[1].running_mean, before)
    assert fit(merged, data(), **QUICK | {"epochs": 0}).statistics == 0
    assert fit(normed(1), data(), **QUICK | {"epochs": 0}).statistics == 0


def test_a_merge_within_a_fusion_counts_too() -> None:
    merged = itf.merge("linear", [normed(1), normed(2)])
    fusion = ModelFusion([merged, Deep()], head=3)
    assert fit(fusion, data(), **QUICK | {"epochs": 1}).statistics == 1


class Attentive(nn.Module):
    """torch's own transformer layers, which read weights past their modules in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)[:, None].repeat(1, 2, 1)).mean(1))


def test_what_is_validated_with_lora_is_what_the_network_then_gives() -> None:
    model = Attentive()
    how = QUICK | {"lora": 4, "learning_rate": 1e-2, "epochs": 3}
    record = fit(model, data(), data(30, 1), **how)
    inputs, targets = data(30, 1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs), targets)
    assert record.best_epoch > 0
    assert record.best["validation_loss"] == pytest.approx(float(loss), abs=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_with_lora_the_distance_of_l2_sp_is_that_of_the_weights() -> None:
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    with trained(model, data()[0], None, 2):
        loop = Loop(model, nn.functional.cross_entropy, None, Rates(1e-3, l2_sp=1.0))
        loop.setup("fit")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape))
        distance = float(loop._distance().detach())
    moved = sum(float((value - before[name]).square().sum()) for name, value in model.state_dict().items())
    assert distance == pytest.approx(moved, rel=1e-5)
    assert changed(before, model) >= {"classifier.weight", "layers.0.weight"}


@pytest.mark.parametrize("lora", [{"modules_to_save": ["classifier"], "bias": "all"}, {"target_modules": ["nothing"]}])
def test_what_lora_cannot_do_is_told_and_the_network_stays(lora: dict[str, Any]) -> None:
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="lora"):
        fit(model, data(), lora=lora, **QUICK)
    assert list(model.state_dict()) == list(before)
    assert not changed(before, model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_precision_of_training_is_not_that_of_the_network(precision: str) -> None:
    model = normed(0)
    before = copy.deepcopy(model.state_dict())
    fit(model, data(), data(30, 1), precision=precision, train_only="3.*", **QUICK)
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
    assert changed(before, model) <= {"3.weight", "3.bias"}
    model(data()[0])


def test_a_last_batch_of_one_example_is_no_trouble_to_batch_normalisation() -> None:
    record = fit(normed(0), data(65), data(33, 1), **QUICK)
    assert len(record.history) == 3
    merged = itf.merge("linear", [normed(1), normed(2)])
    assert fit(merged, data(65), **QUICK).statistics == 1
    assert reset_statistics(normed(0), data(65), batch_size=16, progress=False) == 1
    with pytest.raises(DataError, match="one example"):
        fit(normed(0), data(), **QUICK | {"batch_size": 1})
    with pytest.raises(DataError, match="one example"):
        reset_statistics(normed(0), data(), batch_size=1, progress=False)


def test_lightnings_own_options_are_looked_at_with_the_others() -> None:
    with pytest.raises(OptionError) as raised:
        fit(Deep(), data(), train_only=3, metric="acuracy", **QUICK | {"precision": "fp4", "epochs": -1})  # type: ignore[arg-type]
    paths = [p.path for p in raised.value.problems]
    assert paths[:3] == ["epochs", "train_only", "metric"]
    assert "precision" in paths[3]


def test_the_heads_of_networks_made_of_networks() -> None:
    a, b = Deep(1), Deep(2)
    own = ["backbones.0.classifier", "backbones.1.classifier"]
    assert heads(itf.Ensemble([a, b]), data()[0]) == own
    assert heads(itf.CrossStitch({"a": a, "b": b}, ["layers.1"], data()[0]), data()[0]) == own
    stitched = itf.stitch(a, b, at=("layers.1", "layers.1"), data=data()[0])
    assert heads(stitched, data()[0]) == ["backbones.1.classifier"]
    ensemble = itf.Ensemble([a, b])
    before = copy.deepcopy(ensemble.state_dict())
    fit(ensemble, data(), train_only="head", **QUICK)
    assert changed(before, ensemble) == {f"{path}.{key}" for path in own for key in ("weight", "bias")}


def test_a_merge_that_is_loaded_from_its_folder_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (1, 2):
        (tmp_path / f"m{i}").mkdir()
        save_file(normed(i).state_dict(), tmp_path / f"m{i}" / "model.safetensors")
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    itf.merge("linear", [tmp_path / "m1", tmp_path / "m2"], out=tmp_path / "out")
    for weights, layers in ((tmp_path / "out", 1), (tmp_path / "out" / "model.safetensors", 1), (tmp_path / "m1", 0)):
        model = itf.load_model("python:own_net:build", weights=weights, trust_code=True)
        assert fit(model, data(), **QUICK).statistics == layers
        assert fit(model, data(), **QUICK).statistics == 0

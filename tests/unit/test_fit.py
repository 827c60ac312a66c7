"""`fit` on small networks: what it takes, what it changes and leaves alone, and what it remembers.

Sharded training (FSDP) needs a GPU and isn't tried here.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from interfuse.data import Data
from interfuse.errors import DataError, ModelError, OptionError
from interfuse.modules.fused import ModelFusion
from interfuse.training.fit import FitRecord, fit

QUICK: dict[str, Any] = {"accelerator": "cpu", "progress": False, "cache": False}


def classes(n: int = 60, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Three classes of four features that a linear layer tells apart."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    return torch.eye(3, 4)[targets] + noise * torch.randn(n, 4, generator=generator), targets


def network(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def fusion(outputs: int = 3, **options: Any) -> ModelFusion:
    return ModelFusion({"a": network(outputs, 1), "b": network(outputs, 2)}, head=outputs, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*classes(), strict=True)


class Module(lightning.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*classes()), 16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*classes(30, 1)), 16)


def as_batches() -> list[Any]:
    x, y = classes()
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": classes,
    "data set": lambda: TensorDataset(*classes()),
    "Data": lambda: Data(*(part.numpy() for part in classes())),
    "loader": lambda: DataLoader(TensorDataset(*classes()), 16, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 16),
    "list": as_batches,
    "generator": lambda: iter(as_batches()),
    "module": Module,
    "mappings": lambda: [{"input": x, "labels": y} for x, y in as_batches()],
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_data_of_every_kind_are_trained_on(source: str, cache: bool, tmp_path: Path) -> None:
    model = fusion()
    options: dict[str, Any] = {**QUICK, "cache": tmp_path if cache else False, "learning_rate": 0.02}
    record = fit(model, SOURCES[source](), classes(30, 1), epochs=3, batch_size=16, **options)
    assert record.cached is cache, record.why_not
    assert [row["epoch"] for row in record.history] == [0, 1, 2, 3]
    assert record.history[-1]["train_loss"] < record.history[1]["train_loss"]
    best = max(record.history, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert record.best_epoch == best["epoch"] > 0


def test_the_module_gives_its_own_validation() -> None:
    module = Module()
    record = fit(network(), module, epochs=1, **QUICK)
    assert module.stages == ["fit"]
    assert "validation_accuracy" in record.history[0]


def test_a_plain_network_is_trained() -> None:
    x, y = classes()
    model = network()
    record = fit(model, (x, y), classes(30, 1), epochs=8, batch_size=16, learning_rate=0.05, **QUICK)
    assert record.metric == "accuracy"
    assert record.best["validation_accuracy"] > 0.9
    assert (record.start, record.cached, record.why_not) == ("", False, "caching is off")
    assert not model.training


def test_binary_classes_need_one_logit() -> None:
    x, y = classes()
    keep = y < 2
    data = (x[keep], y[keep])
    record = fit(network(1), data, data, epochs=10, batch_size=16, learning_rate=0.05, **QUICK)
    assert record.best["validation_accuracy"] > 0.9
    with pytest.raises(ModelError, match="one output, but the targets go from 0 to 2"):
        fit(network(1), (x, y), epochs=1, **QUICK)


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_numbers_are_regressed(shape: tuple[int, ...]) -> None:
    x, _ = classes()
    data = (x, x.sum(dim=1).reshape(shape))
    record = fit(network(1), data, data, epochs=15, batch_size=16, learning_rate=0.05, **QUICK)
    assert record.metric == "loss"
    assert record.best["validation_loss"] < 0.2 * record.history[0]["validation_loss"]
    absolute = fit(network(1), data, data, epochs=1, loss="mae", metric="r2", **QUICK)
    assert absolute.metric == "r2"


def test_probabilities_can_be_targets() -> None:
    x, y = classes()
    soft = nn.functional.one_hot(y, 3).float() * 0.9 + 0.1 / 3
    model = network()
    fit(model, (x, soft), epochs=10, learning_rate=0.05, batch_size=16, loss="cross_entropy", **QUICK)
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_loss_and_metric_of_your_own() -> None:
    x, _ = classes()
    metric = ("far", lambda outputs, targets: (outputs - targets).abs().max(), False)
    record = fit(
        network(4), (x, x), (x, x), epochs=4, loss=lambda o, t: (o - t).square().sum(), metric=metric, batch_size=20, **QUICK
    )
    assert record.metric == "far"
    assert record.best["validation_far"] == min(row["validation_far"] for row in record.history)


def test_a_loss_needs_no_targets() -> None:
    x, _ = classes()
    record = fit(network(), [x[:30], x[30:]], epochs=3, loss=lambda outputs, _: outputs.square().mean(), **QUICK)
    assert record.history[-1]["train_loss"] < record.history[0]["train_loss"]
    with pytest.raises(DataError, match="hold no targets"):
        fit(network(), [x], epochs=1, **QUICK)


def test_no_epochs_find_the_best_parent() -> None:
    x, y = classes()
    good, poor = network(seed=1), network(seed=2)
    fit(good, (x, y), epochs=8, batch_size=16, learning_rate=0.05, **QUICK)
    model = ModelFusion({"poor": poor, "good": good}, head=3)
    record = fit(model, (x, y), classes(30, 1), epochs=0, **QUICK)
    assert (record.start, record.best_epoch) == ("good", 0)
    assert torch.allclose(model(x), good(x), atol=1e-6)
    assert fit(ModelFusion([poor, good], head=3), (x, y), epochs=0, **QUICK).start == "Sequential_2"


def test_training_that_hurts_is_undone() -> None:
    x, y = classes()
    model = network()
    fit(model, (x, y), epochs=8, batch_size=16, learning_rate=0.05, **QUICK)
    before = state(model)
    record = fit(model, (x, y), classes(30, 1), epochs=2, batch_size=16, learning_rate=500.0, **QUICK)
    assert record.best_epoch == 0
    assert record.history[1]["validation_loss"] > record.history[0]["validation_loss"]
    assert same(state(model), before)


def test_the_best_epoch_is_what_the_model_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    train, held = classes(60, noise=1.0), classes(60, 1, noise=1.0)
    record = fit(model, train, held, epochs=12, batch_size=8, learning_rate=0.3, patience=None, **QUICK)
    assert 0 < record.best_epoch < 12, "the case is meant to have a best epoch in the middle"
    loss = nn.functional.cross_entropy(model(held[0]), held[1]).item()
    assert loss == pytest.approx(record.best["validation_loss"], rel=1e-5)
    assert record.best == {k: v for k, v in record.history[record.best_epoch].items() if "validation" in k}


def test_patience_ends_it() -> None:
    model = network()
    data = classes()
    fit(model, data, epochs=8, batch_size=16, learning_rate=0.05, **QUICK)
    record = fit(model, data, data, epochs=10, learning_rate=500.0, patience=2, batch_size=16, **QUICK)
    assert record.history[-1]["epoch"] == record.best_epoch + 2 == 2


def test_without_validation_the_last_epoch_stays() -> None:
    model = network()
    record = fit(model, classes(), epochs=3, batch_size=16, patience=1, **QUICK)
    assert record.best_epoch == 3
    assert record.best == {}
    assert not same(state(model), state(network()))


@pytest.mark.parametrize("source", ["tensors", "loader"])
def test_a_seed_gives_the_same_weights_and_leaves_random_numbers_alone(source: str) -> None:
    def trained(noise: int, seed: int = 3) -> dict[str, Tensor]:
        model = fusion(fusion="transformer", dim=8)
        torch.manual_seed(noise)
        after = torch.get_rng_state()
        fit(model, SOURCES[source](), epochs=2, batch_size=16, seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), after)
        return state(model)

    assert same(trained(1), trained(2))
    assert not same(trained(1), trained(1, seed=4))


def test_only_what_is_named_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    model[1].bias.requires_grad_(False)
    before = state(model)
    fit(model, classes(), epochs=2, batch_size=16, train_only=["2.*", "1.weight"], **QUICK)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.bias"]


def test_a_fusion_may_be_trained_in_part() -> None:
    model = fusion(freeze=False)
    model.backbones[0] = nn.Sequential(model.backbones[0], nn.BatchNorm1d(3))
    before = state(model.build(classes()[0]))
    fit(model, classes(), epochs=2, batch_size=16, train_only="head.*", **QUICK)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed - {"mix"} == {"head.weight", "head.bias"}


def test_parts_that_are_not_yet_built_can_be_named() -> None:
    model = fusion()
    record = fit(model, classes(), epochs=1, train_only=["fusion.*"], **QUICK)
    assert len(record.history) == 1
    assert isinstance(model.head, nn.Linear)
    assert not model.head.weight.any()  # the head starts at zero and isn't trained
    assert model.head.weight.requires_grad


def test_errors_in_what_to_train() -> None:
    with pytest.raises(OptionError, match=r"'haed.weight' matches no parameter; did you mean 'head.weight'") as caught:
        fit(fusion(), classes(), train_only=["haed.weight", "backbones.0.*"], **QUICK)
    assert "'backbones.0.*' matches only what is frozen" in str(caught.value)
    frozen = network().requires_grad_(False)
    with pytest.raises(ModelError, match="nothing in it is trained"):
        fit(frozen, classes(), **QUICK)
    assert fit(frozen, classes(), classes(), epochs=0, **QUICK).best_epoch == 0


def test_copies_are_trained() -> None:
    parents = [network(seed=1), network(seed=2)]
    before = [state(parent) for parent in parents]
    model = ModelFusion(parents, head=3, freeze=False)
    fit(model, classes(), epochs=2, batch_size=16, **QUICK)
    assert all(same(state(parent), old) for parent, old in zip(parents, before, strict=True))
    assert not any(same(state(copied), old) for copied, old in zip(model.backbones, before, strict=True))


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_that_is_not_a_number_puts_the_weights_back(validated: bool) -> None:
    x, y = classes()
    bad = x.clone()
    bad[40:] = float("nan")
    model = nn.Sequential(nn.BatchNorm1d(4), network())
    before = state(model)
    with pytest.raises(DataError, match="the loss was nan in epoch 1; a lower learning_rate"):
        fit(model, (bad, y), (x, y) if validated else None, epochs=3, batch_size=16, **QUICK)
    assert same(state(model), before)
    assert not model.training


def test_any_other_error_puts_them_back_too() -> None:
    class Broken(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("broken")

    model = network()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, classes(), callbacks=[Broken()], **QUICK)
    assert same(state(model), state(network()))


def test_all_bad_options_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        fit(
            "model",  # type: ignore[arg-type]
            classes(),
            epochs=-1,
            learning_rate=0,
            batch_size=0,
            weight_decay=-0.5,
            patience=0,
            seed="one",  # type: ignore[arg-type]
            loss="cross_entrpy",
            resume="nowhere.ckpt",
            epoch=3,
            max_epochs=4,
        )
    text = str(caught.value)
    for piece in (
        *("model: got 'model'", "epochs: got -1", "learning_rate: got 0", "batch_size: got 0", "weight_decay: got -0.5"),
        *("patience: got 0", "seed: got 'one'", "loss: got 'cross_entrpy'; did you mean 'cross_entropy'"),
        *("resume: no checkpoint at 'nowhere.ckpt'", "epoch: unknown option; did you mean 'epochs'", "it is `epochs`"),
    ):
        assert piece in text
    with pytest.raises(OptionError, match="no metric is named 'acuracy'"):
        fit(network(), classes(), metric="acuracy", **QUICK)


def test_data_that_do_not_fit() -> None:
    x, y = classes()
    with pytest.raises(ModelError, match="2 classes, but the targets go from 0 to 2"):
        fit(network(2), (x, y), **QUICK)
    late = torch.cat([y[:40] % 2, y[40:]])
    with pytest.raises(ModelError, match=r"2 classes, but the targets go from \d to 2"):
        fit(network(2), [(x[:40], late[:40]), (x[40:], late[40:])], **QUICK)
    with pytest.raises(ModelError, match=r"mse of outputs \(60, 3\) and targets \(60,\)"):
        fit(network(3), (x, y.float()), **QUICK)
    with pytest.raises(DataError, match="train: no batches"):
        fit(network(), [], **QUICK)
    with pytest.raises(DataError, match="train: no batches"):
        fit(network(), DataLoader(TensorDataset(x[:0], y[:0])), **QUICK)
    with pytest.raises(DataError, match=r"train: tensors of different lengths \[60, 59\]"):
        fit(network(), (x, y[:59]), **QUICK)
    with pytest.raises(DataError, match="validation: got int"):
        fit(network(), (x, y), 3, **QUICK)


def test_the_losses_written_down_are_those_of_their_epochs() -> None:
    """Without a learning rate to speak of, each epoch's mean training loss is the data's."""
    x, y = classes()
    model = network()
    wanted = nn.functional.cross_entropy(model(x), y).item()
    record = fit(model, (x, y), epochs=2, batch_size=16, learning_rate=1e-12, **QUICK)
    assert [row["train_loss"] for row in record.history] == pytest.approx([wanted, wanted], rel=1e-5)

    class Seen(lightning.Callback):
        losses: list[list[float]]

        def on_train_epoch_start(self, *_: Any) -> None:
            self.losses = [*getattr(self, "losses", []), []]

        def on_train_batch_end(self, trainer: Any, loop: Any, outputs: Any, *_: Any) -> None:
            self.losses[-1].append(float(outputs["loss"]))

    seen = Seen()
    record = fit(network(), (x, y), (x, y), epochs=3, batch_size=20, learning_rate=0.05, callbacks=[seen], **QUICK)
    means = [sum(epoch) / len(epoch) for epoch in seen.losses]
    assert [row["train_loss"] for row in record.history[1:]] == pytest.approx(means, rel=1e-5)


def test_validation_every_second_epoch() -> None:
    record = fit(
        network(), classes(), classes(), epochs=4, batch_size=16, learning_rate=0.05, check_val_every_n_epoch=2, **QUICK
    )
    assert [row["epoch"] for row in record.history if "validation_loss" in row] == [0, 2, 4]
    assert record.best_epoch in (2, 4)


def test_lightnings_own_options_reach_it(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="log", version="0")
    callbacks = [LearningRateMonitor("epoch"), ModelCheckpoint(tmp_path / "own")]
    record = fit(
        network(),
        classes(),
        classes(30, 1),
        epochs=2,
        batch_size=16,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=logger,
        callbacks=callbacks,
        progress=True,
        cache=False,
    )
    assert len(record.history) == 3
    header = (tmp_path / "log" / "0" / "metrics.csv").read_text().partition("\n")[0]
    assert "train_loss" in header
    assert "lr-AdamW" in header
    assert len(list((tmp_path / "own").glob("*.ckpt"))) == 1


def test_time_ends_it() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            torch.linalg.svd(torch.randn(250, 250))
            return self.inner(x)

    record = fit(Slow(), classes(), epochs=100_000, batch_size=8, max_time={"seconds": 1}, **QUICK)
    assert record.seconds < 20
    assert fit(network(), classes(), epochs=3, max_steps=0, **QUICK).best_epoch == 0


class StopAfter(lightning.Callback):
    """A crash at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, loop: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyError("power cut")


@pytest.mark.parametrize("source", ["tensors", "loader", "list"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(source: str, cache: bool, tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[FitRecord, dict[str, Tensor]]:
        model = fusion(fusion="transformer", dim=8)  # with dropout
        common: dict[str, Any] = {**QUICK, "cache": tmp_path / "features" if cache else False, "patience": None}
        data, held = SOURCES[source](), classes(30, 1, noise=1.5)
        record = fit(model, data, held, epochs=4, batch_size=16, learning_rate=0.03, **common, **options)
        return record, state(model)

    whole, wanted = run()
    with pytest.raises(KeyError, match="power cut"):
        run(checkpoints=tmp_path / "kept", callbacks=[StopAfter(2)])
    resumed, found = run(checkpoints=tmp_path / "kept", resume=tmp_path / "kept" / "last.ckpt")
    assert same(found, wanted)
    assert resumed.best_epoch == whole.best_epoch

    def without_seconds(record: FitRecord) -> list[dict[str, float]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in record.history]

    assert without_seconds(resumed) == without_seconds(whole)


def test_a_resumed_run_remembers_a_best_epoch_before_the_break(tmp_path: Path) -> None:
    model = network()
    data = classes()
    fit(model, data, epochs=8, batch_size=16, learning_rate=0.05, **QUICK)
    before = state(model)
    options: dict[str, Any] = {**QUICK, "batch_size": 16, "learning_rate": 500.0, "patience": None, "epochs": 3}
    with pytest.raises(KeyError):
        fit(model, data, data, checkpoints=tmp_path, callbacks=[StopAfter(2)], **options)
    record = fit(network(seed=9), data, data, resume=tmp_path / "last.ckpt", **options)
    assert record.best_epoch == 0
    other = network(seed=9)
    fit(other, data, data, resume=tmp_path / "last.ckpt", **options)
    assert same(state(other), before)


SCRIPT = """
import json, sys, warnings
import torch
from torch import nn
from interfuse import ModelFusion, fit

def main(strategy, cache, out):
    torch.manual_seed(0)
    x = torch.eye(3, 4).repeat(21, 1) + 0.3 * torch.randn(63, 4)
    y = torch.arange(63) % 3
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    model = ModelFusion(models, head=3, dim=8)
    record = fit(model, (x, y), (x, y), epochs=4, batch_size=8, learning_rate=0.05, cache=cache or False, progress=False,
                 accelerator="cpu", devices=2, strategy=strategy)
    loss = nn.functional.cross_entropy(model(x), y).item()
    if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
        with open(out, "w") as file:
            json.dump({"history": record.history, "best": record.best, "cached": record.cached, "why": record.why_not,
                       "loss": loss}, file)

if __name__ == "__main__":
    warnings.simplefilter("error")
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(("strategy", "cache"), [("ddp", True), ("ddp", False), ("ddp_spawn", True)])
def test_two_processes_train_together(strategy: str, cache: bool, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, str(script), strategy, str(tmp_path / "features") if cache else "", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["cached"] is cache, found["why"]
    assert [row["epoch"] for row in found["history"]] == [0, 1, 2, 3, 4]
    assert found["history"][-1]["train_loss"] < found["history"][1]["train_loss"]
    assert found["best"]["validation_loss"] < found["history"][0]["validation_loss"]
    assert found["loss"] == pytest.approx(found["best"]["validation_loss"], rel=0.05)  # 63 rows over two: one counts twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_the_caller_who_can_press_it_again(number: int) -> None:
    class Pressed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                os.kill(os.getpid(), number)
            return super().forward(x)

    ambient = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(Pressed(2, 2), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)), epochs=3, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ambient)

"""`ModelFusion`: the networks it is made of are safe, what it computes fits together, and what doesn't fit is said."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse import Ensemble, ModelFusion, registry
from interfuse.errors import ModelError, OptionError, UserError
from interfuse.modules.fused import DEFAULT_DIM
from interfuse.modules.taps import Tap
from interfuse.registry import methods

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


class Parent(nn.Module):
    """A network with everything that training changes: batch normalisation, dropout."""

    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Words(nn.Module):
    """Tokens in, by keyword."""

    def __init__(self, width: int = 7, classes: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.head = nn.Linear(width, classes) if classes else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.table(input_ids)
        return {"features": hidden} if self.head is None else {"logits": self.head(hidden.mean(1)), "hidden": hidden}


def parents(*widths: int) -> list[nn.Module]:
    torch.manual_seed(1)
    made: list[nn.Module] = [Parent(width) for width in widths or (5, 9)]
    with torch.no_grad():
        for model in made:
            model(X)  # gives batch normalisation its statistics
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def steps(model: nn.Module, count: int = 3, *, autocast: bool = False) -> list[float]:
    """Train as `fit` does, and give the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- the networks themselves


@pytest.mark.parametrize("freeze", [True, False])
def test_the_originals_are_never_changed(freeze: bool) -> None:
    models = parents()
    models[0].train()
    models[1].eval()
    models[1].get_parameter("head.bias").requires_grad_(False)
    before, modes = [state(m) for m in models], [[m.training for m in model.modules()] for model in models]
    wanted = [[p.requires_grad for p in model.parameters()] for model in models]
    fusion = ModelFusion(models, head=3, freeze=freeze, example=X)
    steps(fusion)
    assert all(same(model, b) for model, b in zip(models, before, strict=True))
    assert [[m.training for m in model.modules()] for model in models] == modes
    assert [[p.requires_grad for p in model.parameters()] for model in models] == wanted
    assert all(p.grad is None for model in models for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (*models, fusion) for m in model.modules())
    assert all(same(own, b) for own, b in zip(fusion.backbones, before, strict=True)) is freeze


def test_networks_themselves_are_taken_with_copy_false() -> None:
    models = parents()
    fusion = ModelFusion(models, head=3, copy=False, freeze=[True, False], example=X)
    assert [own is given for own, given in zip(fusion.backbones, models, strict=True)] == [True, True]
    before = [state(m) for m in models]
    steps(fusion)
    assert [same(model, b) for model, b in zip(models, before, strict=True)] == [True, False]


def test_frozen_networks_stay_in_evaluation_in_training() -> None:
    fusion = ModelFusion({"a": parents()[0], "b": parents()[1]}, head=3, freeze={"b": False}, example=X)
    before = [state(m) for m in fusion.backbones]
    assert fusion.train() is fusion
    assert [any(m.training for m in b.modules()) for b in fusion.backbones] == [False, True]
    assert fusion.fusion is not None
    assert fusion.fusion.training
    fusion(X)
    assert same(fusion.backbones[0], before[0])
    assert not same(fusion.backbones[1], before[1])
    assert not any(m.training for m in fusion.eval().modules())
    assert [any(p.requires_grad for p in b.parameters()) for b in fusion.backbones] == [False, True]
    steps(fusion, 2)
    assert all(p.grad is None for p in fusion.backbones[0].parameters())
    assert all(p.grad is not None for p in fusion.backbones[1].parameters())


def test_a_list_a_dict_and_one_model() -> None:
    models = parents()
    assert ModelFusion(models).names == ("Parent", "Parent_2")
    assert ModelFusion({"a": models[0], "b": models[1]}).names == ("a", "b")
    one = ModelFusion(models[:1], head=3, example=X).eval()
    torch.testing.assert_close(one(X), models[0].eval()(X))
    fused, weights = one(X, return_weights=True)
    torch.testing.assert_close(weights, torch.ones(16, 1))
    assert fused.shape == (16, 3)


@pytest.mark.parametrize("name", [method.name for method in methods("features")])
def test_many_models_of_different_widths_train_by_every_fusion(name: str) -> None:
    models = [*parents(3, 5, 9, 12), nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.ReLU())]
    fusion = ModelFusion(models, name, head=3, example=X)
    losses = steps(fusion, 12)
    assert losses[-1] < losses[0]
    predictions, weights = fusion.eval()(X, return_weights=True)
    assert predictions.shape == (16, 3)
    assert weights.shape == (16, 5)
    assert fusion.widths == (3, 5, 9, 12, 4)
    assert ModelFusion(models, name)(X).shape == (16, 16)  # without a head: fused features


# -- building


def test_the_first_forward_builds_what_an_example_would() -> None:
    models = parents()
    late, soon = ModelFusion(models, head=3), ModelFusion(models, head=3, example=X[:2])
    assert not late.built
    assert soon.built
    torch.testing.assert_close(late.eval()(X), soon.eval()(X))
    assert late.built
    assert late.taps == soon.taps == (Tap("head", "input"),) * 2
    assert (late.widths, late.dim, late.parents) == (soon.widths, soon.dim, soon.parents) == ((5, 9), 16, (True, True))
    fusion = late.fusion
    assert late.build(X).fusion is fusion


@pytest.mark.parametrize(
    ("widths", "options", "dim"),
    [((5, 9), {}, 16), ((8, 3), {}, 8), ((300, 5), {}, DEFAULT_DIM), ((5, 9), {"heads": 3}, 24), ((5,), {"dim": 10}, 10)],
)
def test_the_width_of_the_fusion(widths: tuple[int, ...], options: dict[str, Any], dim: int) -> None:
    fusion = ModelFusion(parents(*widths), example=X, **options)
    assert fusion.dim == dim
    assert fusion(X).shape == (16, dim)


def test_what_is_built_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        fusion = ModelFusion(parents(), head=3, freeze=[True, False])
        fusion(X + 0)
    losses = steps(fusion, 8)
    assert losses[-1] < losses[0]


def test_building_takes_inputs_for_every_model() -> None:
    fusion = ModelFusion({"a": parents()[0], "b": parents()[1]})
    with pytest.raises(ModelError, match=r"inputs\['b'\]: None; the first inputs must be there for every model"):
        fusion({"a": X, "b": None})
    assert fusion({"a": X, "b": X}).shape == (16, 16)


def test_taps_by_list_dict_or_one_for_all() -> None:
    models = {"a": parents()[0], "b": parents()[1]}
    assert ModelFusion(models, taps=["body.0", None], example=X).taps == (Tap("body.0"), Tap("head", "input"))
    assert ModelFusion(models, taps={"b": "body"}, example=X).taps == (Tap("head", "input"), Tap("body"))
    assert ModelFusion(models, taps="head", example=X).widths == (3, 3)


# -- what doesn't fit


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"fusion": "atention"}, r"fusion: no features method is named 'atention'; did you mean 'attention'\?"),
        ({"hedas": 2}, r"options.hedas: unknown option; did you mean 'heads'\?"),
        ({"heads": 0}, "options.heads: got 0; at least 1"),
        ({"dropout": 1.0}, r"options.dropout: got 1.0; below 1"),
        ({"fusion": "mean", "heads": 2}, r"options.heads: unknown option; allowed: dropout"),
        ({"heads": 3, "dim": 8, "example": X}, "dim 8 isn't a multiple of 3 heads"),
        ({"dim": 0}, "dim: got 0; a whole number"),
        ({"dim": True}, "dim: got True"),
        ({"head": 0}, "head: got 0; a number of classes"),
        ({"head": True}, "head: got True"),
        ({"head": "linear"}, "head: got 'linear'"),
        ({"pool": "max"}, r"pool: got 'max'; allowed: mean, none"),
        ({"dim": -1, "head": -1, "pool": "x"}, r"dim: got -1.*\nhead: got -1.*\npool: got 'x'"),
        ({"taps": ["body"]}, "taps: 1 given for 2 models"),
        ({"taps": {"c": "body"}}, r"taps\['c'\]: no model has this name; allowed: a, b"),
        ({"taps": {"b": "bodi"}}, r"taps\['b'\]: no module at 'bodi'; did you mean 'body'"),
        ({"freeze": [True]}, "freeze: 1 given for 2 models"),
        ({"freeze": {"bb": True}}, r"freeze\['bb'\]: no model has this name; did you mean 'b'"),
        ({"head": nn.Linear(9, 3), "example": X}, r"head: Linear doesn't take fused features \(batch, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], match: str) -> None:
    models = parents()
    with pytest.raises(UserError, match=match):
        ModelFusion({"a": models[0], "b": models[1]}, **given)


def test_a_head_that_does_not_fit_is_refused_at_every_call() -> None:
    fusion = ModelFusion(parents(), head=nn.Linear(9, 3))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"doesn't take fused features \(batch, 16\)"):
            fusion(X)
    assert not fusion.built


def test_networks_that_need_other_inputs_say_which() -> None:
    with pytest.raises(ModelError, match=r"Words: needs the inputs \['input_ids'\], but the batch holds \['x'\]"):
        ModelFusion([parents()[0], Words()])({"x": X})


# -- inputs


def test_keywords_reach_those_that_know_them() -> None:
    ids = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(1))
    fusion = ModelFusion([parents()[0], Words()], head=3)
    assert fusion({"x": X, "input_ids": ids, "labels": Y}).shape == (16, 3)
    assert ModelFusion([nn.Bilinear(6, 6, 4), nn.Bilinear(6, 6, 5)])((X, X)).shape == (16, 8)


def test_models_that_read_different_inputs() -> None:
    ids = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(1))
    model = parents()[0].eval()
    fusion = ModelFusion({"image": model, "text": Words()}, head=3).eval()
    both = {"image": X, "text": {"input_ids": ids}}
    result, weights = fusion(both, return_weights=True)
    torch.testing.assert_close(result, model(X))  # the text has no classes of its own
    assert (weights > 0).all()
    alone, weights = fusion({"image": X, "text": None}, return_weights=True)
    torch.testing.assert_close(alone, model(X))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).expand(16, 2))
    without, weights = fusion({"image": None, "text": {"input_ids": ids}}, return_weights=True)
    assert torch.equal(without, torch.zeros(16, 3))  # no parent is left, and the head starts at zero
    assert torch.equal(weights[:, 0], torch.zeros(16))
    assert torch.equal(fusion({"image": X}), alone)
    with pytest.raises(ModelError, match="every model's input is None"):
        fusion({"image": None, "text": None})


# -- the residual


@pytest.mark.parametrize("name", [method.name for method in methods("features")])
def test_step_0_is_the_mean_of_the_parents_or_one_of_them(name: str) -> None:
    models = [m.eval() for m in parents(5, 9, 12)]
    fusion = ModelFusion(models, name, head=3, example=X).eval()
    expected = torch.stack([m(X) for m in models])
    torch.testing.assert_close(fusion(X), expected.mean(0))
    for k, parent in enumerate(fusion.names):
        fusion.start_from(parent)
        assert torch.equal(fusion(X), expected[k])
    fusion.start_from("mean")
    torch.testing.assert_close(fusion(X), expected.mean(0))


def test_parents_of_other_classes_take_no_part() -> None:
    models = {"a": Parent(5), "b": Parent(9, classes=4), "c": nn.Sequential(nn.Linear(6, 2), nn.ReLU())}
    fusion = ModelFusion(models, head=3, example=X).eval()
    assert fusion.parents == (True, False, False)
    torch.testing.assert_close(fusion(X), models["a"].eval()(X))
    with pytest.raises(ModelError, match=r"start_from: 'b' has no logits for this head; allowed: a, mean"):
        fusion.start_from("b")


def test_start_from_comes_after_building() -> None:
    fusion = ModelFusion({"a": parents()[0]}, head=3)
    with pytest.raises(ModelError, match="start_from: 'a' before taps are known; give example="):
        fusion.start_from("a")


def test_the_one_it_starts_from_may_be_missing() -> None:
    models = {"a": parents()[0].eval(), "b": parents()[1].eval()}
    fusion = ModelFusion(models, head=3, example=X).eval()
    fusion.start_from("a")
    torch.testing.assert_close(fusion({"a": None, "b": X}), models["b"](X))


def test_a_parent_without_a_share_may_be_infinite() -> None:
    class Sure(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([0.0, 0.0, -torch.inf])

    models = {"a": parents()[0].eval(), "sure": Sure().eval()}
    fusion = ModelFusion(models, head=3, example=X).eval()
    fusion.start_from("a")
    assert torch.equal(fusion(X), models["a"](X))


def test_the_residual_can_be_left_out() -> None:
    fusion = ModelFusion(parents(), head=3, residual=False, example=X).eval()
    assert fusion.parents == (False, False)
    assert isinstance(fusion.head, nn.Linear)
    assert torch.equal(fusion(X), fusion.head(_z(fusion)))
    assert fusion.head.weight.abs().sum() > 0


def _z(fusion: ModelFusion) -> Tensor:
    assert fusion.fusion is not None
    return fusion.fusion([fusion.read(k, X).features for k in range(2)])[0]


def test_the_zero_head_trains_and_then_the_fusion_does() -> None:
    fusion = ModelFusion(parents(), head=3, example=X)
    assert isinstance(fusion.head, nn.Linear)
    assert fusion.fusion is not None
    before = state(fusion.fusion)
    losses = steps(fusion, 10)
    assert losses[-1] < losses[0]
    assert fusion.head.weight.abs().sum() > 0
    assert not same(fusion.fusion, before)


def test_regression_of_one_value() -> None:
    models = [Parent(5, classes=1).eval(), Parent(9, classes=1).eval()]
    fusion = ModelFusion(models, head=1, example=X).eval()
    torch.testing.assert_close(fusion(X), (models[0](X) + models[1](X)) / 2)
    assert fusion(X).shape == (16, 1)


def test_a_head_of_ones_own() -> None:
    head = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3))
    fusion = ModelFusion(parents(), head=head, example=X).eval()
    assert fusion.head is head
    assert fusion.parents == (False, False)
    assert torch.equal(fusion(X), head(_z(fusion)))
    assert any(p.abs().sum() > 0 for p in head.parameters())


def test_a_network_runs_no_further_than_it_is_needed() -> None:
    fusion = ModelFusion([Parent(5), Parent(9, classes=4)], head=3, example=X)
    ran: list[int] = []
    for k, backbone in enumerate(fusion.backbones):
        backbone.get_submodule("head").register_forward_hook(lambda *_, k=k: ran.append(k))
    fusion(X)
    assert ran == [0]  # the parent, whose logits count; of the other the features are enough


def test_reading_and_fusing_apart_is_forward() -> None:
    fusion = ModelFusion(parents(), "gate", head=3, freeze=[True, False], example=X).eval()
    readings = [fusion.read(k, X) for k in range(2)]
    for part, whole in zip(fusion.fuse(readings, return_weights=True), fusion(X, return_weights=True), strict=True):
        assert torch.equal(part, whole)
    assert [r.features is not None and r.features.requires_grad for r in readings] == [False, True]
    assert fusion.read(0, None) == (None, None, None, None)


# -- tokens


@pytest.mark.parametrize("name", ["attention", "transformer", "gate", "mean"])
def test_tokens_are_handed_on_without_pooling(name: str) -> None:
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:2, 3:] = 0
    torch.manual_seed(0)
    fusion = ModelFusion([Words(7), Words(5)], name, head=3, pool="none", example={"input_ids": ids}).eval()
    assert fusion.head is not None
    result, weights = fusion({"input_ids": ids, "attention_mask": mask}, return_weights=True)
    assert result.shape == (4, 3)
    assert weights.shape == (4, 2)
    short, fewer = fusion({"input_ids": ids[:2, :3]}, return_weights=True)
    torch.testing.assert_close(result[:2], short)
    torch.testing.assert_close(weights[:2], fewer)


def test_padding_does_not_count_where_a_model_is_missing() -> None:
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 3:] = 0
    fusion = ModelFusion({"a": Words(7), "b": Words(5)}, "shared", pool="none", example={"input_ids": ids}).eval()
    padded = fusion({"a": {"input_ids": ids, "attention_mask": mask}, "b": None})
    torch.testing.assert_close(padded, fusion({"a": {"input_ids": ids[:, :3]}, "b": None}))


def test_different_numbers_of_tokens_need_a_fusion_that_takes_them() -> None:
    inputs = {"a": {"input_ids": torch.zeros(4, 6, dtype=torch.long)}, "b": {"input_ids": torch.ones(4, 2, dtype=torch.long)}}
    models = {"a": Words(7), "b": Words(5)}
    assert ModelFusion(models, "attention", pool="none")(inputs).shape == (4, 8)
    with pytest.raises(ModelError, match=r"token counts differ: \[2, 6\]; pool them, or use attention or transformer"):
        ModelFusion(models, "gate", pool="none")(inputs)
    assert ModelFusion(models, "gate")(inputs).shape == (4, 8)


# -- nested, copied, stored, elsewhere


def test_a_fusion_may_be_a_member_of_another() -> None:
    first, second, third = parents(5, 9, 12)
    for example in (X, None):
        inner = ModelFusion([first, second], head=3, example=example)
        outer = ModelFusion([inner, third], head=3).eval()
        result = outer(X)
        mean = (first.eval()(X) + second.eval()(X)) / 2
        torch.testing.assert_close(result, (mean + third.eval()(X)) / 2)
        assert outer.taps == (Tap("head", "input"), Tap("head", "input"))
        assert outer.widths == (16, 12)
        assert not any(p.requires_grad for p in outer.backbones.parameters())
        losses = steps(outer, 8)
        assert losses[-1] < losses[0]
    headless = ModelFusion([ModelFusion([first, second], "gate"), Ensemble([second, third])], example=X)
    assert headless.taps == (Tap(""), Tap(""))
    assert headless.widths == (16, 3)


def test_members_of_a_nested_fusion_get_their_own_inputs() -> None:
    ids = torch.randint(0, 20, (16, 4), generator=torch.Generator().manual_seed(1))
    inner = ModelFusion({"image": parents()[0], "text": Words()}, head=3)
    outer = ModelFusion({"pair": inner, "plain": parents()[1]}, head=3)
    assert outer({"pair": {"image": X, "text": {"input_ids": ids}}, "plain": X}).shape == (16, 3)


@pytest.mark.parametrize("name", [method.name for method in methods("features")])
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    fusion = ModelFusion(parents(), name, head=3, example=X)
    steps(fusion, 2)
    fusion.eval()
    expected = fusion(X)
    assert torch.equal(copy.deepcopy(fusion)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fusion))(X), expected)
    file = io.BytesIO()
    torch.save(fusion.state_dict(), file)
    file.seek(0)
    anew = ModelFusion(parents(), name, head=3, example=X).eval()
    anew.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(anew(X), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    fusion = ModelFusion(parents(), head=3, example=X).eval()
    expected = fusion(X)
    result, weights = fusion.to(dtype)(X.to(dtype), return_weights=True)
    assert result.dtype == weights.dtype == dtype
    near = {torch.float16: 0.01, torch.bfloat16: 0.1, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(result.float(), expected, rtol=near, atol=near)
    if dtype is torch.float64:
        models = [b(X.double()) for b in fusion.backbones]
        torch.testing.assert_close(result, (models[0] + models[1]) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [method.name for method in methods("features")])
def test_training_under_autocast(name: str) -> None:
    fusion = ModelFusion(parents(), name, head=3, example=X)
    losses = steps(fusion, 8, autocast=True)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in fusion.parameters())


def test_networks_of_mixed_precision() -> None:
    class Low(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16())

    fusion = ModelFusion([Low().bfloat16(), parents()[0]], head=3, example=X).eval()
    assert fusion(X).dtype == torch.float32


def test_a_fusion_of_a_third_party_without_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(nn.Module):
        def __init__(self, widths: Any, dim: int) -> None:
            super().__init__()

        def forward(self, features: Any, present: Any = None) -> tuple[Tensor, Tensor]:
            stacked = torch.stack(features, dim=1)
            return stacked.amax(dim=1), stacked.new_full(stacked.shape[:2], 1 / len(features))

    method = registry.Method("largest", "features", Largest, "", "")
    monkeypatch.setitem(registry._METHODS, ("features", "largest"), method)
    models = [m.eval() for m in parents(8, 8)]
    fusion = ModelFusion(models, "largest", example=X)
    bodies = [m.get_submodule("body")(X) for m in models]
    assert torch.equal(fusion(X), torch.maximum(*bodies))


def test_options_are_kept_with_their_defaults() -> None:
    assert ModelFusion(parents(), heads=2).options == {"heads": 2, "dropout": 0.0}
    with pytest.raises(OptionError, match="unknown option"):
        ModelFusion(parents(), "mean", heads=2)

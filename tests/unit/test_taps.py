"""Taps: which place is found by itself, what is read there, how it is pooled, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse.ensemble.network import Ensemble
from interfuse.errors import ModelError
from interfuse.modules.fused import ModelFusion
from interfuse.modules.taps import Tap, features, find_tap, module_at, quiet, read

X = torch.linspace(-1, 1, 4 * 6).view(4, 6)


class Net(nn.Module):
    """Parts by name, and a forward of the test's."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = forward

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


HEADS: dict[str, tuple[nn.Module, Tap]] = {
    "mlp": (mlp(), Tap("2", "input")),
    "registered the other way round": (
        Net(lambda n, x: n.head(n.body(x).relu()), head=nn.Linear(5, 3), body=nn.Linear(6, 5)),
        Tap("head", "input"),
    ),
    "with a parameter of its own before": (
        Net(
            lambda n, x: n.head(n.body(x) + n.position),
            body=nn.Linear(6, 5),
            position=nn.Parameter(torch.ones(5)),
            head=nn.Linear(5, 3),
        ),
        Tap("head", "input"),
    ),
    "log-softmax": (nn.Sequential(*mlp(), nn.LogSoftmax(dim=-1)), Tap("2", "input")),
    "dropout and softmax in forward": (
        Net(lambda n, x: n.drop(n.head(x)).softmax(-1), head=nn.Linear(6, 3), drop=nn.Dropout()),
        Tap("head", "input"),
    ),
    "squeezed": (Net(lambda n, x: n.head(x).squeeze(-1), head=nn.Linear(6, 1)), Tap("head", "input")),
    "a head in a chain": (Net(lambda n, x: n.head(x), head=mlp()), Tap("head.2", "input")),
    "two calls of one head": (Net(lambda n, x: n.head(x) + n.head(-x), head=nn.Linear(6, 3)), Tap("head", "input", calls=2)),
    "a mapping with logits": (
        Net(lambda n, x: {"logits": n.head(x), "hidden": x}, head=nn.Linear(6, 3)),
        Tap("head", "input"),
    ),
    "logits and a hidden state": (
        Net(lambda n, x: (n.head(h := n.body(x)), h), body=nn.Linear(6, 5), head=nn.Linear(5, 3)),
        Tap("head", "input"),
    ),
    "logits and another head's": (
        Net(lambda n, x: (n.head(x), n.other(x)), head=nn.Linear(6, 3), other=nn.Linear(6, 3)),
        Tap(""),
    ),
    "a linear layer alone": (nn.Linear(6, 3), Tap("", "input")),
    "frozen already": (mlp().requires_grad_(False), Tap("2", "input")),
    "no linear layer": (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 1), nn.Flatten()), Tap("")),
    "layer normalisation after": (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), Tap("")),
    "a parameter after": (
        Net(lambda n, x: n.body(x) * n.scale, body=nn.Linear(6, 5), scale=nn.Parameter(torch.ones(5))),
        Tap(""),
    ),
    "a way round it": (
        Net(lambda n, x: (h := n.first(x)) + n.second(h.relu()), first=nn.Linear(6, 5), second=nn.Linear(5, 5)),
        Tap(""),
    ),
    "a gate at the end": (
        Net(lambda n, x: (h := n.first(x)) * n.gate(h).sigmoid(), first=nn.Linear(6, 5), gate=nn.Linear(5, 5)),
        Tap(""),
    ),
    "two outputs and no prediction": (
        Net(lambda n, x: {"a": n.head(x), "b": n.head(x)}, head=nn.Linear(6, 3)),
        Tap(""),
    ),
    "hidden states": (Net(lambda n, x: {"last_hidden_state": n.body(x)}, body=nn.Linear(6, 5)), Tap("")),
    "no parameters": (nn.Flatten(), Tap("")),
    "an ensemble": (Ensemble([mlp(), mlp()]), Tap("")),
    "a fusion without a head": (ModelFusion([mlp(), mlp()], "gate", example=X), Tap("")),
    "a fusion with a head": (ModelFusion([mlp(), mlp()], head=3, example=X), Tap("head", "input")),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_default_tap_is_what_feeds_the_head(case: str) -> None:
    model, expected = HEADS[case]
    wanted = [p.requires_grad for p in model.parameters()]
    assert find_tap(model, X) == expected
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert hooks(model) == 0


def test_the_default_tap_does_not_depend_on_the_example() -> None:
    gated = HEADS["a gate at the end"][0]
    assert find_tap(gated, torch.zeros(1, 6)) == find_tap(gated, X) == Tap("")


def test_finding_a_tap_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_tap(model, X)
    find_tap(model, X, "0")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert hooks(model) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_taps_are_found_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
        assert find_tap(model, X + 1) == find_tap(HEADS["a way round it"][0], X + 1) == Tap("")
        assert find_tap(mlp(), X + 1) == find_tap(HEADS["mlp"][0], X + 1) == Tap("2", "input")


def test_hooks_and_modes_are_put_back_when_the_network_fails() -> None:
    model = mlp().train()
    for tap in (None, "0"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            find_tap(model, torch.zeros(4, 7), tap)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        read(model, Tap("2"), torch.zeros(4, 7), output=False)
    assert hooks(model) == 0
    assert all(m.training for m in model.modules())


def test_a_named_tap_is_the_output_of_that_module() -> None:
    model = mlp()
    tap = find_tap(model, X, "1")
    assert tap == Tap("1")
    assert str(tap) == "output of 1"
    assert str(Tap("", "input")) == "input of the network"
    value, output = read(model, tap, X, output=True)
    assert torch.equal(value, model[:2](X))
    assert torch.equal(output, model(X))


def test_a_module_may_be_named_by_any_of_its_names() -> None:
    layer = nn.Linear(6, 6)
    model = Net(lambda n, x: n.second(n.first(x)), first=layer, second=layer)
    assert find_tap(model, X, "second") == Tap("second", calls=2)
    assert torch.equal(read(model, Tap("second", calls=2), X, output=False)[0], model(X))


def test_a_tap_that_does_not_exist_says_which_are_near() -> None:
    model = Net(lambda n, x: n.encoder(x), encoder=nn.Sequential(nn.Linear(6, 5)), unused=nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"taps\['a'\]: no module at 'encodr'; did you mean 'encoder'"):
        find_tap(model, X, "encodr", "a")
    with pytest.raises(ModelError, match=r"no module at 'encoder.9'; did you mean 'encoder.0'"):
        module_at(model, "encoder.9")
    with pytest.raises(ModelError, match=r"the module 'unused' doesn't run in forward"):
        find_tap(model, X, "unused")
    with pytest.raises(ModelError, match=r"the output of unused wasn't reached"):
        read(model, Tap("unused"), X, output=False)


def counted(calls: list[str], name: str, module: nn.Module) -> nn.Module:
    def forward(n: Any, x: Tensor) -> Tensor:
        calls.append(name)
        return n.inner(x)

    return Net(forward, inner=module)


@pytest.mark.parametrize("tap", [Tap("first"), Tap("second", "input")])
def test_reading_stops_at_the_tap_unless_the_output_is_wanted(tap: Tap) -> None:
    calls: list[str] = []
    parts = {n: counted(calls, n, nn.Linear(6, 6)) for n in ("first", "second", "third")}
    model = Net(lambda n, x: n.third(n.second(n.first(x))), **parts)
    value, output = read(model, tap, X, output=False)
    assert output is None
    assert torch.equal(value, model.get_submodule("first")(X))
    assert calls.count("third") == 0
    again, output = read(model, tap, X, output=True)
    assert torch.equal(again, value)
    assert torch.equal(output, model(X))
    assert hooks(model) == 0


def test_reading_takes_the_last_of_several_calls() -> None:
    calls: list[str] = []
    step, end = counted(calls, "step", nn.Linear(6, 6)), counted(calls, "end", nn.Linear(6, 3))
    model = Net(lambda n, x: n.end(n.step(n.step(n.step(x)))), step=step, end=end)
    tap = find_tap(model, X, "step")
    assert tap.calls == 3
    calls.clear()
    value, _ = read(model, tap, X, output=False)
    assert torch.equal(value, step(step(step(X))))
    assert calls[:3] == ["step"] * 3
    assert "end" not in calls


def test_the_input_of_a_head_called_by_keyword_is_read() -> None:
    model = Net(lambda n, x: n.head(input=x * 2), head=nn.Linear(6, 3))
    assert torch.equal(read(model, find_tap(model, X), X, output=False)[0], X * 2)


def test_a_reading_within_a_reading_ends_the_right_one() -> None:
    inner = ModelFusion([mlp(), mlp()], head=3, example=X)
    value, _ = read(inner, Tap("backbones.0.0"), X, output=False)
    assert torch.equal(value, inner.backbones[0][0](X))  # type: ignore[index]
    value, output = read(inner, Tap("backbones.1.1"), X, output=True)
    assert torch.equal(value, inner.backbones[1][:2](X))  # type: ignore[index]
    assert torch.equal(output, inner(X))


def test_quiet_is_evaluation_without_gradients_for_a_while() -> None:
    model = mlp().train()
    model[1].eval()
    with quiet(model):
        assert not any(m.training for m in model.modules())
        assert not model(X).requires_grad
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


B, L, D = 4, 5, 6
TOKENS = torch.arange(B * L * D, dtype=torch.float).view(B, L, D)
INPUTS = torch.zeros(B, L)


def test_tokens_are_averaged_over_those_that_the_mask_keeps() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    inputs = {"input_ids": torch.zeros(B, L, dtype=torch.long), "attention_mask": mask}
    pooled, left = features(TOKENS, inputs, nn.Identity(), pool=True)
    assert left is None
    assert torch.equal(pooled[0], TOKENS[0, :3].mean(0))
    assert torch.equal(pooled[1], TOKENS[1, 0])
    torch.testing.assert_close(pooled[2], TOKENS[2].mean(0))
    assert torch.equal(pooled[3], torch.zeros(D))
    tokens, left = features(TOKENS, inputs, nn.Identity(), pool=False)
    assert torch.equal(tokens, TOKENS)
    assert left is not None
    assert torch.equal(left, mask.bool())


def test_a_mask_of_other_tokens_is_not_used() -> None:
    inputs = {"attention_mask": torch.zeros(B, L + 1)}
    assert torch.equal(features(TOKENS, inputs, nn.Identity(), pool=True)[0], TOKENS.mean(1))
    assert features(TOKENS, inputs, nn.Identity(), pool=False)[1] is None


@pytest.mark.parametrize("places", [(2, 3), (2, 3, 4)])
def test_maps_are_averaged_over_their_places(places: tuple[int, ...]) -> None:
    maps = torch.randn(B, D, *places)
    torch.testing.assert_close(features(maps, INPUTS, nn.Conv2d(1, 1, 1), pool=True)[0], maps.flatten(2).mean(2))
    places_as_tokens, mask = features(maps, INPUTS, nn.ReLU(), pool=False)
    assert torch.equal(places_as_tokens, maps.flatten(2).transpose(1, 2))
    assert mask is None


@pytest.mark.parametrize("layer", [nn.Linear(D, D), nn.LayerNorm(D), nn.Sequential(nn.Linear(D, D), nn.GELU())])
def test_maps_with_channels_last_are_known_by_their_layer(layer: nn.Module) -> None:
    maps = torch.randn(B, 2, 3, D)
    torch.testing.assert_close(features(maps, INPUTS, layer, pool=True)[0], maps.mean(dim=(1, 2)))
    assert features(maps, INPUTS, layer, pool=False)[0].shape == (B, 6, D)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, D, 3, padding=1),
        nn.Sequential(nn.Conv1d(3, D, 3, padding=1), nn.BatchNorm1d(D), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Conv1d(3, D, 3, padding=1)), nn.Dropout(), nn.Identity()),
        nn.Sequential(nn.Conv1d(3, D, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)),
    ],
)
def test_one_dimensional_convolutions_have_channels_first(layer: nn.Module) -> None:
    x = torch.randn(B, 3, 8)
    value = layer.eval()(x)
    assert torch.equal(features(value, x, layer, pool=True)[0], value.transpose(1, 2).mean(1))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [L, B])  # as long as the batch is large, too
def test_recurrent_outputs(batch_first: bool, length: int) -> None:
    layer = nn.LSTM(3, D, batch_first=batch_first)
    x = torch.randn(B, length, 3)
    value = layer(x if batch_first else x.transpose(0, 1))
    expected = value[0] if batch_first else value[0].transpose(0, 1)
    torch.testing.assert_close(features(value, x, layer, pool=True)[0], expected.mean(1))


@pytest.mark.parametrize("kind", ["layer", "encoder", "attention"])
def test_transformer_layers_with_the_batch_second(kind: str) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 8, 0.0)
    module = {
        "layer": layer,
        "encoder": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        "attention": layer.self_attn,
    }[kind]
    x = torch.randn(B, B, D)
    assert torch.equal(features(x.transpose(0, 1), x, module, pool=False)[0], x)
    # fed with the batch first all the same, which shows where the two differ
    assert torch.equal(features(TOKENS, INPUTS, module, pool=False)[0], TOKENS)


@dataclass
class Output:
    pooler_output: Tensor
    last_hidden_state: Tensor


@pytest.mark.parametrize(
    "value",
    [
        TOKENS,
        (TOKENS, torch.zeros(1)),
        [TOKENS],
        ((TOKENS, torch.zeros(1)),),
        {"pooler_output": torch.zeros(B, 2), "last_hidden_state": TOKENS},
        {"anything": TOKENS, "loss": None},
        Output(torch.zeros(B, 2), TOKENS),
        SimpleNamespace(features=TOKENS, logits=torch.zeros(B, 2)),
    ],
    ids=["tensor", "tuple", "list", "nested", "mapping", "single", "dataclass", "object"],
)
def test_features_are_found_in_what_networks_return(value: Any) -> None:
    assert torch.equal(features(value, INPUTS, nn.Identity(), pool=False)[0], TOKENS)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(B), r"no features in torch.float32 of shape \(4,\)"),
        (torch.zeros(B, 3, dtype=torch.long), r"torch.int64 of shape \(4, 3\)"),
        (torch.zeros(9, 3), r"shape \(9, 3\) for a batch of 4"),
        (torch.zeros(9, 8, 3), r"shape \(9, 8, 3\) for a batch of 4"),
        ({"a": TOKENS, "b": TOKENS}, r"a mapping of \['a', 'b'\]"),
        ((), "no features in tuple"),
        ("text", "no features in str"),
        (None, "no features in NoneType"),
    ],
)
def test_what_is_no_features_is_refused_with_its_shape(value: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        features(value, INPUTS, nn.Identity(), pool=True, name="a")
    assert "taps['a']" in str(caught.value)
    assert "name another module in `taps`" in str(caught.value)


def tiny_bert(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(0, 20, (2, 4)), "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    return getattr(transformers, kind)(config).eval(), batch


def test_a_transformers_encoder_is_read_at_its_hidden_states() -> None:
    model, batch = tiny_bert("BertModel")
    tap = find_tap(model, batch)
    assert tap == Tap("")
    value, _ = read(model, tap, batch, output=False)
    pooled, _ = features(value, batch, model, pool=True)
    hidden = model(**batch).last_hidden_state
    torch.testing.assert_close(pooled, torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    assert torch.equal(read(model, find_tap(model, batch, "encoder"), batch, output=False)[0].last_hidden_state, hidden)


def test_a_transformers_classifier_is_read_before_its_head() -> None:
    model, batch = tiny_bert("BertForSequenceClassification")
    tap = find_tap(model, batch)
    assert tap == Tap("classifier", "input")
    value, output = read(model, tap, batch, output=True)
    assert value.shape == (2, 8)
    torch.testing.assert_close(model.get_submodule("classifier")(value), output.logits)


def test_a_layer_of_a_transformer_gives_its_tokens() -> None:
    model, batch = tiny_bert("BertModel")
    value, _ = read(model, find_tap(model, batch, "encoder.layer.0"), batch, output=False)
    tokens, mask = features(value, batch, model.get_submodule("encoder.layer.0"), pool=False)
    assert tokens.shape == (2, 4, 8)
    assert mask is not None
    assert mask.sum().item() == 6

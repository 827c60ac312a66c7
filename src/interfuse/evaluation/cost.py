"""What a model costs: parameters, size on disk, FLOPs, latency and peak memory, each measured on the model itself.

The definitions are those of `Cost`. FLOPs come from torch's own counter; the model is run in evaluation mode, without
gradients, and is left as it was found. This isn't a profiler: one number each, comparable between models on one machine.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from interfuse.errors import OptionError, Problem
from interfuse.modules.inputs import Composite, batch_size, call, move


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    parameters: elements of all parameters, a shared (tied) one once; trainable: those that require gradients.
    bytes: of the parameters and saved buffers as safetensors stores them, tied ones once, the header left out.
    flops: floating-point operations of one forward pass, per example, by torch's counter: matrix products, convolutions
    and attention, a multiply-add being two; element-wise work isn't counted.
    latency: median of the timed forward passes of a batch of `batch` examples, in seconds.
    memory: peak bytes of a forward pass of that batch: parameters, buffers, activations, and what a model holds beside them
    (an ensemble's stacked weights), without the inputs. On a CPU these are the tensors alive after each operation (what a
    kernel takes within one isn't seen); on CUDA the allocator's peak.
    """

    parameters: int
    trainable: int
    bytes: int
    flops: int
    latency: float
    batch: int
    memory: int


def cost(model: nn.Module, example_inputs: Any, *, repeats: int = 10, warmup: int = 2) -> Cost:
    """Measure `model` on `example_inputs` (a batch, in any form that the model takes) on the device that holds it.

    `repeats` (at least 1) passes are timed after `warmup` passes. Training mode, gradients, hooks and the random state
    are as before afterwards.
    """
    problems = [
        Problem(name, f"got {got}", f"at least {least}")
        for name, got, least in (("repeats", repeats, 1), ("warmup", warmup, 0))
        if got < least
    ]
    if problems:
        raise OptionError(*problems)
    device = device_of(model)
    inputs = move(example_inputs, device)
    batch = batch_size(inputs)

    def forward() -> Any:
        return call(model, inputs)

    with _measuring(model, device):
        for _ in range(warmup):
            forward()
        latency = _latency(forward, device, repeats)
        memory = _peak_cuda(model, forward, device) if device.type == "cuda" else _peak(model, inputs, forward)
        memory += sum(module.held for module in model.modules() if isinstance(module, Composite))
        flops = _flops(model, forward)
    parameters = list(model.parameters())  # without duplicates
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=_stored_bytes(model.state_dict().values()),
        flops=round(flops / batch),
        latency=latency,
        batch=batch,
        memory=memory,
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, and everything back as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _latency(forward: Callable[[], Any], device: torch.device, repeats: int) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    spans = []
    for _ in range(repeats):
        start = now()
        forward()
        spans.append(now() - start)
    return statistics.median(spans)


@contextmanager
def _decomposed() -> Iterator[None]:
    """Transformer layers as separate operations: the fused kernel hides what is within from counter and tracker."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _flops(model: nn.Module, forward: Callable[[], Any]) -> int:
    """The counter knows matrix products and convolutions, not every backend's fused attention and recurrent kernels."""
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(_decomposed())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_plain_recurrence())
        stack.enter_context(counter)
        forward()
    return counter.get_total_flops()


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    onednn = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags() warns, and resets other settings
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)


def _stored_bytes(tensors: Any) -> int:
    """Bytes of the tensors, those that are the same view of the same storage once."""
    sizes = {
        (t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype): t.nbytes
        for t in tensors
        if isinstance(t, Tensor) and t.numel()
    }
    return sum(sizes.values())


def _weights(model: nn.Module) -> dict[int, int]:
    """Bytes by storage of all parameters and buffers, saved or not."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _peak(model: nn.Module, inputs: Any, forward: Callable[[], Any]) -> int:
    weights = _weights(model)
    given = [leaf.untyped_storage()._cdata for leaf in tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor)]
    tracker = _Alive({*weights, *given})
    with _decomposed(), tracker:
        forward()
    return sum(weights.values()) + tracker.peak


def _plain(inputs: Any) -> Any:
    """Mappings as dictionaries: a tokenizer's batch is a leaf to torch's tree functions."""
    return {key: _plain(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else inputs


def _peak_cuda(model: nn.Module, forward: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward()
    torch.cuda.synchronize(device)
    return sum(_weights(model).values()) + torch.cuda.max_memory_allocated(device) - before


class _Alive(TorchDispatchMode):
    """The most bytes of new storages that were alive after any operation. A class since torch's modes are."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = known
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self._now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self._now += size

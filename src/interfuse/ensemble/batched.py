"""Networks of one architecture in one pass: their weights stacked, one `vmap` over the networks in place of a loop.

    y_k = f(theta_k, x), k = 1 ... M      as      y = vmap(f, (0, None))(stack_k theta_k, x)

(torch.func's `functional_call` and `vmap`.) It saves the M calls' overhead, and pays where that is more than the work, for
small networks; for large ones a batched kernel is slower than M plain ones. So it is measured: a shape of inputs is run one by
one when it is first seen, both ways when it comes again, and from then on the way that was faster, if the outputs were equal
to 1e-5. Sizes are told apart by powers of two.

Never in training mode, with gradients of the weights, hooks, buffers that change, or anything random: those run one by one. The
stack is a second copy of the weights, made only where it fits, dropped where it doesn't pay, and made anew when weights change.
What a network keeps beside its tensors is taken as it was when the stack was made.
"""

from __future__ import annotations

import copy as copying
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode

from interfuse import units
from interfuse.errors import ModelError, Problem
from interfuse.modules.inputs import Called, Composite, tensors_of

_TOLERANCE = 1e-5
_REPEATS = 5
_INSIDE = frozenset(vars(nn.Module()))  # what every module has

Outputs = list[Tensor]


class Batched:
    """One pass for all networks of an ensemble, where it can be made and is faster. A class for what is kept between calls.

    `bytes`: what the stack takes now. A copy of it, or a pickle, begins anew.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.choices: dict[Any, bool | None] = {}
        self._mark: Any = None
        self._held: list[Any] = []
        self._in_parts = False
        self._stack: dict[str, Tensor] = {}
        self._base: nn.Module | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Batched, ()

    @property
    def bytes(self) -> int:
        """What the stacked weights take."""
        return sum({id(tensor): tensor.nbytes for tensor in self._stack.values()}.values())

    def forget(self) -> None:
        """Drop the stack and what was measured."""
        self.reason, self.choices, self._mark, self._held = "", {}, None, []
        self._drop()

    def _drop(self) -> None:
        self._stack, self._base = {}, None

    def run(
        self, networks: Sequence[nn.Module], inputs: Any, one_by_one: Callable[[], Outputs], forced: bool | None
    ) -> Outputs | None:
        """Every network's output, (batch, ...), by one pass; None where they're to run one by one.

        forced: None measures, True is wherever it can be done, and a `ModelError` where these networks can't, False never.
        """
        if forced is False or len(networks) < 2 or not _plain(networks, inputs) or not self._lock.acquire(blocking=False):
            return None
        try:
            mark = _mark(networks)
            if mark is None:
                return None
            if mark != self._mark:
                self.forget()
                self._mark, self.reason = mark, unlike(networks)
                # Kept, so that no later tensor can have their place in memory, by which they are told apart.
                self._held = [tensor.untyped_storage() for network in networks for tensor in _tensors(network).values()]
            if forced:
                return self._asked(networks, inputs, one_by_one)
            return None if self.reason else self._chosen(networks, inputs, one_by_one)
        finally:
            self._lock.release()

    def _chosen(self, networks: Sequence[nn.Module], inputs: Any, one_by_one: Callable[[], Outputs]) -> Outputs | None:
        shape = _shape(inputs)
        if shape not in self.choices:
            self.choices[shape] = None
            return None
        if self.choices[shape] is None:
            if _get_current_dispatch_mode() is not None:  # it counts or tracks what is run
                return None
            self.choices[shape] = self._faster(networks, inputs, one_by_one)
        outputs = None
        if self.choices[shape]:
            try:
                outputs = self._pass(networks, inputs)
            except Exception as error:  # memory, or a way through their code that these inputs are the first to take
                self.reason = _failure(error)
        if self.reason or not any(self.choices.values()):
            self._drop()
        return outputs

    def _faster(self, networks: Sequence[nn.Module], inputs: Any, one_by_one: Callable[[], Outputs]) -> bool:
        """Whether one pass is faster on these inputs, and gives the same."""
        plain = one_by_one()
        if _mark(networks) != self._mark:
            self.reason = "a buffer changes when they run"
            return False
        try:
            together = self._first(networks, inputs)
        except Exception as error:  # an operation that can't be batched; networks' own code may raise anything
            self.reason = _failure(error)
            return False
        if not all(map(_equal, plain, together)):
            self.reason = "one pass gives other outputs"
            return False
        device = plain[0].device
        spans = [
            (_seconds(one_by_one, device), _seconds(lambda: self._pass(networks, inputs), device)) for _ in range(_REPEATS)
        ]
        loops, passes = zip(*spans, strict=True)
        least, middle = (measure(passes) < measure(loops) for measure in (min, statistics.median))
        return least and middle  # other work may disturb either

    def _asked(self, networks: Sequence[nn.Module], inputs: Any, one_by_one: Callable[[], Outputs]) -> Outputs:
        """One pass as it was asked for, or why not."""
        if not self.reason:
            try:
                if self._base is not None:
                    return self._pass(networks, inputs)
                outputs = self._first(networks, inputs)
                with torch.no_grad():
                    same = all(map(_equal, one_by_one(), outputs))
                if same:
                    return outputs
                self.reason = "one pass gives other outputs"
                self._drop()
            except Exception as error:  # as above
                one_by_one()  # what is wrong with the inputs is said by the network itself
                self.reason = _failure(error)
                self._drop()
        raise ModelError(Problem("batched", f"True, but {self.reason}", "leave it out, or give False"))

    def _first(self, networks: Sequence[nn.Module], inputs: Any) -> Outputs:
        """A pass that finds out whether every operation has a batched form: fused attention may not, its parts do."""
        for self._in_parts in (False, True):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                outputs = self._pass(networks, inputs)
            if not any("batching rule" in str(warning.message) for warning in said):
                return outputs
        raise NotImplementedError("an operation of theirs has no batched form")

    def _pass(self, networks: Sequence[nn.Module], inputs: Any) -> Outputs:
        if self._base is None:
            self._make(networks)
        base = self._base
        assert base is not None
        with _attention_in_parts() if self._in_parts else nullcontext():
            return list(vmap(lambda state: functional_call(base, state, (inputs,)))(self._stack).unbind(0))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, networks: Sequence[nn.Module]) -> None:
        states = [_tensors(network) for network in networks]
        needed, free = sum(t.nbytes for state in states for t in state.values()), _free(next(iter(states[0].values())).device)
        if free is not None and needed > free:
            raise MemoryError(f"a stack of {units.count(needed, 'B')} where {units.count(free, 'B')} are free")
        stacks: dict[int, Tensor] = {}  # tied weights once
        for name, tensor in states[0].items():
            if id(tensor) not in stacks:
                stacks[id(tensor)] = torch.stack([state[name] for state in states])
        self._stack = {f"network.{name}": stacks[id(tensor)] for name, tensor in states[0].items()}
        self._base = Called(copying.deepcopy(networks[0]).to("meta"))


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Attention as matrix products and a softmax, each of which has a batched form everywhere."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def unlike(networks: Sequence[nn.Module]) -> str:
    """Why these networks can't be one: "" if they have the same modules, settings, and tensors of one shape and type."""
    first = dict(networks[0].named_modules(remove_duplicate=False))
    if any(isinstance(module, Composite) for network in networks for module in network.modules()):
        return "some are made of networks themselves"
    state = _tensors(networks[0])
    if not state or any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in state.values()):
        return "their weights aren't plain tensors"
    for network in networks[1:]:
        modules = dict(network.named_modules(remove_duplicate=False))
        if [(path, type(module)) for path, module in modules.items()] != [(path, type(m)) for path, m in first.items()]:
            return "their modules differ"
        if _forms(_tensors(network)) != _forms(state):
            return "their tensors differ in name, shape, type, device or ties"
        for path, module in modules.items():
            if not _same(_settings(module), _settings(first[path])):
                return f"settings of their {path or 'outermost module'} differ"
    return ""


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, one that is tied under each of its names."""
    named = network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)
    return {name: tensor for pairs in named for name, tensor in pairs}


def _forms(tensors: Mapping[str, Tensor]) -> list[Any]:
    first: dict[int, str] = {}
    return [(name, t.shape, t.dtype, t.device, first.setdefault(id(t), name)) for name, t in tensors.items()]


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _INSIDE}


def _same(one: Any, two: Any, depth: int = 6) -> bool:
    """Whether what modules keep beside tensors is the same; text isn't looked at, which says where a network came from."""
    if one is two:
        return True
    if type(one) is not type(two) or depth == 0:
        return False
    if isinstance(one, str):
        return True
    if isinstance(one, Tensor):
        return one.shape == two.shape and one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key], depth - 1) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(_same(a, b, depth - 1) for a, b in zip(one, two, strict=True))
    if type(one).__eq__ is object.__eq__ and hasattr(one, "__dict__") and not isinstance(one, nn.Module) and not callable(one):
        return _same(vars(one), vars(two), depth - 1)
    try:
        return bool(one == two) or (hasattr(one, "__dict__") and not callable(one) and _same(vars(one), vars(two), depth - 1))
    except Exception:  # what compares in a way of its own
        return False


def _plain(networks: Sequence[nn.Module], inputs: Any) -> bool:
    """Whether this is an ordinary call, of tensors where the weights are: not traced, transformed, or for gradients."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for network in networks for p in network.parameters()):
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for _, tensor in tensors_of(inputs))


def _mark(networks: Sequence[nn.Module]) -> list[int] | None:
    """What tells these weights from others or later ones; None where the networks must run one by one."""
    found: list[int] = []
    for network in networks:
        waiting: list[nn.Module | None] = [network]
        while waiting:
            module = waiting.pop()
            if module is None:
                continue
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return None
            found.append(id(module))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if tensor.is_inference():
                    return None
                found += (tensor.data_ptr(), tensor._version)
            waiting += module._modules.values()
    return found


def _shape(inputs: Any) -> tuple[Any, ...]:
    """What a choice is kept for: the device, types and sizes of the inputs, sizes up to the next power of two."""
    found = tensors_of(inputs)
    kinds = {tensor.device.type for _, tensor in found}
    casts = tuple(kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    sizes = [(path, t.dtype, t.device, tuple((size - 1).bit_length() for size in t.shape)) for path, t in found]
    return (*sizes, casts, torch.get_num_threads())


def _equal(one: Tensor, two: Tensor) -> bool:
    """Equal to 1e-5 of the largest value, or to the type's last digits where it has fewer."""
    if one.shape != two.shape or not one.is_floating_point():
        return False
    share = max(_TOLERANCE, 4 * torch.finfo(one.dtype).eps)
    finite = one.detach()[one.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return torch.allclose(one, two, rtol=share, atol=share * scale, equal_nan=True)


def _failure(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0][:150]
    return f"one pass fails ({type(error).__name__}: {reason})"


def _seconds(what: Callable[[], Any], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    what()
    return now() - start


def _free(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pages = os.sysconf_names.get("SC_AVPHYS_PAGES")
        return None if pages is None else os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")

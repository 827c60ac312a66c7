"""Runs outputs of a plan on a torch device: tensors go up, are merged by `torch_form`, and come down, all at the same time.

Threads read and hash on the host; copies to the device and back each have a stream of their own, through pinned memory, and
the arithmetic has a third. On the device `cpu` the very same path runs without streams and pins. Memory on the device: a few
tensors times the models. What `torch_form` can't do is the CPU engine's, and isn't given here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interfuse.checkpoints.numbers import nonfinite
from interfuse.checkpoints.tensors import to_array, to_tensor
from interfuse.engine.merging import Merging, noted
from interfuse.engine.reading import Reader
from interfuse.engine.scheduler import Job, run_jobs
from interfuse.engine.torch_form import Tail, merged, rounded, supports
from interfuse.errors import OptionError, Problem
from interfuse.methods.forms import Combination
from interfuse.plan import Input, Output

if TYPE_CHECKING:
    from torch import Tensor

_AHEAD = 2  # tensors that are read, and that are on their way down, beside the one that is merged


class _Read(NamedTuple):
    """An output's inputs on the host, the base's first where there is one."""

    output: Output
    reader: Reader
    kept: tuple[int, ...]  # which of base and inputs these are
    hosts: list[Tensor]


class _Made(NamedTuple):
    read: _Read
    result: Tensor  # on the host
    finite: Tensor
    ready: Any  # an event, or None


def device_for(device: str | None, models: Sequence[Any] = ()) -> str | None:
    """The torch device to merge on; None says the CPU's own engine: as asked, or where these models' first tensor is.

    A device that isn't there is an `OptionError`.
    """
    if device is None:
        found = map(_first, models)
        return next((str(tensor.device) for tensor in found if getattr(tensor, "is_cuda", False)), None)
    if device.partition(":")[0] == "cpu":
        return None
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise OptionError(Problem("device", f"got {device!r}", "cpu or cuda")) from None
    if kind != "cuda" or not torch.cuda.is_available():
        raise OptionError(Problem("device", f"there is no {device!r} here", "cpu" if kind == "cuda" else "cpu or cuda"))
    return device


def _first(model: Any) -> Any:
    tensors = model.values() if isinstance(model, Mapping) else model.parameters() if hasattr(model, "parameters") else ()
    return next(iter(tensors), None)


def on_device(output: Output) -> bool:
    """Whether an output can be made on a device."""
    return output.how == "merge" and output.call is not None and supports(output.call)


def run_on(
    device: str, outputs: Sequence[Output], merging: Merging, done: Callable[[Output, Merging], None] | None, threads: int
) -> None:
    """Make these outputs, in order; `done` is told of each when it's written and read back."""
    lanes = _Lanes(device)
    flying: deque[_Made] = deque()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for read in _ahead(pool, outputs, lambda output: _read(output, merging, lanes.pinned)):
            flying.append(_make(read, merging, lanes))
            if len(flying) > _AHEAD:
                _finish(flying.popleft(), merging, done)
        while flying:
            _finish(flying.popleft(), merging, done)


class _Lanes:
    """A device with a stream for each direction; on a CPU there is none. A class, for the streams live as long as the run."""

    def __init__(self, device: str):
        import torch

        self.device = torch.device(device)
        self.pinned = self.device.type == "cuda"
        self._up = torch.cuda.Stream(self.device) if self.pinned else None
        self._down = torch.cuda.Stream(self.device) if self.pinned else None

    def up(self, hosts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors on the device; what is computed next waits for them, not the host."""
        import torch

        if self._up is None:
            return list(hosts)
        with torch.cuda.stream(self._up):
            there = [host.to(self.device, non_blocking=True) for host in hosts]
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._up)
        for tensor in there:
            tensor.record_stream(now)
        return there

    def down(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Tensors on the host, and the event after which they are there."""
        import torch

        if self._down is None:
            return list(tensors), None
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            for tensor in tensors:
                tensor.record_stream(self._down)
            return hosts, self._down.record_event()


def _ahead(pool: ThreadPoolExecutor, outputs: Sequence[Output], read: Callable[[Output], _Read]) -> Iterator[_Read]:
    """Each output's inputs, some read before they are asked for."""
    waiting: deque[Future[_Read]] = deque()
    try:
        for output in outputs:
            waiting.append(pool.submit(read, output))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _needed(output: Output) -> tuple[int, ...]:
    """Which of base and inputs count: of a combination that is known, those with a share."""
    count = len(output.reads)
    made = output.call.made if output.call is not None else None
    if not isinstance(made, Combination):
        return tuple(range(count))
    shares = ([] if output.base is None else [made.base]) + list(made.models)
    return tuple(i for i, share in enumerate(shares) if share != 0)


def _read(output: Output, merging: Merging, pinned: bool) -> _Read:
    """Read and hash the inputs into host memory."""
    import torch

    needed = _needed(output)
    based = output.base is not None and 0 in needed
    inputs: list[Input] = [output.reads[i] for i in needed if not (based and i == 0)]
    reader = Reader(output, merging.sources, inputs, output.base if based else None)
    rooms = [torch.empty(max(spec.nbytes, 1), dtype=torch.uint8, pin_memory=pinned) for spec in reader.specs]
    arrays = [room.numpy()[: s.nbytes].view(s.storage) for room, s in zip(rooms, reader.specs, strict=True)]
    for start, stop in reader.ranges:
        _, raws = reader.block(start, stop)
        reader.hash(start, raws)
        for array, raw in zip(arrays, raws, strict=True):
            array[start:stop] = raw
    hosts = [to_tensor(array, s.dtype).reshape(output.spec.shape) for array, s in zip(arrays, reader.specs, strict=True)]
    return _Read(output, reader, needed, hosts)


def _make(read: _Read, merging: Merging, lanes: _Lanes) -> _Made:
    import torch

    output, reader = read.output, read.reader
    call = output.call
    assert call is not None
    wide = torch.float64 if reader.wide is np.float64 else torch.float32
    there = [tensor.to(wide) for tensor in lanes.up(read.hosts)]
    zeros = torch.zeros(output.spec.shape, dtype=wide, device=lanes.device)
    every = [zeros] * len(output.reads)  # what has no share isn't read
    for i, tensor in zip(read.kept, there, strict=True):
        every[i] = tensor
    base = every.pop(0) if output.base is not None else None
    known = merging.cuts.get(output.name)
    cuts = None if known is None else [Tail(cut.value, cut.end) for cut in known]
    with torch.no_grad():
        result = merged(call, output.name, base, every, seed=merging.seed, cuts=cuts)
        narrow = rounded(result, output.spec.dtype)
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in (*there, narrow)]).all()
    (host, fine), ready = lanes.down([narrow, finite])
    return _Made(read, host, fine, ready)


def _finish(made: _Made, merging: Merging, done: Callable[[Output, Merging], None] | None) -> None:
    """Write a result, note its hashes and what isn't finite, and read it back."""
    output, reader = made.read.output, made.read.reader
    if made.ready is not None:
        made.ready.synchronize()
    result = to_array(made.result).reshape(-1)
    if not bool(made.finite):
        raws = [to_array(host).reshape(-1) for host in made.read.hosts]
        merging.look(output, reader, raws, int(np.count_nonzero(nonfinite(result, output.spec.dtype))))
    for start, stop in reader.ranges:
        merging.put(output, start, result[start:stop])

    def end() -> Job:
        yield from noted(reader, merging)
        yield from merging.read_back(output)

    run_jobs([end()], 1)
    if done is not None:
        done(output, merging)

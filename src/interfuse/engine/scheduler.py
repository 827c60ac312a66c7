"""Jobs in phases on threads: each job asks for a task to be run over ranges, gets the results in order, and goes on.

A job is a generator, so a method reads top to bottom though its blocks run on any thread. What a job goes on with is run
before new jobs are begun: its bytes are still in the caches. Results never depend on which thread ran what.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from interfuse.engine.kernels import CHUNK


class Scratch:
    """One thread's buffers, made when first asked for and used again and again. A class, because that is what it holds."""

    def __init__(self) -> None:
        self._made: dict[Any, np.ndarray] = {}

    def buffer(self, use: str, dtype: Any, size: int, rows: int = 0) -> np.ndarray:
        """An array of `size` elements, or of `rows` such rows, with whatever it held before; `use` keeps two apart."""
        key = (use, np.dtype(dtype), rows)
        if key not in self._made or self._made[key].shape[-1] < size:
            self._made[key] = np.zeros((rows, size) if rows else size, dtype)
        return self._made[key][..., :size] if not rows else self._made[key]

    def work(self, dtype: Any, models: int) -> np.ndarray:
        """The chunks that kernels work in: one a model, one for the base, three for results."""
        return self.buffer("work", dtype, CHUNK, models + 4)


class Total:
    """The sum of what a phase's tasks give, added up in the order of their ranges: the same bits whatever the threads.

    Few parts are held at once, however many there are. A class, for it holds those that wait for an earlier one.
    """

    def __init__(self, shape: int | tuple[int, ...], dtype: Any = np.float64):
        self.value: np.ndarray = np.zeros(shape, dtype)
        self._waiting: dict[int, tuple[int, np.ndarray]] = {}
        self._at: int | None = None
        self._lock = threading.Lock()

    def add(self, start: int, stop: int, part: np.ndarray, *, first: int = 0) -> None:
        """Add the part of one range; ranges follow one another from `first`. Any thread may."""
        with self._lock:
            self._waiting[start] = stop, part
            at = first if self._at is None else self._at
            while at in self._waiting:
                at, part = self._waiting.pop(at)
                self.value += part
            self._at = at


class Phase(NamedTuple):
    """A task for each range of a tensor's elements: it's given start, stop and the thread's scratch."""

    task: Callable[[int, int, Scratch], Any]
    ranges: Sequence[tuple[int, int]]


#: Yields phases, is sent each one's results in the order of its ranges.
Job = Generator[Phase, list[Any], None]


class _Running:
    """A job that has begun, and how far its phase is."""

    def __init__(self, job: Job):
        self.job = job
        self.task: Callable[[int, int, Scratch], Any] | None = None
        self.results: list[Any] | None = None
        self.left = 0


def run_jobs(jobs: Iterable[Job], threads: int) -> None:
    """Run all jobs; the first error ends them all and is raised. Tasks may run on any of `threads` threads at once."""
    scheduler = _Scheduler(iter(jobs))
    others = [threading.Thread(target=scheduler.work, daemon=True) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    try:
        scheduler.work()
    finally:
        scheduler.stop()
        for thread in others:
            thread.join()
    if scheduler.error is not None:
        raise scheduler.error


class _Scheduler:
    def __init__(self, jobs: Any):
        self._jobs = jobs
        self._tasks: deque[tuple[_Running, int, tuple[int, int]]] = deque()
        self._active = 0
        self._more = True
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def work(self) -> None:
        """Run tasks until there is none left anywhere."""
        scratch = Scratch()
        try:
            while (found := self._next()) is not None:
                if isinstance(found, _Running):
                    self._advance(found, None)
                else:
                    running, index, (start, stop) = found
                    assert running.task is not None
                    self._finish(running, index, running.task(start, stop, scratch))
        except BaseException as error:
            with self._changed:
                self.error = self.error or error
                self._more = False
                self._tasks.clear()
                self._changed.notify_all()
            if not isinstance(error, Exception):
                raise

    def stop(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._more = False
            self._changed.notify_all()

    def _next(self) -> Any:
        """A task, a job to begin, or None at the end."""
        with self._changed:
            while self.error is None:
                if self._tasks:
                    return self._tasks.popleft()
                if self._more:
                    job = next(self._jobs, None)
                    if job is not None:
                        self._active += 1
                        return _Running(job)
                    self._more = False
                if not self._active:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            return None

    def _finish(self, running: _Running, index: int, result: Any) -> None:
        with self._changed:
            assert running.results is not None
            running.results[index] = result
            running.left -= 1
            if running.left:
                return
        self._advance(running, running.results)

    def _advance(self, running: _Running, results: list[Any] | None) -> None:
        """Send a job its results and queue what it asks for next, before everything else."""
        try:
            while True:
                phase = running.job.send(results)  # type: ignore[arg-type]
                if phase.ranges:
                    break
                results = []
        except StopIteration:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()
            return
        with self._changed:
            running.task, running.results, running.left = phase.task, [None] * len(phase.ranges), len(phase.ranges)
            self._tasks.extendleft((running, i, span) for i, span in reversed(list(enumerate(phase.ranges))))
            self._changed.notify_all()

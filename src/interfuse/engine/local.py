"""Runs a plan on this machine: its outputs' jobs on threads, in the order in which the inputs are stored.

Memory depends on threads and blocks, not on tensors or models, save for methods of whole matrices. Nothing is decided
here: the plan says what is read, and with which numbers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from interfuse.checkpoints.source import Checkpoint, TensorSpec
from interfuse.engine.global_trim import global_cuts
from interfuse.engine.merging import Merging, Sink
from interfuse.engine.on_device import on_device, run_on
from interfuse.engine.outputs import job
from interfuse.engine.scheduler import Job, run_jobs
from interfuse.errors import CheckpointError, Problem
from interfuse.plan import Output, Plan
from interfuse.progress import track

_SHOWN = 20  # tensors that an error lists


def execute(
    plan: Plan,
    sources: Sequence[Checkpoint],
    sink: Sink,
    *,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    done: Callable[[Output, Merging], None] | None = None,
    skip: Callable[[Output], bool] = lambda output: False,
    progress: bool = True,
    device: str | None = None,
) -> Merging:
    """Give every output tensor to `sink`; what was read and written, with its hashes.

    `sources` are those the plan was made for. `threads` defaults to the processors that this process may use; the bytes
    don't depend on it. `done` is told of each tensor when its last block is written, `skip` says which needn't be made.
    NaN or infinity in inputs or results is a `CheckpointError` that names all such tensors, unless `allow_nonfinite`;
    integers that differ, and a file that has changed, are too. With a `device` of torch's, what has a torch form is merged
    there (`on_device`).
    """
    merging = Merging(sources, sink, plan.seed)
    waiting = [output for output in _in_stored_order(plan, sources) if not skip(output)]

    there = [output for output in waiting if on_device(output)] if device is not None else []
    elsewhere = {output.name for output in there}
    here = [output for output in waiting if output.name not in elsewhere]

    def jobs() -> Iterator[Job]:
        sizes = [sum(spec.nbytes for spec in _specs(output, sources)) for output in here]
        for output in track(here, "merging", sizes=sizes, shown=progress):
            yield _whole(output, merging, done)

    count = threads or len(os.sched_getaffinity(0))
    files = list(dict.fromkeys(file for source in sources for file in source.files()))
    with _one_blas_thread(plan):
        if waiting:
            merging.cuts = global_cuts(plan.outputs, sources, count)
        run_jobs(jobs(), count)
        if device is not None:
            run_on(device, there, merging, done, count)
    for file in files:
        file.check()
    problems = sorted(merging.refused)  # threads found them in any order
    if not allow_nonfinite:
        found = sorted(merging.nonfinite.items())
        problems += [Problem(p.path, f"{p.wrong}: {count}", p.allowed) for p, count in found[:_SHOWN]]
        if len(found) > _SHOWN:
            problems.append(Problem("", f"{len(found) - _SHOWN} more tensors hold NaN or infinite values", ""))
    if problems:
        raise CheckpointError(*problems)
    return merging


def _specs(output: Output, sources: Sequence[Checkpoint]) -> list[TensorSpec]:
    """What is read for an output and written."""
    return [output.spec, *(sources[read.source].specs[read.name] for read in output.reads)]


def _whole(output: Output, merging: Merging, done: Callable[[Output, Merging], None] | None) -> Job:
    yield from job(output, merging)
    yield from merging.read_back(output)
    if done is not None:
        done(output, merging)


def _in_stored_order(plan: Plan, sources: Sequence[Checkpoint]) -> list[Output]:
    """The outputs in the order in which their first model's tensors lie on disk."""
    return sorted(plan.outputs, key=lambda output: sources[output.inputs[0].source].position(output.inputs[0].name))


@contextlib.contextmanager
def _one_blas_thread(plan: Plan) -> Iterator[None]:
    """Matrices are decomposed on one thread each, so that results don't depend on how many threads there are."""
    if all(output.call is None or output.call.form != "matrices" for output in plan.outputs):
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield

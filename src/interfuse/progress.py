"""Progress on standard error: shown on a terminal once work has taken two seconds, with its rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")
PATIENCE = 2.0  # seconds


def track(
    items: Iterable[_T], what: str, total: int | None = None, *, sizes: Sequence[int] | None = None, shown: bool = True
) -> Iterator[_T]:
    """Go through `items`, showing how far it is; nothing is shown off a terminal, or when it's done within `PATIENCE`.

    With `sizes`, the bytes of each item, that is said in bytes, else in items.
    """
    if not shown or not sys.stderr.isatty():
        yield from items
        return
    from rich import progress
    from rich.console import Console

    rates = (progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}"))
    if sizes is not None:
        rates, total = (progress.DownloadColumn(), progress.TransferSpeedColumn()), sum(sizes)  # type: ignore[assignment]
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *rates, progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task, start, running, done = bar.add_task(what, total=total, rate=""), time.monotonic(), False, 0
    try:
        for number, item in enumerate(items):
            seconds = time.monotonic() - start
            if seconds > PATIENCE and not running:
                bar.start()
                running = True
            bar.update(task, completed=done, rate=f"{done / seconds:.1f}/s" if seconds else "")
            done += 1 if sizes is None else sizes[number]
            yield item
    finally:
        if running:
            bar.stop()


def say(what: str) -> None:
    """Say on a terminal what takes a while and can't be counted."""
    if sys.stderr.isatty():
        sys.stderr.write(what + "\n")

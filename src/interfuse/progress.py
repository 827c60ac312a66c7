"""Progress on standard error: shown on a terminal once work has taken two seconds, with its rate and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
PATIENCE = 2.0  # seconds


def track(items: Iterable[_T], what: str, total: int | None = None, *, shown: bool = True) -> Iterator[_T]:
    """Go through `items`, showing how far it is; nothing is shown off a terminal, or when it's done within `PATIENCE`."""
    if not shown or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task, start, running = bar.add_task(what, total=total, rate=""), time.monotonic(), False
    try:
        for done, item in enumerate(items):
            seconds = time.monotonic() - start
            if seconds > PATIENCE and not running:
                bar.start()
                running = True
            bar.update(task, completed=done, rate=f"{done / seconds:.1f}/s" if seconds else "")
            yield item
    finally:
        if running:
            bar.stop()

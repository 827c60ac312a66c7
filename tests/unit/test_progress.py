"""`track`: everything goes through it, and it speaks only on a terminal and only when it takes long."""

from __future__ import annotations

import io
import sys

import pytest

from interfuse import progress
from interfuse.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert said.getvalue() == ""


@pytest.mark.parametrize(("patience", "shown", "speaks"), [(-1.0, True, True), (60.0, True, False), (-1.0, False, False)])
def test_on_a_terminal_it_speaks_when_it_takes_long(
    patience: float, shown: bool, speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(iter(range(3)), "counting", 3, shown=shown)) == [0, 1, 2]
    assert ("counting" in said.getvalue()) is speaks
    assert ("2/3" in said.getvalue()) is speaks


def test_bytes_are_said_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track("abc", "merging", sizes=[2_000_000, 1_000_000, 1_000_000])) == ["a", "b", "c"]
    assert "3.0/4.0 MB" in said.getvalue()


def test_it_ends_when_the_caller_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    for item in track(range(100), "counting", 100):
        if item == 2:
            break
    assert said.getvalue().endswith(("\x1b[2K", "\x1b[?25h", "\r")) or "\x1b[?25h" in said.getvalue()  # the cursor is back

"""Progress as bars on a terminal and as lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from soar.run import progress
from soar.run.progress import Progress


def plain(**more: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, width=200, **more), quiet=False), out


def test_plain_lines_with_a_time_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    report, out = plain()
    with report, report.task("outer loop", 10) as advance, report.task("inner", 5, transient=True) as inner:
        clock["now"] += 60.0
        advance(4)  # done before an interruption: no measure of speed
        for _ in range(3):
            clock["now"] += 60.0
            inner.set(2, 5)
            advance(1)
        clock["now"] += 1.0
        advance(1)  # too soon for another line
    assert out.getvalue().splitlines() == [
        "outer loop: 5/10, about 0:05:00 left",
        "outer loop: 6/10, about 0:04:00 left",
        "outer loop: 7/10, about 0:03:00 left",
    ]


def test_bars_on_a_terminal() -> None:
    report, out = plain(force_terminal=True, color_system=None)
    with report, report.task("screening", 4) as advance:
        advance(4)
        report.say("a line")
    assert "screening" in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "a line" in out.getvalue()
    assert not report.bars.live.is_started


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    report, out = plain(force_terminal=True)
    with report, report.task("outer loop", 4) as advance:
        advance(1)
        report.say("a line")
    assert out.getvalue() == "a line\n"

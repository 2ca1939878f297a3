"""Progress as bars on a terminal and as lines elsewhere."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from soar.run import progress
from soar.run.progress import Progress


def plain(**more: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, width=200, **more), quiet=False), out


def test_plain_lines_with_a_time_estimate(monkeypatch, tmp_path):
    """By hand: 4 of 10 were done before, which says nothing of the pace; a step takes 60 s, and the plan says
    that the arms take half of the whole loop."""
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    report, out = plain()
    report.plan, report.file = {"outer loop": 20.0, "arms": 10.0}, tmp_path / "now.json"
    with report, report.task("outer loop", 10) as advance, report.task("  students", 5, transient=True) as students:
        advance(4)
        for _ in range(2):
            clock["now"] += 60.0
            advance(1)
        clock["now"] += 1.0
        students.set(2, 5)  # too soon for another line
        clock["now"] += 19.0
        students.set(3, 5)
        noted = json.loads(report.file.read_text())
    assert out.getvalue().splitlines() == [
        "outer loop: 5/10, students: 0/5, about 0:05:00 left, about 0:10:00 of the whole run left",
        "outer loop: 6/10, students: 0/5, about 0:04:00 left, about 0:09:00 of the whole run left",
        "outer loop: 6/10, students: 3/5, about 0:04:00 left, about 0:09:00 of the whole run left",
    ]
    assert noted == {"task": "outer loop", "done": 6.0, "total": 10.0, "left": 240.0}
    assert not report.file.exists(), "a run that is not at work notes nothing"
    assert [bar.fields["run"] for bar in report.bars.tasks] == [""], "nothing is left of a bar that is over"


def test_what_has_no_bar_is_said_again(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    report, out = plain()
    report.now("loading")
    for seconds in (5.0, 5.0, 5.0):
        clock["now"] += seconds
        report.remind()
    with report.task("evaluation", 1):  # `soar eval` opens it before the model is loaded
        report.now("drawing", tell=False)
        clock["now"] += 9.0
        report.remind()
    assert out.getvalue().splitlines() == ["loading", "loading: 10 s so far", "drawing: 9 s so far"]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_bars_on_a_terminal_and_lines_where_it_cannot_move_its_cursor(monkeypatch, capsys, term):
    monkeypatch.setenv("TERM", term)
    report, out = plain(force_terminal=True, color_system=None)
    with report, report.task("screening", 4) as advance:
        advance(4)
        report.say("a line")
        print("a result into a pipe")
    assert capsys.readouterr().out == "a result into a pipe\n"
    shown = out.getvalue()
    assert shown == "a line\n" if term == "dumb" else "screening" in shown and "4/4" in shown and "a line" in shown
    assert not report.bars.live.is_started

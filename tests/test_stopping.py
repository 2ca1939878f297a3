"""Signals and limits stop a run at a safe point, and what is resumed ends as if it had not been stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import TINY, events, outcome, run_tiny, sets

from soar.cli import main
from soar.config import LimitsConfig
from soar.loop import student, teacher
from soar.run import pipeline
from soar.run import screen as screening
from soar.run.interrupts import limit_reached, resume_command

CHANGES = ("teacher.steps=2", "arms.save_steps=100")
SETS = sets(*TINY, *CHANGES)


def signal_at(patch: pytest.MonkeyPatch, owner: Any, attribute: str, number: int) -> None:
    """This process gets a signal at the first call of a function."""
    real, sent = getattr(owner, attribute), list[None]()

    def watched(*args: Any, **more: Any) -> Any:
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return real(*args, **more)

    patch.setattr(owner, attribute, watched)


@pytest.fixture(autouse=True)
def hangup_is_heard() -> Iterator[None]:
    """Under nohup the signal is ignored, and a run keeps it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_finishes_what_is_in_hand_saves_and_names_the_command(tmp_path, monkeypatch, capsys, tiny_run):
    """One run that is stopped in every stage, each time by another signal."""
    out = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    command = f"soar run --out '{out}' --resume"
    for owner, called, number, stage, step, arm_steps in (
        (screening, "screen_call", signal.SIGTERM, "loop", 0, 0),
        (pipeline.OuterLoop, "step", signal.SIGHUP, "loop", 1, 0),
        (pipeline, "count_correct", signal.SIGINT, "arms", 2, 0),  # of what is final when the loop ends
        (student, "update", signal.SIGQUIT, "arms", 2, 1),
    ):
        words = ["--resume"] if out.exists() else ["tiny", *SETS]
        with monkeypatch.context() as patch:
            signal_at(patch, owner, called, number)
            assert main(["run", "--out", str(out), *words]) == 128 + number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        error = capsys.readouterr().err
        assert f"{number.name}: the step in hand is finished and saved first; once more stops at once" in error
        assert f"soar: stopped by {number.name}; everything is saved. Continue with: {command}" in error
        paused = json.loads((out / "paused.json").read_text())
        assert paused == {"reason": f"stopped by {number.name}", "stage": stage, "step": step, "resume": command}
        page = (out / "report.html").read_text()
        assert f"Paused: stopped by {number.name}. Continue with: soar run --out &#39;{out}&#39; --resume" in page
        kinds = [row["event"] for row in events(out)] if (out / "metrics.jsonl").exists() else []
        assert (kinds.count("outer_step"), kinds.count("arm_step")) == (step, arm_steps)
    assert main(["run", "--out", str(out), "--resume", "--quiet"]) == 0
    assert outcome(out) == outcome(tiny_run) and not (out / "paused.json").exists()


def test_max_tokens_pauses_and_a_larger_one_goes_on(tmp_path, capsys, tiny_run):
    out = tmp_path / "run"
    assert main(["run", "tiny", "--out", str(out), "--quiet", "--max-tokens", "1", *SETS]) == 3
    assert "limits.max_tokens = 1 reached (" in (said := capsys.readouterr().err)
    assert [row["event"] for row in events(out)] == ["screen", "outer_step", "promotion"]
    tokens = json.loads(max(out.glob("state/*/state.json")).read_text())["data"]["tokens"]
    assert limit_reached(LimitsConfig(max_hours=1.5, max_tokens=1000), 1.49, 999) is None
    assert limit_reached(LimitsConfig(max_hours=1.5), 1.5, 0) == "limits.max_hours = 1.5 reached"
    few = LimitsConfig(max_tokens=9)
    assert limit_reached(few, 0, 9) and resume_command(out, few, 9)[-2:] == "18"
    command = f"soar run --out {out} --resume --max-tokens {tokens + 1}"
    assert f"Continue with: {command}\n" in said
    assert json.loads((out / "paused.json").read_text())["resume"] == command
    assert main(["run", "--out", str(out), "--resume", "--quiet"]) == 3 and len(events(out, "outer_step")) == 1
    assert main([*shlex.split(command)[1:], "--quiet"]) == 3 and len(events(out, "outer_step")) == 2
    assert main(["run", "--out", str(out), "--resume", "--quiet", "--max-tokens", "0"]) == 0
    assert outcome(out) == outcome(tiny_run)


def test_seconds_add_up_over_interruptions_and_a_finished_run_gets_its_summary_again(tmp_path, monkeypatch):
    changes = (*CHANGES, 'arms.run=["base"]')
    clock, real, out = {"now": 0.0}, teacher.OuterLoop.step, tmp_path / "run"

    def step(self: teacher.OuterLoop) -> Any:
        clock["now"] += 100.0
        if clock["now"] == 200.0:
            raise InterruptedError
        return real(self)

    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(teacher.OuterLoop, "step", step)
    with pytest.raises(InterruptedError):
        run_tiny(out, *changes)
    clock["now"] += 5000.0
    summary = run_tiny(out, *changes, resume=True)
    assert summary["wall_seconds"] == {"screen": 0.0, "loop": 200.0, "arms": 0.0, "evaluate": 0.0}
    (out / "summary.json").unlink()
    metrics = (out / "metrics.jsonl").read_bytes()
    assert run_tiny(out, *changes, resume=True) == summary == json.loads((out / "summary.json").read_text())
    assert (out / "metrics.jsonl").read_bytes() == metrics and (out / "hashes.json").is_file()
    monkeypatch.delattr(pipeline, "report_at_the_end")
    with pytest.raises(NameError):
        run_tiny(out, *changes, resume=True)
    assert not (out / "hashes.json").exists(), "of files that are being written again"


CLOSED = (Path(__file__).parent / "cases" / "closed_terminal.txt").read_text(encoding="utf-8")


def test_a_closed_terminal_asks_to_stop_and_nothing_fails_for_want_of_it():
    """The kernel and the shell both send SIGHUP; then every write to the terminal would be an error."""
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGHUP, "")

"""Signals and limits stop a run at a safe point, and what is resumed ends as if it had not been stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from loop_helpers import TINY, events, run_tiny, without_clock

from soar.cli import main
from soar.config import LimitsConfig
from soar.loop import student
from soar.run import measure as held_out
from soar.run import pipeline
from soar.run import screen as screening
from soar.run.folder import RunFolder
from soar.run.interrupts import Stopped, StopRequest, TokenMeter, limit_reached

CHANGES = ("teacher.steps=2", "arms.save_steps=100")
SETS = [part for override in (*TINY, *CHANGES) for part in ("--set", override)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_tiny(out, *CHANGES)
    return result(out)


def result(folder: Path) -> dict[str, Any]:
    names = ("teacher", "student", "arms/hard_only", "arms/pq")
    return {
        "metrics": without_clock(events(folder)),
        "summary": without_clock(json.loads((folder / "summary.json").read_text())),
        **{name: (folder / name / "adapter_model.safetensors").read_bytes() for name in names},
    }


def signal_at(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """This process gets a signal while it works on the named stage for the first time."""
    sent: list[bool] = []

    def once(stage: str) -> None:
        if stage == where and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    def watch(owner: Any, attribute: str, stage: str) -> None:
        real = getattr(owner, attribute)

        def watched(*args: Any, **more: Any) -> Any:
            once(stage)
            return real(*args, **more)

        monkeypatch.setattr(owner, attribute, watched)

    watch(pipeline.OuterLoop, "step", "loop")
    watch(held_out, "count_correct", "evaluate")
    watch(screening, "screen_block", "screen")
    real_arms = pipeline.train_arms

    def arms(*args: Any) -> Any:
        watch(student, "update", "arms")
        return real_arms(*args)

    monkeypatch.setattr(pipeline, "train_arms", arms)
    monkeypatch.setattr(held_out, "BLOCK", 4)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("screen", signal.SIGTERM),
        ("loop", signal.SIGINT),
        ("loop", signal.SIGTERM),
        ("arms", signal.SIGINT),
        ("evaluate", signal.SIGINT),
    ],
)
def test_a_signal_finishes_what_is_in_hand_saves_and_names_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: dict[str, Any],
    where: str,
    number: signal.Signals,
) -> None:
    out = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(patch, where, number)
        assert main(["run", "--out", str(out), *SETS]) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    error = capsys.readouterr().err
    assert f"{number.name}: the step in hand is finished and saved first; once more stops at once" in error
    command = f"soar run --out '{out}' --resume"
    assert f"soar: stopped by {number.name}; everything is saved. Continue with: {command}" in error
    paused = json.loads((out / "paused.json").read_text())
    stage = "loop" if where == "screen" else where
    assert paused == {
        "reason": f"stopped by {number.name}",
        "stage": stage,
        "step": {"screen": 0, "loop": 1}.get(where, 2),
        "resume": command,
    }
    page = (out / "report.html").read_text()
    assert f"Paused: stopped by {number.name}. Continue with: soar run --out &#39;{out}&#39; --resume" in page
    kinds = [row["event"] for row in events(out)] if (out / "metrics.jsonl").exists() else []
    assert kinds.count("outer_step") == paused["step"]
    assert kinds.count("arm_step") == {"arms": 1, "evaluate": 4}.get(where, 0)  # one arm step, of two, of two arms
    assert main(["run", "--out", str(out), "--resume", "--quiet"]) == 0
    assert result(out) == whole
    assert not (out / "paused.json").exists()


def test_the_second_signal_ends_the_process_and_its_workers_at_once(tmp_path: Path) -> None:
    script = """
import multiprocessing, os, signal, sys, time
from soar.run.interrupts import StopRequest

if __name__ == "__main__":
    stop = StopRequest()
    with stop.on_signals(lambda line: print(line, flush=True)):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        os.kill(os.getpid(), signal.SIGTERM)
        print(stop.reason, stop.exit_code, child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("never reached", flush=True)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130
    said, state = done.stdout.splitlines()
    assert said.startswith("SIGTERM: the step in hand")
    assert re.fullmatch(r"stopped by SIGTERM 143 (\d+)", state)
    child = int(state.split()[-1])
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(process: int) -> bool:
    """Whether a process still runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_another_thread_listens_to_no_signal() -> None:
    from threading import Thread

    before = signal.getsignal(signal.SIGINT)
    seen = []

    def listen() -> None:
        with StopRequest().on_signals(print):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_limits_by_hand() -> None:
    assert limit_reached(LimitsConfig(), 1e9, 10**15) is None
    limits = LimitsConfig(max_hours=1.5, max_tokens=1000)
    assert limit_reached(limits, 1.49, 999) is None
    assert limit_reached(limits, 1.5, 0) == "limits.max_hours = 1.5 reached"
    assert limit_reached(limits, 0, 1000) == "limits.max_tokens = 1000 reached (1000 sampled)"


def test_tokens_are_counted_and_the_rest_is_the_samplers_own() -> None:
    class Sampler:
        other = "own"

        def sample(self, count: int, scale: int = 1) -> Any:
            import torch

            return type("Rollouts", (), {"length_B": torch.full((count,), scale)})()

    meter = TokenMeter(Sampler(), 100)
    assert meter.sample(3, scale=5).length_B.tolist() == [5, 5, 5]
    assert meter.sample(2).length_B.tolist() == [1, 1]
    assert (meter.tokens, meter.other) == (117, "own")


def test_max_tokens_pauses_and_a_larger_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    assert main(["run", "--out", str(out), "--quiet", "--max-tokens", "1", *SETS]) == 3
    assert "limits.max_tokens = 1 reached (" in capsys.readouterr().err
    assert [row["event"] for row in events(out)] == ["screen", "outer_step", "promotion"]
    with RunFolder(out, pipeline_config(out), [], resume=True) as folder:
        checkpoint = folder.load()
    assert checkpoint is not None
    tokens = checkpoint.data["tokens"]
    assert tokens > 1
    assert main(["run", "--out", str(out), "--resume", "--quiet"]) == 3  # the recorded limit still stands
    assert main(["run", "--out", str(out), "--resume", "--quiet", "--max-tokens", str(tokens + 1)]) == 3
    assert len(events(out, "outer_step")) == 2
    assert main(["run", "--out", str(out), "--resume", "--quiet", "--max-tokens", "0"]) == 0
    assert result(out) == whole


def pipeline_config(out: Path) -> Any:
    from soar.run.folder import recorded_config

    return recorded_config(out)


def test_max_hours_is_the_time_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    clock = {"now": 0.0}
    real = pipeline.OuterLoop.step

    def step(self: Any) -> Any:
        clock["now"] += 3600.0
        return real(self)

    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(pipeline.OuterLoop, "step", step)
    out = tmp_path / "run"
    with pytest.raises(Stopped, match=r"limits\.max_hours = 1 reached; everything is saved"):
        run_tiny(out, *CHANGES, "limits.max_hours=1")
    with pytest.raises(Stopped):
        run_tiny(out, *CHANGES, "limits.max_hours=1", resume=True)
    run_tiny(out, *CHANGES, "limits.max_hours=1", resume=True)
    assert result(out) == whole


def test_max_promotions_ends_the_loop_and_the_rest_follows(tmp_path: Path, whole: dict[str, Any]) -> None:
    summary = run_tiny(tmp_path / "run", "teacher.steps=2", "arms.save_steps=100", "limits.max_promotions=1")
    assert (summary["promotions"], summary["outer_steps"]) == (1, 1)
    assert summary["loop_end"] == "limits.max_promotions = 1"
    assert set(summary["arms"]) == set(whole["summary"]["arms"])
    assert whole["summary"]["loop_end"] == "teacher.steps = 2"
    assert without_clock(events(tmp_path / "run")[:3]) == whole["metrics"][:3]


TERMINAL = """
import os, pty, signal, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-m", "soar.cli", *sys.argv[2:]])
presses, pressed, seen = int(sys.argv[1]), 0, b""
saved = os.path.join(sys.argv[sys.argv.index("--out") + 1], "state", "000000")  # shown as the loop before it is there
while True:
    try:
        part = os.read(terminal, 65536)
    except OSError:  # the last process that had the terminal has ended
        break
    seen += part
    cue = b"outer loop" if pressed == 0 else b"once more stops at once"
    if pressed < presses and cue in seen and os.path.exists(saved):
        pressed += os.write(terminal, b"\\x03")
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.stdout.buffer.write(seen)
sys.exit(code)
"""

"""`kill -9` anywhere, resumed, equals the run that was never killed: `kill_points.py` does the killing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from kill_points import choose
from loop_helpers import events

POINTS = 50
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs to kill are forked")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], list[dict[str, Any]]]:
    """The folder of the runs, the first line of the program, and one entry for each kill."""
    folder = tmp_path_factory.mktemp("killed")
    lanes = min(2, len(os.sched_getaffinity(0)))
    command = [sys.executable, "tests/kill_points.py", str(folder), str(POINTS), str(lanes), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **both) as program:
        try:
            said, complaint = program.communicate()
        except BaseException:  # a time limit: its forks go with it
            os.killpg(program.pid, signal.SIGKILL)
            raise
    assert program.returncode == 0, complaint[-2000:]
    head, *lines = map(json.loads, said.splitlines())
    return folder, head, lines


def test_the_killed_run_is_not_a_trivial_one(killed: tuple[Path, dict[str, int], list[dict[str, Any]]]) -> None:
    whole = killed[0] / "whole"
    steps = events(whole, "outer_step")
    assert len(steps) == 3
    assert any(row["promoted"] for row in steps)
    assert steps[2]["teacher_kl"] > 0
    assert len(events(whole, "promotion")) == sum(row["promoted"] for row in steps)
    weights = {
        (whole / name / "adapter_model.safetensors").read_bytes()
        for name in ("teacher", "student", "arms/hard_only", "arms/pq")
    }
    assert len(weights) == 4


def test_every_killed_run_ends_as_the_one_that_was_not(
    killed: tuple[Path, dict[str, int], list[dict[str, Any]]],
) -> None:
    _, head, lines = killed
    assert head["chosen"] == len(lines) >= POINTS
    assert len({line["name"] for line in lines}) == head["kinds"]  # each kind of point was hit
    for line in lines:
        assert line["ends"][0] == -signal.SIGKILL, line
        assert line["ends"][-1] == 0, line
        assert line["readable"], line
        assert line["different"] == [], line
    assert sum(line["ends"][:2] == [-signal.SIGKILL] * 2 for line in lines) >= 5  # killed again while resuming


def test_points_lie_in_every_part_of_a_run(killed: tuple[Path, dict[str, int], list[dict[str, Any]]]) -> None:
    names = {line["name"] for line in killed[2]}
    for part in (
        "half of the tensors",
        "half of the lines of metrics.jsonl",
        "half of the lines of hard/screen.jsonl",
        "half of the lines of state/evaluation.jsonl",
        "os.rename state/N.tmp",
        "os.rename state/.latest.json.N.tmp",
        "os.rename .manifest.json.N.tmp",
        "os.rename .summary.json.N.tmp",
        "NativeSampler.sample",
        "soar.loop.student.update",
        "soar.loop.teacher.update",
        "fsync",
    ):
        assert part in names


def test_every_stage_was_killed_in_its_middle(killed: tuple[Path, dict[str, int], list[dict[str, Any]]]) -> None:
    stages = Counter(line["stage"] for line in killed[2])
    assert set(stages) == {"screen", "loop", "arms", "evaluate", "done"}
    assert min(stages.values()) >= 2, stages


def test_choose_takes_each_kind_and_follows_its_seed() -> None:
    names = ["a"] * 30 + ["b"] * 30 + ["c"]
    chosen = choose(names, 10, 1)
    assert len(set(chosen)) == len(chosen) == 10
    assert {names[i] for i in chosen} == {"a", "b", "c"}
    assert choose(names, 10, 1) == chosen != choose(names, 10, 2)

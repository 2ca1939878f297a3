"""On a GPU: a run that is killed and resumed against one that was not. Skipped without one.

Lines are compared for equality first; where a run is not even equal to its own repetition (kernels that add in an order of
their own), the resumed run has to differ from the straight one no more than the repetition does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TINY, events, read_jsonl, without_clock
from safetensors.torch import load_file
from test_resume import CHANGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ADAPTERS = ("teacher", "student", "arms/hard_only", "arms/pq")
SETS = [part for override in (*TINY, *CHANGES, "model.device=cuda") for part in ("--set", override)]

# Ends the process by SIGKILL at the n-th call of the update of the named file.
KILLED = """
import importlib, os, signal, sys
room, calls = importlib.import_module(sys.argv[1]), [int(sys.argv[2])]
real = room.update

def update(*arguments, **named):
    calls[0] -= 1
    if calls[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)

room.update = update
from soar.cli import main
sys.exit(main(sys.argv[3:]))
"""
POINTS = [("soar.loop.teacher", 1), ("soar.loop.student", 6)]
"""Amid the second outer step (before the teacher learns), and amid the students of a later one."""


def run(out: Path, *more: str, killed: tuple[str, int] | None = None) -> int:
    words = ["run", "--quiet", "--out", str(out), *more]
    start = ["-m", "soar.cli"] if killed is None else ["-c", KILLED, killed[0], str(killed[1])]
    root = str(Path(__file__).parents[2])
    places = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}
    return subprocess.run([sys.executable, *start, *words], env=environment, timeout=300).returncode


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in ADAPTERS
        for key, tensor in load_file(out / name / "adapter_model.safetensors").items()
    }


def result(out: Path) -> dict[str, Any]:
    names = ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl")
    return {"metrics": without_clock(events(out)), **{name: read_jsonl(out / name) for name in names}}


def distance(a: Path, b: Path) -> float:
    """Largest difference of two runs' adapters, relative to the largest weight."""
    one, other = weights(a), weights(b)
    largest = max(tensor.abs().max().item() for tensor in one.values())
    return max((one[key] - other[key]).abs().max().item() for key in one) / largest


def newest(out: Path) -> str:
    """Number of the checkpoint in force."""
    return max(path.name for path in (out / "state").glob("00????"))


def killed_and_resumed(out: Path, point: tuple[str, int]) -> tuple[int, bool, bool, int]:
    """Exit code of the killed run, whether it was finished, whether the resumed one went on, and its exit code."""
    code, finished = run(out, *SETS, killed=point), (out / "summary.json").exists()
    before = newest(out)
    resumed = run(out, "--resume")
    return code, finished, newest(out) > before, resumed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, bool, bool, int]]]:
    """A run that nothing interrupts, as `again` the same once more, and those that are killed, all at the same time."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2 + len(POINTS)) as pool:
        whole = [pool.submit(run, folder / name, *SETS) for name in ("straight", "again")]
        cut = {room: pool.submit(killed_and_resumed, folder / room, (room, calls)) for room, calls in POINTS}
        assert [job.result() for job in whole] == [0, 0]
        return folder, {room: job.result() for room, job in cut.items()}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[0].removeprefix("soar."))
def test_a_killed_and_resumed_run_is_as_near_as_a_repeated_one(
    runs: tuple[Path, dict[str, tuple[int, bool, bool, int]]], point: tuple[str, int]
) -> None:
    folder, ends = runs
    straight, again, out = folder / "straight", folder / "again", folder / point[0]
    assert ends[point[0]] == (-signal.SIGKILL, False, True, 0)
    wanted, repeated, found = result(straight), result(again), result(out)
    equal = distance(straight, out)
    print(f"{point[0]}: resumed = straight: {found == wanted}, weights differ by {equal:.2e}; repeated = straight: "
          f"{repeated == wanted}, by {distance(straight, again):.2e}")  # fmt: skip
    assert len(found["metrics"]) == len(wanted["metrics"])
    assert found["hard/train.jsonl"] == wanted["hard/train.jsonl"]
    if repeated == wanted:
        assert found == wanted
        assert equal <= distance(straight, again)
    else:
        first = next(row for row in wanted["metrics"] if row["event"] == "outer_step")
        assert next(row for row in found["metrics"] if row["event"] == "outer_step")["accepted"] == first["accepted"]

"""The same run twice, and a run that was interrupted and continued, give the same numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import easy_problems, events, read_jsonl, run_tiny, without_clock, write_problems

from soar.loop import student, teacher
from soar.run import measure, pipeline
from soar.run.folder import RunFolder

# Teacher and students that move: graded rewards and larger groups, so that few groups are all alike; rewards that differ
# between datasets; a KL term that counts from the second step on.
CHANGES = (
    "reward.questions=6",
    "reward.attempts=4",
    "promotion.tau=-0.6",
    "promotion.window=2",
    "teacher.steps=3",
    "teacher.optimizer.lr=0.003",
    "teacher.optimizer.kl=0.05",
    "student.optimizer.lr=0.01",
    "student.reward=paper",
    "student.attempts=8",
    "student.prompts_per_step=3",
    "arms.save_steps=1",
)


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_problems(tmp_path_factory.mktemp("problems") / "p.jsonl", easy_problems(14, seed=1))
    return f'problems.source="{path}"'


def result(folder: Path) -> dict[str, Any]:
    """Everything a run says, without the clock, and the hashes of its adapters."""
    adapters = {
        name: hashlib.sha256((folder / name / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name in ("teacher", "student", "arms/hard_only", "arms/pq")
    }
    files = ("questions.jsonl", "pq.jsonl", "hard/train.jsonl", "hard/test.jsonl")
    rows = without_clock(events(folder))
    return {
        "metrics": [row for row in rows if row["event"] != "arm_step"],
        # Worker processes train arms at the same time: their events are those of one process, in another order.
        "arms": sorted((row for row in rows if row["event"] == "arm_step"), key=lambda row: (row["arm"], row["step"])),
        "summary": without_clock(json.loads((folder / "summary.json").read_text())),
        "adapters": adapters,
        **{name: read_jsonl(folder / name) for name in files},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, Any]:
    """The result of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_tiny(out, source, *CHANGES)
    return result(out)


def test_the_run_under_test_is_not_a_trivial_one(whole: dict[str, Any]) -> None:
    steps = [row for row in whole["metrics"] if row["event"] == "outer_step"]
    assert [row["promoted"] for row in steps] == [False, True, False]
    assert any(len(set(row["reward_G"])) > 1 for row in steps[:2])
    assert steps[2]["teacher_kl"] > 0
    assert len(set(whole["adapters"].values())) == 4


def test_same_seed_same_numbers(tmp_path: Path, source: str, whole: dict[str, Any]) -> None:
    run_tiny(tmp_path / "again", source, *CHANGES)
    assert result(tmp_path / "again") == whole


def test_another_seed_other_numbers(tmp_path: Path, source: str, whole: dict[str, Any]) -> None:
    run_tiny(tmp_path / "other", source, *CHANGES, "seed=1", "teacher.steps=1", "promotion.window=1")
    first = [
        next(row for row in rows if row["event"] == "outer_step")
        for rows in (whole["metrics"], events(tmp_path / "other"))
    ]
    assert first[0]["reward_G"] != first[1]["reward_G"]
    assert whole["hard/train.jsonl"] != read_jsonl(tmp_path / "other" / "hard" / "train.jsonl")


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Make the run die: amid the second of three steps, in the middle of an arm, of the evaluation."""

    def dies_after(place: Any, name: str, done: Callable[..., Any]) -> None:
        real = getattr(place, name)

        def call(*args: Any, **more: Any) -> Any:
            value = real(*args, **more)
            if done(*args):
                raise Interrupted
            return value

        monkeypatch.setattr(place, name, call)

    if where == "step":
        dies_after(teacher.OuterLoop, "learn", lambda loop, *rest: loop.state.step == 1)
    elif where == "arm":
        dies_after(RunFolder, "save", lambda folder, checkpoint: checkpoint.data["arm_progress"])
    else:
        dies_after(RunFolder, "append", lambda folder, name, rows: name == measure.FILE and "id" in rows[0])
        monkeypatch.setattr(measure, "BLOCK", 4)


@pytest.mark.parametrize(
    ("where", "steps", "updates", "problems"), [("step", 2, 9, 6), ("arm", 0, 3, 6), ("end", 0, 0, 2)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been_and_does_nothing_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    whole: dict[str, Any],
    where: str,
    steps: int,
    updates: int,
    problems: int,
) -> None:
    """steps, updates, problems: what is left of outer steps, of updates of arms or students, of held-out problems."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, where)
        run_tiny(out, source, *CHANGES)
    done = {"steps": 0, "updates": 0, "problems": 0}

    def counted(place: Any, name: str, what: str, size: Callable[..., int]) -> None:
        real = getattr(place, name)

        def call(*args: Any, **more: Any) -> Any:
            done[what] += size(*args)
            return real(*args, **more)

        monkeypatch.setattr(place, name, call)

    counted(teacher.OuterLoop, "step", "steps", lambda *args: 1)
    counted(student, "update", "updates", lambda *args: 1)
    counted(measure, "count_correct", "problems", lambda *args: len(args[2]))
    run_tiny(out, source, *CHANGES, resume=True)
    assert done == {"steps": steps, "updates": updates, "problems": problems}
    assert result(out) == whole


def test_seconds_add_up_over_interruptions_and_a_finished_run_gets_its_summary_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    changes = (source, *CHANGES, "teacher.steps=2", 'arms.run=["base"]')
    clock = {"now": 0.0}
    real = teacher.OuterLoop.step

    def step(self: teacher.OuterLoop) -> Any:
        clock["now"] += 100.0
        return real(self)

    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(teacher.OuterLoop, "step", step)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "step")
        run_tiny(tmp_path / "run", *changes)
    clock["now"] += 5000.0
    summary = run_tiny(tmp_path / "run", *changes, resume=True)
    assert summary["wall_seconds"] == {"screen": 0.0, "loop": 200.0, "arms": 0.0, "evaluate": 0.0}
    (tmp_path / "run" / "summary.json").unlink()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_tiny(tmp_path / "run", *changes, resume=True) == summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

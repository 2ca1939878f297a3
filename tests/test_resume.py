"""The same run twice, and a run that was interrupted and continued, give the same numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import easy_problems, events, read_jsonl, run_tiny, without_clock, write_problems

from soar.loop import student, teacher
from soar.run import measure as held_out
from soar.run import pipeline
from soar.run import screen as screening
from soar.run.checkpoint import Checkpoint
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
    """Make the run die: in screening, after the first of three steps, amid a step, amid an arm, after one, amid the
    evaluation, after it."""

    def die(*args: Any, **more: Any) -> Any:
        raise Interrupted

    if where == "screening":
        real_append = RunFolder.append

        def append(self: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
            real_append(self, name, rows)
            if name == screening.SCREEN_FILE and "id" in rows[0]:
                raise Interrupted

        monkeypatch.setattr(RunFolder, "append", append)
    elif where == "step":
        monkeypatch.setattr(pipeline, "step_lines", die)
    elif where == "midstep":
        real_learn = teacher.OuterLoop.learn

        def learn(self: teacher.OuterLoop, *args: Any) -> Any:
            found = real_learn(self, *args)
            return die() if self.state.step == 1 else found

        monkeypatch.setattr(teacher.OuterLoop, "learn", learn)
    elif where in ("arm", "midarm"):
        real_save = RunFolder.save

        def save(self: RunFolder, checkpoint: Checkpoint) -> None:
            real_save(self, checkpoint)
            progress = checkpoint.data["arm_progress"]
            if progress if where == "midarm" else checkpoint.data["arm_rollouts"]:
                raise Interrupted

        monkeypatch.setattr(RunFolder, "save", save)
    elif where == "midevaluation":
        real_append = RunFolder.append

        def append(self: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
            real_append(self, name, rows)
            if name == held_out.FILE and "id" in rows[0]:
                raise Interrupted

        monkeypatch.setattr(RunFolder, "append", append)
        monkeypatch.setattr(held_out, "BLOCK", 4)
    else:
        monkeypatch.setattr(pipeline, "save_adapter", die)


@pytest.mark.parametrize("where", ["screening", "step", "midstep", "midarm", "arm", "midevaluation", "evaluation"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, whole: dict[str, Any], where: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, where)
        run_tiny(out, source, *CHANGES)
    assert not (out / "summary.json").exists()
    done = {"screening": 0, "step": 1, "midstep": 1}.get(where, 3)
    assert len(events(out, "outer_step") if (out / "metrics.jsonl").exists() else []) == done
    with monkeypatch.context() as patch:
        counted: list[int] = []
        real = teacher.OuterLoop.step
        patch.setattr(teacher.OuterLoop, "step", lambda self: (counted.append(self.state.step), real(self))[1])
        trained: list[int] = []
        real_update = student.update
        patch.setattr(student, "update", lambda *args: (trained.append(0), real_update(*args))[1])
        measured: list[str] = []
        real_count = held_out.count_correct
        patch.setattr(
            held_out,
            "count_correct",
            lambda *args, **more: (measured.extend(p.id for p in args[2]), real_count(*args, **more))[1],
        )
        run_tiny(out, source, *CHANGES, resume=True)
    assert counted == list(range(done, 3))  # nothing that was done is done again
    if where in ("midarm", "arm", "midevaluation", "evaluation"):
        assert len(trained) == {"midarm": 3, "arm": 2}.get(where, 0)
    assert len(measured) == {"midevaluation": 2, "evaluation": 0}.get(where, 6)
    assert result(out) == whole


def test_a_finished_run_can_be_resumed_to_its_summary(tmp_path: Path, source: str) -> None:
    changes = (source, *CHANGES, "teacher.steps=1", "promotion.window=1", 'arms.run=["base"]')
    run_tiny(tmp_path / "run", *changes)
    first = without_clock(json.loads((tmp_path / "run" / "summary.json").read_text()))
    (tmp_path / "run" / "summary.json").unlink()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run_tiny(tmp_path / "run", *changes, resume=True)
    assert without_clock(json.loads((tmp_path / "run" / "summary.json").read_text())) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_wall_seconds_add_up_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
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

"""The same run twice, and a run that was interrupted and continued, give the same numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import easy_problems, events, read_jsonl, run_tiny, without_clock, write_problems

from soar.loop import teacher
from soar.run import pipeline

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


def test_same_seed_same_numbers(tmp_path: Path, source: str, whole: dict[str, Any]) -> None:
    run_tiny(tmp_path / "again", source, *CHANGES)
    assert result(tmp_path / "again") == whole


def test_seconds_add_up_over_interruptions_and_a_finished_run_gets_its_summary_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    changes = (source, *CHANGES, "teacher.steps=2", 'arms.run=["base"]')
    clock = {"now": 0.0}
    real = teacher.OuterLoop.step

    def step(self: teacher.OuterLoop) -> Any:
        clock["now"] += 100.0
        if clock["now"] == 200.0:
            raise InterruptedError
        return real(self)

    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(teacher.OuterLoop, "step", step)
    with pytest.raises(InterruptedError):
        run_tiny(tmp_path / "run", *changes)
    clock["now"] += 5000.0
    summary = run_tiny(tmp_path / "run", *changes, resume=True)
    assert summary["wall_seconds"] == {"screen": 0.0, "loop": 200.0, "arms": 0.0, "evaluate": 0.0}
    (tmp_path / "run" / "summary.json").unlink()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_tiny(tmp_path / "run", *changes, resume=True) == summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

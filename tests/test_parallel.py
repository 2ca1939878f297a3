"""Work that is cut into pieces gives the same numbers whoever does the pieces, in whatever order they are done."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import easy_problems, events, run_tiny, write_problems
from test_resume import result

from soar.loop.parallel import Task, Tick, no_tick
from soar.run import pipeline
from soar.run.checkpoint import Checkpoint
from soar.run.folder import RunFolder

SMALL = (
    "model.chunk=2",
    "teacher.steps=1",
    "promotion.tau=-1",
    "student.optimizer.lr=0.01",
    "student.attempts=8",
    "arms.save_steps=1",
    "arms.steps=3",
    "arms.questions=4",
    'arms.run=["base","hard_only","ps","pq","base_t"]',
)


class Contrary:
    """Worker processes acted in this process. The newest piece is done first, and everything travels as bytes."""

    size = 2
    meter: Any = None

    def __init__(self, env: Any) -> None:
        self.env = env

    def stream(
        self, work: Callable[..., Any], common: Task, queue: deque[tuple[Any, Task]], tick: Tick = no_tick
    ) -> Iterator[tuple[Any, Any]]:
        while queue:
            key, task = queue.pop()
            sent = pickle.loads(pickle.dumps((common, task)))
            yield key, pickle.loads(pickle.dumps(work(self.env, tick, *sent[0], *sent[1])))


class Interrupted(Exception):
    """Stands for a killed process."""


@contextmanager
def contrary(config: Any, env: Any, folder: Any, say: Any) -> Iterator[Contrary]:
    yield Contrary(env)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_problems(tmp_path_factory.mktemp("problems") / "p.jsonl", easy_problems(14, seed=1))
    return f'problems.source="{path}"'


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: str) -> dict[str, Any]:
    """The result of a run without worker processes."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run_tiny(out, source, *SMALL)
    assert {row["arm"] for row in events(out, "arm_step")} == {"hard_only", "pq", "base_t"}
    return result(out)


def test_pieces_done_in_another_order_give_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, alone: dict[str, Any]
) -> None:
    monkeypatch.setattr(pipeline, "open_parallel", contrary)
    run_tiny(tmp_path / "run", source, *SMALL)
    assert result(tmp_path / "run") == alone


@pytest.mark.parametrize("workers_first", [True, False])
def test_arms_that_are_left_in_the_middle_go_on_with_or_without_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, alone: dict[str, Any], workers_first: bool
) -> None:
    real_save = RunFolder.save

    def save(self: RunFolder, checkpoint: Checkpoint) -> None:
        real_save(self, checkpoint)
        if checkpoint.data["arm_progress"]:
            raise Interrupted

    if workers_first:
        monkeypatch.setattr(pipeline, "open_parallel", contrary)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "save", save)
        run_tiny(tmp_path / "run", source, *SMALL)
    monkeypatch.undo()
    if not workers_first:
        monkeypatch.setattr(pipeline, "open_parallel", contrary)
    run_tiny(tmp_path / "run", source, *SMALL, resume=True)
    assert result(tmp_path / "run") == alone

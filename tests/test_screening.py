"""Screening: what its event counts, that it goes on where it stopped, and what its evidence is tied to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_helpers import events, hard_problems, read_jsonl, run_tiny, tiny_config

from soar import screening
from soar.data import DataError
from soar.prompts import get_format
from soar.record import RunFolder
from soar.screening import screen, screen_event
from soar.types import Problem, Screening


def test_screen_event_by_hand() -> None:
    config = tiny_config("student.attempts=2", "screen.attempts=100", "screen.max_successes=2")
    counts = {"a": 0, "b": 0, "c": 1, "d": 2, "e": 3, "f": 30, "g": 99, "h": 100}
    found = {name: Screening(successes, 100, truncated=5) for name, successes in counts.items()}
    event = screen_event(found, config)
    histogram = {"0": 2, "<= 2 %": 2, "2-10 %": 1, "10-50 %": 1, "50-100 %": 1, "all": 1}
    assert (event["candidates"], event["hard"], event["attempts"], event["histogram"]) == (8, 4, 100, histogram)
    assert list(event["histogram"]) == list(histogram)
    assert event["pass_rate"] == pytest.approx(235 / 800)
    assert event["truncated_share"] == pytest.approx(0.05)
    rates = [count / 100 for count in counts.values()]
    assert event["frac_all_wrong"] == pytest.approx(sum((1 - p) ** 2 for p in rates) / 8)
    assert event["frac_all_right"] == pytest.approx(sum(p**2 for p in rates) / 8)
    assert event["frac_mixed"] == pytest.approx(sum(2 * p * (1 - p) for p in rates) / 8)


def test_screen_event_claims_nothing_where_nothing_was_attempted() -> None:
    event = screen_event({"a": Screening(0, 0), "b": Screening(0, 0)}, tiny_config("screen.attempts=0"))
    assert (event["candidates"], event["hard"]) == (2, 2)
    assert [event[name] for name in screening.SHARES] == [None] * 5
    assert sum(event["histogram"].values()) == 0


def test_a_run_can_trust_the_file(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "screen.attempts=0", "teacher.steps=1", "arms.run=[]")
    (event,) = events(tmp_path / "run", "screen")
    assert (event["hard"], event["pass_rate"]) == (12, None)
    assert not (tmp_path / "run" / "hard" / "screen.jsonl").exists()
    assert {row["attempts"] for row in read_jsonl(tmp_path / "run" / "hard" / "train.jsonl")} == {0}


class Attempted:
    """Takes the place of `count_correct`: problem hard-i is solved i times, and truncated once."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(
        self, examiner: Any, stack: Any, problems: list[Problem], *rest: Any, on_block: Any, **more: Any
    ) -> None:
        for first in range(0, len(problems), 3):
            part = problems[first : first + 3]
            self.asked += [problem.id for problem in part]
            correct_H = [int(problem.id.removeprefix("hard-")) for problem in part]
            on_block(part, np.array([correct_H]), np.ones((1, len(part)), int))


def test_screening_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempted, done = Attempted(), []
    monkeypatch.setattr(screening, "count_correct", attempted)
    config, problems, evidence = tiny_config(), hard_problems(8), {"model": "m", "attempts": 4}
    with RunFolder(tmp_path, config, []) as folder:
        screen(None, problems[:5], config, folder, evidence, 1, done.append)  # type: ignore[arg-type]
        assert attempted.asked == [p.id for p in problems[:5]]
        found = screen(None, problems, config, folder, evidence, 1, done.append)  # type: ignore[arg-type]
        assert attempted.asked == [p.id for p in problems]
        assert done == [0, 3, 2, 5, 3]
        assert found == {f"hard-{i}": Screening(i, 4, 1) for i in range(8)}
        rows = folder.rows("hard/screen.jsonl")
        assert rows[0] == {"evidence": evidence}
        assert rows[1:] == [{"id": f"hard-{i}", "successes": i, "attempts": 4, "truncated": 1} for i in range(8)]
        with pytest.raises(DataError, match="model: screened with 'm', this run uses 'other'"):
            screen(None, problems, config, folder, {**evidence, "model": "other"}, 1, done.append)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        "screen.attempts=5",
        "screen.temperature=0.5",
        "student.sampling.max_tokens=9",
        "student.sampling.top_p=0.9",
        "seed=1",
        "problems.verifier=number",
        "model.path=other",
    ],
)
def test_evidence_is_tied_to_what_made_it(change: str) -> None:
    def key(*overrides: str) -> dict[str, Any]:
        return screening.evidence_key(tiny_config(*overrides), None, get_format("tiny"), "hash")  # type: ignore[arg-type]

    differing = {name for name in key() if key()[name] != key(change)[name]}
    assert differing == {change.partition("=")[0].rpartition(".")[2].replace("path", "model")}

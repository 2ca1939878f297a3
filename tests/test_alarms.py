"""Alarms are raised when their condition begins, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from soar.report.alarms import (
    CORRECT_SHARE,
    DISTINCT_SHARE,
    DIVERSITY_SHARE,
    LOGPROB_GAP,
    STILL_STEPS,
    screen_alarms,
    step_alarms,
)
from soar.report.questions import step_vendi


def step(number: int = 5, **changes: Any) -> dict[str, Any]:
    """The event of a healthy step, with changes; `clipped` and `student_gap` are of its students."""
    students = {
        "completions/clipped_ratio": changes.pop("clipped", 0.1),
        "logprob_gap": changes.pop("student_gap", 0.001),
    }
    return {
        "event": "outer_step",
        "step": number,
        "reward_G": [0.1, 0.2, None],
        "reward_mean": 0.15,
        "distinct_share": 0.9,
        "vendi": 12.0,
        "sampled": 20,
        "rejected": {"truncated": 2},
        "teacher_logprob_gap": 0.001,
        "teacher_grad_norm": 0.5,
        "student_last": students,
        **changes,
    }


def kinds(*arguments: Any, **named: Any) -> list[str]:
    return [row["kind"] for row in step_alarms(*arguments, **named)]


CONDITIONS = {
    "teacher collapse": ({"distinct_share": DISTINCT_SHARE - 0.01}, {"distinct_share": DISTINCT_SHARE}),
    "truncation": ({"clipped": 0.51}, {"clipped": 0.5}),
    "teacher truncation": ({"rejected": {"truncated": 11}}, {"rejected": {"truncated": 10}}),
    "log-prob gap of the teacher": ({"teacher_logprob_gap": LOGPROB_GAP * 1.01}, {"teacher_logprob_gap": LOGPROB_GAP}),
    "log-prob gap of the students": ({"student_gap": LOGPROB_GAP * 1.01}, {"student_gap": LOGPROB_GAP}),
}


def test_a_healthy_step_raises_nothing() -> None:
    assert step_alarms(step(), [], []) == []
    nothing = {"teacher_logprob_gap": None, "teacher_grad_norm": None, "student_gap": None, "rejected": {}}
    assert step_alarms(step(**nothing), [], [step(4)]) == []


@pytest.mark.parametrize("kind", CONDITIONS)
def test_an_alarm_is_raised_beyond_its_limit_once_while_it_lasts(kind: str) -> None:
    ill, well = CONDITIONS[kind]
    assert kinds(step(**well), [], []) == []
    (alarm,) = step_alarms(step(7, **ill), [], [step(6, **well)])
    assert (alarm["event"], alarm["kind"], alarm["step"]) == ("alarm", kind, 7)
    assert kinds(step(8, **ill), [], [step(6, **well), step(7, **ill)]) == []
    assert kinds(step(9, **ill), [], [step(7, **ill), step(8, **well)]) == [kind]


def test_diversity_is_compared_with_the_first_step() -> None:
    first, limit = step(0), DIVERSITY_SHARE * 12.0
    assert kinds(step(1, vendi=limit), [], [first]) == []
    (alarm,) = step_alarms(step(1, vendi=limit - 0.1), [], [first])
    assert alarm["kind"] == "teacher diversity"
    assert "as diverse as 5.9 unrelated ones, those of its first step were as 12.0" in alarm["message"]
    assert kinds(step(2, vendi=1.0), [], [first, step(1, vendi=1.0)]) == []  # it lasts
    assert kinds(step(2, vendi=1.0), [], [first, step(1)]) == ["teacher diversity"]
    assert kinds(step(0, vendi=1.0), [], []) == []  # there is nothing to compare it with yet
    assert kinds(step(1, vendi=1.0), [], [step(0, vendi=None)]) == []  # begun by a version that did not record it


def test_questions_that_become_alike_though_none_is_repeated() -> None:
    """What the distinct share cannot see: one form with other numbers in it."""
    subjects = ["apples in a basket", "the angle of two lines", "a train to Oslo", "prime factors", "a die", "old maps"]
    varied = [f"What follows for {subject} after {7 * i} days?" for i, subject in enumerate(subjects)]
    varied += [f"{subject}: prove or refute claim {i}" for i, subject in enumerate(subjects)]
    alike = [f"Ann has {i} apples and Bob has 3. How many apples do they have together?" for i in range(12)]
    assert len(set(varied)) == len(set(alike)) == 12
    first, later = step(0, vendi=step_vendi(varied)), step(1, vendi=step_vendi(alike))
    assert kinds(later, [], [first]) == ["teacher diversity"]
    assert kinds(step(1, vendi=step_vendi(varied[::-1])), [], [first]) == []


def test_a_teacher_without_gradient_for_some_steps() -> None:
    still = [step(i, reward_G=[0.25, 0.25, None]) for i in range(6)]
    zero = [step(i, teacher_grad_norm=0.0) for i in range(6)]
    for rows in (still, zero, [still[0], zero[1], still[2], zero[3], zero[4]]):
        raised = [kinds(row, [], rows[:i]) for i, row in enumerate(rows)]
        assert raised == [[]] * (STILL_STEPS - 1) + [["no teacher gradient"]] + [[]] * (len(rows) - STILL_STEPS)
    broken = [still[0], still[1], step(2), still[3], still[4]]
    assert [kinds(row, [], broken[:i]) for i, row in enumerate(broken)] == [[]] * 5
    paid = [step(i, reward_G=[0.25, 0.25, None], teacher_reward_G=[0.0, 1.0, None]) for i in range(3)]
    assert kinds(paid[2], [], paid[:2]) == [], "what the teacher was paid decides"
    assert kinds(still[2], [], still[:2], learns=False) == []  # teacher.reward = "none" is no accident


def test_reward_without_correctness_needs_an_oracle_and_a_reward() -> None:
    def rows(correct: int, count: int = 20) -> list[dict[str, Any]]:
        return [{"question": "q", "correct": i < correct} for i in range(count)]

    limit = int(CORRECT_SHARE * 20)
    assert kinds(step(), rows(limit), []) == []
    (alarm,) = step_alarms(step(), rows(limit - 1), [])
    assert alarm["kind"] == "reward without correctness"
    assert "mean reward +0.1500 though only 1 of 20 answers of the teacher are correct" in alarm["message"]
    assert kinds(step(reward_mean=0.0), rows(0), []) == []
    assert kinds(step(reward_mean=None), rows(0), []) == []
    assert kinds(step(), [{"question": "q"}], []) == []


def test_screening_that_is_cut_off() -> None:
    assert screen_alarms({"truncated_share": 0.5}) == []
    assert screen_alarms({"truncated_share": None}) == []
    (alarm,) = screen_alarms({"truncated_share": 0.75})
    assert (alarm["kind"], alarm["step"]) == ("truncation", None)
    assert alarm["message"].startswith("75 % of the attempts in screening hit the token budget")

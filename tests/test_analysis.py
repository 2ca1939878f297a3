"""Diversity and quality of questions, on sets whose figures are known; alarms, which are raised when a condition begins."""

import math
from typing import Any

import numpy as np
import pytest

from soar.report import alarms
from soar.report.alarms import hashed_ngrams, step_vendi, vendi_score


def test_vendi_score_counts_kinds():
    kinds = np.eye(5)
    assert vendi_score(kinds) == pytest.approx(5)
    # Three of one kind and one of another: exp of the entropy of (3/4, 1/4), however many axes the vectors have.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi_score(np.repeat(np.eye(2), [300, 100], axis=0)) == pytest.approx(math.exp(entropy))
    # Two texts with similarity c: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    pair = np.array([[1.0, 0.0], [c, math.sqrt(1 - c * c)]])
    assert vendi_score(pair) == pytest.approx(math.exp(-sum(x * math.log(x) for x in ((1 + c) / 2, (1 - c) / 2))))
    near = hashed_ngrams(["What is 3 + 4?", "what is 3 + 4?", "What is 3 + 5?", "Name a prime above ninety.", ""])
    near = near @ near.T
    assert near[0, 1] == pytest.approx(1) and 0.5 < near[0, 2] < 0.99 and abs(near[0, 3]) < 0.3
    assert step_vendi(["a b c"] * 5) == step_vendi(["", ""]) == 1.0
    assert step_vendi(["x" * 1_000_000, "\ud800\x00\u202e"]) == pytest.approx(2.0, abs=0.1)


def step(number: int = 5, clipped: float = 0.1, student_gap: float | None = 0.001, **changes: Any) -> dict[str, Any]:
    """The event of a healthy step, with changes; `clipped` and `student_gap` are of its students."""
    event = {"event": "outer_step", "step": number, "reward_G": [0.1, 0.2, None], "reward_mean": 0.15, "vendi": 12.0}
    event |= {"distinct_share": 0.9, "sampled": 20, "rejected": {"truncated": 2}, "teacher_logprob_gap": 0.001}
    students = {"completions/clipped_ratio": clipped, "logprob_gap": student_gap}
    return {**event, "teacher_grad_norm": 0.5, "student_last": students, **changes}


def kinds(*arguments: Any, **named: Any) -> list[str]:
    return [row["kind"] for row in alarms.step_alarms(*arguments, **named)]


GAP = alarms.LOGPROB_GAP
CONDITIONS = {
    "teacher collapse": ({"distinct_share": alarms.DISTINCT_SHARE - 0.01}, {"distinct_share": alarms.DISTINCT_SHARE}),
    "truncation": ({"clipped": 0.51}, {"clipped": 0.5}),
    "teacher truncation": ({"rejected": {"truncated": 11}}, {"rejected": {"truncated": 10}}),
    "log-prob gap of the teacher": ({"teacher_logprob_gap": GAP * 1.01}, {"teacher_logprob_gap": GAP}),
    "log-prob gap of the students": ({"student_gap": GAP * 1.01}, {"student_gap": GAP}),
    "teacher diversity": ({"vendi": alarms.DIVERSITY_SHARE * 12.0 - 0.1}, {"vendi": alarms.DIVERSITY_SHARE * 12.0}),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_an_alarm_is_raised_beyond_its_limit_once_while_it_lasts(kind):
    ill, well = CONDITIONS[kind]
    first = step(0)
    assert kinds(step(**well), [], [first]) == []
    (alarm,) = alarms.step_alarms(step(7, **ill), [], [first, step(6, **well)])
    assert (alarm["event"], alarm["kind"], alarm["step"]) == ("alarm", kind, 7)
    assert kinds(step(8, **ill), [], [first, step(6, **well), step(7, **ill)]) == []
    assert kinds(step(9, **ill), [], [first, step(7, **ill), step(8, **well)]) == [kind]


def test_a_teacher_without_gradient_for_some_steps():
    nothing = {"teacher_logprob_gap": None, "teacher_grad_norm": None, "student_gap": None, "rejected": {}}
    assert alarms.step_alarms(step(**nothing, vendi=None), [], [step(4)]) == []
    still = [step(i, reward_G=[0.25, 0.25, None]) for i in range(6)]
    zero = [step(i, teacher_grad_norm=0.0) for i in range(6)]
    for rows in (still, zero, [still[0], zero[1], still[2], zero[3], zero[4]]):
        raised = [kinds(row, [], rows[:i]) for i, row in enumerate(rows)]
        begun = alarms.STILL_STEPS - 1
        assert raised == [[]] * begun + [["no teacher gradient"]] + [[]] * (len(rows) - 1 - begun)
    broken = [still[0], still[1], step(2), still[3], still[4]]
    assert [kinds(row, [], broken[:i]) for i, row in enumerate(broken)] == [[]] * 5
    paid = [step(i, reward_G=[0.25, 0.25, None], teacher_reward_G=[0.0, 1.0, None]) for i in range(3)]
    assert kinds(paid[2], [], paid[:2]) == [], "what the teacher was paid decides"
    assert kinds(still[2], [], still[:2], learns=False) == []  # teacher.reward = "none" is no accident


def test_screening_that_is_cut_off():
    assert alarms.screen_alarms({"truncated_share": 0.5}) == alarms.screen_alarms({"truncated_share": None}) == []
    (alarm,) = alarms.screen_alarms({"truncated_share": 0.75})
    assert (alarm["kind"], alarm["step"]) == ("truncation", None)
    assert alarm["message"].startswith("75% of the attempts in screening hit the token budget")

    def rows(correct: int) -> list[dict[str, Any]]:
        return [{"question": "q", "correct": i < correct} for i in range(20)]

    limit = int(alarms.CORRECT_SHARE * 20)
    (alarm,) = alarms.step_alarms(step(), rows(limit - 1), [])
    assert alarm["kind"] == "reward without correctness"
    assert "mean reward +0.1500 though only 1 of 20 answers of the teacher are correct" in alarm["message"]
    for event, questions in ((step(), rows(limit)), (step(reward_mean=0.0), rows(0)), (step(), [{"question": "q"}])):
        assert kinds(event, questions, []) == []

"""One outer step with students of known gains: reward, advantages, promotion, failures, all worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loop_helpers import ScriptedLoop, UpdateLog, skills, tiny_config

from soar.config import Config
from soar.loop import teacher

NAN = float("nan")


def settings_of(*overrides: str) -> Config:
    """3 datasets of 4 questions, 2 repeats, all 8 hard problems as reward questions, greedy, window 1, no promotion."""
    common = ("reward.mode=greedy", "reward.attempts=1", "reward.questions=8", "promotion.tau=9")
    plain = "teacher.optimizer.normalize_advantages=false"
    return tiny_config(*common, plain, *overrides)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> UpdateLog:
    """What the teacher's update is given."""
    found = UpdateLog(datasets=3)
    monkeypatch.setattr(teacher, "update", found)
    return found


def test_known_gains_give_the_known_reward_and_advantages(log: UpdateLog) -> None:
    loop = ScriptedLoop(settings_of(), [[[4, 6], [2, 2], [0, 1]]])
    loop.state.baseline = skills([2.0])
    (event, *more), rows = loop.step()
    assert more == []
    assert (event["baseline_pass_rate"], event["best_pass_rate"]) == (2 / 8, 6 / 8)
    # Gains in eighths: (2, 4), (0, 0), (-2, -1).
    assert event["reward_G"] == [3 / 8, 0.0, -1.5 / 8]
    assert event["reward_se_G"] == pytest.approx([1 / 8, 0.0, 0.5 / 8])
    assert event["reward_mean"] == pytest.approx(0.5 / 8)
    assert [row["reward"] for row in rows] == [3 / 8] * 4 + [0.0] * 4 + [-1.5 / 8] * 4
    (advantage_G_n,) = log.advantages
    # Each reward minus the mean of the other two: 3 + 0.75, 0 - 0.75, -1.5 - 1.5.
    wanted = torch.tensor([3.75, -0.75, -3.0]) / 8
    assert torch.allclose(advantage_G_n, wanted[:, None].expand(3, 4), atol=1e-7)
    assert advantage_G_n.sum().abs() < 1e-6


def test_the_promoted_student_is_the_one_with_the_best_validation(log: UpdateLog) -> None:
    """Three promotions, to students that solve 3, 6 and 2 of the 8 hard problems: the second is PS. None is seen twice."""
    skill_S_G_R = [[[3, 3]] * 3, [[6, 6]] * 3, [[2, 2]] * 3]
    loop = ScriptedLoop(settings_of("promotion.tau=-9", "reward.questions=4"), skill_S_G_R)
    assert loop.validate() == [] and loop.state.best is None
    told = []
    for _ in range(3):
        loop.step()
        told += [(row["step"], row["pass_rate"], row["best"]) for row in loop.validate() + loop.validate()]
    assert told == [(0, 3 / 8, True), (1, 6 / 8, True), (2, 2 / 8, False)]
    assert loop.state.best is not None and loop.state.best.tensors["skill"].item() == 6
    assert loop.state.baseline.tensors["skill"].item() == 2
    loop.state.promotions -= 1  # a person refused it: nothing to look at
    assert loop.validate() == []


def test_a_failed_student_is_left_out(log: UpdateLog) -> None:
    failed = [[[True, False], [False, False], [True, True]]]
    loop = ScriptedLoop(settings_of(), [[[8, 2], [4, 0], [8, 8]]], failed)
    (event, *more), rows = loop.step()
    assert more == []
    assert event["reward_G"] == [2 / 8, 2 / 8, None]
    assert event["reward_se_G"] == [None, pytest.approx(2 / 8), None]
    assert (event["reward_mean"], event["failed_students"], event["best_pass_rate"]) == (2 / 8, 3, 4 / 8)
    assert {row["reward"] for row in rows if row["dataset"] == 2} == {None}
    assert torch.equal(log.advantages[0], torch.zeros(3, 4))


def test_a_student_that_diverges_only_when_measured_is_left_out(log: UpdateLog) -> None:
    loop = ScriptedLoop(settings_of("promotion.tau=-9"), [[[NAN, 3], [1, 1], [1, 1]]])
    (event, promotion), _ = loop.step()
    assert event["reward_G"] == [3 / 8, 1 / 8, 1 / 8]
    assert event["failed_students"] == 1
    assert (promotion["dataset"], promotion["repeat"]) == (0, 1)


def test_all_failed_is_an_alarm_and_leaves_the_teacher_alone(log: UpdateLog) -> None:
    failed = [np.ones((3, 2)), np.zeros((3, 2))]
    loop = ScriptedLoop(settings_of(), [[[8, 8]] * 3, [[8, 8]] * 3], failed)
    before = loop.state.teacher.digest()
    (event, alarm), _ = loop.step()
    assert event["reward_G"] == [None] * 3
    assert (event["reward_mean"], event["best_pass_rate"], event["teacher_kl"]) == (None, None, None)
    assert (alarm["event"], alarm["kind"], alarm["step"]) == ("alarm", "all students failed", 0)
    assert log.advantages == [] == loop.state.window and loop.state.teacher.digest() == before
    events, _ = loop.step()
    assert [e["event"] for e in events] == ["outer_step"]
    assert loop.state.window == [1.0] and len(log.advantages) == 1


def test_reward_none_trains_no_teacher(log: UpdateLog) -> None:
    (event,), _ = ScriptedLoop(settings_of("teacher.reward=none"), [[[1, 2], [3, 4], [5, 6]]]).step()
    assert not log.advantages and event["teacher_grad_norm"] is None
    assert event["reward_G"] == [1.5 / 8, 3.5 / 8, 5.5 / 8]


def test_promotion_copies_the_chosen_slice_and_its_questions(log: UpdateLog) -> None:
    skill = [[[1, 2], [6, 4], [3, 3]]]
    loop = ScriptedLoop(settings_of("promotion.tau=0"), skill)
    before = loop.state.baseline.digest()
    (event, promotion), rows = loop.step()
    population = loop.populations[0].stack
    digests = [population.digest(p) for p in range(6)]
    assert loop.state.baseline.digest() == digests[3] != before and digests.index(digests[3]) == 3
    where = {"event": "promotion", "step": 0, "dataset": 1, "repeat": 1, "questions": 4, "student": digests[3]}
    assert promotion == {**where, "reward": 5 / 8, "pass_rate": 4 / 8, "baseline_pass_rate": 0.0}
    assert event["promoted"] is True
    assert loop.state.pq == [
        {"question": f"question 0 1 {i}", "answer": str(i), "step": 0, "dataset": 1, "reward": 5 / 8} for i in range(4)
    ]
    assert [row for row in rows if row["dataset"] == 1] == loop.state.pq
    population.tensors["skill"][3] = 99.0
    assert loop.state.baseline.digest() == digests[3]


def test_the_window_restarts_and_the_baseline_moves(log: UpdateLog) -> None:
    # Gains of 1/8 a step over whatever the baseline is; a window of 2 promotes at steps 1 and 3, never at 2.
    skill = [[[gain, gain]] * 3 for gain in (1, 1, 2, 2)]
    loop = ScriptedLoop(settings_of("promotion.tau=0.05", "promotion.window=2"), skill)
    found = [loop.step()[0] for _ in range(4)]
    assert [step[0]["promoted"] for step in found] == [False, True, False, True]
    assert [step[0]["baseline_pass_rate"] for step in found] == [0.0, 0.0, 1 / 8, 1 / 8]
    assert [step[0]["window_mean"] for step in found] == [None, 1 / 8, None, 1 / 8]
    assert loop.state.promotions == 2
    assert [row["step"] for row in loop.state.pq] == [1] * 4 + [3] * 4


def test_the_baseline_is_measured_once_on_a_question_while_it_stands(log: UpdateLog) -> None:
    config = settings_of("reward.questions=5", "promotion.window=2", "promotion.tau=0")
    loop = ScriptedLoop(config, [[[3, 3]] * 3] * 4)
    drawn, asked_baseline, before = [], [], 0
    for _ in range(3):
        drawn.append({p.id for p in loop.draw_reward_questions()})
        loop.step()
        calls = loop.env.asked[before:]  # type: ignore[attr-defined]
        before += len(calls)
        asked_baseline.append(set(calls[0]) if len(calls) == 2 else set())
    assert all(len(questions) == 5 for questions in drawn) and drawn[0] != drawn[1]
    assert asked_baseline == [drawn[0], drawn[1] - drawn[0], drawn[2]]  # promoted after step 1: measured again
    assert loop.state.student_rollouts == sum(map(len, asked_baseline)) + 3 * 6 * 5


def test_reward_questions_are_drawn_without_replacement_from_the_training_half() -> None:
    loop, draws = ScriptedLoop(settings_of("reward.questions=6"), []), []
    for loop.state.step in range(20):
        draws.append([p.id for p in loop.draw_reward_questions()])
        assert draws[-1] == [p.id for p in loop.draw_reward_questions()] and len(set(draws[-1])) == 6
    assert {i for draw in draws for i in draw} == {p.id for p in loop.hard_train}
    assert ScriptedLoop(settings_of("reward.questions=80"), []).draw_reward_questions() == loop.hard_train


def test_a_question_that_cannot_be_scored_counts_neither_for_the_student_nor_for_the_baseline(log: UpdateLog) -> None:
    loop = ScriptedLoop(settings_of(), [[[4, 4]] * 3], unscorable=["hard-6", "hard-7"])
    loop.state.baseline = skills([3.0])
    event = loop.step()[0][0]
    assert event["baseline_pass_rate"] == pytest.approx(3 / 6)
    assert event["reward_G"] == pytest.approx([1 / 6] * 3)


def test_the_teacher_update_gets_the_step_learning_rate(log: UpdateLog) -> None:
    optimizer = ("schedule=cosine", "warmup_steps=2", "lr=0.5")
    config = settings_of("teacher.steps=4", *(f"teacher.optimizer.{key}" for key in optimizer))
    loop = ScriptedLoop(config, [[[1, 2], [3, 4], [5, 6]]] * 4)
    for _ in range(4):
        loop.step()
    assert log.rates == pytest.approx([0.25, 0.5, 0.5, 0.25])

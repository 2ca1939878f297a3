"""One outer step with students of known gains, the corners of the promotion rule, and what becomes of the teacher's texts;
the teacher never meets a hard problem."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from loop_helpers import Says, ScriptedLoop, easy_problems, skills, tiny_config
from tables import cases
from world_text import ANSWER_MARK

from soar import seeds
from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.engine.policy import Backbone
from soar.engine.rollouts import Request, Rollouts
from soar.loop import teacher
from soar.loop.promotion import decide
from soar.loop.rollout import RolloutEnv
from soar.loop.teacher import OuterLoop, new_state
from soar.loop.write import TeacherError, row_of, teacher_prompt, up_to_questions, vote
from soar.problems.domain import load_domain
from soar.problems.pool import VerifierPool
from soar.types import Problem, Reason, Rejection, Trial


def settings_of(*overrides: str) -> Config:
    """3 datasets of 4 questions, 2 repeats, all 8 hard problems as reward questions, greedy, window 1, no promotion."""
    common = ("reward.mode=greedy", "reward.questions=8", "promotion.tau=9")
    plain = "teacher.optimizer.normalize_advantages=false"
    return tiny_config(*common, plain, *overrides)


def test_known_gains_give_the_known_reward_and_advantages(log):
    loop = ScriptedLoop(settings_of("model.chunk=4"), [[[4, 6], [2, 2], [0, 1]]])
    loop.state.baseline = skills([2.0])
    (event,), rows = loop.step()
    assert (event["baseline_pass_rate"], event["best_pass_rate"]) == (2 / 8, 6 / 8)
    # Gains in eighths: (2, 4), (0, 0), (-2, -1).
    assert event["reward_G"] == [3 / 8, 0.0, -1.5 / 8]
    assert event["reward_se_G"] == pytest.approx([1 / 8, 0.0, 0.5 / 8])
    assert (event["reward_mean"], event["distinct_share"]) == (pytest.approx(0.5 / 8), 3 / 4)
    sampling = loop.config.student.sampling
    assert teacher.measured_at(loop.config, 5) == (1, sampling.model_copy(update={"temperature": 0.0}))
    assert teacher.measured_at(settings_of("reward.mode=sampled"), 5) == (5, sampling)
    assert event["student_rollouts"] == 8 * (1 + 6)  # one greedy attempt each, whatever reward.attempts says
    assert [row["reward"] for row in rows] == [3 / 8] * 4 + [0.0] * 4 + [-1.5 / 8] * 4
    (advantage_G_n,) = log.advantages
    # Each reward minus the mean of the other two: 3 + 0.75, 0 - 0.75, -1.5 - 1.5.
    wanted = torch.tensor([3.75, -0.75, -3.0]) / 8
    assert torch.allclose(advantage_G_n, wanted[:, None].expand(3, 4), atol=1e-7)
    (event,), _ = ScriptedLoop(settings_of("teacher.reward=none"), [[[1, 2], [3, 4], [5, 6]]]).step()
    assert len(log.advantages) == 1 and event["teacher_grad_norm"] is None  # not trained again
    assert event["reward_G"] == [1.5 / 8, 3.5 / 8, 5.5 / 8]


def test_the_promoted_student_is_the_one_with_the_best_validation(log):
    """Promotions of students that solve 3, 6, 6 and 2 of the 8 hard problems: the second is PS. None is seen twice."""
    skill_S_G_R = [[[skill, skill]] * 3 for skill in (3, 6, 6, 2)]
    loop = ScriptedLoop(settings_of("promotion.tau=-9", "reward.questions=4"), skill_S_G_R)
    assert loop.validate() == [] and loop.state.best is None
    told = []
    for _ in range(4):
        loop.step()
        told += [(row["step"], row["pass_rate"], row["best"]) for row in loop.validate() + loop.validate()]
    assert told == [(0, 3 / 8, True), (1, 6 / 8, True), (2, 6 / 8, False), (3, 2 / 8, False)]
    assert loop.state.best is not None and loop.state.best.tensors["skill"].item() == 6
    assert loop.state.baseline.tensors["skill"].item() == 2
    loop.state.promotions -= 1  # a person refused it: nothing to look at
    assert loop.validate() == []


def test_a_failed_student_is_left_out(log):
    failed = [[[True, False], [False, False], [True, True]]]
    loop = ScriptedLoop(settings_of(), [[[8, 2], [4, 0], [8, 8]]], failed)
    (event,), rows = loop.step()
    assert event["reward_G"] == [2 / 8, 2 / 8, None]
    assert event["reward_se_G"] == [None, pytest.approx(2 / 8), None]
    assert (event["reward_mean"], event["failed_students"], event["best_pass_rate"]) == (2 / 8, 3, 4 / 8)
    assert {row["reward"] for row in rows if row["dataset"] == 2} == {None}
    assert torch.equal(log.advantages[0], torch.zeros(3, 4))
    loop = ScriptedLoop(settings_of("promotion.tau=-9"), [[[float("nan"), 3], [1, 1], [1, 1]]])
    (event, promotion), _ = loop.step()
    assert (event["reward_G"], event["failed_students"]) == ([3 / 8, 1 / 8, 1 / 8], 1)
    assert (promotion["dataset"], promotion["repeat"]) == (0, 1)


def test_all_failed_is_an_alarm_and_leaves_the_teacher_alone(log):
    failed = [np.ones((3, 2)), np.zeros((3, 2))]
    loop = ScriptedLoop(settings_of(), [[[8, 8]] * 3, [[8, 8]] * 3], failed)
    before = loop.state.teacher.digest()
    (event, alarm), _ = loop.step()
    assert event["reward_G"] == [None] * 3
    assert (event["reward_mean"], event["best_pass_rate"], event["teacher_kl"]) == (None, None, None)
    assert (alarm["event"], alarm["kind"], alarm["step"]) == ("alarm", "all students failed", 0)
    assert log.advantages == [] == loop.state.window and loop.state.teacher.digest() == before
    (event,), _ = loop.step()
    assert (event["event"], loop.state.window, len(log.advantages)) == ("outer_step", [1.0], 1)


def test_promotion_copies_the_chosen_slice_and_its_questions(log):
    skill = [[[1, 2], [6, 4], [3, 3]]]
    loop = ScriptedLoop(settings_of("promotion.tau=0"), skill)
    before = loop.state.baseline.digest()
    (_, promotion), rows = loop.step()
    population = loop.populations[0].stack
    digests = [population.digest(p) for p in range(6)]
    assert loop.state.baseline.digest() == digests[3] != before and digests.index(digests[3]) == 3
    where = {"event": "promotion", "step": 0, "dataset": 1, "repeat": 1, "questions": 4, "student": digests[3]}
    assert promotion == {**where, "reward": 5 / 8, "pass_rate": 4 / 8, "baseline_pass_rate": 0.0}
    assert loop.state.pq == [
        {"question": f"question 0 1 {i % 3}", "answer": str(i), "step": 0, "dataset": 1, "reward": 5 / 8}
        for i in range(4)
    ]
    assert [row for row in rows if row["dataset"] == 1] == loop.state.pq
    population.tensors["skill"][3] = 99.0
    assert loop.state.baseline.digest() == digests[3]


def test_the_window_restarts_the_baseline_moves_and_the_learning_rate_is_that_of_the_step(log):
    # Gains of 1/8 a step over whatever the baseline is; a window of 2 promotes at steps 1 and 3, never at 2.
    skill = [[[gain, gain]] * 3 for gain in (1, 1, 2, 2)]
    optimizer = (f"teacher.optimizer.{key}" for key in ("schedule=cosine", "warmup_steps=2", "lr=0.5"))
    rates = ("student.optimizer.lr=0.8", "student.lr_decay_per_promotion=0.5", *optimizer)
    loop = ScriptedLoop(settings_of("promotion.tau=0.05", "promotion.window=2", "teacher.steps=4", *rates), skill)
    found = [loop.step()[0] for _ in range(4)]
    assert [step[0]["promoted"] for step in found] == [False, True, False, True]
    assert [step[0]["baseline_pass_rate"] for step in found] == [0.0, 0.0, 1 / 8, 1 / 8]
    assert [step[0]["window_mean"] for step in found] == [None, 1 / 8, None, 1 / 8]
    assert loop.state.promotions == 2
    assert [row["step"] for row in loop.state.pq] == [1] * 4 + [3] * 4
    assert log.rates == pytest.approx([0.25, 0.5, 0.5, 0.25])
    plans, config = loop.plans(loop.question_sets[-1])
    assert (config.optimizer.lr, {len(plan.batches) for plan in plans}) == (0.2, {3})
    places = itertools.product(range(3), range(2))
    assert [plan.seed for plan in plans] == [seeds.derive(0, "student", 4, k, j) for k, j in places]


def test_the_baseline_is_measured_once_on_a_question_while_it_stands(log):
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
    loop = ScriptedLoop(settings_of("promotion.tau=0"), [[[4, 4]] * 3, [[5, 5]] * 3], unscorable=["hard-6", "hard-7"])
    loop.state.baseline = skills([4.0])
    (equal,), _ = loop.step()
    assert (equal["reward_G"], equal["promoted"]) == ([0.0] * 3, False), "nothing is gained by rounding"
    (event, _), _ = loop.step()
    assert event["baseline_pass_rate"] == pytest.approx(4 / 6)
    assert event["reward_G"] == pytest.approx([1 / 6] * 3)


def test_reward_questions_are_drawn_without_replacement_from_the_training_half():
    loop, draws = ScriptedLoop(settings_of("reward.questions=6"), []), []
    for loop.state.step in range(20):
        draws.append([p.id for p in loop.draw_reward_questions()])
        assert draws[-1] == [p.id for p in loop.draw_reward_questions()] and len(set(draws[-1])) == 6
    assert {i for draw in draws for i in draw} == {p.id for p in loop.hard_train}
    assert ScriptedLoop(settings_of("reward.questions=80"), []).draw_reward_questions() == loop.hard_train


@pytest.mark.parametrize("case", cases("teacher", "decision"), ids=lambda case: case[0])
def test_corners_worked_out_by_hand(case):
    _, history, rewards, rates, tau, size, expected, reason = case
    cells = ((k, j, rate) for k, row in enumerate(rates) for j, rate in enumerate(row))
    trials = [Trial(k, j, 0.5 if r is None else r, r is None) for k, j, r in cells]  # a failed one would be chosen
    decision = decide(history, rewards, trials, tau, size)
    assert (decision.promote, decision.reason) == (expected is not None, reason)
    assert [decision.dataset, decision.repeat] == (expected or [None, None])
    assert decision.window_mean == (sum(history[-size:]) / size if len(history) >= size else None)


def teacher_text(problem: Problem) -> str:
    """What the embedded world's teacher writes for a problem."""
    return f"{problem.question} {ANSWER_MARK} {problem.answer}"


def writer(env: RolloutEnv, texts: Sequence[str], config: Config) -> tuple[OuterLoop, Says]:
    sampler = Says(env.backbone, texts)
    scripted = RolloutEnv(env.backbone, sampler, env.fmt, env.verifier, env.scheme)
    return OuterLoop(scripted, easy_problems(4, seed=9), config, new_state(scripted, config)), sampler


def test_pairs_fill_the_datasets_in_order_and_keep_their_rollouts(env):
    problems = easy_problems(12)
    bad = f"no mark here {ANSWER_MARK}"
    texts = [text for problem in problems for text in (bad, teacher_text(problem))]
    loop, _ = writer(env, texts, tiny_config())
    question_sets = loop.write()
    asked = [[(p.question, p.answer) for p in problems[k * 4 : k * 4 + 4]] for k in range(3)]
    assert [[(p.question, p.answer) for p in row] for row in question_sets.problems_G_Q] == asked
    said = question_sets.rollouts.texts(env.backbone)
    assert ["".join(text.split()) for text in said] == ["".join(teacher_text(p).split()) for p in problems]
    assert (question_sets.sampled, question_sets.rejected) == (24, {"empty": 12})


@pytest.mark.parametrize("part", ["text", "question"])
def test_written_answers_take_a_gradient_unless_the_loss_is_on_the_question(env, part):
    learnt, problems = [], easy_problems(12)
    for answer in ("1", "2"):
        texts = [teacher_text(replace(problem, answer=answer)) for problem in problems]
        loop, _ = writer(env, texts, tiny_config(f"teacher.loss_on={part}"))
        loop.learn(question_sets := loop.write(), [1.0, 0.0, -1.0])
        learnt.append(loop.state.teacher.digest())
    assert (learnt[0] == learnt[1]) == (part == "question")
    question_sets.rollouts.logprob_B_T.fill_(-1.0)
    texts = (asked := up_to_questions(env.backbone, question_sets)).texts(env.backbone)
    assert [text.split() for text in texts] == [[*p.question.split(), ANSWER_MARK] for p in problems]
    assert asked.logprob_B_T.count_nonzero(1).tolist() == asked.length_B.tolist(), "0 on padding"
    other = replace(question_sets, problems_G_Q=[[replace(p, question="arranged") for p in problems]])
    assert torch.equal(up_to_questions(env.backbone, other).length_B, question_sets.rollouts.length_B)


@pytest.mark.parametrize(("said", "kept"), cases("teacher", "vote"))
def test_votes_give_the_answer_and_leave_out_what_is_too_easy_or_in_dispute(env, said, kept):
    config, (problem,), other = tiny_config("teacher.votes=5"), easy_problems(1), Rejection(Reason.EMPTY, "x")
    loop, _ = writer(env, [f"{ANSWER_MARK} {answer}" if answer != "-" else "no" for answer in said], config)
    first, voted = vote(loop.env, config, [other, problem], 3, {})
    assert (first, voted.name if isinstance(voted, Rejection) else voted.answer) == (other, kept) and loop.env.tokens
    row = {"question": problem.question, "answer": kept, "agreement": said.count("7") / 5}
    assert isinstance(voted, Rejection) or row_of(voted) == row
    assert "agreement" not in row_of(replace(problem, extra={"agreement": math.nan})), "a column is no vote"
    (strict,) = vote(loop.env, tiny_config("teacher.votes=5", "teacher.agreement=0.7"), [problem], 3, {})
    assert isinstance(strict, Problem) == (said == "77767")
    (any_share,) = vote(loop.env, tiny_config("teacher.votes=5", "teacher.agreement=0"), [problem], 3, {})
    assert isinstance(any_share, Problem) == (kept == "7" or said == "78654")
    for wrong in ("teacher.votes=1", "teacher.agreement=0.85"):  # of five votes four are 0.8 and all are too easy
        with pytest.raises(ConfigError, match=r"no number of . votes is that share or more and at most 0\.9"):
            tiny_config("teacher.votes=5", wrong)


def test_votes_are_read_as_the_domain_reads_answers_and_refused_where_gold_answers_are_none(env, tmp_path, monkeypatch):
    config, choices = tiny_config("teacher.votes=4"), load_domain(f"{ROOT}/examples/multiple_choice.py:DOMAIN")
    loop, _ = writer(env, [], config)
    (function := tmp_path / "own.py").write_text("def grade(completions, **_):\n    return [1.0]\n")
    for refuses in (f"{function}:grade", load_domain("code")):
        with (
            VerifierPool(refuses, workers=1) as loop.env.verifier,
            pytest.raises(ConfigError, match=r"teacher\.votes = 4: "),
        ):
            teacher_prompt(loop.env, config)
    texts = [r"\boxed{B) copper}", r"\boxed{C}", r"\boxed{\text{B}}", "no"]
    monkeypatch.setattr(loop.env, "sample", lambda *_: (None, texts))
    with VerifierPool(choices, workers=1) as loop.env.verifier:
        wanted = [replace(choices.examples[0], answer="B) copper")]
        assert vote(loop.env, config, list(choices.examples), 3, {}) == wanted
    loop.env.verifier, texts[:3] = VerifierPool("math"), [r"\boxed{\text{isosceles}}"] * 3
    assert vote(loop.env, config, easy_problems(1), 3, {})[0].name == "unparsable_answer"


@pytest.mark.parametrize(("said", "kept", "why"), cases("teacher", "spelling"))
def test_the_commonest_spelling_is_the_label_and_what_equals_it_agrees(env, monkeypatch, said, kept, why):
    loop, texts = writer(env, [], tiny_config())[0], [rf"\boxed{{{s}}}" for s in said]
    monkeypatch.setattr(loop.env, "sample", lambda *_: (None, texts))
    loop.env.verifier = VerifierPool("math")
    (voted,) = vote(loop.env, tiny_config("teacher.votes=5"), easy_problems(1), 3, {})
    assert (voted.name if isinstance(voted, Rejection) else voted.answer) == kept, why


def test_questions_are_written_until_enough_of_them_are_voted_for(env, monkeypatch):
    monkeypatch.setattr(env.verifier, "check", lambda *_: pytest.fail("votes are not for the answer as written"))
    texts = [*map(teacher_text, easy_problems(2)), f"{ANSWER_MARK} 8", f"{ANSWER_MARK} 8"]  # two of four votes for 8
    loop, sampler = writer(env, texts, tiny_config("teacher.votes=4"))
    question_sets = loop.write()
    assert [[problem.answer for problem in problems] for problems in question_sets.problems_G_Q] == [["8"] * 4] * 3
    lengths = [len(env.backbone.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
    assert loop.state.spent["teacher"] == sum(lengths[i % 4] for i in range(sampler.said)), "votes are counted"


def test_a_question_is_voted_on_once_in_a_step(env):
    """Written four times, in two calls: one label, from one set of votes."""
    (problem,), config = easy_problems(1), tiny_config("teacher.votes=4")
    other, labels = replace(problem, answer="1"), dict[str, Problem | Rejection]()
    loop, sampler = writer(env, [f"{ANSWER_MARK} {answer}" for answer in "8878"], config)
    outcomes = vote(loop.env, config, [problem, other], 3, labels)
    spent = loop.env.tokens
    outcomes += vote(loop.env, config, [other, problem], 4, labels)
    assert [p.answer for p in outcomes if isinstance(p, Problem)] == ["8"] * 4
    assert sampler.said == 4 and loop.env.tokens == spent > 0


def test_teacher_error_names_reasons_and_last_outputs(env):
    texts = [f"output {i % 10} \x1b[2J" for i in range(7)]
    loop, sampler = writer(env, texts, tiny_config("teacher.max_tries=3"))
    with pytest.raises(TeacherError) as caught:
        loop.write()
    message = str(caught.value)
    assert "wrote 0 acceptable pairs of 12 in 36 samples (rejected: no_answer 36)" in message
    lengths = [len(env.backbone.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
    assert sampler.said == 36 and loop.state.spent["teacher"] == 5 * sum(lengths) + lengths[0]
    shown = message.partition("Its last outputs:\n")[2].split("\n")[:5]
    assert all(line.startswith("  '") for line in shown) and len({*shown}) == 5
    assert "\x1b" not in message and "problems.format" in message and "arms.tokens where preparing" in message


def test_a_question_or_prompt_without_room_for_an_answer_is_refused(env):
    short = easy_problems(1)[0]
    room = env.backbone.context - len(env.prompt(short))

    def loop(tokens: int) -> OuterLoop:
        config = tiny_config(f"student.sampling.max_tokens={tokens}", "teacher.max_tries=1")
        return writer(env, [teacher_text(short)], config)[0]

    assert len(loop(room).write().problems_G_Q) == 3
    with pytest.raises(TeacherError, match="too_long 12"):
        loop(room + 1).write()
    config = tiny_config(f"teacher.sampling.max_tokens={env.backbone.context}")
    with pytest.raises(ConfigError, match=r"teacher\.sampling\.max_tokens = \d+: with the teacher prompt of \d+ tok"):
        writer(env, ["x"], config)


def found_in(prompts: Sequence[Sequence[int]], problems: Sequence[Problem], backbone: Backbone) -> set[str]:
    """Ids of the problems whose question stands in one of the decoded prompts, whatever the spacing."""
    texts = ["".join(text.split()) for text in backbone.tokenizer.batch_decode([list(ids) for ids in set(prompts)])]
    return {p.id for p in problems if any("".join(p.question.split()) in text for text in texts)}


def test_the_teacher_never_receives_a_hard_problem_and_a_leak_would_be_found(env, monkeypatch):
    """Two real outer steps, the second with a leak: the teacher's prompts and training rows, and the students' prompts."""
    config, backbone, sample = tiny_config(), env.backbone, env.sampler.sample
    hard = get_world("tiny").problems("hard", 12, 0)
    loop = OuterLoop(env, hard, config, new_state(env, config))
    asked, others, trained = list[tuple[int, ...]](), list[tuple[int, ...]](), list[tuple[int, ...]]()
    real = teacher.update

    def record(stack: Any, request: Request) -> Rollouts:
        (asked if stack is loop.state.teacher else others).extend(request.prompts_B)
        return sample(stack, request)

    def spy(backbone: Any, optimizer: Any, rollouts: Rollouts, *rest: Any) -> Any:
        assert optimizer.stack is loop.state.teacher
        trained.extend(rollouts.prompts)
        return real(backbone, optimizer, rollouts, *rest)

    monkeypatch.setattr(env.sampler, "sample", record)
    monkeypatch.setattr(teacher, "update", spy)
    loop.step()
    assert asked and len(trained) == 12
    assert found_in(asked, hard, backbone) == found_in(trained, hard, backbone) == set()
    assert len(found_in(others, hard, backbone)) >= 4  # the reward questions are found where they belong
    loop.prompt = [*backbone.tokenizer.encode(hard[3].question, add_special_tokens=False), *loop.prompt]
    loop.step()
    assert len(trained) == 24 and loop.state.promotions == 2
    assert found_in(asked, hard, backbone) == found_in(trained, hard, backbone) == {hard[3].id}

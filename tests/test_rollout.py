"""RolloutBatch: the right problem is put to the right policy, and every attempt has its own seed."""

from __future__ import annotations

import pytest
import torch
from helpers import random_stack as stack_of
from helpers import some_problems, tiny_backbone, tiny_examiner

from soar.config import SamplingConfig
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.types import Problem, Verdict

SAMPLING = SamplingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def env() -> RolloutEnv:
    return tiny_examiner(tiny_backbone())


def texts(env: RolloutEnv, batch: RolloutBatch) -> list[str]:
    return batch.rollouts.texts(env.backbone)


def test_rows_are_policy_question_attempt(env: RolloutEnv) -> None:
    stack = stack_of(env.backbone, 2)
    problems = [some_problems(3), some_problems(3, first=5)]
    batch = env.rollout(stack, problems, 4, [1, 2], SAMPLING)
    assert batch.count == 24
    assert batch.reward_P_Q_N.shape == batch.solved_P_Q_N.shape == batch.valid_P_Q_N.shape == (2, 3, 4)
    written = texts(env, batch)
    for p in range(2):
        for q in range(3):
            for n in range(4):
                row = (p * 3 + q) * 4 + n
                problem = problems[p][q]
                assert batch.rollouts.prompts[row] == tuple(env.prompt(problem))
                solved = problem.answer in written[row].split()
                assert batch.solved_P_Q_N[p, q, n].item() is solved is batch.verdicts[row].solved
                assert batch.reward_P_Q_N[p, q, n].item() == float(solved)
    assert 0 < batch.solved_P_Q_N.sum() < 24
    torch.testing.assert_close(batch.pass_rate_P(), batch.solved_P_Q_N.float().mean((1, 2)))


def test_an_attempt_does_not_depend_on_the_other_problems(env: RolloutEnv) -> None:
    problems = some_problems(5)
    stack = stack_of(env.backbone, 2)
    whole = texts(env, env.rollout(stack, [problems, problems], 3, [7, 8], SAMPLING))
    order = [4, 1, 3]
    part = env.rollout(stack.select([1]), [[problems[i] for i in order]], 2, [8], SAMPLING)
    expected = [whole[15 + i * 3 + n] for i in order for n in range(2)]
    assert texts(env, part) == expected
    assert whole[:15] != whole[15:]


def test_a_problem_that_comes_twice_is_tried_anew(env: RolloutEnv) -> None:
    problem = some_problems(1)[0]
    batch = texts(env, env.rollout(None, [[problem, problem]], 4, [3], SAMPLING))
    once = texts(env, env.rollout(None, [[problem]], 4, [3], SAMPLING))
    assert batch[:4] == once != batch[4:]
    assert len(set(batch)) == 8


def test_unscorable_attempts_are_left_out_of_the_mean(env: RolloutEnv) -> None:
    problems = [*some_problems(3), Problem("no gold", "a b", "?")]
    batch = env.rollout(None, [problems], 6, [1], SAMPLING)
    assert batch.valid_P_Q_N[0].all(-1).tolist() == [True, True, True, False]
    assert batch.pass_rate_P().item() == pytest.approx(batch.solved_P_Q_N[0, :3].float().mean().item())
    nothing = env.rollout(None, [[problems[3]]], 2, [1], SAMPLING)
    assert nothing.pass_rate_P().tolist() == [0.0]


def test_truncated_and_failed_are_counted(env: RolloutEnv) -> None:
    stack = stack_of(env.backbone, 2)
    stack.tensors["model.layers.0.mlp.up_proj.B"][1] = torch.nan
    batch = env.rollout(stack, [some_problems(2)] * 2, 5, [1, 2], SAMPLING)
    ended = batch.rollouts.ended_B.view(2, 10)
    assert batch.failed_P.tolist() == [False, True]
    assert batch.truncated == int((~ended[0]).sum()) > 0


def test_paper_rewards_come_from_verdict_and_text() -> None:
    env = tiny_examiner(tiny_backbone(), "paper")
    batch = env.rollout(None, [some_problems(4)], 8, [2], SAMPLING)
    points = {Verdict.CORRECT: 120.0, Verdict.WRONG: 10.0, Verdict.NO_ANSWER: 0.0}
    assert batch.reward_P_Q_N.flatten().tolist() == [points[verdict] for verdict in batch.verdicts]
    assert {Verdict.CORRECT, Verdict.WRONG} <= set(batch.verdicts)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_threads_that_share_one_policy_change_nothing(adapter: str) -> None:
    env = tiny_examiner(tiny_backbone(adapter=adapter))
    stack = stack_of(env.backbone, 1)
    problems = [some_problems(5)]
    alone = env.rollout(stack, problems, 4, [3], SAMPLING)
    shared = env.rollout(stack, problems, 4, [3], SAMPLING, threads=3)
    assert shared.rollouts.prompts == alone.rollouts.prompts
    assert texts(env, shared) == texts(env, alone)
    assert shared.verdicts == alone.verdicts
    assert torch.equal(shared.rollouts.length_B, alone.rollouts.length_B)
    torch.testing.assert_close(shared.rollouts.logprob_B_T, alone.rollouts.logprob_B_T, rtol=0, atol=5e-5)


def test_a_verifier_gets_the_columns_of_the_problems(env: RolloutEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[object]] = {}

    def check(completions: list[str], golds: list[str], columns: dict[str, list[object]]) -> list[Verdict]:
        seen.update(columns)
        return [Verdict.WRONG] * len(completions)

    monkeypatch.setattr(env.verifier, "check", check)
    first, second = some_problems(2)
    easy = Problem(first.id, first.question, first.answer, {"level": "easy"})
    env.rollout(None, [[easy, second]], 2, [1], SAMPLING)
    assert seen == {"level": ["easy", "easy", None, None], "question": [first.question] * 2 + [second.question] * 2}

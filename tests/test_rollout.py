"""RolloutBatch: the right problem is put to the right policy, and every attempt has its own seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import random_stack as stack_of
from helpers import some_problems, tiny_backbone, tiny_examiner

from soar.config import SamplingConfig
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.types import Problem

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
    for row, (p, q, n) in enumerate(itertools.product(range(2), range(3), range(4))):
        assert batch.rollouts.prompts[row] == tuple(env.prompt(problems[p][q]))
        solved = problems[p][q].answer in written[row].split()
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


def test_a_policy_that_fails_is_told(env: RolloutEnv) -> None:
    stack = stack_of(env.backbone, 2)
    stack.tensors["model.layers.0.mlp.up_proj.B"][1] = torch.nan
    batch = env.rollout(stack, [some_problems(2)] * 2, 5, [1, 2], SAMPLING)
    assert batch.failed_P.tolist() == [False, True]


def test_threads_that_share_one_policy_change_nothing(env: RolloutEnv) -> None:
    stack = stack_of(env.backbone, 1)
    problems = [some_problems(5)]
    alone = env.rollout(stack, problems, 4, [3], SAMPLING)
    shared = env.rollout(stack, problems, 4, [3], SAMPLING, threads=3)
    assert shared.rollouts.prompts == alone.rollouts.prompts
    assert texts(env, shared) == texts(env, alone)
    assert shared.verdicts == alone.verdicts
    assert torch.equal(shared.rollouts.length_B, alone.rollouts.length_B)
    torch.testing.assert_close(shared.rollouts.logprob_B_T, alone.rollouts.logprob_B_T, rtol=0, atol=5e-5)

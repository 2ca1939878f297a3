"""What the teacher is paid for, and a dense reward for students that needs no verifier (`likelihood`).

`grounded`, the measured improvement, is the method's. `learnability` looks at the baseline student's attempts at the
written questions instead. `shuffled` is grounded on questions whose answers are permuted within their dataset: a null in
which nothing can be learned. Students are promoted by their measured improvement with each of them. Left out: a duplicate
penalty, mixtures of rewards.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soar import seeds
from soar.backends.base import score
from soar.config import Config, ConfigError
from soar.engine.policy import AdapterStack
from soar.engine.rollouts import Rollouts
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.write import QuestionSets
from soar.types import mean, standard_error

Rewards = list[float | None]  # None where nothing could be measured


def grounded(gains_G: list[list[float]]) -> tuple[Rewards, Rewards]:
    """(reward_G, standard_error_G): the grounded reward of each dataset, and its error over the repeats.

    gains_G: pass rates of its valid students minus the baseline's. None of no gain, and for the error of fewer than two.
    """
    return list(map(mean, gains_G)), list(map(standard_error, gains_G))


def shuffle_answers(question_sets: QuestionSets, seed: int, step: int) -> QuestionSets:
    """Every question with the answer of another of its dataset.

    One cycle goes through a dataset, so that none keeps its own; equal answers may still meet.
    """
    sets = []
    for k, problems in enumerate(question_sets.problems_G_Q):
        order = seeds.generator(seed, "shuffled", step, k).permutation(len(problems)).tolist()
        answers = {here: problems[there].answer for here, there in zip(order, [*order[1:], order[0]], strict=True)}
        sets.append([replace(problem, answer=answers[i]) for i, problem in enumerate(problems)])
    return replace(question_sets, problems_G_Q=sets)


def intrinsic(
    env: RolloutEnv, baseline: AdapterStack, step: int, question_sets: QuestionSets, config: Config
) -> tuple[Rewards, Rewards, RolloutBatch]:
    """(reward_U of all G * Q questions, reward_G: means per dataset, the attempts that were measured): learnability.

    Intrinsic-T: 0 if the baseline student never solves the question in intrinsic.attempts, else 1 - success rate (Absolute
    Zero's proposer). None where nothing could be measured.
    """
    questions = [problem for problems in question_sets.problems_G_Q for problem in problems]
    attempts, seed = config.intrinsic.attempts, seeds.derive(config.seed, "intrinsic", step)
    batch = env.rollout(baseline, [questions], attempts, [seed], config.student.sampling, threads=env.threads)
    reward_U = [1.0 - rate if rate else rate for rate in success_rates(batch)]  # 0 and None stay
    n = len(question_sets.problems_G_Q[0])
    reward_G_Q = [[r for r in reward_U[first : first + n] if r is not None] for first in range(0, len(reward_U), n)]
    return reward_U, list(map(mean, reward_G_Q)), batch


def success_rates(batch: RolloutBatch) -> Rewards:
    """Share of the first policy's scorable attempts at each question that are right; None where none can be scored."""
    return [None if math.isnan(rate) else rate for rate in batch.pass_rate_P_Q()[0].tolist()]


def answer_marks(fmt: Any) -> tuple[str, str]:
    """What stands before and behind an answer in a completion. Raises ConfigError for a format without a mark."""
    if fmt.answer_style == "boxed":
        return "\\boxed{", "}"
    if not fmt.answer_marks:
        need = "need prompts whose answer stands behind one mark (boxed or marker)"
        raise ConfigError(f"the arm likelihood and reward.mode = likelihood or forced {need}")
    return fmt.answer_marks[-1], ""


def likelihood(
    env: RolloutEnv, stack: AdapterStack, batch: RolloutBatch, policies: Sequence[int] = (), forced: bool = False
) -> Tensor:
    """Mean probability [len(policies), Q, N] of the gold answer's tokens behind a student's own reasoning, on the CPU.

    The completion is cut behind its last answer mark, the gold answer put there, and read by the student itself (VeriFree,
    arXiv 2505.21493; the mean over tokens is RLPR's, arXiv 2506.18254). Where there is no mark: 0, who never answers earns
    nothing; forced: one is put behind the text, so that finishing alone earns nothing (budget forcing, arXiv 2501.19393).
    policies: those of the batch that it is asked of; none given: all.
    """
    policies = policies or range(stack.policies)
    N = batch.reward_P_Q_N.shape[2]
    rows_per_policy = len(batch.problems_P_Q[0]) * N
    chosen = batch.rollouts.select([p * rows_per_policy + row for p in policies for row in range(rows_per_policy)])
    golds = [problem.answer for p in policies for problem in batch.problems_P_Q[p] for _ in range(N)]
    rows = zip(chosen.prompts, chosen.texts(env.backbone), golds, strict=True)
    answered = [with_gold(env, prompt, text, gold, forced) for prompt, text, gold in rows]
    ids_B = [torch.tensor(ids, dtype=torch.long) for ids, _ in answered]
    tokens_B_T = pad_sequence(ids_B, batch_first=True, padding_value=env.backbone.pad_id)
    length_B, ended_B = torch.tensor([len(ids) for ids in ids_B]), torch.ones(len(ids_B), dtype=torch.bool)
    asked = Rollouts(chosen.prompts, tokens_B_T, length_B, torch.zeros(tokens_B_T.shape), ended_B, ~ended_B)
    share_B_T = score(env.backbone, stack.select(list(policies)), asked, batch.temperature).exp()
    share_B = torch.zeros(len(ids_B))
    for row, (ids, answer) in enumerate(answered):
        if ids:
            share_B[row] = share_B_T[row, len(ids) - answer : len(ids)].mean()
    return share_B.view(len(policies), -1, N)


def with_gold(env: RolloutEnv, prompt: Sequence[int], text: str, gold: str, forced: bool) -> tuple[list[int], int]:
    """Tokens of a completion with the gold answer behind its last mark, and how many of them are the answer's.

    ([], 0) where it has no mark, unless forced, or where the context has no room.
    """
    before, behind = answer_marks(env.fmt)
    if forced and before not in text:
        text = f"{text}\n{before}"
    if before not in text:
        return [], 0
    encode = partial(env.backbone.tokenizer.encode, add_special_tokens=False)
    reasoning = text[: text.rfind(before) + len(before)]
    space = "" if before.endswith("{") else " "
    ids = encode(f"{reasoning}{space}{gold}{behind}")
    # One token may hold the end of the reasoning and the beginning of the answer: it is the answer's.
    common = takewhile(lambda pair: pair[0] == pair[1], zip(encode(reasoning), ids, strict=False))
    start = sum(1 for _ in common)
    ids += [] if behind else [min(env.backbone.end_ids)]
    return (ids, len(ids) - start) if len(prompt) + len(ids) <= env.backbone.context else ([], 0)

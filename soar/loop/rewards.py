"""What the teacher is paid for: measured improvement, or one of the rewards that it is compared with. And a dense reward for
students that needs no verifier, `likelihood`.

`grounded` is the method's. `learnability` looks at the baseline student's attempts at the written questions instead.
`shuffled` is grounded on questions whose answers are permuted within their dataset: a null in which nothing can be learned.
With every reward the loop trains and measures the same students and promotes by their measured improvement; only what the
teacher learns from differs. Left out: a duplicate penalty, and any mixture of rewards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from soar import seeds
from soar.backends.base import score
from soar.config import Config, ConfigError
from soar.engine.policy import AdapterStack, Backbone
from soar.engine.rollouts import Rollouts
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.write import QuestionSets
from soar.types import Problem


def grounded(
    improvement_G_R: Sequence[Sequence[float]], valid_G_R: Sequence[Sequence[bool]]
) -> tuple[list[float | None], list[float | None]]:
    """(reward_G, standard_error_G): the grounded reward of each dataset, and its error over the repeats.

    improvement_G_R: pass rate of each student minus the baseline's; valid_G_R: False for a failed trial, which is left
    out. None where no repeat is valid, and for the error where fewer than two are.
    """
    rewards: list[float | None] = []
    errors: list[float | None] = []
    for values, valid in zip(improvement_G_R, valid_G_R, strict=True):
        kept = [float(value) for value, good in zip(values, valid, strict=True) if good]
        rewards.append(statistics.fmean(kept) if kept else None)
        errors.append(statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else None)
    return rewards, errors


def learnability(success: float) -> float:
    """Intrinsic-T: 0 if the student never solves the question, else 1 - success rate (Absolute Zero's proposer)."""
    return 0.0 if success == 0 else 1.0 - success


@dataclass(frozen=True)
class Payment:
    """The teacher's rewards of one step.

    reward_U: per unit of credit in writing order, G datasets or all G * Q questions; None where nothing could be measured;
    empty when the teacher is not paid. reward_G: means per dataset. rollouts, tokens: what measuring them took.
    """

    reward_U: list[float | None]
    reward_G: list[float | None]
    rollouts: int = 0
    tokens: int = 0


def deal(question_sets: QuestionSets, config: Config, step: int) -> QuestionSets:
    """The questions as students get them: as written, or (`shuffled`) each with the answer of another of its dataset, by one
    cycle, so that none keeps its own; equal answers may still meet."""
    if config.teacher.reward != "shuffled":
        return question_sets
    sets = []
    for k, problems in enumerate(question_sets.problems_G_Q):
        order = seeds.generator(config.seed, "shuffled", step, k).permutation(len(problems)).tolist()
        answers = {here: problems[there].answer for here, there in zip(order, [*order[1:], order[0]], strict=True)}
        sets.append([replace(problem, answer=answers[i]) for i, problem in enumerate(problems)])
    return replace(question_sets, problems_G_Q=sets)


def pay(
    env: RolloutEnv,
    baseline: AdapterStack,
    step: int,
    question_sets: QuestionSets,
    improvement_G: Sequence[float | None],
    config: Config,
    threads: int = 1,
) -> Payment:
    """The teacher's reward of every dataset or question.

    improvement_G: the grounded reward (None: no valid student). Learnability costs intrinsic.attempts of the baseline
    student at every question; a question of which no attempt can be scored has none.
    """
    if config.teacher.reward == "none":
        return Payment([], [None] * len(improvement_G))
    if config.teacher.reward != "learnability":
        return Payment(list(improvement_G), list(improvement_G))
    questions = [problem for problems in question_sets.problems_G_Q for problem in problems]
    seed = seeds.derive(config.seed, "intrinsic", step)
    batch = env.rollout(
        baseline, [questions], config.intrinsic.attempts, [seed], config.student.sampling, threads=threads
    )
    reward_Q = [None if rate is None else learnability(rate) for rate in success_rates(batch)]
    n = len(question_sets.problems_G_Q[0])
    reward_G_Q = [[r for r in reward_Q[first : first + n] if r is not None] for first in range(0, len(reward_Q), n)]
    reward_G = [sum(rewards) / len(rewards) if rewards else None for rewards in reward_G_Q]
    return Payment(reward_Q, reward_G, batch.count, batch.tokens)


def success_rates(batch: RolloutBatch) -> list[float | None]:
    """Share of the first policy's scorable attempts at each question that are right; None where none can be scored."""
    valid_Q = batch.valid_P_Q_N[0].sum(-1).tolist()
    solved_Q = (batch.solved_P_Q_N & batch.valid_P_Q_N)[0].sum(-1).tolist()
    return [solved / valid if valid else None for solved, valid in zip(solved_Q, valid_Q, strict=True)]


def answer_marks(fmt: Any) -> tuple[str, str]:
    """What stands before and behind an answer in a completion. Raises ConfigError for a format without a mark."""
    marks = {"boxed": ("\\boxed{", "}"), "marker": (*getattr(fmt, "answer_marks", ())[-1:], "")}
    mark = marks.get(getattr(fmt, "answer_style", ""), ())
    if len(mark) != 2:
        raise ConfigError(
            'the arm likelihood and reward.mode = "likelihood" need prompts whose answer stands behind one mark '
            "(boxed or marker)"
        )
    return mark


def likelihood(
    env: RolloutEnv,
    stack: AdapterStack,
    batch: RolloutBatch,
    problems_P_Q: list[list[Problem]],
    temperature: float,
    policies: Sequence[int] | None = None,
) -> Tensor:
    """Mean probability [len(policies), Q, N] of the gold answer's tokens behind a student's own reasoning.

    The completion is cut behind its last answer mark, the gold answer put there, and read by the student itself (VeriFree,
    arXiv 2505.21493; the mean over tokens is RLPR's, arXiv 2506.18254). 0 where there is no mark: who never answers earns
    nothing. policies: those of the batch that it is asked of; None: all.
    """
    before, behind = answer_marks(env.fmt)
    policies = range(stack.policies) if policies is None else policies
    tokenizer, P, N = env.backbone.tokenizer, len(policies), batch.reward_P_Q_N.shape[2]
    rows_per_policy = len(problems_P_Q[0]) * N
    chosen = [row for p in policies for row in range(p * rows_per_policy, (p + 1) * rows_per_policy)]
    texts = batch.rollouts.select(chosen).texts(env.backbone)
    golds = [problem.answer for p in policies for problem in problems_P_Q[p] for _ in range(N)]
    written: list[list[int]] = []
    answer_B: list[int] = []
    for row, text, gold in zip(chosen, texts, golds, strict=True):
        reasoning = text[: text.rfind(before) + len(before)] if before in text else ""
        space = "" if before.endswith("{") else " "
        start, ids = (
            tokenizer.encode(t, add_special_tokens=False) for t in (reasoning, f"{reasoning}{space}{gold}{behind}")
        )
        same = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))
        ids += [] if behind else [min(env.backbone.end_ids)]
        fits = reasoning and len(batch.rollouts.prompts[row]) + len(ids) <= env.backbone.context
        written.append(ids if fits else [])
        answer_B.append(len(ids) - same if fits else 0)
    prompts = tuple(batch.rollouts.prompts[row] for row in chosen)
    share_B = mean_probability(env.backbone, stack.select(list(policies)), prompts, written, answer_B, temperature)
    return share_B.view(P, -1, N)


def mean_probability(
    backbone: Backbone,
    stack: AdapterStack,
    prompts: tuple[tuple[int, ...], ...],
    written: list[list[int]],
    answer_B: list[int],
    temperature: float,
) -> Tensor:
    """Mean probability [B] of the last answer_B[b] tokens written behind each prompt (0 of none), rows policy-major, on the
    CPU."""
    result_B = torch.zeros(len(prompts))
    length_B, done_B = torch.tensor([len(ids) for ids in written]), torch.ones(len(prompts), dtype=torch.bool)
    tokens_B_T = torch.full((len(prompts), int(length_B.max())), backbone.pad_id)
    for row, ids in enumerate(written):
        tokens_B_T[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    asked = Rollouts(prompts, tokens_B_T, length_B, torch.zeros(tokens_B_T.shape), done_B, ~done_B)
    share_B_T = score(backbone, stack, asked, temperature).exp()
    for row, end in enumerate(map(len, written)):
        if end:
            result_B[row] = share_B_T[row, end - answer_B[row] : end].mean()
    return result_B

"""Numeric rewards: what the teacher is paid for.

What the teacher is paid for: measured improvement, or one of the rewards that it is compared with.

`grounded` is the method's. The intrinsic rewards look at the baseline student's attempts at the written questions
instead: `learnability` (0 if it never succeeds, else 1 - success rate), `uncertainty` (1 - 2|p - 1/2| of the majority's
share p) and `band` (1 where 12.5 % to 62.5 % of the attempts succeed), success being agreement with the answer that the
teacher wrote. `shuffled` is grounded on questions whose answers are permuted within their dataset: a null in which
nothing can be learned. With every reward the loop trains and measures the same students and promotes by their measured
improvement; only what the teacher learns from differs. Left out: a duplicate penalty, and any mixture of rewards.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from soar import seeds
from soar.config import Config
from soar.engine.policy import AdapterStack
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.write import QuestionSets
from soar.problems.answers import (
    normalize,
    read_number,
)
from soar.types import Problem


def grounded(
    improvement_G_R: Sequence[Sequence[float]], valid_G_R: Sequence[Sequence[bool]]
) -> tuple[list[float | None], list[float | None]]:
    """The grounded reward of each dataset and its standard error over the repeats.

    improvement_G_R: pass rate of each student minus the baseline's; valid_G_R: False for a failed trial, which is left
    out. Returns (reward_G, standard_error_G): the reward is None where no repeat is valid, the error where fewer than
    two are.
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


def uncertainty(agreement: float) -> float:
    """R-Zero's challenger reward 1 - 2|p - 1/2|, highest where the majority answer has half of the attempts."""
    return 1.0 - 2.0 * abs(agreement - 0.5)


def band(success: float, low: float = 0.125, high: float = 0.625) -> float:
    """1 where the success rate lies in [low, high], else 0 (the accuracy range of SvS)."""
    return 1.0 if low <= success <= high else 0.0


def majority(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """The most frequent answer (the first of equals) and its share of all attempts.

    None, "no answer", is no vote: it never wins, but an attempt without an answer lowers the share. (None, 0.0) without
    votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None, 0.0
    answer, count = votes.most_common(1)[0]
    return answer, count / len(answers)


INTRINSIC: dict[str, Callable[[float], float]] = {
    "learnability": learnability,
    "uncertainty": uncertainty,
    "band": band,
}
"""Name -> reward of a question, from a success rate (learnability, band) or the majority's share (uncertainty)."""


@dataclass(frozen=True)
class Payment:
    """The teacher's rewards of one step.

    reward_U: one entry per unit of credit, in writing order: G datasets, or all G * Q questions; None where nothing could
    be measured; empty when the teacher is not paid. reward_G: their means per dataset. rollouts: attempts of the baseline
    that were spent on measuring them.
    """

    reward_U: list[float | None]
    reward_G: list[float | None]
    rollouts: int = 0


class State(Protocol):
    """What is needed of `teacher.LoopState`: the number of the step and the baseline student."""

    step: int
    baseline: AdapterStack


def deal(question_sets: QuestionSets, config: Config, step: int) -> QuestionSets:
    """The questions as students get them: as written, or (`shuffled`) each with the answer of another of its dataset.

    The permutation is one cycle, so no question keeps its own answer; equal answers may still meet. The teacher's rollouts
    stay as they are.
    """
    if config.teacher.reward != "shuffled":
        return question_sets
    sets = [
        _rotate(problems, seeds.generator(config.seed, "shuffled", step, k).permutation(len(problems)).tolist())
        for k, problems in enumerate(question_sets.problems_G_Q)
    ]
    return replace(question_sets, problems_G_Q=sets)


def _rotate(problems: list[Problem], order: list[int]) -> list[Problem]:
    """Problem order[i] gets the answer of problem order[i + 1], the last one that of the first."""
    answers = [problem.answer for problem in problems]
    for here, there in zip(order, [*order[1:], order[0]], strict=True):
        answers[here] = problems[there].answer
    return [replace(problem, answer=answer) for problem, answer in zip(problems, answers, strict=True)]


def pay(
    env: RolloutEnv,
    state: State,
    question_sets: QuestionSets,
    improvement_G: Sequence[float | None],
    config: Config,
    threads: int = 1,
) -> Payment:
    """The teacher's reward of every dataset or question.

    improvement_G: the grounded reward (None: no valid student). An intrinsic reward costs intrinsic.attempts of the
    baseline student at every question; a question of which no attempt can be scored has none.
    """
    kind = config.teacher.reward
    if kind == "none":
        return Payment([], [None] * len(improvement_G))
    if kind not in INTRINSIC:
        return Payment(list(improvement_G), list(improvement_G))
    questions = [problem for problems in question_sets.problems_G_Q for problem in problems]
    seed = seeds.derive(config.seed, "intrinsic", state.step)
    attempts = env.rollout(
        state.baseline, [questions], config.intrinsic.attempts, [seed], config.student.sampling, threads=threads
    )
    rates = vote_shares(env, attempts) if kind == "uncertainty" else success_rates(attempts)
    reward_Q = [None if rate is None else INTRINSIC[kind](rate) for rate in rates]
    n = len(question_sets.problems_G_Q[0])
    reward_G = [_mean(reward_Q[first : first + n]) for first in range(0, len(reward_Q), n)]
    return Payment(reward_Q if config.intrinsic.credit == "question" else reward_G, reward_G, attempts.count)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def success_rates(attempts: RolloutBatch) -> list[float | None]:
    """Share of the first policy's scorable attempts at each question that agree with its written answer."""
    valid_Q = attempts.valid_P_Q_N[0].sum(-1).tolist()
    solved_Q = (attempts.solved_P_Q_N & attempts.valid_P_Q_N)[0].sum(-1).tolist()
    return [solved / valid if valid else None for solved, valid in zip(solved_Q, valid_Q, strict=True)]


def votes(env: RolloutEnv, attempts: RolloutBatch) -> list[tuple[str | None, float]]:
    """Majority answer and its share for each question, over the first policy's attempts (see `rewards.majority`)."""
    _, Q, N = attempts.solved_P_Q_N.shape
    texts = attempts.rollouts.texts(env.backbone)[: Q * N]
    answers = env.verifier.read_answers(texts)
    found = []
    for q in range(Q):
        mine = answers[q * N : (q + 1) * N]
        keys = [None if answer is None else ballot(answer) for answer in mine]
        winner, share = majority(keys)
        found.append((None if winner is None else mine[keys.index(winner)], share))
    return found


def vote_shares(env: RolloutEnv, attempts: RolloutBatch) -> list[float | None]:
    """Share of the attempts at each question that give the majority answer."""
    return [share for _, share in votes(env, attempts)]


def ballot(answer: str) -> str:
    """What two equal votes have in common: the value of a number, else the normalised text.

    Coarser than a verifier on expressions (`x+1` and `1+x` are two votes), but it costs nothing on hostile text.
    """
    number = read_number(answer)
    return normalize(answer) if number is None else str(number.value)

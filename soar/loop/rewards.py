"""What the teacher is paid for: measured improvement, or one of the rewards that it is compared with.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from soar import seeds
from soar.config import Config
from soar.engine.policy import AdapterStack
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.write import QuestionSets
from soar.problems.answers import normalize, read_number


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


INTRINSIC = {"learnability": learnability, "uncertainty": uncertainty, "band": band}
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
    sets = []
    for k, problems in enumerate(question_sets.problems_G_Q):
        order = seeds.generator(config.seed, "shuffled", step, k).permutation(len(problems)).tolist()
        answers = {here: problems[there].answer for here, there in zip(order, [*order[1:], order[0]], strict=True)}
        sets.append([replace(problem, answer=answers[i]) for i, problem in enumerate(problems)])
    return replace(question_sets, problems_G_Q=sets)


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
    batch = env.rollout(
        state.baseline, [questions], config.intrinsic.attempts, [seed], config.student.sampling, threads=threads
    )
    shares_Q = [share for _, share in votes(env, batch)] if kind == "uncertainty" else success_rates(batch)
    reward_Q = [None if share is None else INTRINSIC[kind](share) for share in shares_Q]
    n = len(question_sets.problems_G_Q[0])
    reward_G = [_mean(reward_Q[first : first + n]) for first in range(0, len(reward_Q), n)]
    return Payment(reward_Q if config.intrinsic.credit == "question" else reward_G, reward_G, batch.count)


def _mean(rewards: Sequence[float | None]) -> float | None:
    there = [reward for reward in rewards if reward is not None]
    return sum(there) / len(there) if there else None


def success_rates(batch: RolloutBatch) -> list[float | None]:
    """Share of the first policy's scorable attempts at each question that are right; None where none can be scored."""
    valid_Q = batch.valid_P_Q_N[0].sum(-1).tolist()
    solved_Q = (batch.solved_P_Q_N & batch.valid_P_Q_N)[0].sum(-1).tolist()
    return [solved / valid if valid else None for solved, valid in zip(solved_Q, valid_Q, strict=True)]


def votes(env: RolloutEnv, batch: RolloutBatch) -> list[tuple[str | None, float]]:
    """Majority answer and its share for each question, over the first policy's attempts (see `majority`)."""
    _, Q, N = batch.solved_P_Q_N.shape
    answers = env.verifier.read_answers(batch.rollouts.texts(env.backbone)[: Q * N])
    votes_Q = []
    for first in range(0, Q * N, N):
        answers_N = answers[first : first + N]
        ballots_N = [None if answer is None else ballot(answer) for answer in answers_N]
        winner, share = majority(ballots_N)
        votes_Q.append((None if winner is None else answers_N[ballots_N.index(winner)], share))
    return votes_Q


def ballot(answer: str) -> str:
    """What two equal votes have in common: the value of a number, else the normalised text.

    Coarser than a verifier on expressions (`x+1` and `1+x` are two votes), but it costs nothing on hostile text.
    """
    number = read_number(answer)
    return normalize(answer) if number is None else str(number.value)

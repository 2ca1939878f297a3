"""What the teacher is paid for.

`grounded`, the measured improvement, is the method's. `learnability` looks at the baseline student's attempts at the
written questions instead. `shuffled` is grounded on questions whose answers are permuted within their dataset: a null in
which nothing can be learned. Students are promoted by measured improvement with each. Left out: duplicate penalty, mixtures.
"""

import math
from dataclasses import replace

from soar import seeds
from soar.config import Config
from soar.engine.policy import AdapterStack
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.write import QuestionSets
from soar.types import mean, standard_error

Rewards = list[float | None]  # None where nothing could be measured


def grounded(gains_G: list[list[float]]) -> tuple[Rewards, Rewards]:
    """(reward_G, standard_error_G): the grounded reward of each dataset, and its error over the repeats.

    gains_G: pass rates of its valid students minus the baseline's. None where there are none, errors also where there is one.
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

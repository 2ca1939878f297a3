"""How noisy is the teacher's reward, and what do its options buy?

    python benchmarks/reward_noise.py [RECIPE] [--datasets 4] [--repeats 4] [--attempts 32] [--easier N] [--set KEY=VALUE ...]

Trains students on question sets of the untrained teacher, each with a seed of its own, and measures all of them on the same
candidates with many attempts (--easier N: on N easier problems of the embedded world, where the students of an untrained
teacher have something to show). Prints

- the noise of training: standard deviation over repeats of a student's pass rate, and of the difference between two
  datasets (divided by the square root of 2, so that the two can be compared), which is what an advantage is made of;
- the spread over datasets of the mean pass rate, the signal;
- the noise of measuring one student, for several numbers of reward questions and attempts, by drawing them from the many.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from soar import seeds
from soar.config import Config, load
from soar.domains.candidates import candidates
from soar.domains.world import get_world
from soar.loop.evaluate import count_correct
from soar.loop.parallel import no_tick
from soar.loop.rollout import RolloutEnv
from soar.loop.teacher import OuterLoop, new_state
from soar.run.setup import open_env
from soar.types import Problem

DRAWS = 2000


def rates(env: RolloutEnv, config: Config, problems: list[Problem], attempts: int) -> tuple[np.ndarray, np.ndarray]:
    """Correct attempts [P, H] of every student of one outer step at every problem, and greedily solved [P, H]."""
    loop = OuterLoop(env, problems, config, new_state(env, config))
    population = loop.teach(loop.write())
    sampling = config.student.sampling
    how = config.evaluate.model_copy(update={"attempts": attempts, "temperature": sampling.temperature})
    measured = config.model_copy(update={"evaluate": how})
    correct, *_ = count_correct(env, population.stack, problems, measured, 7, no_tick)
    P = population.stack.policies
    greedy = env.rollout(population.stack, [problems] * P, 1, [7] * P, sampling.model_copy(update={"temperature": 0.0}))
    return correct, greedy.solved_P_Q_N[:, :, 0].numpy().astype(int)


def training_noise(rate_G_R: np.ndarray) -> tuple[float, float, float]:
    """(sd over repeats, sd over repeats of differences between datasets / sqrt(2), sd over datasets of the means)."""
    own = float(np.sqrt(rate_G_R.var(axis=1, ddof=1).mean()))
    pairs = itertools.combinations(range(len(rate_G_R)), 2)
    gaps = [(rate_G_R[a] - rate_G_R[b]).var(ddof=1) / 2 for a, b in pairs]
    return own, float(np.sqrt(np.mean(gaps))), float(rate_G_R.mean(axis=1).std(ddof=1))


def measuring_noise(correct_P_H: np.ndarray, of: int, questions: int, attempts: int) -> tuple[float, float]:
    """Standard deviation over draws of questions and attempts, root mean square over P: of a student's measured rate, and
    of its distance from the mean of all students on the same questions, which is what an advantage and a promotion see."""
    rng = seeds.generator("reward noise", questions, attempts)
    P, H = correct_P_H.shape
    found_D_P = np.empty((DRAWS, P))
    for draw in range(DRAWS):
        drawn_P_M = correct_P_H[:, rng.choice(H, questions, replace=False)]
        found_D_P[draw] = rng.hypergeometric(drawn_P_M, of - drawn_P_M, attempts).mean(axis=1) / attempts
    apart_D_P = found_D_P - found_D_P.mean(axis=1, keepdims=True)
    return tuple(float(np.sqrt(values.var(axis=0).mean())) for values in (found_D_P, apart_D_P))  # type: ignore[return-value]


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--datasets", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--attempts", type=int, default=32)
    parser.add_argument("--easier", type=int, default=0, metavar="N")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    shape = [f"teacher.datasets={arguments.datasets}", f"student.repeats={arguments.repeats}"]
    config = load(arguments.recipe, [*shape, *arguments.overrides])
    problems = (
        get_world("tiny").problems("real", arguments.easier, 5) if arguments.easier else candidates(config).problems
    )
    with open_env(config) as env:
        correct, solved = rates(env, config, problems, arguments.attempts)
        rate_G_R = correct.mean(axis=1).reshape(arguments.datasets, arguments.repeats) / arguments.attempts
        print(f"pass rates: {rate_G_R.round(4).tolist()}")
        own_sd, gap_sd, signal = training_noise(rate_G_R)
        print(f"  sd over repeats {own_sd:.4f}, of differences {gap_sd:.4f}, over datasets {signal:.4f}")
    print(f"greedy: mean {solved.mean():.4f}; sampled: mean {correct.mean() / arguments.attempts:.4f}")
    print("reward questions  attempts  sd of a student's measured pass rate   of its distance from the students' mean")
    sizes = [size for size in (32, 64, 96, 128) if size < correct.shape[1]]
    for questions in sizes:
        rows = [("greedy", solved, 1, 1), *((str(n), correct, arguments.attempts, n) for n in (1, 4, 16))]
        for name, counts, of, attempts in rows:
            alone, apart = measuring_noise(counts, of, questions, attempts)
            print(f"{questions:16d}  {name:>8s}  {alone:36.4f}   {apart:37.4f}")


if __name__ == "__main__":
    main()

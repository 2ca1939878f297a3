"""A teacher reward of your own: pay for improvement, and a little for questions that differ from each other.

python examples/custom_teacher_reward.py runs/custom-reward
"""

import sys

from small import SMALL

import soar
from soar.loop.teacher import Measurement
from soar.loop.write import QuestionSets


def improvement_and_variety(sets: QuestionSets, measured: Measurement, step: int) -> list[float | None]:
    """The method's own reward plus a hundredth of the share of different questions; None: no student can be judged."""
    shares_G = [len({problem.question for problem in one}) / len(one) for one in sets.problems_G_Q]
    pairs = zip(measured.reward_G, shares_G, strict=True)
    return [None if grounded is None else grounded + 0.01 * share for grounded, share in pairs]


if __name__ == "__main__":
    run = soar.train(out=sys.argv[1], settings=SMALL, teacher_reward=improvement_and_variety)
    for event in run.run.events["outer_step"]:
        print(f"step {event['step']}: measured {event['reward_G']}, paid {event['teacher_reward_G']}")

"""A teacher reward of your own: pay for improvement, and a little for questions that differ from each other.

python examples/custom_teacher_reward.py runs/custom-reward
"""

import sys

from small import SMALL

import soar


def improvement_and_variety(question_set: soar.QuestionSet) -> float | None:
    """The method's own reward plus a hundredth of the share of different questions; None: no student can be judged."""
    if question_set.grounded is None:
        return None
    different = len({problem.question for problem in question_set.questions}) / len(question_set.questions)
    return question_set.grounded + 0.01 * different


if __name__ == "__main__":
    run = soar.train(out=sys.argv[1], settings=SMALL, teacher_reward=improvement_and_variety)
    for event in run.run.events["outer_step"]:
        print(f"step {event['step']}: measured {event['reward_G']}, paid {event['teacher_reward_G']}")

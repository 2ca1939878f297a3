"""What a student gains from a question set: pass rate on hard candidates by share of useful questions and learning rate.

    python benchmarks/students.py [--lr 1e-3 3e-3] [--share 0.25 0.5 1.0] [--students 4] [--set student.steps=48 ...]

The question sets are drawn from the untrained teacher of the embedded world and sorted by its oracle. Prints, for each
learning rate and share, the students' pass rate on their own questions in the first and the last step, and the mean and
best pass rate on 64 hard candidates, beside the base model's.
"""

from __future__ import annotations

import argparse
import random

from world import carrying_steps

from soar.config import Config, load
from soar.domains.world import get_world
from soar.engine.rollouts import Request
from soar.loop.evaluate import count_correct
from soar.loop.parallel import no_tick
from soar.loop.population import train_population
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Plan, at_rate, shuffled_passes
from soar.run.setup import open_env
from soar.types import Problem

SAMPLES = 16


def teacher_questions(env: RolloutEnv, config: Config, count: int) -> list[Problem]:
    """Accepted pairs of the untrained teacher."""
    prompt = env.fmt.teacher_ids(env.backbone.tokenizer, "")
    rollouts = env.sampler.sample(None, Request([[prompt]], count, [[7]], config.teacher.sampling))
    truncated = [not ended for ended in rollouts.ended_B.tolist()]
    outcomes = env.verifier.read_problems(rollouts.texts(env.backbone), truncated)
    return [outcome for outcome in outcomes if isinstance(outcome, Problem)]


def main() -> None:
    """Train `students` students for each learning rate and share, and measure them on the same problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config, world = load("tiny", arguments.overrides), get_world("tiny")
    hard = world.problems("hard", 64, 3)
    with open_env(config) as env:
        pool = teacher_questions(env, config, 1500)
        useful = [p for p in pool if carrying_steps(p.question)]
        other = [p for p in pool if not carrying_steps(p.question)]
        right = sum(world.solve(p.question) == p.answer for p in useful) / len(useful)
        print(f"untrained teacher: {len(useful) / len(pool):.2f} useful questions, {right:.2f} of them answered right")
        start, drawn = env.backbone.new_stack(0), config.student.sampling.temperature
        how = config.evaluate.model_copy(update={"attempts": SAMPLES, "temperature": drawn})
        measured = config.model_copy(update={"evaluate": how})
        base, *_ = count_correct(env, None, hard, measured, 11, no_tick)
        print(f"base model on the hard candidates: {base.mean() / SAMPLES:.4f}")
        print("lr       share  own questions first -> last   hard mean   hard best")
        for lr in arguments.lr:
            for share in arguments.share:
                rng = random.Random(5)
                size = round(32 * share)
                sets = [rng.sample(useful, size) + rng.sample(other, 32 - size) for _ in range(arguments.students)]
                steps, per_step = config.student.steps, config.student.prompts_per_step
                batches = [shuffled_passes(problems, p, steps, per_step) for p, problems in enumerate(sets)]
                plans = [Plan(batches_S, seed) for seed, batches_S in enumerate(batches)]
                done = train_population(env, start, plans, at_rate(config.student, lr))
                correct, *_ = count_correct(env, done.stack, hard, measured, 11, no_tick)
                rates = correct.mean(axis=1) / SAMPLES
                first, last = done.metrics[0]["pass_rate"], done.metrics[-1]["pass_rate"]
                print(
                    f"{lr:<8g} {share:5.2f}  {first:13.2f} -> {last:.2f}   {rates.mean():17.4f}   {rates.max():9.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""What the embedded world's model can and cannot do: the facts that the world must offer.

    python benchmarks/world.py [--model builtin:tiny] [--samples 4000] [--seed 1]

Prints, for chains whose every step carries, the share solved by length (the world's rare skill to the power of the
length), sampled and greedy; the pass rate of the hard candidates; how many of them fail at K = 128, and the pass rate of
those on fresh samples (retest); and what the untrained teacher writes.
"""

from __future__ import annotations

import argparse
import random
from itertools import pairwise

import torch

from soar import seeds
from soar.config import load
from soar.domains.world import World, get_world
from soar.engine.rollouts import Request
from soar.loop.evaluate import count_correct
from soar.loop.parallel import no_tick
from soar.loop.rollout import RolloutEnv
from soar.loop.write import teacher_prompt
from soar.run.setup import open_env
from soar.types import Problem

ATTEMPTS = 100


def chains(world: World, length: int, count: int) -> list[Problem]:
    """`count` counter problems of `length` steps that all carry."""
    rng = random.Random(f"chains {length}")
    problems = []
    for index in range(count):
        question = world.counter_question(rng, length, length)
        problems.append(Problem(f"chain-{length}-{index}", question, world.solve(question) or ""))
    return problems


def solved(env: RolloutEnv, problems: list[Problem], attempts: int, seed: int, tokens: int) -> list[int]:
    """Correct attempts of the base model at each problem."""
    config = load("tiny", [f"evaluate.attempts={attempts}", f"student.sampling.max_tokens={tokens}"])
    how = config.evaluate.model_copy(update={"temperature": config.student.sampling.temperature})
    config = config.model_copy(update={"evaluate": how})
    correct_P_H, *_ = count_correct(env, None, problems, config, seed, no_tick)
    return [int(n) for n in correct_P_H[0]]


def greedy_share(env: RolloutEnv, problems: list[Problem], tokens: int) -> float:
    """Share of the problems that the base model solves greedily."""
    sampling = load("tiny").student.sampling.model_copy(update={"max_tokens": tokens, "temperature": 0.0})
    return float(env.rollout(None, [problems], 1, [0], sampling).pass_rate_P()[0])


def carrying_steps(question: str) -> int:
    """Steps of a counter question that need a carry into the tens; 0 for any other text."""
    world = get_world("tiny")
    topic, answer = world.read(question)
    readings = [question[:2], *(answer or "").split()] if topic == "counter" else []
    return sum(after[1] < before[1] for before, after in pairwise(readings))  # the ones digit falls


def teacher_facts(env: RolloutEnv, world: World, samples: int, seed: int) -> list[str]:
    """Lines on what the untrained teacher writes."""
    config = load("tiny")
    prompt = teacher_prompt(env, config)
    rollouts = env.sampler.sample(None, Request([[prompt]], samples, [[seed]], config.teacher.sampling))
    texts, ended = rollouts.texts(env.backbone), rollouts.ended_B.tolist()
    outcomes = env.verifier.read_problems(texts, [not e for e in ended])
    pairs = [o for o in outcomes if isinstance(o, Problem)]
    valid = [p for p in pairs if world.solve(p.question) is not None]
    useful = [p for p in valid if carrying_steps(p.question)]
    right = [p for p in useful if world.solve(p.question) == p.answer]
    lines = [
        f"teacher: {len(pairs)} pairs of {samples} samples; ill-posed {1 - len(valid) / len(pairs):.3f}; "
        f"useful of valid {len(useful) / len(valid):.3f}; right of useful {len(right) / max(1, len(useful)):.3f}"
    ]
    for carries in (1, 2, 3):
        some = [p for p in useful if carrying_steps(p.question) == carries]
        good = sum(world.solve(p.question) == p.answer for p in some)
        lines.append(f"  {carries} carrying steps: {len(some)} questions, right {good / max(1, len(some)):.3f}")
    batch = [p.question for p in pairs[:128]]
    lines.append(f"  distinct among {len(batch)}: {len(set(batch)) / len(batch):.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--samples", type=int, default=4000, help="samples per chain length and of the teacher")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    config = load("tiny", [f"model.path={arguments.model}"])
    world = get_world("tiny")
    with open_env(config) as env:
        tokens = config.student.sampling.max_tokens
        size = sum(p.numel() for p in env.backbone.model.parameters())
        print(f"{arguments.model}: {size:,} parameters, torch {torch.__version__}")
        print("steps   sampled    greedy")
        for length in range(1, 7):
            problems = chains(world, length, max(1, arguments.samples // ATTEMPTS))
            correct = solved(env, problems, ATTEMPTS, arguments.seed, tokens)
            share = sum(correct) / (ATTEMPTS * len(problems))
            print(f"{length:5d} {share:9.5f} {greedy_share(env, problems, tokens):9.5f}")
        candidates = world.problems("hard", 256, 0)
        screened = solved(env, candidates, 128, seeds.derive(arguments.seed, "screen"), tokens)
        again = solved(env, candidates, 128, seeds.derive(arguments.seed, "retest"), tokens)
        kept = [n for n, first in zip(again, screened, strict=True) if first == 0]
        print(f"hard candidates: pass rate {sum(screened) / (128 * len(screened)):.2e}, fail@128 {len(kept)} of 256")
        print(f"retest of those: pass rate {sum(kept) / (128 * len(kept)):.2e} ({128 * len(kept):,} samples)")
        print("\n".join(teacher_facts(env, world, arguments.samples, arguments.seed)))


if __name__ == "__main__":
    main()

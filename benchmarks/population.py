"""Does batching students help? One inner loop of the embedded world with several chunk sizes and worker counts, in one run.

    python benchmarks/population.py [--students 8] [--steps 3] [--repeats 3]

Prints seconds (median), student rollouts a second, and the ratio to one student after another on one thread. The work is
the same in every row: same students, same seeds, same questions.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from soar.config import load
from soar.domains.world import get_world
from soar.loop.population import train_population
from soar.loop.student import Plan, at_rate, shuffled_passes
from soar.run.setup import open_env


def main() -> None:
    """Time every (chunk, workers, torch threads) in turn, `repeats` rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    students = arguments.students
    config = load("tiny")
    problems = get_world("tiny").problems("real", 32 * students, 0)
    settings = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (students // 2, 2, 1), (students, 1, 1), (students, 1, 2)]
    seconds: dict[tuple[int, int, int], list[float]] = {setting: [] for setting in settings}
    with open_env(config) as env:
        start = env.backbone.new_stack(0)
        batches = [
            shuffled_passes(problems[32 * p : 32 * (p + 1)], p, arguments.steps, config.student.prompts_per_step)
            for p in range(students)
        ]
        plans = [Plan(batches_S, seed) for seed, batches_S in enumerate(batches)]
        for _ in range(arguments.repeats):
            for chunk, workers, threads in settings:
                torch.set_num_threads(threads)
                env.backbone.config = config.model.model_copy(update={"chunk": chunk})
                began = time.perf_counter()
                env.threads = workers
                done = train_population(env, start, plans, at_rate(config.student, 1e-3))
                seconds[chunk, workers, threads].append(time.perf_counter() - began)
    base = statistics.median(seconds[settings[0]])
    print(f"torch {torch.__version__}, {students} students, {arguments.steps} RLOO steps, {done.rollouts} rollouts")
    print("chunk  workers  torch threads  seconds  rollouts/s  ratio to one by one")
    for chunk, workers, threads in settings:
        median = statistics.median(seconds[chunk, workers, threads])
        print(
            f"{chunk:5d}  {workers:7d}  {threads:13d}  {median:7.2f}  {done.rollouts / median:10.0f}  {base / median:.2f}"
        )


if __name__ == "__main__":
    main()

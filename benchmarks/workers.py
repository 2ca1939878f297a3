"""What do two worker processes gain over one? The inner loop of the embedded world, in paired rounds.

    python benchmarks/workers.py [--students 8] [--steps 10] [--rounds 5] [--workers 2] [--json FILE]

Every round trains and measures the students of one outer step twice: by a crew of one and by a crew of `--workers`, in
turns which first. One thread a process, the same chunks, seeds and questions; the results are compared bit for bit.
Prints the median seconds, the median of the paired ratios with its range, and what the machine was doing besides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from soar.config import load
from soar.crew import Crew
from soar.ray_cluster import connect, import_ray
from soar.ray_crew import RayCrew
from soar.student import Population, chunks, shuffled_passes, train_population
from soar.teacher import measure_share
from soar.types import Problem
from soar.workbench import choose_workers, open_examiner
from soar.worlds import get_world


def main() -> None:
    """Time the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    students, many = arguments.students, arguments.workers
    size = -(-students // many)
    config = load("tiny", ["threads=1", f"model.chunk={size}", f"cluster.workers={many}"])
    lone = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 1})})
    both = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": many + 1})})
    ray = import_ray()
    connect(ray, both)
    problems = get_world("tiny").real_problems(32 * students + 64, 0)
    questions = problems[:64]
    seconds: dict[int, list[float]] = {1: [], many: []}
    found: list[Population] = []
    with open_examiner(config) as examiner:
        choose_workers(examiner.backbone, 1)
        start = examiner.backbone.new_stack(0)
        batches = [
            shuffled_passes(problems[64 + 32 * p : 96 + 32 * p], p, arguments.steps, config.student.prompts_per_step)
            for p in range(students)
        ]

        def step(crew: Crew) -> Population:
            """The students of one outer step, trained and measured."""
            done = train_population(
                examiner, start, batches, list(range(students)), config.student, 1e-3, workers=1, crew=crew
            )
            measure(crew, done, questions)
            return done

        def measure(crew: Crew, done: Population, asked: list[Problem]) -> None:
            common = (asked, config.reward, config.student.sampling, 0)
            list(crew.stream(measure_share, common, queue_of(done, size)))

        with (
            RayCrew(lone, examiner, 1, print, lambda row: None) as one,
            RayCrew(config, examiner, 1, print, lambda row: None) as two,
        ):
            for crew in (one, two):
                step(crew)  # the first pieces warm the workers up
            for number in range(arguments.rounds):
                for crew in (one, two) if number % 2 else (two, one):
                    began = time.perf_counter()
                    found.append(step(crew))
                    seconds[crew.size].append(time.perf_counter() - began)
    ray.shutdown()
    assert len({"".join(done.stack.digest(p) for p in range(students)) for done in found}) == 1
    report(seconds, found[0].rollouts, arguments.json)


def queue_of(done: Population, size: int) -> deque[tuple[int, Any]]:
    """The trained students, in chunks of `size`, for `measure_share`."""
    return deque(enumerate((done.stack.select(members),) for members in chunks(done.stack.policies, size)))


def report(seconds: dict[int, list[float]], rollouts: int, out: Path | None) -> None:
    """Print the table; write the same figures as JSON."""
    (lone, one), (many, more) = seconds.items()
    ratios = [a / b for a, b in zip(one, more, strict=True)]
    print(f"{rollouts} training rollouts a step; {os.cpu_count()} cores, load average now {os.getloadavg()[0]:.1f}")
    for size, times in seconds.items():
        print(f"{size} worker{'s' * (size > 1)}: median {statistics.median(times):.2f} s a step")
    ratio = statistics.median(ratios)
    print(f"paired ratio: median {ratio:.2f}, from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds")
    if out is not None:
        figures = {"seconds": {str(lone): one, str(many): more}, "ratio": ratio, "rollouts": rollouts}
        out.write_text(json.dumps({**figures, "load": os.getloadavg()[0], "cores": os.cpu_count()}) + "\n")


if __name__ == "__main__":
    main()

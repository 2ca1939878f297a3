"""What do two worker processes gain over one? The inner loop of the embedded world, in paired rounds.

    python benchmarks/workers.py [--students 8] [--steps 10] [--rounds 5] [--workers 2] [--json FILE]

Every round trains and measures the students of one outer step twice: with one process and with `--workers`, in
turns which first. One thread a process, the same chunks, seeds and questions; the results are compared bit for bit.
Prints the median seconds, the median of the paired ratios with its range, and what the machine was doing besides. Wall time
says nothing where other programs take the cores. Therefore also CPU seconds (Linux): of this process, and of each worker with
its verifier; what this process and the busiest worker need is how long a step takes where each has a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from soar.config import load
from soar.domains.world import get_world
from soar.loop.parallel import Parallel
from soar.loop.population import Population, chunks, train_population
from soar.loop.student import Plan, at_rate, shuffled_passes
from soar.loop.teacher import measure_chunk
from soar.run.ray import RayParallel, connect
from soar.run.setup import open_env
from soar.types import Problem


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
    connect(ray, both)
    problems = get_world("tiny").problems("real", 32 * students + 64, 0)
    questions = problems[:64]
    seconds: dict[int, list[float]] = {1: [], many: []}
    needed: dict[int, list[float]] = {1: [], many: []}
    found: list[Population] = []
    with open_env(config) as env:
        start = env.backbone.new_stack(0)
        batches = [
            shuffled_passes(problems[64 + 32 * p : 96 + 32 * p], p, arguments.steps, config.student.prompts_per_step)
            for p in range(students)
        ]
        plans = [Plan(batches_S, seed) for seed, batches_S in enumerate(batches)]

        def step(parallel: Parallel) -> Population:
            """The students of one outer step, trained and measured."""
            env.parallel = parallel
            done = train_population(env, start, plans, at_rate(config.student, 1e-3))
            measure(parallel, done, questions)
            return done

        def measure(parallel: Parallel, done: Population, asked: list[Problem]) -> None:
            common = (asked, config, 0)
            list(parallel.stream(measure_chunk, common, queue_of(done, size)))

        with (
            RayParallel(lone, env, 1, print) as one,
            RayParallel(config, env, 1, print) as two,
        ):
            for parallel in (one, two):
                step(parallel)  # the first pieces warm the workers up
            for number in range(arguments.rounds):
                for parallel in (one, two) if number % 2 else (two, one):
                    done, wall, cpu = measured(parallel, step, number)
                    found.append(done)
                    seconds[parallel.size].append(wall)
                    needed[parallel.size].append(cpu)
    ray.shutdown()
    assert len({"".join(done.stack.digest(p) for p in range(students)) for done in found}) == 1
    report(seconds, needed, found[0].rollouts, arguments.json)


def measured(
    parallel: RayParallel, step: Callable[[Parallel], Population], number: int
) -> tuple[Population, float, float]:
    """(students, wall seconds, CPU seconds of this process and the busiest worker) of one step."""
    pids = list(parallel.pids.values())
    before, own, began = cpu_seconds(pids), time.process_time(), time.perf_counter()
    done = step(parallel)
    wall, own = time.perf_counter() - began, time.process_time() - own
    spent = [after - first for first, after in zip(before, cpu_seconds(pids), strict=True)]
    each = ", ".join(f"{cpu:.2f}" for cpu in spent)
    print(
        f"round {number}, {parallel.size} workers: {wall:.2f} s; CPU s here {own:.2f}, in the workers {each}",
        flush=True,
    )
    return done, wall, own + max(spent)


def queue_of(done: Population, size: int) -> deque[tuple[int, Any]]:
    """The trained students, in chunks of `size`, for `measure_chunk`."""
    return deque(enumerate((done.stack.select(members),) for members in chunks(done.stack.policies, size)))


def cpu_seconds(pids: list[int]) -> list[float]:
    """CPU time of each process with the processes that it started, those that have ended included; zeros without /proc."""
    parent: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        parent[int(file.parent.name)] = int(fields[1])
        ticks[int(file.parent.name)] = sum(map(int, fields[11:15]))
    total = dict.fromkeys(pids, 0)
    for pid, own in ticks.items():
        above: int | None = pid
        while above and above not in total:
            above = parent.get(above)
        if above:
            total[above] += own
    return [total[pid] / os.sysconf("SC_CLK_TCK") for pid in pids]


def paired(times: dict[int, list[float]]) -> list[float]:
    """One worker's time over many workers', round by round."""
    one, more = times.values()
    return [a / max(b, 1e-9) for a, b in zip(one, more, strict=True)]


def report(seconds: dict[int, list[float]], needed: dict[int, list[float]], rollouts: int, out: Path | None) -> None:
    """Print the table; write the same figures as JSON."""
    figures: dict[str, Any] = {"rollouts": rollouts, "load": os.getloadavg()[0], "cores": os.cpu_count()}
    print(f"{rollouts} training rollouts a step; {os.cpu_count()} cores, load average now {figures['load']:.1f}")
    for size in seconds:
        wall, cpu = statistics.median(seconds[size]), statistics.median(needed[size])
        who = f"{size} worker{'s' * (size > 1)}"
        print(f"{who}: median {wall:.2f} s a step; this process and the busiest worker {cpu:.2f} CPU s")
    for name, times in (("wall time", seconds), ("CPU time", needed)):
        ratios = paired(times)
        ratio, span = statistics.median(ratios), f"from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
        print(f"paired ratio, {name}: median {ratio:.2f}, {span}")
        figures[name] = {"seconds": {str(size): each for size, each in times.items()}, "ratio": ratio}
    if out is not None:
        out.write_text(json.dumps(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

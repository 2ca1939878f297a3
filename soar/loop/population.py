"""A population of students in chunks: which policies share a forward pass, on which thread or worker process, in how much
memory. The training itself is `student.rloo_steps`."""

from __future__ import annotations

import logging

import torch

from soar.config import StudentConfig
from soar.engine.memory import split_on_shortage
from soar.engine.policy import AdapterStack, Backbone, concat
from soar.loop.parallel import Parallel, Tick, no_tick, spread
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Population, Training, mean_metrics, rloo_steps
from soar.types import Problem


def choose_chunk(backbone: Backbone, policies: int, threads: int, parallel: Parallel | None = None) -> int:
    """Policies trained in one forward pass (model.chunk, or by device).

    On a GPU all of them: 16 adapters cost the price of one; with worker processes, an equal share for each. On a CPU at
    most 8, shared out among the worker threads: a batch of several students amortises the cost of each operation
    (benchmarks/population.py). A student's last bits depend on who shares its batch, so on a CPU their number does not enter:
    any number of worker processes trains the same chunks.
    """
    if backbone.config.chunk:
        return min(policies, backbone.config.chunk)
    if backbone.device.type == "cuda":
        return -(-policies // parallel.size) if parallel is not None else policies
    return max(1, min(8, -(-policies // threads)))


def chunks(policies: int, size: int) -> list[list[int]]:
    """The numbers 0 .. policies - 1 in groups of `size`."""
    return [list(range(first, min(policies, first + size))) for first in range(0, policies, size)]


def train_population(
    env: RolloutEnv,
    start: AdapterStack,
    batches_P_S: list[list[list[Problem]]],
    seed_P: list[int],
    config: StudentConfig,
    lr: float,
    threads: int = 1,
    on_step: Tick = no_tick,
    parallel: Parallel | None = None,
) -> Population:
    """Train P students from `start`; student p sees batches_P_S[p], one batch a step.

    start: one slice (every student starts from it) or P slices; it is not changed. on_step() is called after each step of
    each chunk. parallel: worker processes that train the chunks; None: `threads` threads.
    """
    P = len(batches_P_S)
    members_C = chunks(P, choose_chunk(env.backbone, P, threads, parallel))
    common = (config, lr, threads if len(members_C) == 1 else 1)
    tasks = [
        (
            start if start.policies == 1 else start.select(members),
            [batches_P_S[p] for p in members],
            [seed_P[p] for p in members],
        )
        for members in members_C
    ]
    trained = [part for some in spread(parallel, env, threads, train_chunk, common, tasks, on_step) for part in some]
    sizes = [part.stack.policies for part in trained]
    return Population(
        concat([part.stack.to(env.backbone.device) for part in trained]),
        torch.cat([part.failed_P for part in trained]),
        [mean_metrics(rows, sizes) for rows in zip(*(part.metrics for part in trained), strict=True)],
        sum(part.rollouts for part in trained),
        sum(part.tokens for part in trained),
    )


def train_chunk(
    env: RolloutEnv,
    tick: Tick,
    config: StudentConfig,
    lr: float,
    threads: int,
    start: AdapterStack,
    batches_P_S: list[list[list[Problem]]],
    seed_P: list[int],
) -> list[Population]:
    """Students trained together, as a piece of work; in several parts where the memory is too small for all of them.

    start: the slice that all start from, or one for each.
    """
    start = start.to(env.backbone.device)

    def job(members: list[int]) -> Population:
        slices = [0] * len(members) if start.policies == 1 else members
        students = Training(env.backbone, start.select(slices), config)
        batches, seeds = [batches_P_S[i] for i in members], [seed_P[i] for i in members]
        for _ in rloo_steps(env, students, batches, seeds, config, lr, threads):
            tick()
        return students.population()

    return split_on_shortage(job, list(range(len(seed_P))), logging.getLogger(__name__).warning, "students")

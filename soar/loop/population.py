"""A population of students in chunks: which policies share a forward pass, on which thread or worker process, in how much
memory, and where a training that was stopped goes on. The training itself is `student.rloo_steps`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from soar.config import StudentConfig
from soar.engine.memory import split_on_shortage
from soar.engine.policy import AdapterStack, Backbone, concat
from soar.loop.parallel import Parallel, Tick, no_tick, spread
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Metrics, Population, Training, TrainState, rloo_steps
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
    begun: TrainState | None = None,
    on_state: Callable[[TrainState], None] | None = None,
    due: Callable[[int], bool] | None = None,
    parallel: Parallel | None = None,
) -> Population:
    """Train P students from `start`; student p sees batches_P_S[p], one batch a step.

    start: one slice (every student starts from it) or P slices; it is not changed. on_step() is called after each step of
    each chunk. on_state(state) is called after every step whose number of steps done is `due`, the last one excepted;
    `begun` is such a state to go on from. Both are for students trained as one chunk, in this process. parallel: worker
    processes that train the chunks; None: `threads` threads.
    """
    P, steps = len(batches_P_S), len(batches_P_S[0])
    members_C = chunks(P, choose_chunk(env.backbone, P, threads, parallel))
    shared = start.policies == 1
    plan = TrainPlan(start if shared else None, config, lr, threads if len(members_C) == 1 else 1)
    chunk_C = [
        Chunk(
            [batches_P_S[p] for p in members], [seed_P[p] for p in members], None if shared else start.select(members)
        )
        for members in members_C
    ]

    def save(students: Training) -> None:
        if on_state is not None and due is not None and students.step < steps and due(students.step):
            on_state(students.state())

    if begun is not None or on_state is not None:
        if len(chunk_C) > 1:
            raise ValueError(f"{P} students in {len(chunk_C)} chunks cannot be saved in the middle of their training")
        trained = train_chunk(env, on_step, plan, chunk_C[0], begun, save)
    else:
        parts = spread(parallel, env, threads, train_chunk, (plan,), [(chunk,) for chunk in chunk_C], on_step)
        trained = [part for some in parts for part in some]
    sizes = [part.stack.policies for part in trained]
    metrics = [_mean_metrics([part.metrics[s] for part in trained], sizes) for s in range(len(trained[0].metrics))]
    return Population(
        concat([part.stack.to(env.backbone.device) for part in trained]),
        torch.cat([part.failed_P for part in trained]),
        metrics,
        sum(part.rollouts for part in trained),
    )


@dataclass(frozen=True)
class TrainPlan:
    """What all students of a population have in common. start: the slice that all start from, if there is one."""

    start: AdapterStack | None
    config: StudentConfig
    lr: float
    threads: int


@dataclass(frozen=True)
class Chunk:
    """Students trained together. start: a slice for each, where they do not share one."""

    batches_P_S: list[list[list[Problem]]]
    seed_P: list[int]
    start: AdapterStack | None = None


def train_chunk(
    env: RolloutEnv,
    tick: Tick,
    plan: TrainPlan,
    chunk: Chunk,
    begun: TrainState | None = None,
    save: Callable[[Training], None] | None = None,
) -> list[Population]:
    """The students of one chunk, as a piece of work; in several parts where the memory is too small for all of them."""
    source = begun.stack if begun is not None else plan.start or chunk.start
    assert source is not None
    start = source.to(env.backbone.device)

    def job(members: list[int]) -> Population:
        slices = [0] * len(members) if begun is None and plan.start is not None else members
        students = Training(start.select(slices), plan.config, begun)
        batches, seed_P = [chunk.batches_P_S[i] for i in members], [chunk.seed_P[i] for i in members]
        for _ in rloo_steps(env, students, batches, seed_P, plan.config, plan.lr, plan.threads):
            tick()
            if save is not None:
                save(students)
        return students.population()

    return split_on_shortage(job, list(range(len(chunk.seed_P))), logging.getLogger(__name__).warning, "students")


def _mean_metrics(parts: list[Metrics], sizes: list[int]) -> Metrics:
    """Means over all policies, from the means over chunks of `sizes` policies."""
    return {
        key: sum(part[key] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes) for key in parts[0]
    }

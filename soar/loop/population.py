"""A population of students in chunks: which policies share a forward pass, on which thread or worker process.

The training itself is `student.rloo_steps`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soar.config import StudentConfig
from soar.engine.policy import AdapterStack, Backbone, concat
from soar.files import Row
from soar.loop.parallel import Parallel, Tick, no_tick, spread
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Metrics, Plan, Training, TrainState, mean_metrics, rloo_steps
from soar.types import Problem


@dataclass(frozen=True)
class Population:
    """Trained students: P slices, who diverged, means over them per step, what was spent, completions of the first one."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int
    tokens: int = 0
    kept: list[Row] = field(default_factory=list)


def choose_chunk(backbone: Backbone, policies: int, threads: int, parallel: Parallel | None = None) -> int:
    """Policies trained in one forward pass: model.chunk, or on a GPU all, with worker processes an equal share for each.

    On a CPU at most 8, shared out among the threads (benchmarks/population.py), not among workers: a student's last bits
    depend on who shares its batch.
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
    """Train P students from `start` (one slice for all or P slices; not changed).

    Student p sees batches_P_S[p], one batch a step, and draws from seed_P[p]. on_step(): after each step of each chunk.
    parallel: worker processes that train the chunks; None: `threads` threads.
    """
    P = len(batches_P_S)
    plans = [Plan(batches_S, seed) for batches_S, seed in zip(batches_P_S, seed_P, strict=True)]
    states = [TrainState(0, start if start.policies == 1 else start.select([p])) for p in range(P)]
    members_C = chunks(P, choose_chunk(env.backbone, P, threads, parallel))
    common = (config, lr, threads if len(members_C) == 1 else 1, None)
    tasks = [([plans[p] for p in members], [states[p] for p in members]) for members in members_C]
    trained = list(spread(parallel, env, threads, train_chunk, common, tasks, on_step))
    students = [student for part in trained for student in part]
    means_C = [[mean_metrics(rows) for rows in zip(*(s.metrics for s in part), strict=True)] for part in trained]
    return Population(
        concat([student.stack for student in students]).to(env.backbone.device),
        torch.tensor([student.failed for student in students]),
        [mean_metrics(rows, list(map(len, trained))) for rows in zip(*means_C, strict=True)],
        sum(student.rollouts for student in students),
        sum(student.tokens for student in students),
        students[0].kept,
    )


def train_chunk(
    env: RolloutEnv,
    tick: Tick,
    config: StudentConfig,
    lr: float,
    threads: int,
    due: Callable[[int], bool] | None,
    plans: list[Plan],
    states: list[TrainState],
) -> list[TrainState]:
    """A piece of work: students trained together, until one has generated its tokens or is at its end, or due() says so.

    due(steps done): None for students that do not go on afterwards.
    """
    students = Training(env.backbone, plans, states, config)
    for _ in rloo_steps(env, students, config, lr, threads):
        tick()
        pairs = zip(students.plans, students.states_P, strict=True)
        if due is not None and (due(students.step) or any(p.tokens and s.tokens >= p.tokens for p, s in pairs)):
            break
    return students.states(due is not None)

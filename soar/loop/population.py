"""A population of students in chunks: which policies share a forward pass, on which thread or worker process.

The training itself is `student.rloo_steps`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soar.config import StudentConfig
from soar.engine.policy import AdapterStack, concat
from soar.files import Row
from soar.loop.parallel import Tick, map_tasks, no_tick
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Begun, Metrics, Plan, Training, TrainState, mean_metrics, rloo_steps

Due = Callable[[int], bool]


@dataclass(frozen=True)
class Population:
    """Trained students, on the host if workers trained them. metrics: means of each step. kept: completions of the first."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int
    kept: list[Row] = field(default_factory=list)


def choose_chunk(env: RolloutEnv, policies: int) -> int:
    """Policies trained in one forward pass: model.chunk, or on a GPU all, with worker processes an equal share for each.

    On a CPU at most 8, shared among threads (benchmarks/population.py) and not workers: last bits depend on the batch.
    """
    if chunk := env.backbone.config.chunk:
        return min(policies, chunk)
    if env.backbone.device.type == "cuda":
        return -(-policies // env.parallel.size) if env.parallel is not None else policies
    return max(1, min(8, -(-policies // env.threads)))


def chunks(policies: int, size: int) -> list[list[int]]:
    """The numbers 0 .. policies - 1 in groups of `size`."""
    return [list(range(first, min(policies, first + size))) for first in range(0, policies, size)]


def train_population(
    env: RolloutEnv, start: AdapterStack, plans: list[Plan], config: StudentConfig, on_step: Tick = no_tick
) -> Population:
    """Train a student by each of the plans from `start` (one slice for all or one for each; not changed).

    on_step(): after each step of each chunk.
    """
    P, one = len(plans), start.policies == 1
    begun = [(plan, TrainState(0, start if one else start.select([p]))) for p, plan in enumerate(plans)]
    members_C = chunks(P, choose_chunk(env, P))
    common = (config, env.threads if len(members_C) == 1 else 1, None)
    tasks = [([begun[p] for p in members],) for members in members_C]
    trained = list(map_tasks(env, train_chunk, common, tasks, on_step))
    students = [student for part in trained for student in part]
    metrics = [mean_metrics(rows) for rows in zip(*(s.metrics for s in students), strict=True)]
    stack, failed_P = concat([s.stack for s in students]), torch.tensor([s.failed for s in students])
    return Population(stack, failed_P, metrics, sum(s.rollouts for s in students), students[0].kept)


def train_chunk(
    env: RolloutEnv, tick: Tick, config: StudentConfig, threads: int, due: Due | None, begun: list[Begun]
) -> list[TrainState]:
    """A piece of work: students trained together, until one has generated its tokens or is at its end, or due() says so.

    due(steps done): None for students that do not go on afterwards.
    """
    students = Training(env.backbone, begun, config)
    for _ in rloo_steps(env, students, config, threads):
        tick()
        pairs = zip(students.plans, students.states_P, strict=True)
        if due is not None and (due(students.step) or any(p.tokens and s.tokens >= p.tokens for p, s in pairs)):
            break
    return students.states(due is not None)

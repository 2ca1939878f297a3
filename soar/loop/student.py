"""Inner loop: a population of students, trained by RLOO from one baseline on their own question sets.

The students are slices of one stack, so one forward pass and one update serve all of them. Every inner loop starts with a
fresh optimizer and a constant learning rate. `population.py` wraps what is not the method around it: chunks, memory
shortage, resume in the middle, worker processes. Left out: early stopping, a replay buffer, several updates per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soar import seeds
from soar.config import StudentConfig
from soar.engine.policy import AdapterStack
from soar.engine.rloo import group_shares, leave_one_out
from soar.engine.update import StackOptimizer, UpdateStats, update
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.types import Problem

Metrics = dict[str, float]


def rloo_steps(
    env: RolloutEnv,
    students: Training,
    batches_P_S: list[list[list[Problem]]],
    seed_P: list[int],
    config: StudentConfig,
    lr: float,
    threads: int = 1,
) -> Iterator[None]:
    """Train the students in place, one RLOO step a turn: attempts, verdicts, leave-one-out advantages, update.

    Student p answers batches_P_S[p][step] and draws from seed_P[p] alone, so its numbers do not depend on its neighbours.
    """
    for step in range(students.step, len(batches_P_S[0])):
        problems_P_Q = [batches_S[step] for batches_S in batches_P_S]
        step_seed_P = [seeds.derive(seed, "attempts", step) for seed in seed_P]
        batch = env.rollout(
            students.stack, problems_P_Q, config.attempts, step_seed_P, config.sampling, threads=threads
        )
        advantage_P_Q_N = leave_one_out(batch.reward_P_Q_N, batch.valid_P_Q_N, config.optimizer.normalize_advantages)
        stats = update(
            env.backbone,
            students.stack,
            students.optimizer,
            batch.rollouts,
            advantage_P_Q_N.reshape(-1),
            lr,
            config.sampling.temperature,
            config.sampling.max_tokens,
        )
        students.note(batch, stats)
        yield


class Training:
    """Students while they are trained: stack, optimizer, who diverged, rollouts spent, steps done, metrics of each step.

    begun: where an earlier training left off; it is not changed.
    """

    def __init__(self, start: AdapterStack, config: StudentConfig, begun: TrainState | None = None) -> None:
        self.stack, self.metrics = start, list[Metrics]()
        self.step, self.rollouts, self.failed_P = 0, 0, torch.zeros(start.policies, dtype=torch.bool)
        self.optimizer = StackOptimizer(start, config.optimizer)
        if begun is not None:
            self.step, self.rollouts, self.failed_P = begun.step, begun.rollouts, begun.failed_P.clone()
            self.optimizer.restore(begun.optimizer)

    def note(self, batch: RolloutBatch, stats: UpdateStats) -> None:
        """Count one step."""
        self.step += 1
        self.rollouts += batch.count
        self.failed_P |= stats.failed_P | batch.failed_P
        self.metrics.append(step_metrics(batch, stats))

    def state(self) -> TrainState:
        """What a checkpoint keeps."""
        return TrainState(
            self.step, self.stack, self.optimizer.state(), self.failed_P, self.rollouts, list(self.metrics)
        )

    def population(self) -> Population:
        """The students as they are, without gradients."""
        for tensor in self.stack.tensors.values():
            tensor.requires_grad_(False)
        return Population(self.stack, self.failed_P, self.metrics, self.rollouts)


@dataclass(frozen=True)
class Population:
    """Trained students: stack of P slices, failed_P (NaN or inf on the way), metrics per step, rollouts spent."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int


@dataclass(frozen=True)
class TrainState:
    """Students in the middle of their training: enough to go on as if it had not stopped.

    step: RLOO steps done. optimizer: `update.StackOptimizer.state`. rollouts: spent so far. metrics: per step, since the
    training began or was continued.
    """

    step: int
    stack: AdapterStack
    optimizer: dict[str, Tensor]
    failed_P: Tensor
    rollouts: int
    metrics: list[Metrics]


def shuffled_passes(problems: Sequence[Problem], seed: int, steps: int, per_step: int) -> list[list[Problem]]:
    """Batches [steps][per_step]: passes over the problems, each pass in a new order, without a break between passes."""
    if not problems:
        raise ValueError("no problems to train on")
    rng = seeds.generator(seed, "order")
    stream: list[int] = []
    while len(stream) < steps * per_step:
        stream += rng.permutation(len(problems)).tolist()
    return [[problems[i] for i in stream[s * per_step : (s + 1) * per_step]] for s in range(steps)]


def inner_steps(config: StudentConfig, promotions: int) -> int:
    """RLOO steps of an inner loop: more after the baseline has moved, at most max_steps."""
    return min(config.max_steps, config.steps + config.extra_steps_per_promotion * promotions)


def step_metrics(batch: RolloutBatch, stats: UpdateStats) -> Metrics:
    """Means over the policies of one step; names as in docs/metrics.md. Shares of groups are judged on correctness."""
    correct_P_Q_N = (batch.solved_P_Q_N & batch.valid_P_Q_N).float()
    return {
        "reward_mean": batch.reward_P_Q_N.mean().item(),
        "pass_rate": batch.pass_rate_P().mean().item(),
        **group_shares(correct_P_Q_N),
        "completions/mean_length": batch.rollouts.length_B.float().mean().item(),
        "completions/clipped_ratio": batch.truncated / batch.count,
        "kl": stats.kl_P.mean().item(),
        "logprob_gap": stats.gap_P.mean().item(),
        "grad_norm": stats.gradient_norm_P.nan_to_num(0.0, 0.0, 0.0).mean().item(),
    }

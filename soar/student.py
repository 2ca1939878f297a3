"""Inner loop: the whole population of students, trained by RLOO from one baseline on their own question sets.

The students are slices of one stack. Every inner loop starts with a fresh optimizer and a constant learning rate. Left
out: early stopping, a replay buffer, several updates per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from soar import seeds
from soar.faults import split_on_shortage
from soar.policy import AdapterStack, Backbone, concat
from soar.rloo import group_shares, leave_one_out
from soar.rollout import Attempts, Examiner
from soar.settings import StudentConfig
from soar.types import Problem
from soar.update import StackOptimizer, UpdateStats, update

Metrics = dict[str, float]


@dataclass(frozen=True)
class Population:
    """Trained students: stack of P slices, failed_P (NaN or inf on the way), metrics per step, rollouts spent."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int


@dataclass(frozen=True)
class Midway:
    """Students in the middle of their training: what `train_population` needs to go on as if it had not stopped.

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


def choose_chunk(backbone: Backbone, policies: int, workers: int) -> int:
    """Policies trained in one forward pass (model.chunk, or by device).

    On a GPU all of them: 16 adapters cost the price of one. On a CPU at most 8, shared out among the worker threads:
    a batch of several students amortises the cost of each operation (benchmarks/population.py).
    """
    if backbone.config.chunk:
        return min(policies, backbone.config.chunk)
    if backbone.device.type == "cuda":
        return policies
    return max(1, min(8, -(-policies // workers)))


def train_population(
    examiner: Examiner,
    start: AdapterStack,
    batches_P_S: list[list[list[Problem]]],
    seed_P: list[int],
    config: StudentConfig,
    lr: float,
    workers: int = 1,
    on_step: Callable[[int, Metrics], None] | None = None,
    begun: Midway | None = None,
    on_midway: Callable[[Midway], None] | None = None,
    due: Callable[[int], bool] | None = None,
) -> Population:
    """Train P students from `start`; student p sees batches_P_S[p], one batch a step.

    start: one slice (every student starts from it) or P slices. It is not changed. seed_P: one seed per student; a
    student's numbers depend on its seed and batches, not on its neighbours (up to the rounding of batched products).
    on_step(step, metrics) is called after each step of each chunk. on_midway(state) is called after every step whose
    number of steps done is `due`, the last one excepted; `begun` is such a state to go on from. Both are for students
    that are trained as one chunk. The metrics of a continued training are those of its own steps.
    """
    P = len(batches_P_S)
    chunk = choose_chunk(examiner.backbone, P, workers)
    groups = [list(range(first, min(P, first + chunk))) for first in range(0, P, chunk)]
    if len(groups) > 1 and (begun is not None or on_midway is not None):
        raise ValueError(f"{P} students in {len(groups)} chunks cannot be saved in the middle of their training")

    def job(members: list[int]) -> Population:
        slices = [0] * len(members) if start.policies == 1 else members
        return _train_chunk(
            examiner,
            start.select(slices),
            [batches_P_S[p] for p in members],
            [seed_P[p] for p in members],
            config,
            lr,
            on_step,
            workers if len(groups) == 1 else 1,
            begun,
            on_midway if due is not None else None,
            due or bool,
        )

    def fitting(members: list[int]) -> list[Population]:
        return split_on_shortage(job, members, logging.getLogger(__name__).warning, "students")

    if workers > 1 and len(groups) > 1:
        with ThreadPoolExecutor(workers) as pool:
            done = [part for parts in pool.map(fitting, groups) for part in parts]
    else:
        done = [part for members in groups for part in fitting(members)]
    sizes = [part.stack.policies for part in done]
    metrics = [_mean_metrics([part.metrics[s] for part in done], sizes) for s in range(len(done[0].metrics))]
    return Population(
        concat([part.stack for part in done]),
        torch.cat([part.failed_P for part in done]),
        metrics,
        sum(part.rollouts for part in done),
    )


def _train_chunk(
    examiner: Examiner,
    stack: AdapterStack,
    batches_P_S: list[list[list[Problem]]],
    seed_P: list[int],
    config: StudentConfig,
    lr: float,
    on_step: Callable[[int, Metrics], None] | None,
    workers: int,
    begun: Midway | None,
    on_midway: Callable[[Midway], None] | None,
    due: Callable[[int], bool],
) -> Population:
    if begun is not None:
        stack = begun.stack.select(list(range(stack.policies)))
    optimizer = StackOptimizer(stack, config.optimizer)
    failed_P = torch.zeros(stack.policies, dtype=torch.bool)
    metrics: list[Metrics] = []
    first = rollouts = 0
    if begun is not None:
        optimizer.restore(begun.optimizer)
        first, rollouts, failed_P = begun.step, begun.rollouts, begun.failed_P.clone()
    steps = len(batches_P_S[0])
    for step in range(first, steps):
        step_seed_P = [seeds.derive(seed, "attempts", step) for seed in seed_P]
        problems_P_Q = [batches[step] for batches in batches_P_S]
        attempts = examiner.attempt(stack, problems_P_Q, config.attempts, step_seed_P, config.sampling, workers=workers)
        rollouts += attempts.count
        advantage_P_Q_N = leave_one_out(
            attempts.reward_P_Q_N, attempts.valid_P_Q_N, config.optimizer.normalize_advantages
        )
        stats = update(
            examiner.backbone,
            stack,
            optimizer,
            attempts.rollouts,
            advantage_P_Q_N.reshape(-1),
            lr,
            config.sampling.temperature,
            config.sampling.max_tokens,
        )
        failed_P |= stats.failed_P | attempts.failed_P
        metrics.append(step_metrics(attempts, stats))
        if on_step is not None:
            on_step(step, metrics[-1])
        if on_midway is not None and step + 1 < steps and due(step + 1):
            on_midway(Midway(step + 1, stack, optimizer.state(), failed_P, rollouts, list(metrics)))
    for tensor in stack.tensors.values():
        tensor.requires_grad_(False)
    return Population(stack, failed_P, metrics, rollouts)


def step_metrics(attempts: Attempts, stats: UpdateStats) -> Metrics:
    """Means over the policies of one step; names as in docs/metrics.md. Shares of groups are judged on correctness."""
    correct_P_Q_N = (attempts.solved_P_Q_N & attempts.valid_P_Q_N).float()
    return {
        "reward_mean": attempts.reward_P_Q_N.mean().item(),
        "pass_rate": attempts.pass_rate_P().mean().item(),
        **group_shares(correct_P_Q_N),
        "completions/mean_length": attempts.rollouts.length_B.float().mean().item(),
        "completions/clipped_ratio": attempts.truncated / attempts.count,
        "kl": stats.kl_P.mean().item(),
        "logprob_gap": stats.gap_P.mean().item(),
        "grad_norm": stats.gradient_norm_P.nan_to_num(0.0, 0.0, 0.0).mean().item(),
    }


def _mean_metrics(parts: list[Metrics], sizes: list[int]) -> Metrics:
    """Means over all policies, from the means over chunks of `sizes` policies."""
    return {
        key: sum(part[key] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes) for key in parts[0]
    }

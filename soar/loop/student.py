"""Inner loop: the whole population of students, trained by RLOO from one baseline on their own question sets.

The students are slices of one stack. Every inner loop starts with a fresh optimizer and a constant learning rate. Left
out: early stopping, a replay buffer, several updates per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soar import seeds
from soar.config import StudentConfig
from soar.engine.memory import split_on_shortage
from soar.engine.policy import AdapterStack, Backbone, concat
from soar.engine.rloo import group_shares, leave_one_out
from soar.engine.update import StackOptimizer, UpdateStats, update
from soar.loop.parallel import Parallel, Tick, no_tick, spread
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.types import Problem

Metrics = dict[str, float]


@dataclass(frozen=True)
class Population:
    """Trained students: stack of P slices, failed_P (NaN or inf on the way), metrics per step, rollouts spent."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int


@dataclass(frozen=True)
class TrainState:
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


def choose_chunk(backbone: Backbone, policies: int, threads: int, parallel: Parallel | None = None) -> int:
    """Policies trained in one forward pass (model.chunk, or by device).

    On a GPU all of them: 16 adapters cost the price of one; with a parallel of GPUs, an equal share for each. On a CPU at
    most 8, shared out among the worker threads: a batch of several students amortises the cost of each operation
    (benchmarks/population.py). A student's last bits depend on who shares its batch, so on a CPU a parallel does not enter:
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

    start: one slice (every student starts from it) or P slices. It is not changed. seed_P: one seed per student; a
    student's numbers depend on its seed and batches, not on its neighbours (up to the rounding of batched products).
    on_step() is called after each step of each chunk. on_state(state) is called after every step whose
    number of steps done is `due`, the last one excepted; `begun` is such a state to go on from. Both are for students
    that are trained as one chunk, in this process. The metrics of a continued training are those of its own steps.
    parallel: who trains the chunks; None: `threads` threads.
    """
    P = len(batches_P_S)
    groups = chunks(P, choose_chunk(env.backbone, P, threads, parallel))
    threads = threads if len(groups) == 1 else 1
    plan = TrainPlan(start if start.policies == 1 else None, config, lr, threads)
    shares = [
        Chunk(
            [batches_P_S[p] for p in own], [seed_P[p] for p in own], None if start.policies == 1 else start.select(own)
        )
        for own in groups
    ]
    if begun is not None or on_state is not None:
        if len(groups) > 1:
            raise ValueError(f"{P} students in {len(groups)} chunks cannot be saved in the middle of their training")
        save = on_state if due is not None else None
        done = _fitting(env, on_step, plan, shares[0], begun, save, due or bool)
    else:
        tasks = [(share,) for share in shares]
        parts = spread(parallel, env, threads, train_chunk, (plan,), tasks, on_step)
        done = [part for some in parts for part in some]
    sizes = [part.stack.policies for part in done]
    metrics = [_mean_metrics([part.metrics[s] for part in done], sizes) for s in range(len(done[0].metrics))]
    return Population(
        concat([part.stack.to(env.backbone.device) for part in done]),
        torch.cat([part.failed_P for part in done]),
        metrics,
        sum(part.rollouts for part in done),
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
    """The students of one chunk. start: a slice for each, where they do not share one."""

    batches_P_S: list[list[list[Problem]]]
    seed_P: list[int]
    start: AdapterStack | None = None


def train_chunk(env: RolloutEnv, tick: Tick, plan: TrainPlan, share: Chunk) -> list[Population]:
    """The students of one chunk, trained together; in several parts where the memory is too small for that."""
    return _fitting(env, tick, plan, share, None, None, bool)


def _fitting(
    env: RolloutEnv,
    tick: Tick,
    plan: TrainPlan,
    share: Chunk,
    begun: TrainState | None,
    on_state: Callable[[TrainState], None] | None,
    due: Callable[[int], bool],
) -> list[Population]:
    source = plan.start or share.start
    assert source is not None
    start = source.to(env.backbone.device)

    def job(members: list[int]) -> Population:
        slices = [0] * len(members) if plan.start is not None else members
        own = Chunk([share.batches_P_S[i] for i in members], [share.seed_P[i] for i in members], start.select(slices))
        return _train_chunk(env, tick, plan, own, begun, on_state, due)

    members = list(range(len(share.seed_P)))
    return split_on_shortage(job, members, logging.getLogger(__name__).warning, "students")


def _train_chunk(
    env: RolloutEnv,
    tick: Tick,
    plan: TrainPlan,
    share: Chunk,
    begun: TrainState | None,
    on_state: Callable[[TrainState], None] | None,
    due: Callable[[int], bool],
) -> Population:
    stack, config = share.start, plan.config
    assert stack is not None
    if begun is not None:
        stack = begun.stack.to(env.backbone.device).select(list(range(stack.policies)))
    optimizer = StackOptimizer(stack, config.optimizer)
    failed_P = torch.zeros(stack.policies, dtype=torch.bool)
    metrics: list[Metrics] = []
    first = rollouts = 0
    if begun is not None:
        optimizer.restore(begun.optimizer)
        first, rollouts, failed_P = begun.step, begun.rollouts, begun.failed_P.clone()
    steps = len(share.batches_P_S[0])
    for step in range(first, steps):
        step_seed_P = [seeds.derive(seed, "attempts", step) for seed in share.seed_P]
        problems_P_Q = [batches[step] for batches in share.batches_P_S]
        attempts = env.rollout(stack, problems_P_Q, config.attempts, step_seed_P, config.sampling, threads=plan.threads)
        rollouts += attempts.count
        advantage_P_Q_N = leave_one_out(
            attempts.reward_P_Q_N, attempts.valid_P_Q_N, config.optimizer.normalize_advantages
        )
        stats = update(
            env.backbone,
            stack,
            optimizer,
            attempts.rollouts,
            advantage_P_Q_N.reshape(-1),
            plan.lr,
            config.sampling.temperature,
            config.sampling.max_tokens,
        )
        failed_P |= stats.failed_P | attempts.failed_P
        metrics.append(step_metrics(attempts, stats))
        tick()
        if on_state is not None and step + 1 < steps and due(step + 1):
            on_state(TrainState(step + 1, stack, optimizer.state(), failed_P, rollouts, list(metrics)))
    for tensor in stack.tensors.values():
        tensor.requires_grad_(False)
    return Population(stack, failed_P, metrics, rollouts)


def step_metrics(attempts: RolloutBatch, stats: UpdateStats) -> Metrics:
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

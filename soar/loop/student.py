"""Inner loop: a population of students, trained by RLOO from one baseline on their own question sets.

The students are slices of one stack, so one forward pass and one update serve all of them. Every inner loop starts with a
fresh optimizer and a constant learning rate. `population.py` wraps what is not the method around it: chunks, memory
shortage, resume in the middle, worker processes. Left out: early stopping, a replay buffer, several updates per batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soar import seeds
from soar.backends.base import begin, update
from soar.config import StudentConfig
from soar.engine.policy import AdapterStack, Backbone, concat
from soar.engine.rloo import group_shares, leave_one_out
from soar.engine.update import UpdateStats
from soar.loop.rewards import likelihood
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.types import Problem

Metrics = dict[str, float]
HINT_LEVELS = 4


@dataclass(frozen=True)
class Method:
    """Where a student learns otherwise than by RLOO on verdicts, with a group for every prompt of a step.

    copies: prompts of one problem that stand side by side and form one group. likelihood: paid by `rewards.likelihood`.
    hints: problem id -> hint, shown as far as the student needs it (see `hinted`).
    """

    copies: int = 1
    likelihood: bool = False
    hints: Mapping[str, str] = field(default_factory=dict)


def rloo_steps(
    env: RolloutEnv,
    students: Training,
    batches_P_S: Sequence[list[list[Problem]]],
    seed_P: Sequence[int],
    config: StudentConfig,
    lr: float,
    threads: int = 1,
) -> Iterator[None]:
    """Train the students in place, one RLOO step a turn: attempts, verdicts, leave-one-out advantages, update.

    Student p answers batches_P_S[p][step] and draws from seed_P[p] alone, so its numbers do not depend on its neighbours.
    Ends where the shortest list of batches does.
    """
    for step in range(students.step, min(map(len, batches_P_S))):
        problems_P_Q = students.pose([batches_S[step] for batches_S in batches_P_S])
        step_seed_P = [seeds.derive(seed, "attempts", step) for seed in seed_P]
        batch = env.rollout(
            students.stack, problems_P_Q, config.attempts, step_seed_P, config.sampling, threads=threads
        )
        batch = students.pay(env, batch, problems_P_Q, config.sampling.temperature)
        stats = update(
            env.backbone,
            students.stack,
            students.optimizer,
            batch.rollouts,
            students.advantages(batch, config.optimizer.normalize_advantages),
            lr,
            config.sampling.temperature,
            config.sampling.max_tokens,
        )
        students.note(problems_P_Q, batch, stats)
        yield


class Training:
    """Students while they are trained: stack, optimizer, who diverged, what was spent, steps done, metrics of each step.

    start: their slices, trained in place. methods: how each of them learns. begun: where an earlier training left each of
    them, after equally many steps; it is not changed.
    """

    def __init__(
        self,
        backbone: Backbone,
        start: AdapterStack,
        config: StudentConfig,
        methods: Sequence[Method] = (),
        begun: Sequence[TrainState] = (),
    ) -> None:
        self.methods = methods or [Method()] * start.policies
        self.metrics_P: list[list[Metrics]] = [[] for _ in range(start.policies)]
        self.optimizer = begin(backbone, start, config.optimizer)
        self.stack = self.optimizer.stack
        self.step = begun[0].step if begun else 0
        self.rollouts_P = [state.rollouts for state in begun] or [0] * start.policies
        self.tokens_P = [state.tokens for state in begun] or [0] * start.policies
        self.level_P: list[dict[str, int]] = [dict(s.levels) for s in begun] or [{} for _ in range(start.policies)]
        self.failed_P = torch.tensor([state.failed for state in begun] or [False] * start.policies)
        if self.step:
            # A state from a checkpoint lies on the host, one from this process on the device.
            joined = {key: [state.optimizer[key].cpu() for state in begun] for key in begun[0].optimizer}
            self.optimizer.restore(
                {key: parts[0] if key.endswith("/step") else torch.cat(parts) for key, parts in joined.items()}
            )

    @staticmethod
    def resumed(
        states: Sequence[TrainState], config: StudentConfig, methods: Sequence[Method], backbone: Backbone
    ) -> Training:
        """Students that go on side by side from where each of them stands."""
        stack = concat([state.stack for state in states]).to(backbone.device)
        return Training(backbone, stack, config, methods, states)

    def pose(self, problems_P_Q: list[list[Problem]]) -> list[list[Problem]]:
        """The problems as they are put to each student, with its hints."""
        return [
            [hinted(p, method.hints.get(p.id, ""), level.get(p.id, HINT_LEVELS)) for p in problems]
            for problems, method, level in zip(problems_P_Q, self.methods, self.level_P, strict=True)
        ]

    def pay(
        self, env: RolloutEnv, batch: RolloutBatch, problems_P_Q: list[list[Problem]], temperature: float
    ) -> RolloutBatch:
        """The batch with the rewards of the students that verdicts do not pay."""
        dense = [p for p, method in enumerate(self.methods) if method.likelihood]
        if not dense:
            return batch
        reward_P_Q_N = batch.reward_P_Q_N.clone()
        reward_P_Q_N[dense] = likelihood(env, self.stack, batch, problems_P_Q, dense, temperature)
        return replace(batch, reward_P_Q_N=reward_P_Q_N)

    def advantages(self, batch: RolloutBatch, normalize: bool) -> Tensor:
        """Leave-one-out advantage [B] of every attempt in its group."""
        groups = []
        for p, method in enumerate(self.methods):
            shape = (-1, method.copies * batch.reward_P_Q_N.shape[2])
            reward, valid = batch.reward_P_Q_N[p].reshape(shape), batch.valid_P_Q_N[p].reshape(shape)
            groups.append(leave_one_out(reward, valid, normalize).reshape(-1))
        return torch.cat(groups)

    def note(self, problems_P_Q: list[list[Problem]], batch: RolloutBatch, stats: UpdateStats) -> None:
        """Count one step, and let hints fade or come back."""
        self.step += 1
        self.failed_P |= stats.failed_P | batch.failed_P
        solved_P_Q = (batch.solved_P_Q_N & batch.valid_P_Q_N).any(-1).tolist()
        for p, row in enumerate(step_metrics(batch, stats)):
            level = self.level_P[p]
            if self.methods[p].hints:
                for problem, solved in zip(problems_P_Q[p], solved_P_Q[p], strict=True):
                    before = level.get(problem.id, HINT_LEVELS)
                    level[problem.id] = max(0, before - 1) if solved else min(HINT_LEVELS, before + 1)
                row["hint_share"] = sum(level.values()) / len(level) / HINT_LEVELS
            self.metrics_P[p].append(row)
            self.rollouts_P[p] += batch.count // len(self.methods)
            self.tokens_P[p] += int(row["tokens"])

    def states(self) -> list[TrainState]:
        """Where each student stands, by itself."""
        flat = self.optimizer.state()
        return [
            TrainState(
                self.step,
                self.stack.select([p]),
                {k: v.clone() if k.endswith("/step") else v[p : p + 1].clone() for k, v in flat.items()},
                bool(self.failed_P[p]),
                self.rollouts_P[p],
                self.tokens_P[p],
                self.level_P[p],
                self.metrics_P[p],
            )
            for p in range(self.stack.policies)
        ]

    def population(self) -> Population:
        """The students as they are, without gradients."""
        for tensor in self.stack.tensors.values():
            tensor.requires_grad_(False)
        metrics = [mean_metrics(rows) for rows in zip(*self.metrics_P, strict=True)]
        return Population(self.stack, self.failed_P, metrics, sum(self.rollouts_P), sum(self.tokens_P))


@dataclass(frozen=True)
class Population:
    """Trained students: stack of P slices, failed_P (NaN or inf on the way), metrics per step (means over the students),
    rollouts and tokens spent."""

    stack: AdapterStack
    failed_P: Tensor
    metrics: list[Metrics]
    rollouts: int
    tokens: int = 0


@dataclass(frozen=True)
class TrainState:
    """One student in the middle of its training (or before, or after it): enough to go on as if it had not stopped.

    step: RLOO steps done. stack: its slice. optimizer: its part of `update.StackOptimizer.state`. failed: it diverged.
    rollouts, tokens: spent so far. levels: problem id -> level of its hint. metrics: per step, since the training began or
    was continued.
    """

    step: int
    stack: AdapterStack
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    failed: bool = False
    rollouts: int = 0
    tokens: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)


def hinted(problem: Problem, hint: str, level: int) -> Problem:
    """The problem with the first `level` quarters of the hint's words behind its question.

    A hint stands whole at first; a group without a success brings a quarter back, one with a success takes one away.
    """
    words = hint.split()
    shown = words[: math.ceil(len(words) * level / HINT_LEVELS)]
    return replace(problem, question=f"{problem.question}\n\nHint: {' '.join(shown)}") if shown else problem


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


def step_metrics(batch: RolloutBatch, stats: UpdateStats) -> list[Metrics]:
    """Figures of one step for each policy; names as in docs/metrics.md. Shares of groups are judged on correctness."""
    P = len(batch.reward_P_Q_N)
    length_P_B = batch.rollouts.length_B.view(P, -1)
    correct_P_Q_N = (batch.solved_P_Q_N & batch.valid_P_Q_N).float()
    columns = {
        "reward_mean": batch.reward_P_Q_N.mean((1, 2)),
        "pass_rate": batch.pass_rate_P(),
        "tokens": length_P_B.sum(1),
        "completions/mean_length": length_P_B.float().mean(1),
        "completions/clipped_ratio": (~batch.rollouts.ended_B).view(P, -1).float().mean(1),
        "kl": stats.kl_P,
        "logprob_gap": stats.gap_P,
        "grad_norm": stats.gradient_norm_P.nan_to_num(0.0, 0.0, 0.0),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{**dict(zip(columns, row, strict=True)), **group_shares(correct_P_Q_N[p])} for p, row in enumerate(rows)]


def mean_metrics(rows: Sequence[Metrics], weights: Sequence[int] = ()) -> Metrics:
    """Means of figures over policies, or over chunks of `weights` policies; what one of them has not (nan) is left out."""
    means = {}
    for key in rows[0]:
        pairs = [(row[key], w) for row, w in zip(rows, weights or [1] * len(rows), strict=True) if row[key] == row[key]]
        means[key] = sum(value * w for value, w in pairs) / sum(w for _, w in pairs) if pairs else math.nan
    return means

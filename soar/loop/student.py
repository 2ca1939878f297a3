"""Inner loop: a population of students, trained by RLOO from one baseline on their own question sets.

The students are slices of one stack, so one forward pass and one update serve all of them. Every inner loop starts with a
fresh optimizer and a constant learning rate. `population.py` divides them into chunks and among worker processes.
Left out: early stopping, a replay buffer, several updates per batch.
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
from soar.engine.rloo import all_equal, leave_one_out
from soar.engine.update import UpdateStats
from soar.files import Row
from soar.loop.likelihood import likelihood
from soar.loop.rollout import FULL, RolloutBatch, RolloutEnv, keep
from soar.types import Problem

Metrics = dict[str, float]
HINT_LEVELS = 4


def rloo_steps(env: RolloutEnv, students: Training, config: StudentConfig, threads: int = 1) -> Iterator[None]:
    """Train the students in place, one RLOO step a turn: attempts, verdicts, leave-one-out advantages, update.

    A student draws from the seed of its plan alone, whoever its neighbours are. Ends where the shortest list of batches does.
    """
    for step in range(students.step, min(len(plan.batches) for plan in students.plans)):
        problems_P_Q = students.problems(step)
        seed_P = [seeds.derive(plan.seed, "attempts", step) for plan in students.plans]
        batch = env.rollout(students.stack, problems_P_Q, config.attempts, seed_P, config.sampling, threads=threads)
        batch = students.with_dense_rewards(env, batch)
        advantage_B, lr = students.advantages(batch, config.optimizer.normalize_advantages), config.optimizer.lr
        stats = update(env.backbone, students.optimizer, batch.rollouts, advantage_B, lr, config.sampling)
        students.record(batch, stats)
        students.keep(env, batch)
        yield


@dataclass(frozen=True)
class Plan:
    """What a student trains on.

    batches: [steps][prompts]. seed: of its attempts. copies: prompts of one problem that stand side by side and form one
    group. likelihood: paid by `likelihood.likelihood`. hints: problem id -> hint, shown as far as needed (see `hinted`).
    tokens: it ends with the step that has generated so many (0: with its batches).
    """

    batches: list[list[Problem]]
    seed: int
    copies: int = 1
    likelihood: bool = False
    hints: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0

    def groups(self, values_Q_N: Tensor) -> Tensor:
        """A row for each group: all attempts at the copies of a problem."""
        return values_Q_N.reshape(-1, self.copies * values_Q_N.shape[1])

    def done(self, step: int, tokens: int) -> float:
        """The share of the training that is over after so many steps and tokens."""
        return max(step / len(self.batches), tokens / self.tokens if self.tokens else 0.0)

    def finished(self, state: TrainState) -> bool:
        """Whether the training is over."""
        over = self.done(state.step, state.tokens) >= 1
        return over or bool(self.tokens and state.failed)  # who diverged draws no tokens any more


@dataclass
class TrainState:
    """One student before, in the middle of or after its training: enough to go on as if it had not stopped.

    step: RLOO steps done. stack: its slice. optimizer: its part of AdamW's state, on the host. failed: it diverged.
    rollouts, tokens: spent so far. levels: problem id -> level of its hint. metrics, kept (completions): of this segment.
    """

    step: int
    stack: AdapterStack
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    failed: bool = False
    rollouts: int = 0
    tokens: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)


Begun = tuple[Plan, TrainState]


class Training:
    """Students that are trained side by side, from where each of them stands, after equally many steps."""

    def __init__(self, backbone: Backbone, begun: Sequence[Begun], config: StudentConfig) -> None:
        self.plans, states = zip(*begun, strict=True)
        self.step = states[0].step
        start = concat([state.stack for state in states]).to(backbone.device)
        self.optimizer = begin(backbone, start, config.optimizer)
        self.stack = self.optimizer.stack
        self.states_P = [replace(s, levels=dict(s.levels), metrics=[], kept=[]) for s in states]  # but for the weights
        self.failed_P = torch.tensor([state.failed for state in states])
        if self.step:
            joined = {key: [state.optimizer[key] for state in states] for key in states[0].optimizer}
            self.optimizer.restore({k: p[0] if k.endswith("/step") else torch.cat(p) for k, p in joined.items()})

    def problems(self, step: int) -> list[list[Problem]]:
        """The problems of a step as they are put to each student, with its hints."""
        return [
            [hinted(p, plan.hints.get(p.id, ""), state.levels.get(p.id, HINT_LEVELS)) for p in plan.batches[step]]
            for plan, state in zip(self.plans, self.states_P, strict=True)
        ]

    def with_dense_rewards(self, env: RolloutEnv, batch: RolloutBatch) -> RolloutBatch:
        """The batch with the rewards of the students that are paid by likelihood."""
        dense = [p for p, plan in enumerate(self.plans) if plan.likelihood]
        if not dense:
            return batch
        reward_P_Q_N = batch.reward_P_Q_N.clone()
        reward_P_Q_N[dense] = likelihood(env, self.stack, batch, dense) * FULL[env.scheme]
        return replace(batch, reward_P_Q_N=reward_P_Q_N)

    def advantages(self, batch: RolloutBatch, normalize: bool) -> Tensor:
        """Leave-one-out advantage [B] of every attempt in its group."""
        groups = []
        for plan, reward_Q_N, valid_Q_N in zip(self.plans, batch.reward_P_Q_N, batch.valid_P_Q_N, strict=True):
            groups.append(leave_one_out(plan.groups(reward_Q_N), plan.groups(valid_Q_N), normalize).reshape(-1))
        return torch.cat(groups)

    def record(self, batch: RolloutBatch, stats: UpdateStats) -> None:
        """Count one step, and let hints fade or come back."""
        self.step += 1
        self.failed_P |= stats.failed_P | batch.failed_P
        solved_P_Q = batch.solved_P_Q_N.any(-1).tolist()
        for p, (plan, state, row) in enumerate(zip(self.plans, self.states_P, step_metrics(batch, stats), strict=True)):
            figures = (batch.solved_P_Q_N[p], batch.reward_P_Q_N[p], batch.valid_P_Q_N[p])
            row |= group_shares(*map(plan.groups, figures))
            for problem, solved in zip(batch.problems_P_Q[p], solved_P_Q[p], strict=True):
                if problem.id in plan.hints:
                    level = state.levels.get(problem.id, HINT_LEVELS)
                    state.levels[problem.id] = max(0, level - 1) if solved else min(HINT_LEVELS, level + 1)
            if state.levels:
                row["hint_share"] = sum(state.levels.values()) / len(state.levels) / HINT_LEVELS
            state.metrics.append(row)
            state.rollouts += len(batch.verdicts) // len(self.plans)
            state.tokens += int(row["tokens"])

    def keep(self, env: RolloutEnv, batch: RolloutBatch) -> None:
        """Keep some completions of the step that was counted last, where it is a student's first, middle or last."""
        for p, (plan, state) in enumerate(zip(self.plans, self.states_P, strict=True)):
            before = plan.done(self.step - 1, state.tokens - int(state.metrics[-1]["tokens"]))
            after = plan.done(self.step, state.tokens)
            if before == 0 or before < 0.5 <= after or after >= 1:
                state.kept += [{"rloo_step": self.step - 1, **row} for row in keep(env, batch, p)]

    def states(self, to_go_on: bool) -> list[TrainState]:
        """Where each student stands, by itself; without the optimizer's part for one that does not go on."""
        flat = {key: value.cpu() for key, value in self.optimizer.state().items()} if to_go_on else {}
        states = []
        for p, (state, failed) in enumerate(zip(self.states_P, self.failed_P.tolist(), strict=True)):
            part = {k: v.clone() if k.endswith("/step") else v[p : p + 1].clone() for k, v in flat.items()}
            states.append(replace(state, step=self.step, stack=self.stack.select([p]), optimizer=part, failed=failed))
        return states


def hinted(problem: Problem, hint: str, level: int) -> Problem:
    """The problem with the first `level` quarters of the hint's words behind its question."""
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


def at_rate(config: StudentConfig, lr: float) -> StudentConfig:
    """The config with another learning rate."""
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": lr})})


def inner_steps(config: StudentConfig, promotions: int) -> int:
    """RLOO steps of an inner loop: `steps`, and more after the baseline has moved, up to max_steps."""
    return max(config.steps, min(config.max_steps, config.steps + config.extra_steps_per_promotion * promotions))


def step_metrics(batch: RolloutBatch, stats: UpdateStats) -> list[Metrics]:
    """Figures of one step for each policy, without the shares of its groups; names as in docs/metrics.md."""
    P = len(batch.reward_P_Q_N)
    length_P_B = batch.rollouts.length_B.view(P, -1)
    columns = {
        "reward_mean": batch.reward_P_Q_N.mean((1, 2)),
        "pass_rate": batch.pass_rate_P(),
        "tokens": length_P_B.sum(1),
        "completions/mean_length": length_P_B.float().mean(1),
        "not_judged": torch.tensor([not verdict.judged for verdict in batch.verdicts]).view(P, -1).float().mean(1),
        "completions/clipped_ratio": (~batch.rollouts.ended_B).view(P, -1).float().mean(1),
        "kl": stats.kl_P,
        "logprob_gap": stats.gap_P,
        "grad_norm": stats.gradient_norm_P.nan_to_num(0.0, 0.0, 0.0),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def group_shares(solved_X_N: Tensor, reward_X_N: Tensor, valid_X_N: Tensor) -> dict[str, float]:
    """Shares of groups (last axis) that are solved in no attempt, in all, in some; and of those without a signal."""
    wrong, right = ~solved_X_N.any(-1), solved_X_N.all(-1)
    kinds = {"all_wrong": wrong, "all_right": right, "mixed": ~(wrong | right)}
    kinds["reward_zero_std"] = all_equal(reward_X_N, valid_X_N)
    return {f"frac_{kind}": those.double().mean().item() for kind, those in kinds.items()}


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """Means of figures over policies; what one of them has not (nan) is left out."""
    means = {}
    for key in rows[0]:
        values = [row[key] for row in rows if not math.isnan(row[key])]
        means[key] = sum(values) / len(values) if values else math.nan
    return means

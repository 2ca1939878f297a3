"""Outer loop: the teacher writes, students learn, improvement on hard problems is measured, the teacher learns.

One `OuterLoop` holds the whole state of a run between two outer steps; `step` does one. Teacher and students share one
sampler, one verifier, one RLOO and one update: they differ only in where the reward comes from. Left out: several groups of
datasets a step, off-policy reuse of teacher samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from soar import seeds
from soar.config import Config, RewardConfig, SamplingConfig
from soar.engine.policy import AdapterStack
from soar.engine.rloo import leave_one_out
from soar.engine.update import StackOptimizer, UpdateStats, learning_rate, update
from soar.loop.parallel import Parallel, Tick, spread
from soar.loop.population import choose_chunk, chunks, train_population
from soar.loop.promotion import decide
from soar.loop.rewards import Payment, deal, grounded, pay
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Population, inner_steps, shuffled_passes
from soar.loop.write import QuestionSets, teacher_prompt, write_questions
from soar.types import Decision, Problem, Trial

Event = dict[str, Any]


@dataclass
class LoopState:
    """Everything that lasts from one outer step to the next.

    step: outer steps done. teacher, baseline: stacks of one policy. window: mean step rewards since the last promotion.
    pq: promotion questions as JSON-ready rows. pass_rates: the baseline's pass rate per reward question (None: it
    cannot be scored), kept while the baseline stands. student_rollouts: completions sampled by students in training and
    measurement, cumulative.
    """

    teacher: AdapterStack
    optimizer: StackOptimizer
    baseline: AdapterStack
    step: int = 0
    promotions: int = 0
    window: list[float] = field(default_factory=list)
    pq: list[dict[str, Any]] = field(default_factory=list)
    pass_rates: dict[str, float | None] = field(default_factory=dict)
    student_rollouts: int = 0
    teacher_rollouts: int = 0


def new_state(env: RolloutEnv, config: Config) -> LoopState:
    """Teacher and baseline student as fresh adapters on the base model (method: both start as copies of it)."""
    backbone = env.backbone
    teacher = backbone.new_stack(seeds.derive(config.seed, "teacher", "init"))
    baseline = backbone.new_stack(seeds.derive(config.seed, "student", "init"))
    return LoopState(teacher, StackOptimizer(teacher, config.teacher.optimizer), baseline)


@dataclass(frozen=True)
class Measurement:
    """One step's students on Q_R: improvement_G_R, valid_G_R, the baseline's pass rate, every trial."""

    improvement_G_R: np.ndarray
    valid_G_R: np.ndarray
    baseline: float
    trials: list[Trial]


TeacherReward = Callable[[QuestionSets, Measurement, list[float | None], int], list[float | None]]


@dataclass(frozen=True)
class Measured:
    """What students did on Q_R: pass rates, divergence, attempts spent."""

    rate_P: list[float]
    failed_P: list[bool]
    rollouts: int


def measure_chunk(
    env: RolloutEnv,
    tick: Tick,
    questions: list[Problem],
    reward: RewardConfig,
    sampling: SamplingConfig,
    seed: int,
    students: AdapterStack,
) -> Measured:
    """The students of one chunk on the reward questions, as a piece of work; all draw from the same seed."""
    attempts = env.rollout(
        students.to(env.backbone.device),
        [questions] * students.policies,
        reward.attempts,
        [seed] * students.policies,
        sampling,
        greedy=reward.mode == "greedy",
    )
    return Measured(attempts.pass_rate_P().tolist(), attempts.failed_P.tolist(), attempts.count)


def all_failed(step: int) -> Event:
    """The alarm of a step without a reward."""
    message = "every student of this step produced NaN or inf"
    return {"event": "alarm", "step": step, "kind": "all students failed", "message": message}


class OuterLoop:
    """The SOAR loop over one hard training set.

    env: puts problems to policies. hard_train: D_train; the teacher never sees it. threads: CPU worker threads.
    on_inner(done, total): progress of the students of the current step. parallel: worker processes that train and measure
    the students; the teacher writes and learns in this one. teacher_reward(question_sets, measured, reward_G, step): what
    every dataset earns, in place of `rewards.pay`; promotion goes by the measured improvement all the same.
    """

    def __init__(
        self,
        env: RolloutEnv,
        hard_train: list[Problem],
        config: Config,
        state: LoopState,
        threads: int = 1,
        on_inner: Callable[[int, int], None] | None = None,
        parallel: Parallel | None = None,
        teacher_reward: TeacherReward | None = None,
    ) -> None:
        self.env, self.hard_train, self.config, self.state = env, hard_train, config, state
        self.teacher_reward = teacher_reward
        self.threads, self.on_inner, self.parallel = threads, on_inner, parallel
        self.prompt = teacher_prompt(env, config)

    def write(self) -> QuestionSets:
        """Step 1: g * n accepted pairs by rejection sampling; raises TeacherError when max_tries is spent."""
        question_sets = write_questions(self.env, self.state.teacher, self.prompt, self.config, self.state.step)
        self.state.teacher_rollouts += question_sets.sampled
        return question_sets

    def teach(self, question_sets: QuestionSets) -> Population:
        """Step 2a: one student per dataset and repeat, trained from the baseline; student order is (dataset, repeat)."""
        config, state = self.config.student, self.state
        steps = inner_steps(config, state.promotions)
        batches, seed_P = [], []
        for k, problems in enumerate(question_sets.problems_G_Q):
            for j in range(config.repeats):
                place = (j,) if config.common_seeds else (k, j)
                seed = seeds.derive(self.config.seed, "student", state.step, *place)
                batches.append(shuffled_passes(problems, seed, steps, config.prompts_per_step))
                seed_P.append(seed)
        lr = config.optimizer.lr * config.lr_decay_per_promotion**state.promotions
        total, size = steps * len(seed_P), self._chunk(len(seed_P))
        done = 0

        def note() -> None:
            nonlocal done
            done += size
            if self.on_inner is not None:
                self.on_inner(min(total, done), total)

        population = train_population(
            self.env, state.baseline, batches, seed_P, config, lr, self.threads, note, parallel=self.parallel
        )
        state.student_rollouts += population.rollouts
        return population

    def _chunk(self, policies: int) -> int:
        return choose_chunk(self.env.backbone, policies, self.threads, self.parallel)

    def draw_reward_questions(self) -> list[Problem]:
        """Q_R: M questions of D_train without replacement, one draw for all students of the step."""
        rng = seeds.generator(self.config.seed, "reward_questions", self.state.step)
        count = min(self.config.reward.questions, len(self.hard_train))
        return [self.hard_train[i] for i in sorted(rng.choice(len(self.hard_train), count, replace=False).tolist())]

    def measure(self, population: Population) -> Measurement:
        """Step 2b: pass rate of every student on Q_R minus the baseline's on the same questions."""
        config, state = self.config, self.state
        questions = self.draw_reward_questions()
        baseline = self._baseline_rate(questions)
        G, R = config.teacher.datasets, config.student.repeats
        seed = seeds.derive(config.seed, "measure", state.step)
        rates: list[float] = []
        diverged: list[bool] = []
        common = (questions, config.reward, config.student.sampling, seed)
        tasks = [(population.stack.select(members),) for members in chunks(G * R, self._chunk(G * R))]
        for part in spread(self.parallel, self.env, self.threads, measure_chunk, common, tasks):
            state.student_rollouts += part.rollouts
            rates += part.rate_P
            diverged += part.failed_P
        failed = [a or b for a, b in zip(population.failed_P.tolist(), diverged, strict=True)]
        trials = [Trial(p // R, p % R, rates[p], failed[p]) for p in range(G * R)]
        rate_G_R = np.array(rates).reshape(G, R)
        valid_G_R = ~np.array(failed).reshape(G, R)
        return Measurement(rate_G_R - baseline, valid_G_R, baseline, trials)

    def _baseline_rate(self, questions: list[Problem]) -> float:
        """Mean pass rate of the baseline on the questions; each is measured once while the baseline stands.

        In sampled mode with reward.baseline_attempts attempts, so that its noise, common to all students, is small.
        """
        config, state = self.config, self.state
        greedy = config.reward.mode == "greedy"
        missing = [problem for problem in questions if problem.id not in state.pass_rates]
        if missing:
            attempts = 1 if greedy else config.reward.baseline_attempts
            seed = seeds.derive(config.seed, "baseline", state.step)
            result = self.env.rollout(
                state.baseline, [missing], attempts, [seed], config.student.sampling, greedy, self.threads
            )
            state.student_rollouts += result.count
            valid_H = result.valid_P_Q_N[0].sum(-1).tolist()
            solved_H = (result.solved_P_Q_N & result.valid_P_Q_N)[0].sum(-1).tolist()
            for problem, solved, valid in zip(missing, solved_H, valid_H, strict=True):
                state.pass_rates[problem.id] = solved / valid if valid else None
        rates = [state.pass_rates[problem.id] for problem in questions]
        return float(np.mean([rate for rate in rates if rate is not None] or [0.0]))

    def learn(self, question_sets: QuestionSets, reward_U: list[float | None]) -> UpdateStats | None:
        """Step 4: every rollout gets the reward of its unit (dataset k, R_k); the baseline is the mean of the other units.

        reward_U: see `signals.Payment`. None, and the teacher as it was (no KL step, no momentum step), without a reward.
        """
        config, state = self.config.teacher, self.state
        if all(reward is None for reward in reward_U):
            return None
        values = torch.tensor([0.0 if reward is None else reward for reward in reward_U])
        valid = torch.tensor([reward is not None for reward in reward_U])
        advantage_U = leave_one_out(values, valid, config.optimizer.normalize_advantages)
        advantage_B = advantage_U.repeat_interleave(config.datasets * config.questions // len(reward_U))
        return update(
            self.env.backbone,
            state.teacher,
            state.optimizer,
            question_sets.rollouts,
            advantage_B,
            learning_rate(config.optimizer, state.step, config.steps),
            config.sampling.temperature,
            config.sampling.max_tokens,
        )

    def step(self) -> tuple[list[Event], list[dict[str, Any]]]:
        """One outer step. Returns the events for metrics.jsonl and the rows for questions.jsonl; advances the state."""
        started = time.monotonic()
        question_sets = deal(self.write(), self.config, self.state.step)
        population = self.teach(question_sets)
        measured = self.measure(population)
        reward_G, error_G = grounded(measured.improvement_G_R.tolist(), measured.valid_G_R.tolist())
        rewards = [reward for reward in reward_G if reward is not None]
        state = self.state
        number = state.step
        if rewards:
            state.window.append(float(np.mean(rewards)))
        promotion = self.config.promotion
        decision = decide(state.window, reward_G, measured.trials, promotion.tau, promotion.window)
        if self.teacher_reward is None:
            payment = pay(self.env, state, question_sets, reward_G, self.config, self.threads)
        else:
            earned_G = self.teacher_reward(question_sets, measured, reward_G, number)
            payment = Payment(earned_G, earned_G)
        state.student_rollouts += payment.rollouts
        stats = self.learn(question_sets, payment.reward_U)
        events: list[Event] = [] if rewards else [all_failed(number)]
        if decision.promote:
            events.append(self._promote(decision, question_sets, population, measured, reward_G))
        state.step += 1
        event = _outer_event(number, question_sets, population, measured, reward_G, error_G, decision, stats)
        event["teacher_reward_G"] = payment.reward_G
        event["student_rollouts"] = state.student_rollouts
        event["seconds"] = round(time.monotonic() - started, 3)
        rows = [
            {"step": number, "dataset": k, "question": p.question, "answer": p.answer, "reward": reward_G[k]}
            for k, problems in enumerate(question_sets.problems_G_Q)
            for p in problems
        ]
        return [event, *events], rows

    def _promote(
        self,
        decision: Decision,
        question_sets: QuestionSets,
        population: Population,
        measured: Measurement,
        reward_G: list[float | None],
    ) -> Event:
        """Step 3: the chosen student becomes the baseline, its questions join PQ, the window restarts."""
        assert decision.dataset is not None and decision.repeat is not None
        state, k = self.state, decision.dataset
        index = k * self.config.student.repeats + decision.repeat
        state.baseline = population.stack.select([index])
        state.promotions += 1
        state.window = []
        state.pass_rates = {}
        problems, place = question_sets.problems_G_Q[k], {"step": state.step, "dataset": k, "reward": reward_G[k]}
        state.pq += [{"question": p.question, "answer": p.answer, **place} for p in problems]
        return {
            "event": "promotion",
            "step": state.step,
            "dataset": k,
            "repeat": decision.repeat,
            "reward": reward_G[k],
            "pass_rate": measured.trials[index].pass_rate,
            "baseline_pass_rate": measured.baseline,
            "questions": len(problems),
            "student": state.baseline.digest(),
        }


def _outer_event(
    step: int,
    question_sets: QuestionSets,
    population: Population,
    measured: Measurement,
    reward_G: list[float | None],
    error_G: list[float | None],
    decision: Decision,
    stats: UpdateStats | None,
) -> Event:
    rewards = [reward for reward in reward_G if reward is not None]
    questions = [problem.question for problems in question_sets.problems_G_Q for problem in problems]
    return {
        "event": "outer_step",
        "step": step,
        "reward_G": reward_G,
        "reward_se_G": error_G,
        "reward_mean": float(np.mean(rewards)) if rewards else None,
        "baseline_pass_rate": measured.baseline,
        "best_pass_rate": max((t.pass_rate for t in measured.trials if not t.failed), default=None),
        "window_mean": decision.window_mean,
        "promoted": decision.promote,
        "reason": decision.reason,
        "accepted": len(questions),
        "sampled": question_sets.sampled,
        "rejected": question_sets.rejected,
        "distinct_share": len(set(questions)) / len(questions),
        "teacher_kl": None if stats is None else stats.kl_P[0].item(),
        "teacher_grad_norm": None if stats is None else stats.gradient_norm_P[0].item(),
        "teacher_logprob_gap": None if stats is None else stats.gap_P[0].item(),
        "failed_students": sum(trial.failed for trial in measured.trials),
        "student_first": population.metrics[0],
        "student_last": population.metrics[-1],
    }

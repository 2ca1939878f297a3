"""Outer loop: the teacher writes, students learn, improvement on hard problems is measured, the teacher learns.

One `OuterLoop` holds the whole state of a run between two outer steps; `step` does one. Teacher and students share one
sampler, one verifier, one RLOO and one update: they differ only in where the reward comes from. Left out: several groups of
datasets a step, off-policy reuse of teacher samples.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from soar import seeds
from soar.backends.base import begin, update
from soar.config import DENSE, Config, OptimizerConfig, SamplingConfig, StudentConfig
from soar.engine.policy import AdapterStack
from soar.engine.rloo import leave_one_out
from soar.files import Row
from soar.loop.likelihood import answer_marks, gold_shares
from soar.loop.parallel import Tick, map_tasks
from soar.loop.population import Population, choose_chunk, chunks, train_population
from soar.loop.promotion import decide
from soar.loop.rewards import Rewards, grounded, intrinsic, shuffle_answers, success_rates
from soar.loop.rollout import RolloutEnv, keep
from soar.loop.student import Plan, at_rate, inner_steps, shuffled_passes
from soar.loop.write import QuestionSets, row_of, teacher_prompt, up_to_questions, write_questions
from soar.types import Decision, Problem, Trial, mean


@dataclass
class LoopState:
    """Everything that lasts from one outer step to the next.

    teacher, baseline: stacks of one policy. step: done. window: mean step rewards since the last promotion. pass_rates: the
    baseline's per reward question (None: it cannot be scored). best, best_rate: the promoted student with the highest pass
    rate on D_train; validated: promotions that were looked at for it. written: sets that wait for students (`run.jobs`).
    """

    teacher: AdapterStack
    optimizer: Any  # of `backends.base.begin`
    baseline: AdapterStack
    step: int = 0
    promotions: int = 0
    window: list[float] = field(default_factory=list)
    pq: list[Row] = field(default_factory=list)
    pass_rates: dict[str, float | None] = field(default_factory=dict)
    student_rollouts: int = 0
    best: AdapterStack | None = None
    best_rate: float = -1.0
    validated: int = 0
    written: dict[str, int | QuestionSets] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=lambda: {"teacher": 0, "students": 0, "measurement": 0})


@dataclass(frozen=True)
class Measurement:
    """One step's students on the reward questions.

    reward_G, error_G: see `rewards.grounded`. baseline: its pass rate. trials: by dataset, then repeat. kept: some attempts.
    """

    reward_G: Rewards
    error_G: Rewards
    baseline: float
    trials: list[Trial]
    kept: list[Row] = field(default_factory=list)

    @property
    def reward(self) -> float | None:
        """Mean reward of the datasets; None when every student diverged."""
        return mean([reward for reward in self.reward_G if reward is not None])


TeacherReward = Callable[[QuestionSets, Measurement, int], Rewards]


@dataclass(eq=False)
class OuterLoop:
    """The SOAR loop over one hard training set.

    hard_train: D_train; the teacher never sees it. on_inner(done, total): progress of the step's students.
    teacher_reward(question_sets, measured, step): what every dataset earns, in place of teacher.reward. kept: completions.
    """

    env: RolloutEnv
    hard_train: list[Problem]
    config: Config
    state: LoopState
    on_inner: Callable[[int, int], None] = lambda done, total: None
    teacher_reward: TeacherReward | None = None
    kept: list[list[Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = teacher_prompt(self.env, self.config) if self.config.teacher_writes else []
        if self.config.reward.mode in DENSE:
            answer_marks(self.env.fmt)  # refused before anything is spent

    def step(self) -> tuple[list[Row], list[Row]]:
        """One outer step of the method. Returns the events for metrics.jsonl and the rows for questions.jsonl."""
        started, state, number = time.monotonic(), self.state, self.state.step
        # 1. The teacher writes g datasets of n questions.
        question_sets = self.write()
        if self.config.teacher.reward == "shuffled":  # the null: nothing can be learned
            question_sets = shuffle_answers(question_sets, self.config.seed, number)
        # 2. Students learn from them; what they gain on hard problems is the reward of their dataset.
        population = self.teach(question_sets)
        measured = self.measure(population)
        reward_U, reward_G = self.assign_credit(question_sets, measured)
        # 3. When the mean reward of the window exceeds tau, a student becomes the baseline.
        if measured.reward is not None:
            state.window.append(measured.reward)
        rule = self.config.promotion
        decision = decide(state.window, measured.reward_G, measured.trials, rule.tau, rule.window)
        promotion = [self._promote(decision, question_sets, population, measured)] if decision.promote else []
        # 4. The teacher learns from the rewards of its questions.
        learnt = self.learn(question_sets, reward_U)

        event = self._event(question_sets, population, measured, decision)
        event |= {"teacher_reward_G": reward_G, **learnt, "seconds": round(time.monotonic() - started, 3)}
        state.step += 1
        self.kept = [question_sets.kept, population.kept, measured.kept]
        rows = [
            {"step": number, "dataset": k, **row_of(p), "reward": measured.reward_G[k]}
            for k, problems in enumerate(question_sets.problems_G_Q)
            for p in problems
        ]
        message = "every student of this step produced NaN or inf"
        alarm = {"event": "alarm", "step": number, "kind": "all students failed", "message": message}
        return [event, *([] if measured.reward is not None else [alarm]), *promotion], rows

    def write(self) -> QuestionSets:
        """Step 1: g * n accepted pairs by rejection sampling; raises TeacherError when max_tries is spent."""
        with self._spends("teacher"):  # also without a result: the arms after it pay for these texts as well
            return write_questions(self.env, self.state.teacher, self.prompt, self.config, self.state.step)

    def plans(self, question_sets: QuestionSets) -> tuple[list[Plan], StudentConfig]:
        """What every student is trained on, in the order (dataset, repeat), and how."""
        config, state = self.config.student, self.state
        steps = inner_steps(config, state.promotions)
        plans = []
        for k, problems in enumerate(question_sets.problems_G_Q):
            for j in range(config.repeats):
                seed = seeds.derive(self.config.seed, "student", state.step, k, j)
                plans.append(Plan(shuffled_passes(problems, seed, steps, config.prompts_per_step), seed))
        return plans, at_rate(config, config.optimizer.lr * config.lr_decay_per_promotion**state.promotions)

    def teach(self, question_sets: QuestionSets) -> Population:
        """Step 2a: one student per dataset and repeat, trained from the baseline."""
        state = self.state
        plans, config = self.plans(question_sets)
        size = choose_chunk(self.env, len(plans))
        total, ticks = len(plans[0].batches) * len(plans), itertools.count(1)
        with self._spends("students"):
            population = train_population(
                self.env, state.baseline, plans, config, lambda: self.on_inner(min(total, size * next(ticks)), total)
            )
        state.student_rollouts += population.rollouts
        return population

    def measure(self, population: Population) -> Measurement:
        """Step 2b: pass rate of every student on Q_R minus the baseline's on the same questions."""
        questions, G, R = self.draw_reward_questions(), self.config.teacher.datasets, self.config.student.repeats
        baseline = self._baseline_rate(questions)
        rate_P, diverged_P, kept = self.rates(population.stack, questions)
        students = enumerate(zip(rate_P, population.failed_P.tolist(), diverged_P, strict=True))
        trials = [Trial(p // R, p % R, rate, failed or diverged) for p, (rate, failed, diverged) in students]
        # A student's rate is rounded to float32, the baseline's is not: what that alone tells apart is no gain.
        gain_P = [0.0 if math.isclose(rate, baseline, rel_tol=1e-6) else rate - baseline for rate in rate_P]
        gains_G = [[gain_P[p] for p, t in enumerate(trials) if t.dataset == k and not t.failed] for k in range(G)]
        return Measurement(*grounded(gains_G), baseline, trials, kept)

    def rates(self, students: AdapterStack, questions: list[Problem]) -> tuple[list[float], list[bool], list[Row]]:
        """(pass rate of every student, who diverged, some attempts), all at the same questions and seeds."""
        config, P = self.config, students.policies
        common = (questions, config, seeds.derive(config.seed, "measure", self.state.step))
        tasks = [(students.select(members),) for members in chunks(P, choose_chunk(self.env, P))]
        with self._spends("measurement"):
            parts = list(map_tasks(self.env, measure_chunk, common, tasks))
        rates_C, diverged_C, rollouts_C, kept_C = zip(*parts, strict=True)
        self.state.student_rollouts += sum(rollouts_C)
        return [*itertools.chain(*rates_C)], [*itertools.chain(*diverged_C)], kept_C[0]

    def assign_credit(self, question_sets: QuestionSets, measured: Measurement) -> tuple[Rewards, Rewards]:
        """(reward_U, reward_G): what the teacher earns for its questions.

        reward_U: per unit of credit in writing order, G datasets or all G * Q questions; empty when the teacher is not paid.
        reward_G: means per dataset. None where nothing could be measured.
        """
        state, kind, earned_G = self.state, self.config.teacher.reward, measured.reward_G
        if self.teacher_reward is not None:
            earned_G = self.teacher_reward(question_sets, measured, state.step)
        elif kind == "none":
            return [], [None] * len(earned_G)
        elif kind == "learnability":
            with self._spends("measurement"):
                reward_U, reward_G, batch = intrinsic(self.env, state.baseline, state.step, question_sets, self.config)
            state.student_rollouts += len(batch.verdicts)
            return reward_U, reward_G
        return earned_G, earned_G

    def validate(self) -> list[Row]:
        """Measure a newly promoted student on all of D_train, and keep it as PS if all before were worse: its event."""
        state = self.state
        if state.validated >= state.promotions:
            return []
        state.validated = state.promotions
        rate = self._baseline_rate(self.hard_train)
        if best := rate > state.best_rate:
            state.best, state.best_rate = state.baseline.select([0]), rate
        spent = {"student_rollouts": state.student_rollouts, "tokens": dict(state.spent)}
        return [{"event": "validation", "step": state.step - 1, "pass_rate": rate, "best": best, **spent}]

    def learn(self, question_sets: QuestionSets, reward_U: Rewards) -> Row:
        """Step 4: every rollout gets the reward of its unit; baseline: the other units. Figures, None without any reward."""
        config, state = self.config.teacher, self.state
        figures = ("teacher_kl", "teacher_grad_norm", "teacher_logprob_gap")
        if all(reward is None for reward in reward_U):
            return dict.fromkeys(figures)
        values_U = torch.tensor([0.0 if reward is None else reward for reward in reward_U])
        valid_U = torch.tensor([reward is not None for reward in reward_U])
        advantage_U = leave_one_out(values_U, valid_U, config.optimizer.normalize_advantages)
        advantage_B = advantage_U.repeat_interleave(config.datasets * config.questions // len(reward_U))
        whole, lr = config.loss_on == "text", learning_rate(config.optimizer, state.step, config.steps)
        rollouts = question_sets.rollouts if whole else up_to_questions(self.env.backbone, question_sets)
        stats = update(self.env.backbone, state.optimizer, rollouts, advantage_B, lr, config.sampling)
        values_P = (stats.kl_P, stats.gradient_norm_P, stats.gap_P)
        return {name: value_P[0].item() for name, value_P in zip(figures, values_P, strict=True)}

    def draw_reward_questions(self) -> list[Problem]:
        """Q_R: M questions of D_train without replacement, one draw for all students of the step."""
        rng = seeds.generator(self.config.seed, "reward_questions", self.state.step)
        count = min(self.config.reward.questions, len(self.hard_train))
        return [self.hard_train[i] for i in sorted(rng.choice(len(self.hard_train), count, replace=False).tolist())]

    def _baseline_rate(self, questions: list[Problem]) -> float:
        """Mean pass rate of the baseline on the questions; each is measured once while the baseline stands.

        In sampled mode with reward.baseline_attempts attempts: its noise is common to all students.
        """
        state = self.state
        missing = [problem for problem in questions if problem.id not in state.pass_rates]
        if missing:
            seed = seeds.derive(self.config.seed, "baseline", state.step)
            attempts, sampling = measured_at(self.config, self.config.reward.baseline_attempts)
            with self._spends("measurement"):
                batch = self.env.rollout(state.baseline, [missing], attempts, [seed], sampling, self.env.threads)
            state.student_rollouts += len(batch.verdicts)
            share_P_Q_N = gold_shares(self.env, state.baseline, batch, self.config)
            rates_Q = success_rates(batch) if share_P_Q_N is None else share_P_Q_N[0].mean(1).tolist()
            state.pass_rates |= zip((problem.id for problem in missing), rates_Q, strict=True)
        rates = [state.pass_rates[problem.id] for problem in questions]
        return mean([rate for rate in rates if rate is not None]) or 0.0

    @contextmanager
    def _spends(self, kind: str) -> Iterator[None]:
        """Within the block, tokens are drawn for this; they count whatever comes of it."""
        before = self.env.tokens
        try:
            yield
        finally:
            self.state.spent[kind] = self.state.spent.get(kind, 0) + self.env.tokens - before

    def _event(self, sets: QuestionSets, students: Population, measured: Measurement, decision: Decision) -> Row:
        """What metrics.jsonl keeps of one outer step; docs/metrics.md explains every key."""
        questions = [problem.question for problems in sets.problems_G_Q for problem in problems]
        return {
            "event": "outer_step",
            "step": self.state.step,
            "reward_G": measured.reward_G,
            "reward_se_G": measured.error_G,
            "reward_mean": measured.reward,
            "baseline_pass_rate": measured.baseline,
            "best_pass_rate": max((t.pass_rate for t in measured.trials if not t.failed), default=None),
            "window_mean": decision.window_mean,
            "promoted": decision.promote,
            "reason": decision.reason,
            "accepted": len(questions),
            "sampled": sets.sampled,
            "rejected": sets.rejected,
            "distinct_share": len(set(questions)) / len(questions),
            "failed_students": sum(trial.failed for trial in measured.trials),
            "student_first": students.metrics[0],
            "student_last": students.metrics[-1],
            "student_rollouts": self.state.student_rollouts,
            "tokens": dict(self.state.spent),
        }

    def _promote(self, decision: Decision, sets: QuestionSets, population: Population, measured: Measurement) -> Row:
        """Step 3: the chosen student becomes the baseline, its questions join PQ, the window restarts."""
        state, k, j = self.state, decision.dataset or 0, decision.repeat or 0
        student, questions = k * self.config.student.repeats + j, sets.problems_G_Q[k]
        state.baseline = population.stack.select([student]).to(self.env.backbone.device)
        state.promotions += 1
        state.window, state.pass_rates = [], {}
        place = {"step": state.step, "dataset": k, "reward": measured.reward_G[k]}
        state.pq += [{**row_of(p), **place} for p in questions]
        return {
            "event": "promotion",
            **place,
            "repeat": j,
            "pass_rate": measured.trials[student].pass_rate,
            "baseline_pass_rate": measured.baseline,
            "questions": len(questions),
            "student": state.baseline.digest(),
        }


def new_state(env: RolloutEnv, config: Config) -> LoopState:
    """Teacher and baseline student as fresh adapters on the base model (method: both start as copies of it)."""
    teacher = env.backbone.new_stack(seeds.derive(config.seed, "teacher", "init"))
    baseline = env.backbone.new_stack(seeds.derive(config.seed, "student", "init"))
    optimizer = begin(env.backbone, teacher, config.teacher.optimizer)
    return LoopState(optimizer.stack, optimizer, baseline)


def measured_at(config: Config, attempts: int) -> tuple[int, SamplingConfig]:
    """How attempts at a reward question are drawn, and how many: as in training, or one greedily, at temperature 0."""
    greedy, sampling = config.reward.mode == "greedy", config.student.sampling
    return (1, sampling.model_copy(update={"temperature": 0.0})) if greedy else (attempts, sampling)


def measure_chunk(
    env: RolloutEnv, tick: Tick, questions: list[Problem], config: Config, seed: int, students: AdapterStack
) -> tuple[list[float], list[bool], int, list[Row]]:
    """(pass rates, who diverged, rollouts, some attempts of the first) of a few students on the reward questions.

    With reward.mode = likelihood or forced the mean likelihood of the gold answers stands for the pass rate.
    """
    P, stack = students.policies, students.to(env.backbone.device)
    attempts, sampling = measured_at(config, config.reward.attempts)
    batch = env.rollout(stack, [questions] * P, attempts, [seed] * P, sampling)
    share_P_Q_N = gold_shares(env, stack, batch, config)
    rate_P = batch.pass_rate_P() if share_P_Q_N is None else share_P_Q_N.mean((1, 2))
    return rate_P.tolist(), batch.failed_P.tolist(), len(batch.verdicts), keep(env, batch)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate at 0-based `step` of `total`: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

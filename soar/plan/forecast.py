"""What a run computes, counted before anything is loaded (`soar run --dry-run`), and how long that takes.

Counts of rollouts and tokens follow from the config and from what is assumed (`Assumptions`; each is printed and can be
given); time is counts over measured rates, in one process: those of `TABLE` before the run, those of its own outer steps once
there is one. Left out: loading, and writing files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from soar.config import HARD_ARMS, Config, ConfigError, TrainedArm
from soar.domains.candidates import candidates
from soar.engine.load import GIB, memory_of, size_of
from soar.loop.parallel import texts_at_once
from soar.problems.load import evidence_path
from soar.report.runs import numbers, read_run
from soar.types import UserError

TRAIN, MEASURE = "students train", "students measured"
GENERATED = ("world:", "reasoning_gym:")
WRITTEN_BY_TEACHER = ("base_t", "teacher_t")
PAPER_HOURS = "the paper's run: 1,536 to 1,920 GPU-hours (32 H100 or H200 for 48 to 60 hours)"
KL_FACTOR = 1.5  # a reference pass forward on top of one pass forward and one backward, base weights frozen
SMALLEST_KNOWN = 50e6  # parameters under which the table says nothing: such models are bound by overhead


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say. origin: name -> where the value is from, if it is not only assumed.

    Tokens are means a row. gradient shares: rows of students that carry a gradient; without a KL term rows of a group
    whose rewards are all equal carry none. promotions: in the whole outer loop.
    """

    candidates: float = 1000.0
    hard_share: float = 0.3
    texts_per_pair: float = 1.5
    teacher_prompt_tokens: float = 250.0
    teacher_tokens: float = 256.0
    question_prompt_tokens: float = 150.0
    question_tokens: float = 512.0
    hard_prompt_tokens: float = 150.0
    hard_tokens: float = 512.0
    question_gradient_share: float = 0.5
    hard_gradient_share: float = 0.05
    promotions: float = 0.0
    origin: Mapping[str, str] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, float], origin: str) -> Assumptions:
        """A copy with these values and their origin. Raises ConfigError for an unknown name or an impossible value."""
        names = {f.name for f in fields(self)} - {"origin"}
        for name, value in values.items():
            if name not in names:
                raise ConfigError(f"--assume {name}: no such assumption; known: {', '.join(sorted(names))}")
            share = name.endswith("share")
            if not math.isfinite(value) or value < 0 or (share and value > 1):
                raise ConfigError(f"--assume {name}={value}: expected a number {'from 0 to 1' if share else '>= 0'}")
        return replace(self, **values, origin={**self.origin, **dict.fromkeys(values, origin)})

    def lines(self) -> list[str]:
        """Name, value and origin of each."""
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "origin"]
        return [f"  {name:24s} {value:10,.4g}  {self.origin.get(name, 'assumed')}" for name, value in rows]


def assumed(config: Config) -> Assumptions:
    """Assumptions for a config: half of every token budget is used; with a KL term every row carries a gradient.

    Candidates are counted where that takes no network; of a problem file with its evidence beside it all are hard.
    """
    student = config.student
    half, of_teacher = student.sampling.max_tokens / 2, config.teacher.sampling.max_tokens / 2
    guess = Assumptions(teacher_tokens=of_teacher, question_tokens=half, hard_tokens=half)
    if student.optimizer.kl > 0:
        guess = guess.with_values({"question_gradient_share": 1.0, "hard_gradient_share": 1.0}, "by the KL term")
    source, limit = config.problems.source, config.problems.limit
    try:
        local = source.startswith(GENERATED) or Path(source).expanduser().is_file()
        count = len(candidates(config).problems) if local else 0
    except (UserError, ImportError):
        count = 0  # `soar check` says what is wrong with the problems; a plan is still worth having
    if count or limit:
        guess = guess.with_values({"candidates": float(count or limit)}, "counted" if count else "problems.limit")
    return guess.with_values({"hard_share": 1.0}, "screened before") if screened_before(config) else guess


def screened_before(config: Config) -> bool:
    """Whether a run would not screen: there is evidence beside the problem file, or screening is off."""
    return not config.screen.attempts or evidence_path(Path(config.problems.source).expanduser()).is_file()


@dataclass(frozen=True)
class Work:
    """One line of a forecast.

    stage: as in `wall_seconds` of summary.json. sampled: tokens of completions. trained: tokens of prompts and completions
    that pass forward and backward. kl: whether training also passes the reference forward.
    """

    stage: str
    name: str
    rollouts: float
    sampled: float
    trained: float = 0.0
    kl: bool = False


def workload(config: Config, assumptions: Assumptions) -> list[Work]:
    """Every part of a run, in order."""
    screening = 0.0 if screened_before(config) else assumptions.candidates * config.screen.attempts
    hard = assumptions.candidates * assumptions.hard_share
    if config.problems.max_hard:
        hard = min(hard, config.problems.max_hard)
    held_out = hard * config.problems.test_share
    loop = _loop(config, assumptions, hard - held_out)
    spent = sum(work.rollouts for work in loop if work.name in (TRAIN, MEASURE))
    attempts = held_out * config.evaluate.attempts * len(config.arms.run)
    trained_arms = [arm for arm in get_args(TrainedArm) if arm in config.arms.run]
    return [
        Work("screen", "screening", screening, screening * assumptions.hard_tokens),
        *loop,
        *(_arm(arm, config, assumptions, hard - held_out, spent) for arm in trained_arms),
        Work("evaluate", "evaluation", attempts, attempts * assumptions.hard_tokens),
    ]


def _loop(config: Config, assumptions: Assumptions, hard_train: float) -> list[Work]:
    teacher, student, reward = config.teacher, config.student, config.reward
    wanted = teacher.datasets * teacher.questions
    pairs = teacher.steps * wanted
    texts = max(pairs * assumptions.texts_per_pair, teacher.steps * texts_at_once(wanted, wanted))
    # RLOO steps of an inner loop, when promotions are spread evenly over the outer loop.
    promoted = (math.floor(assumptions.promotions * t / teacher.steps) for t in range(teacher.steps))
    steps = sum(min(student.max_steps, student.steps + student.extra_steps_per_promotion * many) for many in promoted)
    students = teacher.datasets * student.repeats
    sampled = float(students * steps * student.prompts_per_step * student.attempts)
    row = assumptions.question_prompt_tokens + assumptions.question_tokens
    asked = min(reward.questions, hard_train)
    # The baseline is asked each question once while it stands.
    once = 1 if reward.mode == "greedy" else reward.baseline_attempts
    baseline = once * min(hard_train * (1 + assumptions.promotions), asked * teacher.steps)
    measured = teacher.steps * students * asked * reward.attempts + baseline
    # The baseline student's attempts at written questions, for an intrinsic teacher reward.
    intrinsic = float(pairs * config.intrinsic.attempts) if teacher.reward == "learnability" else 0.0
    learned = pairs * (assumptions.teacher_prompt_tokens + assumptions.teacher_tokens) * (teacher.reward != "none")
    tokens = measured * assumptions.hard_tokens + intrinsic * assumptions.question_tokens
    trained = sampled * assumptions.question_gradient_share * row
    return [
        Work("loop", "teacher writes", texts, texts * assumptions.teacher_tokens),
        Work("loop", TRAIN, sampled, sampled * assumptions.question_tokens, trained, student.optimizer.kl > 0),
        Work("loop", MEASURE, measured + intrinsic, tokens),
        Work("loop", "teacher learns", 0.0, 0.0, learned, teacher.optimizer.kl > 0),
    ]


def _arm(arm: str, config: Config, assumptions: Assumptions, hard_train: float, spent: float) -> Work:
    """An arm on hard problems and, unless it has those alone, on questions: mixed by number, or one after the other."""
    student, arms = config.student, config.arms
    per_step = student.prompts_per_step * student.attempts
    fixed = 0 if arm == "hard_only" else arms.pq_steps
    steps = fixed or arms.steps or max(1, math.ceil(spent / per_step))
    promoted = max(1.0, assumptions.promotions) * config.teacher.questions
    questions = 0.0 if arm in HARD_ARMS else promoted if arm.startswith("pq") else float(arms.questions)
    share = questions / max(1.0, questions + hard_train)
    if arms.curriculum_steps and questions:
        share = min(steps, arms.curriculum_steps) / steps
    rollouts = float(steps * per_step)
    tokens = share * assumptions.question_tokens + (1 - share) * assumptions.hard_tokens
    question_row = assumptions.question_prompt_tokens + assumptions.question_tokens
    hard_row = assumptions.hard_prompt_tokens + assumptions.hard_tokens
    trained = share * assumptions.question_gradient_share * question_row
    trained += (1 - share) * assumptions.hard_gradient_share * hard_row
    written = arms.questions * assumptions.texts_per_pair * assumptions.teacher_tokens * (arm in WRITTEN_BY_TEACHER)
    return Work("arms", arm, rollouts, rollouts * tokens + written, rollouts * trained, student.optimizer.kl > 0)


@dataclass(frozen=True)
class Rates:
    """Tokens a second of a model of so many parameters, 16 adapters, no KL term; source: where they were measured."""

    parameters: float
    decode: float
    train: float
    source: str

    def scaled(self, factor: float, source: str) -> Rates:
        return replace(self, decode=self.decode * factor, train=self.train * factor, source=source)

    def seconds(self, work: Work) -> float:
        """Tokens sampled over the one rate and tokens trained over the other."""
        return work.sampled / self.decode + work.trained * (KL_FACTOR if work.kl else 1.0) / self.train


MEASURED = "benchmarks/results/h200-default.json and h200-attention.json"
TABLE = (
    Rates(134.5e6, 388_839, 203_744, f"NVIDIA H200, decode-135m and train-135m of {MEASURED}"),
    Rates(3.213e9, 40_572, 32_966, f"NVIDIA H200, decode-3b and train-3b of {MEASURED}"),
)


def table_rates(parameters: float) -> Rates | None:
    """Rates of the known shape nearest in size, scaled by parameters; None for a model far smaller than any of them."""
    if parameters < SMALLEST_KNOWN:
        return None
    near = min(TABLE, key=lambda known: abs(math.log(known.parameters / parameters)))
    scale = near.parameters / parameters
    note = "" if 0.9 < scale < 1.1 else f", scaled by {scale:.3g} for its size"
    return near.scaled(scale, f"{near.source}{note}; after the first outer step --resume --dry-run takes its own")


@dataclass(frozen=True)
class Forecast:
    """The works of a run and the rates that they are done at; None where no rate is known."""

    works: tuple[Work, ...]
    assumptions: Assumptions
    rates: Rates | None

    def seconds(self) -> list[float | None]:
        """Of each work; None without rates."""
        return [None if self.rates is None else self.rates.seconds(work) for work in self.works]

    def hours(self) -> float | None:
        """Of all works."""
        return None if self.rates is None else sum(map(self.rates.seconds, self.works)) / 3600

    def lines(self) -> list[str]:
        """The forecast as a table, with what it rests on."""
        head = f"  {'':18s} {'rollouts':>14s} {'tokens sampled':>16s} {'tokens trained':>16s} {'time':>11s}"
        hours, rates = self.hours(), self.rates
        rows = [(w.name, w.rollouts, w.sampled, w.trained, s) for w, s in zip(self.works, self.seconds(), strict=True)]
        sums = (sum(getattr(work, name) for work in self.works) for name in ("rollouts", "sampled", "trained"))
        rows.append(("in all", *sums, None if hours is None else 3600 * hours))
        body = [f"  {n:18s} {r:14,.0f} {a:16,.0f} {t:16,.0f} {_time(s):>11s}" for n, r, a, t, s in rows]
        arms = sum(s or 0.0 for work, s in zip(self.works, self.seconds(), strict=True) if work.stage == "arms")
        if hours and arms > 1800 * hours:
            body.append(
                f"  the arms take {arms / 36 / hours:.0f} % of it: for a first try fewer of them, "
                """--set 'arms.run=["base", "hard_only", "ps", "pq"]'"""
            )
        if rates is None:
            body.append("  no time: no rate is known for a model of this size")
        else:
            body.append(f"  {hours:,.2f} device-hours, in one process on one device; {PAPER_HOURS}")
            body.append(f"  rates: {rates.decode:,.0f} tokens/s sampled, {rates.train:,.0f} trained; {rates.source}")
        return ["forecast", head, *body, "it rests on (--assume NAME=VALUE replaces one)", *self.assumptions.lines()]

    def total_line(self) -> str:
        """The forecast in one line, for a list of runs."""
        tokens, hours = sum(work.sampled for work in self.works), self.hours()
        time = "no rate is known for a model of this size" if hours is None else f"{hours:,.2f} device-hours"
        return f"  {sum(work.rollouts for work in self.works):,.0f} rollouts, {tokens:,.0f} tokens sampled; {time}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"


def forecast(config: Config, assumptions: Assumptions | None = None, run_dir: Path | None = None) -> Forecast:
    """What a run takes, by the table's rates for the size of its model, or by those of its outer steps in `run_dir`."""
    assumptions = assumptions or assumed(config)
    works, size = tuple(workload(config, assumptions)), size_of(config.model)
    rates = None if size is None else table_rates(size.parameters)
    steps = read_run(run_dir).steps if run_dir is not None and (run_dir / "metrics.jsonl").is_file() else []
    taken = numbers([step.get("seconds") for step in steps])
    if taken and sum(taken) > 0:
        rates = rates or Rates(0.0, 1.0, 1.0, "")
        counted = sum(rates.seconds(work) for work in works if work.stage == "loop") * len(taken) / config.teacher.steps
        rates = rates.scaled(counted / sum(taken), f"this run's own first {len(taken)} outer steps")
    return Forecast(works, assumptions, rates)


def memory_lines(config: Config, assumptions: Assumptions) -> list[str]:
    """Memory on the device with its arithmetic; nothing for a model whose size cannot be told."""
    size = size_of(config.model)
    if size is None:
        return ["memory: unknown, the model is not in the local cache and its name tells no size"]
    prompt = math.ceil(max(assumptions.question_prompt_tokens, assumptions.hard_prompt_tokens))
    lines = [
        "memory per device",
        *memory_of(config, size, prompt)[1],
        "  adapters, their moments and activations on top",
    ]
    if config.model.sampler == "vllm":
        lines.append(
            f"  vLLM         {config.model.vllm_memory:8.0%} of the GPU, by model.vllm_memory: its own "
            f"{size.parameters * 2 / GIB:.2f} GiB of weights, adapters and cache"
        )
    return lines

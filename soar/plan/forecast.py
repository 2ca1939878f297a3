"""What a run computes, counted before anything is loaded: rollouts, tokens sampled and tokens trained, by stage and arm.

The counts follow from the config and from what is assumed about the model and its problems (`Assumptions`); each
assumption is printed and can be given or measured. Pure, needs no torch.

What a run would do, counted before anything is loaded (`soar run --dry-run`).

How long a run will take: counted tokens over a table of measured rates (`TABLE`), by stage and arm. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from soar.config import HARD_ARMS, Config, ConfigError, TrainedArm
from soar.domains.candidates import candidates
from soar.engine.load import GIB, ModelShape, memory_of, shape_of
from soar.loop.parallel import texts_at_once
from soar.problems.load import evidence_path
from soar.types import UserError

STAGES = ("screen", "loop", "arms", "evaluate")
GENERATED = ("world:", "reasoning_gym:")
INTRINSIC = ("learnability", "uncertainty", "band")
WRITTEN_BY_TEACHER = ("base_t", "teacher_t", "self_instruct")


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say. origin: name -> `assumed`, `given` or `measured`.

    Tokens are means a row; reward_tokens of an attempt at a reward question, which is greedy unless the config says
    otherwise (0: as hard_tokens). gradient shares: rows of students that carry a gradient; without a KL term rows of a group
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
    reward_tokens: float = 0.0
    question_gradient_share: float = 0.5
    hard_gradient_share: float = 0.05
    promotions: float = 0.0
    origin: Mapping[str, str] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, float], origin: str) -> Assumptions:
        """A copy with these values and their origin. Raises ConfigError for an unknown name or an impossible value."""
        known = {f.name for f in fields(self)} - {"origin"}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"--assume {name}: no such assumption; known: {', '.join(sorted(known))}")
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
    student, teacher = config.student, config.teacher
    guess = Assumptions(
        teacher_tokens=teacher.sampling.max_tokens / 2,
        question_tokens=student.sampling.max_tokens / 2,
        hard_tokens=student.sampling.max_tokens / 2,
    )
    if student.optimizer.kl > 0:
        guess = guess.with_values({"question_gradient_share": 1.0, "hard_gradient_share": 1.0}, "by the KL term")
    source = config.problems.source
    local = source.startswith(GENERATED) or Path(source).expanduser().is_file()
    try:
        count = len(candidates(config).problems) if local else 0
    except (UserError, ImportError):
        count = 0  # `soar check` says what is wrong with the problems; a plan is still worth having
    if count:
        guess = guess.with_values({"candidates": float(count)}, "counted")
    elif config.problems.limit:
        guess = guess.with_values({"candidates": float(config.problems.limit)}, "problems.limit")
    if screened_before(config):
        guess = guess.with_values({"hard_share": 1.0}, "screened before")
    return guess


def screened_before(config: Config) -> bool:
    """Whether a run would not screen: there is evidence beside the problem file, or screening is off."""
    return not config.screen.attempts or evidence_path(Path(config.problems.source).expanduser()).is_file()


@dataclass(frozen=True)
class Work:
    """One line of a forecast.

    stage: as in `wall_seconds` of summary.json. kind: whose rates apply. sampled: tokens of completions. trained: tokens
    of prompts and completions that pass forward and backward.
    """

    stage: str
    name: str
    kind: str
    rollouts: float
    sampled: float
    trained: float


def inner_steps_mean(config: Config, promotions: float) -> float:
    """Mean RLOO steps of an inner loop when promotions are spread evenly over the outer loop."""
    student, steps = config.student, config.teacher.steps
    if not steps:
        return 0.0
    at = (student.steps + student.extra_steps_per_promotion * math.floor(promotions * t / steps) for t in range(steps))
    return sum(min(student.max_steps, each) for each in at) / steps


def workload(config: Config, known: Assumptions) -> list[Work]:
    """Every part of a run, in order."""
    screening = 0.0 if screened_before(config) else known.candidates * config.screen.attempts
    hard = known.candidates * known.hard_share
    if config.problems.max_hard:
        hard = min(hard, config.problems.max_hard)
    held_out = hard * config.problems.test_share
    works = [Work("screen", "screening", "screen", screening, screening * known.hard_tokens, 0.0)]
    loop = _loop(config, known, hard - held_out)
    works += loop
    spent = sum(work.rollouts for work in loop if work.kind in ("student", "measure"))
    works += [_arm(arm, config, known, hard - held_out, spent) for arm in trained_arms(config)]
    attempts = held_out * config.evaluate.attempts * len(config.arms.run)
    return [*works, Work("evaluate", "evaluation", "evaluate", attempts, attempts * known.hard_tokens, 0.0)]


def trained_arms(config: Config) -> list[str]:
    """The arms of arms.run that are trained, in the order in which they are."""
    return [arm for arm in get_args(TrainedArm) if arm in config.arms.run]


def _loop(config: Config, known: Assumptions, hard_train: float) -> list[Work]:
    teacher, student, reward = config.teacher, config.student, config.reward
    pairs = teacher.steps * teacher.datasets * teacher.questions
    wanted = teacher.datasets * teacher.questions
    texts = max(pairs * known.texts_per_pair, teacher.steps * texts_at_once(wanted, wanted))
    students = teacher.steps * teacher.datasets * student.repeats
    steps = inner_steps_mean(config, known.promotions)
    sampled = students * steps * student.prompts_per_step * student.attempts
    trained = sampled * known.question_gradient_share * (known.question_prompt_tokens + known.question_tokens)
    asked = min(reward.questions, hard_train)
    once = 1 if reward.mode == "greedy" else reward.baseline_attempts
    # The baseline is asked each question once while it stands.
    baseline = once * min(hard_train * (1 + known.promotions), asked * teacher.steps)
    intrinsic = pairs * config.intrinsic.attempts if teacher.reward in INTRINSIC else 0.0
    learned = pairs * (known.teacher_prompt_tokens + known.teacher_tokens) if teacher.reward != "none" else 0.0
    measured = students * asked * reward.attempts + baseline
    return [
        Work("loop", "teacher writes", "write", texts, texts * known.teacher_tokens, 0.0),
        Work("loop", "students train", "student", sampled, sampled * known.question_tokens, trained),
        Work(
            "loop",
            "students measured",
            "measure",
            measured + intrinsic,
            measured * (known.reward_tokens or known.hard_tokens) + intrinsic * known.question_tokens,
            0.0,
        ),
        Work("loop", "teacher learns", "teacher", 0.0, 0.0, learned),
    ]


def _arm(arm: str, config: Config, known: Assumptions, hard_train: float, spent: float) -> Work:
    """An arm on hard problems and, unless it has those alone, on questions: mixed by number, or one after the other."""
    student, arms = config.student, config.arms
    per_step = student.prompts_per_step * student.attempts
    fixed = 0 if arm == "hard_only" else arms.pq_steps
    steps = fixed or arms.steps or max(1, math.ceil(spent / per_step))
    promoted = max(1.0, known.promotions) * config.teacher.questions
    questions = 0.0 if arm in HARD_ARMS else promoted if arm.startswith("pq") else float(arms.questions)
    mode = {"pq_mixed": "mixed", "pq_curriculum": "curriculum"}.get(arm, arms.pq_mode)
    share = questions / max(1.0, questions + hard_train)
    if mode == "curriculum" and questions:
        share = min(steps, arms.curriculum_steps) / steps
    rollouts = float(steps * per_step)
    tokens = share * known.question_tokens + (1 - share) * known.hard_tokens
    trained = rollouts * (
        share * known.question_gradient_share * (known.question_prompt_tokens + known.question_tokens)
        + (1 - share) * known.hard_gradient_share * (known.hard_prompt_tokens + known.hard_tokens)
    )
    written = arms.questions * known.texts_per_pair * known.teacher_tokens if arm in WRITTEN_BY_TEACHER else 0.0
    written += arms.questions * arms.votes * known.question_tokens if arm == "self_instruct" else 0.0
    return Work("arms", arm, "arm", rollouts, rollouts * tokens + written, trained)


def plan_lines(config: Config) -> list[str]:
    """Rollouts of every stage, and the most tokens they can have, as text lines.

    The number of candidates and hard problems is known after loading and screening, and promotions only after the run,
    so the outer loop is shown as a range: from no promotion, with the baseline measured once on each reward question,
    to a promotion whenever the window allows one. A training half smaller than reward.questions makes it cheaper.
    """
    teacher, student, reward = config.teacher, config.student, config.reward
    steps, students = teacher.steps, teacher.datasets * student.repeats
    per_student = student.prompts_per_step * student.attempts
    shortest = min(student.max_steps, student.steps)
    promotions = max(0, steps - 1) // config.promotion.window
    longest = min(student.max_steps, student.steps + student.extra_steps_per_promotion * promotions)
    measured = students * reward.questions * reward.attempts
    baseline = reward.questions * (1 if reward.mode == "greedy" else reward.baseline_attempts)
    low = students * shortest * per_student + measured
    high = students * longest * per_student + measured + baseline
    low += intrinsic_attempts(config)
    high += intrinsic_attempts(config)
    all_low, all_high = (low * steps + baseline, high * steps) if steps else (0, 0)
    arms = [arm for arm in get_args(TrainedArm) if arm in config.arms.run]
    budget = config.arms.steps * per_student if config.arms.steps else all_low
    pairs = teacher.datasets * teacher.questions
    lines = [
        "plan",
        f"  screening    {config.screen.attempts} attempts at each candidate"
        + (f" ({config.problems.limit} at most)" if config.problems.limit else ""),
        f"  outer loop   {steps} steps x ({pairs} pairs of the teacher -> {students} students x {shortest} RLOO steps "
        f"x {student.prompts_per_step} prompts x {student.attempts} attempts, then {reward.questions} reward questions)",
        f"               {low:,} to {high:,} student rollouts a step, {all_low:,} to {all_high:,} in all, "
        f"at most {all_high * student.sampling.max_tokens:,} tokens",
    ]
    for arm in arms:
        fixed = config.arms.pq_steps if arm != "hard_only" and config.arms.pq_steps else config.arms.steps
        own = f"{fixed * per_student:,}" if fixed else f"at least {budget:,}"
        lines.append(f"  {arm:12s} {own} student rollouts")
    lines.append(
        f"  evaluation   {config.evaluate.attempts} attempts at each held-out problem for {len(config.arms.run)} arms"
    )
    return lines


def intrinsic_attempts(config: Config) -> int:
    """RolloutBatch of the baseline student at the written questions of one outer step, for an intrinsic teacher reward."""
    if config.teacher.reward not in INTRINSIC:
        return 0
    return config.teacher.datasets * config.teacher.questions * config.intrinsic.attempts


PAPER_HOURS = "the paper's run: 1,536 to 1,920 GPU-hours (32 H100 or H200 for 48 to 60 hours)"
KL_FACTOR = 1.5  # a reference pass forward on top of one pass forward and one backward, base weights frozen
SMALLEST_KNOWN = 50e6  # parameters under which the table says nothing: such models are bound by overhead


@dataclass(frozen=True)
class Known:
    """Measured rates of one model shape on one device, 16 adapters, no KL term."""

    device: str
    parameters: float
    decode: float
    train: float
    source: str


MEASURED = "benchmarks/results/h200-default.json and h200-attention.json"
TABLE = (
    Known("NVIDIA H200", 134.5e6, 388_839, 203_744, f"decode-135m and train-135m of {MEASURED}"),
    Known("NVIDIA H200", 3.213e9, 40_572, 32_966, f"decode-3b and train-3b of {MEASURED}"),
)


@dataclass(frozen=True)
class Rates:
    """Tokens a second. sample: by kind of work (completion tokens). train: by kind (prompt and completion tokens, the KL
    term's reference pass included). source: where they were measured."""

    sample: Mapping[str, float]
    train: Mapping[str, float]
    source: str


def table_rates(parameters: float, kl_student: bool, kl_teacher: bool) -> Rates | None:
    """Rates of the known shape nearest in size, scaled by parameters; None for a model far smaller than any of them."""
    if parameters < SMALLEST_KNOWN:
        return None
    near = min(TABLE, key=lambda known: abs(math.log(known.parameters / parameters)))
    scale = near.parameters / parameters
    student = near.train * scale / (KL_FACTOR if kl_student else 1.0)
    teacher = near.train * scale / (KL_FACTOR if kl_teacher else 1.0)
    scaled = "" if 0.9 < scale < 1.1 else f", scaled by {scale:.3g} for its size"
    return Rates(
        dict.fromkeys(("screen", "write", "student", "measure", "arm", "evaluate"), near.decode * scale),
        {"student": student, "arm": student, "teacher": teacher},
        f"{near.device}, {near.source}{scaled}; the first outer step of the run shows its own",
    )


@dataclass(frozen=True)
class Forecast:
    """works with their seconds in one process; None where there is no rate."""

    works: tuple[Work, ...]
    seconds: tuple[float | None, ...]
    assumptions: Assumptions
    rates: Rates | None

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage; {} without rates."""
        if self.rates is None:
            return {}
        pairs = list(zip(self.works, self.seconds, strict=True))
        return {stage: sum(s or 0.0 for work, s in pairs if work.stage == stage) for stage in STAGES}

    def lines(self) -> list[str]:
        """The forecast as a table, with what it rests on."""
        head = f"  {'':18s} {'rollouts':>14s} {'tokens sampled':>16s} {'tokens trained':>16s} {'time':>11s}"
        body = [
            f"  {work.name:18s} {work.rollouts:14,.0f} {work.sampled:16,.0f} {work.trained:16,.0f} {_time(seconds):>11s}"
            for work, seconds in zip(self.works, self.seconds, strict=True)
        ]
        sampled, trained = sum(w.sampled for w in self.works), sum(w.trained for w in self.works)
        rollouts = sum(w.rollouts for w in self.works)
        total = sum(self.stage_seconds().values()) if self.rates is not None else None
        body.append(f"  {'in all':18s} {rollouts:14,.0f} {sampled:16,.0f} {trained:16,.0f} {_time(total):>11s}")
        if self.rates is None or total is None:
            body.append("  no time: no rate is known for a model of this size")
        else:
            body.append(f"  {total / 3600:,.2f} device-hours, in one process on one device; {PAPER_HOURS}")
            body.append(f"  rates: {self.rates.source}")
            for what, rates in (("sampled", self.rates.sample), ("trained", self.rates.train)):
                each = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.items())
                body.append(f"  {what} tokens a second: {each}")
        return ["forecast", head, *body, "it rests on (--assume NAME=VALUE replaces one)", *self.assumptions.lines()]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"


def forecast(config: Config, assumptions: Assumptions, rates: Rates | None) -> Forecast:
    """Seconds of a part = tokens sampled / sampling rate of its kind + tokens trained / training rate of its kind."""
    works = workload(config, assumptions)

    def seconds(work: Work, rates: Rates) -> float:
        taken = work.sampled / rates.sample[work.kind] if work.sampled else 0.0
        return taken + (work.trained / rates.train[work.kind] if work.trained else 0.0)

    return Forecast(
        tuple(works), tuple(None if rates is None else seconds(work, rates) for work in works), assumptions, rates
    )


def table_forecast(config: Config, assumptions: Assumptions) -> Forecast:
    """The forecast from the table of known rates, for the size that the model's files or name tell."""
    shape = shape_of(config)
    kl_student, kl_teacher = config.student.optimizer.kl > 0, config.teacher.optimizer.kl > 0
    rates = None if shape is None else table_rates(shape.parameters, kl_student, kl_teacher)
    return forecast(config, assumptions, rates)


def total_line(config: Config) -> str:
    """The forecast from the table in one line, for a list of runs."""
    expected = table_forecast(config, assumed(config))
    tokens = sum(work.sampled for work in expected.works)
    if expected.rates is None:
        return f"  forecast     {tokens:,.0f} tokens sampled; no rate is known for a model of this size"
    hours = sum(expected.stage_seconds().values()) / 3600
    return f"  forecast     {tokens:,.0f} tokens sampled, {hours:,.2f} device-hours; rates: {expected.rates.source}"


def memory_lines(config: Config, assumptions: Assumptions, shape: ModelShape | None = None) -> list[str]:
    """Memory per device with its arithmetic; nothing for a model whose shape cannot be told."""
    shape = shape or shape_of(config)
    if shape is None:
        return ["memory per device: unknown, the model is not in the local cache and its name tells no size"]
    prompt = math.ceil(max(assumptions.question_prompt_tokens, assumptions.hard_prompt_tokens))
    needed = memory_of(config, shape, prompt)
    lines = ["memory per device", *needed.lines()]
    if config.model.sampler == "vllm":
        share, devices = config.model.vllm_memory, config.model.vllm_devices
        own = needed.shape.parameters * 2 / GIB / devices
        lines.append(
            f"  vLLM         {share:8.0%} of each of {devices} GPU, by model.vllm_memory: its own {own:.2f} GiB of weights, "
            "adapters and cache"
        )
    return lines
